"""The tables of the study: rates with two intervals, changes from base and from the control, and the files that hold them.

05_analyze shows one pair's tables and writes only into its folder; `analyze_study` makes the whole study's, under a lock. Answers
cluster in questions: everything here starts from counts by question (`lib.outcomes`), and `lib.stats` says what those allow.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lib import agreement, config, data, files, inference, instruments, stats, summary
from lib.config import Parameters
from lib.files import shown
from lib.imports import import_judged
from lib.labels import records
from lib.outcomes import COUNTS, GROUP, METRICS, UNSCORED, groups, question_counts, question_scores, score, undecidable
from lib.published import compare, read_published

__all__ = ["against_control", "analyze_run", "analyze_study", "changes", "import_judged", "rates", "read_runs", "scores", "step_summary"]

UNDECIDABLE = "not decidable by this judge"
RATES = [
    "pair", "seed", "model", "domain", "step", "question_set", "relation", "metric", "judge", "n", "k", "rate", "low", "high",
    "interval_method", "n_questions", "low_fixed", "high_fixed", "rate_all", "rate_min", "rate_max", "n_refusal", "n_code", "n_invalid",
    "n_error", "n_empty", "rubric_hash", "question_hash",
]  # fmt: skip
"""Columns of em_rates_summary.csv (DESIGN.md)."""
CHANGES = [
    "pair", "seed", "model", "domain", "step", "question_set", "relation", "metric", "judge", "change", "low", "high", "n_questions",
    "n_changed", "p", "smallest_p", "interval_method",
]  # fmt: skip
_ARM = ["pair", "seed", "question_set", "judge", "metric"]


# ---------------------------------------------------------------- answers


def read_runs(results_dir: str | Path) -> pd.DataFrame:
    """Reads all judged answers under a results folder.

    Args:
        results_dir: holds a folder for each run; folders without judged.csv, and those of `config.NO_RUNS`, are passed over.

    Returns:
        The rows of every judged.csv with pair, seed (0 where no training.json tells it and the folder's name does not), control
        (the pair's control arm, or None), relation and rubric_hash. Empty, with these columns, where there are no runs.
    """
    folder = files.resolve(results_dir)
    tables = [read_run(path.parent) for path in sorted(folder.glob("*/judged.csv")) if path.parent.name not in config.NO_RUNS]
    tables = [table for table in tables if not table.empty]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=_ANSWERS)


_ANSWERS = [*GROUP, "control", "question_id", "sample", "question", "response", "finish_reason", "aligned", "coherent"]
_ANSWERS += ["aligned_status", "coherent_status", "rubric_hash"]


def read_run(run: Path) -> pd.DataFrame:
    """Reads one run's judged answers, with the columns that `read_runs` describes.

    Raises:
        StudyError: judged.csv is missing, no CSV, or lacks a column.
    """
    table = files.read_csv(run / "judged.csv")
    needed = {"step", "question_set", "question_id", "question", "response", "aligned", "coherent", "judge"} - set(table.columns)
    if needed:
        where = f"{shown(run / 'judged.csv')}: {min(needed)}"
        raise files.StudyError(f"{where}: no such column; run 04_judge again, or `study import` the file.")
    told = files.read_json(run / "training.json") if (run / "training.json").is_file() else {}
    parameters = told.get("parameters", {})
    pair, seed = pair_and_seed(run.name)
    if "pair" in table and len(table):
        pair, seed = str(table["pair"].iloc[0]), 0  # imported: the folder is named after a model, whatever it ends in
    control = parameters.get("control")
    if control and pair.startswith(parameters["pair"]):
        control += pair.removeprefix(parameters["pair"])  # a preset's control is the control's run with that preset
    table = table.assign(pair=pair, seed=int(told.get("seed", seed)), control=control, rubric_hash=_rubrics(run, table["judge"]))
    for column, default in (("model", "unknown"), ("domain", "unknown"), ("sample", 0), ("finish_reason", "")):
        table[column] = table.get(column, default)
    for column in ("aligned", "coherent"):
        table[column], table[f"{column}_status"] = score(table, column)
    places = table[["question_set", "domain"]].drop_duplicates()
    entries = parameters.get("question_sets", ())
    known = {(s, d): data.relation(str(s), str(d), entries) for s, d in places.itertuples(index=False)}
    table["relation"] = [known[place] for place in zip(table["question_set"], table["domain"], strict=True)]
    return table


def pair_and_seed(name: str) -> tuple[str, int]:
    """Splits a run folder's name into pair (with its preset) and seed (0 where the name has none)."""
    pair, _, seed = name.rpartition("-s")
    return (pair, int(seed)) if pair and seed.isdecimal() else (name, 0)


def _rubrics(run: Path, judges: pd.Series[str]) -> list[str]:
    """Returns the hash of the rubrics that each row's judge was last asked with, read from the journal without parsing replies."""
    path = run / "judgments.jsonl"
    last: dict[tuple[str, str], str] = {}
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as stream:
            for line in stream:
                found = [re.search(rf'"{key}": "((?:[^"\\]|\\.)*)"', line) for key in ("judge", "metric", "rubric_sha256")]
                if all(found):
                    judge, metric, rubric = (match[1] for match in found if match)
                    last[judge, metric] = rubric
    hashes = {
        judge: files.sha256_text(" ".join(f"{metric}={last[j, metric]}" for j, metric in sorted(last) if j == judge))[:16]
        for judge in {judge for judge, _ in last}
    }
    return [hashes.get(judge, "") for judge in judges]


# ---------------------------------------------------------------- tables


def rates(answers: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """Computes every rate of the study with its two intervals.

    Args:
        answers: judged answers (`read_runs`).
        confidence: of the intervals.

    Returns:
        em_rates_summary: one row for each pair, seed, step, question set, judge (in the order of judged.csv) and metric, columns
        `RATES`; rates are fractions.
        Without scored answers the rate is empty. A metric that the judge cannot tell keeps n and k alone.
    """
    counts = question_counts(answers)
    if counts.empty:
        return pd.DataFrame(columns=RATES)
    questions = instruments.question_hashes(answers)
    rubrics: dict[Any, str] = answers.groupby(GROUP, sort=False, dropna=False)["rubric_hash"].first().to_dict()
    columns = {name: counts[name].to_numpy() for name in COUNTS}
    rows = []
    for named, at in groups(counts, [*GROUP, "metric"]):
        own = {name: column[at] for name, column in columns.items()}
        row = named | _rate(own, confidence, undecidable(str(named["judge"]), str(named["metric"])))
        row["question_hash"] = questions[named["pair"], named["seed"], named["step"], named["question_set"]]
        row["rubric_hash"] = rubrics[tuple(named[name] for name in GROUP)]
        rows.append(row)
    table = pd.DataFrame(rows)[RATES]
    order = {name: position for position, name in enumerate(METRICS)}
    # A run's judges stay in the order of judged.csv: the first is the one that single-judge tables and figures show.
    table["rank"] = table.groupby(["pair", "seed"], sort=False)["judge"].transform(lambda judges: pd.factorize(judges)[0])
    by = ["pair", "seed", "step", "question_set", "rank", "metric"]
    return table.sort_values(by, key=lambda c: c.map(order) if c.name == "metric" else c, kind="stable", ignore_index=True)[RATES]


def _rate(counts: Mapping[str, npt.NDArray[np.int64]], confidence: float, untold: bool) -> dict[str, Any]:
    k, n = counts["k"], counts["n"]
    sums = {name: int(values.sum()) for name, values in counts.items()}
    nothing = dict.fromkeys(["rate", "low", "high", "low_fixed", "high_fixed", "rate_all", "rate_min", "rate_max"], np.nan)
    row = {name: sums[name] for name in ("n", "k", *(f"n_{status}" for status in UNSCORED))} | {"n_questions": int((n > 0).sum())}
    if untold:
        return row | nothing | {"interval_method": UNDECIDABLE}
    interval = stats.population_interval(k, n, confidence)
    low_fixed, high_fixed = stats.fixed_interval(k, n, confidence)
    return row | nothing | {
        "rate": sums["k"] / sums["n"] if sums["n"] else np.nan,
        "low": interval.low, "high": interval.high, "interval_method": interval.method, "low_fixed": low_fixed, "high_fixed": high_fixed,
        "rate_all": sums["k"] / sums["total"],
        "rate_min": sums["k_known"] / sums["total"],
        "rate_max": (sums["k_known"] + sums["unknown"]) / sums["total"],
    }  # fmt: skip


def question_rates(answers: pd.DataFrame, mix: bool = False) -> pd.DataFrame:
    """Returns each question's rate under every metric.

    Args:
        answers: judged answers.
        mix: questions of one id are one question, whatever their text.

    Returns:
        `GROUP`, metric, question_id, n, k and rate (fraction; NaN without scored answers, or where the judge cannot tell the metric),
        instrument and question_hash (`instruments.add`).
    """
    counts = question_counts(answers if mix else instruments.questions_told_apart(answers))
    untold = {(judge, metric) for judge in counts["judge"].unique() for metric in METRICS if undecidable(str(judge), metric)}
    told = np.array([pair not in untold for pair in zip(counts["judge"], counts["metric"], strict=True)], dtype=bool)
    rate = (counts["k"] / counts["n"].where((counts["n"] > 0) & told)).astype(float)
    return instruments.add(counts[[*GROUP, "metric", "question_id", "n", "k"]].assign(rate=rate), answers)


def score_changes(answers: pd.DataFrame, confidence: float = 0.95, mix: bool = False) -> pd.DataFrame:
    """Compares the mean alignment score of each pair's last step with its base's and its control's, paired by question.

    The score uses every answer's whole scale, so it tells a difference with fewer answers than a share below a threshold does.

    Returns:
        Columns `CHANGES`, against (base, or the control's name) and instrument; change and its interval are fractions of 100 points.
    """
    means = question_scores(answers if mix else instruments.questions_told_apart(answers), "aligned")
    table = instruments.add(means.assign(metric="mean_aligned", k=np.nan, rate=means["mean"] / 100), answers)
    base = changes(answers, confidence, table).assign(against="base")
    base = base[base["step"] == base.groupby(["pair", "seed"])["step"].transform("max")] if len(base) else base
    control = against_control(answers, confidence=confidence, by_question=table, mix=mix).rename(columns={"control": "against"})
    found = pd.concat([frame for frame in (base, control) if len(frame)] or [base], ignore_index=True)
    return found.reindex(columns=[*CHANGES, "against", "instrument"])


def changes(answers: pd.DataFrame, confidence: float = 0.95, by_question: pd.DataFrame | None = None) -> pd.DataFrame:
    """Computes the change from the base model (step 0) to each step, paired by question.

    Args:
        answers: judged answers.
        confidence: of the intervals.
        by_question: in the layout of `question_rates`; None computes the rates.

    Returns:
        Columns `CHANGES`; change and its interval are fractions, p is the sign-flip test's, smallest_p the least it could be with so
        many questions. No rows for pairs without step 0.
    """
    table = question_rates(answers) if by_question is None else by_question
    base = table.loc[table["step"] == 0, [*_ARM, "question_id", "rate"]]
    if base.empty:
        return pd.DataFrame(columns=CHANGES)
    merged = table[table["step"] > 0].merge(base, on=[*_ARM, "question_id"], how="left", suffixes=("", "_reference"))
    return _paired(merged, base[_ARM], confidence)


def against_control(
    answers: pd.DataFrame, pairs: Mapping[str, str] | None = None, confidence: float = 0.95, by_question: pd.DataFrame | None = None,
    mix: bool = False,
) -> pd.DataFrame:  # fmt: skip
    """Compares each pair's last step with its control's last step, paired by question; same seed where the control has it.

    Args:
        answers: judged answers of pairs and controls.
        pairs: control of each pair; None takes the column `control`.
        confidence: of the intervals.
        by_question: in the layout of `question_rates`; None computes the rates.
        mix: compare arms that were measured by different instruments, too.

    Returns:
        Columns `CHANGES`, control and instrument (`instruments.label`); empty where no control has answers. Without `mix` an arm that
        another rubric or other questions measured has a row without a change, whose interval_method says so.
    """
    if pairs is None:
        named = answers[["pair", "control"]].dropna().drop_duplicates() if "control" in answers else answers.iloc[:0]
        pairs = {str(row["pair"]): str(row["control"]) for row in records(named)}
    table = question_rates(answers, mix) if by_question is None else by_question
    table = table.assign(instrument=instruments.of(table), question_hash=table.get("question_hash", ""))
    last = table[(table["step"] == table.groupby(["pair", "seed"])["step"].transform("max")) & (table["step"] > 0)]
    paired = last.assign(control=last["pair"].map(pairs).astype(object))
    seeds = {control: sorted(group["seed"].unique()) for control, group in last.groupby("pair")}
    paired = paired[paired["control"].isin(list(seeds))]
    if paired.empty:
        return pd.DataFrame(columns=[*CHANGES, "control", "instrument"])
    # The control's run with the same seed, else its first.
    own = [seed if seed in seeds[control] else seeds[control][0] for control, seed in zip(paired["control"], paired["seed"], strict=True)]
    keys = ["control", "control_seed", "question_set", "judge", "metric", "question_id"]
    reference = last.rename(columns={"pair": "control", "seed": "control_seed"})
    measured = reference[[*keys[:-1], "instrument", "question_hash"]].drop_duplicates(keys[:-1])
    merged = paired.assign(control_seed=own).merge(
        reference[[*keys, "rate"]], on=keys, how="left", suffixes=("", "_reference"), indicator="found"
    )
    merged = merged.merge(measured, on=keys[:-1], how="left", suffixes=("", "_reference"))
    known = merged["instrument_reference"].notna()
    merged["matched"] = (merged["found"] == "both") & (mix | (merged["instrument"] == merged["instrument_reference"]))
    merged["rate_reference"] = merged["rate_reference"].where(merged["matched"])
    found = _paired(merged, merged.loc[known, _ARM], confidence)
    return instruments.said(found.assign(control=found["pair"].map(pairs)), merged[known], _ARM, mix)


def _paired(merged: pd.DataFrame, known: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """Estimates the mean of rate − rate_reference by group and metric, for arms that have a reference at all (`known`)."""
    arms = pd.MultiIndex.from_frame(known)
    merged = merged[pd.MultiIndex.from_frame(merged[_ARM]).isin(arms)].reset_index(drop=True)
    differences = (merged["rate"] - merged["rate_reference"]).to_numpy(dtype=float)
    rows = []
    for named, at in groups(merged, [*GROUP, "metric"]):
        change = stats.paired_change(differences[at], confidence)._asdict()
        method = UNDECIDABLE if undecidable(str(named["judge"]), str(named["metric"])) else change["method"]
        rows.append(named | change | {"interval_method": method})
    return pd.DataFrame(rows, columns=CHANGES)


def scores(answers: pd.DataFrame, confidence: float = 0.95) -> pd.DataFrame:
    """Computes mean scores by step, every question weighing the same.

    Returns:
        `GROUP`, metric (aligned or coherent), n (scored answers), n_questions, mean, low, high (points out of 100).
    """
    rows = []
    for metric in ("aligned", "coherent"):
        by_question = question_scores(answers, metric)
        means, counts = by_question["mean"].to_numpy(), by_question["n"].to_numpy()
        for named, at in groups(by_question, GROUP):
            mean, low, high = stats.mean_interval(means[at], confidence)
            found = {"n": int(counts[at].sum()), "n_questions": int((counts[at] > 0).sum()), "mean": mean, "low": low, "high": high}
            rows.append(named | {"metric": metric} | found)
    return pd.DataFrame(rows, columns=[*GROUP, "metric", "n", "n_questions", "mean", "low", "high"])


def step_summary(table: pd.DataFrame) -> pd.DataFrame:
    """Turns one run's rates into step_summary: a row for each step, question set and judge; n is the answers scored for alignment."""
    keys = ["step", "question_set", "relation", "judge"]
    names = ["em_course", "em_paper", "coherent_rate"]
    columns = [*keys, "n", *(f"{name}{end}" for name in names for end in ("", "_low", "_high"))]
    if table.empty:
        return pd.DataFrame(columns=columns)
    wide = table[table["metric"] == "em_course"].set_index(keys)[["n"]]
    for name in names:
        own = table[table["metric"] == name].set_index(keys)[["rate", "low", "high"]]
        wide = wide.join(own.rename(columns={"rate": name, "low": f"{name}_low", "high": f"{name}_high"}))
    order = {judge: position for position, judge in enumerate(dict.fromkeys(table["judge"]))}
    by = ["question_set", "judge", "step"]
    summary = wide.reset_index()[columns]
    return summary.sort_values(by, key=lambda c: c.map(order) if c.name == "judge" else c, kind="stable", ignore_index=True)


def status_table(answers: pd.DataFrame) -> pd.DataFrame:
    """Counts how judgments ended: pair, seed, judge, metric, answers, ok, a column a status, share_failed (invalid or error, fraction)."""
    columns = ["pair", "seed", "judge", "metric", "answers", "ok", *UNSCORED, "share_failed"]
    rows = []
    for (pair, seed, judge), group in answers.groupby(["pair", "seed", "judge"], sort=False, dropna=False):
        empty = int((group["response"].astype(str).str.strip() == "").sum())
        for metric in ("aligned", "coherent"):
            counted: dict[str, float] = {name: int((group[f"{metric}_status"] == name).sum()) for name in ("ok", *UNSCORED)}
            counted["empty"] = empty
            counted |= {"answers": len(group), "share_failed": (counted["invalid"] + counted["error"]) / len(group)}
            rows.append({"pair": pair, "seed": seed, "judge": judge, "metric": metric} | counted)
    return pd.DataFrame(rows, columns=columns)


# ---------------------------------------------------------------- one pair, whole study


def analyze_run(parameters: Parameters) -> dict[str, pd.DataFrame]:
    """Makes one pair's tables for 05_analyze and writes step_summary.csv into the run's folder; nothing else is written.

    Returns:
        answers (the run's, without the control's), rates, changes, control, scores, step_summary, statuses, misalign_at_k, onset, falls,
        agreement and label_agreement (of judges), and published (published figures beside ours).

    Raises:
        StudyError: judged.csv is missing or malformed.
    """
    run = config.run_dir(parameters)
    answers = read_run(run)
    both, controls = answers, {}
    if parameters.control:
        folder = config.run_dir(parameters.model_copy(update={"pair": parameters.control}))
        if (folder / "judged.csv").is_file():
            both = pd.concat([answers, read_run(folder)], ignore_index=True)
            controls = dict.fromkeys(map(str, answers["pair"].unique()), pair_and_seed(folder.name)[0])
    level = float(parameters.confidence)
    told = files.read_json(run / "training.json") if (run / "training.json").is_file() else {}
    found, by_question, declared = rates(answers, level), question_rates(answers), inference.plan()
    tables = {
        "answers": answers,
        "rates": found,
        "changes": changes(answers, level, by_question),
        "control": against_control(both, controls, level),
        "scores": scores(answers, level),
        "step_summary": step_summary(found),
        "statuses": status_table(answers),
        "misalign_at_k": inference.misalign_at_k(by_question),
        "onset": inference.onset(by_question, declared),
        "falls": inference.non_monotonic(by_question, declared),
        "published": compare(found, read_published(parameters.published), {str(p): told for p in answers["pair"].unique()}),
    }
    tables["agreement"], tables["label_agreement"] = agreement.tables(answers, level)
    files.write_csv(run / "step_summary.csv", tables["step_summary"])
    return tables


def analyze_study(
    results_dir: str | Path,
    figures: Callable[[Path, pd.DataFrame, pd.DataFrame, pd.DataFrame, pd.DataFrame], Any] | None = None,
    confidence: float = 0.95,
    published: str | Path = "results/published",
    mix: bool = False,
) -> dict[str, pd.DataFrame]:
    """Makes the whole study's tables, the two Markdown files and the figures, under a lock.

    Args:
        results_dir: the study's results folder.
        figures: called with results_dir, answers, rates, changes and published figures when the tables are written.
        confidence: of the intervals.
        published: folder of published figures.
        mix: pool and compare runs whose instruments differ (`lib.instruments`), too; their rows say so.

    Returns:
        The tables by name.
    """
    folder = files.resolve(results_dir)
    with files.lock(folder / "data" / ".lock", what="the study's tables"):
        answers = read_runs(folder)
        details = summary.details(folder)
        tables = study_tables(answers, details, published, confidence, mix)
        files.write_csv(folder / "data" / "em_rates_summary.csv", tables["rates"])
        files.write_csv(folder / "data" / "em_rates_pooled.csv", tables["pooled"])
        for name in _WRITTEN:
            files.write_csv(folder / "data" / f"{name}.csv", tables[name])
        files.write_text(folder / "EXPERIMENT_SUMMARY.md", summary.experiment(tables, inference.plan(), confidence))
        files.write_text(folder / "TRAINING_DETAILS.md", summary.training(details))
        if figures is not None:
            told, drawn = (instruments.taken_as_one(table) if mix else table for table in (answers, tables["rates"]))
            figures(folder, told, drawn, tables["changes"], read_published(published))
    return tables


_WRITTEN = ["changes", "control", "score_changes", "emergence", "onset", "falls", "domain_gaps", "size_gaps", "claims"]
_WRITTEN += ["agreement", "label_agreement"]


def study_tables(
    answers: pd.DataFrame, details: Mapping[str, Mapping[str, Any]], published: str | Path, confidence: float = 0.95, mix: bool = False
) -> dict[str, pd.DataFrame]:
    """Returns the whole study's tables by name, from answers and the runs' records; writes nothing."""
    declared = inference.plan()
    found, by_question = rates(answers, confidence), question_rates(answers, mix)
    moved = changes(answers, confidence, by_question)
    controls = set(answers["control"].dropna())
    own = inference.trained(by_question, controls)
    training = {pair_and_seed(run)[0]: o["training"] for run, o in details.items()}
    epochs = {pair: int(record["steps_per_epoch"]) for pair, record in training.items() if record.get("steps_per_epoch")}
    t = {
        "answers": answers,
        "rates": found,
        "changes": moved,
        "control": against_control(answers, confidence=confidence, by_question=by_question, mix=mix),
        "score_changes": score_changes(answers, confidence, mix),
        "scores": scores(answers, confidence),
        "statuses": status_table(answers),
        "pooled": inference.pooled(by_question, confidence, mix),
        "emergence": inference.emergence(own, declared, confidence, mix),
        "onset": inference.onset(own, declared),
        "falls": inference.non_monotonic(own, declared),
        "domain_gaps": inference.gaps(own, declared, confidence, mix=mix),
        "size_gaps": inference.gaps(own, declared, confidence, across="model", mix=mix),
        "diagnostics": summary.diagnostics(details),
    }
    t["agreement"], t["label_agreement"] = agreement.tables(answers, confidence)
    coherent = inference.trained(moved, controls)
    coherent = coherent[(coherent["metric"] == "coherent_rate") & coherent["relation"].isin(["general", "open_ended"])]
    coherent = coherent[coherent["step"] == coherent.groupby(["pair", "seed"])["step"].transform("max")] if len(coherent) else coherent
    t["claims"] = inference.claims(declared, t["domain_gaps"], t["onset"], t["falls"], coherent, epochs)
    t["published"] = compare(inference.trained(found, controls), read_published(published), training)
    return t
