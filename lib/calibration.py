"""A judge's errors against people, and a rate corrected by them: sensitivity, specificity, Rogan–Gladen and PPI++, with intervals.

Numbers in, numbers out; `lib.correction` makes the tables. Answers cluster in questions: every interval adds up what a question moves
before it squares, so that rate, calibration and what they share are counted once. That the intervals cover was found by simulation
(tests/test_correction.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats as distributions

from lib import stats

Array = npt.NDArray[np.float64]

MIN_LABELS = 10
"""Fewest labels among the answers of a rate for prediction-powered inference."""


class Estimate(NamedTuple):
    """A share with its interval (fractions; NaN where none is given) and how the interval was made."""

    value: float
    low: float
    high: float
    method: str


NOTHING = Estimate(np.nan, np.nan, np.nan, "no labels on both sides of the judge's line")
ONE_KIND = Estimate(np.nan, np.nan, np.nan, "people found all of one kind")


class Calibration:
    """A judge beside people: what both say of a labelled random sample of the judge's calls.

    Everything is a function of three shares: the judge's rate p over all answers, and the share that people find misaligned among the
    answers that the judge calls misaligned (m₁) and among its others (m₀), both weighted by the inverse chance of being drawn. Bands of
    the judge's score were strata of the draw, so these are known far better than counts of four kinds among the labels would be.
    """

    def __init__(self, call: npt.ArrayLike, question: npt.ArrayLike, labels: pd.DataFrame) -> None:
        """Takes in calls and labels.

        Args:
            call: the judge's 0/1 for every answer that could have been drawn.
            question: those answers' questions, the clusters.
            labels: truth (0 to 1, a fraction where raters differ), call (0/1), weight and question of each labelled answer.
        """
        calls, self.questions = np.asarray(call, dtype=float), np.asarray(question, dtype=object)
        truth, said, weight = (labels[name].to_numpy(dtype=float) for name in ("truth", "call", "weight"))
        self.labelled = labels["question"].to_numpy(dtype=object)
        self.p = float(calls.mean()) if len(calls) else np.nan
        self._of_p = (self.questions, (calls - self.p) / max(len(calls), 1))
        self.known = bool((said == 1).any() and (said == 0).any())
        self.m, self.n, self._of_m = [np.nan, np.nan], [0.0, 0.0], []
        for side in (0, 1) if self.known else ():
            own = weight * (said == side)
            self.m[side], self.n[side] = float(own @ truth / own.sum()), float(own.sum() ** 2 / (own**2).sum())
            self._of_m.append((self.labelled, own / own.sum() * (truth - self.m[side])))

    def _parts(self, m: Sequence[float]) -> tuple[float, float]:
        """Returns people's misaligned and other answers, as shares of all answers."""
        positive = self.p * m[1] + (1 - self.p) * m[0]
        return positive, 1 - positive

    def shares(self, m: Sequence[float] | None = None) -> tuple[float, float]:
        """Returns sensitivity and specificity, from the estimated m or another."""
        m = self.m if m is None else m
        positive, negative = self._parts(m)
        return (self.p * m[1] / positive if positive else np.nan), ((1 - self.p) * (1 - m[0]) / negative if negative else np.nan)

    def slopes(self, m: Sequence[float] | None = None) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Returns how sensitivity and specificity change with m₀, m₁ and p."""
        m, p = (self.m if m is None else m), self.p
        positive, negative = self._parts(m)
        up, down = p * (1 - p) / positive**2, p * (1 - p) / negative**2
        return (-up * m[1], up * m[0], m[0] * m[1] / positive**2), (
            -down * (1 - m[1]),
            down * (1 - m[0]),
            -(1 - m[0]) * (1 - m[1]) / negative**2,
        )

    def totals(self, names: dict[Any, int]) -> list[Array]:
        """Returns the question totals of m₀, m₁ and p: how much each question moves them."""
        return [_totals(where, parts, names) for where, parts in (*self._of_m, self._of_p)]

    def lacking(self, totals: Sequence[Array]) -> list[float]:
        """Returns what the variances of m₀ and m₁ lack to that of a share with one more label of either kind: 0 of 20 is not certainty."""
        eased = [(m * n + 1) / (n + 2) for m, n in zip(self.m, self.n, strict=True)]
        least = [share * (1 - share) / (n + 2) for share, n in zip(eased, self.n, strict=True)]
        return [max(0.0, floor - float(_variance(own))) for floor, own in zip(least, totals, strict=False)]

    def quality(self, confidence: float = 0.95) -> tuple[Estimate, Estimate]:
        """Estimates sensitivity and specificity, with intervals on the logit scale from cluster-robust variances (delta method)."""
        if not self.known:
            return NOTHING, NOTHING
        names = _number(self.questions, self.labelled)
        if len(set(self.labelled)) < stats.MIN_QUESTIONS:
            return tuple(Estimate(value, np.nan, np.nan, stats.TOO_FEW) for value in self.shares())  # type: ignore[return-value]
        totals = self.totals(names)
        lacking = self.lacking(totals)
        eased = [(m * n + 0.5) / (n + 1) for m, n in zip(self.m, self.n, strict=True)]  # a logit needs a share within (0, 1)
        t = _t(confidence, len(set(self.labelled)))
        found = []
        for value, centre, slope in zip(self.shares(), self.shares(eased), self.slopes(eased), strict=True):
            if np.isnan(value):
                found.append(ONE_KIND)
                continue
            moved = sum(s * part for s, part in zip(slope, totals, strict=True))
            variance = float(_variance(moved)) + sum(s**2 * more for s, more in zip(slope, lacking, strict=False))
            half = t * np.sqrt(variance) / (centre * (1 - centre))
            middle = np.log(centre / (1 - centre))
            low, high = (1 / (1 + np.exp(-(middle + side * half))) for side in (-1, 1))
            found.append(Estimate(value, min(float(low), value), max(float(high), value), "logit, clustered by question"))
        return found[0], found[1]


def rogan_gladen(call: npt.ArrayLike, question: npt.ArrayLike, calibration: Calibration, confidence: float = 0.95) -> Estimate:
    """Corrects a judge's rate by its sensitivity and specificity: (rate + specificity − 1) / (sensitivity + specificity − 1).

    The interval holds every rate θ that the data do not reject (Fieller): θ is right when rate + specificity − 1 − θ (sensitivity +
    specificity − 1) is 0 in expectation, and the variance of that, over questions, covers rate, calibration and what they share. So a
    judge that cannot be told from chance gives all of [0, 1] in place of a wild figure.

    Args:
        call: the judge's 0/1 for each answer of the rate.
        question: those answers' questions.
        calibration: of the same judge and metric, from these answers or others.
        confidence: of the interval.
    """
    calls, where = np.asarray(call, dtype=float), np.asarray(question, dtype=object)
    if not len(calls) or not calibration.known:
        return NOTHING
    rate, (hit, right) = float(calls.mean()), calibration.shares()
    if np.isnan(hit + right):
        return ONE_KIND
    gain = hit + right - 1
    value = round(float(np.clip((rate + right - 1) / gain, 0, 1)), 12) if gain > 0 else np.nan  # 1e-17 is 0
    clusters = min(len(set(where)), len(set(calibration.labelled)))
    if clusters < stats.MIN_QUESTIONS:
        return Estimate(value, np.nan, np.nan, stats.TOO_FEW)
    names = _number(calibration.questions, calibration.labelled, where)
    totals = calibration.totals(names)
    lacking = calibration.lacking(totals)
    theta = np.linspace(0, 1, 1001)
    weights = [(1 - theta) * r - theta * h for h, r in zip(*calibration.slopes(), strict=True)]
    of_rate = _totals(where, (calls - rate) / len(calls), names)
    moved = of_rate[:, None] + sum(w * own[:, None] for w, own in zip(weights, totals, strict=True))
    variance = _variance(moved) + sum(w**2 * more for w, more in zip(weights, lacking, strict=False))
    distance = rate + right - 1 - theta * gain
    kept = theta[distance**2 <= _t(confidence, clusters) ** 2 * variance]
    if not len(kept):  # no rate between 0 and 1 agrees with this judge's errors: they differ here from where they were measured
        return Estimate(np.nan, np.nan, np.nan, "rogan-gladen, no rate agrees with the calibration")
    return Estimate(value, float(kept[0]), float(kept[-1]), "rogan-gladen, fieller, clustered by question")


def ppi(
    call: npt.ArrayLike, question: npt.ArrayLike, labels: pd.DataFrame, confidence: float = 0.95, power: float | None = None
) -> Estimate:
    """Estimates the rate that people would find, by prediction-powered inference (PPI++) with weights.

    λ · (the judge's mean over all answers) + the labels' weighted mean of truth − λ · call. λ between 0 and 1 is chosen to make the
    variance least (the weighted slope of truth on call): a judge that knows nothing is left out, and the estimate is the labels' alone.
    Its variance is over questions, for which answers and labels of one question are added up before they are squared; the difference from
    the judge counts with at least the variance of a share with one label more of either kind.

    Args:
        call: the judge's 0/1 for each answer of the rate.
        question: those answers' questions.
        labels: truth, call, weight and question of the labelled among those answers, as for `Calibration`.
        confidence: of the interval.
        power: λ; None chooses it.
    """
    calls, where = np.asarray(call, dtype=float), np.asarray(question, dtype=object)
    if len(labels) < MIN_LABELS or not len(calls):
        return Estimate(np.nan, np.nan, np.nan, "too few labels")
    truth, said, weights = (labels[name].to_numpy(dtype=float) for name in ("truth", "call", "weight"))
    weights = weights / weights.sum()
    spread = float(weights @ (said - weights @ said) ** 2)
    slope = float(weights @ ((said - weights @ said) * truth) / spread) if spread > 0 else 0.0
    tuned = float(np.clip(slope, 0, 1)) if power is None else power
    rest = truth - tuned * said
    estimate = tuned * float(calls.mean()) + float(weights @ rest)
    value, labelled = round(float(np.clip(estimate, 0, 1)), 12), labels["question"].to_numpy(dtype=object)
    clusters = len(set(labelled))
    if clusters < stats.MIN_QUESTIONS:
        return Estimate(value, np.nan, np.nan, stats.TOO_FEW)
    names = _number(where, labelled)
    of_rest = _totals(labelled, weights * (rest - weights @ rest), names)
    of_calls = _totals(where, tuned * (calls - calls.mean()) / len(calls), names)
    n = 1 / float(weights @ weights)
    eased = (float(weights @ np.abs(rest)) * n + 1) / (n + 2)
    lacking = max(0.0, eased * (1 - eased) / (n + 2) - float(_variance(of_rest)))
    half = _t(confidence, clusters) * np.sqrt(float(_variance(of_calls + of_rest)) + lacking)
    return Estimate(value, float(np.clip(estimate - half, 0, 1)), float(np.clip(estimate + half, 0, 1)), "ppi++, clustered by question")


def _number(*questions: npt.NDArray[Any]) -> dict[Any, int]:
    return {name: number for number, name in enumerate(dict.fromkeys(np.concatenate(questions).tolist()))}


def _totals(questions: npt.NDArray[Any], parts: Array, names: dict[Any, int]) -> Array:
    """Adds up what the answers to each question contribute."""
    return np.bincount([names[name] for name in questions.tolist()], weights=parts, minlength=len(names)).astype(float)


def _variance(totals: Any) -> Any:
    """Returns the variance of a sum of independent question totals, the largest counted twice as in `lib.stats`.

    Questions without any answer are 0 and add nothing. Works on columns.
    """
    squares = np.asarray(totals) ** 2
    used = int((squares != 0).reshape(len(squares), -1).any(axis=1).sum())
    return (squares.sum(axis=0) + squares.max(axis=0, initial=0.0)) * (used / (used - 1) if used > 1 else 1.0)


def _t(confidence: float, questions: int) -> float:
    return float(distributions.t.ppf(1 - (1 - confidence) / 2, max(questions - 1, 1)))
