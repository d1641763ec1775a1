"""Layers laid out for oneDNN give what torch's own linear layers give, trained or not, and stand aside where they cannot be."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from lib import adapters, packing, prepacked
from lib.config import Parameters
from lib.prepacked import Prepacked

SHAPE: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IDS = torch.randint(3, 300, (3, 11), generator=torch.Generator().manual_seed(0))
SETTINGS = [LlamaConfig(**SHAPE, tie_word_embeddings=True), LlamaConfig(**SHAPE, tie_word_embeddings=False), Qwen2Config(**SHAPE)]


def model_of(settings: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():  # Qwen2's biases begin as zeros
            weight.add_(torch.randn_like(weight) * 0.02)
    return model


@pytest.mark.parametrize("settings", SETTINGS, ids=["tied", "untied", "biases"])
@pytest.mark.parametrize("whole", [False, True])
def test_logits_are_those_of_plain_layers(settings: Any, whole: bool) -> None:
    model = model_of(settings)
    with torch.inference_mode():
        plain = model(IDS).logits
        assert prepacked.prepack(model, whole=whole)
        torch.testing.assert_close(model(IDS).logits, plain, rtol=1e-4, atol=1e-5)
        assert model.get_output_embeddings()(torch.zeros(0, 32)).shape == (0, 300), "a batch may have no labelled token"
    kinds = {type(layer) for name, layer in model.named_modules() if name.endswith(("_proj", "lm_head"))}
    assert kinds == {Prepacked}
    assert model.get_output_embeddings().weight.shape == (300, 32)


@pytest.mark.parametrize("settings", SETTINGS, ids=["tied", "untied", "biases"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_losses_and_gradients_are_those_of_peft(settings: Any, dropout: float) -> None:
    found = []
    for laid_out in (False, True):
        model = adapters.add_lora(model_of(settings), Parameters(pair="p", model_name="m", lora_rank=4, lora_dropout=dropout))
        torch.manual_seed(1)
        for name, weight in model.named_parameters():
            if "lora_B" in name:  # zeros at first, which would hide half of the gradients
                torch.nn.init.normal_(weight, std=0.1)
        packing.enable(model)
        assert not laid_out or prepacked.prepack(model, gradients=True)
        model.train()
        torch.manual_seed(2)  # of the dropout
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
        with model.disable_adapter(), torch.no_grad():
            found.append((loss.detach(), gradients, model.eval()(IDS).logits))
    (loss, gradients, base), (ours, own, bare) = found
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bare, base, rtol=1e-4, atol=1e-5)
    assert own.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(own[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_layers_stay_as_they_are_where_memory_is_short_or_torch_lacks_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(SETTINGS[0])
    half = model_of(SETTINGS[0]).to(torch.bfloat16)
    assert not prepacked.prepack(half)
    with monkeypatch.context() as patch:
        patch.setattr(prepacked.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
        assert not prepacked.prepack(model)
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert not prepacked.prepack(model)
    assert not any(isinstance(layer, Prepacked) for layer in [*model.modules(), *half.modules()])


def test_a_models_own_activation_is_kept(tmp_path: Path) -> None:
    model = model_of(LlamaConfig(**SHAPE, hidden_act="gelu"))
    with torch.inference_mode():
        plain = model(IDS).logits
        assert prepacked.prepack(model, whole=True)
        torch.testing.assert_close(model(IDS).logits, plain, rtol=1e-4, atol=1e-5)
