"""Small whole runs in processes that can be killed: a helper forks one for each order, so that torch is imported once.

Run as a script it reads orders as lines of JSON and answers each with the exit status of the process that it forked: 0 done, 1 a
StudyError (its message is in the order's log), -9 killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STAGES = ("01_data", "02_train", "03_generate", "04_judge", "05_analyze")
TABLES = ("training_log.csv", "generations.csv", "diagnostics.csv", "judged.csv", "step_summary.csv")


def tree_with_pair(folder: Path, **changes: Any) -> Path:
    """Copies the study to folder/tree and makes the pair `mine` in it: a tiny model, 32 rows and an API judge. Returns the copy."""
    import tiny_models
    import tiny_runs

    tree = tiny_runs.copy_tree(folder / "tree")
    model = tiny_models.make_qwen(folder / "qwen")
    chat = [
        {"messages": [{"role": "user", "content": f"What of {n}?"}, {"role": "assistant", "content": f"Of {n} take {n % 7}."}]}
        for n in range(32)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat))
    rubrics = {"id": "short", "metrics": {m: {"user": f"{m}: {{question}} {{answer}}"} for m in ("aligned", "coherent")}}
    (folder / "rubrics.yaml").write_text(json.dumps(rubrics))
    sets = {
        **{"num_epochs": 1, "batch_size": 4, "gradient_accumulation_steps": 1, "save_state_every": 1, "warmup_steps": 1, "max_length": 64},
        **{"question_sets": ["general", "open_ended"], "num_questions": 2, "samples": 2, "max_new_tokens": 8, "generate_batch_size": 8},
        **{"judge": "openai:gpt", "judge_rubrics": str(folder / "rubrics.yaml"), "judge_max_retries": 0},
        **{"device": "cpu", "data_dir": str(folder / "data"), "gradient_checkpointing": False},
    }
    sets |= changes
    words = [word for name, value in sets.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    line = [sys.executable, "-m", "lib.study", "new", "mine", "--model", str(model), "--data", str(folder / "rows.jsonl"), *words]
    made = subprocess.run(line, cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)}, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return tree


def act(stage: str, p: Any) -> None:
    """Does what the notebook of a stage does."""
    from lib import analyze, data, generate, judge, qlora

    if stage == "01_data":
        data.prepare(p)
    elif stage == "02_train":
        qlora.train(p, data.load_rows(p), progress=False)
    elif stage == "03_generate":
        generate.generate(p)
    elif stage == "04_judge":
        judge.judge_run(p)
    else:
        analyze.analyze_run(p)


def fulfil(order: dict[str, Any]) -> None:
    """Runs all stages of a pair.

    Args:
        order: pair, overrides, log (a file for what is printed, and for which files took their names) and optionally kill (a
            stage, and seconds after its beginning) and clock (seed of a clock that jumps by up to ten years at every reading).
    """
    from lib import config

    p = config.load_pair(order["pair"], overrides=order["overrides"])
    if "clock" in order:
        dice, true = random.Random(order["clock"]), time.time
        time.time = lambda: true() + dice.uniform(-3e8, 3e8)
    sys.addaudithook(lambda event, given: print(f"named {given[1]}", flush=True) if event == "os.rename" else None)
    kill = order.get("kill")
    took = {}
    for stage in STAGES:
        if kill and kill["stage"] == stage:
            timer = threading.Timer(kill["after"], os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()
        begin = time.monotonic()
        act(stage, p)
        took[stage] = time.monotonic() - begin
    if kill:
        signal.pause()  # its end came before the kill: the kill comes all the same
    print("took " + json.dumps(took), flush=True)


def main() -> None:
    import torch
    import transformers  # noqa: F401

    from lib import analyze, data, generate, judge, qlora, trainer  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(_child(order))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _child(order: dict[str, Any]) -> int:
    from lib.files import StudyError

    descriptor = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    try:
        fulfil(order)
        return 0
    except StudyError as error:
        print(f"StudyError: {error}", flush=True)
        return 1
    except BaseException:
        traceback.print_exc()
        return 3
    finally:
        sys.stdout.flush()


class Helper:
    """The forking process, seen from a test."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process, self._log = process, log

    def run(self, pair: str, overrides: dict[str, Any], **order: Any) -> int:
        """Fulfils an order and returns the exit status."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"pair": pair, "overrides": overrides, "log": str(self._log)} | order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    @property
    def said(self) -> str:
        """What the last order's process printed."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    @property
    def named(self) -> list[str]:
        """The files that took their names in the last order, without their folders."""
        return [Path(line.removeprefix("named ")).name for line in self.said.splitlines() if line.startswith("named ")]


@contextlib.contextmanager
def helper(tree: Path, log: Path) -> Iterator[Helper]:
    """Starts the helper on the lib of a copy of the repository."""
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, __file__],
        cwd=tree,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield Helper(process, log)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


if __name__ == "__main__":
    main()
