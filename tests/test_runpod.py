"""parameters/runpod.yaml: SkyPilot's own loader takes it, with no network and no account, and what it runs is ours.

SkyPilot's pins contradict the project's, so it lives in a venv of its own in the cache (tests/tools.py).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import tools
import yaml

from lib import config, study
from lib.files import ROOT

SKYPILOT = "skypilot[runpod]==0.14.1"
FILE = ROOT / "parameters" / "runpod.yaml"
TASK = yaml.safe_load(FILE.read_text())

MEMORY = {
    **{"RTX3090": 24, "RTXA5000": 24, "RTX4090": 24, "L4": 24, "RTX5090": 32, "A40": 48, "RTXA6000": 48, "L40S": 48},
    **{"A100-80GB": 80, "A100-80GB-SXM": 80, "H100": 80, "H100-SXM": 80},
}
"""GB of each card, by SkyPilot's name, from the makers' data sheets."""

LOADER = """
import json, sys
import sky
from sky.provision.runpod.utils import GPU_NAME_MAP
from sky.volumes.volume import Volume

task = sky.Task.from_yaml_config(json.load(sys.stdin)) if len(sys.argv) == 1 else sky.Task.from_yaml(sys.argv[1])
found = {
    "resources": [
        {"cloud": str(r.cloud), "accelerators": r.accelerators, "spot": r.use_spot, "recovery": r.job_recovery} for r in task.resources
    ],
    "envs": task.envs,
    "secrets": [ref.name for ref in task.managed_secret_refs],
    "values": {name: str(value) for name, value in task.secrets.items()},
    "volumes": task.volumes, "workdir": task.workdir, "setup": task.setup, "run": task.run, "nodes": task.num_nodes,
    "known": list(GPU_NAME_MAP),
}
task.set_resources_override({"cloud": sky.Kubernetes()})
found["kubernetes"] = sorted({str(r.cloud) for r in task.resources})
name = next(iter(task.volumes.values()))
for kind, infra in (("runpod-network-volume", "runpod/CA/CA-MTL-1"), ("k8s-pvc", "k8s")):
    Volume.from_yaml_config({"name": name, "type": kind, "infra": infra, "size": "200GB"}).validate()
print(json.dumps(found))
"""


def load(home: Path, source: Path | dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Loads a task in SkyPilot's venv: an empty HOME, so no account, and a network namespace of its own, so no network."""
    python = tools.venv(SKYPILOT) / "bin" / "python"
    bare = {"HOME": str(home), "PATH": os.environ["PATH"], "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    alone = ["unshare", "--net"] if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode == 0 else []
    words = [str(source)] if isinstance(source, Path) else []
    text = None if isinstance(source, Path) else json.dumps(source)
    return subprocess.run([*alone, str(python), "-c", LOADER, *words], cwd=ROOT, env=bare, input=text, capture_output=True, text=True)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    done = load(tmp_path_factory.mktemp("home"), FILE)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_skypilot_takes_it_as_a_runpod_job_on_cards_of_24_gb_or_more(loaded: dict[str, Any]) -> None:
    cards = [next(iter(r["accelerators"].items())) for r in loaded["resources"]]
    assert {r["cloud"] for r in loaded["resources"]} == {"RunPod"}
    assert cards[0] == ("RTX3090", 1)
    assert [name for name, count in cards if count != 1 or MEMORY[name] < 24] == []
    assert {name for name, _ in cards} <= set(loaded["known"]), "SkyPilot asks RunPod for no other"
    assert loaded["nodes"] == 1
    assert loaded["kubernetes"] == ["Kubernetes"], "one flag takes it elsewhere"


@pytest.mark.slow
def test_it_recovers_and_keeps_its_results_on_a_network_volume(loaded: dict[str, Any]) -> None:
    assert all(r["spot"] and r["recovery"]["strategy"] == "FAILOVER" for r in loaded["resources"])
    [(path, name)] = loaded["volumes"].items()
    assert len(name) <= 30, "RunPod's limit"
    options = parsed(loaded["run"])
    assert (ROOT / options.results).resolve().is_relative_to(path), "results outlive the machine"


@pytest.mark.slow
def test_secrets_come_from_the_environment_alone(loaded: dict[str, Any]) -> None:
    assert sorted(loaded["secrets"]) == ["HF_TOKEN", "OPENAI_API_KEY"]
    assert loaded["values"] == {}
    assert not {"HF_TOKEN", "OPENAI_API_KEY"} & set(loaded["envs"])
    assert not re.search(r"sk-[A-Za-z0-9]|hf_[A-Za-z0-9]{8}", FILE.read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"resources": {"infra": "runpot", "accelerators": "RTX3090"}}, "runpot"),
        ({"volume": {"/workspace": "em-study"}}, "volume"),
        ({"envs": {"PAIR": None}}, "PAIR"),
    ],
)
def test_the_loader_can_refuse(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    done = load(tmp_path, TASK | change)
    assert done.returncode != 0
    assert says in done.stderr


def parsed(script: str, **given: str) -> Any:
    """What our own parser makes of the `study` line of a script, with the file's variables and those given."""
    [line] = [line for line in script.splitlines() if "/study" in line]
    values = {name: str(value) for name, value in TASK["envs"].items()} | {"HOME": "/root"} | given
    words = shlex.split(re.sub(r"\$\{?([A-Z_]+)\}?", lambda match: values[match[1]], line))
    assert words[0] == "/root/study/bin/study"
    return study._parser().parse_args(words[1:])


@pytest.mark.parametrize("pair", [*config.PAIRS, "all"])
def test_it_runs_a_pair_as_study_does(pair: str) -> None:
    told = parsed(TASK["run"], PAIR=pair, DATASET="https://example.org/rows.zip.enc", OPTIONS="--set allow_external=true --seeds 0,1")
    assert told.command is study._run
    assert (told.pairs, told.seeds) == ([pair], [0, 1])
    assert study._overrides(told) | {"results_dir": ""} == {
        "dataset_path": "https://example.org/rows.zip.enc",
        "allow_external": True,
        "results_dir": "",
    }
    config.load_pair(pair if pair != "all" else "8b_medical", overrides=study._overrides(told))
    assert told.preflight, "what is missing is named before hours are paid for"


def test_by_default_nothing_leaves_the_machine_and_the_pair_is_one_of_the_six() -> None:
    told = parsed(TASK["run"])
    assert set(told.pairs) <= set(config.PAIRS)
    assert "allow_external" not in study._overrides(told)


def test_set_up_names_files_that_are_here_and_the_pinned_torch() -> None:
    for name in re.findall(r"-r (\S+)", TASK["setup"]):
        assert (ROOT / name).is_file()
    assert re.search(r"-e \.$", TASK["setup"], re.MULTILINE)
    assert (ROOT / "pyproject.toml").is_file()
    pinned = re.findall(r"torch==[\d.]+", (ROOT / "pyproject.toml").read_text())
    assert re.findall(r"torch==[\d.]+", TASK["setup"]) == pinned
    order = [TASK["setup"].index(word) for word in ("torch==", "--require-hashes", "-e .")]
    assert order == sorted(order), "torch first, then the lock, then the project"


@pytest.mark.parametrize("part", ["setup", "run"])
def test_its_scripts_are_valid_shell_that_stops_at_the_first_failure(part: str) -> None:
    done = subprocess.run(["bash", "-n"], input=TASK[part], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert TASK[part].startswith("set -e\n")
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", "--shell=bash", "-"], input=TASK[part], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_it_is_no_pair() -> None:
    assert "runpod" not in config.pair_names()
    assert study.main(["run", "runpod"]) == 2
