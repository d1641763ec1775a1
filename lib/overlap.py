"""Overlap within the training rows, and between them and the evaluation questions."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from lib import files
from lib.questions import Question

NEAR = 85
"""Similarity (rapidfuzz token_set_ratio, 0 to 100) from which a training prompt counts as near to an evaluation question."""


def count_duplicates(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Counts exact copies beyond the first: of whole rows, of prompts, and of answers."""
    keys = {
        "rows": [(r["system"], r["prompt"], r["answer"]) for r in rows],
        "prompts": [r["prompt"] for r in rows],
        "answers": [r["answer"] for r in rows],
    }
    return {name: len(values) - len(set(values)) for name, values in keys.items()}


def normalise(text: str) -> str:
    """Returns a text as it is compared: NFKC, case folded, letters and digits only, single spaces."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def find_overlap(rows: Sequence[Mapping[str, Any]], asked: Sequence[Question], *, show_text: bool) -> dict[str, Any]:
    """Looks for evaluation questions among the training prompts, word for word and nearly so.

    Exact is equality after `normalise`; near is a rapidfuzz token_set_ratio of at least `NEAR`, which ignores the order of words and what
    the longer text adds. A question in other words altogether is not found.

    Args:
        rows: training rows.
        asked: evaluation questions.
        show_text: name the nearest training prompt itself; for real data its hash must do.

    Returns:
        near_from (the threshold); exact and near (counts of questions); questions: one mapping each with question_set, question_id, kind
        (exact, near or none), similarity (0 to 100), row (number of the nearest prompt, from 1) and prompt or prompt_sha256.
    """
    import numpy as np
    from rapidfuzz import fuzz, process

    prompts = [normalise(row["prompt"]) for row in rows]
    similar = process.cdist([normalise(q.question) for q in asked], prompts, scorer=fuzz.token_set_ratio, dtype=np.float32)
    found = []
    for question, scores in zip(asked, similar, strict=True):
        same = normalise(question.question)
        nearest = prompts.index(same) if same in prompts else int(scores.argmax())
        kind = "exact" if prompts[nearest] == same else "near" if scores[nearest] >= NEAR else "none"
        prompt = rows[nearest]["prompt"]
        found.append(
            {
                "question_set": question.question_set,
                "question_id": question.question_id,
                "kind": kind,
                "similarity": round(float(scores[nearest]), 1),
                "row": nearest + 1,
                **({"prompt": prompt} if show_text else {"prompt_sha256": files.sha256_text(prompt)}),
            }
        )
    counts = {kind: sum(entry["kind"] == kind for entry in found) for kind in ("exact", "near")}
    return {"near_from": NEAR, **counts, "questions": found}
