"""The record of a judge's calls, which is also their cache: an append-only JSONL that a crash cannot spoil."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from lib import files
from lib.files import StudyError
from lib.scoring import FINAL

KEYS = ("key", "judge", "metric", "status", "score", "raw", "logprobs", "usage", "time", "repeat", "rubric_sha256", "mode")
"""What every line holds, in this order."""

_SYNC_SECONDS = 1.0
_SHORTEST_SECRET = 6  # shorter ones are placeholders such as "none", which are ordinary words in a reply


class Journal:
    """An open judgments.jsonl.

    Each record is handed to the operating system as it comes, so a killed process loses nothing that it wrote; it is forced
    to disk once a second and at the end, so a power failure loses a second's worth.

    Attributes:
        records: the record that counts for each key: the last reply received, else the last error.
        tokens: prompt and reply tokens of all calls ever recorded, by judge and by whether they came in a batch.
    """

    def __init__(self, path: Path, secret: str) -> None:
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        self.tokens: dict[tuple[str, bool], list[int]] = {}
        self._secret = secret if len(secret) >= _SHORTEST_SECRET else ""
        for record in files.read_jsonl(path):
            self._keep(record)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("ab+")
        self._synced = time.monotonic()
        if self._stream.tell():
            self._stream.seek(-1, os.SEEK_END)
            if self._stream.read(1) != b"\n":  # a line that a crash tore: closed, so that the next one is whole
                self._stream.write(b"\n")

    def _keep(self, record: dict[str, Any]) -> None:
        key = record.get("key")
        if isinstance(key, str) and (record.get("status") in FINAL or self.records.get(key, {}).get("status") not in FINAL):
            self.records[key] = record
        usage = record.get("usage") or {}
        total = self.tokens.setdefault((str(record.get("judge")), "batch" in usage), [0, 0])
        for place, name in enumerate(("prompt_tokens", "completion_tokens")):
            total[place] += usage.get(name) or 0

    def write(self, records: Iterable[dict[str, Any]]) -> None:
        """Appends records; the secret, should a server have echoed it, is replaced by `[key]`.

        Raises:
            StudyError: the disk is full or the file cannot be written.
        """
        try:
            for record in records:
                told = {name: self._redacted(record[name]) for name in ("raw", "logprobs", "usage")}
                record = {name: record[name] for name in KEYS} | told
                self._stream.write(json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n")
                self._keep(record)
            self._stream.flush()
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                self.sync()
        except OSError as error:
            raise StudyError(f"{files.shown(self.path)}: cannot be appended to ({error.strerror}); free space, then run again.") from error

    def _redacted(self, value: Any) -> Any:
        """Replaces the secret in whatever a server said, at any depth."""
        if isinstance(value, str):
            return value.replace(self._secret, "[key]") if self._secret else value
        if isinstance(value, dict):
            return {self._redacted(name): self._redacted(entry) for name, entry in value.items()}
        return [self._redacted(entry) for entry in value] if isinstance(value, list | tuple) else value

    def sync(self) -> None:
        """Forces what was written to disk."""
        os.fsync(self._stream.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Forces everything to disk."""
        with contextlib.suppress(OSError):
            self._stream.flush()
            self.sync()
        self._stream.close()


def line(key: str, judge: str, metric: str, repeat: int, rubric_sha256: str, **told: Any) -> dict[str, Any]:
    """Returns a record that ended just now; `told` holds the rest of `KEYS`."""
    fixed = {"key": key, "judge": judge, "metric": metric, "repeat": repeat, "rubric_sha256": rubric_sha256}
    return fixed | {"time": datetime.now(UTC).isoformat(timespec="milliseconds")} | told


def sources(records: list[dict[str, Any]]) -> pd.DataFrame:
    """Says what the scores in a journal come from.

    Returns:
        A row for each judge, metric, mode and rubric: calls recorded, the models and fingerprints that servers returned, prompt and
        reply tokens, and when the first and the last call ended (UTC).
    """
    usage = ("prompt_tokens", "completion_tokens", "model", "system_fingerprint")
    table = pd.DataFrame([{**record, **(record["usage"] or {})} for record in records], columns=[*KEYS, *usage])
    grouped = table.groupby(["judge", "metric", "mode", "rubric_sha256"], sort=False, dropna=False)
    return grouped.agg(
        calls=("key", "size"),
        model=("model", _distinct),
        system_fingerprint=("system_fingerprint", _distinct),
        prompt_tokens=("prompt_tokens", "sum"),
        completion_tokens=("completion_tokens", "sum"),
        first=("time", "min"),
        last=("time", "max"),
    ).reset_index()


def answer_key(question: str, answer: str) -> str:
    """Returns the first half of a call's key: the hash of question and answer, the same for every judge and metric."""
    return files.sha256_text(json.dumps([question, answer], sort_keys=True))[:32]


def _distinct(values: Iterable[Any]) -> str:
    return ", ".join(sorted({str(value) for value in values if not pd.isna(value)}))


@contextlib.contextmanager
def opened(path: str | Path, secret: str = "") -> Iterator[Journal]:
    """Opens a journal for this process alone.

    Args:
        path: the JSONL; made if absent.
        secret: a key that must never be written.

    Raises:
        StudyError: another process judges into the same file.
    """
    path = Path(path)
    with files.lock(path.with_name(f".{path.name}.lock"), wait=False, what=f"the judgments of {files.shown(path.parent)}"):
        journal = Journal(path, secret)
        try:
            yield journal
        finally:
            journal.close()
