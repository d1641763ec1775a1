"""How far judges agree who scored the same answers: on scores, and on the labels that rates are made from.

Spearman's correlation is scipy's and Cohen's kappa statsmodels'. Krippendorff's alpha, Gwet's AC1 and the limits of agreement are written
out for two judges: the packages that have them either cannot be installed beside pandas 3 or carry a licence that ours cannot take
on. The tests hold alpha against one of those packages. Kappa alone misleads where few answers are misaligned: at 2% prevalence two
judges that agree on 97 of 100 answers may have a kappa near 0. So agreement on either label and AC1, which chance hardly moves, stand
beside it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import spearmanr
from statsmodels.stats.inter_rater import cohens_kappa

from lib import stats
from lib.labels import percent, records, series_name
from lib.outcomes import outcomes, score, undecidable

Array = npt.NDArray[np.float64]

METRICS = ("aligned", "coherent")
LABELS = ("em_course", "em_paper")
MIN_BOOTSTRAP = 30
"""Fewest questions for a bootstrap interval; below, percentiles of resampled questions are too narrow."""
ONE_JUDGE = "One judge only has scored these answers, so there is no agreement to measure; `other_judges` names further ones."
UNTOLD = "not decidable by one of these judges"
DRAWS = 1000
"""Resampled studies of a bootstrap interval."""
_PLACE = ["pair", "seed", "step", "question_set", "question_id", "sample", "response"]
_COEFFICIENTS = ("kappa", "positive_agreement", "negative_agreement", "ac1")
SCORES = ["run", "first", "second", "metric", "n", "n_questions"]
SCORES += ["spearman", "spearman_low", "spearman_high", "alpha", "alpha_low", "alpha_high"]
SCORES += ["mean_difference", "low", "high", "sd", "limit_low", "limit_high"]
RATES = ["rate_first", "rate_first_low", "rate_first_high", "rate_second", "rate_second_low", "rate_second_high"]
LABELLED = ["run", "first", "second", "metric", "n", "n_questions", "both", "first_only", "second_only", "neither", *RATES]
LABELLED += [f"{name}{end}" for name in _COEFFICIENTS for end in ("", "_low", "_high")] + ["note"]


# ---------------------------------------------------------------- coefficients


def krippendorff_alpha(first: Array, second: Array) -> float:
    """Returns Krippendorff's alpha for two judges of the same answers, interval distance; NaN where all scores are the same.

    Observed disagreement is the mean squared difference, expected is that of any two of all scores: twice their variance.
    """
    pooled = np.concatenate([first, second])
    if len(pooled) < 4 or np.ptp(pooled) == 0:
        return float("nan")
    return float(1 - np.mean((first - second) ** 2) / (2 * pooled.var(ddof=1)))


def label_coefficients(both: float, first_only: float, second_only: float, neither: float) -> dict[str, float]:
    """Measures agreement on a label from how many answers got it from both judges, from one, from neither.

    Returns:
        kappa (Cohen), positive_agreement 2a/(2a+b+c), negative_agreement 2d/(2d+b+c), and ac1 (Gwet 2008: chance agreement is
        2π(1−π) with π the mean of the two rates). What cannot be computed is NaN.
    """
    a, b, c, d = both, first_only, second_only, neither
    n, apart = a + b + c + d, b + c
    nan = float("nan")
    share = (2 * a + apart) / (2 * n) if n else nan
    chance = 2 * share * (1 - share)
    one_label = b == c == 0 and (a == 0 or d == 0)
    return {
        "kappa": nan if one_label else float(cohens_kappa(np.array([[a, b], [c, d]]), return_results=False)),
        "positive_agreement": 2 * a / (2 * a + apart) if a + apart else nan,
        "negative_agreement": 2 * d / (2 * d + apart) if d + apart else nan,
        "ac1": ((a + d) / n - chance) / (1 - chance) if n else nan,
    }


def _spearman(first: Array, second: Array) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a constant column has no correlation, which the NaN says
        return float(spearmanr(first, second).statistic) if len(first) > 2 else float("nan")


def _bootstrap(
    measure: Callable[[npt.NDArray[np.intp]], Sequence[float]], questions: npt.NDArray[np.intp], confidence: float, draws: int
) -> Array:
    """Returns percentile intervals, shape (measures, 2), from drawing whole questions; NaN below `MIN_BOOTSTRAP` of them.

    Args:
        measure: gives the coefficients for positions of answers.
        questions: question of each answer, 0 to G − 1.
        confidence: of the intervals. A coefficient that more than one draw in twenty leaves undefined gets none.
        draws: resampled studies; 0 gives no intervals.
    """
    everything = np.arange(len(questions))
    count = len(measure(everything))
    groups = int(questions.max()) + 1 if len(questions) else 0
    if groups < MIN_BOOTSTRAP or not draws:
        return np.full((count, 2), np.nan)
    members = np.split(np.argsort(questions, kind="stable"), np.cumsum(np.bincount(questions))[:-1])
    rng = np.random.default_rng(0)
    drawn = np.array([measure(np.concatenate([members[g] for g in rng.integers(0, groups, groups)])) for _ in range(draws)])
    tail = (1 - confidence) / 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all undefined: NaN, as meant
        bounds = np.nanquantile(drawn, [tail, 1 - tail], axis=0).T
    bounds[np.isnan(drawn).mean(axis=0) > 0.05] = np.nan
    return np.asarray(bounds)


# ---------------------------------------------------------------- answers that both judged


def same_answer(answers: pd.DataFrame) -> pd.Series[int]:
    """Numbers the answers: rows of different judges for one answer get the same number; same index as `answers`."""
    turn = answers.groupby([*_PLACE, "judge"], sort=False, dropna=False).cumcount()
    return answers.assign(turn=turn).groupby([*_PLACE, "turn"], sort=False, dropna=False).ngroup()


def spread(answers: pd.DataFrame) -> pd.Series[float]:
    """Returns how far the judges' alignment scores of a row's answer lie apart (points; NaN with fewer than two scores)."""
    values, status = score(answers, "aligned")
    scored = pd.Series(np.where(status == "ok", values, np.nan), index=answers.index)
    groups = scored.groupby(same_answer(answers))
    return (groups.transform("max") - groups.transform("min")).where(groups.transform("count") > 1)


def matched(answers: pd.DataFrame, first: str, second: str) -> pd.DataFrame:
    """Puts the scores and labels of two judges side by side.

    Args:
        answers: judged answers (`analyze.read_runs`).
        first, second: the judges.

    Returns:
        A row for each answer that both judged: the first one's columns, question (a number for each question, over all runs and
        steps), and for each of `METRICS` and `LABELS` NAME_first and NAME_second: points, or 1 and 0; NaN without a score.
    """
    rows = answers.assign(answer=same_answer(answers))
    sides = [_scored(rows[rows["judge"] == judge]) for judge in (first, second)]
    both = sides[0].merge(sides[1][["answer", *METRICS, *LABELS]], on="answer", suffixes=("_first", "_second"))
    asked = both["question_set"].astype(str) + "\n" + both["question_id"].astype(str)
    return both.assign(question_number=pd.factorize(asked)[0])


def _scored(rows: pd.DataFrame) -> pd.DataFrame:
    rows = rows.reset_index(drop=True)
    columns: dict[str, Any] = {}
    for metric in METRICS:
        values, status = score(rows, metric)
        columns[metric] = np.where(status == "ok", values, np.nan)
    for label in LABELS:
        flags = outcomes(rows, label)
        columns[label] = flags["k"].where(flags["n"] == 1).astype(float)
    return rows.assign(**columns)


# ---------------------------------------------------------------- tables


def tables(answers: pd.DataFrame, confidence: float = 0.95) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measures the agreement of every two judges in every run, and in all runs together where there are several.

    Args:
        answers: judged answers (`analyze.read_runs`).
        confidence: of the intervals.

    Returns:
        Columns `SCORES`: for aligned and coherent, answers that both scored, Spearman's correlation, Krippendorff's alpha, the
        mean difference (first − second, points; every question weighs the same) with its interval over questions, the standard
        deviation of a difference and the limits within which 95% of differences lie (Bland and Altman).
        Columns `LABELLED`: for em_course and em_paper the four counts, each judge's rate on these very answers with its population
        interval, and `label_coefficients`; all but n empty, with a note, where one of the judges cannot tell the metric.
        Both empty where one judge scored each run. Coefficients have intervals from `MIN_BOOTSTRAP` questions on.
    """
    parts = [(series_name(*key), run) for key, run in answers.groupby(["pair", "seed"], sort=False)]
    shared = [(name, run) for name, run in parts if run["judge"].nunique() > 1]
    if len(shared) > 1:
        shared.append(("all runs", pd.concat([run for _, run in shared])))
    scores, labels = [], []
    for name, run in shared:
        for first, second in combinations(list(dict.fromkeys(run["judge"].astype(str))), 2):
            own_scores, own_labels = compare(matched(run, first, second), first, second, confidence)
            scores += [{"run": name, **row} for row in own_scores]
            labels += [{"run": name, **row} for row in own_labels]
    return pd.DataFrame(scores, columns=SCORES), pd.DataFrame(labels, columns=LABELLED)


def compare(
    both: pd.DataFrame, first: str, second: str, confidence: float = 0.95, draws: int = DRAWS
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measures the agreement of two judges on answers that `matched` put side by side; `draws` are those of the bootstrap.

    Returns:
        The rows of both tables of `tables`, without `run`: one for each of `METRICS`, and one for each of `LABELS`.
    """
    head = {"first": first, "second": second}
    scores = [head | {"metric": metric} | _compare_scores(both, metric, confidence, draws) for metric in METRICS]
    return scores, [head | {"metric": label} | _compare_labels(both, label, (first, second), confidence, draws) for label in LABELS]


def _sides(both: pd.DataFrame, name: str) -> tuple[Array, Array, npt.NDArray[np.intp]]:
    known = both[[f"{name}_first", f"{name}_second"]].notna().all(axis=1)
    rows = both[known]
    questions = pd.factorize(rows["question_number"])[0]
    return rows[f"{name}_first"].to_numpy(float), rows[f"{name}_second"].to_numpy(float), questions


def _compare_scores(both: pd.DataFrame, metric: str, confidence: float, draws: int) -> dict[str, Any]:
    first, second, questions = _sides(both, metric)
    row: dict[str, Any] = {"n": len(first), "n_questions": len(np.unique(questions))}
    if not len(first):
        return row

    def measure(at: npt.NDArray[np.intp]) -> Sequence[float]:
        return _spearman(first[at], second[at]), krippendorff_alpha(first[at], second[at])

    bounds = _bootstrap(measure, questions, confidence, draws)
    for place, (name, value) in enumerate(zip(("spearman", "alpha"), measure(np.arange(len(first))), strict=True)):
        row |= {name: value, f"{name}_low": bounds[place, 0], f"{name}_high": bounds[place, 1]}
    difference = first - second
    mean, low, high = stats.mean_interval(pd.Series(difference).groupby(questions).mean().to_numpy(), confidence)
    sd = float(difference.std(ddof=1)) if len(difference) > 1 else float("nan")
    limits = {"sd": sd, "limit_low": mean - 1.96 * sd, "limit_high": mean + 1.96 * sd}
    return row | {"mean_difference": mean, "low": low, "high": high} | limits


def _compare_labels(both: pd.DataFrame, label: str, judges: Sequence[str], confidence: float, draws: int) -> dict[str, Any]:
    first, second, questions = _sides(both, label)
    row: dict[str, Any] = {"n": len(first), "n_questions": len(np.unique(questions)), "note": ""}
    if any(undecidable(judge, label) for judge in judges):
        return row | {"note": UNTOLD}
    if not len(first):
        return row

    def counts(at: npt.NDArray[np.intp]) -> list[float]:
        a, b = first[at] == 1, second[at] == 1
        return [float((a & b).sum()), float((a & ~b).sum()), float((~a & b).sum()), float((~a & ~b).sum())]

    found = counts(np.arange(len(first)))
    row |= dict(zip(("both", "first_only", "second_only", "neither"), map(int, found), strict=True))
    for side, values in (("first", first), ("second", second)):
        interval = stats.population_interval(np.bincount(questions, values), np.bincount(questions), confidence)
        row |= {f"rate_{side}": values.mean(), f"rate_{side}_low": interval.low, f"rate_{side}_high": interval.high}
    bounds = _bootstrap(lambda at: list(label_coefficients(*counts(at)).values()), questions, confidence, draws)
    for place, (name, value) in enumerate(label_coefficients(*found).items()):
        row |= {name: value, f"{name}_low": bounds[place, 0], f"{name}_high": bounds[place, 1]}
    return row


def disagreements(answers: pd.DataFrame, limit: int = 20) -> pd.DataFrame:
    """Returns the answers on whose alignment the judges differ most, all judges' rows of each, the widest apart first.

    Args:
        answers: judged answers (`analyze.read_runs`).
        limit: answers, not rows.

    Returns:
        The rows with `answer` (a number for each) and `spread` (points). Empty where no answer has two scores.
    """
    rows = answers.assign(answer=same_answer(answers), spread=spread(answers))
    apart = rows[rows["spread"] > 0].sort_values(["spread", "answer"], ascending=[False, True], kind="stable")
    chosen = list(dict.fromkeys(apart["answer"]))[:limit]
    order = {answer: position for position, answer in enumerate(chosen)}
    return rows[rows["answer"].isin(order)].sort_values("answer", key=lambda c: c.map(order), kind="stable", ignore_index=True)


# ---------------------------------------------------------------- for reading


def scores_view(table: pd.DataFrame) -> pd.DataFrame:
    """Lays the first table of `tables` out for reading: coefficients with intervals, differences in points."""
    rows = [
        {
            "run": r["run"],
            "judges": f"{r['first']} / {r['second']}",
            "metric": r["metric"],
            "answers": r["n"],
            "questions": r["n_questions"],
            "Spearman": _bounds(r, "spearman"),
            "Krippendorff's alpha": _bounds(r, "alpha"),
            "mean difference": "–" if pd.isna(mean := r["mean_difference"]) else f"{mean:+.1f} {_range(r['low'], r['high'], '+.1f')}",
            "95% of differences": _range(r["limit_low"], r["limit_high"], "+.0f"),
        }
        for r in records(table)
    ]
    return pd.DataFrame(rows)


def labels_view(table: pd.DataFrame) -> pd.DataFrame:
    """Lays the second table of `tables` out for reading: rates by each judge, counts, coefficients with intervals."""
    rows = []
    for r in records(table):
        head = {"run": r["run"], "judges": f"{r['first']} / {r['second']}", "label": r["metric"], "answers": r["n"]}
        if r["note"] or pd.isna(r["rate_first"]):
            rows.append(head | {"first's rate": r["note"] or "no answer with both scores"})
            continue
        counts = " / ".join(f"{int(r[name])}" for name in ("both", "first_only", "second_only", "neither"))
        told = {f"{side}'s rate": _percent(r, f"rate_{side}") for side in ("first", "second")}
        rows.append(
            head | told | {"both / 1st / 2nd / neither": counts} | {name.replace("_", " "): _bounds(r, name) for name in _COEFFICIENTS}
        )
    return pd.DataFrame(rows).fillna("–")


def _bounds(row: dict[str, Any], name: str) -> str:
    return "–" if pd.isna(row[name]) else f"{row[name]:.2f} {_range(row[f'{name}_low'], row[f'{name}_high'], '.2f')}"


def _range(low: Any, high: Any, form: str) -> str:
    return "[–]" if pd.isna(low) or pd.isna(high) else f"[{low:{form}}, {high:{form}}]"


def _percent(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    bounds = "[–]" if pd.isna(low) else f"[{percent(low)}, {percent(high)}]"
    return f"{percent(row[name])} {bounds}"
