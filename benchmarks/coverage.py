"""Does a 95% interval cover 95% of the time? Simulated studies, by the functions that 05 uses.

    .venv/bin/python benchmarks/coverage.py [--studies 2000] [--output results/benchmarks/coverage.json]

Each cell draws 2,000 studies from a known truth and counts how often each interval holds it. A cell is a true rate, a number of
questions, of answers a question, a correlation of answers to one question, and a shape of the questions' own rates: beta or
logit-normal (a heavier tail). The table gives the share of studies for which the rule on observables allows an interval, the coverage
over those, and the median width; the candidates that were passed over stand beside. Paired changes and the interval for fixed
questions have smaller tables of their own.

Two-point rates (a share of questions never, the rest equally often) are a stress test, summed up apart: where the rarer kind is absent
from the sample, nothing in it shows that it exists, and no interval that is narrower than one answer a question allows can cover it.
Takes about two minutes.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # tests import this, and must find their environment as it was
    os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
from scipy import optimize, special
from scipy import stats as distributions
from statsmodels.stats.proportion import proportion_confint

from lib import files, stats

RATES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
QUESTIONS = (5, 8, 10, 15, 20, 30, 50)
SAMPLES = (1, 2, 5, 10, 50)
ICCS = (0.0, 0.1, 0.3, 0.5)
SHAPES = ("beta", "logit-normal")
STRESS = "two-point"
CHANGES = ((0.02, 0.02), (0.02, 0.1), (0.02, 0.3), (0.1, 0.2), (0.05, 0.6), (0.5, 0.5), (0.3, 0.9))
CONFIDENCE = 0.95
TARGET = 0.93
"""Coverage that every cell with `ENOUGH` accepted studies must reach."""
ENOUGH = 100
BOOTSTRAP = 1000

Array = np.ndarray[Any, np.dtype[np.float64]]
_GRID = (np.arange(4000) + 0.5) / 4000


def own_rates(shape: str, rate: float, icc: float) -> Array:
    """Returns the rates of 4,000 questions, in rising order, with the given mean and correlation (variance over rate·(1−rate))."""
    if icc == 0:
        return np.full(len(_GRID), rate)
    if shape == "beta":
        size = 1 / icc - 1
        return np.asarray(distributions.beta.ppf(_GRID, rate * size, (1 - rate) * size))
    if shape == "two-point":
        high = rate + icc * (1 - rate)
        return np.where(1 - rate / high < _GRID, high, 0.0)
    normal = distributions.norm.ppf(_GRID)

    def centre(spread: float) -> float:
        return float(optimize.brentq(lambda m: special.expit(m + spread * normal).mean() - rate, -400, 400))

    def excess(spread: float) -> float:
        own = special.expit(centre(spread) + spread * normal)
        return float(((own - rate) ** 2).mean() / (rate * (1 - rate)) - icc)

    spread = float(optimize.brentq(excess, 1e-3, 80))
    return np.asarray(special.expit(centre(spread) + spread * normal))


def cluster_t(k: Array, m: int) -> tuple[Array, Array]:
    """Mean of question rates ± t with G − 1 degrees of freedom."""
    means = k / m
    half = _t(k.shape[1]) * means.std(axis=1, ddof=1) / math.sqrt(k.shape[1])
    return means.mean(axis=1) - half, means.mean(axis=1) + half


def wilson_effective(k: Array, m: int) -> tuple[Array, Array]:
    """Wilson on the effective number of answers, with the t quantile."""
    effective, t = _effective(k, m), _t(k.shape[1])
    low, high = stats.wilson(k.mean(axis=1) / m * effective, effective, 1 - 2 * float(distributions.norm.sf(t)))
    return np.asarray(low), np.asarray(high)


def korn_graubard(k: Array, m: int) -> tuple[Array, Array]:
    """Clopper–Pearson on the effective number of answers, lessened by (z/t)² with G − 1 degrees of freedom."""
    lessened = np.maximum(_effective(k, m) * (distributions.norm.ppf(0.5 + CONFIDENCE / 2) / _t(k.shape[1])) ** 2, 1)
    hits = k.mean(axis=1) / m * lessened
    low, high = proportion_confint(hits, lessened, alpha=1 - CONFIDENCE, method="beta")
    return np.asarray(low), np.asarray(high)


def gee_bias_reduced(k: Array, m: int) -> tuple[Array, Array]:
    """Logit of the rate with the Mancl–DeRouen variance, which for an intercept alone has a closed form; NaN where k is 0 or n."""
    questions = k.shape[1]
    rate = k.mean(axis=1) / m
    inflated = ((k - m * rate[:, None]) ** 2).sum(axis=1) * (questions / (questions - 1)) ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.sqrt(inflated) / (questions * m * rate * (1 - rate))
        return special.expit(special.logit(rate) - _t(questions) * error), special.expit(special.logit(rate) + _t(questions) * error)


def bootstrap(k: Array, m: int) -> tuple[Array, Array]:
    """Percentile bootstrap of questions; NaN below 30 questions, where it is no candidate."""
    studies, questions = k.shape
    if questions < 30:
        return np.full(studies, np.nan), np.full(studies, np.nan)
    weights = np.random.default_rng(0).multinomial(questions, np.full(questions, 1 / questions), size=BOOTSTRAP)
    means = (k / m) @ weights.T / questions
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=1)
    return low, high


def _t(questions: int) -> float:
    return float(distributions.t.ppf(0.5 + CONFIDENCE / 2, questions - 1))


def _effective(k: Array, m: int) -> Array:
    """Effective answers from the cluster variance; the number of questions where k is 0 or n."""
    questions = k.shape[1]
    rate = k.mean(axis=1) / m
    variance = (k / m).var(axis=1, ddof=1) / questions
    with np.errstate(divide="ignore", invalid="ignore"):
        effective = np.where(variance > 0, rate * (1 - rate) / variance, questions * m)
    effective = np.where((rate == 0) | (rate == 1), questions, np.clip(effective, questions, questions * m))
    return np.asarray(effective)


CANDIDATES: dict[str, Callable[[Array, int], tuple[Array, Array]]] = {
    "cluster_t": cluster_t,
    "wilson_effective": wilson_effective,
    "korn_graubard": korn_graubard,
    "gee_bias_reduced": gee_bias_reduced,
    "bootstrap": bootstrap,
}


def covered(low: Array, high: Array, truth: float | Array) -> tuple[float, float]:
    """Returns the share of studies that were given an interval, and among those the share whose interval holds the truth."""
    given = ~np.isnan(low)
    hold = (low <= truth + 1e-12) & (high >= truth - 1e-12)
    return float(given.mean()), float(hold[given].mean()) if given.any() else float("nan")


def rate_cells(studies: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Simulates rates: the interval of 05 for questions like these, and the candidates."""
    for shape, icc, rate in itertools.product((*SHAPES, STRESS), ICCS, RATES):
        if (icc == 0 and shape != "beta") or (shape == STRESS and icc != 0.3):
            continue
        own = own_rates(shape, rate, icc)
        for questions, samples in itertools.product(QUESTIONS, SAMPLES):
            k = rng.binomial(samples, rng.choice(own, (studies, questions))).astype(float)
            low, high, _ = stats.population_intervals(k, np.full_like(k, samples), CONFIDENCE)
            accepted, coverage = covered(low, high, rate)
            row = {"shape": shape, "rate": rate, "questions": questions, "samples": samples, "icc": icc}
            row |= {"accepted": accepted, "coverage": coverage, "width": float(np.nanmedian(high - low))}
            yield row | {name: covered(*candidate(k, samples), rate)[1] for name, candidate in CANDIDATES.items()}


def change_cells(studies: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Simulates changes paired by question; half of the questions keep their rank from base to step."""
    for shape, icc, (base, end) in itertools.product(SHAPES, ICCS, CHANGES):
        if icc == 0 and shape != "beta":
            continue
        before, after = own_rates(shape, base, icc), own_rates(shape, end, icc)
        for questions, samples in itertools.product((5, 8, 10, 20, 50), (1, 2, 5, 50)):
            rank = rng.integers(len(_GRID), size=(studies, questions))
            later = np.where(rng.random(rank.shape) < 0.5, rank, rng.integers(len(_GRID), size=rank.shape))
            drawn = [rng.binomial(samples, own[which]) / samples for own, which in ((before, rank), (after, later))]
            difference = drawn[1] - drawn[0]
            mean, low, high = stats.paired_intervals(difference, CONFIDENCE)
            accepted, coverage = covered(low, high, end - base)
            plain = _t(questions) * difference.std(axis=1, ddof=1) / math.sqrt(questions)
            shown = {"shape": shape, "base": base, "step": end, "questions": questions, "samples": samples, "icc": icc}
            enough = {"accepted": accepted, "coverage": coverage, "width": float(np.nanmedian(high - low)) if accepted else float("nan")}
            yield shown | enough | {"cluster_t": covered(mean - plain, mean + plain, end - base)[1]}


def fixed_cells(studies: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Simulates the interval for these very questions: the truth is the mean of the rates that the questions happen to have."""
    for icc, rate, questions, samples in itertools.product((0.0, 0.3), (0.05, 0.2, 0.5), (8, 20), (1, 2, 5, 50)):
        own = rng.choice(own_rates("beta", rate, icc), (studies, questions))
        k = rng.binomial(samples, own)
        bounds = np.array([stats.fixed_interval(row, np.full(questions, samples), CONFIDENCE) for row in k])
        _, coverage = covered(bounds[:, 0], bounds[:, 1], own.mean(axis=1))
        yield {"rate": rate, "questions": questions, "samples": samples, "icc": icc, "coverage": coverage}


def verdict(rates: pd.DataFrame, changes: pd.DataFrame, fixed: pd.DataFrame, studies: int) -> dict[str, Any]:
    """Sums the tables up: the least coverage over cells with enough accepted studies, and the least share accepted."""
    asked = rates[(rates["questions"] >= 8) & (rates["shape"] != STRESS)]
    stress = rates[(rates["questions"] >= 8) & (rates["shape"] == STRESS)]
    kept = asked[asked["accepted"] * studies >= ENOUGH]
    common = asked[(asked["questions"] >= 20) & asked["rate"].between(0.1, 0.9)]
    moved = changes[changes["accepted"] * studies >= ENOUGH]
    return {
        "cells": len(asked),
        "least_coverage": float(kept["coverage"].min()),
        "least_coverage_by_shape": {str(shape): float(group["coverage"].min()) for shape, group in kept.groupby("shape")},
        "cells_below_target": int((kept["coverage"] < TARGET).sum()),
        "least_accepted_from_20_questions": float(common["accepted"].min()),
        "candidates": {
            name: {"least_coverage": float(kept[name].min()), "cells_below_target": int((kept[name] < TARGET).sum())} for name in CANDIDATES
        },
        "stress": {
            "cells": len(stress),
            "least_coverage": float(stress["coverage"].min()),
            "cells_below_target": int((stress["coverage"] < TARGET).sum()),
            "candidates_below_target": {name: int((stress[name] < TARGET).sum()) for name in CANDIDATES},
        },
        "changes": {
            "cells": len(moved),
            "least_coverage": float(moved["coverage"].min()),
            "cells_below_target": int((moved["coverage"] < TARGET).sum()),
            "cluster_t_cells_below_target": int((moved["cluster_t"] < TARGET).sum()),
        },
        "fixed_questions": {"cells": len(fixed), "least_coverage": float(fixed["coverage"].min())},
    }


def simulate(studies: int, seed: int = 0) -> dict[str, Any]:
    """Runs all cells; returns the verdict and the three tables (JSON-ready, NaN as null)."""
    rng = np.random.default_rng(seed)
    tables = {
        "rates": pd.DataFrame(rate_cells(studies, rng)),
        "changes": pd.DataFrame(change_cells(studies, rng)),
        "fixed": pd.DataFrame(fixed_cells(min(studies, 1000), rng)),
    }
    summed = verdict(tables["rates"], tables["changes"], tables["fixed"], studies)
    rows = {name: table.round(4).astype(object).where(table.notna(), None).to_dict("split", index=False) for name, table in tables.items()}
    return {"studies": studies, "seed": seed, "confidence": CONFIDENCE, "target": TARGET, "verdict": summed} | rows


def main() -> int:
    parser = argparse.ArgumentParser(description="Simulated coverage of the study's intervals.")
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=files.ROOT / "results" / "benchmarks" / "coverage.json")
    options = parser.parse_args()
    began = time.monotonic()
    outcome = simulate(options.studies)
    files.write_json(options.output, outcome)
    told = outcome["verdict"]
    print(f"{files.shown(options.output)}: {told['cells']} cells of {options.studies} studies in {time.monotonic() - began:.0f} s")
    by_shape = told["least_coverage_by_shape"]
    print(f"least coverage {told['least_coverage']:.3f}, {told['cells_below_target']} cells below {TARGET}; by shape {by_shape}")
    print(f"least share accepted, 20 questions or more and rates 0.1 to 0.9: {told['least_accepted_from_20_questions']:.3f}")
    print(f"stress test: {told['stress']}")
    print(f"candidates passed over: {told['candidates']}")
    print(f"paired changes: {told['changes']}; fixed questions: {told['fixed_questions']}")
    return 0 if told["cells_below_target"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
