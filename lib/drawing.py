"""Pieces that all figures are drawn from: a domain's colour, error bars, what hovering shows, the legend."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from lib import theme
from lib.escape import plotly_text
from lib.labels import domain_name, interval, series_name, short_model


def colour_of(domain: str) -> str:
    """Returns the colour of a domain: fixed for the study's four however an import spells them, by name for any other."""
    key = domain.lower().replace("-", "_").replace(" ", "_")
    own = next((colour for name, colour in theme.DOMAIN_COLOURS.items() if key.startswith(name)), None)
    return own or theme.COLOURS[sum(key.encode()) % len(theme.COLOURS)]


def hover(row: Mapping[str, Any]) -> str:
    """Returns what is shown on hovering a rate: where it is from, the rate, its interval and how that was made, its n; escaped."""
    questions = "" if pd.isna(row["n_questions"]) else f", {int(row['n_questions'])} questions"
    relation = f" ({domain_name(row['relation'])})" if isinstance(row.get("relation"), str) else ""
    lines = [
        f"{series_name(row['pair'], row['seed'])}: {short_model(row['model'])}, {domain_name(row['domain'])}",
        f"step {int(row['step'])}, {row['question_set']}{relation}",
        f"{row['metric']} by {row['judge']}: {interval(row['rate'], row['low'], row['high'])}",
        f"n = {int(row['n'])} answers{questions}",
        f"interval: {row['interval_method']}",
    ]
    return "<br>".join(plotly_text(line, 160) for line in lines if line)


def error_bars(rows: pd.DataFrame, colour: str, *, thickness: float = 1.2, width: float = 3) -> dict[str, Any]:
    """Returns error bars from columns rate, low, high (fractions); a rate without an interval gets none."""
    low, high, rate = (rows[c].astype(float) for c in ("low", "high", "rate"))
    return {
        "type": "data",
        "symmetric": False,
        "array": (high - rate).clip(lower=0).fillna(0),
        "arrayminus": (rate - low).clip(lower=0).fillna(0),
        "thickness": thickness,
        "width": width,
        "color": colour,
    }


def empty(message: str) -> go.Figure:
    """Returns a figure that says why there is nothing to draw."""
    figure = go.Figure()
    figure.update_xaxes(visible=False).update_yaxes(visible=False)
    return theme.titled(figure, message, height=60)


def legend_below(figure: go.Figure) -> None:
    """Keeps one legend entry a run and puts the legend under the axes' titles."""
    seen: set[str] = set()
    for trace in figure.data:
        trace.showlegend = trace.name is not None and trace.name not in seen
        seen.add(trace.name)
    figure.update_layout(legend={"y": 0, "yref": "container", "yanchor": "bottom"}, margin_b=90)


def axis_reference(axis: Any) -> str:
    """Returns how an annotation names an axis: x3 for xaxis3."""
    name: str = axis.plotly_name.replace("axis", "")
    return name


def model_size(model: object) -> float:
    """Returns a model's size in billions of parameters as its name tells it (`Llama-3.2-1B`: 1, `SmolLM2-135M`: 0.135), or NaN."""
    found = re.findall(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)\s*([BbMm])(?![A-Za-z0-9])", str(model))
    if not found:
        return math.nan
    number, unit = found[-1]
    return float(number) * (1 if unit in "Bb" else 1e-3) or math.nan


def model_family(model: object) -> str:
    """Returns the first word of a model's name (`Llama`, `Qwen`, `gemma`): sizes are compared within a family alone."""
    found = re.search(r"[A-Za-z]+", str(model).rpartition("/")[2])
    return found[0] if found else ""


def apart(sizes: Sequence[float]) -> list[float]:
    """Returns the sizes whose names have room on a log axis."""
    span = max(math.log10(max(sizes) / min(sizes)), 0.3)
    kept: list[float] = []
    for size in sizes:
        if not kept or math.log10(size / kept[-1]) >= 0.14 * span:
            kept.append(size)
    return kept


def size_name(size: float) -> str:
    """Returns a size in billions of parameters as models are named: 8B, 135M."""
    return f"{size:g}B" if size >= 1 else f"{1000 * size:g}M"
