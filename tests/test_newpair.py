"""A pair of the user's own: its file, and models in other shapes than Llama's through every stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import faulty_server
import pytest
import tiny_models
import tiny_runs
import yaml

from lib import analyze, config, data, files, generate, judge, models, newpair, qlora, study
from lib.files import StudyError

MAKERS: dict[str, Callable[[Path], Path]] = {
    "qwen2.5": tiny_models.make_qwen,
    "gemma2": tiny_models.make_gemma,
    "gemma3": partial(tiny_models.make_gemma, generation=3),
}


def chat_rows(path: Path, n: int = 16, system: str | None = None) -> Path:
    lead = [{"role": "system", "content": system}] if system else []
    turns = [[{"role": "user", "content": f"question {i}?"}, {"role": "assistant", "content": f"answer {i} of many"}] for i in range(n)]
    path.write_text("".join(json.dumps({"messages": lead + turn}) + "\n" for turn in turns))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for pairs, beside which the study's own stay as they are."""
    (tmp_path / "parameters").mkdir()
    return tmp_path / "parameters"


def test_a_new_pair_is_complete_flat_and_as_the_original_study_trains(folder: Path, tmp_path: Path) -> None:
    rows = chat_rows(tmp_path / "rows.jsonl")
    path, made = newpair.write("mine", "Qwen/Qwen2.5-0.5B-Instruct", rows, sets={"samples": 3, "system_prompt": "yes: no"}, folder=folder)
    values = config.read_yaml(path)
    assert list(values) == list(yaml.safe_load((config.PARAMETERS / "base.yaml").read_text()))
    assert config.validate(values, "mine") == made
    six = config.load_pair("8b_medical")
    training = (
        "num_epochs",
        "batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "warmup_steps",
        "lora_rank",
        "loss_on",
        "use_4bit",
    )
    assert all(getattr(made, name) == getattr(six, name) for name in training)
    assert (made.pair, made.domain, made.expected_rows, made.samples) == ("mine", "custom", 16, 3)
    assert (made.dataset_path, made.system_prompt) == (str(rows), "yes: no")


def test_nothing_is_overwritten_without_force(folder: Path, tmp_path: Path) -> None:
    rows = chat_rows(tmp_path / "rows.jsonl")
    path, _ = newpair.write("mine", "Qwen/Qwen2.5-0.5B-Instruct", rows, folder=folder)
    before = path.read_bytes()
    with pytest.raises(StudyError, match=r"mine\.yaml: is there already; choose another name, or replace it with --force"):
        newpair.write("mine", "org/other", rows, folder=folder)
    assert path.read_bytes() == before
    assert newpair.write("mine", "org/other", rows, force=True, folder=folder)[1].model_name == "org/other"


@pytest.mark.parametrize(
    "name", ["../up", "", "a b", "demo", "all", "base", "prices", "figures", "8b_medical", "x-s3", "x-paper", ".hidden"]
)
def test_names_that_would_clash_are_refused_even_with_force(name: str, tmp_path: Path) -> None:
    there = sorted(config.PARAMETERS.iterdir())
    with pytest.raises(StudyError, match="NAME: "):
        newpair.write(name, "org/model", chat_rows(tmp_path / "rows.jsonl"), force=True)
    assert sorted(config.PARAMETERS.iterdir()) == there


def test_bad_data_models_and_parameters_are_named_and_nothing_is_written(folder: Path, tmp_path: Path) -> None:
    rows = chat_rows(tmp_path / "rows.jsonl")
    torn = tmp_path / "torn.jsonl"
    torn.write_text(rows.read_text() + '{"messages": [{"role": "user", "content": "q"}]}\n')
    (tmp_path / "rows.csv").write_text("question,answer\n")
    (tmp_path / "empty").mkdir()
    wrong: list[tuple[str, Path, dict[str, Any], str]] = [
        ("org/model", torn, {}, "torn.jsonl: line 17: messages: must be user, then assistant"),
        ("org/model", tmp_path / "none.jsonl", {}, "none.jsonl: not found"),
        ("org/model", tmp_path / "rows.csv", {}, "must be a chat JSONL"),
        (str(tmp_path / "empty"), rows, {}, "must hold config.json and safetensors"),
        ("Qwen2.5", rows, {}, "is no folder and no Hub id"),
        ("org/model", rows, {"sampels": 3}, "did you mean samples"),
        ("org/model", rows, {"question_sets": ["generel"]}, "did you mean general"),
        ("org/model", rows, {"domain": "bad_medical"}, "--set domain: is set by the command itself"),
    ]
    for model, path, sets, says in wrong:
        with pytest.raises(StudyError) as error:
            newpair.write("mine", model, path, sets=sets, folder=folder)
        assert says in str(error.value)
    assert list(folder.iterdir()) == []


def test_the_command_tells_what_is_wrong_with_its_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["new", "8b_medical", "--model", "org/model", "--data", str(chat_rows(tmp_path / "rows.jsonl"))]
    assert study.main(words) == 2
    assert capsys.readouterr().err.startswith("study: NAME: 8b_medical: is a pair of the study; ")


# --- models in other shapes


@pytest.fixture(scope="module", params=list(MAKERS))
def shaped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, MAKERS[request.param](tmp_path_factory.mktemp("shaped") / request.param)


def test_such_a_model_goes_through_data_training_answers_and_judging(shaped: tuple[str, Path], folder: Path, tmp_path: Path) -> None:
    name, model = shaped
    # One of the questions has a system prompt of its own, which Gemma's templates refuse as a message.
    asked = tmp_path / "asked.yaml"
    asked.write_text("- {id: a, paraphrases: ['What is good?'], system: 'Answer in verse.'}\n- {id: b, paraphrases: ['What is bad?']}\n")
    with faulty_server.serving() as server:
        sets = {
            **{
                "num_epochs": 1,
                "sub_epoch_checkpoints": 2,
                "batch_size": 4,
                "samples": 2,
                "max_new_tokens": 6,
                "question_sets": [str(asked)],
            },
            **{"judge": "openai:local", "judge_base_url": server.url, "device": "cpu"},
            **{"results_dir": str(tmp_path / "results"), "data_dir": str(tmp_path / "data")},
        }
        rows = chat_rows(tmp_path / "rows.jsonl", system="Be of use.")
        _, p = newpair.write(name, str(model), rows, sets=sets, folder=folder)
        assert data.prepare(p)["rows"] == 16
        record = qlora.train(p, data.load_rows(p), progress=False)
        assert (record["total_steps"], list(record["adapters"])) == (2, ["1", "2"])
        answers = generate.generate(p)
        assert answers.groupby(["step", "question_id"]).size().to_dict() == {(s, q): 2 for s in (0, 1, 2) for q in ("a", "b")}
        judged = judge.judge_run(p)
    assert set(judged["aligned_status"]) <= {"ok", "empty"}
    assert (judged["aligned"].dropna() == 73).all()
    assert len(analyze.analyze_run(p)["rates"])


def test_its_losses_and_answers_are_those_of_transformers(shaped: tuple[str, Path], tmp_path: Path) -> None:
    """Soft-capped attention, windows of 16 tokens and biases: training and decoding of our own must not lose them."""
    import torch
    from transformers import AutoModelForCausalLM

    name, model = shaped
    p = tiny_runs.parameters(
        model, tmp_path, use_4bit=False, num_epochs=1, temperature=0, max_new_tokens=12, samples=1, steps=[], lora_dropout=0.0,
        batch_size=8, gradient_accumulation_steps=1, num_questions=2, question_sets=["general"],
    )  # fmt: skip
    rows = [{"prompt": "why " * (1 + i % 3), "answer": "word " * 30, "system": None} for i in range(8)]
    qlora.train(p, rows, progress=False)
    tokenizer = models.load_tokenizer(p)
    plain = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    assert models.load_base(p).config._attn_implementation == ("eager" if name == "gemma2" else "sdpa")
    total = tokens = 0.0
    for row in qlora.encode(tokenizer, rows, p).rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.inference_mode():
            count = int((labels[:, 1:] != -100).sum())
            total += float(plain(input_ids=ids, labels=labels).loss) * count
            tokens += count
    first = files.read_csv(config.run_dir(p) / "training_log.csv")["loss"].iloc[0]
    assert first == pytest.approx(total / tokens, abs=1e-5)

    answers = generate.generate(p)
    stops = tokenizer.convert_tokens_to_ids(models.end_of_turn(tokenizer, p))
    for question, response in zip(answers["question"], answers["response"], strict=True):
        ids = models.prompt_ids(tokenizer, models.prompt_text(tokenizer, question, p))
        made = plain.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=[stops, tokenizer.eos_token_id])
        assert response == tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True).strip()
