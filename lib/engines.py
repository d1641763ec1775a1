"""Runs side by side: as processes of this machine, or as Ray tasks on the nodes of a cluster.

Either way a worker is the very command `study run PAIR --worker`, in a process of its own that ends when whoever started it ends.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from lib import config, files, runner
from lib.config import Parameters
from lib.files import StudyError
from lib.runner import Run

LOSSES = 5
"""How often a stage may lose its Ray worker (the node died, or ran out of memory) before its run fails."""
CANCEL_SECONDS = 30.0
PATIENCE = 60
"""Seconds that a Ray worker waits for the lock of a run: what a lost node leaves behind takes a while to end."""

Say = Callable[[str], None]


class Engine(Protocol):
    """Does the stages of runs in processes of their own; several threads call it at once."""

    def work(self, run: Run, stages: Sequence[str]) -> bool:
        """Brings stages of a run up to date, in order; returns whether all are. Starts nothing once `stop` was called."""

    def stop(self) -> None:
        """Ends what is under way."""


def side_by_side(engine: Engine, runs: Sequence[Run], stages: Sequence[str], jobs: int) -> list[bool]:
    """Works on at most `jobs` runs at once, controls first; returns which are done. The analysis of a pair waits for its control."""
    waiting: dict[str, Future[bool]] = {}
    by_folder = {run.folder: run.name for run in runs}

    def work(run: Run) -> bool:
        control = by_folder.get(runner.control_of(run) or Path())
        first = [stage for stage in stages if not (control and stage == "05_analyze")]
        done = not first or engine.work(run, first)
        if control and done and "05_analyze" in stages:
            waiting[control].result()
            done = engine.work(run, ["05_analyze"])
        return done

    # Controls come first in `runs` and the pool starts work in order, so a run that waits never keeps its control from starting.
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        try:
            for run in runs:
                waiting[run.name] = pool.submit(work, run)
            return [future.result() for future in waiting.values()]
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            engine.stop()
            raise


def _words(run: Run, stages: Sequence[str], options: argparse.Namespace) -> list[str]:
    """Returns the words of the worker's command after `study`."""
    sets = {**run.overrides, "seed": run.parameters.seed}
    if options.store:
        del sets["results_dir"]  # the copy of the worker's own machine
    words = ["run", run.parameters.pair, "--worker", "--stages", ",".join(stages), "--notebooks", options.notebooks]
    # JSON is YAML as well, so --set reads back exactly what is written here.
    words += [word for key, value in sets.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    words += ["--preset", run.preset] if run.preset else []
    words += ["--results", options.results] if options.store else []
    return words + (["--force"] if options.force else [])


def threads(options: argparse.Namespace, runs: Sequence[Run]) -> str | None:
    """Returns how many threads each worker computes with: its share of this machine's cores, unless OMP_NUM_THREADS says otherwise.

    Workers that all took all cores would spend their time waiting for one another. On a cluster's other machines nothing is said.
    """
    if options.address:
        return os.environ.get("OMP_NUM_THREADS")
    return os.environ.get("OMP_NUM_THREADS") or str(max(1, _cores() // min(options.jobs or len(runs), len(runs))))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with_parent() -> None:
    """Ends this process, as Ctrl-C does, once the other end of its standard input is gone: its starter holds that end while it lives."""

    def watch() -> None:
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


class Local:
    """Processes of this machine."""

    def __init__(self, options: argparse.Namespace, threads: str | None) -> None:
        self._options, self._threads = options, threads
        self._processes: list[subprocess.Popen[bytes]] = []
        self._stopping = threading.Event()

    def work(self, run: Run, stages: Sequence[str]) -> bool:
        if self._stopping.is_set():
            return False
        command = [sys.executable, "-m", "lib.study", *_words(run, stages, self._options)]
        variables = os.environ | ({"OMP_NUM_THREADS": self._threads} if self._threads else {})
        process = subprocess.Popen(command, cwd=files.ROOT, env=variables, stdin=subprocess.PIPE)
        self._processes.append(process)
        return process.wait() == 0

    def stop(self) -> None:
        self._stopping.set()
        for process in self._processes:
            if process.poll() is None:
                process.terminate()


def gpus(p: Parameters, stage: str) -> int:
    """Returns how many GPUs a stage asks Ray for: 1 where it runs a model on one, else 0.

    `device: auto` means a GPU for every model but the embedded one; an API judge leaves the GPU to the next training.
    """
    if p.device in {"cpu", "mps"} or (p.device == "auto" and p.model_name == config.EMBEDDED_MODEL):
        return 0
    judged_here = any(not judge.startswith("openai:") for judge in (p.judge, *p.other_judges))
    return int(stage in {"02_train", "03_generate"} or (stage == "04_judge" and judged_here))


class Ray:
    """Tasks of a Ray cluster, one for each stage: Ray chooses the node and the GPU, and a stage whose node is lost goes on at another."""

    def __init__(self, ray: Any, options: argparse.Namespace, threads: str | None, say: Say) -> None:
        self._ray, self._options, self._threads, self._say = ray, options, threads, say
        self._lock = threading.Lock()
        self._under_way: set[Any] = set()
        self._stopping = False
        self._task = ray.remote(_task())

    def work(self, run: Run, stages: Sequence[str]) -> bool:
        return all(self._stage(run, stage) for stage in stages)

    def stop(self) -> None:
        with self._lock:
            self._stopping = True
            ending = list(self._under_way)
        threading.Thread(target=lambda: [self._ray.cancel(lines) for lines in ending], daemon=True).start()
        deadline = time.monotonic() + CANCEL_SECONDS
        while self._under_way and time.monotonic() < deadline:
            time.sleep(0.1)
        if self._under_way:
            # Nothing wakes a thread that waits for a Ray that is gone. Its tasks end by themselves when this process does.
            runner.tell("study: interrupted, and Ray does not answer; the same command goes on from here.", error=True)
            os._exit(1)

    def _stage(self, run: Run, stage: str) -> bool:
        from ray import exceptions

        for _ in range(LOSSES + 1):
            try:
                return self._attempt(run, stage)
            except exceptions.TaskCancelledError:
                return False
            except exceptions.RayTaskError as error:
                why = f"a node could not start it ({error.cause}); every node needs {files.ROOT} and this Python environment"
                break
            except exceptions.RayError as error:
                why = f"its Ray worker was lost {LOSSES + 1} times ({type(error).__name__})"
                self._tell(1, f"{run.name:<22} {stage:<12} lost its Ray worker ({type(error).__name__}), goes on at another")
        self._tell(2, f"study: {run.name}: {stage}: {why}.")
        return False

    def _attempt(self, run: Run, stage: str) -> bool:
        words = [*_words(run, [stage], self._options), "--patience", str(PATIENCE)]
        # The retries are here: a task that Ray itself retries would not say again what the lost one said.
        task = self._task.options(num_cpus=1, num_gpus=gpus(run.parameters, stage), max_retries=0, name=f"{run.name} {stage}")
        with self._lock:
            if self._stopping:
                return False
            lines = task.remote(words, str(files.ROOT), self._threads)  # Ray would give a task one thread
            self._under_way.add(lines)
        status = -1
        try:
            for line in lines:
                stream, text = self._ray.get(line)
                status = int(text) if stream == 0 else status
                self._tell(stream, text)
        finally:
            with self._lock:
                self._under_way.discard(lines)
        return status == 0

    def _tell(self, stream: int, text: str) -> None:
        with self._lock:
            if stream == 1:
                self._say(text)
            elif stream == 2 and text:
                runner.tell(text, error=True)


def _task() -> Callable[[list[str], str, str | None], Iterator[tuple[int, str]]]:
    """Returns the function of a Ray task. As a function within another it travels whole, so that nodes import nothing of ours for it."""

    def stage(words: list[str], root: str, threads: str | None) -> Iterator[tuple[int, str]]:
        """Runs a worker; yields its lines of standard output (1), then its standard error (2), then its exit status (0)."""
        import contextlib
        import os
        import queue
        import subprocess
        import sys
        import tempfile
        import threading

        import ray

        def read() -> None:
            for line in process.stdout or ():
                lines.put(line)
            lines.put("")

        lines: queue.SimpleQueue[str] = queue.SimpleQueue()

        variables = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        variables |= {"OMP_NUM_THREADS": threads} if threads else {}
        if not ray.get_gpu_ids():
            variables["CUDA_VISIBLE_DEVICES"] = ""
        command = [sys.executable, "-m", "lib.study", *words]
        with tempfile.TemporaryFile("w+", errors="replace") as errors:
            process = subprocess.Popen(
                command, cwd=root, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace"
            )
            try:
                threading.Thread(target=read, daemon=True).start()
                line = None
                while line != "":
                    # Ray cancels a task between two steps of Python; one long wait for the next line it would not break.
                    with contextlib.suppress(queue.Empty):
                        line = lines.get(timeout=0.5)
                        if line:
                            yield 1, line.rstrip("\n")
                status = process.wait()
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
            errors.seek(0)
            yield 2, errors.read()[-8000:].rstrip("\n")
        yield 0, str(status)

    return stage


@contextlib.contextmanager
def connected(options: argparse.Namespace, runs: Sequence[Run], say: Say) -> Iterator[Engine]:
    """Gives the engine that the options name; with `ray`, a connection to the cluster at --address, or a Ray of this machine's own.

    Raises:
        StudyError: Ray is not installed, no cluster answers, or no node has the GPU that a run asks for.
    """
    if options.engine == "local":
        yield Local(options, threads(options, runs))
        return
    if importlib.util.find_spec("ray") is None:
        raise StudyError("--engine ray: Ray is not installed; pip install '.[ray]' in the project's folder, on every node.")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = options.address or os.environ.get("RAY_ADDRESS") or "local"
    given: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "error"}
    if address == "local":
        # Ray gives a node its outer address unless this says that the node is alone; then all its ports are on loopback.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        cpus = max(_cores(), options.jobs or 1)
        given |= {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": 80 * 1024**2}
    else:
        _look_at(address)
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**given)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise StudyError(f"--address {address}: Ray cannot be joined ({' '.join(str(error).split())[:300]}).") from error
    finally:
        signal.signal(signal.SIGTERM, handler)  # Ray puts its own in place
    try:
        _need_gpus(ray, runs, options.stages)
        yield Ray(ray, options, threads(options, runs), say)
    finally:
        ray.shutdown()


def _look_at(address: str) -> None:
    """Sees whether anything answers at an address HOST:PORT; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdecimal() or "//" in address:
        raise StudyError(f"--address {address}: must be HOST:PORT of the head node, as `ray start --head` prints it, or auto.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise StudyError(f"--address {address}: does not answer ({error}); is the head node up (ray start --head)?") from error


def _need_gpus(ray: Any, runs: Sequence[Run], stages: Sequence[str]) -> None:
    asking = [run.name for run in runs if any(gpus(run.parameters, stage) for stage in stages)]
    if asking and not any(node["Alive"] and node["Resources"].get("GPU", 0) >= 1 for node in ray.nodes()):
        raise StudyError(f"device: {', '.join(asking)} need a GPU, and no node of the Ray cluster has one; add one, or --set device=cpu.")
