"""Runs over Ray: the tables of the local engine, GPUs of their own, a node that dies, and what is said where Ray cannot serve."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import e2e
import fault_runs
import faulty_server
import psutil
import pytest
import test_faults
from conftest import ROOT
from faulty_server import FaultyServer
from test_study import stage_notebook

from lib import config, engines, provenance
from lib.runner import STAGES

pytestmark = pytest.mark.slow

RUNS = ("mine-s0", "mine-s1")
WORDS = ["run", "mine", "--seeds", "0,1"]


def environment(tree: Path) -> dict[str, str]:
    """Ray on loopback alone, with a token of this session's own; no GPU, so that a test says the same on every machine."""
    return os.environ | {
        **{"PYTHONPATH": os.pathsep.join([str(tree), str(e2e.ray())]), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        **{"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"},
    }


TOKEN = secrets.token_hex(32)


def study(tree: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lib.study", *words], cwd=tree, env=environment(tree), capture_output=True, text=True, timeout=400
    )


def tables(results: Path) -> dict[str, bytes]:
    """All tables and adapters of both runs, and the tables of the whole study."""
    found = {f"{run} {name}": content for run in RUNS for name, content in test_faults.outcome(results / run).items()}
    return found | {path.name: path.read_bytes() for path in sorted((results / "data").glob("*.csv"))}


# `ray start`, with nodes that may find each other on loopback: of itself it takes the outer address for 127.0.0.1.
START = """
from ray._private import services
services.get_node_ip_address = lambda address=None: "127.0.0.1"
from ray.scripts.scripts import main
main()
"""


class Node:
    """A Ray node: a session of processes of its own."""

    def __init__(self, tree: Path, folder: Path, *words: str, gpus: str = "") -> None:
        command = [sys.executable, "-c", START, "start", "--block", "--object-store-memory", "80000000", *words]
        self._log = folder / f"node-{secrets.token_hex(4)}.log"
        own = environment(tree) | {"CUDA_VISIBLE_DEVICES": gpus, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=tree, env=own, stdout=log, stderr=log, start_new_session=True)
        self._seen: dict[int, psutil.Process] = {}
        while "Ray runtime started" not in self._log.read_text():
            assert self.process.poll() is None, self._log.read_text()
            time.sleep(0.1)

    def tree(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            self._seen |= {child.pid: child for child in psutil.Process(self.process.pid).children(recursive=True)}
        return [child for child in self._seen.values() if alive(child)]

    def kill(self) -> None:
        """Kills Ray's own processes of this node at once; its workers, notebooks and kernels have to see that by themselves."""
        self.tree()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait_for_end(self) -> list[list[str]]:
        """Returns the commands of the processes that are still there a while after the kill."""
        wait_until(lambda: not self.tree(), 60)
        return [child.cmdline() for child in self.tree()]


def free_port() -> int:
    with socket.socket() as probing:
        probing.bind(("127.0.0.1", 0))
        return int(probing.getsockname()[1])


def alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def wait_until(holds: Callable[[], Any], seconds: float = 120) -> bool:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@contextlib.contextmanager
def cluster(tree: Path, *nodes: list[str], gpus: str = "") -> Iterator[tuple[str, list[Node]]]:
    """Starts a head node and further nodes, each with the given words of `ray start`; all their processes end with the block."""
    address = f"127.0.0.1:{free_port()}"
    # Ray's sockets have no room for a longer path.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    started: list[Node] = []
    try:
        for words in nodes:
            place = ["--address", address]
            if not started:
                place = ["--head", "--port", address.partition(":")[2], "--include-dashboard", "false", "--temp-dir", str(folder)]
            started.append(Node(tree, folder, "--node-ip-address", "127.0.0.1", *place, *words, gpus=gpus))
        yield address, started
    finally:
        for node in reversed(started):
            node.kill()
        left = [command for node in started for command in node.wait_for_end()]
        shutil.rmtree(folder, ignore_errors=True)
        assert not left


class Lab:
    """A copy of the study with the pair `mine`, its judge, and the tables of an undisturbed local run."""

    def __init__(self, folder: Path, server: FaultyServer) -> None:
        self.server = server
        self.tree = fault_runs.tree_with_pair(folder, judge_concurrency=2, judge_base_url=server.url)
        done = study(self.tree, *WORDS, "--jobs", "2", "--results", str(folder / "local"))
        assert done.returncode == 0, done.stdout + done.stderr
        self.said, self.expected, self.calls = told(done.stdout), tables(folder / "local"), len(server.seen)


def told(output: str) -> list[str]:
    """The lines that a command said of its stages, without times and in a fixed order."""
    return sorted(line.partition(" in ")[0] for line in output.splitlines() if line.startswith("mine"))


def without_libzmq(stderr: str) -> str:
    """What a command said without what the sockets of a kernel may say as it ends, a line of C's `assert`."""
    return re.sub(r"^Assertion failed: .* \(src/\w+\.cpp:\d+\)\n", "", stderr, flags=re.MULTILINE)


def test_a_line_is_one_write() -> None:
    """Two runs that tell of their stages at once must not write into each other's lines, whatever Python buffers."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # what is written comes out write by write
    code = "from lib.runner import tell; tell('a line'); tell('another', error=True)"
    variables = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], stdout=theirs.fileno(), stderr=theirs.fileno(), env=variables, check=True)
    theirs.close()
    assert [ours.recv(100), ours.recv(100), ours.recv(100)] == [b"a line\n", b"another\n", b""]
    ours.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with faulty_server.serving(delay=0.02, well=test_faults.scores) as server:
        yield Lab(tmp_path_factory.mktemp("engines"), server)


def test_ray_gives_the_tables_of_the_local_engine(lab: Lab, tmp_path: Path) -> None:
    done = study(lab.tree, *WORDS, "--engine", "ray", "--jobs", "2", "--results", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "study:" not in done.stderr  # a kernel that ends may say something of its own
    assert told(done.stdout) == lab.said
    assert len(lab.said) == 2 * 2 * len(STAGES), "a line where each stage starts and ends"
    assert "2 of 2 runs are up to date" in done.stdout
    assert "em_rates_summary.csv" in lab.expected
    assert tables(tmp_path) == lab.expected


def judging(node: Node, results: Path) -> str:
    """Names a run that is being judged on a node, some of its answers already."""
    for child in node.tree():
        with contextlib.suppress(psutil.NoSuchProcess):
            words = child.cmdline()
            if "--worker" in words and child.children() and words[words.index("--stages") + 1] == "04_judge":
                run = f"mine-s{next(word for word in words if word.startswith('seed='))[5:]}"
                if len(test_faults.recorded_ok(results / run)) > 3:
                    return run
    return ""


def test_a_node_dies_and_the_study_completes(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = len(lab.server.seen)
    results = tmp_path / "results"
    with cluster(lab.tree, ["--num-cpus", "1"], ["--num-cpus", "1"]) as (address, (_, second)), monkeypatch.context() as slow:
        refused = study(lab.tree, *WORDS, "--engine", "ray", "--address", address, "--set", "device=cuda", "--results", str(results))
        assert refused.returncode == 2
        assert refused.stderr.startswith("study: device: mine-s0, mine-s1 need a GPU, and no node of the Ray cluster has one")
        words = [*WORDS, "--engine", "ray", "--address", address, "--results", str(results)]
        # A stage that is nearly done would end before its worker sees that the node is gone.
        slow.setattr(lab.server, "delay", 0.5)
        process = subprocess.Popen(
            [sys.executable, "-m", "lib.study", *words],
            cwd=lab.tree, env=environment(lab.tree), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            found: list[str] = []
            assert wait_until(lambda: found.append(judging(second, results)) or found[-1] or process.poll() is not None)
            run = found[-1]
            assert run, "the study ended before a node was lost"
            second.kill()
            done_before = {stage: record for stage in STAGES if (record := provenance.read_record(results / run, stage))}
            assert wait_until(lambda: not second.tree())
            slow.undo()
            output, error = process.communicate(timeout=300)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 0, output + error
    assert output.count("lost its Ray worker") == 1
    assert "study:" not in error
    assert tables(results) == lab.expected
    assert [stage for stage, record in done_before.items() if record["status"] == "done"] == list(STAGES[:3])
    for stage in STAGES[:3]:
        assert provenance.read_record(results / run, stage) == done_before[stage], "what was done was not done again"
    repeated = {name: count for run in RUNS for name, count in test_faults.recorded_ok(results / run).items() if count > 1}
    assert not repeated
    assert len(lab.server.seen) - asked <= lab.calls + 2, "only calls under way at the kill were made again"


def test_each_notebook_has_a_gpu_of_its_own(tmp_path: Path) -> None:
    seen = """
        import os, time
        (folder / "device").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
        end = time.time() + 60
        while len(list(Path(results_dir).glob("*/device"))) < 2 and time.time() < end:
            time.sleep(0.05)  # so that both hold their device at the same time
    """
    for stage in STAGES:
        stage_notebook(tmp_path / "notebooks", stage, *([seen] if stage == "02_train" else []))
    results = tmp_path / "results"
    with cluster(ROOT, ["--num-cpus", "2", "--num-gpus", "2"], gpus="0,1") as (address, _):
        words = ["run", "demo_medical", "demo_medical_aligned", "--set", "device=cuda", "--stages", "01,02", "--no-preflight"]
        words += ["--notebooks", str(tmp_path / "notebooks"), "--engine", "ray", "--address", address, "--results", str(results)]
        done = study(ROOT, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted((results / pair / "device").read_text() for pair in ("demo_medical", "demo_medical_aligned")) == ["0", "1"]


def test_ctrl_c_ends_the_tasks(tmp_path: Path) -> None:
    for stage in STAGES:
        stage_notebook(tmp_path / "notebooks", stage, "import time\n(folder / 'begun').write_text('')\ntime.sleep(600)")
    results = tmp_path / "results"
    words = ["run", "demo_medical", "--engine", "ray", "--notebooks", str(tmp_path / "notebooks"), "--results", str(results)]
    process = subprocess.Popen(
        [sys.executable, "-m", "lib.study", *words],
        cwd=ROOT, env=environment(ROOT), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job, as a CI's may be, ignores it
    )  # fmt: skip
    try:
        assert wait_until((results / "demo_medical" / "begun").exists)
        children = psutil.Process(process.pid).children(recursive=True)
        kernel = provenance.read_record(results / "demo_medical", "01_data")["kernel"]  # type: ignore[index]
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=180)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1
    assert without_libzmq(error) == "study: interrupted; the same command goes on from here.\n"
    record = provenance.read_record(results / "demo_medical", "01_data")
    assert record is not None
    assert (record["status"], record["error"]) == ("failed", "it was interrupted")
    assert wait_until(lambda: not provenance.lives(kernel), 20)
    assert wait_until(lambda: not any(map(alive, children)), 20)


def test_a_failing_stage_is_told_as_by_the_local_engine(tmp_path: Path) -> None:
    for stage in STAGES:
        stage_notebook(tmp_path / "notebooks", stage)
    stage_notebook(tmp_path / "notebooks", "02_train", "assert False, 'no such luck'")
    told = []
    for engine in ("local", "ray"):
        words = ["run", "demo_medical", "--engine", engine, "--notebooks", str(tmp_path / "notebooks")]
        done = study(ROOT, *words, "--results", str(tmp_path / engine))
        assert done.returncode == 1
        assert "AssertionError: no such luck" in done.stderr
        said = without_libzmq(done.stderr).replace(str(tmp_path / engine), "")
        told.append((done.stdout.replace(engine, "").split("done in")[0], said))
    assert told[0] == told[1]


def test_ray_that_cannot_serve_is_told(tmp_path: Path) -> None:
    words = ["run", "demo_medical", "--engine", "ray", "--results", str(tmp_path)]
    code = f"import sys; sys.modules['ray'] = None; from lib import study; sys.exit(study.main({words!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(ROOT), capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "Ray is not installed; pip install '.[ray]'" in done.stderr
    for address, said in {
        f"127.0.0.1:{free_port()}": "does not answer",
        "ray://127.0.0.1:10001": "must be HOST:PORT",
        "head": "must be HOST:PORT",
    }.items():
        done = study(ROOT, *words, "--address", address)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert f"--address {address}: {said}" in done.stderr
    done = study(ROOT, *words[:2], "--address", "127.0.0.1:6379")
    assert (done.returncode, done.stderr) == (2, "study: --address: is for --engine ray.\n")
    assert not list(tmp_path.iterdir())


def test_gpus_follow_the_parameters() -> None:
    big = config.load_pair("8b_medical", overrides={"judge": "openai:gpt-4o"})
    assert [engines.gpus(big, stage) for stage in STAGES] == [0, 1, 1, 0, 0]
    assert engines.gpus(config.load_pair("8b_medical", overrides={"judge": "probe"}), "04_judge") == 1
    assert engines.gpus(config.load_pair("8b_medical", overrides={"device": "cpu"}), "02_train") == 0
    assert [engines.gpus(config.load_pair("demo_medical"), stage) for stage in STAGES] == [0] * 5
    assert engines.gpus(config.load_pair("demo_medical", overrides={"device": "cuda"}), "02_train") == 1
