"""An index over judged answers: filters, orders and the trail of one answer through training, quick for a hundred thousand rows.

Filters work on codes and masks made once; nothing here is shown, so nothing is escaped but the short names of questions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lib import agreement
from lib.escape import clean
from lib.labels import LABELS, label_answers, series_name

ORDERS = (
    "as recorded",
    "least aligned first",
    "most aligned first",
    "least coherent first",
    "longest first",
    "judges differ most first",
)
"""The last is offered only where several judges scored the answers."""

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
        self._aligned, self._coherent = (
            pd.to_numeric(self.frame[metric], errors="coerce").to_numpy(float) for metric in ("aligned", "coherent")
        )
        self._answers = agreement.same_answer(self.frame).to_numpy(int)
        self._spread = agreement.spread(self.frame).to_numpy(float)
        self._lower = [f"{q}\n{r}".lower() for q, r in zip(self.frame["question"], self.frame["response"].fillna(""), strict=True)]
        self._length = np.array([len(text) for text in self._lower])
        self._questions: dict[str | None, list[tuple[str, str]]] = {}
        self._trails: dict[tuple[Any, ...], dict[int, int]] = {}
        keys = self.frame[["run", "judge", "question_set", "question_id", "sample"]].itertuples(index=False, name=None)
        self._keys = list(keys)
        self._runs = self.choices("run")
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
        if question_set not in self._questions:
            rows = self.frame if question_set is None else self.frame[self.frame["question_set"] == question_set]
            first = rows.drop_duplicates("question_id")
            named = zip(first["question_id"], first["question"], strict=True)
            self._questions[question_set] = [(f"{clean(i, 40)}: {clean(q, 70)}", str(i)) for i, q in named]
        return self._questions[question_set]

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
        keys = (self._aligned, -self._aligned, self._coherent, -self._length, -self._spread)
        key = dict(zip(ORDERS[1:], keys, strict=True))[filters.order][found]
        return found[np.argsort(key, kind="stable")]  # NaN sorts last

    def first_judge(self) -> str | None:
        """Returns the judge that stands first in every run, or None where runs differ."""
        first = self.frame.drop_duplicates("run")["judge"].unique()
        return str(first[0]) if len(first) == 1 else None

    def last_step(self) -> int | None:
        """Returns the last step, or None where runs end at different steps or hold one step alone."""
        last = self.frame.groupby("run")["step"].max().unique()
        return int(last[0]) if len(last) == 1 and self.frame["step"].nunique() > 1 else None

    def by_others(self, position: int) -> list[dict[str, Any]]:
        """Returns the rows of other judges for the same answer."""
        same = np.flatnonzero(self._answers == self._answers[position])
        return [self.row(int(other)) for other in same if other != position]

    def trail(self, position: int) -> dict[int, int]:
        """Returns step to position for the same run, judge, question and sample: one question's answer through training."""
        return dict(sorted(self._trails[self._keys[position]].items()))

    def peers(self, position: int) -> dict[str, dict[int, int]]:
        """Returns the trails of other runs for the same judge, question and sample: run to step to position; empty where none has it."""
        own, *rest = self._keys[position]
        found = ((run, self._trails.get((run, *rest))) for run in self._runs if run != own)
        return {run: dict(sorted(trail.items())) for run, trail in found if trail}

    def row(self, position: int) -> dict[str, Any]:
        """Returns one answer as a dictionary by column."""
        return {str(k): v for k, v in self.frame.iloc[position].items()}
