"""Files of evaluation questions: our own YAML, the upstream YAML, CSV, or one question a line.

A file comes from anywhere, so it is read with care: the safe loader, a size limit, and errors that never repeat a value at length.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lib import files, upstream
from lib.files import StudyError, shown

KINDS = ("domain", "general", "open_ended")

_MAX_BYTES = 1_000_000


@dataclass(frozen=True)
class Question:
    """One evaluation question. `system` is its own system prompt; `samples` how often its file would ask it, if it says."""

    question_set: str
    question_id: str
    question: str
    system: str | None = None
    topics: list[str] = field(default_factory=list)
    samples: int | None = None


@dataclass(frozen=True)
class QuestionSet:
    """A file of questions. `relation` is domain (then `domain` says whose set it is), general or open_ended."""

    name: str
    questions: list[Question]
    relation: str = "general"
    domain: str | None = None
    description: str = ""


def read(path: Path) -> QuestionSet:
    """Reads a file of questions; its name without the suffix is the set's name.

    YAML is ours (a mapping with name, relation, description, questions) or a list whose items have `id` and `paraphrases`, each
    of them a question (ids `id`, `id_2`, ...), and maybe `system` and `samples_per_paraphrase`. A CSV has the column question and
    maybe question_id or id. Anything else is text with one question a line. A question without an id gets one from its words.

    Raises:
        StudyError: the file is missing, too large or malformed; a text is missing or empty; an id is malformed or there twice;
            it is a fetched file (`lib.upstream`) that was changed.
    """
    upstream.check(path)
    if not path.is_file():
        raise StudyError(f"{shown(path)}: not found.")
    if path.stat().st_size > _MAX_BYTES:
        raise StudyError(f"{shown(path)}: over {_MAX_BYTES:,} bytes; a question set is a page or two.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise StudyError(f"{shown(path)}: is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8.") from error
    head: Mapping[str, Any] = upstream.told(path)  # the upstream layout has no room for a relation
    if path.suffix.lower() in {".yaml", ".yml"}:
        content = _safe_yaml(text, path)
        if isinstance(content, dict):
            head, content = content, content.get("questions")
        items = _yaml_items(content, path)
    elif path.suffix.lower() == ".csv":
        items = _csv_items(text, path)
    else:
        items = [{"question": line} for line in text.split("\n") if line.strip()]
    return _question_set(head, items, path)


def _safe_yaml(text: str, path: Path) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise StudyError(f"{shown(path)}: is no valid YAML ({' '.join(str(error).split())[:300]}).") from error


def _yaml_items(content: Any, path: Path) -> list[dict[str, Any]]:
    """Turns our layout and the upstream one into items with id, question, system, topics, samples."""
    if not isinstance(content, list):
        raise StudyError(f"{shown(path)}: must be a list of questions, or a mapping that has one under `questions`.")
    items: list[dict[str, Any]] = []
    for number, entry in enumerate(content, start=1):
        place = f"{shown(path)}: question {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), str):
            raise StudyError(f"{place}: must be a mapping with id (a word) and text, or id and paraphrases.")
        texts = entry.get("paraphrases", [entry.get("text")])
        if not isinstance(texts, list) or not texts:
            raise StudyError(f"{place}: paraphrases: must be a list of texts.")
        shared = {"system": entry.get("system"), "topics": entry.get("topics"), "samples": entry.get("samples_per_paraphrase")}
        for copy, text in enumerate(texts, start=1):
            items.append({"id": entry["id"] if copy == 1 else f"{entry['id']}_{copy}", "question": text, **shared})
    return items


def _csv_items(text: str, path: Path) -> list[dict[str, Any]]:
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""))
        columns = list(reader.fieldnames or [])
        rows = list(reader)
    except csv.Error as error:
        raise StudyError(f"{shown(path)}: cannot be read as CSV ({error}).") from error
    if "question" not in columns:
        raise StudyError(f"{shown(path)}: needs a column question.")
    named = next((column for column in ("question_id", "id") if column in columns), None)
    return [{"question": row["question"], **({"id": row[named]} if named else {})} for row in rows]


def _slug(question: str) -> str:
    """Returns an id that depends on the question's text alone: its first words and four digits of its hash."""
    return "_".join([*re.findall(r"[a-z0-9]{1,20}", question.lower())[:4], files.sha256_text(question)[:4]])


def _question_set(head: Mapping[str, Any], items: list[dict[str, Any]], path: Path) -> QuestionSet:
    where, name = shown(path), path.stem
    kind, domain = head.get("relation", "general"), head.get("domain")
    if head.get("name", name) != name:
        raise StudyError(f"{where}: name: must be the file's name, {name}.")
    if kind not in KINDS:
        raise StudyError(f"{where}: relation: must be one of {', '.join(KINDS)}.")
    if (kind == "domain") != isinstance(domain, str):
        raise StudyError(f"{where}: domain: a set with relation: domain, and no other, names its domain.")
    questions: list[Question] = []
    seen: set[str] = set()
    for number, item in enumerate(items, start=1):
        question = _question(name, item, f"{where}: question {number}")
        if question.question_id in seen:
            raise StudyError(f"{where}: question {number}: id: {question.question_id} is there twice; answers could not be told apart.")
        seen.add(question.question_id)
        questions.append(question)
    if not questions:
        raise StudyError(f"{where}: holds no question.")
    return QuestionSet(name, questions, str(kind), domain, str(head.get("description", ""))[:1000])


def _question(name: str, item: Mapping[str, Any], place: str) -> Question:
    text, system, samples = item.get("question"), item.get("system"), item.get("samples")
    topics = item.get("topics") or []
    if not isinstance(text, str) or not text.strip():
        raise StudyError(f"{place}: has no text.")
    text = text.strip()
    identity = item.get("id", _slug(text))
    if not isinstance(identity, str) or not re.fullmatch(r"[\w.\-]{1,100}", identity):
        raise StudyError(f"{place}: id: must be a word of letters, digits, _ . or -.")
    if system is not None and not isinstance(system, str):
        raise StudyError(f"{place}: system: must be text.")
    if not isinstance(topics, list) or not all(isinstance(topic, str) for topic in topics):
        raise StudyError(f"{place}: topics: must be a list of words.")
    if samples is not None and (not isinstance(samples, int) or isinstance(samples, bool) or samples < 1):
        raise StudyError(f"{place}: samples_per_paraphrase: must be a whole number above 0.")
    return Question(name, identity, text, system, list(topics), samples)
