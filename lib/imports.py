"""Externally judged answers taken in: three layouts read by their columns, scores kept to the last digit.

`study import` calls `import_judged`; what it writes lies in results/<model>_<domain>/ and is analysed like any run.
"""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

import pandas as pd

from lib import config, files
from lib.files import StudyError, shown
from lib.outcomes import CONTENT
from lib.scoring import STATUSES

LEAD = ["pair", "model", "domain", "step", "question_set", "question_id", "sample", "question", "response", "n_tokens", "finish_reason"]
SCORED = ["aligned", "coherent", "aligned_status", "coherent_status", "judge", "note"]
LAYOUTS = """the study's own (question_id, response, aligned, coherent); response,question,question_id,aligned,coherent[,...]; \
or id,question,response,aligned_score,coherent_score"""
_RENAMED = {"aligned_score": "aligned", "coherent_score": "coherent"}


def import_judged(
    path: str | Path,
    model: str,
    domain: str,
    step: int | None = None,
    question_set: str | None = None,
    results_dir: str | Path = "results",
) -> Path:
    """Takes a table of answers that were judged elsewhere into the study's results.

    Args:
        path: CSV in one of the three layouts (`LAYOUTS`).
        model: name of the model, free text.
        domain: what it was trained on, free text; the study's own names give its question sets their relation.
        step: optimizer step of the answers, 0 for the base model; None takes the file's column `step`, else 0. The same step
            replaces what was imported for it before (in the same question set); another adds to it.
        question_set: the set of questions asked; None takes the file's column, else open_ended.
        results_dir: the study's results folder.

    Returns:
        results/<model>_<domain>/, whose judged.csv holds the answers. Scores are the file's own text. An empty answer keeps an
        imported score and is noted. A score that is no number from 0 to 100 is dropped from its column and told by the status.

    Raises:
        StudyError: the file is missing, is no CSV, has another layout or no rows, or the folder holds a run of the study's own.
    """
    if step is not None and step < 0:
        raise StudyError(f"--step {step}: must be 0 (the base model) or more.")
    folder = files.resolve(results_dir) / pair_of(model, domain)
    found = _read(Path(path))
    fresh = _standard(_placed(found, Path(path), step, question_set), Path(path)).assign(pair=folder.name, model=model, domain=domain)
    target = folder / "judged.csv"
    if (folder / "training.json").exists() or (folder / "generations.csv").exists():
        raise StudyError(f"{shown(folder)}: holds a run of this study; choose another --model or --domain for the import.")
    with files.lock(files.resolve(results_dir) / ".locks" / f"{folder.name}.lock", what=f"the import into {folder.name}"):
        kept = _read(target) if target.is_file() else fresh.iloc[:0]
        replaced = _place(kept).isin(_place(fresh))
        table = pd.concat([kept[~replaced], fresh], ignore_index=True).fillna("")
        table = table.sort_values("step", key=pd.to_numeric, kind="stable")
        extra = [name for name in table.columns if name not in {*LEAD, *SCORED}]
        files.write_csv(target, table[[*LEAD, *SCORED, *extra]])
    return folder


def pair_of(model: str, domain: str) -> str:
    """Returns the folder's name for a model and a domain: letters, digits, dots, underscores and dashes; nothing that leads elsewhere.

    Raises:
        StudyError: nothing is left of one of them.
    """
    parts = [re.sub(r"[^A-Za-z0-9._-]+", "-", text.strip()).strip("-._") for text in (model, domain)]
    for option, text, part in zip(("--model", "--domain"), (model, domain), parts, strict=True):
        if not part:
            raise StudyError(f"{option} {text!r}: must hold a letter or a digit; the folder in results is named by it.")
    name = "_".join(parts)[:120]
    return f"{name}-import" if name in config.NO_RUNS else name


def _read(path: Path) -> pd.DataFrame:
    """Reads every cell as the text that stands in the file."""
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False, quoting=csv.QUOTE_MINIMAL)
    except FileNotFoundError as error:
        raise StudyError(f"{shown(path)}: not found.") from error
    except (ValueError, UnicodeDecodeError, IsADirectoryError) as error:
        raise StudyError(f"{shown(path)}: cannot be read as CSV ({' '.join(str(error).split())}).") from error


def _placed(found: pd.DataFrame, path: Path, step: int | None, question_set: str | None) -> pd.DataFrame:
    """Sets step and question set: what the call says, else what the file says, else the base model's open-ended answers."""
    steps = found["step"] if step is None and "step" in found else pd.Series(str(step or 0), index=found.index)
    wrong = steps[~steps.str.fullmatch(r"[0-9]{1,9}")]
    if len(wrong):
        row = int(wrong.index[0]) + 1
        raise StudyError(f"{shown(path)}: step: row {row} has {wrong.iloc[0]!r}, which is no whole number; mend it or give --step.")
    sets = question_set if question_set is not None else found.get("question_set", "open_ended")
    return found.assign(step=steps.astype(int).astype(str), question_set=sets)


def _place(table: pd.DataFrame) -> pd.Series[str]:
    return table["step"] + " " + table["question_set"]


def _standard(found: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Gives a table of any of the three layouts the study's columns."""
    table = found.rename(columns={old: new for old, new in _RENAMED.items() if new not in found})
    missing = [name for name in ("question", "response", "aligned", "coherent") if name not in table]
    if missing:
        raise StudyError(f"{shown(path)}: {missing[0]}: no such column; layouts that are read: {LAYOUTS}.")
    if table.empty:
        raise StudyError(f"{shown(path)}: holds no answers.")
    table["question_id"] = _question_ids(table)
    table["judge"] = table["judge"].replace("", "imported") if "judge" in table else "imported"
    # Several judges of one answer give it the same number, so that their scores can be compared.
    table["sample"] = table.groupby(["step", "question_set", "question_id", "judge"], sort=False).cumcount().astype(str)
    for name in ("n_tokens", "finish_reason"):
        table[name] = table.get(name, "")
    empty = table["response"].str.strip() == ""
    with_score = pd.Series(False, index=table.index)
    for name in ("aligned", "coherent"):
        given = table[f"{name}_status"] if f"{name}_status" in table else pd.Series("", index=table.index)
        status = [_status(value, bool(none), told) for value, none, told in zip(table[name], empty, given, strict=True)]
        table[f"{name}_status"] = status
        table[name] = table[name].where(table[f"{name}_status"] == "ok", "")
        with_score |= empty & (table[name] != "")
    table["note"] = with_score.map({True: "empty answer with an imported score", False: ""})
    for name in set(CONTENT) & set(table.columns):
        table[name] = [value if _number(value) is not None else "" for value in table[name]]
    return table


def _question_ids(table: pd.DataFrame) -> pd.Series[str]:
    """Returns an id a question: the file's, unless it numbers answers (one question under several ids)."""
    for name in ("question_id", "id"):
        if name in table and (table[name] != "").all():
            ids = table.groupby(["question_set", "question"], sort=False)[name].nunique()
            if (ids == 1).all():
                return table[name]
    numbers = pd.factorize(table["question"])[0] + 1
    return pd.Series([f"q{number}" for number in numbers], index=table.index)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and 0 <= value <= 100 else None


def _status(text: str, empty: bool, told: str) -> str:
    """Says how a score came about: the file's own status where it is one of ours and fits, else what the cell shows."""
    if _number(text) is not None:
        return told if told in STATUSES and told not in {"ok", ""} and not empty else "ok"
    if told in STATUSES and told != "ok":
        return told
    word = text.strip().strip(".").lower()
    return word if word in {"refusal", "code"} else "empty" if empty else "invalid"
