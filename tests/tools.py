"""Tools that only tests need and that would not fit the project's environment: each in a venv of its own, made once in the cache."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from lib import files, models


def venv(requirement: str) -> Path:
    """Returns the folder of a venv that holds `requirement` (pinned), made where it is not there yet."""
    name = f"{re.sub(r'[^A-Za-z0-9.]+', '-', requirement)}-py{sys.version_info[0]}{sys.version_info[1]}"
    folder = models.cache_dir() / "tools" / name
    with files.lock(folder.parent / ".lock", what="the tests' tools"):
        if not (folder / ".done").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            command = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:", requirement]
            subprocess.run([str(folder / "bin" / "python"), *command], check=True)
            (folder / ".done").touch()
    return folder
