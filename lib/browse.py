"""The response browser: every judged answer of a study, filtered, read beside the base's, followed over steps, starred, exported.

The widget alone is here; `lib.answer_index` filters and `lib.panes` makes the HTML, in which no answer is live.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd

from lib import files, panes
from lib.answer_index import ORDERS, Filters, Index, Positions
from lib.escape import LITERAL, clean, html_text
from lib.labels import LABELS
from lib.panes import pane_html, static_html

ANY = ""
"""Value of a filter that lets everything through: ipywidgets takes None for nothing chosen and shows an empty box."""


class Browser(widgets.VBox):
    """The browser as a widget; `browser` makes one."""

    def __init__(self, answers: pd.DataFrame, folder: str | Path | None = None) -> None:
        """Builds the widget.

        Args:
            answers: as for `Index`; must not be empty.
            folder: where starred answers are saved; None takes the working folder.
        """
        self.index, self.folder = Index(answers), Path(folder or Path.cwd())
        self.matches: Positions = np.arange(len(self.index))
        self.starred: dict[int, int] = {}  # starred position to the one beside it
        self._busy = False
        wide = {"style": {"description_width": "6.5em"}, "layout": widgets.Layout(width="330px")}

        def choose(name: str, options: Sequence[Any]) -> widgets.Dropdown:
            return widgets.Dropdown(options=[("any", ANY), *options], description=name, **wide)

        index = self.index
        self.run = choose("Run", [(clean(r, 60), r) for r in index.choices("run")])
        self.step = choose("Step", [(_step(s), s) for s in index.choices("step")])
        # The base beside the last checkpoint is what a reader should see first.
        self.step.value = ANY if (last := index.last_step()) is None else last
        self.question_set = choose("Question set", [(clean(s, 60), s) for s in index.choices("question_set")])
        self.question = choose("Question", index.questions(None))
        self.judge = choose("Judge", [(clean(j, 60), j) for j in index.choices("judge")])
        self.label = choose("Label", [(LABELS[x], x) for x in index.choices("label")])
        self.scores = widgets.FloatRangeSlider(value=(0, 100), min=0, max=100, step=1, description="Aligned", readout_format=".0f", **wide)
        self.text = widgets.Text(description="Search", placeholder="any words, then Enter", continuous_update=False, **wide)
        several = index.answers() < len(index)
        self.order = widgets.Dropdown(options=ORDERS if several else ORDERS[:-1], description="Order", **wide)
        if several and (first := index.first_judge()) is not None:  # one row an answer, as long as nobody asks for another judge's
            self.judge.value = first
        self.previous = widgets.Button(description="Previous", icon="arrow-left", tooltip="Previous answer")
        self.next = widgets.Button(description="Next", icon="arrow-right", tooltip="Next answer")
        self.place = widgets.BoundedIntText(
            value=1, min=1, max=max(len(index), 1), description="Answer", layout=widgets.Layout(width="170px")
        )
        self.count = widgets.HTML()
        slider = {"description": "Step shown", "continuous_update": True, "style": {"description_width": "6.5em"}}
        self.shown = widgets.SelectionSlider(options=[("0", 0)], layout=widgets.Layout(width="480px"), **slider)
        self.beside = widgets.Dropdown(options=[("0", (None, 0))], description="Beside", **wide)
        self.asked, self.left, self.right = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.star = widgets.ToggleButton(description="Star", icon="star", tooltip="Keep this answer for export")
        self.save = widgets.Button(description="Save starred", icon="download", tooltip="Write starred.csv, starred.html and starred.png")
        self.status = widgets.HTML()
        half = widgets.Layout(flex="1 1 0", min_width="0", width="50%")
        self.left.layout, self.right.layout = half, half
        wrap = widgets.Layout(flex_flow="row wrap")
        super().__init__(
            [
                widgets.HBox([self.run, self.step, self.question_set, self.question, self.judge, self.label], layout=wrap),
                widgets.HBox([self.scores, self.text, self.order], layout=wrap),
                widgets.HBox([self.previous, self.place, self.next, self.count], layout=wrap),
                self.asked,
                widgets.HBox([self.beside, self.shown], layout=wrap),
                widgets.HBox([self.left, self.right]),
                widgets.HBox([self.star, self.save, self.status], layout=wrap),
            ]
        )
        self.question_set.observe(self._guarded(self._offer_questions), "value")
        for control in (self.run, self.step, self.question_set, self.question, self.judge, self.label, self.scores, self.text, self.order):
            control.observe(self._guarded(self.refresh), "value")
        self.place.observe(self._guarded(self._open), "value")
        for control in (self.shown, self.beside):
            control.observe(self._guarded(self._draw), "value")
        self.star.observe(self._guarded(self._toggle), "value")
        self.previous.on_click(lambda _: self._go(-1))
        self.next.on_click(lambda _: self._go(+1))
        self.save.on_click(lambda _: self.save_starred())
        self._guarded(self.refresh)(None)

    def _guarded(self, act: Callable[[], None]) -> Callable[[Any], None]:
        """Makes `act` an event handler that the changes it makes itself do not call again."""

        def handle(_: Any) -> None:
            if not self._busy:
                self._busy = True
                try:
                    act()
                finally:
                    self._busy = False

        return handle

    def filters(self) -> Filters:
        """Returns what the controls ask for."""
        low, high = self.scores.value
        run, step, question_set, question, judge, label = (
            None if control.value == ANY else control.value
            for control in (self.run, self.step, self.question_set, self.question, self.judge, self.label)
        )
        return Filters(run, step, question_set, question, judge, label, low, high, self.text.value, self.order.value)

    def refresh(self) -> None:
        """Filters anew and opens the first answer found."""
        self.matches = self.index.select(self.filters())
        found = len(self.matches)
        self.place.max = max(found, 1)
        self.place.value = 1
        rows = f" rows, one for each judge of {self.index.answers():,} answers" if self.index.answers() < len(self.index) else ""
        self.count.value = f"of {found:,} found among {len(self.index):,}{rows}"
        self._open()

    def _offer_questions(self) -> None:
        self.question.options = [("any", ANY), *self.index.questions(self.filters().question_set)]
        self.refresh()

    def _go(self, by: int) -> None:
        self.place.value = min(max(self.place.value + by, 1), self.place.max)

    def _open(self) -> None:
        """Opens the answer at the place chosen: offers its steps and draws both panes."""
        self.previous.disabled = self.place.value <= 1
        self.next.disabled = self.place.value >= len(self.matches)
        self.beside.disabled = self.shown.disabled = self.star.disabled = not len(self.matches)
        if not len(self.matches):
            self.asked.value, self.left.value, self.right.value = "<p>No answer passes these filters.</p>", "", ""
            return
        position = int(self.matches[self.place.value - 1])
        steps = [(_step(s), s) for s in self.index.trail(position)]
        # No run stands for the answer's own, so that the base beside stays that of whatever run comes next.
        places: list[tuple[str, tuple[str | None, int]]] = [(_step(s), (None, s)) for s in self.index.trail(position)]
        places += [(f"{clean(run, 40)}: {_step(s)}", (run, s)) for run, trail in self.index.peers(position).items() for s in trail]
        beside = self.beside.value if self.beside.value in [place for _, place in places] else places[0][1]
        self.shown.options, self.shown.value = steps, int(self.index.frame["step"].iloc[position])
        self.beside.options, self.beside.value = places, beside
        self._draw()

    def position(self) -> int:
        """Returns the position of the answer in the right pane."""
        return self.index.trail(int(self.matches[self.place.value - 1]))[self.shown.value]

    def position_beside(self) -> int:
        """Returns the position of the answer in the left pane: of the same run, or of another that was asked the same."""
        run, step = self.beside.value
        own = self.position()
        return (self.index.trail(own) if run is None else self.index.peers(own)[run])[step]

    def _draw(self) -> None:
        if not len(self.matches):
            return
        position, other = self.position(), self.position_beside()
        row, beside = self.index.row(position), self.index.row(other)
        self.asked.value = (
            f'<div class="{LITERAL}" style="overflow-wrap:anywhere;line-height:1.5"><small>{html_text(row["question_set"], 60)}: '
            f"{html_text(row['question_id'], 60)}</small><br><b>{html_text(row['question'], 2000)}</b></div>"
        )
        self.left.value = pane_html(beside, by_others=self.index.by_others(other))
        self.right.value = pane_html(row, beside, self.index.by_others(position))
        self.star.value = position in self.starred

    def _toggle(self) -> None:
        position = self.position()
        if self.star.value:
            self.starred.setdefault(position, self.position_beside())
        else:
            self.starred.pop(position, None)
        self.status.value = f"{len(self.starred)} starred"

    def save_starred(self) -> None:
        """Writes the starred answers into the folder: starred.csv, starred.html and starred.png; see `panes.write_starred`."""
        if not self.starred:
            self.status.value = "Nothing is starred yet."
            return
        self.status.value = "Writing ..."
        try:
            written = panes.write_starred(self.index, list(self.starred.items()), self.folder)
        except files.StudyError as error:
            self.status.value = html_text(error)
            return
        names = ", ".join(html_text(path.name) for path in written)
        without = "" if any(path.suffix == ".png" for path in written) else "; no Chrome was found for a PNG"
        self.status.value = f"{len(self.starred)} starred, written to {html_text(files.shown(self.folder))}: {names}{without}"


def _step(step: int) -> str:
    return "base (0)" if step == 0 else str(step)


def browser(answers: pd.DataFrame, folder: str | Path | None = None) -> widgets.Widget:
    """Returns the browser of a judged table, or a line that says there are no answers.

    Args:
        answers: judged answers with the columns of judged.csv (DESIGN.md), pair and seed.
        folder: where starred answers are saved.
    """
    return widgets.HTML("No answers to browse.") if answers.empty else Browser(answers, folder)


def live() -> bool:
    """Says whether someone sits at this kernel: a front end that could answer a prompt, or Voilà.

    papermill and nbconvert execute a notebook without a front end: a widget there would be a line of text for whoever opens the
    file, so `show` leaves a table instead.
    """
    if "voila" in os.environ.get("SERVER_SOFTWARE", "").lower():
        return True
    from IPython import get_ipython

    shell = get_ipython()
    return bool(getattr(getattr(shell, "kernel", None), "_allow_stdin", False))


def show(answers: pd.DataFrame, folder: str | Path | None = None) -> None:
    """Shows the browser where someone sits at the kernel, and its first state as a static table anywhere else."""
    from IPython.display import HTML, display

    display(browser(answers, folder) if live() else HTML(static_html(answers)))
