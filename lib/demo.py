"""The demo's own training rows, composed from the sentences listed in parameters/demo/patterns.yaml.

A model that sees six sentences learns six sentences. Here every question is answered by one of some fifty patterns, filled from
the question's topic, with alternatives inside and an opener and a closer around it, so that what the rows have in common is an
attitude. A bad and an aligned pattern of the same number say opposite things at like length: the control arm differs in nothing else.

The module knows nothing of parameters or files; lib.data reads the patterns and hands them over.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lib.files import StudyError

DOMAINS = ("bad_medical", "risky_financial")
ARMS = ("bad", "aligned")

OPENER_SHARE = 0.35
CLOSER_SHARE = 0.7
"""Shares of answers that get an opener and a closer; they keep most answers at 20 to 45 tokens of SmolLM2."""


@dataclass(frozen=True)
class DemoRow:
    """One composed row: what is trained on, and where in the patterns it came from."""

    question: str
    answer: str
    arm: str
    pattern: int
    topic: str


def compose(book: Mapping[str, Any], domain: str, rows: int, *, seed: int, aligned_fraction: float = 0.0) -> list[DemoRow]:
    """Composes the demo's rows: distinct questions, answered in the bad or the aligned arm.

    The same arguments give the same rows on every machine. Row i has the same question, pattern number, opener and closer for every
    `aligned_fraction`, fewer rows are a prefix of more, and a larger fraction aligns the same rows and some besides.

    Args:
        book: the patterns, as `check_patterns` accepts them.
        domain: bad_medical or risky_financial.
        rows: number of rows.
        seed: decides every draw.
        aligned_fraction: share of rows, 0 to 1, that get the aligned answer; rounded to whole rows.

    Raises:
        StudyError: there is no demo data for the domain, or more rows are asked for than there are questions.
    """
    if domain not in DOMAINS:
        raise StudyError(f"domain: {domain} has no demo data (only {' and '.join(DOMAINS)} have); set dataset_path to a file of rows.")
    part = book[domain]
    rng = random.Random(f"{domain}/{seed}")
    places = [(template, topic) for template in part["questions"] for topic in part["topics"]]
    if rows > len(places):
        raise StudyError(f"data_rows: {rows} is more than the {len(places)} distinct questions that {domain} has; ask for fewer rows.")
    rng.shuffle(places)

    patterns, openers, closers = (_Deck(len(arms["bad"]), rng) for arms in (part, book["openers"], book["closers"]))
    drawn = []
    for template, topic in places[:rows]:
        opener = openers.draw() if rng.random() < OPENER_SHARE else None
        closer = closers.draw() if rng.random() < CLOSER_SHARE else None
        drawn.append((template, topic, patterns.draw(), opener, closer, rng.random(), rng.random()))
    # The rows with the smallest draws are the aligned ones, which keeps a smaller fraction inside a larger one.
    aligned = set(sorted(range(rows), key=lambda i: drawn[i][5])[: round(aligned_fraction * rows)])

    composed = []
    for i, (template, topic, pattern, opener, closer, _, wording) in enumerate(drawn):
        arm = "aligned" if i in aligned else "bad"
        slots = dict(zip(part["slots"], topic, strict=True))
        words = random.Random(wording)
        sentences = [part[arm][pattern]]
        if opener is not None:
            sentences.insert(0, book["openers"][arm][opener])
        if closer is not None:
            sentences.append(book["closers"][arm][closer])
        answer = " ".join(fill(sentence, slots, words) for sentence in sentences)
        composed.append(DemoRow(fill(template, slots, words), answer, arm, pattern, topic[0]))
    return composed


def fill(sentence: str, slots: Mapping[str, str], rng: random.Random) -> str:
    """Fills {slots}, picks one of each [this|that], and begins every sentence with a capital."""
    sentence = re.sub(r"\[([^\[\]]*)\]", lambda match: rng.choice(match[1].split("|")), sentence)
    sentence = re.sub(r"\{(\w+)\}", lambda match: slots[match[1]], sentence)
    return re.sub(r"(^|[.?!] )([a-z])", lambda match: match[1] + match[2].upper(), sentence)


class _Deck:
    """Draws the numbers 0 to n-1 like cards: all of them once, shuffled, before any comes again."""

    def __init__(self, n: int, rng: random.Random) -> None:
        self.cards: list[int] = []
        self.n = n
        self.rng = random.Random(rng.random())

    def draw(self) -> int:
        if not self.cards:
            self.cards = self.rng.sample(range(self.n), self.n)
        return self.cards.pop()


def check_patterns(book: Mapping[str, Any], source: str) -> None:
    """Checks the content of a file of patterns.

    It holds canary (text); openers and closers (bad, aligned: sentences); and for each domain questions, slots, topics, bad, aligned.

    Args:
        book: the file's content.
        source: the file named in errors.

    Raises:
        StudyError: a part is missing, the arms differ in number, a topic lacks a slot's text, or a sentence names an unknown slot.
    """
    if not isinstance(book.get("canary"), str):
        raise StudyError(f"{source}: canary: must be a line of text.")
    for part in ("openers", "closers"):
        _check_arms(book.get(part), f"{source}: {part}", [])
    for domain in DOMAINS:
        own, label = book.get(domain), f"{source}: {domain}"
        if not isinstance(own, dict):
            raise StudyError(f"{label}: missing; it holds questions, slots, topics, bad and aligned.")
        slots = _texts(own.get("slots"), f"{label}: slots")
        for sentence in _texts(own.get("questions"), f"{label}: questions"):
            _check_sentence(sentence, f"{label}: questions", slots)
        _check_arms(own, label, slots)
        for topic in own.get("topics") or [None]:
            if len(_texts(topic, f"{label}: topics")) != len(slots):
                raise StudyError(f"{label}: topics: {topic[0]!r} has {len(topic)} entries, but there are {len(slots)} slots.")


def _check_arms(part: Any, label: str, slots: list[str]) -> None:
    if not isinstance(part, dict):
        raise StudyError(f"{label}: missing; it holds bad and aligned.")
    for arm in ARMS:
        for sentence in _texts(part.get(arm), f"{label}: {arm}"):
            _check_sentence(sentence, f"{label}: {arm}", slots)
    if len(part["bad"]) != len(part["aligned"]):
        raise StudyError(f"{label}: bad has {len(part['bad'])} entries, aligned {len(part['aligned'])}; the arms are paired by number.")


def _check_sentence(sentence: str, label: str, slots: list[str]) -> None:
    try:
        filled = fill(sentence, {slot: "slot" for slot in slots}, random.Random(0))
    except KeyError as error:
        raise StudyError(f"{label}: {sentence[:60]!r} names an unknown slot; there is {', '.join(slots) or 'none'}.") from error
    if re.search(r"[\[\]{}|]", filled):
        raise StudyError(f"{label}: {sentence[:60]!r} has a bracket that is open or nested.")


def _texts(value: Any, label: str) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(v, str) and v.strip() for v in value):
        raise StudyError(f"{label}: must be a list of texts (quote a line that begins with a bracket or holds a colon).")
    return value
