"""Tools that only tests need and that would not fit the project's environment: each in a venv of its own, made once in the cache.

uv makes them: it takes seconds where pip takes minutes. uv knows nothing of pip's settings, so pip's index is handed to it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from lib import files, models

UV = "uv==0.13.9"


def index() -> dict[str, str]:
    """Returns the environment in which uv asks the index that pip asks."""
    set_ = subprocess.run([sys.executable, "-m", "pip", "config", "get", "global.index-url"], capture_output=True, text=True)
    url = os.environ.get("PIP_INDEX_URL") or (set_.stdout.strip() if set_.returncode == 0 else "")
    return os.environ | ({"UV_DEFAULT_INDEX": url} if url else {})


def uv() -> Path:
    """Returns the program uv."""
    return (
        _made(UV, [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--prefix"])
        / "bin"
        / "uv"
    )


def venv(requirement: str) -> Path:
    """Returns the folder of a venv that holds `requirement` (pinned), made where it is not there yet."""
    return _made(requirement, [str(uv()), "pip", "install", "--no-config", "--quiet", "--only-binary", ":all:", "--python"])


def _made(requirement: str, command: list[str]) -> Path:
    name = f"{re.sub(r'[^A-Za-z0-9.]+', '-', requirement)}-py{sys.version_info[0]}{sys.version_info[1]}"
    folder = models.cache_dir() / "tools" / name
    with files.lock(folder.parent / f".{name}.lock", what="the tests' tools"):
        if not (folder / ".done").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            if "--python" in command:
                subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
            subprocess.run([*command, str(folder), requirement], check=True, env=index())
            (folder / ".done").touch()
    return folder
