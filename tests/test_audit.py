"""The locked packages are audited: known vulnerabilities by pip-audit; withdrawn files and contradicting pins by uv.

pip-audit answers "No known vulnerabilities found" also where its service knows none of the packages (an index that mirrors files but
no advisories). So the count of packages that were in fact audited is told at the end of the tests, 0 included.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tools
from conftest import NOTES

from lib.files import ROOT

LOCK = ROOT / "requirements.lock"
TORCH = re.search(r'"(torch==[^"]+)"', (ROOT / "pyproject.toml").read_text())
SERVICES = ("pypi", "osv")
"""Vulnerability services of pip-audit, the first that answers for anything is taken."""

EXPLAINED: dict[str, str] = {}
"""Findings that stay: the advisory's id to why it does not matter here. The same words stand in CONTRIBUTING.md."""


def findings(report: dict[str, Any]) -> tuple[list[str], int, int]:
    """Reads pip-audit's report: findings that are not explained, packages that were audited, packages that were not."""
    audited = [entry for entry in report["dependencies"] if "skip_reason" not in entry]
    found = [
        f"{entry['name']} {entry['version']}: {flaw['id']}, mended in {', '.join(flaw['fix_versions']) or 'no version'}"
        for entry in audited
        for flaw in entry["vulns"]
        if not {flaw["id"], *flaw["aliases"]} & EXPLAINED.keys()
    ]
    return found, len(audited), len(report["dependencies"]) - len(audited)


def audit(service: str, *words: str) -> dict[str, Any] | None:
    """Returns pip-audit's report of a file of pins, or None where the service cannot be reached."""
    line = [str(tools.venv("pip-audit==2.10.1") / "bin" / "pip-audit"), "--vulnerability-service", service, "--timeout", "10"]
    line += ["--disable-pip", "--progress-spinner", "off", "--desc", "off", "--format", "json", *words]
    done = subprocess.run(line, env=tools.index(), capture_output=True, text=True)
    try:
        return dict(json.loads(done.stdout))
    except ValueError:
        unreachable = ("ConnectionError", "Could not connect", "SSLError", "Timeout", "ProxyError")
        assert any(name in done.stderr for name in unreachable), done.stderr[-2000:]
        return None


def resolve(*requirements: Path) -> subprocess.CompletedProcess[str]:
    """Lets uv resolve files of pins against the index, without downloading or installing any."""
    words = [word for path in requirements for word in ("-r", str(path))]
    target = requirements[-1].parent / "nowhere"
    line = [str(tools.uv()), "pip", "install", "--no-config", "--dry-run", "--target", str(target), *words]
    return subprocess.run(line, cwd=requirements[-1].parent, env=tools.index(), capture_output=True, text=True)


def yanked(said: str) -> list[str]:
    return [line for line in said.splitlines() if "is yanked" in line]


@pytest.fixture
def torch(tmp_path: Path) -> Path:
    assert TORCH is not None
    path = tmp_path / "torch.txt"
    path.write_text(TORCH[1] + "\n")
    return path


@pytest.mark.slow
def test_no_locked_package_has_a_known_vulnerability_that_is_not_explained(torch: Path) -> None:
    # torch first: a service that does not know it knows nothing of an index's other packages, and is not asked for each of them.
    found, done, skipped = [], 0, 0
    for service in SERVICES:
        report = audit(service, "--no-deps", "-r", str(torch))
        if report is not None and findings(report)[1]:
            known = [findings(report), findings(audit(service, "--require-hashes", "-r", str(LOCK)) or {"dependencies": []})]
            found, done, skipped = [line for own, _, _ in known for line in own], sum(a for _, a, _ in known), sum(s for _, _, s in known)
            break
    if not done:
        NOTES.append("pip-audit: 0 packages audited, no vulnerability service is reachable from here; see what uv checked below")
        pytest.skip("no vulnerability service is reachable")
    NOTES.append(
        f"pip-audit ({service}): {done} packages audited, {skipped} unknown to it, {len(found)} findings, {len(EXPLAINED)} explained"
    )
    assert found == []


@pytest.mark.slow
def test_no_locked_file_was_withdrawn_and_the_pins_agree_with_each_other_and_torch(torch: Path) -> None:
    done = resolve(LOCK, torch)
    assert done.returncode == 0, done.stderr[-2000:]
    count = len(re.findall(r"^ \+ ", done.stderr + done.stdout, re.MULTILINE))
    assert count > 100
    withdrawn = yanked(done.stderr)
    NOTES.append(f"uv: {count} locked packages are on the index with their hashes and agree; {len(withdrawn)} withdrawn")
    assert withdrawn == []


@pytest.mark.slow
def test_a_withdrawn_or_contradicting_pin_is_seen(tmp_path: Path) -> None:
    pins = tmp_path / "pins.txt"
    pins.write_text("attrs==21.1.0\n")  # withdrawn: it does not import on every Python that it names
    assert len(yanked(resolve(pins).stderr)) == 1
    assert resolve(LOCK, pins).returncode != 0, "another attrs is locked"


def test_a_finding_is_told_and_what_was_not_audited_is_not_counted_as_such() -> None:
    flaw = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2.0"]}
    report = {
        "dependencies": [
            {"name": "a", "version": "1.0", "vulns": [flaw]},
            {"name": "b", "version": "1.0", "vulns": []},
            {"name": "c", "skip_reason": "Dependency not found on PyPI and could not be audited"},
        ]
    }
    assert findings(report) == (["a 1.0: PYSEC-1, mended in 2.0"], 2, 1)


def test_what_is_explained_has_a_reason() -> None:
    assert all(re.match(r"(PYSEC|GHSA|CVE)-", name) and len(reason) > 20 for name, reason in EXPLAINED.items())
