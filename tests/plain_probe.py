"""The probe's states by the plain path: one conversation, one forward pass, nothing shared. The encoder is tested and timed against it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from lib import probe


def states(encoder: probe.Encoder, question: str, answer: str) -> NDArray[np.float32]:
    """Returns what `Encoder.encode` gives for one answer, shape [1, layers, 2, width]; the prompt is the model's own chat template."""
    told = [{"role": "user", "content": question}]
    prompt = encoder._tokenizer.apply_chat_template(told, add_generation_prompt=True, return_dict=True).input_ids
    tokens = encoder._tokenizer(answer, add_special_tokens=False).input_ids
    with torch.inference_mode():
        encoder._model(input_ids=torch.tensor([[*prompt, *tokens]]), use_cache=False)
    read = torch.stack([encoder._states[layer][0] for layer in encoder.layers])
    return torch.stack([read[:, len(prompt) :].mean(1), read[:, len(prompt) - 1]], dim=1)[None].numpy()
