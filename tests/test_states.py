"""What a kill, a harmed file or a full disk does to a training: nothing, in the end."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from tiny_runs import adapters_of, rows, start, train_undisturbed

from lib import adapters, config, files, qlora, states
from lib.config import Parameters
from lib.files import StudyError


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Parameters, Path]:
    return train_undisturbed(tiny_llama, tmp_path_factory.mktemp("undisturbed"))


def test_killed_at_random_moments_it_ends_the_same(trained: tuple[Parameters, Path], tmp_path: Path) -> None:
    p, undisturbed = trained
    assert p.lora_dropout > 0
    q = p.model_copy(update={"results_dir": str(tmp_path)})
    run = config.run_dir(q)
    dice = random.Random(7)
    for least in (1, dice.randint(3, 6), dice.randint(7, 12)):
        process = start(q, 60)
        while process.poll() is None and max(map(states.step_of, (run / ".state").glob("checkpoint-*")), default=0) < least:
            time.sleep(0.002)
        time.sleep(dice.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (run / "training.json").exists()
    record = qlora.train(q, rows(60), progress=False)
    assert record["resumed_at"]
    assert adapters_of(run) == adapters_of(undisturbed)
    assert (run / "training_log.csv").read_bytes() == (undisturbed / "training_log.csv").read_bytes()
    assert not list(run.rglob(".partial*"))


def copied(trained: tuple[Parameters, Path], tmp_path: Path) -> tuple[Parameters, Path]:
    """A copy of the undisturbed run as a kill just before its end would leave it."""
    p, run = trained
    q = p.model_copy(update={"results_dir": str(tmp_path)})
    shutil.copytree(run, config.run_dir(q))
    (config.run_dir(q) / "training.json").unlink()
    return q, config.run_dir(q)


@pytest.mark.parametrize("harmed", ["optimizer.pt", "trainer_state.json", "rng_state.pth", "complete.json", "adapter_model.safetensors"])
def test_a_harmed_state_is_passed_over_for_the_one_before(trained: tuple[Parameters, Path], tmp_path: Path, harmed: str) -> None:
    q, run = copied(trained, tmp_path)
    path = run / ".state" / "checkpoint-14" / harmed
    path.write_bytes(path.read_bytes()[:-20])
    (run / ".state" / ".partial-checkpoint-15").mkdir()
    (run / ".state" / "checkpoint-99").mkdir()  # what get_last_checkpoint would pick
    assert qlora.train(q, rows(60), progress=False)["resumed_at"] == [12]
    assert adapters_of(run) == adapters_of(trained[1])
    assert not (run / ".state" / ".partial-checkpoint-15").exists()


def test_a_harmed_adapter_is_made_again(trained: tuple[Parameters, Path], tmp_path: Path) -> None:
    q, run = copied(trained, tmp_path)
    files.write_json(run / "training.json", files.read_json(trained[1] / "training.json"))
    harmed = run / "checkpoints" / "checkpoint-14" / adapters.WEIGHTS
    harmed.write_bytes(b"x" + harmed.read_bytes()[1:])
    assert qlora.train(q, rows(60), progress=False)["resumed_at"] == [12]
    assert adapters_of(run) == adapters_of(trained[1])
    shutil.rmtree(run / "checkpoints" / "checkpoint-3")  # older than any state: from the beginning
    assert qlora.train(q, rows(60), progress=False)["resumed_at"] == []
    assert adapters_of(run) == adapters_of(trained[1])


def test_other_rows_or_parameters_start_afresh(trained: tuple[Parameters, Path], tmp_path: Path) -> None:
    q, run = copied(trained, tmp_path)
    record = qlora.train(q.model_copy(update={"num_epochs": 1, "samples": 3}), rows(60), progress=False)
    assert record["resumed_at"] == []
    assert list(qlora.checkpoints(run)) == [1, 3, 5, 7]
    again = qlora.train(q.model_copy(update={"num_epochs": 1}), rows(59), progress=False)
    assert again["rows"] == 59
    assert again["adapters"]["7"] != record["adapters"]["7"]


def write_until_full(target: Path, with_torch: bool) -> None:
    """Writes more than a file may hold here, as a full disk would cut it off."""
    import resource

    import torch

    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, most))
    try:
        with states.new_folder(target) as folder:
            if with_torch:
                torch.save(torch.zeros(100_000), folder / "optimizer.pt")
            (folder / "a").write_bytes(b"a" * 200_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("with_torch", [True, False])
def test_a_full_disk_is_told_and_leaves_nothing_half_written(tmp_path: Path, with_torch: bool) -> None:
    with pytest.raises(StudyError, match=r"checkpoint-1: cannot be written \(.*\); free space or make the folder writable"):
        write_until_full(tmp_path / "checkpoint-1", with_torch)
    assert list(tmp_path.iterdir()) == []
