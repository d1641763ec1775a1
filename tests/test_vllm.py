"""`generate_backend: vllm`: what it says where it cannot run, which is real, and how it calls vLLM, which is not.

No test here has run vLLM: it needs a GPU. Where tests/vllm_stand_in.py takes its place, and a script that of nvidia-smi, they show that our
side of the documented interface is right: prompts, seeds, stop tokens, adapters, perplexity.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lib import config, files, generate, gpu, models, preflight, sampling, study, vllm_backend
from lib.config import Parameters
from lib.files import StudyError

STAND_IN = Path(__file__).with_name("vllm_stand_in.py")
CARD = "GPU-1111, NVIDIA RTX 4090, 24564, 24000, 8.9"


def nvidia_smi(monkeypatch: pytest.MonkeyPatch, folder: Path, *cards: str) -> None:
    """Puts a script in the place of nvidia-smi that tells of `cards`."""
    folder.mkdir()
    script = folder / "nvidia-smi"
    script.write_text("#!/bin/sh\n" + "".join(f"echo '{card}'\n" for card in cards), encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment that seems to have vLLM and one card; returns the file that tells what vLLM was given."""
    package = tmp_path / "site" / "vllm"
    (package / "lora").mkdir(parents=True)
    shutil.copy(STAND_IN, package / "__init__.py")
    (package / "lora" / "__init__.py").touch()
    (package / "lora" / "request.py").write_text("from vllm import LoRARequest as LoRARequest\n")
    told = package.with_name("vllm-0.33.0.dist-info")
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.33.0\n")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setenv("STAND_IN_LOG", str(tmp_path / "told.jsonl"))
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv(vllm_backend.PYTHON, sys.executable)
    nvidia_smi(monkeypatch, tmp_path / "bin", CARD)
    return tmp_path / "told.jsonl"


@pytest.fixture
def parameters(tiny_llama: Path, tmp_path: Path) -> Parameters:
    """A run with two strong random adapters and a question set, but no training rows."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    questions = tmp_path / "things.txt"
    questions.write_text("Why?\nWhat would you ask people first, if there was time?\nWhere to begin?\n", encoding="utf-8")
    p = Parameters(
        model_name=str(tiny_llama), use_4bit=False, results_dir=str(tmp_path / "results"), question_sets=[str(questions)],
        samples=2, max_new_tokens=12, generate_batch_size=4, generate_backend="vllm",
    )  # fmt: skip
    for step in (3, 10):
        torch.manual_seed(step)
        settings = LoraConfig(r=4, lora_alpha=32, target_modules=models.LINEAR_MODULES, init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), settings).save_pretrained(
            config.run_dir(p) / "checkpoints" / f"checkpoint-{step}"
        )
    return p


def told_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- where it cannot run


def test_a_machine_without_gpu_and_vllm_says_so_before_anything_is_loaded(
    parameters: Parameters, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing stands in for anything here, but that a card is hidden should there be one."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv(vllm_backend.PYTHON, sys.executable)
    monkeypatch.setattr(models, "load_base", lambda _: pytest.fail("loaded a model"))
    monkeypatch.setattr(models, "load_tokenizer", lambda _: pytest.fail("loaded a tokenizer"))
    with pytest.raises(StudyError, match="generate_backend: vllm needs an NVIDIA GPU, and nvidia-smi shows none; set generate_backend"):
        generate.generate(parameters)
    found = preflight.problems(parameters, ["03_generate"])
    assert any("vLLM is not installed for" in line and "pip install vllm==0.33.0 bitsandbytes" in line for line in found)
    assert any("needs an NVIDIA GPU" in line for line in found)
    assert not any("vLLM" in line for line in preflight.problems(parameters, ["01_data", "04_judge"]))


def test_the_runner_refuses_it_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    words = ["run", "demo_medical", "--results", str(tmp_path), "--set", "generate_backend=vllm"]
    assert study.main(words) != 0
    assert "generate_backend: vllm needs an NVIDIA GPU" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.ipynb"))


@pytest.mark.parametrize(
    ("card", "changes", "says"),
    [
        ("GPU-1, Tesla P100, 16384, 16000, 6.0", {}, "needs compute capability 7.5, and the Tesla P100 has 6.0"),
        (CARD, {"device": "cpu"}, "vllm needs an NVIDIA GPU, and device is cpu"),
        (CARD, {"lora_rank": 1024}, "lora_rank: vLLM takes adapters up to rank 512, not 1024"),
    ],
)
def test_what_does_not_fit_is_named(
    stand_in: Path, parameters: Parameters, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, card: str, changes: dict[str, Any], says: str
) -> None:
    nvidia_smi(monkeypatch, tmp_path / "other", card)
    (found,) = vllm_backend.problems(parameters.model_copy(update=changes))
    assert says in found


def test_bitsandbytes_must_be_where_vllm_is(
    stand_in: Path, parameters: Parameters, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert vllm_backend.problems(parameters) == []
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho \'{"vllm": "0.33.0"}\'\n')
    python.chmod(0o755)
    monkeypatch.setenv(vllm_backend.PYTHON, str(python))
    assert vllm_backend.problems(parameters) == []
    (found,) = vllm_backend.problems(parameters.model_copy(update={"use_4bit": True}))
    assert found.startswith("use_4bit: vLLM quantises with bitsandbytes, which is not installed for")
    monkeypatch.setenv(vllm_backend.PYTHON, str(tmp_path / "absent"))
    assert "is no working Python" in vllm_backend.problems(parameters)[0]


def test_several_processes_are_refused(stand_in: Path, parameters: Parameters, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "vllm is one process on one GPU" in vllm_backend.problems(parameters)[0]


def test_an_adapter_that_vllm_would_scale_wrongly_is_refused(stand_in: Path, parameters: Parameters) -> None:
    path = config.run_dir(parameters) / "checkpoints" / "checkpoint-10" / "adapter_config.json"
    files.write_json(path, files.read_json(path) | {"rank_pattern": {"model.layers.0.self_attn.q_proj": 2}})
    with pytest.raises(StudyError, match=r"checkpoint-10: vLLM does not read adapters with layers with a rank or alpha of their own"):
        generate.generate(parameters)


def test_an_engine_that_does_not_start_is_told_with_its_reason(
    stand_in: Path, parameters: Parameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN", "fail")
    with pytest.raises(StudyError, match=r"No available memory for the cache blocks.*vllm\.log.*lower generate_batch_size \(4\)"):
        generate.generate(parameters)
    assert "RuntimeError" in (config.run_dir(parameters) / ".generate" / "vllm.log").read_text()


def test_cards_are_those_that_cuda_would_show(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvidia_smi(monkeypatch, tmp_path / "bin", CARD, "GPU-2222, NVIDIA A100, 81920, 1024, 8.0")
    assert [card.name for card in gpu.cards()] == ["NVIDIA RTX 4090", "NVIDIA A100"]
    for visible, expected in {"1": ["GPU-2222"], "1,0": ["GPU-2222", "GPU-1111"], "GPU-1": ["GPU-1111"], "": [], "7,0": []}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert [card.uuid for card in gpu.cards()] == expected


# ---- how it calls vLLM


def test_greedy_answers_and_perplexities_are_those_of_the_transformers_backend(stand_in: Path, parameters: Parameters) -> None:
    p = parameters.model_copy(update={"temperature": 0.0})
    ours = generate.generate(p.model_copy(update={"generate_backend": "transformers", "device": "cpu"}))
    run = config.run_dir(p)
    diagnostics, first = files.read_csv(run / "diagnostics.csv"), files.read_json(run / "generation.json")
    assert first["backend"] == {"name": "transformers"}
    theirs = generate.generate(p)
    assert stand_in.is_file(), "another backend is a changed setting: the answers are drawn anew"
    assert theirs.equals(ours)
    assert len(set(theirs["finish_reason"])) == 2 or set(theirs["finish_reason"]) == {"length"}
    assert files.read_csv(run / "diagnostics.csv")["perplexity"].tolist() == pytest.approx(diagnostics["perplexity"].tolist(), rel=1e-4)
    record = files.read_json(run / "generation.json")
    assert record["backend"] == {"name": "vllm", "version": "0.33.0", "card": "NVIDIA RTX 4090", "dtype": "bfloat16"}
    assert record["decided_by"] == first["decided_by"] | {"generate_backend": "vllm"}
    assert not (run / ".generate").exists()


def test_vllm_is_given_one_card_no_key_and_what_the_run_needs(stand_in: Path, parameters: Parameters) -> None:
    generate.generate(parameters)
    engine, *batches = told_of(stand_in)
    environment = engine.pop("environment")
    assert environment["CUDA_VISIBLE_DEVICES"] == "GPU-1111"
    assert (environment["VLLM_NO_USAGE_STATS"], environment["HF_HUB_OFFLINE"]) == ("1", "1")
    assert "secret" not in json.dumps(environment)
    assert engine | {"max_model_len": 0} == {
        "model": parameters.model_name, "trust_remote_code": False, "dtype": "bfloat16", "seed": 42, "max_model_len": 0,
        "max_num_seqs": 4, "gpu_memory_utilization": 0.9, "generation_config": "vllm", "load_format": "safetensors",
        "enable_lora": True, "max_lora_rank": 8, "max_loras": 2, "max_cpu_loras": 2,
    }  # fmt: skip
    drawn = [row for batch in batches for row in batch if row["prompt_logprobs"] is None]
    assert len({row["seed"] for row in drawn}) == len(drawn) == 18
    assert {(row["temperature"], row["top_p"], row["top_k"], row["max_tokens"], row["ignore_eos"]) for row in drawn} == {
        (0.7, 0.95, 0, 12, True)
    }


def test_sampled_answers_do_not_depend_on_the_batch_and_resume_where_they_were(stand_in: Path, parameters: Parameters) -> None:
    whole = generate.generate(parameters)
    other = parameters.model_copy(update={"generate_batch_size": 7})
    assert generate.generate(other).equals(whole)
    batches = len(told_of(stand_in))
    assert generate.generate(other).equals(whole)
    assert len(told_of(stand_in)) == batches, "a complete run asks vLLM nothing"


def test_stop_tokens_are_those_of_the_transformers_backend(parameters: Parameters, tmp_path: Path) -> None:
    from transformers import AutoConfig

    own = generate.Sampler(parameters.model_copy(update={"device": "cpu"}), {}).sampling.stop_ids
    tokenizer = models.load_tokenizer(parameters)
    folder = parameters.model_name
    for name in ("with", "without"):
        shutil.copytree(folder, tmp_path / name)
    (tmp_path / "without" / "generation_config.json").unlink()
    for name in ("with", "without"):
        eos = vllm_backend._eos(str(tmp_path / name), AutoConfig.from_pretrained(tmp_path / name))
        assert sampling.stop_ids(tokenizer, eos, parameters) == own


def test_the_engine_fits_card_and_quantisation(parameters: Parameters) -> None:
    turing = gpu.Card("GPU-3", "Tesla T4", 16 * 2**30, 8 * 2**30, (7, 5))
    settings = vllm_backend.engine_settings(parameters.model_copy(update={"use_4bit": True}), turing, "/m", [16] * 12 + [20], 600)
    assert (settings["dtype"], settings["quantization"], settings["load_format"]) == ("float16", "bitsandbytes", "bitsandbytes")
    assert (settings["max_lora_rank"], settings["max_loras"], settings["max_cpu_loras"]) == (32, 8, 13)
    assert settings["gpu_memory_utilization"] == 0.47
    assert "enable_lora" not in vllm_backend.engine_settings(parameters, turing, "/m", [], 600)
