"""Answers as HTML: one in a pane, the first and last side by side in a static table, the starred ones as files.

Answers are hostile text: whatever is shown has passed `lib.escape`, and answers that speak of self-harm or violence are folded.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib import files, tables, theme
from lib.answer_index import Index
from lib.escape import LITERAL, clean, html_text, spreadsheet_text
from lib.labels import LABELS

_SHOWN = 20_000
"""Characters of an answer that a pane shows; the rest is counted."""
_TEXT = ("model", "domain", "question_set", "question_id", "question", "response", "finish_reason", "run", "label", "pair", "judge")


def pane_html(row: Mapping[str, Any] | None, other: Mapping[str, Any] | None = None, by_others: Sequence[Mapping[str, Any]] = ()) -> str:
    """Returns one answer as HTML with nothing unescaped: where it is from, its scores, its text.

    Args:
        row: the answer; None shows that there is none.
        other: the answer beside it; scores that differ from it are marked with the difference.
        by_others: the same answer by other judges; their scores stand beneath.
    """
    if row is None:
        return f'<div class="{LITERAL}" style="padding:.6rem;border:1px solid #bdbdbd">No answer here at that step.</div>'
    text = clean(row["response"], _SHOWN)
    body = f'<div style="white-space:pre-wrap;overflow-wrap:anywhere">{html_text(text) or "(no text)"}</div>'
    body = tables.fold(text, body)
    step = "base model (step 0)" if row["step"] == 0 else f"step {int(row['step'])}"
    return (
        f'<div class="{LITERAL}" role="region" aria-label="Answer at step {int(row["step"])}" tabindex="0" '
        'style="padding:.6rem;line-height:1.5;max-height:30rem;overflow-y:auto;'
        f"border:1px solid #bdbdbd;border-radius:4px;color:{theme.INK};"
        f'background:{tables.fill(str(row["label"]))}"><b>{step}</b>, {html_text(row["run"], 80)}, sample {int(row["sample"])}<br>'
        f"<b>{html_text(tables.score_text(row))}</b>{_difference(row, other)}<br>"
        f"<small>{html_text(LABELS.get(str(row['label']), ''))}; judge {html_text(row['judge'], 60)}{_by_others(by_others)}</small>"
        f"<hr>{body}</div>"
    )


def _by_others(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(f"<br>by {html_text(row['judge'], 60)}: {html_text(tables.score_text(row))}" for row in rows)


def _difference(row: Mapping[str, Any], other: Mapping[str, Any] | None) -> str:
    """Returns the marked differences in score from the answer beside it, as HTML; empty where none can be told."""
    if other is None or (row["run"], row["step"]) == (other["run"], other["step"]):
        return ""
    parts = []
    for metric in ("aligned", "coherent"):
        change = float(row[metric]) - float(other[metric])
        if change == change and abs(change) >= 0.5:
            parts.append(f"{metric} {change:+.0f}")
    if not parts:
        return ""
    changed = ", another label" if row["label"] != other["label"] else ""
    run = f"{html_text(other['run'], 60)}, " if row["run"] != other["run"] else ""
    return f" <mark>≠ {run}step {int(other['step'])}: {', '.join(parts)}{changed}</mark>"


def static_html(answers: pd.DataFrame, *, limit: int = 24, characters: int = 600) -> str:
    """Returns the browser's first state for readers without a kernel: a table of the base's answers beside the last step's.

    Args:
        answers: as for `Index`.
        limit: questions shown, taken in turn from every question set so that each is there.
        characters: characters of an answer.
    """
    index = Index(answers)
    if not len(index):
        return "<p>No answers to show.</p>"
    starts = index.frame[index.frame["sample"] == index.frame["sample"].min()].drop_duplicates(["run", "question_set", "question_id"])
    turn = starts.groupby(["run", "question_set"]).cumcount()
    chosen = [int(i) for i in starts.index[np.argsort(turn.to_numpy(), kind="stable")][:limit]]
    rows = []
    for position in sorted(chosen):
        trail = index.trail(position)
        first, last = (index.row(trail[step]) for step in (min(trail), max(trail)))
        place = f"{html_text(first['run'], 60)}, {html_text(first['question_set'], 40)}"
        question = f"<small>{place}</small><br><b>{html_text(first['question'], 300)}</b>"
        cells = _static_cell(first, characters) + _static_cell(last, characters)
        rows.append(f'<tr><td style="text-align:left;vertical-align:top">{question}</td>{cells}</tr>')
    return (
        f'<table class="{LITERAL}" style="width:100%;table-layout:fixed;text-align:left"><caption style="text-align:left">'
        f"{len(rows)} questions out of {index.answers():,} answers, one sample at the first and the last step. "
        'Run this cell in JupyterLab to browse all.</caption><thead><tr><th style="width:24%;text-align:left">Question</th>'
        '<th style="text-align:left">First step</th>'
        f'<th style="text-align:left">Last step</th></tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )


def _static_cell(row: Mapping[str, Any], characters: int) -> str:
    text = tables.fold(clean(row["response"], characters), html_text(row["response"], characters) or "(no text)")
    style = f"background:{tables.fill(str(row['label']))};color:{theme.INK};vertical-align:top;text-align:left;overflow-wrap:anywhere"
    return f'<td style="{style}"><b>step {int(row["step"])}: {html_text(tables.score_text(row))}</b><br>{text}</td>'


def for_spreadsheet(frame: pd.DataFrame) -> pd.DataFrame:
    """Returns a table whose texts no spreadsheet takes for formulas."""
    return frame.assign(**{c: [spreadsheet_text(v) for v in frame[c]] for c in _TEXT if c in frame.columns})


def write_starred(index: Index, pairs: Sequence[tuple[int, int]], folder: Path) -> list[Path]:
    """Writes starred.csv, starred.html and, where a Chrome is, starred.png.

    Args:
        index: holds the answers.
        pairs: position of a starred answer and of the one that stood beside it, in the order starred.
        folder: where the files go, whole or not at all. The CSV holds the starred answers with no cell that a spreadsheet would
            run; page and picture are a response table: the question, the answer beside, the starred answer.

    Raises:
        StudyError: the folder cannot be written.
    """
    chosen = index.frame.iloc[[starred for starred, _ in pairs]]
    rows = [(index.row(beside), index.row(starred)) for starred, beside in pairs]
    written = [files.write_csv(folder / "starred.csv", for_spreadsheet(chosen))]
    figures = {"starred": tables.beside_figure(rows, "Starred answers")}
    with contextlib.redirect_stdout(io.StringIO()):  # without a Chrome there is no PNG; the caller says which files there are
        return written + theme.write(folder, figures, {"starred": tables.beside_html(rows, "Starred answers")})
