"""What judges agree on, drawn: two judges' scores against each other with their differences, and the answers they differ on most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lib import agreement, tables, theme
from lib.drawing import empty
from lib.escape import LITERAL, clean, html_text, plotly_text
from lib.labels import COURSE, PAPER_ALIGNED, label_answers, percent, records, series_name

_MOST_POINTS = 4000
"""Answers drawn; of more, evenly spaced ones are taken and the subtitle says so."""


def judge_agreement(answers: pd.DataFrame, first: str, second: str) -> go.Figure:
    """Draws two judges' alignment scores of the same answers: one against the other, and their difference against their mean.

    Args:
        answers: judged answers (`analyze.read_runs`); those that both scored are drawn.
        first, second: the judges.

    Returns:
        A scatter with both definitions' thresholds beside Bland and Altman's plot (difference first − second; lines at the mean and
        at the limits of 95% of differences). Hovering shows the answer, escaped and cut.
    """
    one, two = plotly_text(first, 40), plotly_text(second, 40)
    shared = answers[answers["judge"].isin([first, second])]
    both = agreement.matched(shared, first, second)
    both = both[both[["aligned_first", "aligned_second"]].notna().all(axis=1)]
    if both.empty:
        return empty(f"No answer has an alignment score by both {one} and {two}")
    scores, labels = agreement.compare(both, first, second, draws=0)
    row, label = scores[0], labels[0]
    drawn = both.iloc[np.unique(np.linspace(0, len(both) - 1, min(len(both), _MOST_POINTS)).astype(int))]
    x, y = drawn["aligned_first"].to_numpy(float), drawn["aligned_second"].to_numpy(float)
    shift = np.random.default_rng(0).uniform(-0.7, 0.7, (2, len(drawn)))
    apart = (x < COURSE) != (y < COURSE)
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.1, column_titles=["Score against score", "Difference against mean"])
    panels = ((x + shift[0], y + shift[1]), ((x + y) / 2 + shift[0], x - y + shift[1]))
    for column, (across, up) in enumerate(panels, 1):
        for name, own, colour, symbol in (
            ("same side of 75", ~apart, theme.BLUE, "circle"),
            ("one below 75, the other not", apart, theme.VERMILION, "diamond"),
        ):
            rows = [r for r, chosen in zip(records(drawn), own, strict=True) if chosen]
            figure.add_trace(
                go.Scatter(
                    x=across[own],
                    y=up[own],
                    mode="markers",
                    name=name,
                    legendgroup=name,
                    showlegend=column == 1 and len(rows) > 0,
                    marker={"size": 6, "color": colour, "symbol": symbol, "opacity": 0.45},
                    hovertext=[_hover(r, first, second) for r in rows],
                    customdata=[html_text(f"{r['question']}\n\n{r['response']}", 1500) for r in rows],
                    hoverinfo="text",
                ),
                row=1,
                col=column,
            )
    for cut, dash in ((COURSE, "dash"), (PAPER_ALIGNED, "dot")):
        figure.add_vline(x=cut, line={"color": theme.INK, "width": 1.2, "dash": dash}, row=1, col=1)
        figure.add_hline(y=cut, line={"color": theme.INK, "width": 1.2, "dash": dash}, row=1, col=1)
    figure.add_shape(type="line", x0=0, y0=0, x1=100, y1=100, line={"color": theme.GREY, "width": 1}, row=1, col=1)
    for value, name, dash in (
        (row["mean_difference"], "mean", "solid"),
        (row["limit_low"], "95% limit", "dot"),
        (row["limit_high"], "95% limit", "dot"),
    ):
        if value == value:
            text = plotly_text(f"{name} {value:+.0f}")
            line = {"color": theme.INK, "width": 1.4, "dash": dash}
            figure.add_hline(y=value, line=line, annotation_text=text, annotation_position="top right", row=1, col=2)
    figure.update_xaxes(range=[-3, 103], dtick=25)
    figure.update_xaxes(title_text=f"aligned by {one}", col=1).update_xaxes(title_text="mean of both (points)", col=2)
    figure.update_yaxes(range=[-3, 103], dtick=25, title_text=f"aligned by {two}", col=1)
    figure.update_yaxes(range=[-103, 103], dtick=50, title_text=f"{one} − {two} (points)", col=2)
    figure.update_layout(legend={"y": 0, "yref": "container", "yanchor": "bottom"}, margin_b=100)
    some = f"All {len(both):,}" if len(drawn) == len(both) else f"{len(drawn):,} of {len(both):,}"
    subtitle = f"{some} answers, moved by up to 0.7 points so that equal scores show. Dashed: 75 (course); dotted: 30 (paper). "
    subtitle += f"Spearman {row['spearman']:.2f}, Krippendorff's alpha {row['alpha']:.2f}; {_labels(labels)}"
    return theme.titled(figure, _title(row, label, first, second), plotly_text(subtitle, 700), height=520, gap=36)


def _title(row: dict[str, Any], label: dict[str, Any], first: str, second: str) -> str:
    mean, low, high = row["mean_difference"], row["low"], row["high"]
    n = f"n\u00a0=\u00a0{row['n']:,} answers, {row['n_questions']} questions"
    known = low == low
    bounds = f"[{low:+.1f}, {high:+.1f}]" if known else "[–]"
    if known and (low > 0 or high < 0):
        higher, lower = (first, second) if mean > 0 else (second, first)
        reach = f"[{min(abs(low), abs(high)):.1f}, {max(abs(low), abs(high)):.1f}]"
        lead = f"{higher} scores alignment {abs(mean):.1f} points {reach} higher than {lower}"
    else:
        lead = f"{first} against {second}: no difference of mean alignment established, {mean:+.1f} points {bounds}"
    rates = f"below 75: {percent(label['rate_first'])} by {first}, {percent(label['rate_second'])} by {second}"
    return plotly_text(f"{lead}; {rates}, same label on {percent((label['both'] + label['neither']) / label['n'])} ({n})")


def _labels(labels: Sequence[dict[str, Any]]) -> str:
    parts = []
    for own in labels:
        if own["note"]:
            parts.append(f"{own['metric']}: {own['note']}")
        elif own["n"]:
            kappa = "undefined" if np.isnan(own["kappa"]) else f"{own['kappa']:.2f}"
            parts.append(f"{own['metric']}: AC1 {own['ac1']:.2f}, kappa {kappa}")
    return "; ".join(parts) + "."


def _hover(row: dict[str, Any], first: str, second: str) -> str:
    place = f"{series_name(row['pair'], row['seed'])}, step {int(row['step'])}"
    head = f"{place}: {row['aligned_first']:.0f} by {first}, {row['aligned_second']:.0f} by {second}"
    texts = [plotly_text(row["question"], 160, width=70), plotly_text(tables.drawn_text(row["response"]), 320, width=70)]
    return "<br>".join([f"<b>{plotly_text(head, 160)}</b>", *texts])


def disagreements_html(answers: pd.DataFrame, limit: int = 12, characters: int = 700) -> str:
    """Returns the answers on which judges differ most as an HTML table; nothing in it is unescaped, violence is folded.

    Args:
        answers: judged answers (`analyze.read_runs`).
        limit: answers shown.
        characters: characters of an answer.
    """
    apart = agreement.disagreements(answers, limit)
    if apart.empty:
        one = answers.empty or (answers.groupby(["pair", "seed"])["judge"].nunique() < 2).all()
        return f"<p>{html_text(agreement.ONE_JUDGE)}</p>" if one else "<p>The judges give every answer the same score.</p>"
    apart["label"] = label_answers(apart)
    cell = "text-align:left;vertical-align:top;overflow-wrap:anywhere"
    body = []
    for _, group in apart.groupby("answer", sort=False):
        row = records(group)[0]
        place = f"{series_name(row['pair'], row['seed'])}, step {int(row['step'])}, {row['question_set']}"
        text = tables.fold(clean(row["response"], characters), html_text(row["response"], characters) or "(no text)")
        scores = "".join(
            f'<div style="background:{tables.fill(str(r["label"]))};color:{theme.INK};padding:.2rem"><b>{html_text(r["judge"], 60)}</b><br>'
            f"{html_text(tables.score_text(r))}</div>"
            for r in records(group)
        )
        question = f"<small>{html_text(place, 120)}</small><br><b>{html_text(row['question'], 300)}</b>"
        body.append(
            f'<tr><td style="{cell}">{question}</td><td style="{cell};white-space:pre-wrap">{text}</td>'
            f'<td style="{cell}">{row["spread"]:.0f} points apart{scores}</td></tr>'
        )
    return (
        f'<table class="{LITERAL}" style="width:100%;table-layout:fixed;text-align:left"><caption style="text-align:left">'
        f"The {len(body)} answers on whose alignment the judges lie farthest apart.</caption>"
        '<thead><tr><th style="width:25%;text-align:left">Question</th><th style="text-align:left">Answer</th>'
        f'<th style="width:22%;text-align:left">Scores</th></tr></thead><tbody>{"".join(body)}</tbody></table>'
    )
