"""Intervals and tests for misaligned shares: answers cluster in questions, so questions are what is counted.

Pure numbers in, numbers out (numpy, scipy, statsmodels); nothing of lib is imported. The choices here were made by the simulation in
benchmarks/coverage.py, which calls these very functions: plain cluster-t and Wilson on an effective n miss far too often when few
questions carry the misaligned answers, which is the usual case (REFERENCE.md).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import optimize
from scipy import stats as distributions
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

Array = npt.NDArray[np.float64]

MIN_QUESTIONS = 5
"""Fewest questions for a population interval; with five the simulated coverage still holds, below it no width is worth printing."""
MIN_CHANGED = 3
"""Fewest questions that must have changed for an interval of a paired change."""
TOO_FEW = "too few questions"
TOO_FEW_CHANGED = "too few questions changed"
ALL_ALIKE = "exact, all questions changed alike"
EXACT_FLIPS = 14
"""Most questions whose 2^G sign flips are enumerated; beyond, random flips are drawn."""
RANDOM_FLIPS = 20_000

_ROUNDING = 1e-9
_WILSON_REPAIRED = 50
_WILSON_SLACK = 0.005


class Interval(NamedTuple):
    """A rate's interval (fractions; NaN where none is given), how it was made, and what it rests on."""

    low: float
    high: float
    method: str
    n_effective: float
    icc: float


class Change(NamedTuple):
    """A paired change: estimate and interval (fractions), questions, sign-flip p and the smallest p these questions could give."""

    change: float
    low: float
    high: float
    n_questions: int
    n_changed: int
    p: float
    smallest_p: float
    method: str


# ---------------------------------------------------------------- rates


def wilson(k: Any, n: Any, confidence: float = 0.95) -> tuple[Any, Any]:
    """Returns the Wilson interval of k in n independent answers (fractions); arrays broadcast."""
    if np.ndim(k) == 0 and n == 0:
        return float("nan"), float("nan")
    low, high = proportion_confint(k, n, alpha=1 - confidence, method="wilson")
    # Rounding leaves 1e-18 where the limit is 0.
    return np.where(np.asarray(k) <= 0, 0.0, low), np.where(np.asarray(k) >= np.asarray(n), 1.0, high)


@functools.lru_cache(maxsize=256)
def _one_answer_table(n: int, confidence: float) -> tuple[Array, Array]:
    """Returns lower and upper limits for k = 0..n with one answer a question: Wilson, mended for small n.

    Up to 50 answers Wilson's exact coverage falls to 84% at some rates. There the limits nearest to an uncovered rate are moved out,
    on a grid of rates, until every rate is covered with `confidence` less half a point; most limits move by under 0.01.
    """
    k = np.arange(n + 1)
    low, high = (np.asarray(bound, dtype=float) for bound in wilson(k, np.full(n + 1, n), confidence))
    if n > _WILSON_REPAIRED:
        return low, high
    rates = np.arange(1, 1001) / 2000
    weights = distributions.binom.pmf(k[:, None], n, rates[None, :])
    for column, rate in enumerate(rates):
        # Margins of half a step, and moves by a whole one, so that no rate between two grid points is lost.
        inside = (low <= rate - 0.00025) & (high >= rate + 0.00025)
        while weights[inside, column].sum() < confidence - _WILSON_SLACK:
            gap = np.where(inside, np.inf, np.maximum(low - rate, rate - high))
            i = int(gap.argmin())
            low[i], high[i] = min(low[i], max(rate - 0.0005, 0.0)), max(high[i], rate + 0.0005)
            low[n - i], high[n - i] = min(low[n - i], 1 - high[i]), max(high[n - i], 1 - low[i])
            inside[i] = True
    return low, high


def population_intervals(k: npt.ArrayLike, n: npt.ArrayLike, confidence: float = 0.95) -> tuple[Array, Array, Array]:
    """Computes intervals for the rate over questions like these, many studies at once.

    One answer a question: Wilson (see `_one_answer_table`). Otherwise Korn and Graubard's interval: Clopper–Pearson on an effective
    number of answers, p(1−p)/V, with V the cluster-robust variance of the ratio k/n. Three changes keep its coverage when few
    questions carry the outcome. V counts the question farthest from the rate twice. The effective number is lessened by (z/t)²,
    where t has as many degrees of freedom as the effective number of questions that carry the rarer outcome, (Σk)²/Σk², less one.
    It never falls below the number of questions, nor rises above the number of answers; with k 0 or n it is the number of questions.

    Args:
        k: misaligned answers, shape (studies, questions).
        n: answers, the same shape; all at least 1.
        confidence: of the interval.

    Returns:
        low, high (fractions; NaN below `MIN_QUESTIONS` questions) and effective n, each of shape (studies,).
    """
    counts, sizes = np.atleast_2d(np.asarray(k, dtype=float)), np.atleast_2d(np.asarray(n, dtype=float))
    studies, questions = counts.shape
    total, answers = counts.sum(axis=1), sizes.sum(axis=1)
    if questions < MIN_QUESTIONS:
        nothing = np.full(studies, np.nan)
        return nothing, nothing.copy(), nothing.copy()
    if (sizes == 1).all():
        low, high = _one_answer_table(questions, confidence)
        index = total.astype(int)
        return low[index], high[index], answers
    effective = _effective_answers(counts, sizes, confidence)
    hits = total / answers * effective
    low, high = proportion_confint(hits, effective, alpha=1 - confidence, method="beta")
    return np.asarray(low), np.asarray(high), effective


def _effective_answers(counts: Array, sizes: Array, confidence: float) -> Array:
    questions = counts.shape[1]
    total, answers = counts.sum(axis=1), sizes.sum(axis=1)
    rate = total / answers
    spread = (counts - rate[:, None] * sizes) ** 2
    variance = questions / (questions - 1) * (spread.sum(axis=1) + spread.max(axis=1)) / answers**2
    rest = sizes - counts
    with np.errstate(invalid="ignore", divide="ignore"):
        raw = np.where(variance > 0, rate * (1 - rate) / variance, answers)
        carrying = np.fmin(total**2 / (counts**2).sum(axis=1), (answers - total) ** 2 / (rest**2).sum(axis=1))
    one_sided = (total == 0) | (total == answers)
    raw = np.where(one_sided, questions, np.clip(raw, questions, answers))
    tail = 1 - (1 - confidence) / 2
    t = distributions.t.ppf(tail, np.maximum(carrying - 1, 0.5))
    lessened = raw * (distributions.norm.ppf(tail) / t) ** 2
    alone = np.minimum((counts > 0).sum(axis=1), (rest > 0).sum(axis=1)) < 2
    effective: Array = np.where(alone | one_sided, questions, np.clip(lessened, questions, answers))
    return effective


def population_interval(k: Sequence[int] | npt.ArrayLike, n: Sequence[int] | npt.ArrayLike, confidence: float = 0.95) -> Interval:
    """Computes the interval of one rate over questions like these; see `population_intervals`.

    Args:
        k: misaligned answers to each question.
        n: scored answers to each question; questions without any are left out.
        confidence: of the interval.
    """
    counts, sizes = np.asarray(k, dtype=float), np.asarray(n, dtype=float)
    counts, sizes = counts[sizes > 0], sizes[sizes > 0]
    nan = float("nan")
    if not len(sizes):
        return Interval(nan, nan, "no scored answers", nan, nan)
    icc = intraclass_correlation(counts, sizes)
    if len(sizes) < MIN_QUESTIONS:
        return Interval(nan, nan, TOO_FEW, nan, icc)
    low, high, effective = (float(value[0]) for value in population_intervals(counts, sizes, confidence))
    method = "wilson" if (sizes == 1).all() else "korn-graubard, clustered by question"
    return Interval(low, high, method, effective, icc)


def fixed_interval(k: npt.ArrayLike, n: npt.ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """Computes the interval for these very questions: only the sampling of answers is uncertain, stratified by question.

    Wilson on the number of answers that would give the stratified variance. Each question's rate is estimated with one more answer
    at the overall rate (so that 0 of 2 is not taken as certainty); the number is never below the number of answers, because
    stratifying cannot widen. With one answer a question it is the plain Wilson interval, which is then on the safe side.
    """
    counts, sizes = np.asarray(k, dtype=float), np.asarray(n, dtype=float)
    counts, sizes = counts[sizes > 0], sizes[sizes > 0]
    if not len(sizes):
        return float("nan"), float("nan")
    answers = sizes.sum()
    rate = counts.sum() / answers
    shrunk = (counts + rate) / (sizes + 1)
    # Without differences between questions the shrunken rates understate p(1-p) by this factor.
    mended = shrunk * (1 - shrunk) * (sizes + 1) ** 2 / ((sizes + 1) ** 2 - sizes)
    variance = (sizes * mended).sum() / answers**2
    effective = answers
    if 0 < rate < 1 and (sizes > 1).all():
        effective = max(answers, rate * (1 - rate) / variance)
    low, high = wilson(float(rate * effective), float(effective), confidence)
    return float(low), float(high)


def intraclass_correlation(k: npt.ArrayLike, n: npt.ArrayLike) -> float:
    """Estimates the correlation of two answers to one question, by analysis of variance; NaN where it cannot be estimated."""
    counts, sizes = np.asarray(k, dtype=float), np.asarray(n, dtype=float)
    counts, sizes = counts[sizes > 0], sizes[sizes > 0]
    questions, answers = len(sizes), sizes.sum()
    if questions < 2 or answers <= questions:
        return float("nan")
    rate = counts.sum() / answers
    if rate in (0, 1):
        return float("nan")
    between = (sizes * (counts / sizes - rate) ** 2).sum() / (questions - 1)
    within = (counts * (sizes - counts) / sizes).sum() / (answers - questions)
    typical = (answers - (sizes**2).sum() / answers) / (questions - 1)
    return float((between - within) / (between + (typical - 1) * within))


def mean_interval(values: npt.ArrayLike, confidence: float = 0.95) -> tuple[float, float, float]:
    """Returns the mean of question means and its t interval with questions − 1 degrees of freedom, in the values' unit."""
    means = np.asarray(values, dtype=float)
    means = means[~np.isnan(means)]
    if not len(means):
        return float("nan"), float("nan"), float("nan")
    mean = float(means.mean())
    if len(means) < MIN_QUESTIONS:
        return mean, float("nan"), float("nan")
    half = float(distributions.t.ppf(1 - (1 - confidence) / 2, len(means) - 1) * means.std(ddof=1) / np.sqrt(len(means)))
    return mean, mean - half, mean + half


def misaligned_at_k(c: npt.ArrayLike, n: npt.ArrayLike, k: int) -> float:
    """Estimates Misalign@k, the share of questions with at least one misaligned answer in k, without bias.

    A question with c misaligned among n answers gives 1 − C(n−c, k)/C(n, k), as pass@k does (arXiv:2107.03374).

    Returns:
        The mean over the questions with at least k answers; NaN where there are none.
    """
    counts, sizes = np.asarray(c, dtype=int), np.asarray(n, dtype=int)
    enough = sizes >= k
    if not enough.any():
        return float("nan")
    return float((1 - distributions.hypergeom.pmf(0, sizes[enough], counts[enough], k)).mean())


# ---------------------------------------------------------------- changes, paired by question


def paired_intervals(differences: npt.ArrayLike, confidence: float = 0.95) -> tuple[Array, Array, Array]:
    """Computes cluster-t intervals for mean differences, many studies at once.

    The standard error counts the most extreme question twice, and t has as many degrees of freedom as the effective number of
    questions that changed, (Σ|d|)²/Σd², less one (questions − 1 when all changed alike): without both, coverage falls below 90%
    where few questions carry the change (benchmarks/coverage.py). arXiv:2411.00640 is the reference for pairing by question.

    Where all G questions changed by the same amount c there is no spread to build on. By Clopper and Pearson at least p = (α/2)^(1/G) of
    all questions change by c, and none can change by more than 1 either way: the mean lies in c·p ± (1−p), whatever the others do.

    Args:
        differences: difference of each question's rates, shape (studies, questions).

    Returns:
        Mean, low and high, each of shape (studies,); low and high are NaN below `MIN_QUESTIONS` questions, `MIN_CHANGED` changed
        questions.
    """
    values = np.atleast_2d(np.asarray(differences, dtype=float))
    questions = values.shape[1]
    mean = values.mean(axis=1)
    spread = (values - mean[:, None]) ** 2
    changed = (values != 0).sum(axis=1)
    error = np.sqrt((spread.sum(axis=1) + spread.max(axis=1)) / (questions * max(questions - 1, 1)))
    with np.errstate(invalid="ignore"):
        carrying = np.abs(values).sum(axis=1) ** 2 / (values**2).sum(axis=1)
    freedom = np.clip(np.nan_to_num(carrying, nan=1.0) - 1, 1, max(questions - 1, 1))
    half = distributions.t.ppf(1 - (1 - confidence) / 2, freedom) * error
    given = (questions >= MIN_QUESTIONS) & (changed >= MIN_CHANGED)
    alike = np.ptp(values, axis=1) < _ROUNDING
    least = ((1 - confidence) / 2) ** (1 / questions)
    centre, half = np.where(alike, values[:, 0] * least, mean), np.where(alike, 1 - least, half)
    low, high = np.clip(centre - half, -1, 1), np.clip(centre + half, -1, 1)
    return mean, np.where(given, low, np.nan), np.where(given, high, np.nan)


def paired_change(differences: npt.ArrayLike, confidence: float = 0.95, seed: int = 0) -> Change:
    """Estimates a change from differences of question rates, with `paired_intervals` and the sign-flip test.

    Args:
        differences: one a question (fractions); NaN (a question that one side did not answer) is left out.
        confidence: of the interval.
        seed: of the random flips where there are too many to enumerate.
    """
    values = np.asarray(differences, dtype=float)
    values = values[~np.isnan(values)]
    nan = float("nan")
    if not len(values):
        return Change(nan, nan, nan, 0, 0, nan, nan, "no question answered by both")
    mean, low, high = (float(bound[0]) for bound in paired_intervals(values, confidence))
    changed = int((values != 0).sum())
    method = "cluster-t, paired by question" if np.ptp(values) >= _ROUNDING else ALL_ALIKE
    if np.isnan(low):
        method = TOO_FEW if len(values) < MIN_QUESTIONS else TOO_FEW_CHANGED
    return Change(mean, low, high, len(values), changed, sign_flip(values, seed), smallest_p(len(values)), method)


def smallest_p(questions: int) -> float:
    """Returns the smallest two-sided p that a sign-flip test of so many questions can give (all changed, all the same way)."""
    return min(1.0, 2.0 ** (1 - questions))


@functools.lru_cache(maxsize=32)
def _flips(questions: int, seed: int) -> tuple[Array, bool]:
    """Returns sign patterns, shape (flips, questions), and whether they are all there are."""
    if questions <= EXACT_FLIPS:
        bits = (np.arange(2**questions)[:, None] >> np.arange(questions)[None, :]) & 1
        return np.asarray(1 - 2 * bits, dtype=np.float64), True
    drawn: Array = np.random.default_rng(seed).choice(np.array([-1.0, 1.0]), size=(RANDOM_FLIPS, questions))
    return drawn, False


def sign_flip(differences: npt.ArrayLike, seed: int = 0) -> float:
    """Tests that differences are symmetric about 0 by flipping their signs: exact up to `EXACT_FLIPS` questions that differ.

    Returns:
        The two-sided p.
    """
    values = np.asarray(differences, dtype=float)
    values = values[values != 0]
    if not len(values):
        return 1.0
    signs, exact = _flips(len(values), seed)
    extreme = np.abs(signs @ values) >= abs(values.sum()) - 1e-12
    return float(extreme.mean() if exact else (extreme.sum() + 1) / (len(signs) + 1))


def max_t(differences: npt.ArrayLike, seed: int = 0) -> Array:
    """Tests the change at several steps against one base together, by max-T sign flips.

    A flip changes the sign of a question at all steps at once, which keeps the shared base and the correlation between steps.

    Args:
        differences: question rates less the base's, shape (steps, questions).

    Returns:
        A p for each step, adjusted for all of them.
    """
    values = np.atleast_2d(np.asarray(differences, dtype=float))
    values = values[:, (values != 0).any(axis=0)]
    steps, questions = values.shape
    if not questions:
        return np.ones(steps)
    signs, exact = _flips(questions, seed)
    squares = (values**2).sum(axis=1)
    sums = signs @ values.T
    with np.errstate(invalid="ignore", divide="ignore"):
        # Studentised by the part that flips cannot change: t grows with |Σd| / sqrt(Σd²).
        observed = np.where(squares > 0, np.abs(values.sum(axis=1)) / np.sqrt(squares), 0.0)
        flipped = np.where(squares > 0, np.abs(sums) / np.sqrt(squares), 0.0).max(axis=1)
    extreme = (flipped[:, None] >= observed[None, :] - 1e-12).sum(axis=0)
    p: Array = extreme / len(signs) if exact else (extreme + 1) / (len(signs) + 1)
    return p


def holm(p: Sequence[float]) -> list[float]:
    """Returns p adjusted by Holm's method; NaN (an untested pair) stays out of the family."""
    values = np.asarray(p, dtype=float)
    tested = ~np.isnan(values)
    if tested.any():
        values[tested] = multipletests(values[tested], method="holm")[1]
    return [float(value) for value in values]


def largest_drop(rates: npt.ArrayLike, seed: int = 0, draws: int = 4000) -> tuple[float, int, int, float]:
    """Tests whether rates fall after a peak by more than a monotone rise would show by chance.

    The statistic is the largest fall from any step to a later one, so that choosing the peak is paid for. Under the null, means
    follow the best non-decreasing fit; questions' deviations are multiplied by random signs (wild bootstrap), whole questions at a
    time, which keeps the correlation between steps.

    Args:
        rates: shape (questions, steps), steps in order; rows with NaN are left out.

    Returns:
        The fall (fraction, at least 0), the columns of peak and trough, and p (NaN with fewer than `MIN_QUESTIONS` questions; never
        below what sign flips of that many questions can give).
    """
    values = np.asarray(rates, dtype=float)
    values = values[~np.isnan(values).any(axis=1)]
    questions, steps = values.shape
    if not questions or steps < 2:
        return float("nan"), 0, 0, float("nan")
    means = values.mean(axis=0)
    falls = np.triu(means[:, None] - means[None, :], 1)
    peak, trough = (int(i) for i in np.unravel_index(falls.argmax(), falls.shape))
    fall = float(falls[peak, trough])
    if questions < MIN_QUESTIONS:
        return fall, peak, trough, float("nan")
    fit = np.asarray(optimize.isotonic_regression(means).x)
    deviations = (values - means) * np.sqrt(questions / (questions - 1))
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(draws, questions))
    simulated = fit + signs @ deviations / questions
    falls_by_chance = (np.maximum.accumulate(simulated, axis=1) - simulated).max(axis=1)
    p = float(((falls_by_chance >= fall - 1e-12).sum() + 1) / (draws + 1))
    return fall, peak, trough, max(p, smallest_p(questions))
