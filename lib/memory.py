"""What a training's memory goes into, worked out from the model's configuration alone, and what to change where it does not suffice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lib import models
from lib.config import Parameters

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Rows = Sequence[dict[str, list[int]]]

_LIBRARIES = 520 * 2**20
"""Bytes that Python, torch, transformers, peft and bitsandbytes take before any model (measured on Linux; a GPU's context is alike)."""
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A parameter in NF4: half a byte, and a share of its block's absmax, itself in 8 bits with double quantisation."""

WHOLE_LOGITS = 2**27
"""Logits of one forward pass (labelled tokens × vocabulary) up to which they are held at once: half a GiB in fp32."""
PIECE_LOGITS = 2**25
"""Logits held at once where there are more."""


@dataclass(frozen=True)
class Shape:
    """Counts of a model, from its configuration.

    Attributes:
        linear: weights in the linear layers that are quantised.
        other: weights that are not: embeddings, output layer, norms.
        lora: weights that are trained.
        layers, hidden, intermediate, vocabulary: widths.
    """

    linear: int
    other: int
    lora: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int


def shape(config: PretrainedConfig, parameters: Parameters) -> Shape:
    """Counts a model's weights on the meta device: nothing is loaded, and no memory taken."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    quantised = sum(m.weight.numel() for m in linear)
    text = config.get_text_config()
    return Shape(
        linear=quantised,
        other=sum(weight.numel() for weight in model.parameters()) - quantised,
        lora=sum(parameters.lora_rank * (m.in_features + m.out_features) for m in linear),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        vocabulary=text.vocab_size,
    )


def peak_memory(parameters: Parameters, shape: Shape, tokens_a_row: float, labelled_a_row: float) -> int:
    """Predicts the bytes that a training holds at its peak.

    Weights, what is trained with its gradients and optimizer states, what the forward pass keeps for the backward pass, and the
    logits of labelled tokens. With LoRA and dropout each linear layer keeps an input of its own.

    Args:
        parameters: of the pair; `gradient_checkpointing: auto` counts as off.
        shape: of the model.
        tokens_a_row: mean tokens of a row.
        labelled_a_row: mean tokens of a row that a loss is computed on.
    """
    from lib.prepacked import spare

    p, device = parameters, models.pick_device(parameters)
    width = models.pick_dtype(device).itemsize
    four_bit = p.use_4bit and device.type != "mps"
    unpacked = four_bit and device.type == "cpu" and p.cache_dequantized is not False
    mapped = (shape.linear + shape.other) * width if device.type == "cpu" else 0  # pages of the weights' file stay in memory
    weights = shape.linear * (4 if unpacked else _NF4_BYTES if four_bit else width) + shape.other * width
    if device.type == "cpu" and p.cache_dequantized is not False and (unpacked or not four_bit):
        more = (shape.linear + 2 * shape.hidden * shape.vocabulary) * width  # what `prepacked` lays out on top, on its own condition
        weights += more if spare(more) else 0
    trained = shape.lora * (4 + 4 + (2 if "8bit" in p.optim else 8))
    tokens = p.batch_size * tokens_a_row
    kept = (14 if p.lora_dropout else 9) * shape.hidden + (5 if p.lora_dropout else 4) * shape.intermediate
    checkpointed = p.gradient_checkpointing is True
    whole_layers = 1 if checkpointed else shape.layers
    states = tokens * width * (whole_layers * kept + (shape.layers * shape.hidden if checkpointed else 0))
    numbers = p.batch_size * labelled_a_row * shape.vocabulary
    logits = min(numbers, WHOLE_LOGITS if numbers <= WHOLE_LOGITS else PIECE_LOGITS) * (3 * 4)  # logits, in fp32 again, and their softmax
    return int(_LIBRARIES + mapped + weights + trained + states + logits)


def read_config(p: Parameters) -> PretrainedConfig:
    """Reads the base model's configuration, and no weight."""
    from transformers import AutoConfig

    with models.quiet(), models.clear_errors(p):
        return AutoConfig.from_pretrained(models.source(p), revision=p.model_revision, trust_remote_code=False)


def free(p: Parameters) -> tuple[int, str]:
    """Returns the bytes free on the device, and the device's name."""
    import torch

    device = models.pick_device(p)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], torch.cuda.get_device_name(device)
    import psutil

    return psutil.virtual_memory().available, device.type


def needed(parameters: Parameters, shape: Shape, rows: Rows) -> int:
    """Predicts the bytes that a training on encoded rows holds at its peak; see `peak_memory`."""
    tokens = sum(len(row["input_ids"]) for row in rows)
    labelled = sum(label >= 0 for row in rows for label in row["labels"])
    return peak_memory(parameters, shape, tokens / len(rows), labelled / len(rows))


def settle(parameters: Parameters, shape: Shape, rows: Rows, free: int) -> Parameters:
    """Returns the parameters with `gradient_checkpointing: auto` decided: on where a training without it would not fit with room to spare.

    It changes no number, only time: what the forward pass computed is computed again.

    Args:
        parameters: of the pair.
        shape: of the model.
        rows: encoded rows.
        free: bytes free on the device.
    """
    p = parameters
    if p.gradient_checkpointing != "auto":
        return p
    return p.model_copy(update={"gradient_checkpointing": needed(p, shape, rows) > 0.85 * free})


def advice(parameters: Parameters, shape: Shape, rows: Rows, free: int) -> str:
    """Says what to set so that a training fits `free` bytes: first what leaves the results as they are, then what changes them."""
    p, changed = parameters, dict[str, Any]()
    steps: list[dict[str, Any]] = [{"gradient_checkpointing": True}] if p.gradient_checkpointing is not True else []
    batch = p.batch_size
    while batch % 2 == 0:
        batch //= 2
        steps.append({"batch_size": batch, "gradient_accumulation_steps": p.gradient_accumulation_steps * (p.batch_size // batch)})
    steps += [{"use_4bit": True}] if not p.use_4bit else []
    steps += [{"optim": "paged_adamw_8bit"}] if "8bit" not in p.optim else []
    for step in steps:
        changed |= step
        size = needed(p.model_copy(update=changed), shape, rows)
        if size <= free:
            told = ", ".join(f"{name}: {str(value).lower() if value is True else value}" for name, value in changed.items())
            return f"set {told}, which is predicted to take {size / 2**30:.1f} GiB"
    return f"lower batch_size ({p.batch_size}) or max_length ({p.max_length}), or take a larger machine"
