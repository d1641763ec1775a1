"""Packed batches have the loss and the gradients of padded ones, and cheap dropout is dropout."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import parameters, rows

from lib import adapters, models, qlora


def loss_and_gradient(model: Any, loss: Any) -> tuple[float, Any]:
    import torch

    model.zero_grad()
    loss.backward()
    return loss.item(), torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


@pytest.mark.parametrize("loss_on", ["answer", "all"])
@pytest.mark.parametrize("use_4bit", [True, False])
def test_padded_and_packed_batches_have_the_plain_loss(tiny_llama: Path, tmp_path: Path, loss_on: str, use_4bit: bool) -> None:
    import torch

    from lib import packing, trainer

    p = parameters(tiny_llama, tmp_path, loss_on=loss_on, lora_dropout=0.0, use_4bit=use_4bit)
    tokenizer, model = models.load_tokenizer(p), adapters.add_lora(models.load_base(p), p)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    encoded = qlora.encode(tokenizer, rows(6), p).rows
    padded, packed = trainer.pad(encoded, tokenizer.pad_token_id), packing.pack(encoded)
    apart = packing.pack_apart(encoded)  # as on a GPU: transformers' SDPA with a block mask, made from the position ids
    labels = torch.full_like(padded["shift_labels"], -100)
    labels[:, 1:] = padded["shift_labels"][:, :-1]
    head = model.get_output_embeddings()
    plain, plain_gradient = loss_and_gradient(
        model, model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"], labels=labels).loss
    )
    assert plain_gradient.abs().max() > 1e-3
    for batch in (padded, apart, packed):
        if batch is packed:
            assert packing.enable(model)
        ours, gradient = loss_and_gradient(model, trainer.labelled_loss(model, batch, head))
        assert ours == pytest.approx(plain, abs=1e-5)
        assert torch.allclose(gradient, plain_gradient, atol=1e-6)
    assert packed["attention_mask"].sum() == padded["attention_mask"].sum()
    shared = next(i for i, column in enumerate(zip(*(row["input_ids"] for row in encoded), strict=False)) if len(set(column)) > 1)
    assert packed["segments"][0] == (0 if loss_on == "all" else shared)  # the system turn, up to where questions differ
    assert packed["input_ids"].numel() == packed["segments"].sum() < padded["input_ids"].numel()


def test_the_loss_is_torchs_where_probabilities_underflow_and_where_there_is_no_token() -> None:
    import torch

    from lib.trainer import _CrossEntropy

    logits = torch.tensor([[300.0, 0.0, -300.0], [1.0, 2.0, 3.0], [-200.0, -200.0, 0.0]])
    wanted = torch.tensor([2, 0, 2])
    found = []
    for loss in (lambda x, y: torch.nn.functional.cross_entropy(x, y, reduction="sum"), _CrossEntropy.apply):
        own = logits.clone().requires_grad_()
        total = loss(own, wanted)
        (total / 3).backward()
        found.append((total.detach(), own.grad))
    torch.testing.assert_close(found[1], found[0])
    empty = torch.zeros(0, 3, requires_grad=True)
    nothing = _CrossEntropy.apply(empty, torch.zeros(0, dtype=torch.long))
    nothing.backward()
    assert nothing.item() == 0
    assert empty.grad is not None


def test_attention_on_a_gpu_is_what_the_card_and_the_packages_allow() -> None:
    """Flash attention itself runs on no CPU; that its name is chosen only where it can run is all that is tested of it."""
    import torch

    from lib import packing

    assert packing.attention((8, 0), torch.bfloat16, installed=True) == "flash_attention_2"
    assert packing.attention((8, 9), torch.bfloat16, installed=False) == "sdpa"
    assert packing.attention((7, 5), torch.float16, installed=True) == "sdpa"
    assert packing.attention((9, 0), torch.float32, installed=True) == "sdpa"
    there = importlib.util.find_spec("flash_attn") is not None
    assert (packing.attention((9, 0), torch.bfloat16) == "flash_attention_2") == there


@pytest.mark.parametrize("loss_on", ["answer", "all"])
@pytest.mark.parametrize("n_items", [None, 1000])
def test_a_loss_in_pieces_is_the_plain_one(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss_on: str, n_items: int | None
) -> None:
    import torch

    from lib import memory, trainer

    p = parameters(tiny_llama, tmp_path, loss_on=loss_on, lora_dropout=0.0)
    tokenizer, model = models.load_tokenizer(p), adapters.add_lora(models.load_base(p), p)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    head = model.get_output_embeddings()
    batch = trainer.pad(qlora.encode(tokenizer, rows(6), p).rows, tokenizer.pad_token_id)
    seen: list[int] = []
    head.register_forward_hook(lambda _layer, inputs, _output: seen.append(len(inputs[0])))
    plain, gradient = loss_and_gradient(model, trainer.labelled_loss(model, batch, head, n_items))
    whole = max(seen)
    monkeypatch.setattr(memory, "WHOLE_LOGITS", 0)
    monkeypatch.setattr(memory, "PIECE_LOGITS", 7 * len(tokenizer))
    seen.clear()
    pieces, ours = loss_and_gradient(model, trainer.labelled_loss(model, batch, head, n_items))
    assert max(seen) == 7 < whole
    assert pieces == pytest.approx(plain, abs=1e-4)
    assert torch.allclose(ours, gradient, atol=1e-6)


def test_logits_that_a_model_caps_are_never_taken_from_its_output_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 2 caps its logits after the output layer: pieces would leave the cap out."""
    import torch
    from tiny_models import make_gemma
    from transformers import AutoModelForCausalLM

    from lib import memory, trainer

    model = AutoModelForCausalLM.from_pretrained(make_gemma(tmp_path / "gemma"))
    batch = trainer.pad([{"input_ids": [2, 5, 7, n], "labels": [-100, -100, 7, n]} for n in (8, 9)], 0)
    with torch.no_grad():
        plain = trainer.labelled_loss(model, batch, model.get_output_embeddings()).item()
        monkeypatch.setattr(memory, "WHOLE_LOGITS", 0)
        for _ in range(2):
            assert trainer.labelled_loss(model, batch, model.get_output_embeddings()).item() == plain


def test_packing_keeps_to_models_with_plain_attention(tiny_llama: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, Gemma3TextConfig, MistralConfig, Qwen2Config

    from lib import packing, trainer

    p = parameters(tiny_llama, tmp_path, lora_dropout=0.0)
    shape = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    batch = [{"input_ids": [1, 5, 7, n, n + 1], "labels": [-100, -100, -100, n, n + 1]} for n in (8, 9)]
    batch.append({"input_ids": [1, 5, 7, 8], "labels": [-100, -100, -100, 8]})
    for settings, packs in ((Qwen2Config(**shape), True), (MistralConfig(**shape), False), (Gemma3TextConfig(**shape), False)):
        torch.manual_seed(0)
        model = adapters.add_lora(AutoModelForCausalLM.from_config(settings), p)
        head = model.get_output_embeddings()
        padded = trainer.labelled_loss(model, trainer.pad(batch, 0), head)
        assert packing.enable(model) == packs, settings.model_type
        if packs:
            assert packing.pack(batch)["segments"].tolist() == [2, 2, 2, 1]  # without last tokens
            assert trainer.labelled_loss(model, packing.pack(batch), head).item() == pytest.approx(padded.item(), abs=1e-5)


def test_cheap_dropout_is_dropout() -> None:
    import torch

    from lib.packing import CheapDropout

    layer, x = CheapDropout(0.05), torch.ones(1001, 999, requires_grad=True)
    torch.manual_seed(3)
    first, second = layer(x), layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    kept = first != 0
    assert kept.float().mean().item() == pytest.approx(0.95, abs=1e-3)
    assert torch.allclose(first[kept], torch.tensor(1 / 0.95))
    assert (kept & (second != 0)).float().mean().item() == pytest.approx(0.95**2, abs=1e-3)
    first.sum().backward()
    assert torch.equal(x.grad, first.detach())
    assert layer.eval()(x) is x
