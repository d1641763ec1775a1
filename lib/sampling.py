"""What every backend that draws answers shares: rows, their prompts and random streams, and what drawn tokens become."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lib import models
from lib.config import Parameters
from lib.files import StudyError

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

    from lib.data import Question


@dataclass(frozen=True)
class Row:
    """One answer to be drawn."""

    step: int
    question: Question
    sample: int


def _key(parameters: Parameters, row: Row) -> bytes:
    name = [parameters.seed, row.step, row.question.question_set, row.question.question_id, row.sample]
    return hashlib.sha256(json.dumps(name).encode()).digest()


def uniforms(parameters: Parameters, row: Row) -> np.ndarray:
    """Returns a row's random stream, (max_new_tokens,) in [0, 1): Philox, keyed by seed, step, question and sample."""
    import numpy as np

    key = int.from_bytes(_key(parameters, row)[:16], "little")
    return np.random.Generator(np.random.Philox(key=key)).random(parameters.max_new_tokens)


def row_seed(parameters: Parameters, row: Row) -> int:
    """Returns a row's seed, 63 bits of the same key, for backends that draw from a generator of their own."""
    return int.from_bytes(_key(parameters, row)[:8], "little") >> 1


def prompts(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], parameters: Parameters, room: int | None) -> list[list[int]]:
    """Returns the token ids of each row's prompt.

    Args:
        tokenizer: the base model's.
        rows: the rows.
        parameters: what `models.prompt_text` reads, and max_new_tokens.
        room: tokens of the model's context; None where it is unknown.

    Raises:
        StudyError: prompt and answer exceed the model's context.
    """
    p = parameters
    texts = [models.prompt_text(tokenizer, row.question.question, p, system=row.question.system) for row in rows]
    found = [models.prompt_ids(tokenizer, text) for text in texts]
    longest = max(map(len, found))
    if room and longest + p.max_new_tokens > room:
        raise StudyError(f"max_new_tokens: {p.max_new_tokens} after a prompt of {longest} tokens exceed the model's context of {room}.")
    return found


def stop_ids(tokenizer: PreTrainedTokenizerBase, eos: int | Sequence[int] | None, parameters: Parameters) -> frozenset[int]:
    """Returns the tokens that end an answer: the chat template's end of turn, and `eos`, those of the model's generation settings."""
    end = tokenizer.convert_tokens_to_ids(models.end_of_turn(tokenizer, parameters))
    own = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    return frozenset({int(end), *map(int, own)})


def told(ids: Sequence[int], stops: Collection[int], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Returns response, n_tokens and finish_reason of an answer's tokens; see `generate.generate`."""
    stopped = bool(ids) and ids[-1] in stops
    ids = ids[:-1] if stopped else ids
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return {"response": text, "n_tokens": len(ids), "finish_reason": "stop" if stopped else "length"}
