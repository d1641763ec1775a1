"""The probe's states by the plain path: one conversation, one forward pass, nothing shared. The encoder is tested and timed against it."""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaModel

from lib import models, probe


@functools.cache
def _model(layers: int) -> LlamaModel:
    """The embedded model as transformers loads it, without the layers that nobody reads."""
    return LlamaModel.from_pretrained(models.fetch_embedded(), dtype=torch.float32, num_hidden_layers=layers).eval()


def states(encoder: probe.Encoder, question: str, answer: str) -> NDArray[np.float32]:
    """Returns what `Encoder.encode` gives for one answer, shape [1, layers, 2, width]; the prompt is the model's own chat template."""
    told = [{"role": "user", "content": question}]
    prompt = encoder._tokenizer.apply_chat_template(told, add_generation_prompt=True, return_dict=True).input_ids
    tokens = encoder._tokenizer(answer, add_special_tokens=False).input_ids
    model, last = _model(max(encoder.layers)), list[torch.Tensor]()
    hook = model.norm.register_forward_pre_hook(lambda _module, given: last.append(given[0]))  # the last of hidden_states is normed
    with torch.inference_mode():
        found = model(input_ids=torch.tensor([[*prompt, *tokens]]), output_hidden_states=True).hidden_states
    hook.remove()
    found = [*found[:-1], *last]
    read = torch.stack([found[layer][0] for layer in encoder.layers])
    return torch.stack([read[:, len(prompt) :].mean(1), read[:, len(prompt) - 1]], dim=1)[None].numpy()
