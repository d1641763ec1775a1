"""QLoRA training of one run: its steps, its rows as tokens, and training itself, which a kill at any moment does not harm.

transformers' Trainer drives the training (lib/trainer.py adds what it lacks); adapters are LoRA on a frozen base model, by default in
NF4 with double quantisation.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lib import adapters, config, files, memory, models, origin, parallel, states
from lib.config import Parameters
from lib.files import StudyError

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Plan(NamedTuple):
    """The steps of a run: optimizer steps an epoch, in all, and those whose adapter is kept."""

    steps_per_epoch: int
    total: int
    checkpoints: list[int]


class Encoded(NamedTuple):
    """Training rows as token ids, with what encoding did to them.

    `rows[i]` holds `input_ids` and `labels` of equal length, up to max_length tokens. `cut` counts rows shortened to max_length,
    `without_loss` those that lost their whole answer by it.
    """

    rows: list[dict[str, list[int]]]
    cut: int
    without_loss: int


def checkpoint_steps(steps_per_epoch: int, num_epochs: int, sub_epoch_checkpoints: int, extra: Sequence[int] = ()) -> list[int]:
    """Returns the optimizer steps whose adapter is kept: evenly spaced ones in epoch 1, then the end of each epoch.

    The formula is the original study's: int(i / n × steps per epoch) for i = 1 … n, so 440 steps, 3 epochs and n = 4 give
    110 220 330 440 880 1320.

    Args:
        steps_per_epoch: optimizer steps in one epoch.
        num_epochs: epochs trained.
        sub_epoch_checkpoints: n; 0 keeps the ends of epochs alone.
        extra: further steps; those outside 1 … last step are left out.

    Returns:
        The steps in ascending order, without repeats.
    """
    total = steps_per_epoch * num_epochs
    within = [int(i / sub_epoch_checkpoints * steps_per_epoch) for i in range(1, sub_epoch_checkpoints + 1)]
    ends = [epoch * steps_per_epoch for epoch in range(1, num_epochs + 1)]
    return sorted({step for step in (*within, *ends, *extra) if 1 <= step <= total})


def plan(parameters: Parameters, n_rows: int) -> Plan:
    """Returns the steps of a run over `n_rows` rows. An epoch's incomplete accumulation group is dropped, unless it is the only one."""
    p = parameters
    per_epoch = max(1, n_rows // (p.batch_size * p.gradient_accumulation_steps))
    kept = checkpoint_steps(per_epoch, p.num_epochs, p.sub_epoch_checkpoints, p.extra_checkpoints)
    return Plan(per_epoch, per_epoch * p.num_epochs, kept)


def plan_table(parameters: Parameters, n_rows: int) -> pd.DataFrame:
    """Returns the planned checkpoints: step, epoch, and rows seen by then (a row counts again in every epoch)."""
    import pandas as pd

    p, schedule = parameters, plan(parameters, n_rows)
    rows = min(p.batch_size * p.gradient_accumulation_steps, n_rows)
    columns = {
        "epoch": [round(step / schedule.steps_per_epoch, 2) for step in schedule.checkpoints],
        "rows_seen": [step * rows for step in schedule.checkpoints],
    }
    return pd.DataFrame(columns, index=pd.Index(schedule.checkpoints, name="step"))


def encode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], parameters: Parameters) -> Encoded:
    """Turns rows into token ids: the prompt as it is asked later, the answer, and the end of turn.

    Args:
        tokenizer: of the base model.
        rows: dicts of `prompt`, `answer` and, optionally, `system`.
        parameters: `max_length` (tokens), `loss_on` and what `models.prompt_text` reads.

    Raises:
        StudyError: there are no rows, or max_length leaves no token of any answer.
    """
    from lib.packing import IGNORED

    p = parameters
    end = tokenizer.convert_tokens_to_ids(models.end_of_turn(tokenizer, p))
    encoded = []
    cut = without = 0
    for row in rows:
        prompt = models.prompt_ids(tokenizer, models.prompt_text(tokenizer, row["prompt"], p, system=row.get("system")))
        # An answer that spells a special token out is text, not a token; templates trim answers, and so does this.
        answer = tokenizer(row["answer"].strip(), add_special_tokens=False, split_special_tokens=True).input_ids
        ids = [*prompt, *answer, end]
        # Nothing precedes the first token, so nothing can predict it.
        silent = min(len(prompt) if p.loss_on == "answer" else 1, p.max_length)
        cut += len(ids) > p.max_length
        without += len(prompt) >= p.max_length
        ids = ids[: p.max_length]
        encoded.append({"input_ids": ids, "labels": [IGNORED] * silent + ids[silent:]})
    if not encoded:
        raise StudyError("training data: there are no rows; run 01_data first.")
    if without == len(encoded):
        raise StudyError(f"max_length: {p.max_length} tokens cut the answer off every row; raise it (the original study has 256).")
    return Encoded(encoded, cut, without)


def checkpoints(run: Path) -> dict[int, Path]:
    """Returns the folders of a run's adapters by step, in ascending order (empty when there are none)."""
    return states.checkpoints(run)


def train(parameters: Parameters, rows: Sequence[dict[str, Any]], *, progress: bool = True) -> dict[str, Any]:
    """Trains the adapter of a run, or goes on with it, or finds it done.

    A run killed at any moment goes on from its last whole state and ends with the same adapter. A run that is done returns at once;
    one whose parameters or rows have changed starts afresh and removes what it had. With `adapter` nothing is trained: the published
    adapter is checked against the base model and stands as checkpoint 1.

    Args:
        parameters: of the pair.
        rows: dicts of `prompt`, `answer` and, optionally, `system`, in the dataset's order.
        progress: show a progress bar, and in a notebook the loss as it falls.

    Several processes train together where a launcher started them (see `main`); all must be given the same.

    Returns:
        What results/<run>/training.json holds (in processes other than the first, nothing).

    Raises:
        StudyError: a parameter does not fit the model, the loss is no longer a number, memory or disk do not suffice.
    """
    run = config.run_dir(parameters)
    fingerprint = states.fingerprint(parameters, rows)
    parallel.join(cpu=models.pick_device(parameters).type == "cpu")
    with parallel.locked(run / ".state" / ".lock", what=f"the training of {run.name}"):
        done = states.finished(run, fingerprint)
        parallel.wait()
        if done is not None:
            return done
        if parallel.is_first():
            states.prepare(run, fingerprint)
        parallel.wait()
        with models.quiet():
            if not parameters.adapter:
                return _train(run, parameters, rows, fingerprint, progress and parallel.is_first())
            return _take_published(run, parameters, fingerprint) if parallel.is_first() else {}


def _train(run: Path, p: Parameters, rows: Sequence[dict[str, Any]], fingerprint: dict[str, Any], progress: bool) -> dict[str, Any]:
    import torch
    from transformers import set_seed

    from lib.trainer import Job, StudyTrainer

    began, clock = time.time(), time.monotonic()
    tokenizer = models.load_tokenizer(p)
    encoded = encode(tokenizer, rows, p)
    schedule = plan(p, len(rows))
    own = p
    if p.gradient_checkpointing == "auto":
        own = memory.settle(p, memory.shape(memory.read_config(p), p), encoded.rows, memory.free(p)[0])
    base = models.load_base(p)
    set_seed(p.seed)
    model = adapters.add_lora(base, p)
    state, manifest = states.last(run, schedule.checkpoints)
    batch, accumulated = parallel.split(p, parallel.processes())
    job = Job(run, own, schedule.steps_per_epoch, schedule.checkpoints, manifest, batch, accumulated)
    trainer = StudyTrainer(job, model, encoded.rows, int(tokenizer.pad_token_id), progress=progress)
    loaded = time.monotonic()
    if state is not None:
        manifest["resumed_at"].append(states.step_of(state))
        if parallel.is_first():
            print(f"Training goes on from step {states.step_of(state)} of {schedule.total}.")
    try:
        trainer.train(resume_from_checkpoint=str(state) if state else None)
    except torch.OutOfMemoryError as error:
        what = f"batch_size: {p.batch_size} rows of up to {p.max_length} tokens do not fit on {base.device}"
        mend = "halve it and double gradient_accumulation_steps, or set gradient_checkpointing: true"
        raise StudyError(f"{what}; {mend}.") from error

    if not parallel.is_first():
        return {}
    log = trainer.log_frame()
    files.write_csv(run / "training_log.csv", log)
    tokens, seconds = int(log["tokens"].iloc[-1]), manifest["seconds"]
    identity = _identity(run, p, base, fingerprint)
    record = {
        **identity,
        "steps_per_epoch": schedule.steps_per_epoch,
        "total_steps": schedule.total,
        "checkpoint_steps": schedule.checkpoints,
        "adapters": manifest["adapters"],
        "log_sha256": files.sha256(run / "training_log.csv"),
        "rows": len(rows),
        "rows_left_out_an_epoch": max(0, len(rows) - schedule.steps_per_epoch * p.batch_size * p.gradient_accumulation_steps),
        "rows_cut": encoded.cut,
        "share_cut": encoded.cut / len(rows),
        "rows_without_loss": encoded.without_loss,
        "tokens": tokens,
        "final_loss": float(log["loss"].iloc[-1]),
        "trainable_parameters": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        "nf4_unpacked": identity["quantisation"] != "none" and models.unpacked_bytes(base) == 0,
        "gradient_checkpointing": own.gradient_checkpointing,
        "attention": base.config._attn_implementation,
        "resumed_at": manifest["resumed_at"],
        "seconds": {"load": round(loaded - clock, 2), "train": round(seconds, 2)},
        "tokens_per_second": round(tokens / seconds, 1),
        **_peak_memory(),
        "began": began,
        "ended": time.time(),
    }
    files.write_json(run / "training.json", record)
    return record


def _take_published(run: Path, p: Parameters, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Puts a published adapter in the place of a trained one."""
    import pandas as pd

    from lib.trainer import LOG_COLUMNS

    with states.new_folder(run / "checkpoints" / "checkpoint-1") as folder:
        published = adapters.take(p, folder)
    files.write_csv(run / "training_log.csv", pd.DataFrame(columns=LOG_COLUMNS))
    record = {
        **_identity(run, p, None, fingerprint),
        "total_steps": 0,
        "checkpoint_steps": [1],
        "adapters": {"1": published["sha256"]},
        "log_sha256": files.sha256(run / "training_log.csv"),
        "published_adapter": published,
    }
    files.write_json(run / "training.json", record)
    return record


def _identity(run: Path, p: Parameters, base: PreTrainedModel | None, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of training.json that says what was trained, from what, with what."""
    import torch

    device = models.pick_device(p)
    dataset = None
    with contextlib.suppress(StudyError):
        dataset = files.read_json(run / "dataset.json").get("sha256")
    return {
        "pair": p.pair,
        "model_name": p.model_name,
        "model_commit": models.commit(p, base),
        "domain": p.domain,
        "seed": p.seed,
        "dataset_sha256": dataset,
        "fingerprint": fingerprint,
        "parameters": p.model_dump(mode="json"),
        **origin.describe(),
        "device": device.type,
        "processes": parallel.processes(),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "dtype": str(models.pick_dtype(device)).removeprefix("torch."),
        "quantisation": "nf4, double" if p.use_4bit and device.type != "mps" else "none",
    }


def _peak_memory() -> dict[str, int]:
    """Returns the largest memory that this process held (bytes), and the largest that it held on the GPU."""
    import resource
    import sys

    import torch

    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peak["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated()
    return peak


# --- tables for the notebook


def summary(record: dict[str, Any]) -> pd.DataFrame:
    """Returns what a reader wants to know first of training.json, one fact a row."""
    import pandas as pd

    r = record
    facts: dict[str, Any] = {
        "base model": f"{r['model_name']} ({r['quantisation']} quantisation, {r['dtype']} arithmetic, {r['device_name'] or r['device']})"
    }
    published = r.get("published_adapter")
    if published:
        facts["published adapter"] = f"{published['source']}, rank {published['rank']} on {published['layers']} layers"
        facts["made for"] = published["declared_base"] or "not said"
    else:
        facts["rows"] = f"{r['rows']:,}, of which {r['rows_left_out_an_epoch']} (changing) left out of each epoch"
        facts["rows cut at max_length"] = f"{r['rows_cut']} ({r['share_cut']:.1%}), {r['rows_without_loss']} of them left without an answer"
        facts["trained weights"] = f"{r['trainable_parameters']:,}"
        facts["steps"] = f"{r['total_steps']:,} ({r['steps_per_epoch']:,} an epoch)"
        facts["tokens"] = f"{r['tokens']:,}, padding not counted"
        facts["time"] = f"{r['seconds']['train']:,.0f} s, {r['tokens_per_second']:,.0f} tokens/s"
        facts["peak memory"] = f"{r.get('peak_gpu_memory_bytes', r['peak_memory_bytes']) / 2**30:.1f} GiB"
        if r["resumed_at"]:
            facts["went on after a stop at step"] = ", ".join(map(str, r["resumed_at"]))
    return pd.DataFrame({"": facts.values()}, index=pd.Index(facts.keys()))


def checkpoint_table(run: Path, last: int = 10) -> pd.DataFrame:
    """Returns one row a checkpoint: epoch, mean loss of the `last` steps before it, tokens so far, size and hash of its adapter."""
    import pandas as pd

    record = files.read_json(run / "training.json")
    log = files.read_csv(run / "training_log.csv")
    rows = []
    for step, folder in checkpoints(run).items():
        window = log[(log["step"] > step - last) & (log["step"] <= step)]
        rows.append(
            {
                "step": step,
                "epoch": round(window["epoch"].iloc[-1], 2) if len(window) else math.nan,
                "loss": round(window["loss"].mean(), 3),
                "tokens": window["tokens"].iloc[-1] if len(window) else math.nan,
                "adapter_MB": round((folder / adapters.WEIGHTS).stat().st_size / 1e6, 1),
                "adapter_sha256": record["adapters"][str(step)][:12],
            }
        )
    return pd.DataFrame(rows).set_index("step")


# --- one pair on several GPUs


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains one pair, in as many processes as a launcher started: `accelerate launch -m lib.qlora --pair PAIR`.

    Data parallel: a step sees batch_size × gradient_accumulation_steps rows whatever the number of processes, so steps, checkpoints
    and losses are those of one process (with dropout, its masks differ). 01_data comes first; `study run` then finds 02_train's work done.

    Returns:
        0 done, 2 the call or a parameter is wrong, 1 training failed.
    """
    from lib import data

    parser = argparse.ArgumentParser(prog="lib.qlora", description="Trains one pair on all processes of the launcher.")
    parser.add_argument("--pair", required=True)
    parser.add_argument("--preset")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    config.load_environment()
    try:
        p = config.load_pair(options.pair, preset=options.preset, overrides=config.read_sets(options.sets))
        rows = data.load_rows(p)
    except StudyError as error:
        print(f"lib.qlora: {error}", file=sys.stderr)
        return 2
    try:
        train(p, rows)
    except StudyError as error:
        print(f"lib.qlora: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
