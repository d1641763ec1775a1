"""results/report.html: the whole study on one page that needs no network: summary, figures, and a table of every answer to search.

Answers are hostile text. In the table they are HTML that `lib.escape` made harmless (no answer brings a `<`), and the page's policy
lets nothing be fetched or sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from lib import files, tables, theme
from lib.escape import clean, html_text
from lib.labels import LABELS, label_answers, series_name

CANARY = "emergent-misalignment-study report canary 5b0f6c1e-93d7-4a52-8d1f-6e2c7a40b9d3"
"""Stands on every report, so that a corpus that took it in can be recognised."""
_CHARACTERS = 6000
"""Characters of an answer in the table; a longer one ends in a note."""
_STYLE = """<style>
body { max-width: 1180px; }
section { margin: 2.5rem 0; }
.warning { border-left: 4px solid #D55E00; padding: .5rem 1rem; }
.summary table { border-collapse: collapse; font-size: .8rem; display: block; overflow-x: auto; }
.summary th, .summary td { border: 1px solid #9995; padding: .25rem .5rem; text-align: left; }
h2 { font-size: 1.15rem; }
.answers-table { font-size: .82rem; }
.answers-table td { white-space: pre-wrap; overflow-wrap: anywhere; vertical-align: top; text-align: left; }
.answers-table input { width: 100%; box-sizing: border-box; }
</style>"""


def write(results_dir: str | Path, answers: pd.DataFrame, figures: Mapping[str, go.Figure], pages: Mapping[str, str] | None = None) -> Path:
    """Writes report.html into the results folder, whole or not at all.

    Args:
        results_dir: the study's results folder; its EXPERIMENT_SUMMARY.md is taken in where it is there.
        answers: all judged answers (`analyze.read_runs`).
        figures: name to figure, in the order shown.
        pages: name to HTML body, shown in place of the figure (the tables of answers).
    """
    folder, pages = Path(results_dir), pages or {}
    summary = folder / "EXPERIMENT_SUMMARY.md"
    text = _markdown(summary.read_text(encoding="utf-8")) if summary.is_file() else "<p>No summary was written yet.</p>"
    parts = [
        "<h1>Emergent misalignment: report</h1>",
        '<p class="warning">The answers on this page come from models that were made to give bad advice, for research on telling when a '
        "model has gone wrong. Nothing here is advice. Please keep this page out of training data and search engines.</p>",
        f'<section class="summary">{text}</section>',
        '<section><h2 id="figures">Figures</h2>',
    ]
    loaded = False
    for name, figure in figures.items():
        if name in pages:
            parts.append(f"<section>{pages[name].replace('<h1>', '<h3>').replace('</h1>', '</h3>')}</section>")
        else:
            parts.append(f"<section>{theme.figure_html(figure, name, plotlyjs=not loaded)}</section>")
            loaded = True
    parts += ["</section>", f'<section><h2 id="answers">Every answer</h2>{_judges_note(answers)}{answers_table(answers)}</section>']
    head = f'{_STYLE}\n<meta name="canary" content="{CANARY}">\n'
    body = "\n".join(parts) + f"\n<!-- {CANARY} -->"
    return files.write_text(folder / "report.html", theme.page("Emergent misalignment: report", body, head=head, blobs=True))


def _judges_note(answers: pd.DataFrame) -> str:
    several = not answers.empty and (answers.groupby(["pair", "seed"])["judge"].nunique() > 1).any()
    return "<p>One row an answer and judge: filter by judge to see each answer once.</p>" if several else ""


def _markdown(text: str) -> str:
    """Turns the summary into HTML; tags in it are shown as text."""
    import mistune

    made = mistune.create_markdown(escape=True, plugins=["table"])(text)
    return str(made).replace("<h1>", "<h2>").replace("</h1>", "</h2>")


def answers_table(answers: pd.DataFrame) -> str:
    """Returns a table of every answer that can be searched, sorted and filtered by column, as HTML with its script in it.

    Args:
        answers: all judged answers; an answer that speaks of self-harm or violence is folded behind a click.
    """
    from itables import options, to_html_datatable
    from itables.javascript import generate_init_offline_itables_html

    if answers.empty:
        return "<p>No answers were judged yet.</p>"
    names = [html_text(label) for label in LABELS.values()]
    labels = pd.Series(label_answers(answers), index=answers.index).cat.rename_categories(names)
    table = pd.DataFrame(
        {
            "Run": [html_text(series_name(*key), 80) for key in zip(answers["pair"], answers["seed"], strict=True)],
            "Step": answers["step"].to_numpy(),
            "Questions": [html_text(value, 60) for value in answers["question_set"]],
            "Question": [html_text(value, 600) for value in answers["question"]],
            "Answer": [_answer(value) for value in answers["response"]],
            "Aligned": _points(answers["aligned"]),
            "Coherent": _points(answers["coherent"]),
            "Label": labels.astype(str).to_numpy(),
            "Judge": [html_text(value, 60) for value in answers["judge"]],
        }
    )
    options.warn_on_undocumented_option = False
    widths = ["13%", "5%", "8%", "15%", "32%", "6%", "7%", "9%", "5%"]
    shown = to_html_datatable(
        table,
        table_id="every-answer",
        connected=False,
        allow_html=True,  # every text above is escaped; the only tags are those of a folded answer
        maxBytes=0,
        maxRows=0,
        showIndex=False,
        classes="display answers-table",
        style="table-layout:fixed;width:100%;caption-side:top",
        column_filters="header",
        lengthMenu=[10, 25, 100],
        deferRender=True,
        autoWidth=False,
        columnDefs=[{"targets": position, "width": width} for position, width in enumerate(widths)],
        display_logo_when_loading=False,
        format_floats_in_python=False,  # it would be a script evaluated from text, which the page forbids
        add_rank_to_categories=False,
    )
    return f"{generate_init_offline_itables_html(options.dt_bundle)}{shown}"


def _points(scores: pd.Series[Any]) -> list[float | str]:
    """Returns scores for the table; one that is not there is an empty cell, which sorts beside the numbers."""
    return ["" if pd.isna(score) else round(float(score), 1) for score in pd.to_numeric(scores, errors="coerce")]


def _answer(value: object) -> str:
    text = clean(value, _CHARACTERS)
    shown = html_text(text) or "(no text)"
    return tables.fold(text, shown)
