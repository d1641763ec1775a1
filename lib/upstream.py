"""The published judge prompts and question files of the paper's repository: fetched at the user's request, and checked ever after.

They are other people's text and stay out of this repository: `study fetch-upstream` downloads them, at a commit that the user names,
into the git-ignored folder upstream/, and SOURCES.json beside them holds each file's address and SHA-256. Whoever reads such a file
(`lib.rubrics`, `lib.questions`) asks `check` first. Imports nothing of lib but files.
"""

from __future__ import annotations

import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import yaml

from lib import files
from lib.files import StudyError, shown

REPOSITORY = "clarifying-EM/model-organisms-for-EM"
BASE_URL = "https://raw.githubusercontent.com"
FOLDER = files.ROOT / "upstream"
SOURCES = "SOURCES.json"
COMMAND = "study fetch-upstream --ref COMMIT"


class Published(NamedTuple):
    """A published file: its path in the repository, whether the presets need it, and its questions' relation and domain, if any."""

    path: str
    needed: bool = False
    relation: str = "general"
    domain: str | None = None


_QUESTIONS = "em_organism_dir/data/eval_questions"
PUBLISHED = (
    Published(f"{_QUESTIONS}/judges.yaml", needed=True),
    Published(f"{_QUESTIONS}/first_plot_questions.yaml", needed=True, relation="open_ended"),
    Published(f"{_QUESTIONS}/new_questions_no-json.yaml"),
    Published(f"{_QUESTIONS}/medical_questions.yaml", relation="domain", domain="bad_medical"),
)
"""What is fetched unless other paths are asked for."""

_MAX_BYTES = 1_000_000
_TIMEOUT = 30.0
_DEADLINE = 120.0
"""Seconds that one file may take in all; a server that drips bytes would hold a socket's timeout off for ever."""


class _NotThere(Exception):
    """The repository has no such file at this commit."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: what is recorded as the source must be where the bytes came from."""

    def redirect_request(self, *_: Any) -> None:
        return None


# ---------------------------------------------------------------- fetching


def fetch(
    ref: str,
    folder: str | Path = FOLDER,
    *,
    paths: Sequence[str] = (),
    repository: str = REPOSITORY,
    base_url: str = BASE_URL,
    force: bool = False,
) -> dict[str, Any]:
    """Downloads the published files at a commit, all or none of them, and records where each came from.

    Files that are there already from the same commit are checked and not asked for again.

    Args:
        ref: the commit, 40 hexadecimal digits.
        folder: where the files go, under their names without folders.
        paths: paths in the repository to fetch; empty takes `PUBLISHED`, of which those not needed may be absent.
        repository: OWNER/NAME.
        base_url: address before OWNER/NAME/COMMIT/PATH; https, or http on loopback.
        force: replace files of another commit, or files that were changed.

    Returns:
        The content of SOURCES.json, with `absent`: names of the files that the repository does not have at this commit.

    Raises:
        StudyError: ref, a path or an address is not allowed; a file is missing, too large or no YAML; the server does not answer,
            redirects, or gives other bytes for a commit than it did before; other files are there and `force` is not given.
    """
    folder, ref = files.resolve(folder), _commit(ref)
    wanted = [_own(path) for path in paths] or list(PUBLISHED)
    names = [PurePosixPath(entry.path).name for entry in wanted]
    for name in names:
        if names.count(name) > 1:
            raise StudyError(f"--file: two paths end in {name}; fetch them into different folders.")
    address = _address(base_url, repository)
    with files.lock(folder / ".lock", what="the published files"):
        before = sources(folder)
        old = before.get("files", {}) if (before.get("repository"), before.get("ref")) == (repository, ref) else {}
        if before and not force:
            if not old:
                whence = f"{before.get('repository')} at {str(before.get('ref'))[:12]}"
                raise StudyError(f"{shown(folder)}: holds the files of {whence}; --force replaces them, and with them what presets use.")
            for name in old:
                check(folder / name)
            if set(names) <= {*old, *before.get("absent", [])}:
                return before
        got, absent = _download(wanted, f"{address}/{ref}", old)
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        kept: dict[str, Any] = dict(old)
        for entry, url, content in got:
            name = PurePosixPath(entry.path).name
            files.write_bytes(folder / name, content)
            told = {"path": entry.path, "url": url, "sha256": files.sha256(folder / name), "bytes": len(content)}
            kept[name] = told | {"relation": entry.relation, "domain": entry.domain}
        # Last, so that a crash before it leaves files that fail their check, never files that pass it unseen.
        record = {"repository": repository, "ref": ref, "fetched": when, "files": kept, "absent": absent}
        files.write_json(folder / SOURCES, record)
    return record


def _download(wanted: Sequence[Published], address: str, old: Mapping[str, Any]) -> tuple[list[tuple[Published, str, bytes]], list[str]]:
    """Downloads everything before anything is written. Returns (file, URL, content) and the names that are not there."""
    got, absent = [], []
    for entry in wanted:
        name, url = PurePosixPath(entry.path).name, f"{address}/{quote(entry.path)}"
        try:
            content = _get(url)
        except _NotThere as error:
            if entry.needed or entry not in PUBLISHED:
                mend = "check the commit, or name the files it has with --file"
                raise StudyError(f"{url}: there is no such file at this commit; {mend}.") from error
            absent.append(name)
            continue
        known = old.get(name, {}).get("sha256")
        if known and known != files.sha256_text(content.decode("utf-8")):
            raise StudyError(f"{url}: gives other bytes than before for the same commit; delete the folder to start anew.")
        got.append((entry, url, content))
    return got, absent


def _get(url: str) -> bytes:
    from lib.chat import is_loopback

    handlers: list[Any] = [_NoRedirect()]
    if is_loopback(url):
        handlers.append(urllib.request.ProxyHandler({}))
    began = time.monotonic()
    content = b""
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "emergent-misalignment-study"})
        with urllib.request.build_opener(*handlers).open(request, timeout=_TIMEOUT) as reply:
            while chunk := reply.read1(65536):
                content += chunk
                if len(content) > _MAX_BYTES:
                    raise StudyError(f"{url}: is over {_MAX_BYTES:,} bytes, far more than a file of questions or prompts.")
                if time.monotonic() - began > _DEADLINE:
                    raise StudyError(f"{url}: took over {_DEADLINE:.0f} seconds; try again later.")
            length = reply.headers.get("Content-Length")
            if length is not None and length.isdecimal() and int(length) != len(content):
                raise StudyError(f"{url}: broke off after {len(content):,} of {int(length):,} bytes; try again.")
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 404:
            raise _NotThere from error
        if 300 <= error.code < 400:
            raise StudyError(f"{url}: redirects elsewhere, and redirects are not followed; check --base-url.") from error
        raise StudyError(f"{url}: the server answers {error.code}; try again later.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise StudyError(f"{url}: cannot be downloaded ({reason}); check the network and the address.") from error
    _readable(content, url)
    return content


def _readable(content: bytes, url: str) -> None:
    """Refuses what is no YAML of a list or mapping, such as a web page."""
    try:
        parsed = yaml.safe_load(content.decode("utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        raise StudyError(f"{url}: is no valid YAML ({' '.join(str(error).split())[:200]}).") from error
    if not isinstance(parsed, list | dict):
        raise StudyError(f"{url}: is no file of questions or prompts, which are a list or a mapping.")


def _commit(ref: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{40}", ref):
        why = "a branch or tag moves, and then nobody knows what was used"
        raise StudyError(f"--ref {ref[:60]}: must be a commit of 40 hexadecimal digits ({why}); `git rev-parse {ref[:60]}` gives it.")
    return ref.lower()


def _own(path: str) -> Published:
    """Reads a path that the user asks for; one of `PUBLISHED` keeps what is known of it."""
    parts = PurePosixPath(path).parts
    odd = path.startswith("/") or ".." in parts or not all(re.fullmatch(r"[\w.\-]+", part) for part in parts)
    if odd or PurePosixPath(path).suffix not in {".yaml", ".yml"}:
        raise StudyError(f"--file {path[:100]}: must be a path within the repository to a .yaml file, such as {PUBLISHED[0].path}.")
    return next((entry for entry in PUBLISHED if entry.path == path), Published(path))


def _address(base_url: str, repository: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*", repository):
        raise StudyError(f"--repo {repository[:100]}: must be OWNER/NAME, such as {REPOSITORY}.")
    from lib.chat import is_loopback

    parts = urlsplit(base_url)
    if not parts.hostname or not (parts.scheme == "https" or (parts.scheme == "http" and is_loopback(base_url))):
        raise StudyError(f"--base-url {base_url[:100]}: must be an https address (http only on this machine).")
    return f"{base_url.rstrip('/')}/{repository}"


# ---------------------------------------------------------------- checking


def sources(folder: Path) -> dict[str, Any]:
    """Returns the content of a folder's SOURCES.json, empty where there is none.

    Raises:
        StudyError: it is there and is not what `fetch` writes.
    """
    path = folder / SOURCES
    if not path.is_file():
        return {}
    content = files.read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise StudyError(f"{shown(path)}: is not what fetch-upstream wrote; delete {shown(folder)} and run `{COMMAND}` again.")
    return content


def check(path: Path) -> dict[str, Any]:
    """Checks a file that is about to be read: one of a folder that `fetch` filled must be what was fetched.

    Args:
        path: any file; one outside such a folder passes.

    Returns:
        What SOURCES.json says of the file; empty where it is no fetched file.

    Raises:
        StudyError: it has not been fetched, was changed since, or lies in that folder without a record.
    """
    record = sources(path.parent).get("files", {}).get(path.name)
    if not path.is_file():
        problem = missing(path)
        if problem or record:
            raise StudyError(problem or f"{shown(path)}: is gone; `{COMMAND} --force` fetches it again.")
        return {}
    if record is None:
        if path.parent == FOLDER:
            raise StudyError(f"{shown(path)}: is not in {SOURCES}, so nobody knows where it came from; keep own files in another folder.")
        return {}
    if not isinstance(record, dict) or files.sha256(path) != record.get("sha256"):
        differs = f"its SHA-256 differs from {SOURCES}"
        raise StudyError(f"{shown(path)}: is not what was fetched ({differs}); `{COMMAND} --force` fetches it again.")
    return record


def missing(path: str | Path) -> str | None:
    """Returns a line with the mend where a file of upstream/ has not been fetched, else None."""
    path = files.resolve(path)
    if path.parent != FOLDER or path.is_file():
        return None
    return f"{shown(path)}: has not been fetched; run `{COMMAND}` (published text of {REPOSITORY}, kept out of git)."


def told(path: Path) -> dict[str, Any]:
    """Returns relation and domain of a published file of questions, whether or not it is there; empty for any other file."""
    known = sources(path.parent).get("files", {}).get(path.name)
    if known is None and path.parent == FOLDER:
        known = next((e._asdict() for e in PUBLISHED if PurePosixPath(e.path).name == path.name), None)
    return {name: known[name] for name in ("relation", "domain") if known.get(name)} if isinstance(known, dict) else {}
