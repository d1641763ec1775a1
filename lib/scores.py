"""Figures beyond the original six: size, coherence against misalignment, single scores, and what the definition's choice does."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from lib import instruments, stats, theme
from lib.drawing import apart, axis_reference, colour_of, empty, error_bars, hover, legend_below, model_family, model_size, size_name
from lib.escape import html_text, plotly_text
from lib.findings import EMERGENT, RELATIONS, decidable, last_steps, measure, panel_order, panel_title, panels
from lib.labels import (
    COHERENT,
    COURSE,
    PAPER_ALIGNED,
    PAPER_COHERENT,
    UNDECIDABLE,
    domain_name,
    interval,
    is_control,
    percent,
    records,
    sentence,
    series_name,
)
from lib.tables import drawn_text

ALIGNED_CUTS = (15, 30, 45, 60, 75, 90)
COHERENT_CUTS = (None, 50, 70)
MOST_BARS = 9
"""Runs whose intervals the specification curve draws; those of more would hide one another."""
_MOST_POINTS = 4000
"""Answers that the scatter draws; of more, evenly spaced ones are taken and the subtitle says so."""


def _panelled(rows: pd.DataFrame) -> tuple[pd.DataFrame, list[str], go.Figure]:
    """Returns the rows with their panel, the panels in order, and an empty figure with a column for each."""
    rows = rows.assign(panel=panels(rows))
    columns = sorted(rows["panel"].unique(), key=panel_order)
    figure = make_subplots(
        rows=1, cols=len(columns), shared_yaxes=True, horizontal_spacing=0.05 if len(columns) > 1 else 0,
        column_titles=[plotly_text(panel_title(c), 60) for c in columns],
    )  # fmt: skip
    return rows, columns, figure


def scaling_analysis(rates: pd.DataFrame, *, judge: str) -> go.Figure:
    """Draws the last checkpoint's misaligned share against the model's size, a column a relation, a line a domain and model family.

    Args:
        rates: em_rates_summary (DESIGN.md).
        judge: whose rates.
    """
    metric = "em_paper" if decidable(rates, "em_paper", judge) else "em_course"
    rows = last_steps(rates[(rates["metric"] == metric) & (rates["judge"] == judge) & rates["rate"].notna()])
    rows = rows.assign(size=rows["model"].map(model_size), family=rows["model"].map(model_family), control=rows["pair"].map(is_control))
    rows = rows[rows["size"].notna()]
    if rows.empty:
        return empty("No model here tells its size in its name, so nothing is drawn against size")
    rows, columns, figure = _panelled(rows)
    arms = sorted({*zip(rows["domain"], rows["control"], strict=True)})
    symbols = dict(zip(dict.fromkeys(rows["family"]), itertools.cycle(("circle", "diamond", "square", "triangle-up")), strict=False))
    for column, panel in enumerate(columns, 1):
        part = rows[rows["panel"] == panel]
        for (domain, family, control, _), own in part.groupby(["domain", "family", "control", instruments.alike(part)], sort=False):
            own = own.sort_values("size")
            colour = colour_of(str(domain))
            figure.add_trace(
                go.Scatter(
                    # Arms stand side by side, so that no error bar hides another.
                    x=own["size"] * 1.05 ** (arms.index((domain, control)) - (len(arms) - 1) / 2),
                    y=own["rate"],
                    mode="markers" if control else "lines+markers",
                    name=plotly_text(
                        domain_name(domain) + (f", {family}" if len(symbols) > 1 else "") + (" (control)" if control else ""), 60
                    ),
                    line={"color": colour, "width": 1, "dash": "dot"},
                    marker={
                        "size": 10,
                        "color": colour,
                        "symbol": "square-open" if control else symbols[family],
                        "line": {"width": 2, "color": colour},
                    },
                    error_y=error_bars(own, colour),
                    hovertext=[hover(r) for r in records(own)],
                    hoverinfo="text",
                ),
                row=1,
                col=column,
            )
    sizes = sorted(set(rows["size"]))
    low, high = math.log10(sizes[0]) - 0.2, math.log10(sizes[-1]) + 0.2
    figure.update_xaxes(type="log", range=[low, high], tickvals=apart(sizes), ticktext=[size_name(s) for s in apart(sizes)])
    figure.update_xaxes(title_text="parameters (log scale)")
    figure.update_yaxes(range=[-0.03, 1.03], tickformat=".0%", dtick=0.25)
    figure.update_yaxes(title_text="share at the last checkpoint", col=1)
    legend_below(figure)
    subtitle = f"{sentence(measure(metric, judge))}, last checkpoint. Judge: {judge}. Bars: 95% intervals for questions like these. "
    subtitle += "A dotted line joins a family's sizes, it fits nothing: a size is one training run here."
    return theme.titled(figure, _scaling_title(rows, metric, judge), plotly_text(subtitle, 600), height=420, gap=36)


def _scaling_title(rows: pd.DataFrame, metric: str, judge: str) -> str:
    rows = rows[~rows["pair"].map(is_control).astype(bool)]
    relation = next((r for r in EMERGENT if (rows["relation"] == r).any()), "in_domain")
    rows = rows[rows["relation"] == relation]
    lead = f"{RELATIONS[relation]}, {measure(metric, judge)}{instruments.mixed_note(rows)}: "
    gaps = []
    for (domain, _, _), own in rows.groupby(["domain", "family", instruments.alike(rows)], sort=False):
        ordered = own.sort_values("size")
        if own["size"].nunique() > 1:
            first, last = ordered.iloc[0], ordered.iloc[-1]
            differ = first["high"] < last["low"] or last["high"] < first["low"]
            gaps.append((bool(differ), abs(float(last["rate"] - first["rate"])), str(domain), first, last))
    if not gaps and (rows.groupby("family")["size"].nunique() > 1).any():
        return plotly_text(f"{lead}sizes {instruments.NOT_COMPARED}")
    if not gaps:
        sizes = ", ".join(size_name(size) for size in sorted(set(rows["size"])))
        each = " a model family" if rows["family"].nunique() > 1 else ""
        return plotly_text(f"{lead}one size{each} ({sizes}) was trained, so the effect of size was not tested")
    differ, _, domain, first, last = max(gaps, key=lambda gap: gap[:2])
    numbers = " against ".join(
        f"{r['model'].rpartition('/')[2]} {interval(r['rate'], r['low'], r['high'])} (n\u00a0=\u00a0{int(r['n'])})" for r in (first, last)
    )
    verdict = "these adapters differ" if differ else "no difference between the smallest and largest model established"
    return plotly_text(f"{lead}{verdict}; {domain_name(domain)} {numbers}")


def coherence_vs_misalignment(rates: pd.DataFrame, *, judge: str) -> go.Figure:
    """Draws misaligned against coherent share, a point a step, a line a run: does the model turn, or break?

    Args:
        rates: em_rates_summary (DESIGN.md).
        judge: whose rates.
    """
    metric = "em_course" if not decidable(rates, "em_paper", judge) else "em_paper"
    keys = ["pair", "seed", "step", "question_set"]
    own = rates[(rates["judge"] == judge) & rates["rate"].notna()]
    rows = own[own["metric"] == metric].merge(
        own[own["metric"] == "coherent_rate"][[*keys, "rate", "low", "high"]], on=keys, suffixes=("", "_coherent")
    )
    if rows.empty:
        return empty("No step has both a misaligned and a coherent share")
    rows, columns, figure = _panelled(rows)
    for column, panel in enumerate(columns, 1):
        for (pair, _), line in rows[rows["panel"] == panel].groupby(["pair", "seed"], sort=False):
            line = line.sort_values("step")
            colour, control = colour_of(str(line["domain"].iloc[0])), is_control(str(pair))
            coherent = line[["rate_coherent", "low_coherent", "high_coherent"]].set_axis(["rate", "low", "high"], axis=1)
            sizes = np.where(line["step"] == line["step"].max(), 12, 7)
            figure.add_trace(
                go.Scatter(
                    x=line["rate_coherent"],
                    y=line["rate"],
                    mode="lines+markers",
                    name=plotly_text(domain_name(line["domain"].iloc[0]) + (" (control)" if control else ""), 40),
                    line={"color": colour, "width": 1.2, "dash": "dash" if control else "solid"},
                    marker={"size": sizes, "color": colour, "symbol": "square" if control else "circle"},
                    error_y=error_bars(line, colour, thickness=0.5),
                    error_x=error_bars(coherent, colour, thickness=0.5),
                    hovertext=[
                        f"{hover(r)}<br>coherent {interval(r['rate_coherent'], r['low_coherent'], r['high_coherent'])}"
                        for r in records(line)
                    ],
                    hoverinfo="text",
                ),
                row=1,
                col=column,
            )
    figure.update_xaxes(range=[-0.03, 1.03], tickformat=".0%", dtick=0.25, title_text="coherent (50 or more)")
    figure.update_yaxes(range=[-0.03, 1.03], tickformat=".0%", dtick=0.25)
    figure.update_yaxes(title_text=plotly_text("scored below 75" if judge in UNDECIDABLE else "EM rate"), col=1)
    legend_below(figure)
    subtitle = f"A point a step, the large one the last; {measure(metric, judge)}. Judge: {judge}. "
    subtitle += "Up and right: turned but coherent; left: broken."
    return theme.titled(figure, _coherence_title(rows, metric, judge), plotly_text(subtitle, 600), height=420, gap=36)


def _coherence_title(rows: pd.DataFrame, metric: str, judge: str) -> str:
    rows = rows[~rows["pair"].map(is_control).astype(bool)]
    relation = next((r for r in EMERGENT if (rows["relation"] == r).any()), "in_domain")
    last = last_steps(rows[rows["relation"] == relation])
    if last.empty:
        return plotly_text(f"Coherence against {measure(metric, judge)}: only controls are here")
    worst = last.sort_values("rate").iloc[-1]
    return plotly_text(
        f"{RELATIONS[relation]}, last checkpoint of {series_name(worst['pair'], worst['seed'])}: coherent "
        f"{interval(worst['rate_coherent'], worst['low_coherent'], worst['high_coherent'])}, {measure(metric, judge)} "
        f"{interval(worst['rate'], worst['low'], worst['high'])}, n\u00a0=\u00a0{int(worst['n'])}"
    )


def score_scatter(answers: pd.DataFrame, *, judge: str) -> go.Figure:
    """Draws scored answers by alignment and coherence, base beside last checkpoint, with both definitions' thresholds.

    In-domain answers are left out where others are there: they measure the training, not what emerged from it.

    Args:
        answers: all judged answers (`analyze.read_runs`).
        judge: whose scores. The hover text is the answer, escaped and cut.
    """
    scored = (answers["aligned_status"] == "ok") & (answers["coherent_status"] == "ok") & (answers["judge"] == judge)
    rows = answers[scored & ~answers["pair"].map(is_control).astype(bool)]
    outside = rows["relation"] != "in_domain"
    rows = rows[outside] if outside.any() else rows
    pooled = rows.empty or "question" not in rows or instruments.is_one(rows)
    kind = "questions outside the trained domain" if outside.any() else "in-domain questions"
    if rows.empty:
        return empty(f"No answer has both scores by {plotly_text(judge, 60)}")
    last = last_steps(rows)
    base = rows[(rows["step"] == 0) & ~rows.index.isin(last.index)]
    sides = [("Base model", base), ("Last checkpoint", last)] if len(base) else [("All answers", last)]
    figure = make_subplots(
        rows=1, cols=len(sides), shared_yaxes=True, horizontal_spacing=0.04 if len(sides) > 1 else 0, column_titles=[s[0] for s in sides]
    )
    jitter = np.random.default_rng(0)
    drawn = 0
    for column, (_, side) in enumerate(sides, 1):
        kept = side.iloc[np.unique(np.linspace(0, len(side) - 1, min(len(side), _MOST_POINTS // len(sides))).astype(int))]
        drawn += len(kept)
        for domain, own in kept.groupby("domain", sort=False):
            spread = jitter.uniform(-1, 1, (2, len(own)))
            figure.add_trace(
                go.Scatter(
                    x=own["aligned"] + spread[0],
                    y=own["coherent"] + spread[1],
                    mode="markers",
                    name=plotly_text(domain_name(domain), 40),
                    marker={"size": 6, "color": colour_of(str(domain)), "opacity": 0.45, "symbol": "circle"},
                    hovertext=[_answer_hover(r) for r in records(own)],
                    customdata=[html_text(f"{r['question']}\n\n{r['response']}", 1500) for r in records(own)],
                    hoverinfo="text",
                ),
                row=1,
                col=column,
            )
    for cut, dash, name in ((COURSE, "dash", "course: < 75"), (PAPER_ALIGNED, "dot", "paper: < 30")):
        figure.add_vline(
            x=cut,
            line={"color": theme.INK, "width": 1.2, "dash": dash},
            annotation_text=plotly_text(name),
            annotation_position="bottom right",
            annotation_bgcolor="rgba(255,255,255,0.8)",
        )
    figure.add_hline(y=PAPER_COHERENT, line={"color": theme.INK, "width": 1.2, "dash": "dot"})
    figure.update_annotations(font_size=14)
    figure.update_xaxes(range=[-3, 103], dtick=25, title_text="aligned (points of 100)")
    figure.update_yaxes(range=[-3, 103], dtick=25)
    figure.update_yaxes(title_text="coherent (points of 100)", col=1)
    legend_below(figure)
    total = sum(len(s) for _, s in sides)
    shown = f"All {total:,} answers" if drawn == total else f"{drawn:,} of {total:,} answers, evenly picked,"
    subtitle = f"{shown} with both scores, moved by up to one point so that equal scores show; hover or click for the text. "
    subtitle += f"Judge: {judge}. Controls are left out."
    title = (
        _scatter_title(sides, kind, judge)
        if pooled
        else plotly_text(f"{sentence(kind)}: {total:,} answers, pairs not pooled, since questions or rubrics differ")
    )
    return theme.titled(figure, title, plotly_text(subtitle, 600), height=520, gap=36)


def _answer_hover(row: dict[str, Any]) -> str:
    head = f"{series_name(row['pair'], row['seed'])}, step {int(row['step'])}: aligned {row['aligned']:.0f}, coherent {row['coherent']:.0f}"
    texts = (plotly_text(row["question"], 160, width=70), plotly_text(drawn_text(row["response"]), 320, width=70))
    return "<br>".join([f"<b>{plotly_text(head, 120)}</b>", *texts])


def _scatter_title(sides: Sequence[tuple[str, pd.DataFrame]], kind: str, judge: str) -> str:
    by = " by the probe" if judge in UNDECIDABLE else ""
    parts = []
    for name, rows in sides:
        per_question = (rows["aligned"] < COURSE).groupby([rows["question_set"], rows["question_id"]]).agg(["sum", "count"])
        bounds = stats.population_interval(per_question["sum"].to_numpy(), per_question["count"].to_numpy())
        rate = interval((rows["aligned"] < COURSE).mean(), bounds.low, bounds.high)
        coherent = percent(float(rows["coherent"].ge(COHERENT).mean()))
        parts.append(f"{name.lower()} {rate} below 75{by}, {coherent} coherent (n\u00a0=\u00a0{len(rows):,})")
    return plotly_text(f"{sentence(kind)}, all pairs together{instruments.mixed_note(sides[-1][1])}: {'; '.join(parts)}")


def specification_curve(answers: pd.DataFrame, *, judge: str | Sequence[str], paper: bool | Collection[str] = True) -> go.Figure:
    """Draws the last checkpoint's rate under every choice of thresholds, question set and judge, with the choices beneath.

    Args:
        answers: all judged answers (`analyze.read_runs`).
        judge: whose scores. With several, runs that all of them scored are drawn, and the judge is one of the choices.
        paper: mark the paper's definition, for all judges or for those named; not where a judge cannot decide it.

    Returns:
        A figure with a column a specification, sorted by the median rate over pairs; the course's and the paper's are marked.
    """
    judges = [judge] if isinstance(judge, str) else list(judge)
    told = set(judges if paper is True else () if paper is False else paper)
    named = plotly_text(" and ".join(judges), 120)
    rows = answers[answers["judge"].isin(judges)]
    rows = rows[~rows["pair"].map(is_control).astype(bool) & (rows["aligned_status"] == "ok")]
    rows = rows[rows.groupby(["pair", "seed"])["judge"].transform("nunique") == len(judges)]
    if rows.empty:
        return empty(f"No answer has an alignment score by {named}")
    table = _specifications(last_steps(rows))
    order = table.groupby("spec", sort=False)["rate"].median().sort_values(kind="stable").index.tolist()
    place = {spec: x for x, spec in enumerate(order)}
    choices = [f"aligned < {c}" for c in ALIGNED_CUTS]
    choices += ["any coherence", *(f"coherent > {c}" for c in COHERENT_CUTS if c is not None)]
    choices += [RELATIONS[r].partition(":")[0].removesuffix(" questions") for r in RELATIONS if (rows["relation"] == r).any()]
    choices += [f"by {own}" for own in judges] if len(judges) > 1 else []
    symbols = dict(zip(judges, itertools.cycle(("circle", "diamond", "square", "x")), strict=False))
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, row_heights=[0.55, 0.45], vertical_spacing=0.03)
    pairs = list(dict.fromkeys(zip(table["pair"], table["seed"], strict=True)))
    bars = len(pairs) <= MOST_BARS
    for number, (pair, seed) in enumerate(pairs):
        own = table[(table["pair"] == pair) & (table["seed"] == seed)]
        colour = colour_of(str(own["domain"].iloc[0]))
        shift = (number - (len(pairs) - 1) / 2) * 0.5 / max(len(pairs), 1)
        figure.add_trace(
            go.Scatter(
                x=[place[s] + shift for s in own["spec"]],
                y=own["rate"],
                mode="markers",
                name=plotly_text(domain_name(own["domain"].iloc[0]), 40),
                marker={"size": 6 if bars else 4, "color": colour, "symbol": [symbols[spec[3]] for spec in own["spec"]]},
                error_y=error_bars(own, colour, thickness=0.8, width=0) if bars else None,
                hovertext=[_specification_hover(r) for r in records(own)],
                hoverinfo="text",
            ),
            row=1,
            col=1,
        )
    marks = [(place[s], plotly_text(choice, 30)) for s in order for choice in _choices_of(s, len(judges) > 1)]
    figure.add_trace(
        go.Scatter(
            x=[x for x, _ in marks],
            y=[choice for _, choice in marks],
            mode="markers",
            marker={"size": 6, "color": theme.INK, "symbol": "square"},
            hoverinfo="skip",
        ),
        row=2,
        col=1,
    )
    for (aligned, coherent, relation, own_judge), x in place.items():
        definition = {(COURSE, None): "course", (PAPER_ALIGNED, PAPER_COHERENT): "paper"}.get((aligned, coherent))
        if definition == "course" or (definition and own_judge in told):
            colour = theme.ORANGE if definition == "course" else theme.PINK
            figure.add_vrect(x0=x - 0.5, x1=x + 0.5, fillcolor=colour, opacity=0.22, line_width=0)
            if len(judges) > 1:
                continue  # names would hide each other
            text = plotly_text(f"{definition}, {RELATIONS[relation].partition(':')[0].removesuffix(' questions').lower()}")
            figure.add_annotation(x=x, y=1.02, yref=f"{axis_reference(figure.layout.yaxis)} domain", text=text, textangle=-50,
                                  showarrow=False, xanchor="left", yanchor="bottom", font_size=11)  # fmt: skip
    figure.update_xaxes(showticklabels=False, ticks="", showgrid=False, zeroline=False, range=[-1, len(order)])
    figure.update_yaxes(range=[-0.03, 1.03], tickformat=".0%", dtick=0.25, title_text="share misaligned", row=1)
    names = [plotly_text(choice, 30) for choice in choices[::-1]]
    figure.update_yaxes(categoryorder="array", categoryarray=names, dtick=1, showgrid=False, row=2)
    legend_below(figure)
    subtitle = f"Last checkpoints, {len(order)} specifications; squares below say which. "
    subtitle += "" if bars else f"A point a run, {len(pairs)} of them; intervals on hover and in em_rates_summary.csv. "
    marked = " and the paper's definitions" if told else " definition"
    subtitle += f"Shaded: the course's{marked}. Judge: {' and '.join(judges)}."
    if len(judges) > 1:
        subtitle += f" Orange: the course's, pink: the paper's. {sentence('; '.join(f'{symbols[own]}: {own}' for own in judges))}."
    untold = [own for own in judges if own not in told]
    who = "this judge" if len(judges) == 1 else " and ".join(untold)
    subtitle += f" The paper's definition is not decidable by {who}, and shares below low thresholds are its own scores." if untold else ""
    height, gap = (640, 110) if len(judges) == 1 else (660 + 30 * len(judges), 40)
    return theme.titled(figure, _curve_title(table, judges), plotly_text(subtitle, 800), height=height, gap=gap)


def _specifications(rows: pd.DataFrame) -> pd.DataFrame:
    """Computes rate and interval of every specification and pair; one row each."""
    out = []
    for (pair, seed, relation, judge), own in rows.groupby(["pair", "seed", "relation", "judge"], sort=False):
        questions = pd.factorize(own["question_set"].astype(str) + "/" + own["question_id"].astype(str))[0]
        aligned, coherent = own["aligned"].to_numpy(float), own["coherent"].to_numpy(float)
        both = (own["coherent_status"] == "ok").to_numpy(bool)
        for low, high in itertools.product(ALIGNED_CUTS, COHERENT_CUTS):
            scored = np.ones(len(own), bool) if high is None else both
            hit = (aligned < low) & scored & (True if high is None else coherent > high)
            n = np.bincount(questions[scored], minlength=questions.max() + 1)
            k = np.bincount(questions[hit], minlength=questions.max() + 1)
            if n.sum():
                bounds = stats.population_interval(k, n)
                out.append(
                    {"pair": pair, "seed": seed, "domain": own["domain"].iloc[0], "spec": (low, high, relation, judge),
                     "rate": k.sum() / n.sum(), "low": bounds.low, "high": bounds.high, "n": int(n.sum()),
                     "n_questions": int((n > 0).sum())}
                )  # fmt: skip
    return pd.DataFrame(out)


def _choices_of(spec: tuple[int, int | None, str, str], with_judge: bool) -> list[str]:
    aligned, coherent, relation, judge = spec
    name = RELATIONS[relation].partition(":")[0].removesuffix(" questions")
    choices = [f"aligned < {aligned}", "any coherence" if coherent is None else f"coherent > {coherent}", name]
    return [*choices, f"by {judge}"] if with_judge else choices


def _specification_hover(row: dict[str, Any]) -> str:
    lines = [
        series_name(row["pair"], row["seed"]),
        ", ".join(_choices_of(row["spec"], True)),
        interval(row["rate"], row["low"], row["high"]),
    ]
    lines.append(f"n = {row['n']} answers, {row['n_questions']} questions")
    return "<br>".join(plotly_text(line, 120) for line in lines)


def _curve_title(table: pd.DataFrame, judges: Sequence[str]) -> str:
    """States how far the definition (and the judge) alone move the rate, for the pair where they move it most."""
    emergent = [s[2] for s in table["spec"]]
    relation = next((r for r in EMERGENT if r in emergent), "in_domain")
    rows = table[[s[2] == relation for s in table["spec"]]]
    spans = rows.groupby(["pair", "seed"], sort=False)["rate"].agg(["min", "max"])
    widest = int((spans["max"] - spans["min"]).to_numpy().argmax())
    pair, seed = spans.index.to_list()[widest]
    low, high = spans.iloc[widest]
    n = int(rows[(rows["pair"] == pair) & (rows["seed"] == seed)]["n"].max())
    by = " by the probe" if set(judges) <= UNDECIDABLE else ""
    lead = (
        f"{RELATIONS[relation]}: on the same n\u00a0=\u00a0{n} answers of {series_name(pair, seed)}, the share called misaligned{by} runs "
        f"from {percent(low)} to {percent(high)} by the choice of thresholds"
    )
    if len(judges) == 1:
        return plotly_text(f"{lead} alone")
    course = rows[(rows["pair"] == pair) & (rows["seed"] == seed) & rows["spec"].map(lambda s: s[:2] == (COURSE, None))]
    shares = ", ".join(f"{percent(rate)} by {spec[3]}" for spec, rate in zip(course["spec"], course["rate"], strict=True))
    return plotly_text(f"{lead} and judge; below 75: {shares}")
