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
    """Returns the environment in which uv and pip-audit ask the index that pip asks, by the certificates that pip trusts."""
    cert = _pip("cert")
    found = {"UV_DEFAULT_INDEX": _pip("index-url"), "UV_SYSTEM_CERTS": "1", "SSL_CERT_FILE": cert, "REQUESTS_CA_BUNDLE": cert}
    return os.environ | {name: value for name, value in found.items() if value}


def _pip(name: str) -> str:
    """Returns a setting of pip from the environment or its files, or nothing."""
    own = os.environ.get(f"PIP_{name.upper().replace('-', '_')}")
    asked = [sys.executable, "-m", "pip", "config", "get", f"global.{name}"]
    return own or subprocess.run(asked, capture_output=True, text=True).stdout.strip()


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
