"""`make lab` and `study label`: JupyterLab listens on loopback alone and asks for its token."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from lib.files import ROOT


def lab_words() -> list[str]:
    """What `make lab` would run, without its program."""
    done = subprocess.run(["make", "-n", "-o", ".venv/.setup-done", "lab"], cwd=ROOT, capture_output=True, text=True, check=True)
    [line] = [line for line in done.stdout.splitlines() if "jupyter lab" in line]
    return shlex.split(line)[2:]


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
def test_make_lab_listens_on_loopback_and_lets_nobody_in_without_its_token(tmp_path: Path) -> None:
    bare = {name: value for name, value in os.environ.items() if not name.startswith("JUPYTER")}
    bare |= {"HOME": str(tmp_path), "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime")}
    root = ["--allow-root"] if os.geteuid() == 0 else []
    line = [sys.executable, "-m", "jupyterlab", *lab_words()[:-1], str(tmp_path), "--no-browser", "--port=0", *root]
    process = subprocess.Popen(line, cwd=ROOT, env=bare, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (told := list((tmp_path / "runtime").glob("jpserver-*.json"))) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.2)
        own = json.loads(told[0].read_text())
        assert len(own["token"]) >= 40
        while not (sockets := [c for c in psutil.Process(process.pid).net_connections() if c.status == psutil.CONN_LISTEN]):
            time.sleep(0.2)
        assert {c.laddr.ip for c in sockets} == {"127.0.0.1"}
        address = f"http://127.0.0.1:{own['port']}/api/contents"
        while True:
            try:
                refused = status(address)
                break
            except urllib.error.URLError:
                time.sleep(0.2)
        assert refused == 403
        assert status(f"{address}?token={own['token']}") == 200
    finally:
        process.terminate()
        process.wait()


def test_no_command_takes_the_token_away_or_listens_elsewhere() -> None:
    for path in [ROOT / "Makefile", *sorted((ROOT / "lib").glob("*.py")), ROOT / "parameters" / "runpod.yaml"]:
        text = path.read_text()
        assert not re.search(r"0\.0\.0\.0|token=['\"]{2}|NotebookApp\.token|IdentityProvider\.token|disable_check_xsrf", text), path
    assert "--ip=127.0.0.1" in lab_words()
    assert '"--ip=127.0.0.1"' in (ROOT / "lib" / "commands.py").read_text()
