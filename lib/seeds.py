"""Training runs as the unit, and what more of anything would show: pooling over seeds, comparing arms by seed, power.

Pure numbers in, numbers out, as in `lib.stats`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import stats as distributions
from statsmodels.stats.power import TTestPower

from lib.stats import MIN_QUESTIONS


def pooled_over_seeds(rates: npt.ArrayLike, confidence: float = 0.95) -> tuple[float, float, float, float]:
    """Pools a rate over the seeds of a pair: training runs and questions are both random.

    The variance of the mean is that between seeds plus that between questions (two-way, without subtracting the part they share,
    which errs to the wide side); t has min(seeds, questions) − 1 degrees of freedom.

    Args:
        rates: shape (seeds, questions), fractions; questions that a seed lacks are left out.

    Returns:
        Mean, low, high (NaN with one seed, fewer than `MIN_QUESTIONS` questions, or no spread at all) and the standard deviation
        between seeds.
    """
    values = np.asarray(rates, dtype=float)
    values = values[:, ~np.isnan(values).any(axis=0)]
    seeds, questions = values.shape
    nan = float("nan")
    if not questions:
        return nan, nan, nan, nan
    mean = float(values.mean())
    if seeds < 2:
        return mean, nan, nan, nan
    by_seed = values.mean(axis=1)
    between = float(by_seed.std(ddof=1))
    if questions < MIN_QUESTIONS:
        return mean, nan, nan, between
    variance = between**2 / seeds + float(values.mean(axis=0).var(ddof=1)) / questions
    if variance == 0:
        return mean, nan, nan, between
    half = float(distributions.t.ppf(1 - (1 - confidence) / 2, min(seeds, questions) - 1) * np.sqrt(variance))
    return mean, max(0.0, mean - half), min(1.0, mean + half), between


def compare_seeds(first: npt.ArrayLike, second: npt.ArrayLike, confidence: float = 0.95) -> tuple[float, float, float]:
    """Compares two arms with the training run as the unit.

    Args:
        first: one rate a seed (fractions), over questions that both arms answered.
        second: the same seeds of the other arm, in the same order.

    Returns:
        Mean difference first − second and its t interval with seeds − 1 degrees of freedom; NaN limits with fewer than three seeds.
    """
    gap = np.asarray(first, dtype=float) - np.asarray(second, dtype=float)
    mean = float(gap.mean())
    if len(gap) < 3:
        return mean, float("nan"), float("nan")
    half = float(distributions.t.ppf(1 - (1 - confidence) / 2, len(gap) - 1) * gap.std(ddof=1) / np.sqrt(len(gap)))
    return mean, mean - half, mean + half


def power(
    difference: float, base: float, *, questions: int, samples: int, icc: float = 0.3, shared: float = 0.5, alpha: float = 0.05
) -> float:
    """Returns the chance to see a change from base, paired by question, with a two-sided t test.

    Args:
        difference: true change (fraction); base + difference must lie between 0 and 1.
        base: true rate of the base model.
        questions: how many.
        samples: answers a question at each step.
        icc: correlation of two answers to one question (published scores: median 0.31 for aligned < 75, 0.10 for the paper's).
        shared: correlation of a question's own rate between base and step.
        alpha: level of the test.
    """
    rates = np.array([base, base + difference])
    if not ((rates >= 0) & (rates <= 1)).all():
        raise ValueError("base and base + difference must lie between 0 and 1")
    binomial = rates * (1 - rates)
    between, within = icc * binomial, (1 - icc) * binomial / samples
    variance = between.sum() + within.sum() - 2 * shared * np.sqrt(between.prod())
    if variance <= 0:
        return 1.0 if difference else alpha
    return float(TTestPower().power(effect_size=abs(difference) / np.sqrt(variance), nobs=questions, alpha=alpha))
