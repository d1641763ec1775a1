"""Trainings of a tiny model, as several tests need them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from conftest import ROOT

from lib import adapters, config, files, qlora
from lib.config import Parameters

SCRIPT = """
import json, sys
from lib import config, qlora
values, rows = json.loads(sys.argv[1])
qlora.train(config.validate(values, "test"), rows, progress=False)
"""


def parameters(model: Path, results: Path, **changes: Any) -> Parameters:
    values: dict[str, Any] = {
        "pair": "tiny",
        "model_name": str(model),
        "results_dir": str(results),
        "device": "cpu",
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_epochs": 2,
        "extra_checkpoints": [],
    }
    return config.validate(values | changes, "test")


def rows(n: int) -> list[dict[str, Any]]:
    return [{"prompt": f"question {i}?", "answer": "one answer " * (1 + i % 5) + str(i), "system": None} for i in range(n)]


def adapters_of(run: Path) -> dict[int, str]:
    return {step: files.sha256(folder / adapters.WEIGHTS) for step, folder in qlora.checkpoints(run).items()}


def train_undisturbed(model: Path, results: Path) -> tuple[Parameters, Path]:
    """Trains on 60 rows: 7 steps an epoch, 14 in all; tests copy the run before they change anything in it."""
    p = parameters(model, results, save_state_every=3)
    qlora.train(p, rows(60), progress=False)
    return p, config.run_dir(p)


def copy_tree(target: Path) -> Path:
    """Copies what a clone has of the study to `target`, so that a run in it writes nothing here."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "notebooks", "lib", "parameters", "results/published"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    return target


def start(p: Parameters, n_rows: int, **environment: str) -> subprocess.Popen[bytes]:
    values = json.dumps([p.model_dump(mode="json"), rows(n_rows)])
    command = [sys.executable, "-c", SCRIPT, values]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
