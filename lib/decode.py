"""Decoding at token level: one batch of prompts, many LoRA adapters, a random stream of its own for every row.

transformers' `generate` draws one stream for a whole batch and holds one adapter at a time. Here a row's answer depends on its own
uniforms alone, so it stays the same whatever else is in the batch, and rows of several checkpoints share the products with the
base weights. This module knows models and tensors, and nothing of the study's files; it sits beneath config's level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from lib.files import StudyError, shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHORTEST_PREFIX = 4
"""Tokens that all prompts of a batch must share before the prefix is computed apart: below, a second forward costs more."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: temperature 0 is greedy; `stop_ids` end an answer; at most `max_new_tokens` tokens."""

    temperature: float
    top_p: float
    max_new_tokens: int
    stop_ids: frozenset[int]


class Adapters:
    """LoRA adapters of several checkpoints on one base model, chosen row by row.

    With A (rank × in) and B (out × rank) of all checkpoints stacked along the rank, a layer adds
    `((x @ A.T) * mask) @ (scaling * B).T` to its output, where `mask` keeps a row's own ranks: two products for the whole batch
    instead of two for each checkpoint. Multiplied by zero, the other checkpoints add exactly nothing.
    """

    def __init__(self, model: PreTrainedModel, folders: Mapping[int, Path]) -> None:
        """Reads the adapters with peft and hooks them to the layers of `model`; the hooks do nothing until `select`.

        Args:
            model: the base model.
            folders: the adapter's folder for each step; step 0 is the base model and takes none.

        Raises:
            StudyError: an adapter cannot be read, is no plain LoRA on linear layers, or has other shapes than the first.
        """
        self._order = {step: i for i, step in enumerate(sorted(folders))}
        self._own = torch.zeros(0, 0)
        self._first, self._masks = 0, dict[int, torch.Tensor]()
        layers = dict(model.named_modules())
        for name, pairs in (_read_adapters(model, folders) if folders else {}).items():
            down = torch.cat([a for a, _ in pairs]).to(model.dtype)
            up = torch.cat([b.T for _, b in pairs]).to(model.dtype)
            layers[name].register_forward_hook(self._hook(down, up, rank=len(pairs[0][0])))

    def select(self, steps: Sequence[int], device: torch.device) -> None:
        """Says which checkpoint each row of the coming forward passes belongs to (0: the base model)."""
        chosen = [self._order[step] for step in steps if step]
        self._first, last = (min(chosen), max(chosen) + 1) if chosen else (0, 0)
        own = torch.zeros(len(steps), last - self._first)
        for row, step in enumerate(steps):
            if step:
                own[row, self._order[step] - self._first] = 1
        self._own, self._masks = own.to(device), {}

    def _hook(self, down: torch.Tensor, up: torch.Tensor, rank: int) -> Callable[[Any, Any, torch.Tensor], torch.Tensor | None]:
        """Returns the forward hook of one layer; `down` (checkpoints·rank × in), `up` (checkpoints·rank × out)."""

        def add(_layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            count = self._own.shape[1]
            if not count:
                return None
            if rank not in self._masks:
                self._masks[rank] = self._own.to(down.dtype).repeat_interleave(rank, dim=1)[:, None]
            ranks = slice(self._first * rank, (self._first + count) * rank)
            inner = torch.nn.functional.linear(inputs[0], down[ranks]) * self._masks[rank]
            return torch.addmm(output.flatten(0, 1), inner.flatten(0, 1), up[ranks]).view(output.shape)

        return add


def _read_adapters(model: PreTrainedModel, folders: Mapping[int, Path]) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Returns A (rank × in) and scaled B (out × rank) of each adapter, in order of step, by the layer's name in `model`."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    wrapped: Any = None
    for step in sorted(folders):
        try:
            if wrapped is None:
                wrapped = PeftModel.from_pretrained(model, folders[step], adapter_name=str(step), low_cpu_mem_usage=True)
            else:
                wrapped.load_adapter(folders[step], adapter_name=str(step), low_cpu_mem_usage=True)
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise StudyError(f"{shown(folders[step])}: the adapter cannot be laid on the base model ({reason}).") from error
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    plain = not any(getattr(config, "modules_to_save", None) for config in wrapped.peft_config.values())
    for name, layer in wrapped.base_model.model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            plain = plain and isinstance(layer.get_base_layer(), torch.nn.Linear) and hasattr(layer, "lora_A")
            plain = plain and not layer.lora_variant and not any(layer.lora_bias.values()) and len(layer.lora_A) == len(folders)
            if plain:
                steps = [str(step) for step in sorted(folders)]
                found[name] = [(layer.lora_A[s].weight.detach(), layer.lora_B[s].weight.detach() * layer.scaling[s]) for s in steps]
                plain = len({a.shape for a, _ in found[name]}) == 1
    wrapped.unload()
    if not plain:
        raise StudyError(
            f"{shown(folders[min(folders)].parent)}: adapters must be plain LoRA on linear layers (no DoRA, bias or modules_to_save), "
            "with the same layers and ranks at every step."
        )
    return found


class _RoomyLayer(DynamicLayer):
    """One layer's keys and values with room for the tokens to come: a step writes its own in place, where DynamicLayer copies all."""

    def __init__(self, layer: DynamicLayer, room: int) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self._length = layer.keys.shape[-2]
        self._buffers = [torch.cat([t, t.new_zeros(*t.shape[:2], room, t.shape[3])], dim=2) for t in (layer.keys, layer.values)]
        self._show()

    def _show(self) -> None:
        self.keys, self.values = (buffer[:, :, : self._length] for buffer in self._buffers)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        start, self._length = self._length, self._length + key_states.shape[-2]
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start : self._length] = new
        self._show()
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._buffers = [buffer.index_select(0, beam_idx) for buffer in self._buffers]
        self._show()


def pick(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Draws one token a row by inverting the cumulative distribution, summed in float64 and in order of token id.

    Token order makes the draw robust: a rounding difference in the logits moves the token only where a uniform lies within
    rounding of a boundary, while in order of probability two near-equal tokens that change places would move many. The sum is
    taken in two stages, over blocks of tokens and then within one block, since a running sum over a whole vocabulary in float64
    would take as long as a tenth of the forward pass.

    Args:
        logits: (rows, vocabulary).
        uniforms: (rows,), float64 in [0, 1); unused at temperature 0.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: the smallest set of likeliest tokens that holds this much probability is drawn from (with all ties at its edge).

    Returns:
        (rows,) token ids.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.float() / temperature if temperature != 1 else logits.float(), dim=-1)
    if top_p < 1:
        probabilities = probabilities.where(probabilities >= _edge(probabilities, top_p), 0.0)
    blocks = probabilities.view(len(logits), -1, math.gcd(logits.shape[-1], 256))
    masses = blocks.sum(-1, dtype=torch.float64)
    ends = masses.cumsum(-1)
    target = uniforms[:, None] * ends[:, -1:]
    block = torch.searchsorted(ends, target, right=True).clamp(max=ends.shape[-1] - 1)
    within = blocks.take_along_dim(block[..., None], 1)[:, 0].double().cumsum(-1)
    start = ends.gather(1, block) - masses.gather(1, block)
    token = torch.searchsorted(within, target - start, right=True).clamp(max=within.shape[-1] - 1)
    return (block * within.shape[-1] + token)[:, 0]


def _edge(probabilities: torch.Tensor, top_p: float, count: int = 512) -> torch.Tensor:
    """Returns the smallest probability within each row's top-p set, (rows, 1).

    Sorting a whole vocabulary takes as long as the forward pass, so the `count` likeliest tokens are tried first, and more for
    the rows whose set is larger.
    """
    count = min(count, probabilities.shape[-1])
    likeliest = probabilities.topk(count).values
    sums = likeliest.cumsum(-1, dtype=torch.float64)
    edge = likeliest.gather(-1, (sums < top_p).sum(-1, keepdim=True).clamp(max=count - 1))
    larger = sums[:, -1] < top_p
    if count < probabilities.shape[-1] and bool(larger.any()):
        edge[larger] = _edge(probabilities[larger], top_p, 8 * count)
    return edge


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    adapters: Adapters,
    prompts: Sequence[Sequence[int]],
    steps: Sequence[int],
    uniforms: np.ndarray,
    sampling: Sampling,
    progress: Callable[[int], object] | None = None,
) -> list[list[int]]:
    """Answers one batch of prompts.

    Equal prompts of one step are read once; finished rows leave the batch. Position ids count a row's own tokens, so left padding
    changes nothing but rounding.

    Args:
        model: the base model, in eval mode.
        adapters: its adapters; rows of step 0 get none.
        prompts: token ids of each row.
        steps: the checkpoint of each row.
        uniforms: (rows, max_new_tokens), float64 in [0, 1): each row's own random stream.
        sampling: temperature, top_p, length and stop tokens.
        progress: called with the number of tokens that need no more work, `max_new_tokens` a row in all.

    Returns:
        The new token ids of each row, the stop token included where there is one.

    Raises:
        StudyError: the model's output is not finite.
    """
    device, limit = model.device, sampling.max_new_tokens
    # MPS has no float64: the draw then happens on the CPU.
    draw_on = torch.device("cpu") if device.type == "mps" else device
    streams = torch.from_numpy(uniforms).to(draw_on)
    stops = torch.tensor(sorted(sampling.stop_ids), device=draw_on)
    cache, mask, logits, reading = _prefill(model, adapters, prompts, steps)
    index = torch.tensor(reading, device=device)
    cache.reorder_cache(index)
    cache.layers = [_RoomyLayer(layer, limit) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    mask = torch.cat([mask[index], mask.new_ones(len(prompts), limit)], dim=1)
    logits, width = logits[index], mask.shape[1] - limit
    adapters.select(steps, device)

    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # the rows still in the batch, finished or not
    open_rows = set(rows)
    for count in range(limit):
        at = torch.tensor(rows, device=draw_on)
        if not logits.amax(-1).isfinite().all():
            raise StudyError(f"steps {sorted(set(steps))}: the model's output is not finite; train again with a lower learning_rate.")
        tokens = pick(logits.to(draw_on), streams[at, count], sampling.temperature, sampling.top_p)
        stopped = torch.isin(tokens, stops).tolist()
        drawn = tokens.tolist()
        for row, token, stop in zip(rows, drawn, stopped, strict=True):
            if row in open_rows:
                answers[row].append(token)
                if progress:
                    progress(limit - count if stop else 1)
                if stop:
                    open_rows.remove(row)
        if not open_rows or count == limit - 1:
            break
        tokens = tokens.to(device)
        # Leaving costs a copy of the cache, so the finished rows wait until they are an eighth of the batch.
        if len(open_rows) <= len(rows) * 7 // 8:
            stay = [i for i, row in enumerate(rows) if row in open_rows]
            index = torch.tensor(stay, device=device)
            cache.reorder_cache(index)
            mask, tokens, rows = mask[index], tokens[index], [rows[i] for i in stay]
            adapters.select([steps[row] for row in rows], device)
        seen = mask[:, : width + count + 1]
        place = seen.sum(1, keepdim=True) - 1
        logits = model(input_ids=tokens[:, None], attention_mask=seen, position_ids=place, cache=cache, use_cache=True).logits[:, -1]
    return answers


def _prefill(
    model: PreTrainedModel, adapters: Adapters, prompts: Sequence[Sequence[int]], steps: Sequence[int]
) -> tuple[DynamicCache, torch.Tensor, torch.Tensor, list[int]]:
    """Reads every different prompt of every step once, and what all prompts begin with (a system turn) once a step.

    Returns:
        The cache, the attention mask (different prompts × width) and the next token's logits (different prompts × vocabulary), and
        for each row the index of its prompt among the different ones.
    """
    device = model.device
    different = list(dict.fromkeys(zip(steps, map(tuple, prompts), strict=True)))
    reading = {key: i for i, key in enumerate(different)}
    readers = sorted({step for step, _ in different})
    cache = DynamicCache(config=model.config)
    shared = _common_prefix([prompt for _, prompt in different])
    # The prefix sits apart from the padded rest: a sliding window, which counts places, would see the padding between.
    if shared < _SHORTEST_PREFIX or len(readers) == len(different) or any(type(layer) is not DynamicLayer for layer in cache.layers):
        shared = 0
    if shared:
        adapters.select(readers, device)
        prefix = torch.tensor(different[0][1][:shared], device=device).repeat(len(readers), 1)
        model.get_decoder()(input_ids=prefix, cache=cache, use_cache=True)
        cache.reorder_cache(torch.tensor([readers.index(step) for step, _ in different], device=device))
    adapters.select([step for step, _ in different], device)
    width = max(len(prompt) for _, prompt in different) - shared
    ids = torch.zeros(len(different), width, dtype=torch.long)
    mask = torch.ones(len(different), shared + width, dtype=torch.long)
    for row, (_, prompt) in enumerate(different):
        padding = width - (len(prompt) - shared)
        ids[row, padding:] = torch.tensor(prompt[shared:])
        mask[row, shared : shared + padding] = 0
    ids, mask = ids.to(device), mask.to(device)
    places = (mask.cumsum(1) - 1).clamp(min=0)[:, shared:]
    # The last place as a tensor: a slice would leave the head with strided input, which it multiplies row by row.
    last = torch.tensor([width - 1], device=device)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=places, cache=cache, use_cache=True, logits_to_keep=last).logits[:, -1]
    return cache, mask, logits, [reading[key] for key in zip(steps, map(tuple, prompts), strict=True)]


def _common_prefix(prompts: Sequence[tuple[int, ...]]) -> int:
    """Returns how many tokens all prompts begin with, at least one token of each left over."""
    first, last = min(prompts), max(prompts)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return min(same, min(map(len, prompts)) - 1)
