"""transformers' Trainer with what it lacks for this study, and nothing that it has.

Added are: an order of rows that drops the incomplete accumulation group, so that steps count as in the original study; a loss that
computes logits for labelled tokens alone; adapters at the planned steps and full states that are whole or absent; a log that tells of
every step. This module imports torch, so it is imported when training begins and not before.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from lib import adapters, files, memory, models, packing, parallel, prepacked, states
from lib.config import Parameters
from lib.files import StudyError
from lib.packing import IGNORED
from lib.progress import LossView

_AFTERWARDS: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
"""Output layers of models that were seen to scale or cap their logits afterwards."""

LOG_COLUMNS = ["step", "epoch", "loss", "learning_rate", "grad_norm", "tokens"]


@dataclass(frozen=True)
class Job:
    """One training: its folder, parameters and steps, and the manifest that is kept up to date as it goes (see `states.last`).

    `batch` rows a forward pass and `accumulated` passes a step are this process's share (see `parallel.split`).
    """

    run: Path
    parameters: Parameters
    steps_per_epoch: int
    checkpoints: Sequence[int]
    manifest: dict[str, Any]
    batch: int
    accumulated: int


def pad(batch: Sequence[dict[str, list[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    """Pads rows on the right to the longest of them.

    Labels and attention mask are made from the rows' lengths, never from token ids: a model may pad with its end of turn.

    Returns:
        `input_ids`, `attention_mask` and `shift_labels` (the label of the next token), each int64 of shape (rows, longest row).
    """
    longest = max(len(row["input_ids"]) for row in batch)

    def padded(values: list[list[int]], filling: int) -> torch.Tensor:
        return torch.tensor([v + [filling] * (longest - len(v)) for v in values])

    return {
        "input_ids": padded([row["input_ids"] for row in batch], pad_id),
        "attention_mask": padded([[1] * len(row["input_ids"]) for row in batch], 0),
        "shift_labels": padded([[*row["labels"][1:], IGNORED] for row in batch], IGNORED),
    }


def labelled_loss(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], head: torch.nn.Module, n_items: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Returns the mean cross-entropy (nats) of the labelled tokens, computing logits for these alone.

    With a vocabulary of 50,000 and more, the logits of prompts and padding would be a good part of the work and of the memory. A hook
    on the output layer lets only the positions in that predict a labelled token, so the model's own forward pass still scales or
    caps its logits.

    Args:
        model: a causal language model, in whatever PEFT or Accelerate put around it.
        inputs: what `pad`, `packing.pack` or `packing.pack_apart` returns.
        head: the model's output layer.
        n_items: labelled tokens in the whole accumulated batch, by which the sum is divided; None takes those in `inputs`.
    """
    labels = inputs["shift_labels"]
    speaks = labels != IGNORED
    given: dict[str, Any] = {"input_ids": inputs["input_ids"], "use_cache": False}
    if "position_ids" in inputs:
        given["position_ids"] = inputs["position_ids"]
    else:
        given["attention_mask"] = inputs["attention_mask"]
    if "segments" in inputs:
        given["segments"] = packing.segments_of(inputs["segments"])
    wanted = labels[speaks]
    total = None
    vocabulary = len(next(head.parameters()))
    if wanted.numel() * vocabulary > memory.WHOLE_LOGITS:
        total = _loss_in_pieces(model, given, head, speaks, wanted, max(1, memory.PIECE_LOGITS // vocabulary))
    if total is None:
        hook = head.register_forward_pre_hook(lambda _, args: (args[0][speaks], *args[1:]))
        try:
            logits = model(**given).logits
        finally:
            hook.remove()
        total = _CrossEntropy.apply(logits.float(), wanted)  # type: ignore[no-untyped-call]
    # A batch whose answers were all cut off has no labelled token: its loss is 0, not 0 / 0.
    count = torch.as_tensor(wanted.numel() if n_items is None else n_items, device=total.device)
    return total / count.clamp(min=1)


class _CrossEntropy(torch.autograd.Function):
    """The summed cross-entropy of logits (tokens × vocabulary); its gradient takes the softmax's place, where torch writes three more."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        softmax = logits.softmax(-1)
        ctx.save_for_backward(softmax, wanted)
        largest, at = logits.max(-1, keepdim=True)
        # From the largest probability, which cannot underflow.
        normaliser = largest - softmax.gather(1, at).log()
        return (normaliser - logits.gather(1, wanted[:, None])).sum()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        softmax, wanted = ctx.saved_tensors
        softmax[torch.arange(len(wanted), device=wanted.device), wanted] -= 1
        return softmax.mul_(gradient), None


def _loss_in_pieces(
    model: torch.nn.Module, given: dict[str, Any], head: Any, speaks: torch.Tensor, wanted: torch.Tensor, size: int
) -> torch.Tensor | None:
    """Returns the summed cross-entropy with the logits of `size` tokens at a time, which the backward pass computes again.

    The model's forward pass takes the logits of one token alone, to see whether they are what its output layer gives. Where they are
    scaled or capped afterwards, None is returned.
    """
    from torch.utils.checkpoint import checkpoint

    if head in _AFTERWARDS:
        return None
    caught: list[torch.Tensor] = []

    def catch(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        caught.append(args[0][speaks])
        return (caught[0][:1], *args[1:])

    hook = head.register_forward_pre_hook(catch)
    try:
        logits = model(**given).logits
    finally:
        hook.remove()
    (states,) = caught
    with torch.no_grad():
        if not torch.equal(logits.float(), head(states[:1]).float()):
            _AFTERWARDS.add(head)
            return None

    def loss(some: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        summed: torch.Tensor = _CrossEntropy.apply(head(some).float(), labels)  # type: ignore[no-untyped-call]
        return summed

    pieces = zip(torch.split(states, size), torch.split(wanted, size), strict=True)
    return torch.stack([checkpoint(loss, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]).sum()


class EpochSampler(Sampler[int]):
    """The rows of each epoch in a seeded order, without the incomplete accumulation group at its end.

    The epoch follows from the step that training is at, so a resumed run draws the order that it was in.
    """

    def __init__(self, trainer: StudyTrainer, n_rows: int) -> None:
        self._trainer, self._n_rows = trainer, n_rows
        job, p = trainer.job, trainer.job.parameters
        self._kept = min(n_rows, job.steps_per_epoch * p.batch_size * p.gradient_accumulation_steps)

    def __len__(self) -> int:
        return self._kept

    def __iter__(self) -> Iterator[int]:
        epoch = self._trainer.state.global_step // self._trainer.job.steps_per_epoch
        order = np.random.default_rng((self._trainer.job.parameters.seed, epoch)).permutation(self._n_rows)
        return iter(order[: self._kept].tolist())


class StudyTrainer(Trainer):
    """Trainer for one `Job` on a model that bears a LoRA adapter."""

    def __init__(self, job: Job, model: Any, rows: Sequence[dict[str, list[int]]], pad_id: int, *, progress: bool) -> None:
        self.job = job
        p = job.parameters
        if p.gradient_checkpointing is True:
            model.enable_input_require_grads()
        if p.cache_dequantized is not False:
            prepacked.prepack(model, gradients=True)
        lay_out: Callable[[Sequence[dict[str, list[int]]]], dict[str, torch.Tensor]] = partial(pad, pad_id=pad_id)
        if packing.enable(model):
            lay_out = packing.pack if model.device.type == "cpu" else packing.pack_apart

        def collate(batch: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
            made = lay_out(batch)
            # Trainer counts the labelled tokens of an accumulated batch in shift_labels, but only where it finds labels too.
            return made | {"labels": made["shift_labels"]}

        super().__init__(
            model=model,
            args=_arguments(job, model),
            train_dataset=rows,
            data_collator=collate,
            callbacks=[_Watch(job, progress)],
        )
        self.remove_callback(PrinterCallback)

    def log_frame(self) -> pd.DataFrame:
        """Returns training_log.csv: one row an optimizer step; tokens are cumulative and unpadded."""
        rows = [entry for entry in self.state.log_history if "loss" in entry]
        frame = pd.DataFrame(rows, columns=[*LOG_COLUMNS[:-1], "num_input_tokens_seen"])
        return frame.rename(columns={"num_input_tokens_seen": "tokens"})

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        loss = labelled_loss(model, inputs, self.model.get_output_embeddings(), num_items_in_batch)
        # Several processes average their gradients, but num_items_in_batch counts the tokens of all of them.
        return loss * int(self.accelerator.num_processes)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # Trainer would walk over all parameters at every forward pass to count them

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        return EpochSampler(self, len(self.train_dataset))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        adapters.load(self.model, Path(resume_from_checkpoint))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        adapters.save(self.model, Path(output_dir or self.args.output_dir))  # and no pickle of the arguments

    def _get_output_dir(self, trial: Any) -> str:
        return str(states.partial(self._state_folder()))

    def _state_folder(self) -> Path:
        return self.job.run / ".state" / f"checkpoint-{self.state.global_step}"

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Saves the adapter where the plan says so, then the full state: a state on disk means that its adapters are there too."""
        if not parallel.is_first():
            parallel.wait()
            super()._save_checkpoint(model, trial)  # its random streams, into the first process's folder
            parallel.wait()
            return
        step, run, manifest = self.state.global_step, self.job.run, self.job.manifest
        if step in self.job.checkpoints:
            with states.new_folder(run / "checkpoints" / f"checkpoint-{step}") as folder:
                manifest["adapters"][str(step)] = adapters.save(self.model, folder)
        target = self._state_folder()
        with states.new_folder(target) as folder:
            (folder / target.name).mkdir()
            parallel.wait()
            super()._save_checkpoint(model, trial)
            parallel.wait()
            for path in (folder / target.name).iterdir():
                path.rename(folder / path.name)
            (folder / target.name).rmdir()
            states.seal(folder, manifest)
        states.keep_last(run)
        files.write_csv(run / "training_log.csv", self.log_frame())


class _Watch(TrainerCallback):
    """Says when to save, keeps the time, stops at a loss that is no number, and shows how far training is."""

    def __init__(self, job: Job, progress: bool) -> None:
        self.job, self.progress = job, progress
        self.view: LossView | None = None
        self.mark = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.mark = time.monotonic()
        if self.progress and state.is_world_process_zero:
            self.view = LossView(state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.monotonic()
        self.job.manifest["seconds"] += now - self.mark
        self.mark = now
        if state.global_step in self.job.checkpoints or state.global_step % self.job.parameters.save_state_every == 0:
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        loss = logs.get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            p = self.job.parameters
            mend = f"lower learning_rate ({p.learning_rate:g}) or raise warmup_steps ({p.warmup_steps})"
            raise StudyError(f"learning_rate: the loss of step {state.global_step} is {loss}; {mend}.")
        if self.view:
            self.view.show(state.log_history)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.view:
            self.view.close(state.log_history)


def _arguments(job: Job, model: Any) -> TrainingArguments:
    p = job.parameters
    device, dtype = models.pick_device(p), model.dtype
    arguments = TrainingArguments(
        output_dir=str(job.run / ".state"),
        num_train_epochs=p.num_epochs,
        per_device_train_batch_size=job.batch,
        gradient_accumulation_steps=job.accumulated,
        ddp_backend="gloo" if parallel.processes() > 1 and device.type == "cpu" else None,
        ddp_find_unused_parameters=False,
        learning_rate=p.learning_rate,
        lr_scheduler_type=p.lr_scheduler_type,
        warmup_steps=p.warmup_steps,
        weight_decay=p.weight_decay,
        optim="adamw_torch_fused" if p.optim == "adamw_torch" else p.optim,  # the same arithmetic in one pass over the weights
        seed=p.seed,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu=device.type == "cpu",
        activation_checkpointing=p.gradient_checkpointing is True,
        activation_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would write the mean of earlier losses in place of a loss that is no number
        include_num_input_tokens_seen="non_padding",
        save_strategy="no",  # _Watch says when
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        disable_tqdm=True,
        report_to="none",
        log_level="error",
    )
    # One process trains on one device: on a machine with several GPUs Trainer would otherwise wrap the model in DataParallel.
    if arguments.device.type == "cuda":
        arguments._n_gpu = 1
    return arguments
