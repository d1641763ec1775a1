"""The loss as it falls: a progress bar in a terminal, a bar with a curve in a notebook.

In a notebook one display is replaced again and again, a few kilobytes of HTML and SVG that any reader of notebooks shows; an executed
notebook keeps its last state alone.
"""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from IPython.display import HTML

REFRESH_SECONDS = 2.0
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 640, 220, 44, 24, 10
_MAX_POINTS = 400


class LossView:
    """Shows how far a training is. Nothing is written where nobody looks: neither a notebook nor a terminal."""

    def __init__(self, total: int, done: int = 0) -> None:
        self._total = total
        self._first = done
        self._began = time.monotonic()
        self._last = 0.0
        self._handle: Any = None
        self._bar: Any = None
        if in_notebook():
            from IPython.display import HTML, display

            self._handle = display(HTML("Training starts …"), display_id=True)
        elif sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)

    def show(self, log: Sequence[dict[str, Any]]) -> None:
        """Shows the state after the last entry of `log` (Trainer's history: dicts with step, loss and num_input_tokens_seen)."""
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{log[-1]['loss']:.3f}", refresh=False)
            self._bar.update(log[-1]["step"] - self._bar.n)
        elif self._handle is not None and time.monotonic() - self._last >= REFRESH_SECONDS:
            from IPython.display import HTML

            self._last = time.monotonic()
            points = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
            self._handle.update(HTML(self._line(log) + curve(points, self._total)))

    def close(self, log: Sequence[dict[str, Any]]) -> None:
        """Shows the last state in one line and ends the bar."""
        steps = [entry for entry in log if "loss" in entry]
        if self._bar is not None:
            self._bar.close()
        elif self._handle is not None and steps:
            from IPython.display import HTML

            self._handle.update(HTML(self._line(steps)))

    def _line(self, log: Sequence[dict[str, Any]]) -> str:
        last = log[-1]
        step, seconds = last["step"], time.monotonic() - self._began
        left = (self._total - step) * seconds / max(1, step - self._first)
        when = "done" if step >= self._total else f"about {left / 60:.0f} min left" if left >= 90 else f"about {left:.0f} s left"
        words = f"step {step} of {self._total} · loss {last['loss']:.3f} · {last['num_input_tokens_seen']:,} tokens · {when}"
        bar = f'<progress value="{step}" max="{self._total}" style="width:{_WIDTH}px"></progress>'
        return f"<div>{bar}<br>{html.escape(words)}</div>"


def loss_curve(log: pd.DataFrame, checkpoints: Iterable[int] = ()) -> HTML:
    """Returns the training loss of training_log.csv for a notebook, with the kept checkpoints marked."""
    from IPython.display import HTML

    if log.empty:
        return HTML("Nothing was trained here: the adapter is a published one.")
    return HTML(curve(list(zip(log["step"], log["loss"], strict=True)), int(log["step"].iloc[-1]), checkpoints))


def curve(points: Sequence[tuple[int, float]], total: int, marks: Iterable[int] = ()) -> str:
    """Returns an SVG of the loss (nats a token) by optimizer step, at most about 400 points of it.

    Args:
        points: step and loss, in ascending order; at least one.
        total: the step at the right end.
        marks: steps that get a dashed line.
    """
    thinned = list(points[:: max(1, -(-len(points) // _MAX_POINTS))])
    shown = thinned if thinned[-1] == points[-1] else [*thinned, points[-1]]
    low, high = min(loss for _, loss in shown), max(loss for _, loss in shown)
    span = max(high - low, 1e-6)

    def x(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - 10) * step / max(1, total)

    def y(loss: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - loss) / span

    path = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in shown)
    ticks = "".join(
        f'<line x1="{_LEFT}" x2="{_WIDTH - 10}" y1="{y(v):.1f}" y2="{y(v):.1f}" stroke="#ddd"/>'
        f'<text x="{_LEFT - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:.2f}</text>'
        for v in (low, (low + high) / 2, high)
    )
    dashes = "".join(
        f'<line x1="{x(s):.1f}" x2="{x(s):.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" stroke="#bbb" stroke-dasharray="3 3"/>' for s in marks
    )
    steps = "".join(f'<text x="{x(s):.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{s}</text>' for s in sorted({0, total // 2, total}))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" font-size="11" fill="#555" '
        f'role="img" aria-label="training loss by step">{ticks}{dashes}{steps}'
        f'<polyline points="{path}" fill="none" stroke="#1f77b4" stroke-width="1.5"/></svg>'
    )


def in_notebook() -> bool:
    """Says whether this runs in a Jupyter kernel, where a display can be replaced."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")
