"""Tables of what judges did: how calls ended, how scores lie, a judge's own noise, and where the probe judges unknown ground."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from lib import files, journal, scoring

WARN_SHARE = 0.02
"""Share of invalid or error above which a table says so."""
OUTSIDE = "probe_outside.csv"


def status_table(judged: pd.DataFrame) -> pd.DataFrame:
    """Counts how judging ended, by judge and metric; an answer that has no score is never left out of sight.

    Returns:
        A row for each judge and metric: answers, a count of each status, and a warning where more than 2% are invalid or error.
    """
    rows = []
    for name, group in judged.groupby("judge", sort=False):
        for column in [c for c in judged.columns if c.endswith("_status")]:
            counts = group[column].value_counts()
            if counts.empty:  # a metric that this judge does not score
                continue
            lost = (counts.get("invalid", 0) + counts.get("error", 0)) / len(group)
            warning = f"{lost:.1%} invalid or error" if lost > WARN_SHARE else ""
            counted = {status: int(counts.get(status, 0)) for status in scoring.STATUSES}
            rows.append({"judge": name, "metric": column.removesuffix("_status"), "answers": len(group)} | counted | {"warning": warning})
    return pd.DataFrame(rows)


def score_table(judged: pd.DataFrame, metric: str = "aligned") -> pd.DataFrame:
    """Describes the distribution of a metric's scores by judge, step and question set.

    Returns:
        A row for each judge, step and question set: scored answers, mean and the 10th, 25th, 50th, 75th and 90th percentile (points).
    """
    groups = judged.groupby(["judge", "step", "question_set"], sort=False)[metric]
    columns = {"scored": groups.count(), "mean": groups.mean()}
    return pd.DataFrame(columns | {f"p{percent}": groups.quantile(percent / 100) for percent in (10, 25, 50, 75, 90)}).reset_index()


def provenance(log: str | Path) -> pd.DataFrame:
    """Says what a journal's scores come from, so that another can ask the same judge; see `journal.sources`."""
    return journal.sources(files.read_jsonl(log))


def retest_table(log: str | Path) -> pd.DataFrame:
    """Measures a judge's own noise from the calls that a journal holds more than once (`judge_repeats`); see `scoring.noise`."""
    return scoring.noise(files.read_jsonl(log))


def outside(judged: pd.DataFrame, log: str | Path) -> pd.DataFrame:
    """Counts the answers that lie outside what the probe was fitted on, by step and question set.

    The probe's score of such an answer is a guess. Of answers to new questions that are otherwise like the fitted ones, one in a
    hundred lies outside (`Probe.distance`).

    Args:
        judged: answers with a column judge; rows of other judges are passed over.
        log: the journal that holds the distances. Those of other weights than the present ones do not count.

    Returns:
        step, question_set, answers (with a distance), outside (of these), share (fraction). Empty where the probe did not judge.
    """
    columns = ["step", "question_set", "answers", "outside", "share"]
    own = judged[judged["judge"] == "probe"]
    if own.empty:
        return pd.DataFrame(columns=columns)
    from lib import probe

    weights = probe.load()
    distances = {
        record["key"][:32]: record["usage"]["distance"]
        for record in files.read_jsonl(log)
        if record["judge"] == "probe" and record["rubric_sha256"] == weights.fingerprint and "distance" in (record["usage"] or {})
    }
    pairs = zip(own["question"].astype(str), own["response"].fillna("").astype(str), strict=True)
    distance = pd.Series([distances.get(journal.answer_key(*pair)) for pair in pairs], index=own.index, dtype=float)
    places = [own[name] if name in own else pd.Series(default, index=own.index) for name, default in (("step", 0), ("question_set", ""))]
    known = distance.notna()
    groups = (distance > weights.threshold)[known].groupby([place[known] for place in places], sort=False)
    table = groups.agg(["size", "sum"]).set_axis(["answers", "outside"], axis=1).rename_axis(["step", "question_set"]).reset_index()
    return table.assign(share=table["outside"] / table["answers"])[columns]


def write_outside(run: Path, judged: pd.DataFrame) -> None:
    """Writes a run's `outside` beside judged.csv, or takes away one that a former judge left."""
    if (judged["judge"] == "probe").any():
        files.write_csv(run / OUTSIDE, outside(judged, run / "judgments.jsonl"))
    else:
        (run / OUTSIDE).unlink(missing_ok=True)
