"""The estimate before a training: counts from the configuration alone, and a clear stop where it cannot fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_runs import parameters, rows

from lib import estimate, memory, models
from lib.files import StudyError


def test_a_shape_counts_what_the_loaded_model_has(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig

    from lib import adapters

    p = parameters(tiny_llama, tmp_path, use_4bit=False)
    model = models.load_base(p)
    found = memory.shape(AutoConfig.from_pretrained(tiny_llama), p)
    assert found.linear + found.other == sum(weight.numel() for weight in model.parameters())
    trained = adapters.add_lora(model, p)
    assert found.lora == sum(weight.numel() for weight in trained.parameters() if weight.requires_grad)


def test_time_cost_and_memory_are_told_without_the_models_weights(tiny_llama: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in tiny_llama.iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    p = parameters(bare, tmp_path, price_per_hour=3600.0)
    found = estimate.estimate(p, rows(24))
    assert found.seconds is not None
    assert found.seconds > 0
    assert found.dollars == pytest.approx(found.seconds)
    assert list(estimate.table(found).index) == ["peak memory", "tokens", "time", "cost"]
    with pytest.raises(StudyError, match="cannot be loaded"):
        models.load_base(p)


def test_a_training_that_cannot_fit_stops_before_anything_is_loaded(tiny_llama: Path, tmp_path: Path) -> None:
    p = parameters(tiny_llama, tmp_path, batch_size=10**9)
    with pytest.raises(StudyError, match=r"memory: training .* lower batch_size \(1000000000\)"):
        estimate.estimate(p, rows(24), calibrate=False)


def test_memory_grows_with_what_is_kept(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig

    p = parameters(tiny_llama, tmp_path)
    shape = memory.shape(AutoConfig.from_pretrained(tiny_llama), p)
    plain = memory.peak_memory(p, shape, 200, 100)
    assert memory.peak_memory(p, shape, 400, 100) > plain
    assert memory.peak_memory(p.model_copy(update={"gradient_checkpointing": True}), shape, 200, 100) < plain
    packed = p.model_copy(update={"cache_dequantized": False})
    assert memory.peak_memory(packed, shape, 200, 100) < plain


LLAMA_8B = memory.Shape(6_979_321_856, 1_050_939_392, 41_943_040, 32, 4096, 14336, 128256)


def long_rows(tokens: int) -> list[dict[str, list[int]]]:
    return [{"input_ids": [1] * tokens, "labels": [-100] + [1] * (tokens - 1)}]


def test_what_would_make_a_training_fit_is_told_mildest_first(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An 8B model as on a GPU: bf16, NF4 not unpacked."""
    import torch

    monkeypatch.setattr(models, "pick_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(models, "pick_dtype", lambda _: torch.bfloat16)
    p = parameters(tiny_llama, tmp_path, batch_size=8, use_4bit=False)
    data = long_rows(1024)

    def told(gib: float) -> str:
        return memory.advice(p, LLAMA_8B, data, int(gib * 2**30))

    assert told(60).startswith("set gradient_checkpointing: true, which is predicted to take")
    assert "batch_size: 4, gradient_accumulation_steps: 4" in told(20)
    assert "use_4bit: true" in told(9)
    assert told(2) == "lower batch_size (8) or max_length (256), or take a larger machine"


def test_the_original_settings_of_8b_are_predicted_within_24_gb(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(models, "pick_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(models, "pick_dtype", lambda _: torch.bfloat16)
    p = parameters(tiny_llama, tmp_path, batch_size=8, gradient_checkpointing=True, loss_on="all", max_length=256)
    assert memory.needed(p, LLAMA_8B, long_rows(256)) < 24e9


def test_checkpointing_by_need_is_settled_by_what_is_free(tiny_llama: Path, tmp_path: Path) -> None:
    p, data = parameters(tiny_llama, tmp_path, gradient_checkpointing="auto"), long_rows(200)
    need = memory.needed(p, LLAMA_8B, data)
    assert memory.settle(p, LLAMA_8B, data, 2 * need).gradient_checkpointing is False
    assert memory.settle(p, LLAMA_8B, data, need).gradient_checkpointing is True
    for value in (True, False):
        same = p.model_copy(update={"gradient_checkpointing": value})
        assert memory.settle(same, LLAMA_8B, data, 0) == same


def test_a_loss_in_pieces_is_counted(tiny_llama: Path, tmp_path: Path) -> None:
    p = parameters(tiny_llama, tmp_path, batch_size=1)
    few, many = (memory.peak_memory(p, LLAMA_8B, 1, tokens) for tokens in (1000, 100_000))
    assert many < few + 2**30


def test_bf16_is_for_cards_that_have_it() -> None:
    """Where it is only emulated (Turing and older), fp16 is many times faster."""
    import torch

    chosen = {c: models.gpu_dtype(c) for c in ((7, 0), (7, 5), (8, 0), (8, 6), (9, 0), (12, 0))}
    assert [c for c, dtype in chosen.items() if dtype == torch.float16] == [(7, 0), (7, 5)]
    assert set(chosen.values()) == {torch.float16, torch.bfloat16}
