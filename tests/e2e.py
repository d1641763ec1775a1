"""What only single tests need, outside of the project's environment: Playwright and Voilà (60 MB) for the browser, Ray (240 MB).

Each is installed once into the cache's e2e folder, which goes to the end of the module path or holds no package that the project has,
so that nothing there shadows the project's own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lib import files, models

VERSION = "1.65.2"
RAY_VERSION = "2.60.0"
VOILA = "0.5.13"
CHROME = os.environ.get("BROWSER_PATH") or next(
    filter(None, map(shutil.which, ("chromium", "google-chrome", "google-chrome-stable", "chromium-browser"))), None
)


def playwright() -> Any:
    """Returns playwright.sync_api, installed first where it is not."""
    try:
        import playwright.sync_api
    except ImportError:
        sys.path.append(str(_installed("playwright", VERSION)))
        import playwright.sync_api
    return playwright.sync_api


@contextmanager
def chromium() -> Iterator[Any]:
    """Gives a headless Chromium."""
    with playwright().sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROME, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def watched(browser: Any, allowed: Callable[[str], bool], **options: Any) -> Iterator[Any]:
    """Gives a page whose `troubles` lists what should never happen: dialogs, errors, requests for addresses that are not allowed."""
    page = browser.new_context(**options).new_page()
    page.troubles = []
    page.on("dialog", lambda d: (page.troubles.append(f"dialog: {d.message}"), d.dismiss()))
    page.on("pageerror", lambda e: page.troubles.append(f"error: {e}"))
    page.on("console", lambda m: page.troubles.append(m.text) if m.type == "error" else None)
    page.on("request", lambda r: None if allowed(r.url) else page.troubles.append(r.url))
    yield page
    page.context.close()


def ray() -> Path:
    """Returns the folder that, on PYTHONPATH, gives a process Ray; what else Ray needs the project has."""
    return _installed("ray", RAY_VERSION, "--no-deps", "msgpack>=1,<2", "protobuf>=3.20.3,<7")


def voila() -> Path:
    """Returns a folder for the end of PYTHONPATH that holds Voilà, without what JupyterLab has brought already."""
    return _installed("voila", VOILA, "--no-deps", "websockets")


def _installed(name: str, version: str, *words: str) -> Path:
    """Returns the folder of a package in the cache, installed first where it is not."""
    folder = models.cache_dir() / "e2e" / f"{name}-{version}-py{sys.version_info[0]}{sys.version_info[1]}"
    with files.lock(folder.parent / ".lock", what=f"the tests' {name}"):
        if not (folder / ".done").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:"]
            subprocess.run([*command, "--target", str(folder), f"{name}=={version}", *words], check=True)
            (folder / ".done").touch()
    return folder
