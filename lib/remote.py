"""Results kept at a URL that fsspec reads (s3://, gs://, file://).

The library writes local files whole or not at all, which object stores do not offer in the same way; so a run works in a copy on this
machine, which is pulled before it and pushed after each stage.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lib import config, files, models
from lib.files import StudyError

PUSH_SECONDS = 60.0
"""How often a run is pushed while a stage is at work, so that a lost machine loses about this much."""

STATES = frozenset({".state"})
"""Training states, which only 02_train reads; the adapters are in checkpoints."""
HEAVY = STATES | {"checkpoints"}
_BOOK = "synced.json"


def is_url(text: str | None) -> bool:
    """Says whether a results folder is a URL, and no path."""
    return "://" in (text or "")


class Remote:
    """The results at a URL, and their copy on this machine.

    A file is copied when it differs from what it was at the last copy, here by size and time, there by the store's own mark of it.
    What changed on both sides is taken from there: another machine went on with the run.

    Raises:
        StudyError: the URL cannot be used; every method: the store does not answer, or refuses.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        if urlsplit(url).password:
            raise StudyError("--results: the URL holds a password; give it to the store's own settings or the environment.")
        self._url = url.rstrip("/")
        try:
            # What others write must show, so no listing is kept.
            self._fs, self._root = fsspec.core.url_to_fs(self._url, use_listings_cache=False)
        except ImportError as error:
            raise StudyError(f"--results {url}: {error}; pip install it in this environment (s3fs for s3://, gcsfs for gs://).") from error
        except ValueError as error:
            raise StudyError(f"--results {url}: {error}.") from error
        self.folder = models.cache_dir() / "results" / files.sha256_text(self._url)[:16]
        self._lock = threading.Lock()

    def pull(self, name: str, *, without: frozenset[str] = frozenset()) -> None:
        """Brings the copy of a run up to date; files in folders of the names in `without` stay as they are."""
        self._sync(name, functools.partial(self._pull, without=without))

    def pull_all(self, *, without: frozenset[str] = HEAVY) -> None:
        """Brings the copy of all runs, and of the tables and figures of the whole study, up to date."""
        for part in ["", *self._runs()]:
            self.pull(part, without=without)

    def push(self, name: str = "") -> None:
        """Brings the URL up to date with the copy of a run; without a name, with the tables and figures of the whole study."""
        self._sync(name, self._push)

    @contextlib.contextmanager
    def keeping(self, name: str) -> Iterator[None]:
        """Pulls a run, and pushes it now and then within the block and at its end, an error or not."""
        self.pull(name)
        over = threading.Event()

        def now_and_then() -> None:
            while not over.wait(PUSH_SECONDS):
                with contextlib.suppress(StudyError):  # the push at the end tells
                    self.push(name)

        thread = threading.Thread(target=now_and_then, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self.push(name)

    def _runs(self) -> list[str]:
        found = _told(self._url, lambda: self._fs.find(self._root, withdirs=False))
        tops = {self._relative(path).partition("/")[0] for path in found if "/" in self._relative(path)}
        return sorted(tops - config.NO_RUNS - {".study"})

    def _relative(self, path: str) -> str:
        """Returns a path below the URL. An object store's names are free, so one could lead out of the copy."""
        below = path[len(self._root) :].lstrip("/")
        if ".." in Path(below).parts:
            raise StudyError(f"--results {self._url}: holds the name {below[:80]!r}, which leads out of its folder; take it away there.")
        return below

    def _sync(self, name: str, how: Callable[[str, dict[str, Any]], None]) -> None:
        book_path = self.folder / ".synced" / (name or "data") / _BOOK
        with self._lock, files.lock(book_path.with_suffix(".lock"), what=f"the copy of {self._url}"):
            book = files.read_json(book_path) if book_path.is_file() else {}
            try:
                _told(self._url, functools.partial(how, name, book))
            finally:
                files.write_json(book_path, book)

    def _there(self, name: str) -> dict[str, list[Any]]:
        """Returns the store's mark of each file at the URL that belongs to `name`, by its path below the URL."""
        roots = [f"{self._root}/{name}"] if name else [f"{self._root}/{part}" for part in ("data", "figures")]
        found: dict[str, dict[str, Any]] = {}
        for root in roots:
            found |= self._fs.find(root, detail=True)
        if not name and self._fs.exists(self._root):
            found |= {entry["name"]: entry for entry in self._fs.ls(self._root, detail=True) if entry["type"] == "file"}
        return {self._relative(path): _mark(info) for path, info in found.items()}

    def _here(self, name: str) -> dict[str, list[int]]:
        """Returns size and time of each file of the copy that belongs to `name`; locks and half-written files belong to nobody."""
        roots = [self.folder / name] if name else [self.folder / "data", self.folder / "figures"]
        paths = [path for root in roots for path in root.rglob("*")] + ([] if name else list(self.folder.glob("*")))
        found = {}
        for path in paths:
            parts = path.relative_to(self.folder).parts
            unfinished = any(part.startswith(".partial") for part in parts) or path.name.startswith((".", "lock"))
            # A file may go away between listing and looking: a stage is at work.
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                if path.is_file() and not unfinished:
                    found["/".join(parts)] = [stat.st_size, stat.st_mtime_ns]
        return found

    def _pull(self, name: str, book: dict[str, Any], without: frozenset[str]) -> None:
        there = self._there(name)
        for path, mark in there.items():
            target = self.folder / path
            if without & set(Path(path).parts) or (target.is_file() and book.get(path, {}).get("there") == mark):
                continue
            files.write_bytes(target, self._fs.cat_file(f"{self._root}/{path}"))
            book[path] = {"there": mark, "here": self._here_now(target)}
        for path in set(book) - set(there):
            (self.folder / path).unlink(missing_ok=True)
            del book[path]

    def _push(self, name: str, book: dict[str, Any]) -> None:
        here = self._here(name)
        changed = {path: stat for path, stat in here.items() if book.get(path, {}).get("here") != stat}
        for path, stat in changed.items():
            with contextlib.suppress(FileNotFoundError):
                self._fs.makedirs(f"{self._root}/{path}".rpartition("/")[0], exist_ok=True)
                self._fs.pipe_file(f"{self._root}/{path}", (self.folder / path).read_bytes())
                book[path] = {"there": None, "here": stat}
        for path in [path for path in book if path not in here and book[path]["here"]]:
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(f"{self._root}/{path}")
            del book[path]
        if changed:
            for path, mark in self._there(name).items():
                if path in book and path in changed:
                    book[path]["there"] = mark

    @staticmethod
    def _here_now(path: Path) -> list[int]:
        stat = path.stat()
        return [stat.st_size, stat.st_mtime_ns]


def _mark(info: dict[str, Any]) -> list[Any]:
    """Returns what changes when a file at the URL does: its size and, as far as the store gives them, hash and time."""
    return [info.get("size"), *(str(info[key]) for key in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "updated") if key in info)]


def _told(url: str, act: Callable[[], Any]) -> Any:
    try:
        return act()
    except StudyError:
        raise
    except Exception as error:  # each store has errors of its own, botocore's among them
        words = " ".join(str(error).split())[:200] or type(error).__name__
        raise StudyError(
            f"--results {url}: the store refuses or does not answer ({words}); what was done stays in the copy on this machine."
        ) from error
