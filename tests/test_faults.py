"""Faults over all stages of a small run: after a rerun the tables are those of an undisturbed run, and nothing ok was done twice.

`make test` kills at five seeded moments, one in each stage, `make test-all` at twenty (STUDY_FAULTS=20). One kill hits a real `study run`.
What happened is told in a line at the end of the tests (conftest.FIGURES).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fault_runs
import faulty_server
import pytest
from conftest import FIGURES
from fault_runs import STAGES, TABLES, Helper
from faulty_server import FaultyServer, completion

from lib import files

MOMENTS = int(os.environ.get("STUDY_FAULTS", "5"))
CONCURRENCY = 2

pytestmark = pytest.mark.slow


def scores(prompt: str) -> dict[str, Any]:
    """A deterministic judge whose score depends on what it is asked."""
    return completion(str(int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 101))


class Lab:
    """A copy of the repository with a pair of its own, a judge, and the results of an undisturbed run."""

    def __init__(self, tree: Path, helper: Helper, server: FaultyServer) -> None:
        self.tree, self.helper, self.server = tree, helper, server
        self.took: dict[str, float] = {}
        self.expected: dict[str, bytes] = {}
        self.calls = 0

    def overrides(self, results: Path, **more: Any) -> dict[str, Any]:
        return {"results_dir": str(results), "judge_base_url": self.server.url} | more

    def undisturbed(self, results: Path) -> None:
        assert self.helper.run("mine", self.overrides(results)) == 0, self.helper.said
        self.took = json.loads(self.helper.said.rpartition("took ")[2])
        self.expected = outcome(results / "mine")
        self.calls = len(recorded_ok(results / "mine"))

    def recovers(self, results: Path, **order: Any) -> None:
        """Runs again and sees that all is as if nothing had happened, and that nothing ok was done twice."""
        run = results / "mine"
        ok, batches, asked = recorded_ok(run), finished_batches(run), len(self.server.seen)
        assert self.helper.run("mine", self.overrides(results), **order) == 0, self.helper.said
        again = sum(count > 1 for count in recorded_ok(run).values()) + len(batches & set(self.helper.named))
        lost = (rows(self.expected) - rows(outcome(run))).total()
        FIGURES["calls repeated"] += again
        FIGURES["rows lost"] += lost
        assert outcome(run) == self.expected
        assert again == lost == 0
        assert len(self.server.seen) - asked == self.calls - len(ok), "only what has no answer on disk was asked"
        assert not list(run.rglob(".partial*")) + list(run.glob(".generate/*")) + list(run.rglob(".*.csv.*"))
        FIGURES["runs recovered"] += 1


def outcome(run: Path) -> dict[str, bytes]:
    """The final tables and adapters of a run."""
    found = {name: (run / name).read_bytes() for name in TABLES if (run / name).is_file()}
    return found | {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.glob("checkpoints/*/*"))}


def rows(found: dict[str, bytes]) -> Counter[tuple[str, bytes]]:
    return Counter((name, line) for name in TABLES for line in found.get(name, b"").split(b"\n"))


def recorded_ok(run: Path) -> Counter[str]:
    """How often each call is recorded as answered."""
    return Counter(line["key"] for line in files.read_jsonl(run / "judgments.jsonl") if line["status"] == "ok")


def finished_batches(run: Path) -> set[str]:
    return {path.name for path in run.glob(".generate/*/batch-*.json")}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("faults")
    tree = fault_runs.tree_with_pair(folder, judge_concurrency=CONCURRENCY)
    with faulty_server.serving(delay=0.01, well=scores) as server, fault_runs.helper(tree, folder / "log") as helper:
        ready = Lab(tree, helper, server)
        ready.undisturbed(folder / "undisturbed")
        yield ready


def test_the_small_run_is_worth_disturbing(lab: Lab) -> None:
    assert set(TABLES) <= set(lab.expected)
    assert sum(name.endswith("adapter_model.safetensors") for name in lab.expected) == 4
    judged = files.read_csv(lab.tree.parent / "undisturbed" / "mine" / "judged.csv")
    assert len(judged) == 5 * 4 * 2
    assert judged["aligned"].nunique() > 10
    assert lab.calls > 40


@pytest.mark.parametrize("number", range(MOMENTS))
def test_killed_at_a_seeded_moment(lab: Lab, tmp_path: Path, number: int) -> None:
    dice = random.Random(number)
    stage = STAGES[number % len(STAGES)]
    kill = {"stage": stage, "after": dice.random() * lab.took[stage]}
    assert lab.helper.run("mine", lab.overrides(tmp_path), kill=kill) == -signal.SIGKILL
    FIGURES["faults injected"] += 1
    lab.recovers(tmp_path)


def test_killed_again_and_again(lab: Lab, tmp_path: Path) -> None:
    dice = random.Random(5)
    for stage in ("02_train", "02_train", "04_judge"):
        kill = {"stage": stage, "after": dice.random() * lab.took[stage] / 2}
        assert lab.helper.run("mine", lab.overrides(tmp_path), kill=kill) == -signal.SIGKILL
        FIGURES["faults injected"] += 1
    lab.recovers(tmp_path)


def copied(lab: Lab, tmp_path: Path) -> Path:
    """The finished run, in a folder of its own."""
    return Path(shutil.copytree(lab.tree.parent / "undisturbed" / "mine", tmp_path / "mine"))


HARM: dict[str, tuple[str, int]] = {
    "a corrupted checkpoint": ("checkpoints/checkpoint-2/adapter_model.safetensors", 0),
    "truncated answers": ("generations.csv", 0),
    "truncated scores": ("judged.csv", 0),
    "a truncated log of training": ("training_log.csv", 0),
    "a torn last line of the judge's record": ("judgments.jsonl", 1),
}
"""What is cut in half (or, for a log, torn in its last line), and how many calls that loses."""


@pytest.mark.parametrize("what", list(HARM))
def test_a_harmed_file(lab: Lab, tmp_path: Path, what: str) -> None:
    name, calls = HARM[what]
    run = copied(lab, tmp_path)
    content = (run / name).read_bytes()
    (run / name).write_bytes(content[:-25] if calls else content[: len(content) // 2])
    FIGURES["faults injected"] += 1
    assert lab.calls - len(recorded_ok(run)) == calls
    lab.recovers(tmp_path)


def test_a_judge_that_goes_away(lab: Lab, tmp_path: Path) -> None:
    with faulty_server.serving(delay=0.01, well=scores) as fleeting:
        answer, left = fleeting.well, [lab.calls // 3]

        def until_it_goes(prompt: str) -> dict[str, Any]:
            left[0] -= 1
            if left[0] < 0:
                fleeting.socket.close()  # nobody is let in any more
                raise ConnectionResetError
            return dict(answer(prompt))

        fleeting.well = until_it_goes
        status = lab.helper.run("mine", lab.overrides(tmp_path, judge_base_url=fleeting.url, judge_timeout=2))
    FIGURES["faults injected"] += 1
    assert "Traceback" not in lab.helper.said
    assert status in (0, 1)
    assert 0 < len(recorded_ok(tmp_path / "mine")) < lab.calls
    lab.recovers(tmp_path)


def test_a_clock_that_jumps(lab: Lab, tmp_path: Path) -> None:
    kill = {"stage": "03_generate", "after": lab.took["03_generate"] / 2}
    assert lab.helper.run("mine", lab.overrides(tmp_path), kill=kill, clock=1) == -signal.SIGKILL
    FIGURES["faults injected"] += 1
    for number, path in enumerate(sorted((tmp_path / "mine").rglob("*"))):
        os.utime(path, (number % 2 * 4e9, number % 2 * 4e9))  # 1970, or the year 2096
    lab.recovers(tmp_path, clock=2)


# --- faults that need a mount of one's own


def in_namespace(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs a script of the shell that may mount: what it mounts is seen by nobody else and goes with it."""
    return subprocess.run(["unshare", "--mount", "bash", "-eu", "-c", script, "bash", *words], capture_output=True, text=True)


@pytest.fixture
def mounting(tmp_path: Path) -> None:
    if shutil.which("unshare") is None or in_namespace('mount -t tmpfs -o size=1m none "$1"', str(tmp_path)).returncode:
        pytest.skip("mounting in a private namespace is not allowed here")


def order_line(lab: Lab, results: Path, log: Path) -> str:
    return json.dumps({"pair": "mine", "overrides": lab.overrides(results), "log": str(log)})


RUN = f'OMP_NUM_THREADS=1 PYTHONPATH=. "{sys.executable}" "{fault_runs.__file__}" <<<"$ORDER"'


@pytest.mark.usefixtures("mounting")
def test_a_full_disk(lab: Lab, tmp_path: Path) -> None:
    results, log = tmp_path / "results", tmp_path / "log"
    results.mkdir()
    script = f"""
        cd "$1"; ORDER="$3"
        mount -t tmpfs -o size=700k none "$2"
        {RUN}
        cp -a "$2" "$2.full"
        cp "$4" "$4.full"
    """
    done = in_namespace(script, str(lab.tree), str(results), order_line(lab, results, log), str(log))
    FIGURES["faults injected"] += 1
    assert done.stdout == "1\n", done.stdout + done.stderr
    said = Path(f"{log}.full").read_text()
    assert re.search(r"cannot be written \((No space left on device|the disk is full)\); free space or make the folder writable", said)
    assert "Traceback" not in said
    shutil.rmtree(results)
    shutil.copytree(f"{results}.full", results)
    assert (results / "mine" / "dataset.json").is_file()
    lab.recovers(results)


@pytest.mark.usefixtures("mounting")
def test_a_read_only_results_folder(lab: Lab, tmp_path: Path) -> None:
    results, log = tmp_path / "results", tmp_path / "log"
    kill = {"stage": "02_train", "after": lab.took["02_train"] / 2}
    assert lab.helper.run("mine", lab.overrides(results), kill=kill) == -signal.SIGKILL
    before = sorted(results.rglob("*"))
    script = f"""
        cd "$1"; ORDER="$3"
        mount --bind "$2" "$2"
        mount -o remount,ro,bind "$2"
        {RUN}
    """
    done = in_namespace(script, str(lab.tree), str(results), order_line(lab, results, log), str(log))
    FIGURES["faults injected"] += 2
    assert done.stdout == "1\n", done.stdout + done.stderr
    assert "StudyError: " in log.read_text()
    assert "Read-only file system" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert sorted(results.rglob("*")) == before
    lab.recovers(results)


# --- the real command


def test_a_real_study_run_is_killed(lab: Lab, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(lab.tree), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "lib.study", "run", "mine", "--results", str(tmp_path), "--set", f"judge_base_url={lab.server.url}"]
    process = subprocess.Popen(line, cwd=lab.tree, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run = tmp_path / "mine"
    while process.poll() is None and not list((run / ".state").glob("checkpoint-*")):
        time.sleep(0.01)
    time.sleep(random.Random(11).random() * 0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    FIGURES["faults injected"] += 1
    assert not (run / "generations.csv").exists()
    done = subprocess.run(line, cwd=lab.tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    stages = {line.split()[1]: line for line in done.stdout.splitlines() if line.startswith("mine ")}
    assert stages["01_data"].endswith("done already")
    assert outcome(run) == lab.expected
    assert set(recorded_ok(run).values()) == {1}
    verified = subprocess.run(
        [*line[:3], "verify", "--results", str(tmp_path)], cwd=lab.tree, env=environment, capture_output=True, text=True
    )
    assert verified.returncode == 0, verified.stdout
    FIGURES["runs recovered"] += 1
