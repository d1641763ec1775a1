"""Files that are whole or absent: atomic writes, append-only logs, locks, hashes and the study's one error type.

This module sits beneath every other and imports neither torch nor pandas, so that `study --help` stays quick.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
"""The repository root; relative paths in parameters resolve against it."""

TEXT_COLUMNS = ("model", "domain", "question_set", "question_id", "question", "response", "finish_reason")


class StudyError(Exception):
    """A problem the user can mend: the message names the file, the field and the mend in one or two lines."""


def resolve(path: str | Path) -> Path:
    """Returns `path` as an absolute path, taking a relative one from the repository root."""
    path = Path(path).expanduser()
    return path if path.is_absolute() else ROOT / path


def shown(path: str | Path) -> str:
    """Returns `path` as a person would write it: relative to the repository root where it lies below that."""
    path = Path(path)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Writes `content` to `path` whole or not at all: temporary file, fsync, rename.

    Raises:
        StudyError: the folder cannot be written, or the disk is full. A file that was there is left as it was.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{_beginning(path)}{os.getpid()}-")
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        _sweep(path)
    except OSError as error:
        raise StudyError(
            f"{shown(path)}: cannot be written ({error.strerror}); free space or make the folder writable, then run again."
        ) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    return path


def _beginning(path: Path) -> str:
    """How temporary names of this machine for `path` begin; another machine's processes have numbers of their own."""
    return f".{path.name}.{platform.node()}-"


def _sweep(path: Path) -> None:
    """Removes what processes of this machine that were killed as they wrote `path` left beside it."""
    beginning = _beginning(path)
    for left in path.parent.glob(f"{glob.escape(beginning)}*-*"):
        import psutil

        pid = left.name.removeprefix(beginning).partition("-")[0]
        with contextlib.suppress(OSError, OverflowError):
            if pid.isdecimal() and not psutil.pid_exists(int(pid)):
                left.unlink()


def write_text(path: str | Path, content: str) -> Path:
    """Writes text as UTF-8, whole or not at all; see `write_bytes`."""
    return write_bytes(path, content.encode("utf-8"))


def write_json(path: str | Path, content: Any) -> Path:
    """Writes `content` as indented JSON, whole or not at all; NaN is refused, since other readers reject it."""
    return write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_csv(path: str | Path, frame: pd.DataFrame) -> Path:
    """Writes a table as CSV without its index, whole or not at all."""
    # Every text is quoted: Python 3.11's writer leaves a lone carriage return bare, and readers then see a new row.
    return write_text(path, frame.to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC))


def read_json(path: str | Path) -> Any:
    """Reads JSON.

    Raises:
        StudyError: the file is missing or is no JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StudyError(f"{shown(path)}: not found; run the notebook that writes it first.") from error
    except ValueError as error:
        raise StudyError(f"{shown(path)}: is no valid JSON ({error}); delete it and rerun the notebook that writes it.") from error


def read_csv(path: str | Path) -> pd.DataFrame:
    """Reads a table of answers, keeping text as it is: an answer that reads `NA` or is empty stays that text.

    Raises:
        StudyError: the file is missing, empty or no CSV.
    """
    import pandas as pd

    path = Path(path)
    try:
        columns = list(pd.read_csv(path, nrows=0).columns)
        # pandas takes the words NA and null for missing values; in an answer they are text.
        missing = {column: ["", "nan", "NaN"] for column in columns if column not in TEXT_COLUMNS}
        text = {column: str for column in columns if column in TEXT_COLUMNS}
        frame = pd.read_csv(path, dtype=text, keep_default_na=False, na_values=missing)
    except FileNotFoundError as error:
        raise StudyError(f"{shown(path)}: not found; run the notebook that writes it first.") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise StudyError(f"{shown(path)}: cannot be read as CSV ({error}); delete it and rerun the notebook that writes it.") from error
    return frame


def append_jsonl(path: str | Path, record: dict[str, Any]) -> None:
    """Appends one record as a line and flushes it to disk. A torn last line left by a crash is closed first."""
    path = Path(path)
    line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as stream:
            if stream.tell() and _last_byte(stream) != b"\n":
                line = "\n" + line
            stream.write(line.encode("utf-8"))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise StudyError(f"{shown(path)}: cannot be appended to ({error.strerror}); free space or make the folder writable.") from error


def _last_byte(stream: Any) -> bytes:
    stream.seek(-1, os.SEEK_END)
    byte: bytes = stream.read(1)
    return byte


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Reads the whole lines of an append-only log; lines that a crash tore are skipped. A missing file is empty."""
    path = Path(path)
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records


def sha256(path: str | Path) -> str:
    """Returns the hex SHA-256 of a file's content."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    """Returns the hex SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


@contextlib.contextmanager
def lock(path: str | Path, *, wait: bool | float = True, what: str = "this run") -> Iterator[None]:
    """Holds an exclusive lock on `path` (a file beside what it guards); a dead process holds none.

    Args:
        path: the lock file; made if absent, and left in place.
        wait: wait for the holder (true), refuse at once (false), or refuse after so many seconds.
        what: named in the message of a refusal.

    Raises:
        StudyError: another process holds the lock, and `wait` is over.
    """
    import filelock

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(path, timeout=-1 if wait is True else float(wait)):
            yield
    except filelock.Timeout as error:
        raise StudyError(f"{shown(path)}: another process is working on {what}; wait for it, or stop it, then run again.") from error
