"""Which runs were measured alike: by the same questions, the same rubric and the same judge.

Tables have a row of their own for each judge anyway. Here the rest is told: runs whose rubric differs, or is not known (imported
answers), are measured by different instruments, and questions of one id but another text are different questions. Such runs stand beside
each other and are neither pooled nor compared, unless `study analyze --mix` asks for it; the rows then say so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pandas as pd

from lib import files

NOT_COMPARED = "not compared: other questions, rubric or judge"
"""Stands in place of an interval or a verdict where two arms were measured by different instruments."""
MIXED = "mixed: "
"""Begins the instrument of a row that pools or compares several (`--mix`)."""


QUESTIONS = "questions; "
"""Follows `MIXED` where the questions differ too."""


def names(table: pd.DataFrame) -> pd.Series[str]:
    """Returns each row's instrument apart from its judge: the hash of its rubrics, or, where that is not known, the run alone.

    Args:
        table: columns pair and seed; rubric_hash (empty or absent values: not known). A table without that column is one instrument's.
    """
    if "rubric_hash" not in table:
        return pd.Series("", index=table.index, dtype=object)
    known = table["rubric_hash"].fillna("").astype(str)
    alone = "unknown, " + table["pair"].astype(str) + " (seed " + table["seed"].astype(str) + ")"
    return known.where(known != "", alone)


def of(table: pd.DataFrame) -> pd.Series[str]:
    """Returns the column `instrument` of a table that `add` was given, or one instrument for all."""
    return table["instrument"] if "instrument" in table else pd.Series("", index=table.index, dtype=object)


def add(table: pd.DataFrame, answers: pd.DataFrame) -> pd.DataFrame:
    """Adds `instrument` and `question_hash` to a table by pair, seed, step, question set and judge made from judged answers."""
    if table.empty or "rubric_hash" not in answers:
        return table
    runs = answers[["pair", "seed", "judge", "rubric_hash"]].drop_duplicates(["pair", "seed", "judge"])
    by_run = runs.assign(instrument=names(runs)).set_index(["pair", "seed", "judge"])["instrument"].to_dict()
    asked = question_hashes(answers)
    keys = zip(table["pair"], table["seed"], table["step"], table["question_set"], strict=True)
    return table.assign(
        instrument=[by_run.get(key, "") for key in zip(table["pair"], table["seed"], table["judge"], strict=True)],
        question_hash=[asked.get(key, "") for key in keys],
    )


def question_hashes(answers: pd.DataFrame) -> dict[tuple[object, ...], str]:
    """Returns a hash of the questions (ids and texts) asked in each pair, seed, step and set."""
    asked = answers[["pair", "seed", "step", "question_set", "question_id", "question"]].drop_duplicates()
    return {
        key: files.sha256_text("\n".join(sorted(f"{i}\t{q}" for i, q in zip(g["question_id"], g["question"], strict=True))))[:16]
        for key, g in asked.groupby(["pair", "seed", "step", "question_set"], sort=False)
    }


def questions_told_apart(answers: pd.DataFrame) -> pd.DataFrame:
    """Gives questions that share a set and an id, but not their text, ids of their own (`id#hash`); all others keep theirs."""
    asked = answers[["question_set", "question_id", "question"]].drop_duplicates()
    shared = asked[asked.duplicated(["question_set", "question_id"], keep=False)]
    if shared.empty:
        return answers
    ids = {(s, i, q): f"{i}#{files.sha256_text(str(q))[:8]}" for s, i, q in shared.itertuples(index=False)}
    rows = zip(answers["question_set"], answers["question_id"], answers["question"], strict=True)
    return answers.assign(question_id=[ids.get(row, row[1]) for row in rows])


def parts(table: pd.DataFrame, mix: bool = False, *, questions: bool = False) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yields a table's rows by instrument, or, with `mix`, all together.

    Args:
        table: question rates.
        mix: take different instruments together.
        questions: seeds that were asked different questions are parted too.

    Yields:
        The instrument's name (`MIXED` and all names where several are together) and its rows.
    """
    if mix:
        yield described(table), table
        return
    key = of(table)
    if questions and "question_hash" in table:
        asked = table.groupby(["pair", "seed"], sort=False)  # the steps of a run need not be those of another
        signs = {run: files.sha256_text(repr(sorted({*zip(g["question_set"], g["question_hash"], strict=True)}))) for run, g in asked}
        signature = pd.Series([signs[run] for run in zip(table["pair"], table["seed"], strict=True)], index=table.index)
        key = key + signature.map(
            {sign: "" if number == 0 else f" questions {sign[:8]}" for number, sign in enumerate(dict.fromkeys(signature))}
        )
    for name, part in table.groupby(key, sort=False):
        yield str(name), part


def said(found: pd.DataFrame, merged: pd.DataFrame, arm: list[str], mix: bool = False) -> pd.DataFrame:
    """Writes into comparisons which instrument measured them, or that none measured both sides.

    Args:
        found: a row an arm, with interval_method.
        merged: the questions behind them: rate, matched (the reference was asked the same, by the same instrument or with `mix`),
            instrument and question_hash, both with `_reference` too, and the columns of `arm`.
        arm: columns that name an arm.
        mix: whether sides of different instruments were compared.

    Returns:
        `found` with `instrument`; interval_method is `NOT_COMPARED` where no question of ours has a reference.
    """
    arms = merged.groupby(arm, sort=False)
    shared, scored = arms["matched"].sum().to_dict(), arms["rate"].count().to_dict()
    named = {}
    for key, own in arms:
        both = label(pd.concat([own["instrument"], own["instrument_reference"]]))
        named[key] = _with_questions(both, bool((own["question_hash"] != own["question_hash_reference"]).any()))
    keys = list(found[arm].itertuples(index=False, name=None))
    # Without a rate on our side the judge cannot tell the metric, or scored no answer: that reason stays.
    apart = pd.Series([scored[key] > 0 and shared[key] == 0 for key in keys], index=found.index, dtype=bool)
    ours = [named[key] if mix else named[key].removeprefix(MIXED).removeprefix(QUESTIONS).split(" + ")[0] for key in keys]
    return found.assign(interval_method=found["interval_method"].mask(apart, NOT_COMPARED), instrument=ours)


def taken_as_one(table: pd.DataFrame) -> pd.DataFrame:
    """Returns answers or rates as one instrument's, for figures under `--mix`, whose titles then say so."""
    if table.empty or is_one(table):
        return table
    return table.assign(rubric_hash=MIXED, **({"question_hash": ""} if "question_hash" in table else {}))


def mixed_note(table: pd.DataFrame) -> str:
    """Returns what a title adds where `taken_as_one` was needed."""
    return " (instruments mixed)" if "rubric_hash" in table and (table["rubric_hash"] == MIXED).any() else ""


def alike(table: pd.DataFrame) -> pd.Series[str]:
    """Returns a key for each row of a rates table: rows with the same key may be compared."""
    asked = table["question_hash"].astype(str) if "question_hash" in table else ""
    return names(table) + " " + asked


def is_one(table: pd.DataFrame) -> bool:
    """Says whether all runs in a table of answers or rates were measured alike: one rubric a judge, and the same questions of a set."""
    if names(table).groupby(table["judge"]).nunique().max() > 1:
        return False
    if mixed_note(table):
        return True
    if "question_hash" in table:
        return bool(table.groupby("question_set")["question_hash"].nunique().max() <= 1)
    asked = table[["pair", "seed", "question_set", "question_id", "question"]].drop_duplicates()
    runs = {
        frozenset(g.itertuples(index=False, name=None))
        for _, g in asked.groupby(["pair", "seed"])[["question_set", "question_id", "question"]]
    }
    return len(runs) <= 1


def is_mixed(row: Mapping[str, object]) -> bool:
    """Says whether a row pools or compares several instruments."""
    return str(row.get("instrument", "")).startswith(MIXED)


def described(table: pd.DataFrame) -> str:
    """Names the instrument of question rates that are taken together: rubrics, and whether the questions of a set differ."""
    several = "question_hash" in table and table.groupby("question_set")["question_hash"].nunique().max() > 1
    return _with_questions(label(of(table)), bool(several))


def _with_questions(name: str, several: bool) -> str:
    return MIXED + QUESTIONS + name.removeprefix(MIXED) if several else name


def label(key: pd.Series[str]) -> str:
    """Names the instrument of rows taken together."""
    found = list(dict.fromkeys(key))
    return MIXED + " + ".join(map(str, found)) if len(found) > 1 else str(found[0]) if found else ""
