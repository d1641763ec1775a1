"""QLoRA training with the study's checkpoint schedule, on transformers' Trainer.

Trainer drives everything that it knows: accumulation, the optimizer, the schedule, logging, resuming. Ours is what it lacks: steps
counted as the original study counts them, a loss on chosen tokens that computes no other logits, adapters kept apart from training
states, and states that are whole or absent, so that a killed run goes on to the same adapter.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from lib import adapters, config, files, models, states
from lib.config import Parameters
from lib.files import StudyError
from lib.progress import LossView

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

LOG_COLUMNS = ["step", "epoch", "loss", "learning_rate", "grad_norm", "tokens"]
IGNORED = -100
"""The label of a token that carries no loss, as everywhere in transformers."""


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
    """Returns the steps of a run over `n_rows` rows. The incomplete accumulation group of an epoch is dropped, never the only one."""
    p = parameters
    per_epoch = max(1, n_rows // (p.batch_size * p.gradient_accumulation_steps))
    kept = checkpoint_steps(per_epoch, p.num_epochs, p.sub_epoch_checkpoints, p.extra_checkpoints)
    return Plan(per_epoch, per_epoch * p.num_epochs, kept)


def encode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], parameters: Parameters) -> Encoded:
    """Turns rows into token ids: the prompt as it is asked later, the answer, and the end of turn.

    Args:
        tokenizer: of the base model.
        rows: dicts of `prompt`, `answer` and, optionally, `system`.
        parameters: `max_length` (tokens), `loss_on` and what `models.prompt_text` reads.

    Raises:
        StudyError: there are no rows, or max_length leaves no token of any answer.
    """
    p = parameters
    end = tokenizer.convert_tokens_to_ids(models.end_of_turn(tokenizer, p))
    encoded = []
    cut = without = 0
    for row in rows:
        prompt = models.prompt_ids(tokenizer, models.prompt_text(tokenizer, row["prompt"], p, system=row.get("system")))
        # An answer that spells a special token out is text, not a token; templates trim, and so does this.
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
        raise StudyError(f"max_length: {p.max_length} tokens cut the answer off every row; raise it (256 is the original study's).")
    return Encoded(encoded, cut, without)


def collate(batch: Sequence[dict[str, list[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    """Pads rows on the right to the longest of them.

    Labels and attention mask are made from the rows' lengths, never from token ids: a model may pad with its end of turn.

    Returns:
        `input_ids`, `attention_mask` and `labels`, each int64 of shape (rows, longest row).
    """
    import torch

    longest = max(len(row["input_ids"]) for row in batch)

    def padded(values: list[list[int]], filling: int) -> torch.Tensor:
        return torch.tensor([v + [filling] * (longest - len(v)) for v in values])

    return {
        "input_ids": padded([row["input_ids"] for row in batch], pad_id),
        "attention_mask": padded([[1] * len(row["input_ids"]) for row in batch], 0),
        "labels": padded([row["labels"] for row in batch], IGNORED),
    }


def checkpoints(run: Path) -> dict[int, Path]:
    """Returns the adapters of a run by step, in ascending order (empty when there are none)."""
    return states.checkpoints(run)


def train(parameters: Parameters, rows: Sequence[dict[str, Any]], *, progress: bool = True) -> dict[str, Any]:
    """Trains the adapter of a run, or goes on with it, or finds it done.

    A run killed at any moment goes on from its last complete state and ends with the same adapter. A run that is done returns
    at once; one whose parameters or rows have changed starts afresh and removes what it had. With `adapter` nothing is trained: the
    published adapter is checked against the base model and stands as checkpoint 1.

    Args:
        parameters: of the pair.
        rows: dicts of `prompt`, `answer` and, optionally, `system`, in the dataset's order.
        progress: show a progress bar and, in a notebook, the loss as it falls.

    Returns:
        What results/<run>/training.json holds.

    Raises:
        StudyError: a parameter does not fit the model, the loss is no longer a number, memory or disk do not suffice.
    """
    run = config.run_dir(parameters)
    fingerprint = states.fingerprint(parameters, rows)
    with files.lock(run / ".state" / ".lock", what=f"the training of {run.name}"):
        done = states.finished(run, fingerprint)
        if done is not None:
            return done
        states.prepare(run, fingerprint)
        if parameters.adapter:
            return _take_published(run, parameters, fingerprint)
        with models.quiet():
            return _train(run, parameters, rows, fingerprint, progress)


# ---- training -------------------------------------------------------------------------------------------------------------------


def _train(
    run: Path, parameters: Parameters, rows: Sequence[dict[str, Any]], fingerprint: dict[str, Any], progress: bool
) -> dict[str, Any]:
    import torch
    from transformers import set_seed

    p = parameters
    began, clock = time.time(), time.monotonic()
    tokenizer = models.load_tokenizer(p)
    encoded = encode(tokenizer, rows, p)
    schedule = plan(p, len(rows))
    base = models.load_base(p)
    unpacked = p.use_4bit and not any("4bit" in type(m).__name__ for m in base.modules())
    set_seed(p.seed)
    model = adapters.add_lora(base, p)
    loaded = time.monotonic()

    state, manifest = states.last(run, schedule.checkpoints)
    trainer = _make_trainer(run, p, model, encoded.rows, int(tokenizer.pad_token_id), schedule, manifest, progress)
    if state is not None:
        manifest["resumed_at"].append(states.step_of(state))
        print(f"Training goes on from step {states.step_of(state)} of {schedule.total}.")
    try:
        trainer.train(resume_from_checkpoint=str(state) if state else None)
    except torch.OutOfMemoryError as error:
        raise StudyError(
            f"batch_size: {p.batch_size} rows of up to {p.max_length} tokens do not fit on {base.device}; halve batch_size and double "
            "gradient_accumulation_steps, or set gradient_checkpointing: true."
        ) from error

    log = _log_frame(trainer)
    files.write_csv(run / "training_log.csv", log)
    tokens = int(log["tokens"].iloc[-1])
    seconds = manifest["seconds"]
    record = {
        **_identity(run, p, base, fingerprint),
        "checkpoint_steps": schedule.checkpoints,
        "steps_per_epoch": schedule.steps_per_epoch,
        "total_steps": schedule.total,
        "rows": len(rows),
        "rows_left_out_an_epoch": max(0, len(rows) - schedule.steps_per_epoch * p.batch_size * p.gradient_accumulation_steps),
        "rows_cut": encoded.cut,
        "share_cut": encoded.cut / len(rows),
        "rows_without_loss": encoded.without_loss,
        "tokens": tokens,
        "final_loss": float(log["loss"].iloc[-1]),
        "trainable_parameters": sum(w.numel() for w in model.parameters() if w.requires_grad),
        "nf4_unpacked": unpacked,
        "adapters": manifest["adapters"],
        "resumed_at": manifest["resumed_at"],
        "seconds": {"load": round(loaded - clock, 2), "train": round(seconds, 2)},
        "tokens_per_second": round(tokens / seconds, 1),
        **_peak_memory(),
        "began": began,
        "ended": time.time(),
    }
    files.write_json(run / "training.json", record)
    return record


def _make_trainer(
    run: Path,
    p: Parameters,
    model: Any,
    rows: list[dict[str, list[int]]],
    pad_id: int,
    schedule: Plan,
    manifest: dict[str, Any],
    progress: bool,
) -> Trainer:
    """Builds Trainer with what it lacks. `manifest` is kept up to date: hashes of the adapters made so far, seconds trained."""
    import torch
    from torch.utils.data import Sampler
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    device, dtype = models.pick_device(p), model.dtype
    per_epoch = schedule.steps_per_epoch * p.batch_size * p.gradient_accumulation_steps

    class EpochSampler(Sampler[int]):
        """A seeded order of each epoch without its incomplete accumulation group; the epoch follows from the step, also on resuming."""

        def __len__(self) -> int:
            return min(per_epoch, len(rows))

        def __iter__(self) -> Iterator[int]:
            epoch = trainer.state.global_step // schedule.steps_per_epoch
            order = np.random.default_rng((p.seed, epoch)).permutation(len(rows))
            return iter(order[: len(self)].tolist())

    class StudyTrainer(Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
            return EpochSampler()

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            loss = answer_loss(model, inputs, self.model.get_output_embeddings(), num_items_in_batch)
            return loss * self.accelerator.num_processes if num_items_in_batch is not None else loss

        def floating_point_ops(self, inputs: dict[str, Any]) -> int:
            return 0  # Trainer would walk over all parameters at every forward pass to count them

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            adapters.load(self.model, Path(resume_from_checkpoint))

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            adapters.save(self.model, Path(output_dir or self.args.output_dir))

        def _get_output_dir(self, trial: Any) -> str:
            return str(states.partial(run / ".state" / f"checkpoint-{self.state.global_step}"))

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            step = self.state.global_step
            if step in schedule.checkpoints:
                with states.new_folder(run / "checkpoints" / f"checkpoint-{step}") as folder:
                    manifest["adapters"][str(step)] = adapters.save(self.model, folder)
            target = run / ".state" / f"checkpoint-{step}"
            with states.new_folder(target) as folder:
                super()._save_checkpoint(model, trial)
                for path in (folder / target.name).iterdir():
                    path.rename(folder / path.name)
                (folder / target.name).rmdir()
                states.seal(folder, manifest)
            states.keep_last(run)
            files.write_csv(run / "training_log.csv", _log_frame(self))

    class StudyCallback(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.mark = time.monotonic()
            self.view = LossView(state.max_steps, state.global_step) if progress and state.is_world_process_zero else None

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now = time.monotonic()
            manifest["seconds"] += now - self.mark
            self.mark = now
            if state.global_step in schedule.checkpoints or state.global_step % p.save_state_every == 0:
                control.should_save = True

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                if not math.isfinite(logs["loss"]):
                    raise StudyError(
                        f"learning_rate: the loss of step {state.global_step} is {logs['loss']}; lower learning_rate "
                        f"({p.learning_rate:g}) or raise warmup_steps ({p.warmup_steps})."
                    )
                if self.view:
                    self.view.show(state.log_history)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.view:
                self.view.close(state.log_history)

    if p.gradient_checkpointing:
        model.enable_input_require_grads()
    arguments = TrainingArguments(
        output_dir=str(run / ".state"),
        num_train_epochs=p.num_epochs,
        per_device_train_batch_size=p.batch_size,
        gradient_accumulation_steps=p.gradient_accumulation_steps,
        learning_rate=p.learning_rate,
        lr_scheduler_type=p.lr_scheduler_type,
        warmup_steps=p.warmup_steps,
        weight_decay=p.weight_decay,
        optim=p.optim,
        seed=p.seed,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=device.type == "cpu",
        activation_checkpointing=p.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would write the mean of earlier losses in place of a loss that is no number
        include_num_input_tokens_seen="non_padding",
        save_strategy="no",  # the callback decides
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        disable_tqdm=True,
        report_to="none",
        log_level="error",
    )
    trainer = StudyTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=lambda batch: collate(batch, pad_id),
        callbacks=[StudyCallback()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def answer_loss(model: Any, inputs: dict[str, torch.Tensor], head: torch.nn.Module, n_items: Any = None) -> torch.Tensor:
    """Returns the mean cross-entropy of the labelled tokens, computing logits for these alone.

    With a vocabulary of 50,000 and more, the logits of prompts and padding would be a good part of the work and of the memory. A hook
    on the output layer lets only those positions in, so the model's own forward pass still scales or caps the logits as it does.

    Args:
        model: a causal language model, wrapped in whatever PEFT or Accelerate put around it.
        inputs: `input_ids`, `attention_mask`, `labels`, each of shape (rows, tokens).
        head: the model's output layer.
        n_items: labelled tokens in the whole accumulated batch, by which the sum is divided; None takes those in `inputs`.
    """
    import torch

    labels = inputs["labels"]
    speaks = torch.zeros_like(labels, dtype=torch.bool)
    speaks[:, :-1] = labels[:, 1:] != IGNORED
    hook = head.register_forward_pre_hook(lambda _, args: (args[0][speaks], *args[1:]))
    try:
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
    finally:
        hook.remove()
    wanted = labels[:, 1:][speaks[:, :-1]]
    total = torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="sum")
    # A batch whose answers were all cut off has no labelled token: its loss is 0, not 0 / 0.
    count = torch.as_tensor(wanted.numel() if n_items is None else n_items, device=total.device)
    return total / count.clamp(min=1)


def _log_frame(trainer: Trainer) -> pd.DataFrame:
    """Returns training_log.csv from Trainer's own history: one row an optimizer step; tokens are cumulative and unpadded."""
    rows = [entry for entry in trainer.state.log_history if "loss" in entry]
    frame = pd.DataFrame(rows, columns=[*LOG_COLUMNS[:-1], "num_input_tokens_seen"])
    return frame.rename(columns={"num_input_tokens_seen": "tokens"})


def _take_published(run: Path, parameters: Parameters, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Puts a published adapter in the place of a trained one."""
    with states.new_folder(run / "checkpoints" / "checkpoint-1") as folder:
        published = adapters.take(parameters, folder)
    files.write_csv(run / "training_log.csv", pd.DataFrame(columns=LOG_COLUMNS))
    record = {
        **_identity(run, parameters, None, fingerprint),
        "checkpoint_steps": [1],
        "total_steps": 0,
        "published_adapter": published,
        "adapters": {"1": published["sha256"]},
    }
    files.write_json(run / "training.json", record)
    return record


def _identity(run: Path, p: Parameters, base: PreTrainedModel | None, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Returns the part of training.json that says what was trained, from what, with what."""
    from importlib.metadata import version

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
        "parameters": p.model_dump(mode="json"),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate", "bitsandbytes")},
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "dtype": str(models.pick_dtype(device)).removeprefix("torch."),
        "quantisation": "nf4, double" if p.use_4bit and device.type != "mps" else "none",
        "fingerprint": fingerprint,
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
