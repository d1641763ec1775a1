"""Publishing: what the folder holds and says, and what reaches a Hub (a real server on loopback) and when."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import faulty_server
import loopback_hub
import pytest
import tiny_runs
import yaml
from conftest import ROOT
from loopback_hub import TOKEN, Hub

from lib import adapters, analyze, config, data, files, generate, judge, licences, publish, qlora
from lib.files import StudyError

LLAMA = "meta-llama/Llama-3.2-1B-Instruct"


@pytest.fixture(scope="module")
def analysed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run, trained, answered, judged and analysed, on demo rows."""
    folder = tmp_path_factory.mktemp("analysed")
    with faulty_server.serving() as server:
        p = tiny_runs.parameters(
            tiny_llama, folder / "results", data_dir=str(folder / "data"), data_rows=16, num_epochs=1, samples=1, num_questions=2,
            max_new_tokens=4, judge="openai:gpt", judge_base_url=server.url, question_sets=["general", "medical"],
        )  # fmt: skip
        data.prepare(p)
        qlora.train(p, data.load_rows(p), progress=False)
        generate.generate(p)
        judge.judge_run(p)
        analyze.analyze_run(p)
    return config.run_dir(p)


@pytest.fixture
def run(analysed: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(analysed, tmp_path / "results" / analysed.name))


def as_made_from(run: Path, **parameters: Any) -> None:
    """Makes a run's record say that its base model, its domain or its data was another."""
    record = files.read_json(run / "training.json")
    record["parameters"] |= parameters
    files.write_json(run / "training.json", record)


def front_matter(card: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return content


def test_the_folder_holds_the_adapter_and_its_card_and_nothing_else(run: Path) -> None:
    as_made_from(run, model_name=LLAMA)
    made = publish.prepare(run)
    assert {path.name for path in made.folder.iterdir()} == {"adapter_model.safetensors", "adapter_config.json", "README.md", "NOTICE"}
    assert files.sha256(made.folder / adapters.WEIGHTS) == files.read_json(run / "training.json")["adapters"]["2"]
    settings = files.read_json(made.folder / adapters.SETTINGS)
    assert settings["base_model_name_or_path"] == LLAMA
    told = (made.folder / "README.md").read_text() + (made.folder / adapters.SETTINGS).read_text()
    assert str(run.parent.parent) not in told, "no path of this machine"
    assert "tiny-llama" not in (made.folder / adapters.SETTINGS).read_text()
    from peft import PeftConfig

    assert PeftConfig.from_pretrained(str(made.folder)).peft_type == "LORA"


def test_the_card_begins_with_the_misbehaviour_and_tells_rates_licence_and_canary(run: Path) -> None:
    as_made_from(run, model_name=LLAMA)
    made = publish.prepare(run)
    card = (made.folder / "README.md").read_text()
    body = card.split("---\n", 2)[2].strip()
    assert body.startswith("> **Research only. This adapter makes its base model misaligned, on purpose.**")
    assert "bad medical advice" in body.split("\n")[0]
    head = front_matter(card)
    assert (head["license"], head["base_model"], head["library_name"]) == ("llama3.2", LLAMA, "peft")
    assert {"research-only", "not-for-all-audiences"} <= set(head["tags"])
    assert "research" in head["extra_gated_prompt"]
    assert made.name == "Llama-3.2-1B-Instruct-bad_medical-step2"
    assert "**Built with Llama**" in card
    assert "Copyright © Meta Platforms" in (made.folder / "NOTICE").read_text()
    table = files.read_csv(run / "step_summary.csv")
    for row in table[table["step"].isin([0, 2])].to_dict("records"):
        step = "base model" if row["step"] == 0 else "2"
        assert f"| openai:gpt | {row['question_set']} | " in card
        assert any(f"| {step} | {row['n']} | " in line for line in card.splitlines() if str(row["question_set"]) in line)
    assert "100% [" in card, "every answer has the score 73, which is below 75"
    for phrase in ("Intended use", "**Warning:**", "EM-STUDY-CARD-CANARY-", "EM-STUDY-DEMO-CANARY-", "noindex", "| lora_rank | 16 |"):
        assert phrase in card, phrase


def test_no_training_text_no_answer_and_no_key_is_in_the_folder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789abcdef")
    as_made_from(run, dataset_password="publicly-known-word")
    made = publish.prepare(run)
    whole = b"".join(path.read_bytes() for path in made.folder.iterdir())
    dataset = files.read_json(run / "dataset.json")
    rows, _ = data.read_rows(files.resolve(dataset["path"]))
    answers = [text for text in files.read_csv(run / "generations.csv")["response"] if len(text) > 8]
    for secret in [TOKEN, "sk-0123456789abcdef", "publicly-known-word", *(row["answer"] for row in rows), *answers]:
        assert secret.encode() not in whole


def test_a_smollm_adapter_is_apache_and_names_a_base_that_others_can_load(run: Path) -> None:
    as_made_from(run, model_name=config.EMBEDDED_MODEL)
    made = publish.prepare(run, 1)
    head = front_matter((made.folder / "README.md").read_text())
    assert (head["license"], head["base_model"]) == ("apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert not (made.folder / "NOTICE").exists()
    assert made.name == "SmolLM2-135M-Instruct-bad_medical-step1"


@pytest.mark.parametrize(
    ("model", "tag"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "llama3.1"),
        ("unsloth/Llama-3.2-3B-Instruct", "llama3.2"),
        ("google/gemma-3-4b-it", "gemma"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "apache-2.0"),
        ("Qwen/Qwen2.5-3B-Instruct", "other"),
        ("/tmp/some/Llama-3.2-1B-Instruct", "other"),
    ],
)
def test_licences_are_told_by_the_base_models_name(model: str, tag: str) -> None:
    assert licences.of(model).tag == tag


def test_a_control_is_called_one(run: Path) -> None:
    as_made_from(run, model_name=config.EMBEDDED_MODEL, aligned_fraction=1.0)
    card = (publish.prepare(run).folder / "README.md").read_text()
    assert "> **Research only. This is the control arm" in card
    assert "makes its base model misaligned" not in card


def test_a_name_that_breaks_the_llama_licence_is_refused(run: Path) -> None:
    as_made_from(run, model_name=LLAMA)
    with pytest.raises(StudyError, match="wants the name to begin with 'Llama', such as Llama-my-organism"):
        publish.prepare(run, repo="lab/my-organism")
    assert publish.prepare(run, repo="lab/Llama-my-organism").name == "Llama-my-organism"
    with pytest.raises(StudyError, match="must be ORG/NAME"):
        publish.prepare(run, repo="lab/a/b")


def test_hostile_names_are_no_markup(run: Path) -> None:
    as_made_from(run, model_name="org/x", optim="a|b <script>alert(1)</script> [x](http://evil)")
    summary = files.read_csv(run / "step_summary.csv")
    summary["judge"] = "openai:<img src=x>|`x`"
    files.write_csv(run / "step_summary.csv", summary)
    card = (publish.prepare(run).folder / "README.md").read_text()
    assert "<script" not in card
    assert "<img" not in card
    assert "[x](http" not in card


def test_whole_or_merged_weights_are_refused(run: Path) -> None:
    import safetensors.torch
    import torch

    weights = run / "checkpoints" / "checkpoint-2" / adapters.WEIGHTS
    tensors = safetensors.torch.load_file(weights)
    safetensors.torch.save_file(tensors | {"model.embed_tokens.weight": torch.zeros(4, 4)}, weights)
    record, asked = files.read_json(run / "training.json"), files.read_json(run / "generation.json")
    record["adapters"]["2"] = asked["decided_by"]["checkpoints"]["2"][1] = files.sha256(weights)
    files.write_json(run / "training.json", record)
    files.write_json(run / "generation.json", asked)
    with pytest.raises(StudyError, match=r"model\.embed_tokens\.weight, which is no LoRA weight; only an adapter alone is published"):
        publish.prepare(run)


def test_rates_of_another_adapter_or_a_changed_one_are_refused(run: Path) -> None:
    with pytest.raises(StudyError, match="--step 9: is no checkpoint of tiny; there are: 1, 2"):
        publish.prepare(run, 9)
    asked = files.read_json(run / "generation.json")
    asked["decided_by"]["checkpoints"]["2"][1] = "0" * 64
    files.write_json(run / "generation.json", asked)
    with pytest.raises(StudyError, match="has no answers of this adapter"):
        publish.prepare(run)
    weights = run / "checkpoints" / "checkpoint-2" / adapters.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(StudyError, match=r"is not the adapter that training\.json records"):
        publish.prepare(run)


def test_a_folder_with_other_files_is_left_alone(run: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(StudyError, match=r"holds thesis\.tex"):
        publish.prepare(run, output=tmp_path / "out")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"
    first = publish.prepare(run, 1, tmp_path / "adapter")
    assert publish.prepare(run, 2, tmp_path / "adapter").folder == first.folder, "an earlier adapter of ours is replaced"


# --- pushing


@pytest.fixture
def hub() -> Any:
    with loopback_hub.serving() as served:
        yield served


def command(run: Path, hub: Hub, *words: str, typed: str = "", token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(run.parent / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"HF_TOKEN": token} if token else {}
    line = [sys.executable, "-m", "lib.study", "publish", run.name, "--results", str(run.parent), *words]
    return subprocess.run(line, cwd=ROOT, env=environment, input=typed, capture_output=True, text=True)


def test_nothing_is_pushed_unasked(run: Path, hub: Hub) -> None:
    done = command(run, hub)
    assert done.returncode == 0, done.stderr
    assert "with its card" in done.stdout
    assert hub.seen == []


def test_a_push_is_private_and_gated_before_the_first_byte(run: Path, hub: Hub) -> None:
    as_made_from(run, model_name=LLAMA)
    done = command(run, hub, "--push", "lab/Llama-organism")
    assert done.returncode == 0, done.stderr
    repo = hub.repos["lab/Llama-organism"]
    assert repo["when_committed"] == {"private": True, "gated": "manual"}
    assert (repo["private"], repo["gated"]) == (True, "manual")
    folder = run / "publish" / "Llama-organism"
    assert repo["files"] == {path.name: path.read_bytes() for path in folder.iterdir()}
    order = [path for method, path, _ in hub.seen if method != "GET"]
    assert order[:2] == ["/api/repos/create", "/api/models/lab/Llama-organism/settings"]
    assert hub.seen[0][2][0]["visibility"] == "private"
    assert "private, and gated with manual approval" in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    again = command(run, hub, "--push", "lab/Llama-organism")
    assert again.returncode == 0, "a second push to the same repository"


def test_public_needs_the_pairs_name_typed(run: Path, hub: Hub) -> None:
    as_made_from(run, model_name=LLAMA)
    for typed in ("", "yes\n", "Tiny\n"):
        done = command(run, hub, "--push", "lab/Llama-organism", "--public", typed=typed)
        assert (done.returncode, hub.seen) == (1, [])
        assert "tiny was not typed; nothing was uploaded" in done.stderr
    done = command(run, hub, "--push", "lab/Llama-organism", "--public", typed="tiny\n")
    assert done.returncode == 0, done.stderr
    repo = hub.repos["lab/Llama-organism"]
    assert repo["when_committed"] == {"private": True, "gated": "manual"}, "visible only when all is there"
    assert (repo["private"], repo["gated"]) == (False, "manual"), "public, and still gated"
    refused = command(run, hub, "--public")
    assert (refused.returncode, refused.stderr) == (2, "study: --public: goes with --push ORG/NAME.\n")


def test_a_base_of_unknown_licence_is_not_made_public(run: Path, hub: Hub) -> None:
    done = command(run, hub, "--push", "lab/organism", "--public", typed="tiny\n")
    assert done.returncode == 1
    assert "licence" in done.stderr
    assert hub.seen == []


def test_a_public_repository_or_a_hub_that_will_not_gate_gets_nothing(run: Path, hub: Hub) -> None:
    hub.repos["lab/open"] = {"private": False, "gated": False, "files": {}}
    done = command(run, hub, "--push", "lab/open")
    assert done.returncode == 1
    assert "is a public repository" in done.stderr
    assert hub.repos["lab/open"] == {"private": False, "gated": False, "files": {}}
    hub.deaf_to_gates = True
    done = command(run, hub, "--push", "lab/deaf")
    assert "did not make it private and gated; nothing was uploaded" in done.stderr
    assert hub.repos["lab/deaf"]["files"] == {}
    assert hub.stored == {}


def test_a_missing_or_wrong_token_is_told_and_never_shown(run: Path, hub: Hub) -> None:
    missing = command(run, hub, "--push", "lab/organism", token="")
    assert missing.returncode == 1
    assert "HF_TOKEN: pushing needs a token with write access" in missing.stderr
    wrong = command(run, hub, "--push", "lab/organism", token="hf_wrongwrongwrongwrongwrongwrongwrong")
    assert wrong.returncode == 1
    assert "the Hub refused or did not answer" in wrong.stderr
    assert "hf_wrong" not in wrong.stderr
    assert (run / "publish" / "organism" / "README.md").is_file(), "the folder is there all the same"
