"""The estimate before a training: counts from the configuration alone, and a clear stop where it cannot fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_runs import parameters, rows

from lib import estimate, models
from lib.files import StudyError


def test_a_shape_counts_what_the_loaded_model_has(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig

    from lib import adapters

    p = parameters(tiny_llama, tmp_path, use_4bit=False)
    model = models.load_base(p)
    found = estimate.shape(AutoConfig.from_pretrained(tiny_llama), p)
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
    shape = estimate.shape(AutoConfig.from_pretrained(tiny_llama), p)
    plain = estimate.peak_memory(p, shape, 200, 100)
    assert estimate.peak_memory(p, shape, 400, 100) > plain
    assert estimate.peak_memory(p.model_copy(update={"gradient_checkpointing": True}), shape, 200, 100) < plain
    packed = p.model_copy(update={"cache_dequantized": False})
    assert estimate.peak_memory(packed, shape, 200, 100) < plain
