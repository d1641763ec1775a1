"""Training batches without waste on a CPU: no padding, a common beginning computed once, dropout from cheap random bits.

On a CPU nearly all time goes into matrix products, so it pays to give them fewer tokens. A batch becomes one sequence: the beginning
that all its rows share (the template's system prompt, a third of a short row), then the rest of each row. Attention alone knows
where rows begin and end; every other layer works token by token and needs not know. Losses and gradients are those of the padded batch;
with dropout, rows share the masks of their common beginning. On a GPU rows stand end to end, each whole, for transformers' own attention.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

IGNORED = -100
"""The label of a token that carries no loss, as everywhere in transformers."""

_NAME = "study_packed"


@dataclass(frozen=True)
class Segments:
    """Where the rows of a packed batch lie: `prefix` common tokens first, then `lengths[i]` tokens of row i; masks by length."""

    prefix: int
    lengths: list[int]
    masks: dict[int, torch.Tensor]


def enable(model: Any) -> bool:
    """Prepares a causal language model with LoRA for packed batches, where that is safe: on a CPU or an NVIDIA GPU, with plain attention.

    A GPU gets rows end to end and `attention`; what follows of common beginnings and of dropout is for the CPU.

    Returns:
        Whether batches are to be packed (`pack`); if not, they are to be padded, and the model is as it was.
    """
    settings = model.config.get_text_config()
    kinds = set(getattr(settings, "layer_types", None) or ["full_attention"])
    windowed = getattr(settings, "sliding_window", None) and getattr(settings, "use_sliding_window", True)
    plain = kinds == {"full_attention"} and not windowed and not getattr(settings, "attn_logit_softcapping", None)
    base = model.get_base_model()
    if model.device.type not in {"cpu", "cuda"} or not plain or not getattr(base, "_supports_attention_backend", False):
        return False
    if model.device.type == "cuda":
        base.set_attn_implementation(attention(torch.cuda.get_device_capability(model.device), model.dtype))
        return True
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, lambda *args, **kwargs: None)  # rows are kept apart in _attention
    base.set_attn_implementation(_NAME)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Dropout and child.p > 0:
                setattr(parent, name, CheapDropout(child.p))
    return True


def attention(capability: tuple[int, int], dtype: torch.dtype, installed: bool | None = None) -> str:
    """Returns the attention for packed rows on an NVIDIA GPU, by its transformers name.

    Both keep rows apart by their position ids: flash attention by each row's length, where the package flash_attn is there and can
    run; else SDPA, with a mask in blocks.

    Args:
        capability: the card's compute capability.
        dtype: of the arithmetic.
        installed: whether flash_attn is there; None looks.
    """
    if installed is None:
        installed = importlib.util.find_spec("flash_attn") is not None
    fits = capability >= (8, 0) and dtype in {torch.bfloat16, torch.float16}
    return "flash_attention_2" if installed and fits else "sdpa"


def pack_apart(rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Lays rows out end to end, each whole; transformers keeps them apart by `position_ids`, which begin anew with each.

    Returns:
        As `pack`, without `segments`.
    """
    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": torch.tensor([[token for row in ids for token in row]]),
        "position_ids": torch.tensor([[place for row in ids for place in range(len(row))]]),
        "shift_labels": torch.tensor([[label for row in rows for label in (*row["labels"][1:], IGNORED)]]),
        "attention_mask": _lengths_mask(ids),
    }


def _lengths_mask(ids: Sequence[Sequence[int]]) -> torch.Tensor:
    longest = max(map(len, ids))
    return torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])


def pack(rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Lays rows out as one sequence whose common beginning stands once, and without each row's last token, which predicts nothing.

    The token before the first labelled one is never in the beginning: what it predicts belongs to its row.

    Args:
        rows: each with `input_ids` and `labels`, of two tokens or more.

    Returns:
        `input_ids`, `position_ids`, `shift_labels` (the label of the next token), each int64 of shape (1, tokens); `segments`: the
        length of the beginning, then that of each row's rest; `attention_mask` of shape (rows, longest row), which tells how
        many tokens the rows have when laid out plainly.
    """
    ids = [row["input_ids"] for row in rows]
    prefix = min(_before_labels(row["labels"]) for row in rows) if len(rows) > 1 else 0
    while any(row[:prefix] != ids[0][:prefix] for row in ids):
        prefix -= 1
    tokens, positions, labels = list(ids[0][:prefix]), list(range(prefix)), [IGNORED] * prefix
    for row in rows:
        tokens += row["input_ids"][prefix:-1]
        positions += range(prefix, len(row["input_ids"]) - 1)
        labels += row["labels"][prefix + 1 :]
    return {
        "input_ids": torch.tensor([tokens]),
        "position_ids": torch.tensor([positions]),
        "shift_labels": torch.tensor([labels]),
        "segments": torch.tensor([prefix, *(len(row) - 1 - prefix for row in ids)]),
        "attention_mask": _lengths_mask(ids),
    }


def segments_of(described: torch.Tensor) -> Segments:
    """Returns the segments that `pack` described, with the causal masks of rows that follow the common beginning."""
    prefix, *lengths = described.tolist()
    masks = {n: torch.ones(n, prefix + n, dtype=torch.bool).tril(prefix) for n in set(lengths)} if prefix else {}
    return Segments(prefix, lengths, masks)


def _before_labels(labels: list[int]) -> int:
    """Returns how many tokens come before the one that predicts the first label (all but the last two, where there is no label)."""
    first = next((i for i, label in enumerate(labels) if label != IGNORED), len(labels) - 1)
    return max(0, first - 1)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attends within each row and from it to the common beginning; all of shape (1, heads, tokens, size of a head)."""
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    options: dict[str, Any] = {"scale": scaling, "dropout_p": dropout, "enable_gqa": query.shape[1] != key.shape[1]}
    # Split, not sliced: a split's backward pass is one concatenation, a slice's would fill the whole sequence with zeros.
    sizes = [segments.prefix, *segments.lengths]
    (q0, *queries), (k0, *keys), (v0, *values) = (torch.split(tensor, sizes, dim=2) for tensor in (query, key, value))
    outputs = [scaled_dot_product_attention(q0, k0, v0, is_causal=True, **options)] if segments.prefix else []
    for q, k, v in zip(queries, keys, values, strict=True):
        if segments.prefix:
            k, v, mask = torch.cat([k0, k], 2), torch.cat([v0, v], 2), segments.masks[q.shape[2]]
            outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, **options))
        else:
            outputs.append(scaled_dot_product_attention(q, k, v, is_causal=True, **options))
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


class CheapDropout(torch.nn.Module):
    """Dropout whose probability is exact to 1/65,536, at a third of the time that PyTorch's takes on a CPU.

    It draws 64 random bits at a time, from the same seeded stream, for four elements; PyTorch draws for each element anew.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        lots = words.view(torch.int16)[: x.numel()].view(x.shape)
        kept = lots >= round(self.p * 2**16) - 2**15
        return x * kept.to(x.dtype).mul_(1 / (1 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}"
