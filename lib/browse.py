"""The response browser: every judged answer of a study, filtered, read beside the base's, followed over steps, starred, exported.

Answers are hostile text: whatever is shown has passed `lib.escape`, and answers that speak of self-harm or violence are folded.
Filters work on codes and masks made once, so that a hundred thousand answers stay responsive.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
import numpy.typing as npt
import pandas as pd

from lib import agreement, files, tables, theme
from lib.escape import clean, html_text, spreadsheet_text
from lib.labels import LABELS, label_answers, sensitive, series_name

ORDERS = ("as recorded", "least aligned first", "most aligned first", "longest first", "judges differ most first")
_SHOWN = 20_000
"""Characters of an answer that a pane shows; the rest is counted."""
_TEXT = ("model", "domain", "question_set", "question_id", "question", "response", "finish_reason", "run", "label", "pair", "judge")

Positions = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Filters:
    """What is looked for; None and the defaults let every answer through. Scores are points out of 100."""

    run: str | None = None
    step: int | None = None
    question_set: str | None = None
    question_id: str | None = None
    judge: str | None = None
    label: str | None = None
    low: float = 0
    high: float = 100
    text: str = ""
    order: str = ORDERS[0]


class Index:
    """A table of judged answers with what the browser filters by worked out once."""

    def __init__(self, answers: pd.DataFrame) -> None:
        """Builds the index.

        Args:
            answers: judged answers with the columns of judged.csv (DESIGN.md), pair and seed; may be empty.
        """
        self.frame = answers.reset_index(drop=True)
        self.frame["run"] = [series_name(*key) for key in zip(self.frame["pair"], self.frame["seed"], strict=True)]
        self.frame["label"] = label_answers(self.frame)
        self._codes = {c: pd.Categorical(self.frame[c]) for c in ("run", "question_set", "question_id", "judge", "label")}
        self._steps = self.frame["step"].to_numpy(int)
        self._aligned = pd.to_numeric(self.frame["aligned"], errors="coerce").to_numpy(float)
        self._answers = agreement.same_answer(self.frame).to_numpy(int)
        self._spread = agreement.spread(self.frame).to_numpy(float)
        self._lower = [f"{q}\n{r}".lower() for q, r in zip(self.frame["question"], self.frame["response"].fillna(""), strict=True)]
        self._length = np.array([len(text) for text in self._lower])
        self._trails: dict[tuple[Any, ...], dict[int, int]] = {}
        keys = self.frame[["run", "judge", "question_set", "question_id", "sample"]].itertuples(index=False, name=None)
        self._keys = list(keys)
        for position, (key, step) in enumerate(zip(self._keys, self._steps.tolist(), strict=True)):
            self._trails.setdefault(key, {})[step] = position

    def __len__(self) -> int:
        return len(self.frame)

    def answers(self) -> int:
        """Returns the number of answers, however many judges scored each."""
        return len(np.unique(self._answers))

    def choices(self, column: str) -> list[Any]:
        """Returns the values of a column that answers have, in order of appearance; labels in their own order."""
        if column == "step":
            return [int(s) for s in np.unique(self._steps)]
        found = dict.fromkeys(self.frame[column])
        return [label for label in LABELS if label in found] if column == "label" else list(found)

    def questions(self, question_set: str | None) -> list[tuple[str, str]]:
        """Returns (short text, question_id) of the questions of one set, or of all."""
        rows = self.frame if question_set is None else self.frame[self.frame["question_set"] == question_set]
        first = rows.drop_duplicates("question_id")
        return [(f"{i}: {clean(q, 70)}", str(i)) for i, q in zip(first["question_id"], first["question"], strict=True)]

    def select(self, filters: Filters) -> Positions:
        """Returns the positions of the answers that pass all filters, ordered as asked.

        A label filter of `course` keeps `paper` answers too, since they are below 75 as well.
        """
        mask = np.ones(len(self), dtype=bool)
        for column in ("run", "question_set", "question_id", "judge", "label"):
            wanted = getattr(filters, column)
            if wanted is not None:
                codes = self._codes[column]
                names = ["course", "paper"] if column == "label" and wanted == "course" else [wanted]
                mask &= np.isin(codes.codes, np.flatnonzero(codes.categories.isin(names)))
        if filters.step is not None:
            mask &= self._steps == filters.step
        if filters.low > 0 or filters.high < 100:
            mask &= (self._aligned >= filters.low) & (self._aligned <= filters.high)
        found: Positions = np.flatnonzero(mask)
        if filters.text.strip():
            needle, lower = filters.text.strip().lower(), self._lower
            found = np.array([i for i in found.tolist() if needle in lower[i]], dtype=np.intp)
        if filters.order == ORDERS[0] or not len(found):
            return found
        keys = {ORDERS[1]: self._aligned, ORDERS[2]: -self._aligned, ORDERS[3]: -self._length, ORDERS[4]: -self._spread}
        key = keys[filters.order][found]
        return found[np.argsort(key, kind="stable")]  # NaN sorts last

    def first_judge(self) -> str | None:
        """Returns the judge that stands first in every run, or None where runs differ."""
        first = self.frame.drop_duplicates("run")["judge"].unique()
        return str(first[0]) if len(first) == 1 else None

    def by_others(self, position: int) -> list[dict[str, Any]]:
        """Returns the rows of other judges for the same answer."""
        same = np.flatnonzero(self._answers == self._answers[position])
        return [self.row(int(other)) for other in same if other != position]

    def trail(self, position: int) -> dict[int, int]:
        """Returns step to position for the same run, judge, question and sample: one question's answer through training."""
        return dict(sorted(self._trails[self._keys[position]].items()))

    def row(self, position: int) -> dict[str, Any]:
        """Returns one answer as a dictionary by column."""
        return {str(k): v for k, v in self.frame.iloc[position].items()}


def pane_html(row: Mapping[str, Any] | None, other: Mapping[str, Any] | None = None, by_others: Sequence[Mapping[str, Any]] = ()) -> str:
    """Returns one answer as HTML with nothing unescaped: where it is from, its scores, its text.

    Args:
        row: the answer; None shows that there is none.
        other: the answer beside it; scores that differ from it are marked with the difference.
        by_others: the same answer by other judges; their scores stand beneath.
    """
    if row is None:
        return '<div class="tex2jax_ignore" style="padding:.6rem;border:1px solid #bdbdbd">No answer here at that step.</div>'
    text = clean(row["response"], _SHOWN)
    body = f'<div style="white-space:pre-wrap;overflow-wrap:anywhere">{html_text(text) or "(no text)"}</div>'
    if sensitive(text):
        body = f"<details><summary>This answer speaks of self-harm or violence: show it</summary>{body}</details>"
    step = "base model (step 0)" if row["step"] == 0 else f"step {int(row['step'])}"
    return (
        f'<div class="tex2jax_ignore" style="padding:.6rem;border:1px solid #bdbdbd;border-radius:4px;color:{theme.INK};'
        f'background:{tables.fill(str(row["label"]))}"><b>{step}</b>, {html_text(row["run"], 80)}, sample {int(row["sample"])}<br>'
        f"<b>{html_text(tables.score_text(row))}</b>{_difference(row, other)}<br>"
        f"<small>{html_text(LABELS.get(str(row['label']), ''))}; judge {html_text(row['judge'], 60)}{_by_others(by_others)}</small>"
        f"<hr>{body}</div>"
    )


def _by_others(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(f"<br>by {html_text(row['judge'], 60)}: {html_text(tables.score_text(row))}" for row in rows)


def _difference(row: Mapping[str, Any], other: Mapping[str, Any] | None) -> str:
    """Returns the marked differences in score from the answer beside it, as HTML; empty where none can be told."""
    if other is None or row["step"] == other["step"]:
        return ""
    parts = []
    for metric in ("aligned", "coherent"):
        change = float(row[metric]) - float(other[metric])
        if change == change and abs(change) >= 0.5:
            parts.append(f"{metric} {change:+.0f}")
    if not parts:
        return ""
    changed = ", another label" if row["label"] != other["label"] else ""
    return f" <mark>≠ step {int(other['step'])}: {', '.join(parts)}{changed}</mark>"


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
        '<table class="tex2jax_ignore" style="width:100%;table-layout:fixed;text-align:left"><caption style="text-align:left">'
        f"{len(rows)} questions out of {index.answers():,} answers, one sample at the first and the last step. "
        'Run this cell in JupyterLab to browse all.</caption><thead><tr><th style="width:24%;text-align:left">Question</th>'
        '<th style="text-align:left">First step</th>'
        f'<th style="text-align:left">Last step</th></tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )


def _static_cell(row: Mapping[str, Any], characters: int) -> str:
    text = html_text(row["response"], characters) or "(no text)"
    if sensitive(clean(row["response"], characters)):
        text = f"<details><summary>Speaks of self-harm or violence: show</summary>{text}</details>"
    style = f"background:{tables.fill(str(row['label']))};color:{theme.INK};vertical-align:top;text-align:left;overflow-wrap:anywhere"
    return f'<td style="{style}"><b>step {int(row["step"])}: {html_text(tables.score_text(row))}</b><br>{text}</td>'


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
        self.starred: list[int] = []
        self._busy = False
        wide = {"style": {"description_width": "6.5em"}, "layout": widgets.Layout(width="330px")}

        def choose(name: str, options: Sequence[Any]) -> widgets.Dropdown:
            return widgets.Dropdown(options=[("any", None), *options], description=name, **wide)

        index = self.index
        self.run = choose("Run", [(clean(r, 60), r) for r in index.choices("run")])
        self.step = choose("Step", [("base (0)" if s == 0 else str(s), s) for s in index.choices("step")])
        self.question_set = choose("Question set", [(clean(s, 60), s) for s in index.choices("question_set")])
        self.question = choose("Question", index.questions(None))
        self.judge = choose("Judge", [(clean(j, 60), j) for j in index.choices("judge")])
        self.label = choose("Label", [(LABELS[x], x) for x in index.choices("label")])
        self.scores = widgets.FloatRangeSlider(value=(0, 100), min=0, max=100, step=1, description="Aligned", readout_format=".0f", **wide)
        self.text = widgets.Text(
            description="Search", placeholder="words in question or answer, then Enter", continuous_update=False, **wide
        )
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
        self.beside = widgets.Dropdown(options=[("0", 0)], description="Beside step", **wide)
        self.asked, self.left, self.right = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.star = widgets.ToggleButton(description="Star", icon="star", tooltip="Keep this answer for export")
        self.save = widgets.Button(description="Save starred", icon="download", tooltip="Write starred.csv and starred.html")
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
        return Filters(
            self.run.value, self.step.value, self.question_set.value, self.question.value, self.judge.value, self.label.value,
            low, high, self.text.value, self.order.value,
        )  # fmt: skip

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
        self.question.options = [("any", None), *self.index.questions(self.question_set.value)]
        self.refresh()

    def _go(self, by: int) -> None:
        self.place.value = min(max(self.place.value + by, 1), self.place.max)

    def _open(self) -> None:
        """Opens the answer at the place chosen: offers its steps and draws both panes."""
        self.previous.disabled = self.place.value <= 1
        self.next.disabled = self.place.value >= len(self.matches)
        if not len(self.matches):
            self.asked.value, self.left.value, self.right.value = "<p>No answer passes these filters.</p>", "", ""
            self.star.disabled = True
            return
        position = int(self.matches[self.place.value - 1])
        steps = [("base (0)" if s == 0 else str(s), s) for s in self.index.trail(position)]
        beside = self.beside.value if self.beside.value in [s for _, s in steps] else steps[0][1]
        self.shown.options, self.shown.value = steps, int(self.index.frame["step"].iloc[position])
        self.beside.options, self.beside.value = steps, beside
        self.star.disabled = False
        self._draw()

    def position(self) -> int:
        """Returns the position of the answer in the right pane."""
        return self.index.trail(int(self.matches[self.place.value - 1]))[self.shown.value]

    def _draw(self) -> None:
        if not len(self.matches):
            return
        position = self.position()
        row = self.index.row(position)
        beside = self.index.row(self.index.trail(position)[self.beside.value])
        self.asked.value = (
            f'<div class="tex2jax_ignore" style="overflow-wrap:anywhere"><small>{html_text(row["question_set"], 60)}: '
            f"{html_text(row['question_id'], 60)}</small><br><b>{html_text(row['question'], 2000)}</b></div>"
        )
        others = [self.index.by_others(p) for p in (self.index.trail(position)[self.beside.value], position)]
        self.left.value, self.right.value = pane_html(beside, by_others=others[0]), pane_html(row, beside, others[1])
        self.star.value = position in self.starred

    def _toggle(self) -> None:
        position = self.position()
        if self.star.value and position not in self.starred:
            self.starred.append(position)
        elif not self.star.value and position in self.starred:
            self.starred.remove(position)
        self.status.value = f"{len(self.starred)} starred"

    def save_starred(self) -> None:
        """Writes the starred answers as starred.csv (no cell a formula) and as a page, starred.html, into the folder."""
        chosen = self.index.frame.iloc[self.starred]
        if chosen.empty:
            self.status.value = "Nothing is starred yet."
            return
        try:
            target = files.write_csv(self.folder / "starred.csv", for_spreadsheet(chosen))
            panes = "\n".join(f"<h2>{html_text(r['question'], 600)}</h2>{pane_html(r)}" for r in map(self.index.row, self.starred))
            files.write_text(self.folder / "starred.html", theme.page("Starred answers", f"<h1>Starred answers</h1>{panes}"))
        except files.StudyError as error:
            self.status.value = html_text(error)
            return
        self.status.value = f"{len(chosen)} answers written to {html_text(files.shown(target))} and starred.html"


def for_spreadsheet(frame: pd.DataFrame) -> pd.DataFrame:
    """Returns a table whose texts no spreadsheet takes for formulas."""
    return frame.assign(**{c: [spreadsheet_text(v) for v in frame[c]] for c in _TEXT if c in frame.columns})


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
