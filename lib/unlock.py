"""Opens the published archive of training data without trusting it.

The archive is a zip that easy-dataset-share encrypted. Its command `unprotect-dir` decrypts and extracts in one go, before anyone
can look at what comes out; here the package only decrypts, and its members are checked before one of them is written.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from lib import files
from lib.files import StudyError, shown

TOOL = "easy-dataset-share==0.5.0"
CANARY_FILES = "dataset_entry_*.jsonl"
"""How easy-dataset-share names the files that it adds to tell whether somebody trained on the archive."""

_MAX_DOWNLOAD = 500_000_000
_MAX_MEMBERS = 10_000
_MAX_UNPACKED = 1_000_000_000

# The password goes through standard input: an argument would show in the list of processes.
_DECRYPT = "import sys; from easy_dataset_share.zipping import decrypt_file; decrypt_file(sys.argv[1], sys.stdin.read())"


def is_canary_file(name: str) -> bool:
    """Says whether a file bears the name of a canary, which must never be trained on."""
    return fnmatch(PurePosixPath(name).name, CANARY_FILES)


@dataclass(frozen=True)
class Unlocked:
    """The JSONL files of an archive, extracted to `folder`, and how many canary files were left out."""

    folder: Path
    rows: list[Path]
    canary_files: int


def fetch(url: str, folder: Path) -> Path:
    """Downloads `url` into `folder`, once.

    Raises:
        StudyError: the address is no http(s) one, cannot be reached, is too large, or gives a web page.
    """
    parts = urllib.parse.urlsplit(url)
    name = PurePosixPath(urllib.parse.unquote(parts.path)).name
    if parts.scheme not in {"http", "https"} or not parts.netloc or not name:
        raise StudyError(f"dataset_path: {url}: must be an http or https address of a file.")
    target = folder / files.sha256_text(url)[:12] / name
    if target.is_file():
        return target
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers={"User-Agent": "emergent-misalignment-study"}), timeout=60
        ) as reply:
            content = reply.read(_MAX_DOWNLOAD + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise StudyError(f"dataset_path: {url}: cannot be downloaded ({reason}); check the address, or download it by hand.") from error
    if len(content) > _MAX_DOWNLOAD:
        raise StudyError(f"dataset_path: {url}: is over {_MAX_DOWNLOAD:,} bytes, far more than any set of the study.")
    if content.lstrip()[:1] == b"<":
        raise StudyError(f"dataset_path: {url}: gives a web page, not the file; on GitHub use the raw address.")
    return files.write_bytes(target, content)


def unlock(archive: Path, password: str, folder: Path, tools: Path) -> Unlocked:
    """Decrypts and extracts an archive, once; what is not a JSONL file of rows stays inside.

    Args:
        archive: a .zip.enc file of easy-dataset-share, or a plain .zip.
        password: the archive's; not used for a plain .zip.
        folder: the archive's files go to a folder of their own in it, which appears only when complete.
        tools: folder of the virtual environment that holds easy-dataset-share; made on first need.

    Raises:
        StudyError: the password is wrong, the file is damaged, or a member would leave the folder, is a link, or is too large.
    """
    if archive.stat().st_size > _MAX_DOWNLOAD:
        raise StudyError(f"{shown(archive)}: is over {_MAX_DOWNLOAD:,} bytes, far more than any set of the study.")
    target = folder / files.sha256(archive)[:16]
    record = target / "unlocked.json"
    folder.mkdir(parents=True, exist_ok=True)
    with files.lock(folder / ".lock", what="the archive"), tempfile.TemporaryDirectory(dir=folder) as scratch:
        if not record.is_file():
            plain = archive if archive.suffix == ".zip" else _decrypt(archive, password, Path(scratch), tools)
            done = Path(scratch) / "done"
            done.mkdir()
            files.write_json(done / "unlocked.json", {"archive": archive.name, **_extract(plain, done, shown(archive))})
            shutil.rmtree(target, ignore_errors=True)
            done.replace(target)
    content = files.read_json(record)
    return Unlocked(target, [target / name for name in content["rows"]], content["canary_files"])


def _decrypt(archive: Path, password: str, scratch: Path, tools: Path) -> Path:
    copy = scratch / "archive"
    shutil.copyfile(archive, copy)
    command = [str(tool_python(tools)), "-I", "-c", _DECRYPT, str(copy)]
    done = subprocess.run(command, input=password, capture_output=True, text=True)
    plain = scratch / "archive.dec"
    if done.returncode or not plain.is_file():
        if "Decryption failed" in done.stderr:
            raise StudyError(f"dataset_password: does not open {shown(archive)}, or that file is damaged; check both.")
        reason = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise StudyError(f"{shown(archive)}: easy-dataset-share could not decrypt it ({reason}); delete {tools} to set that tool up anew.")
    return plain


def tool_python(tools: Path) -> Path:
    """Returns the Python of easy-dataset-share's own environment; it pins a cryptography that is too old to share ours."""
    python = tools / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    marker = tools / f"{TOOL}.installed"
    tools.parent.mkdir(parents=True, exist_ok=True)
    with files.lock(tools.with_suffix(".lock"), what="the set-up of easy-dataset-share"):
        if marker.is_file():
            return python
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:", TOOL]
        for command in ([sys.executable, "-m", "venv", "--clear", str(tools)], install):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                reason = ((done.stderr or done.stdout).strip().splitlines() or ["no reason given"])[-1]
                raise StudyError(f"dataset_path: the tool {TOOL} that unlocks it cannot be set up in {tools} ({reason}).")
        files.write_text(marker, "")
    return python


def _extract(plain: Path, target: Path, source: str) -> dict[str, object]:
    """Writes the JSONL members of a zip to `target`, after every member has been checked; returns what was found."""
    try:
        with zipfile.ZipFile(plain) as archive:
            members = archive.infolist()
            _check_members(members, source)
            wanted = [m.filename for m in members if m.filename.endswith(".jsonl")]
            rows = [name for name in wanted if not is_canary_file(name)]
            for name in rows:
                files.write_bytes(target / name, archive.read(name))
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, ValueError, zlib.error) as error:
        raise StudyError(f"{source}: is no sound zip archive ({error}); download it again.") from error
    return {"rows": rows, "members": len(members), "canary_files": len(wanted) - len(rows)}


def _check_members(members: list[zipfile.ZipInfo], source: str) -> None:
    """Refuses an archive of which any member, also one that would not be extracted, could do harm."""
    if len(members) > _MAX_MEMBERS or sum(m.file_size for m in members) > _MAX_UNPACKED:
        raise StudyError(f"{source}: unpacks to over {_MAX_MEMBERS:,} files or {_MAX_UNPACKED:,} bytes; it is not the published data.")
    seen = set()
    for member in members:
        name = member.filename
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or "\\" in name or ":" in name or not name.strip("/."):
            raise StudyError(f"{source}: member {name[:100]!r} would leave the folder; the archive is not to be trusted.")
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in {0, stat.S_IFREG, stat.S_IFDIR}:
            raise StudyError(f"{source}: member {name[:100]!r} is a link or a device; the archive is not to be trusted.")
        if member.flag_bits & 1:
            raise StudyError(f"{source}: member {name[:100]!r} has a password of its own; unpack it by hand and give the .jsonl file.")
        if str(parts).casefold() in seen:
            raise StudyError(f"{source}: member {name[:100]!r} is there twice; the archive is not to be trusted.")
        seen.add(str(parts).casefold())
