"""Decoding at token level: one batch of prompts, many LoRA adapters, a random stream of its own for every row.

transformers' `generate` draws one stream for a whole batch and holds one adapter at a time. Here a row's answer depends on its own
uniforms alone, so it stays the same whatever else is in the batch, and rows of several checkpoints share the products with the
base weights. This module knows models and tensors, and nothing of the study's files; it sits beneath config's level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from lib.files import StudyError
from lib.prepacked import prepack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHORTEST_PREFIX = 4
"""Tokens that all prompts of a batch must share before the prefix is computed apart: below, a second forward costs more."""


Lora = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""An adapter's weights by the name of the layer: A (rank × in), and B (out × rank) times the adapter's scaling."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: temperature 0 is greedy; `stop_ids` end an answer; at most `max_new_tokens` tokens."""

    temperature: float
    top_p: float
    max_new_tokens: int
    stop_ids: frozenset[int]


class Adapters:
    """LoRA adapters of several checkpoints on one base model, chosen row by row.

    The rows of a batch are brought together by checkpoint, and one batched product for all checkpoints at once gives what their adapters
    add, whereas the base weights' products are done for all rows together. The base model takes part as an adapter of zeros, which
    adds exactly nothing.
    """

    def __init__(self, model: PreTrainedModel, weights: Mapping[int, Lora]) -> None:
        """Hooks adapters to the layers of `model`; the hooks do nothing until `select`.

        Args:
            model: the base model; on a CPU its layers are laid out for speed (`lib.prepacked`).
            weights: the adapter of each step; step 0 is the base model and has none.

        Raises:
            StudyError: an adapter does not fit the model, or has other layers or ranks than the first.
        """
        self._order = {step: i for i, step in enumerate([0, *sorted(weights)])}
        self._groups: _Groups | None = None
        stacked = _stack(model, weights)
        prepack(model)
        layers = dict(model.named_modules())
        for name, (down, up) in stacked.items():
            layers[name].register_forward_hook(self._hook(down, up))

    def select(self, steps: Sequence[int], device: torch.device) -> None:
        """Says which checkpoint each row of the coming forward passes belongs to (0: the base model)."""
        self._groups = _Groups([self._order[step] for step in steps], device) if any(steps) else None

    def _hook(self, down: torch.Tensor, up: torch.Tensor) -> Callable[[Any, Any, torch.Tensor], torch.Tensor | None]:
        """Returns the forward hook of one layer; `down` (checkpoints × in × rank), `up` (checkpoints × rank × out)."""

        def add(_layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            groups = self._groups
            if groups is None:
                return None
            a, b = down[groups.chosen], up[groups.chosen]
            if groups.even:
                output.view(len(a), -1, output.shape[-1]).baddbmm_(inputs[0].reshape(len(a), -1, inputs[0].shape[-1]) @ a, b)
                return output
            apart = inputs[0].index_select(0, groups.members).view(len(a), -1, inputs[0].shape[-1])
            return output.add_(((apart @ a) @ b).view(-1, *output.shape[1:]).index_select(0, groups.places))

        return add


class _Groups:
    """The rows of a batch by checkpoint, each group filled up to the largest with a row that is not looked at.

    Attributes:
        chosen: the checkpoints from the first to the last that occur.
        even: the rows lie in order of checkpoint, as many of each, so that nothing needs to be moved.
        members: the row at each place of the groups, one group after the other.
        places: the place of each row.
    """

    def __init__(self, checkpoints: Sequence[int], device: torch.device) -> None:
        self.chosen = slice(min(checkpoints), max(checkpoints) + 1)
        groups = [[row for row, own in enumerate(checkpoints) if own == one] for one in range(self.chosen.start, self.chosen.stop)]
        size = max(map(len, groups))
        members = [row for group in groups for row in (*group, *[0] * (size - len(group)))]
        places = {row: size * i + j for i, group in enumerate(groups) for j, row in enumerate(group)}
        self.even = members == list(range(len(checkpoints)))
        self.members = torch.tensor(members, device=device)
        self.places = torch.tensor([places[row] for row in range(len(checkpoints))], device=device)


def _stack(model: PreTrainedModel, weights: Mapping[int, Lora]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Returns Aᵀ (checkpoints × in × rank) and Bᵀ (checkpoints × rank × out) by layer, the base model's zeros first."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    pairs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for step, adapter in sorted(weights.items()):
        for name, (a, b) in adapter.items():
            layer = layers.get(name)
            if layer is None or (a.shape[1], b.shape[0], a.shape[0]) != (layer.in_features, layer.out_features, b.shape[1]):
                raise StudyError(f"step {step}: the adapter cannot be laid on the base model: {name} is no linear layer of its shapes.")
            pairs.setdefault(name, []).append((a, b))
    stacked = {}
    for name, own in pairs.items():
        if len(own) != len(weights) or len({a.shape for a, _ in own}) > 1:
            raise StudyError(f"steps {sorted(weights)}: their adapters differ in {name}; all must have the same layers and ranks.")
        down, up = (torch.stack([torch.zeros_like(both[0]), *both]).transpose(1, 2) for both in zip(*own, strict=True))
        stacked[name] = (down.to(model.device, model.dtype).contiguous(), up.to(model.device, model.dtype).contiguous())
    return stacked


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
    """Draws one token a row by inverting the cumulative distribution, summed in order of token id.

    Token order makes the draw robust: a rounding difference in the logits moves the token only where a uniform lies within
    rounding of a boundary, while in order of probability two near-equal tokens that change places would move many. The sum is
    taken in two stages, over blocks of tokens and then within one block, each running in float64: over a whole vocabulary that
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
    masses = blocks.sum(-1).double()  # a block's sum in float64 would first write the whole vocabulary out in float64
    ends = masses.cumsum(-1)
    target = _below(uniforms[:, None] * ends[:, -1:], ends[:, -1:])
    block = torch.searchsorted(ends, target, right=True)
    mass = masses.gather(1, block)
    within = blocks.take_along_dim(block[..., None], 1)[:, 0].double().cumsum(-1)
    # A block's own sum, in fp32, and its running sum, in float64, differ by rounding: what counts is the share of the block.
    share = (target - (ends.gather(1, block) - mass)) / mass
    token = torch.searchsorted(within, _below(share * within[:, -1:], within[:, -1:]), right=True)
    return (block * within.shape[-1] + token)[:, 0]


def _below(target: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """Returns the target, or what comes just before the end where rounding has carried it there: no token without probability is drawn."""
    return torch.minimum(target, torch.nextafter(end, torch.zeros_like(end)))


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
