"""What a training will take, told before it begins: memory from the model's configuration alone, time from two steps of a thin slice.

The slice has the model's own widths, vocabulary, precision and quantisation with random weights, and one layer, then a few. Their
steps' times give those of the whole, since layers are alike; no weight of the real model is loaded or fetched.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib import adapters, memory, models, qlora
from lib.config import Parameters
from lib.files import StudyError
from lib.memory import Shape

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PretrainedConfig

_STEPS = 2
_SLICE_LAYERS = 10
_BIG_LAYER = 100_000_000
"""Parameters of a layer above which the slice has four layers, so that it is made in seconds."""


@dataclass(frozen=True)
class Estimate:
    """What a training will take: bytes at its peak, bytes free, tokens, seconds (None: not measured), dollars (None: no price)."""

    memory: int
    free: int
    device: str
    tokens: int
    seconds: float | None
    dollars: float | None


def estimate(parameters: Parameters, rows: Sequence[dict[str, Any]], *, calibrate: bool = True) -> Estimate:
    """Predicts the peak memory, time and cost of a training on this device.

    Args:
        parameters: of the pair; `price_per_hour` (dollars) gives the cost.
        rows: what `qlora.train` is given.
        calibrate: measure the time; it takes some seconds, and a GPU if there is one.

    Raises:
        StudyError: the training cannot fit this device's memory. Nothing has been loaded then.
    """
    p = parameters
    if p.adapter:
        return Estimate(0, 0, models.pick_device(p).type, 0, 0.0, None)
    config = memory.read_config(p)
    tokenizer = models.load_tokenizer(p)
    encoded = qlora.encode(tokenizer, rows, p).rows
    schedule = qlora.plan(p, len(rows))
    lengths = [len(row["input_ids"]) for row in encoded]
    tokens = round(sum(lengths) / len(lengths) * min(len(lengths), schedule.steps_per_epoch * _rows_a_step(p)) * p.num_epochs)
    counted = memory.shape(config, p)
    free, device = memory.free(p)
    p = memory.settle(p, counted, encoded, free)
    needed = memory.needed(p, counted, encoded)
    if needed > free:
        raise StudyError(
            f"memory: training {p.model_name} is predicted to take {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free on"
            f" {device}; {memory.advice(p, counted, encoded, free)}."
        )
    seconds = _seconds_a_token(p, config, counted, encoded, int(tokenizer.pad_token_id)) * tokens if calibrate else None
    dollars = seconds / 3600 * p.price_per_hour if seconds is not None and p.price_per_hour is not None else None
    return Estimate(needed, free, device, tokens, seconds, dollars)


def table(found: Estimate) -> pd.DataFrame:
    """Returns an estimate as a notebook shows it, one fact a row."""
    import pandas as pd

    if not found.tokens:
        return pd.DataFrame({"": ["nothing is trained: a published adapter is evaluated"]}, index=["training"])
    facts = {
        "peak memory": f"{found.memory / 2**30:.1f} GiB of {found.free / 2**30:.1f} GiB free ({found.device})",
        "tokens": f"{found.tokens:,}",
    }
    if found.seconds is not None:
        minutes = found.seconds / 60
        facts["time"] = f"{minutes / 60:.1f} h" if minutes > 90 else f"{minutes:.1f} min"
    if found.dollars is not None:
        facts["cost"] = f"${found.dollars:.2f}"
    return pd.DataFrame({"": facts.values()}, index=pd.Index(facts.keys()))


def _rows_a_step(p: Parameters) -> int:
    return p.batch_size * p.gradient_accumulation_steps


def _seconds_a_token(p: Parameters, config: PretrainedConfig, counted: Shape, rows: list[dict[str, list[int]]], pad_id: int) -> float:
    layers = counted.layers
    thick = min(layers, 4 if counted.linear // layers > _BIG_LAYER else _SLICE_LAYERS)
    one = _slice_seconds(p, config, 1, rows, pad_id)
    if layers == 1:
        return one
    return one + (layers - 1) * (_slice_seconds(p, config, thick, rows, pad_id) - one) / (thick - 1)


def _slice_seconds(p: Parameters, config: PretrainedConfig, layers: int, rows: list[dict[str, list[int]]], pad_id: int) -> float:
    """Returns the seconds that a token takes in a training step of a model with so many layers."""
    import torch
    from transformers import AutoModelForCausalLM, TrainerCallback

    from lib.trainer import Job, StudyTrainer

    class Clock(TrainerCallback):
        """Times the steps after the first, which warms up."""

        def __init__(self) -> None:
            self.marks: list[float] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.marks.append(time.perf_counter())

    thin, clock = copy.deepcopy(config), Clock()
    text = thin.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    device = models.pick_device(p)
    with tempfile.TemporaryDirectory() as folder, models.quiet(), torch.random.fork_rng():
        AutoModelForCausalLM.from_config(thin, dtype=models.pick_dtype(device)).save_pretrained(folder)
        own = p.model_copy(update={"model_name": folder, "model_revision": None, "num_epochs": 1, "warmup_steps": 0})
        model = adapters.add_lora(models.load_base(own), own)
        order = [row for _ in range(-(-(_STEPS + 1) * _rows_a_step(p) // len(rows))) for row in rows][: (_STEPS + 1) * _rows_a_step(p)]
        manifest: dict[str, Any] = {"seconds": 0.0, "adapters": {}, "resumed_at": []}
        job = Job(Path(folder), own, _STEPS + 1, [], manifest, own.batch_size, own.gradient_accumulation_steps)
        trainer = StudyTrainer(job, model, order, pad_id, progress=False)
        trainer.add_callback(clock)
        trainer.train()
    tokens = [int(entry["num_input_tokens_seen"]) for entry in trainer.state.log_history if "loss" in entry]
    return (clock.marks[-1] - clock.marks[0]) / (tokens[-1] - tokens[0])
