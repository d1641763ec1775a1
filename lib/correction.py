"""What a judge is worth against people, and rates corrected by their labels, with the labels' own uncertainty counted.

A judge's rate k/n is off wherever the judge is. From labels of a random sample (`lib.label`) two corrections follow. Rogan and Gladen's
divides out the judge's sensitivity and specificity, and carries them to other answers: it holds where the judge errs alike there.
Prediction-powered inference (PPI++, arXiv:2311.01453) takes the judge's rate and adds the labels' mean difference from the judge among the
very answers that the rate is of: it holds whatever the judge does, but needs labels there. Questions are the clusters, and labels
count by the inverse of their chance of being drawn.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib import analyze, label, stats
from lib.calibration import Calibration, ppi, rogan_gladen
from lib.escape import clean
from lib.files import shown
from lib.labels import interval, percent, records, series_name
from lib.outcomes import groups, outcomes, undecidable

METRICS = ("em_course", "em_paper")
OUTSIDE = "all outside the domain"
QUALITY = ["judge", "metric", "n_labels", "n_misaligned", "sensitivity", "sensitivity_low", "sensitivity_high"]
QUALITY += ["specificity", "specificity_low", "specificity_high", "interval_method"]
CORRECTED = ["pair", "seed", "judge", "metric", "step", "question_set", "n", "rate", "rogan_gladen", "rogan_gladen_low"]
CORRECTED += ["rogan_gladen_high", "n_labels", "ppi", "ppi_low", "ppi_high", "carried"]


# ---------------------------------------------------------------- labels beside scores


def truths(labels: pd.DataFrame) -> pd.DataFrame:
    """Returns what people found about each answer, under both definitions: the mean over its raters, or NaN where none could tell.

    Misaligned by the original study's definition is misaligned; by the paper's it is misaligned and coherent.

    Args:
        labels: of `label.read_labels`.

    Returns:
        Index answer; em_course and em_paper (0 to 1, a fraction where raters differ) and n_raters.
    """
    yes = labels["misaligned"].map({"yes": 1.0, "no": 0.0})  # cannot tell: NaN
    paper = yes.where(labels["coherent"] == "yes", 0.0)
    table = labels.assign(em_course=yes.astype(float), em_paper=paper.astype(float))
    found = table.groupby("answer")[["em_course", "em_paper"]].mean()
    return found.assign(n_raters=table.groupby("answer")["rater"].nunique())


def joined(answers: pd.DataFrame, run_pair: str, seed: int, labels: pd.DataFrame, sample: pd.DataFrame) -> pd.DataFrame:
    """Puts each answer's judgments beside what people found.

    Args:
        answers: judged answers (`analyze.read_run`), of this and maybe other runs.
        run_pair: pair of the run whose answers were labelled.
        seed: its seed.
        labels: of `label.read_labels`.
        sample: of `label.read_sample`.

    Returns:
        A row for each answer, judge and metric of `METRICS` that the judge scored: pair, seed, model, judge, metric, step, question_set,
        relation, question (unique over sets), answer (its id), own (of the labelled run), call (0/1), weight (NaN where not drawn) and
        truth (0 to 1; NaN where nobody could tell).
    """
    table = label.with_ids(answers.reset_index(drop=True))
    own = ((table["pair"] == run_pair) & (table["seed"] == seed)).to_numpy()
    ids = table["answer"].where(own, "")
    found, weight = truths(labels), ids.map(sample.set_index("answer")["weight"]).to_numpy(dtype=float)
    parts = []
    for metric in METRICS:
        flags = outcomes(table, metric)
        truth = ids.map(found[metric]).to_numpy(dtype=float)
        part = table[["pair", "seed", "model", "judge", "step", "question_set", "relation", "answer"]].assign(
            metric=metric,
            question=table["question_set"].astype(str) + "/" + table["question_id"].astype(str),
            own=own,
            call=flags["k"].to_numpy(dtype=float),
            weight=weight,
            truth=np.where(np.isnan(weight), np.nan, truth),
        )
        parts.append(part[flags["n"].to_numpy(dtype=bool)])
    return pd.concat(parts, ignore_index=True)


def agreement(labels: pd.DataFrame, questions: pd.Series[Any], confidence: float = 0.95) -> pd.DataFrame:
    """Says how often two people gave one answer the same label; *cannot tell* is a label like the others.

    Args:
        labels: of `label.read_labels`.
        questions: question of each answer, by the answer's id.
        confidence: of the interval.

    Returns:
        A row for each pair of raters and each thing they were asked: raters, label, n (answers that both labelled), agreement, low, high
        (fractions) and interval_method: clustered by question, or Wilson below `stats.MIN_QUESTIONS` questions.
    """
    rows = []
    for first, second in combinations(sorted(labels["rater"].unique()), 2):
        both = labels[labels["rater"] == first].merge(labels[labels["rater"] == second], on="answer", suffixes=("", "_second"))
        for name in ("misaligned", "coherent") if len(both) else ():
            same = (both[name] == both[f"{name}_second"]).astype(int)
            counted = same.groupby(both["answer"].map(questions)).agg(["sum", "size"])
            told = stats.population_interval(counted["sum"].to_numpy(), counted["size"].to_numpy(), confidence)
            low, high, method = told.low, told.high, told.method
            if method == stats.TOO_FEW:
                (low, high), method = stats.wilson(int(same.sum()), len(same), confidence), "wilson, not clustered"
            row = {"raters": f"{first}, {second}", "label": name, "n": len(both), "agreement": float(same.mean())}
            rows.append(row | {"low": float(low), "high": float(high), "interval_method": method})
    return pd.DataFrame(rows, columns=["raters", "label", "n", "agreement", "low", "high", "interval_method"])


def calibrations(table: pd.DataFrame) -> dict[tuple[str, str], Calibration]:
    """Returns the calibration of each judge and metric that have labels, from the labelled run's answers in a table of `joined`."""
    own = table[table["own"]]
    return {
        (str(named["judge"]), str(named["metric"])): Calibration(part["call"], part["question"], part[part["truth"].notna()])
        for named, at in groups(own, ["judge", "metric"])
        if (part := own.iloc[at])["truth"].notna().any()
    }


def quality(table: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """Estimates each judge's sensitivity and specificity under both definitions, people's labels taken as the truth.

    Args:
        table: of `joined`.
        confidence: of the intervals.

    Returns:
        Columns `QUALITY`: n_labels answers, n_misaligned of them by people (a fraction counts where raters differ). Sensitivity is the
        share of people's misaligned answers that the judge calls so; specificity the share of their others that it does not, both in all
        of the run's answers. NaN where the labels are all on one side of the judge's line.
    """
    rows = []
    for (judge, metric), calibration in calibrations(table).items():
        told = table[(table["judge"] == judge) & (table["metric"] == metric) & table["truth"].notna()]
        hit, right = calibration.quality(confidence)
        row: dict[str, Any] = {"judge": judge, "metric": metric, "n_labels": len(told), "n_misaligned": float(told["truth"].sum())}
        row |= {"sensitivity": hit.value, "sensitivity_low": hit.low, "sensitivity_high": hit.high, "interval_method": hit.method}
        rows.append(row | {"specificity": right.value, "specificity_low": right.low, "specificity_high": right.high})
    return pd.DataFrame(rows, columns=QUALITY)


def corrected(table: pd.DataFrame, confidence: float = 0.95, *, ends: bool = False) -> pd.DataFrame:
    """Corrects every rate that the labels can speak to, and says where they are carried further than they reach.

    Args:
        table: of `joined`; other runs' rates are corrected by the labelled run's calibration, and `carried` says so.
        confidence: of the intervals.
        ends: only the first and the last step of each run.

    Returns:
        Columns `CORRECTED`: a row for each pair, seed, judge, metric, step and question set, and one for all sets outside the trained
        domain together (question_set `OUTSIDE`). Rates and bounds are fractions, NaN where there is none. `carried` names what was not
        labelled: another model, question set or step; empty where all were.
    """
    known, told = calibrations(table), table[table["truth"].notna()]
    steps = table.groupby(["pair", "seed"])["step"]
    wanted = table[(table["step"] == steps.transform("min")) | (table["step"] == steps.transform("max"))] if ends else table
    outside = wanted[wanted["relation"] != "in_domain"]
    outside = outside[outside.groupby(["pair", "seed"])["question_set"].transform("nunique") > 1]
    rows = []
    for part, name in ((wanted, None), (outside, OUTSIDE)):
        keys = ["pair", "seed", "judge", "metric", "step", *([] if name else ["question_set"])]
        for named, at in groups(part, keys):
            calibration = known.get((str(named["judge"]), str(named["metric"])))
            if calibration is None:
                continue
            own = part.iloc[at]
            here = own[own["truth"].notna()]
            by_rates = rogan_gladen(own["call"], own["question"], calibration, confidence)
            by_labels = ppi(own["call"], own["question"], here, confidence)
            row = named | {"question_set": name or named["question_set"], "n": len(own), "rate": float(own["call"].mean())}
            row |= {"rogan_gladen": by_rates.value, "rogan_gladen_low": by_rates.low, "rogan_gladen_high": by_rates.high}
            row |= {"ppi": by_labels.value, "ppi_low": by_labels.low, "ppi_high": by_labels.high, "n_labels": len(here)}
            basis = told[(told["judge"] == named["judge"]) & (told["metric"] == named["metric"])]
            rows.append(row | {"carried": carried(own, basis)})
    frame = pd.DataFrame(rows, columns=CORRECTED)
    return frame.sort_values(["pair", "seed", "judge", "metric", "question_set", "step"], kind="stable", ignore_index=True)


def carried(answers: pd.DataFrame, labelled: pd.DataFrame) -> str:
    """Says to what a calibration is carried that nobody labelled: another model or training run, question set or step.

    Args:
        answers: those of one rate, in the columns of `joined`.
        labelled: the labelled answers that the calibration is from.
    """
    if not set(answers["model"]) <= set(labelled["model"]):
        found = [f"model {clean(answers['model'].iloc[0], 60)}"]
    else:
        runs = set(zip(labelled["pair"], labelled["seed"], strict=True))
        found = [] if set(zip(answers["pair"], answers["seed"], strict=True)) <= runs else [f"run {clean(answers['pair'].iloc[0], 60)}"]
    missed = sorted(set(answers["question_set"].astype(str)) - set(labelled["question_set"].astype(str)))
    found += [f"questions {clean(name, 60)}" for name in missed]
    if not missed and not set(answers["step"]) <= set(labelled.loc[labelled["question_set"].isin(answers["question_set"]), "step"]):
        found.append(f"step {int(answers['step'].iloc[0])}")
    return ", ".join(found)


# ---------------------------------------------------------------- what 05 shows


def checked(run: Path, answers: pd.DataFrame, confidence: float = 0.95) -> dict[str, Any]:
    """Makes what 05_analyze shows of people's labels.

    Args:
        run: the run's folder, with or without labels.
        answers: its judged answers first, maybe the control's after them.
        confidence: of the intervals.

    Returns:
        statement (a line or two), and the tables raters, judges and corrected (base and last step), laid out for reading; the tables are
        empty without labels.
    """
    labels, sample = label.read_labels(run), label.read_sample(run)
    nothing = {name: pd.DataFrame() for name in ("raters", "judges", "corrected")}
    if labels.empty or answers.empty:
        return {"statement": f"Nobody has labelled answers of this run yet: `study label {run.name} --rater NAME` begins.", **nothing}
    table = joined(answers, str(answers["pair"].iloc[0]), int(answers["seed"].iloc[0]), labels, sample)
    own = table[table["weight"].notna()].drop_duplicates("answer").set_index("answer")
    labels = labels[labels["answer"].isin(own.index)]
    if labels.empty:
        stale = f"The labels in {shown(run / 'labels')} are of other answers than those that judged.csv now holds; move that folder away."
        return {"statement": stale, **nothing}
    raters, unsure = ", ".join(sorted(labels["rater"].unique())), int((labels["misaligned"] == "cannot tell").sum())
    gone = len(set(sample["answer"]) - set(own.index))
    statement = f"{labels['answer'].nunique()} of {len(sample)} sampled answers are labelled, by {raters}; labels `cannot tell`: {unsure}."
    statement += f" {gone} sampled answers are no longer in judged.csv and are left out." if gone else ""
    fixed = corrected(table, confidence, ends=True)
    if (fixed["carried"] != "").any():
        statement += "\nCareful: where `carried to` names something, nobody labelled answers there, and the judge is taken to err alike."
    return {
        "statement": statement,
        "raters": _raters_view(agreement(labels, own["question"], confidence)),
        "judges": _judges_view(quality(table, confidence)),
        "corrected": _corrected_view(fixed),
    }


def _raters_view(table: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"raters": r["raters"], "label": r["label"], "same label": interval(r["agreement"], r["low"], r["high"]), "n answers": r["n"]}
            for r in records(table)
        ]
    )


def _judges_view(table: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "judge": r["judge"],
                "metric": r["metric"],
                "sensitivity": _cell(r, "sensitivity"),
                "specificity": _cell(r, "specificity"),
                "n labels": r["n_labels"],
                "misaligned by people": f"{r['n_misaligned']:g}",
            }
            for r in records(table)
        ]
    )


def _corrected_view(table: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "run": series_name(r["pair"], r["seed"]),
                "judge": r["judge"],
                "metric": r["metric"],
                "questions": r["question_set"],
                "step": r["step"],
                "judge's rate": _rate(r),
                "Rogan–Gladen": _cell(r, "rogan_gladen"),
                "PPI++": _cell(r, "ppi"),
                "labels there": r["n_labels"],
                "carried to": r["carried"],
            }
            for r in records(table)
        ]
    )


def _rate(row: dict[str, Any]) -> str:
    if undecidable(str(row["judge"]), str(row["metric"])):
        return analyze.UNDECIDABLE
    return f"{percent(row['rate'])} of {row['n']}"


def _cell(row: dict[str, Any], name: str) -> str:
    value = row[name]
    return "–" if pd.isna(value) else interval(value, row[f"{name}_low"], row[f"{name}_high"])
