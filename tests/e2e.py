"""Playwright for the browser tests, outside of the project's environment: 54 MB that only these tests need.

It is installed once into the cache's e2e folder and put at the end of the module path, so that nothing there shadows the project's own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import Any

from lib import files, models

VERSION = "1.65.2"
CHROME = os.environ.get("BROWSER_PATH") or next(
    filter(None, map(shutil.which, ("chromium", "google-chrome", "google-chrome-stable", "chromium-browser"))), None
)


def playwright() -> Any:
    """Returns playwright.sync_api, installed first where it is not."""
    try:
        import playwright.sync_api
    except ImportError:
        folder = models.cache_dir() / "e2e" / f"playwright-{VERSION}-py{sys.version_info[0]}{sys.version_info[1]}"
        with files.lock(folder.parent / ".lock", what="the browser tests' Playwright"):
            if not (folder / ".done").is_file():
                shutil.rmtree(folder, ignore_errors=True)
                command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:"]
                subprocess.run([*command, "--target", str(folder), f"playwright=={VERSION}"], check=True)
                (folder / ".done").touch()
        sys.path.append(str(folder))
        import playwright.sync_api
    return playwright.sync_api
