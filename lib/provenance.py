"""What a stage was made from: hashes of its parameters, code and input files, and the record that says whether it still holds.

A stage of a run is up to date when its last run succeeded with the parameters, the code and the inputs that are there now,
and wrote the files that are there now. The record of each stage lies in results/<run>/.study/<stage>.json.
"""

from __future__ import annotations

import ast
import functools
import io
import json
import os
import socket
import time
import tokenize
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lib import files
from lib.files import StudyError, shown

Stamp = dict[str, Any]
"""A file as it was: sha256, size (bytes) and mtime_ns; all None where it was absent."""


def read_notebook(path: Path) -> list[dict[str, Any]]:
    """Returns the cells of a notebook, each with its source as one text.

    Raises:
        StudyError: the file is missing or is no notebook.
    """
    cells = files.read_json(path).get("cells")
    if not isinstance(cells, list):
        raise StudyError(f"{shown(path)}: is no Jupyter notebook of format 4.")
    return [{**cell, "source": "".join(cell.get("source", ""))} for cell in cells]


def declared(path: Path) -> dict[str, Any]:
    """Returns the names and defaults that the cell tagged `parameters` of a notebook declares.

    Raises:
        StudyError: there is no such cell, or it holds more than assignments of plain values.
    """
    for cell in read_notebook(path):
        if "parameters" in cell.get("metadata", {}).get("tags", []):
            try:
                body = ast.parse(cell["source"]).body
                return {node.targets[0].id: ast.literal_eval(node.value) for node in body}
            except (SyntaxError, ValueError, AttributeError) as error:
                raise StudyError(f"{shown(path)}: its parameters cell may hold only lines like `seed = 42`.") from error
    raise StudyError(f"{shown(path)}: has no cell tagged parameters.")


def code_of(source: str) -> str:
    """Returns Python source without comments, docstrings and blank lines, none of which change what it does.

    A text that Python does not parse (a cell with a magic) is returned as it is.
    """
    try:
        tree = ast.parse(source)
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (SyntaxError, tokenize.TokenError):
        return source
    lines = source.splitlines()
    text_rows: set[int] = set()  # rows of texts over several lines, whose blank lines count
    for token in tokens:
        text_rows.update(range(token.start[0], token.end[0] + 1) if token.end[0] > token.start[0] else ())
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]]
    dropped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            rows = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            if not lines[node.lineno - 1][: node.col_offset].strip():
                dropped.update(rows)
    kept = [(row, line) for row, line in enumerate(lines, 1) if row not in dropped and (line.strip() or row in text_rows)]
    return "\n".join(line if row in text_rows else line.rstrip() for row, line in kept)


def code_hashes(notebook: Path, root: Path = files.ROOT) -> dict[str, str]:
    """Returns the SHA-256 of the code of a notebook and of every module of `lib` that it imports, directly or through another.

    Prose, comments and docstrings are left out (`code_of`), so that a mended sentence does not call for hours of training.

    Args:
        notebook: the notebook; its code cells count, without the defaults of its parameters, which a run overrides.
        root: the folder that holds lib/.
    """
    cells = [c for c in read_notebook(notebook) if c["cell_type"] == "code" and "parameters" not in c.get("metadata", {}).get("tags", [])]
    sources = [cell["source"] for cell in cells]
    looked = [_code(source) for source in sources]
    hashes = {f"notebooks/{notebook.name}": files.sha256_text("".join(sha for sha, _ in looked if sha != _NO_CODE))}
    waiting = {name for _, imported in looked for name in imported}
    while waiting:
        name = waiting.pop()
        path = root / "lib" / f"{name}.py"
        key = f"lib/{name}.py"
        if key not in hashes and path.is_file():
            hashes[key], imported = _code(path.read_text(encoding="utf-8"))
            waiting |= imported
    return dict(sorted(hashes.items()))


_NO_CODE = files.sha256_text("")


@functools.cache
def _code(source: str) -> tuple[str, frozenset[str]]:
    """Returns the SHA-256 of a source's code and the modules of lib that it imports; every stage of every run asks again."""
    return files.sha256_text(code_of(source)), frozenset(_imported(source))


def _imported(source: str) -> set[str]:
    """Names the modules of lib that a source imports anywhere, inside functions too."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        # Magics and shell lines stand at the left edge of a cell; what is left may still import.
        tree = ast.parse("\n".join(line for line in source.splitlines() if line.startswith(("from lib", "import lib"))))
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("lib.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "lib":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lib."):
            names.add(str(node.module).split(".")[1])
    return names


def stamps(paths: Mapping[str, Path], known: Mapping[str, Stamp] | None = None) -> dict[str, Stamp]:
    """Returns the stamp of each file, by name. A file whose size and time are those of its `known` stamp is not read again."""
    return {name: _stamp(path, (known or {}).get(name)) for name, path in sorted(paths.items())}


def _stamp(path: Path, known: Stamp | None) -> Stamp:
    if not path.is_file():
        return {"sha256": None, "size": None, "mtime_ns": None}
    stat = path.stat()
    same = known is not None and (known["size"], known["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns)
    return {"sha256": known["sha256"] if same and known else files.sha256(path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def differences(
    record: Mapping[str, Any], parameters: Mapping[str, Any], code: Mapping[str, str], inputs: Mapping[str, Stamp]
) -> list[str]:
    """Says in words what differs between a stage's record and the present; an empty list means that it still holds."""
    old = record["parameters"]
    reasons = [f"{n} was {old[n]!r}, is {parameters[n]!r}" for n in sorted({*old} & {*parameters}) if old[n] != parameters[n]]
    reasons += [f"parameter {n} is {'new' if n in parameters else 'gone'}" for n in sorted({*old} ^ {*parameters})]
    reasons += [f"{n} changed" for n in sorted({*record["code"], *code}) if record["code"].get(n) != code.get(n)]
    before, now = record["inputs"], inputs
    for name in sorted({*before, *now}):
        was, is_now = before.get(name, {}).get("sha256"), now.get(name, {}).get("sha256")
        if was != is_now:
            reasons.append(f"{name} {'is gone' if is_now is None else 'is new' if was is None else 'changed'}")
    return reasons


def damage(outputs: Mapping[str, Stamp], now: Mapping[str, Stamp]) -> list[str]:
    """Says which files that a stage wrote are gone or are no longer what it wrote."""
    wrong = [name for name in outputs if now[name]["sha256"] != outputs[name]["sha256"]]
    return [f"{name} {'is gone' if now[name]['sha256'] is None else 'is not what the stage wrote'}" for name in wrong]


def record_path(run: Path, stage: str) -> Path:
    """Returns results/<run>/.study/<stage>.json."""
    return run / ".study" / f"{stage}.json"


def read_record(run: Path, stage: str) -> dict[str, Any] | None:
    """Returns a stage's record, or None where there is none that can be read."""
    try:
        content = json.loads(record_path(run, stage).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and "status" in content else None


def write_record(run: Path, stage: str, record: Mapping[str, Any]) -> None:
    """Writes a stage's record, whole or not at all."""
    files.write_json(record_path(run, stage), record)


def this_process(pid: int | None = None) -> dict[str, Any]:
    """Names a process (by default this one) so that a later one can tell whether it still lives: pid, start time, host."""
    import psutil

    pid = pid or os.getpid()
    return {"pid": pid, "born": psutil.Process(pid).create_time(), "host": socket.gethostname()}


def lives(process: Mapping[str, Any] | None) -> bool:
    """Says whether the process named by `this_process` still runs; one on another host is taken to run."""
    import psutil

    if not process:
        return False
    if process["host"] != socket.gethostname():
        return True
    try:
        found = psutil.Process(process["pid"])
        return abs(found.create_time() - process["born"]) < 1 and found.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end_orphan(process: Mapping[str, Any] | None, seconds: float = 10) -> None:
    """Ends the kernel that a killed `study` left behind, and waits until it is gone, before the stage starts again.

    Kernels end by themselves about a second after their parent died, unless they are deep in a computation.
    """
    import psutil

    if process and process["host"] == socket.gethostname() and lives(process):
        orphan = psutil.Process(process["pid"])
        if any("ipykernel" in word for word in orphan.cmdline()):
            orphan.kill()
            deadline = time.monotonic() + seconds
            # psutil's own wait would not end where nobody reaps the dead, as in many containers.
            while lives(process) and time.monotonic() < deadline:
                time.sleep(0.05)


def now() -> str:
    """Returns the present time in UTC, to the second, as ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def under(folder: Path, patterns: Iterable[str]) -> dict[str, Path]:
    """Returns the files below `folder` that match any pattern, by their path relative to it.

    A pattern without wildcards always gives an entry, so that a file that is absent is known to be.
    """
    found: dict[str, Path] = {}
    for pattern in patterns:
        matches = sorted(folder.glob(pattern)) if "*" in pattern else [folder / pattern]
        found |= {str(path.relative_to(folder)): path for path in matches}
    return found
