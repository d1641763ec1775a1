"""What a training has already made: its adapters, its full states, and whether they still hold.

results/<run>/checkpoints/ holds adapters alone. results/<run>/.state/ holds what a killed training needs to go on: adapter, optimizer,
schedule, random streams; never published, and read without unpickling.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lib import adapters, files
from lib.config import Parameters
from lib.files import StudyError, shown

KEPT = 2
"""Full states kept, so that a harmed one still has one before it."""

# What a trained adapter depends on. Another value of one of these makes another adapter, so training starts afresh; the others
# (batching of answers, the judge, how often states are saved, the device) do not.
_SHAPING = (
    *("model_name", "model_revision", "use_4bit", "adapter", "seed"),
    *("num_epochs", "sub_epoch_checkpoints", "extra_checkpoints", "batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim"),
    *("lora_rank", "lora_alpha", "lora_dropout", "use_rslora"),
    *("max_length", "loss_on", "system_prompt", "date_string"),
)
_BROKEN = (StudyError, OSError, AttributeError, KeyError, TypeError, ValueError)
"""What reading a file that a crash or a disk has harmed may raise."""


def fingerprint(parameters: Parameters, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns what decides a run's adapters, as JSON values: shaping parameters, SHA-256 of the rows and of a given adapter."""
    text = "\n".join(json.dumps([row["prompt"], row["answer"], row.get("system")]) for row in rows)
    values = parameters.model_dump(mode="json")
    given = files.resolve(parameters.adapter) / adapters.WEIGHTS if parameters.adapter else None
    return {
        "format": 1,
        "parameters": {name: values[name] for name in _SHAPING},
        "rows_sha256": files.sha256_text(text),
        "adapter_sha256": files.sha256(given) if given is not None and given.is_file() else None,
    }


def checkpoints(run: Path) -> dict[int, Path]:
    """Returns the adapters under `run`/checkpoints by step, in ascending order (empty when there are none)."""
    found = {step_of(f): f for f in (run / "checkpoints").glob("checkpoint-*") if (f / adapters.WEIGHTS).is_file()}
    return {step: found[step] for step in sorted(found) if step >= 0}


def finished(run: Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns training.json when it tells of the run `wanted` and its log and all its adapters are there, unharmed."""
    with contextlib.suppress(*_BROKEN):
        record: dict[str, Any] = files.read_json(run / "training.json")
        complete = {str(step) for step in record["checkpoint_steps"]} == set(record["adapters"])
        log = record.get("log_sha256")  # earlier records have none
        complete = complete and (log is None or files.sha256(run / "training_log.csv") == log)
        if record["fingerprint"] == wanted and complete and _hold(run, record["adapters"]):
            return record
    return None


def _hold(run: Path, hashes: Mapping[str, str]) -> bool:
    """Says whether the adapters of a run still have the SHA-256 that `hashes` gives by step."""
    folders = checkpoints(run)
    return all(int(step) in folders and files.sha256(folders[int(step)] / adapters.WEIGHTS) == sha for step, sha in hashes.items())


def prepare(run: Path, wanted: Mapping[str, Any]) -> None:
    """Removes what a run of other parameters or rows has left under `run`, and what a kill has left half-written."""
    for folder in (run / "checkpoints", run / ".state"):
        for partial in folder.glob(".partial-*"):
            shutil.rmtree(partial)
    with contextlib.suppress(*_BROKEN):
        if files.read_json(run / ".state" / "fingerprint.json") == wanted:
            return
    for stale in [*(run / "checkpoints").glob("*"), *(run / ".state").glob("checkpoint-*")]:
        shutil.rmtree(stale)
    for name in ("training.json", "training_log.csv"):
        (run / name).unlink(missing_ok=True)
    files.write_json(run / ".state" / "fingerprint.json", wanted)


def last(run: Path, steps: Sequence[int]) -> tuple[Path | None, dict[str, Any]]:
    """Returns the newest full state that is whole, and its manifest; a harmed one is passed over for the one before.

    A state is whole when every file has the hash that its manifest gives and the adapters of all `steps` up to it are there.

    Returns:
        Its folder, None where training starts from the beginning, and the manifest: `adapters` (SHA-256 by step), `seconds`
        trained so far, `resumed_at` (steps from which training went on after a kill).
    """
    for folder in sorted((run / ".state").glob("checkpoint-*"), key=step_of, reverse=True):
        with contextlib.suppress(*_BROKEN):
            manifest = files.read_json(folder / "complete.json")
            whole = all(files.sha256(folder / name) == sha for name, sha in manifest.pop("files").items())
            due = {str(step) for step in steps if step <= step_of(folder)}
            if whole and due == set(manifest["adapters"]) and _hold(run, manifest["adapters"]):
                return folder, manifest
    return None, {"adapters": {}, "seconds": 0.0, "resumed_at": []}


def seal(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes the manifest of a full state: what `last` returns, and the hash of every file in `folder`."""
    hashes = {path.name: files.sha256(path) for path in folder.iterdir()}
    files.write_json(folder / "complete.json", {"files": hashes, **manifest})


def keep_last(run: Path) -> None:
    """Removes all full states but the newest ones."""
    for old in sorted((run / ".state").glob("checkpoint-*"), key=step_of)[:-KEPT]:
        shutil.rmtree(old)


def step_of(folder: Path) -> int:
    """Returns the step in the name of a checkpoint's folder, -1 where there is none."""
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def partial(target: Path) -> Path:
    """Returns the folder in which `target` is written before it takes its name."""
    return target.parent / f".partial-{target.name}"


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yields `partial(target)`, which becomes `target` only when the block ends well; what was there before is replaced.

    Raises:
        StudyError: the folder cannot be written, or the disk is full.
    """
    scratch = partial(target)
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        yield scratch
        for path in scratch.iterdir():
            with path.open("rb+") as stream:
                os.fsync(stream.fileno())
        shutil.rmtree(target, ignore_errors=True)
        scratch.rename(target)
    except (OSError, RuntimeError) as error:
        # torch.save tells of a full disk by a RuntimeError of its zip writer.
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in ("inline_container", "PytorchStreamWriter")):
            raise
        reason = getattr(error, "strerror", None) or "the disk is full"
        mend = "free space or make the folder writable, then run again"
        raise StudyError(f"{shown(target)}: cannot be written ({reason}); {mend}.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
