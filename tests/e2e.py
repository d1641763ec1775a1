"""What only single tests need, outside of the project's environment: Playwright (54 MB) for the browser, Ray (240 MB) for the engines.

Each is installed once into the cache's e2e folder. Playwright's folder goes to the end of the module path, and Ray's holds no package
that the project has, so that nothing there shadows the project's own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from lib import files, models

VERSION = "1.65.2"
RAY_VERSION = "2.60.0"
CHROME = os.environ.get("BROWSER_PATH") or next(
    filter(None, map(shutil.which, ("chromium", "google-chrome", "google-chrome-stable", "chromium-browser"))), None
)


def playwright() -> Any:
    """Returns playwright.sync_api, installed first where it is not."""
    try:
        import playwright.sync_api
    except ImportError:
        folder = _installed(f"playwright-{VERSION}", [f"playwright=={VERSION}"])
        sys.path.append(str(folder))
        import playwright.sync_api
    return playwright.sync_api


def ray() -> Path:
    """Returns the folder that, on PYTHONPATH, gives a process Ray; fetched first where it is not."""
    words = [f"ray=={RAY_VERSION}", "msgpack>=1,<2", "protobuf>=3.20.3,<7"]
    return _installed(f"ray-{RAY_VERSION}", ["--no-deps", *words])  # the rest of what Ray needs the project has


def _installed(name: str, words: list[str]) -> Path:
    folder = models.cache_dir() / "e2e" / f"{name}-py{sys.version_info[0]}{sys.version_info[1]}"
    with files.lock(folder.parent / ".lock", what=f"the tests' {name}"):
        if not (folder / ".done").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:"]
            subprocess.run([*command, "--target", str(folder), *words], check=True)
            (folder / ".done").touch()
    return folder
