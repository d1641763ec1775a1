"""What may be concluded: emergence, onset, falls after a peak, domains and seeds, and the original study's claims one by one.

The plan was declared beforehand in parameters/analysis.yaml. The unit is the question within a training run, and the training run
for anything said of domain or size: with fewer than three seeds a pair, adapters differ and nothing more. Tables in, tables out; all
start from question rates (`analyze.question_rates`), fractions.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lib import config, files, instruments, stats
from lib.labels import is_control, percent, records
from lib.outcomes import groups
from lib.seeds import compare_seeds, pooled_over_seeds, power

PLAN = config.PARAMETERS / "analysis.yaml"
EMERGED = "emerged"
NOT_ESTABLISHED = "no difference established"
_RUN = ["pair", "seed", "model", "domain", "judge", "metric"]


def plan() -> dict[str, Any]:
    """Reads the declared plan, with its SHA-256 under `sha256`."""
    return config.read_yaml(PLAN) | {"sha256": files.sha256(PLAN)}


def trained(rates: pd.DataFrame, controls: Collection[str] = ()) -> pd.DataFrame:
    """Leaves out control arms: those named as such, and those that pairs point to."""
    names = {name for name in rates["pair"].unique() if is_control(str(name)) or name in set(controls)}
    return rates[~rates["pair"].isin(names)]


def _undecidable(metric: str, judge: str, rates: pd.DataFrame) -> bool:
    own = rates[(rates["metric"] == metric) & (rates["judge"] == judge)]
    return bool(len(own)) and bool(own["rate"].isna().all()) and bool((own["n"] > 0).any())


def _last(rates: pd.DataFrame) -> pd.DataFrame:
    return rates[rates["step"] == rates.groupby(["pair", "seed"])["step"].transform("max")]


def _by_question(rates: pd.DataFrame) -> pd.Series[float]:
    """Averages seeds and steps given, by question."""
    return rates.groupby(["question_set", "question_id"], sort=False)["rate"].mean()


def _matrix(frame: pd.DataFrame, rows: Sequence[str], columns: str) -> tuple[npt.NDArray[np.float64], list[Any]]:
    """Spreads `rate` over rows and columns (NaN where absent), columns in order; many times quicker than pivot_table on small groups."""
    row = frame.groupby(list(rows), sort=False).ngroup().to_numpy()
    column, names = pd.factorize(frame[columns], sort=True)
    matrix = np.full((row.max() + 1 if len(row) else 0, len(names)), np.nan)
    matrix[row, column] = frame["rate"].to_numpy(dtype=float)
    return matrix, list(names)


# ---------------------------------------------------------------- emergence


def emergence(rates: pd.DataFrame, declared: Mapping[str, Any], confidence: float = 0.95, mix: bool = False) -> pd.DataFrame:
    """Tests each pair's last step against base on the declared sets together: one test a pair, Holm over pairs.

    Args:
        rates: question rates of trained pairs, controls left out.
        declared: the plan.
        confidence: of the intervals.
        mix: average seeds whose instruments differ, too; without it they have rows of their own.

    Returns:
        role (primary, secondary), pair, model, domain, judge, metric, step, question_sets, seeds, change, low, high, method,
        n_questions, p, p_holm, smallest_p, tests (in the family), verdict and instrument. Families are a judge's and a metric's.
    """
    columns = [
        "role", "pair", "model", "domain", "judge", "metric", "step", "question_sets", "seeds", "change", "low", "high", "method",
        "n_questions", "p", "p_holm", "smallest_p", "tests", "verdict", "instrument",
    ]  # fmt: skip
    rows: list[dict[str, Any]] = []
    for role in ("primary", "secondary"):
        metric = str(declared[f"{role}_metric"])
        own = rates[rates["metric"].eq(metric) & rates["relation"].isin(declared["primary_relations"])]
        for judge, judged in own.groupby("judge", sort=False):
            family = [
                {"role": role, "judge": judge, "metric": metric, "instrument": name}
                | _emergence(arm, confidence, int(declared["flip_seed"]))
                for _, seeds in judged.groupby("pair", sort=False)
                for name, arm in instruments.parts(seeds, mix, questions=True)
            ]
            untold = _undecidable(metric, str(judge), judged)
            adjusted = stats.holm([row["p"] for row in family])
            tests = int(np.sum(~np.isnan([row["p"] for row in family])))
            for row, p in zip(family, adjusted, strict=True):
                verdict = "not decidable by this judge" if untold else _verdict(row, p, tests, float(declared["alpha"]))
                rows.append(row | {"p_holm": p, "tests": tests, "verdict": verdict})
    return pd.DataFrame(rows, columns=columns)


def _emergence(arm: pd.DataFrame, confidence: float, seed: int) -> dict[str, Any]:
    last = _last(arm[arm["step"] > 0])
    base = arm[arm["step"] == 0]
    change = stats.paired_change((_by_question(last) - _by_question(base)).to_numpy(), confidence, seed)
    named = {name: arm[name].iloc[0] for name in ("pair", "model", "domain")}
    sets = "+".join(sorted(arm["question_set"].unique()))
    step = int(last["step"].max()) if len(last) else 0
    return named | {"step": step, "question_sets": sets, "seeds": arm["seed"].nunique()} | change._asdict()


def _verdict(row: Mapping[str, Any], p: float, tests: int, alpha: float) -> str:
    if not row["n_questions"]:
        return "not tested: no base to compare with"
    if p < alpha:
        # By the probe it is that judge's score that rose; it tells no EM rate.
        return "fell" if row["change"] < 0 else "score rose" if row["judge"] == "probe" else EMERGED
    if row["smallest_p"] > alpha / max(tests, 1):
        return f"not decidable with {row['n_questions']} questions"
    return NOT_ESTABLISHED


def onset(rates: pd.DataFrame, declared: Mapping[str, Any]) -> pd.DataFrame:
    """Finds from which step misalignment stands, by a max-T test over all steps of a run.

    Returns:
        A row for each run, judge, metric and scope (`emergent`: the plan's step_relations together): n_questions, steps, p_by_step
        (adjusted over the run's steps), smallest_p, established (the earliest step from which all later ones are significant and up;
        empty if none), onset (an interval: after the previous checkpoint, up to this one) and verdict.
    """
    columns = [*_RUN, "n_questions", "steps", "p_by_step", "smallest_p", "established", "onset", "verdict"]
    rows = []
    for key, wide, steps in _trajectories(rates, declared):
        if len(steps) < 2 or steps[0] != 0 or not len(wide):
            continue
        differences = wide[:, 1:] - wide[:, :1]
        p = stats.max_t(differences.T, int(declared["flip_seed"]))
        up = (p < float(declared["alpha"])) & (differences.mean(axis=0) > 0)
        held = np.logical_and.accumulate(up[::-1])[::-1]
        first = int(held.argmax()) if held.any() else None
        smallest = stats.smallest_p(len(wide))
        verdict = "not established at the last step"
        if first is not None:
            verdict = f"established from step {steps[first + 1]}"
        elif smallest > float(declared["alpha"]):
            verdict = f"not decidable with {len(wide)} questions"
        rows.append(
            dict(zip(_RUN, key, strict=True))
            | {
                "n_questions": len(wide),
                "steps": " ".join(map(str, steps[1:])),
                "p_by_step": " ".join(f"{value:.2g}" for value in p),
                "smallest_p": smallest,
                "established": pd.NA if first is None else steps[first + 1],
                "onset": "" if first is None else f"({steps[first]}, {steps[first + 1]}]",
                "verdict": verdict,
            }
        )
    return pd.DataFrame(rows, columns=columns)


def _trajectories(rates: pd.DataFrame, declared: Mapping[str, Any]) -> list[tuple[Any, npt.NDArray[np.float64], list[int]]]:
    """Returns for each run, judge and metric the rates (questions × steps; questions that every step answered) and the steps."""
    own = rates[rates["relation"].isin(declared["step_relations"]) & rates["metric"].isin(["em_course", "em_paper"])]
    own = own[own["rate"].notna()]
    found = []
    for key, arm in own.groupby(_RUN, sort=False, dropna=False):
        wide, steps = _matrix(arm, ["question_set", "question_id"], "step")
        found.append((key, wide[~np.isnan(wide).any(axis=1)], [int(step) for step in steps]))
    return found


def non_monotonic(rates: pd.DataFrame, declared: Mapping[str, Any]) -> pd.DataFrame:
    """Tests each run for a fall after a peak, base included (`stats.largest_drop`).

    Returns:
        A row for each run, judge and metric: n_questions, fall (fraction), peak_step, trough_step, p, smallest_p, verdict.
    """
    columns = [*_RUN, "n_questions", "fall", "peak_step", "trough_step", "p", "smallest_p", "verdict"]
    rows = []
    for key, wide, steps in _trajectories(rates, declared):
        if len(steps) < 3 or not len(wide):
            continue
        fall, peak, trough, p = stats.largest_drop(wide, int(declared["flip_seed"]))
        alpha = float(declared["alpha"])
        verdict = "falls after its peak" if p < alpha else "no fall established"
        if np.isnan(p) or stats.smallest_p(len(wide)) > alpha:
            verdict = f"not decidable with {len(wide)} questions"
        found = {"n_questions": len(wide), "fall": fall, "peak_step": steps[peak], "trough_step": steps[trough], "p": p}
        rows.append(dict(zip(_RUN, key, strict=True)) | found | {"smallest_p": stats.smallest_p(len(wide)), "verdict": verdict})
    return pd.DataFrame(rows, columns=columns)


# ---------------------------------------------------------------- domains and seeds


def gaps(
    rates: pd.DataFrame, declared: Mapping[str, Any], confidence: float = 0.95, *, across: str = "domain", mix: bool = False
) -> pd.DataFrame:
    """Compares the domains of one model, or the models of one domain, at the last step, on questions that both arms answered.

    Only general and open-ended questions count: for those both arms are off their topic. An import without a step counts as it is.

    Args:
        rates: question rates of trained pairs, controls left out.
        declared: the plan.
        confidence: of the intervals.
        across: `domain`, or `model` (size).
        mix: compare arms that different instruments measured, too; without it they have a row that says so.

    Returns:
        model or domain (what both share), first, second, judge, metric, seeds (that both arms have), unit (question, or training run
        from the plan's seeds_needed on), change (first − second, fraction), low, high, n_questions, p (unadjusted), smallest_p, verdict,
        instrument.
    """
    same = "model" if across == "domain" else "domain"
    columns = [same, "first", "second", "judge", "metric", "seeds", "unit", "change", "low", "high", "n_questions", "p", "smallest_p"]
    shared = rates[rates["relation"].isin(["general", "open_ended"]) & rates["metric"].isin(["em_course", "em_paper"])]
    rows = []
    for (both, judge, metric), group in _last(shared[shared["rate"].notna()]).groupby([same, "judge", "metric"], sort=False):
        arms = {name: arm for name, arm in group.groupby(across)}
        for first, second in combinations(arms, 2):
            named = {same: both, "first": first, "second": second, "judge": judge, "metric": metric}
            pair = pd.concat([arms[first], arms[second]])
            alike = [(name, part) for name, part in instruments.parts(pair, mix) if part[across].nunique() == 2]
            if not alike:
                rows.append(named | {"seeds": 0, "unit": "question", "n_questions": 0, "verdict": instruments.NOT_COMPARED})
            for name, part in alike:
                sides = (part[part[across] == first], part[part[across] == second])
                rows.append(named | _gap(*sides, declared, confidence, f"{across}s differ") | {"instrument": name})
    return pd.DataFrame(rows, columns=[*columns, "verdict", "instrument"])


def _gap(first: pd.DataFrame, second: pd.DataFrame, declared: Mapping[str, Any], confidence: float, established: str) -> dict[str, Any]:
    seeds = sorted(set(first["seed"]) & set(second["seed"]))
    both = (_by_question(first) - _by_question(second)).dropna()
    change = stats.paired_change(both.to_numpy(), confidence, int(declared["flip_seed"]))
    row: dict[str, Any] = {"seeds": len(seeds), "unit": "question", **change._asdict()}
    if len(seeds) < int(declared["seeds_needed"]):
        apart = not np.isnan(change.low) and (change.low > 0 or change.high < 0)
        return row | {"verdict": "not comparable" if both.empty else "these adapters differ" if apart else NOT_ESTABLISHED}
    means = []
    for arm in (first, second):
        answered = arm.set_index(["question_set", "question_id"])
        by_seed = answered[answered.index.isin(both.index) & answered["seed"].isin(seeds)].groupby("seed")["rate"].mean()
        means.append(by_seed.loc[seeds].to_numpy())
    mean, low, high = compare_seeds(means[0], means[1], confidence)
    apart = low > 0 or high < 0
    row |= {"unit": "training run", "change": mean, "low": low, "high": high}
    return row | {"verdict": established if apart else NOT_ESTABLISHED}


def pooled(rates: pd.DataFrame, confidence: float = 0.95, mix: bool = False) -> pd.DataFrame:
    """Pools rates over the seeds of a pair; variance between seeds enters the interval.

    Args:
        rates: question rates.
        confidence: of the intervals.
        mix: pool seeds whose questions or rubric differ, too; without it they have rows of their own.

    Returns:
        em_rates_pooled: pooled_over (seeds), pair, model, domain, step, question_set, relation, metric, judge, n_seeds, seeds, n, k,
        rate (mean over seeds and questions), low, high, between_seed_sd, n_questions, interval_method, instrument. One seed has no
        interval.
    """
    keys = ["pair", "model", "domain", "step", "question_set", "relation", "metric", "judge"]
    columns = ["pooled_over", *keys, "n_seeds", "seeds", "n", "k", "rate", "low", "high", "between_seed_sd", "n_questions"]
    columns += ["interval_method", "instrument"]
    rows = []
    ordered = rates.sort_values("seed", kind="stable").reset_index(drop=True)
    alike = [] if mix else [name for name in ("instrument", "question_hash") if name in ordered]
    seed, question, rate = (ordered[name].to_numpy() for name in ("seed", "question_id", "rate"))
    n, k = ordered["n"].to_numpy(), ordered["k"].to_numpy()
    for key, at in groups(ordered, [*keys, *alike]):
        named = {name: key[name] for name in keys}
        seeds = list(dict.fromkeys(seed[at].tolist()))
        wide = rate[at][None, :].astype(float) if len(seeds) == 1 else _by_seed(seed[at], question[at], rate[at])
        mean, low, high, between = pooled_over_seeds(wide, confidence)
        used = int((~np.isnan(wide).any(axis=0)).sum())
        method = (
            "seeds and questions, t" if not np.isnan(low) else stats.TOO_FEW if len(seeds) > 1 else "one seed: no variance between seeds"
        )
        found = {"rate": mean, "low": low, "high": high, "between_seed_sd": between, "n_questions": used}
        counted = {"n_seeds": len(seeds), "seeds": " ".join(map(str, seeds)), "n": int(n[at].sum()), "k": int(k[at].sum())}
        told = {
            "pooled_over": "seeds",
            "interval_method": method if used else "no rate",
            "instrument": instruments.described(ordered.iloc[at]),
        }
        rows.append(named | counted | found | told)
    return pd.DataFrame(rows, columns=columns)


def _by_seed(seed: npt.NDArray[Any], question: npt.NDArray[Any], rate: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    return _matrix(pd.DataFrame({"seed": seed, "question": question, "rate": rate}), ["question"], "seed")[0].T


def misalign_at_k(rates: pd.DataFrame, ks: Collection[int] = (1, 5, 10)) -> pd.DataFrame:
    """Estimates the share of questions with at least one misaligned answer in k, without bias (`stats.misaligned_at_k`).

    Returns:
        pair, seed, step, question_set, judge, metric, k, share (fraction; NaN where no question has k answers), n_questions.
    """
    keys = ["pair", "seed", "step", "question_set", "judge", "metric"]
    own = rates[rates["metric"].isin(["em_course", "em_paper"]) & rates["rate"].notna()]
    rows = [
        dict(zip(keys, key, strict=True))
        | {"k": k, "share": stats.misaligned_at_k(group["k"], group["n"], k), "n_questions": int((group["n"] >= k).sum())}
        for key, group in own.groupby(keys, sort=False)
        for k in ks
    ]
    return pd.DataFrame(rows, columns=[*keys, "k", "share", "n_questions"])


def planner(
    difference: float = 0.2,
    base: float = 0.05,
    *,
    icc: float = 0.3,
    questions: Collection[int] = (8, 10, 20, 30, 50),
    samples: Collection[int] = (1, 2, 5, 10, 50),
    alpha: float = 0.05,
) -> pd.DataFrame:
    """Shows the chance to see a change from base for numbers of questions and of answers a question; see `seeds.power`.

    Returns:
        One row a number of questions, one column a number of samples; fractions. More questions help where more answers no longer do.
    """
    table = {m: [power(difference, base, questions=g, samples=m, icc=icc, alpha=alpha) for g in questions] for m in samples}
    return pd.DataFrame(table, index=pd.Index(list(questions), name="questions")).rename_axis(columns="answers a question")


# ---------------------------------------------------------------- the original study's claims


def claims(
    declared: Mapping[str, Any],
    domains: pd.DataFrame,
    onsets: pd.DataFrame,
    falls: pd.DataFrame,
    coherence: pd.DataFrame,
    epoch_end: Mapping[str, int],
) -> pd.DataFrame:
    """Gives every claim of the original study its line: supported, contradicted, not decidable with this n, or not tested by this run.

    Args:
        declared: the plan.
        domains, onsets, falls: of `gaps`, `onset`, `non_monotonic`.
        coherence: changes of coherent_rate from base at the last step, on general and open-ended sets (`analyze.changes`).
        epoch_end: last optimizer step of epoch 1 by pair.

    Returns:
        claim, about (model or pair), metric, judge, verdict, numbers.
    """
    margin = float(declared["margin"])
    rows: list[dict[str, Any]] = []

    def line(claim: str, about: str, row: Mapping[str, Any], verdict: str, numbers: str) -> None:
        other = [] if row["model"] in declared["original_models"] else ["model"]
        other += [] if row["judge"] == declared["original_judge"] else ["judge"]
        verdict = f"not tested by this run (another {' and '.join(other)})" if other else verdict
        rows.append(
            {"claim": claim, "about": about, "metric": row["metric"], "judge": row["judge"], "verdict": verdict, "numbers": numbers}
        )

    for row in records(domains):
        if set(declared["original_domains"]) == {row["first"], row["second"]}:
            alike = row["unit"] == "training run" and row["low"] > -margin and row["high"] < margin
            numbers = (
                f"{row['first']} − {row['second']}: {span(row)}, {row['n_questions']} questions, {row['seeds']} seed(s): {row['verdict']}"
            )
            line(_DOMAIN, str(row["model"]), row, _decided(row["verdict"] == "domains differ", alike), numbers)
    for row in records(onsets):
        end, stands = epoch_end.get(str(row["pair"])), row["established"]
        told = end is not None and not pd.isna(stands)
        epoch = "epoch 1 unknown" if end is None else f"epoch 1 ends at step {end}"
        numbers = "; ".join([f"{row['verdict']} {row['onset']}".strip(), epoch, f"{row['n_questions']} questions"])
        line(_EARLY, _run(row), row, _decided(told and stands <= end, told and stands > end), numbers)
    for row in records(falls):
        course = f"largest fall {percent(row['fall'])} from step {row['peak_step']} to {row['trough_step']}"
        numbers = f"{course}, p = {row['p']:.3g}, {row['n_questions']} questions: {row['verdict']}"
        line(_SHAPE, _run(row), row, _decided(row["verdict"] == "falls after its peak", False), numbers)
    for row in records(coherence):
        known = not pd.isna(row["low"])
        verdict = _decided(known and row["low"] > -margin, known and row["high"] < -margin)
        against = f"{span(row)} against base (margin {100 * margin:.0f} points)"
        line(_COHERENT, _run(row), row, verdict, f"{row['question_set']}: {against}, {row['n_questions']} questions")
    for claim in _CLAIMS:
        if claim not in {row["claim"] for row in rows}:
            rows.append({"claim": claim, "about": "all runs", "verdict": f"not tested by this run ({_CLAIMS[claim]})"})
    order = list(_CLAIMS)
    found = pd.DataFrame(rows, columns=["claim", "about", "metric", "judge", "verdict", "numbers"])
    return found.sort_values("claim", key=lambda column: column.map(order.index), kind="stable", ignore_index=True)


_DOMAIN, _EARLY, _SHAPE, _COHERENT = (
    "the domain matters",
    "misalignment emerges early (within epoch 1)",
    "the course is not monotonic",
    "coherence is preserved",
)
_CLAIMS = {
    _DOMAIN: "no model with both domains and questions that both answered",
    _EARLY: "no base with later steps on emergent questions",
    _SHAPE: "no run with three steps on emergent questions",
    _COHERENT: "no base to compare coherence with",
}
"""The original study's claims, and what lacks where a run cannot test them."""


def _run(row: Mapping[str, Any]) -> str:
    return f"{row['pair']}, seed {row['seed']}"


def _decided(supported: bool, contradicted: bool) -> str:
    return "supported" if supported else "contradicted" if contradicted else "not decidable with this n"


def span(row: Mapping[str, Any]) -> str:
    """Returns a change as text, in points with its interval: `+12 points [+3, +21]`."""
    if pd.isna(row["change"]):
        return "no figure"
    bounds = f"[no interval: {row.get('interval_method') or row.get('method') or stats.TOO_FEW}]"
    if not pd.isna(row["low"]):
        bounds = f"[{_points(row['low'])}, {_points(row['high'])}]"
    return f"{_points(row['change'])} points {bounds}"


def _points(share: float) -> str:
    # One decimal near 0, where it shows on which side a limit lies.
    return f"{100 * share:+.1f}" if abs(share) < 0.0095 else f"{100 * share:+.0f}"
