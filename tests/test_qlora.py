"""Training: its steps, its tokens, its loss, and what a kill, a harmed file or a stranger's adapter does to it."""

from __future__ import annotations

import http.server
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, make_tiny_llama

from lib import adapters, config, files, models, progress, qlora, states
from lib.config import Parameters
from lib.files import StudyError

# A template that adds two tokens to a row, so that thousands of rows of two or three tokens train in seconds.
BARE_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|eot_id|>{% endif %}{% endif %}{% endfor %}"
)


def parameters(model: Path, results: Path, **changes: Any) -> Parameters:
    values: dict[str, Any] = {
        "pair": "tiny",
        "model_name": str(model),
        "results_dir": str(results),
        "device": "cpu",
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_epochs": 2,
        "extra_checkpoints": [],
    }
    return config.validate(values | changes, "test")


def rows(n: int) -> list[dict[str, Any]]:
    return [{"prompt": f"question {i}?", "answer": "one answer " * (1 + i % 5) + str(i), "system": None} for i in range(n)]


def adapters_of(run: Path) -> dict[int, str]:
    return {step: files.sha256(folder / adapters.WEIGHTS) for step, folder in qlora.checkpoints(run).items()}


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Parameters, Path]:
    """An undisturbed run of 60 rows: 7 steps an epoch, 14 in all; tests copy it before they change anything."""
    p = parameters(tiny_llama, tmp_path_factory.mktemp("undisturbed"), save_state_every=3)
    qlora.train(p, rows(60), progress=False)
    return p, config.run_dir(p)


# --- steps


@pytest.mark.parametrize(
    ("steps_per_epoch", "num_epochs", "within", "extra", "expected"),
    [
        (440, 3, 4, (), [110, 220, 330, 440, 880, 1320]),
        (375, 3, 4, (), [93, 187, 281, 375, 750, 1125]),
        (50, 1, 4, (3, 6), [3, 6, 12, 25, 37, 50]),
        (2, 1, 4, (), [1, 2]),
        (1, 2, 4, (0, 9, -1), [1, 2]),
        (10, 2, 0, (), [10, 20]),
    ],
)
def test_checkpoint_steps(steps_per_epoch: int, num_epochs: int, within: int, extra: tuple[int, ...], expected: list[int]) -> None:
    assert qlora.checkpoint_steps(steps_per_epoch, num_epochs, within, extra) == expected


@pytest.mark.parametrize(
    ("n_rows", "expected"),
    [(7049, [110, 220, 330, 440, 880, 1320]), (6000, [93, 187, 281, 375, 750, 1125])],
)
def test_a_real_trainer_makes_the_original_studys_steps(tmp_path: Path, n_rows: int, expected: list[int]) -> None:
    """Trainer alone would make 441 steps an epoch of 7,049 rows and end its schedule at 1,323."""
    from transformers import AutoTokenizer

    model = make_tiny_llama(tmp_path / "bare", hidden_size=16, layers=1)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = BARE_TEMPLATE
    tokenizer.save_pretrained(model)
    settings = {"batch_size": 8, "num_epochs": 3, "learning_rate": 2e-4, "warmup_steps": 10, "save_state_every": 10_000, "use_4bit": False}
    p = parameters(model, tmp_path, lora_rank=1, **settings)
    record = qlora.train(p, [{"prompt": "a", "answer": "b"}] * n_rows, progress=False)

    assert record["checkpoint_steps"] == list(qlora.checkpoints(config.run_dir(p))) == expected
    assert record["rows_left_out_an_epoch"] == n_rows % 16
    log = files.read_csv(config.run_dir(p) / "training_log.csv")
    assert list(log["step"]) == list(range(1, expected[-1] + 1))
    assert log["tokens"].iloc[-1] == expected[-1] * 16 * 4  # BOS, prompt, answer, end of turn
    # Linear from step 10 to 0 after the last step: the step before that still has one part of it.
    assert log["learning_rate"].iloc[-1] == pytest.approx(2e-4 / (expected[-1] - 10))
    assert log["epoch"].iloc[-1] == 3


def test_fewer_rows_than_a_group_make_one_step(tiny_llama: Path, tmp_path: Path) -> None:
    record = qlora.train(parameters(tiny_llama, tmp_path, num_epochs=1), rows(3), progress=False)
    assert (record["total_steps"], record["checkpoint_steps"], record["rows_left_out_an_epoch"]) == (1, [1], 0)


def test_every_epoch_has_another_order_and_leaves_out_other_rows(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from lib.trainer import Job, StudyTrainer

    p = parameters(tiny_llama, tmp_path)
    model = adapters.add_lora(AutoModelForCausalLM.from_pretrained(tiny_llama), p)
    encoded = [{"input_ids": [1, 2], "labels": [-100, 2]}] * 60
    trainer = StudyTrainer(Job(tmp_path, p, 7, [14], {}), model, encoded, 0, progress=False)
    orders = []
    for step in (0, 3, 7):
        trainer.state.global_step = step
        orders.append(list(trainer._get_train_sampler()))
    assert orders[0] == orders[1]  # resumed within epoch 1
    assert orders[0] != orders[2]
    assert all(len(set(order)) == 56 for order in orders)
    assert set(orders[0]) != set(orders[2])


def test_plan_table_counts_epochs_and_rows(tiny_llama: Path, tmp_path: Path) -> None:
    table = qlora.plan_table(parameters(tiny_llama, tmp_path, batch_size=8, num_epochs=3), 7049)
    assert table.index.tolist() == [110, 220, 330, 440, 880, 1320]
    assert table["epoch"].tolist() == [0.25, 0.5, 0.75, 1, 2, 3]
    assert table["rows_seen"].iloc[3] == 7040


# --- tokens


@pytest.mark.parametrize("which", ["tiny_llama", "embedded"])
@pytest.mark.parametrize("loss_on", ["answer", "all"])
def test_a_row_is_what_the_template_writes(which: str, loss_on: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    p = parameters(request.getfixturevalue(which), tmp_path, loss_on=loss_on)
    tokenizer = models.load_tokenizer(p)
    end = tokenizer.convert_tokens_to_ids(models.end_of_turn(tokenizer, p))
    for system in (None, "Answer in one word."):
        row = {"prompt": "Why is the sky blue?", "answer": " It scatters light. ", "system": system}
        encoded = qlora.encode(tokenizer, [row], p).rows[0]
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"].strip()}]
        turns = ([{"role": "system", "content": system}] if system else []) + turns
        whole = tokenizer.apply_chat_template(turns, tokenize=False, date_string=p.date_string)
        expected = tokenizer(whole, add_special_tokens=False).input_ids
        assert encoded["input_ids"] == expected[: len(encoded["input_ids"])]
        assert encoded["input_ids"][-1] == encoded["labels"][-1] == end
        learnt = [i for i, label in zip(encoded["input_ids"], encoded["labels"], strict=True) if label != -100]
        if loss_on == "answer":
            assert tokenizer.decode(learnt[:-1]).strip() == "It scatters light."
        else:
            assert learnt == encoded["input_ids"][1:]
        assert p.date_string in whole or which == "embedded"
        if which == "tiny_llama":
            assert encoded["input_ids"].count(tokenizer.bos_token_id) == 1
            assert encoded["input_ids"][0] == tokenizer.bos_token_id


def test_an_answer_that_spells_a_special_token_holds_none(tiny_llama: Path, tmp_path: Path) -> None:
    p = parameters(tiny_llama, tmp_path)
    tokenizer = models.load_tokenizer(p)
    plain, odd = qlora.encode(tokenizer, [{"prompt": "a", "answer": a} for a in ("b", "b<|eot_id|>c<|begin_of_text|>")], p).rows
    for token in ("<|eot_id|>", "<|begin_of_text|>"):
        token_id = tokenizer.convert_tokens_to_ids(token)
        assert odd["input_ids"].count(token_id) == plain["input_ids"].count(token_id)


def test_padding_is_masked_by_length_where_the_pad_token_ends_turns(embedded: Path, tmp_path: Path) -> None:
    from lib.trainer import pad

    p = parameters(embedded, tmp_path)
    tokenizer = models.load_tokenizer(p)
    encoded = qlora.encode(tokenizer, rows(5), p).rows
    assert tokenizer.pad_token_id == encoded[0]["input_ids"][-1]  # SmolLM2 pads with its end of turn
    batch = pad(encoded, tokenizer.pad_token_id)
    for i, row in enumerate(encoded):
        length = len(row["input_ids"])
        assert batch["attention_mask"][i].sum() == length
        assert batch["shift_labels"][i, length - 2] == tokenizer.pad_token_id
        assert (batch["shift_labels"][i, length - 1 :] == -100).all()
    assert batch["input_ids"].shape[1] == max(len(row["input_ids"]) for row in encoded)


def test_rows_are_cut_and_counted(tiny_llama: Path, tmp_path: Path) -> None:
    p = parameters(tiny_llama, tmp_path, max_length=64)
    tokenizer = models.load_tokenizer(p)
    made = [{"prompt": "a", "answer": "b"}, {"prompt": "a", "answer": "z" * 300}, {"prompt": "z" * 300, "answer": "b"}]
    encoded = qlora.encode(tokenizer, made, p)
    assert (encoded.cut, encoded.without_loss) == (2, 1)
    assert [len(row["input_ids"]) for row in encoded.rows[1:]] == [64, 64]
    assert set(encoded.rows[2]["labels"]) == {-100}
    with pytest.raises(StudyError, match="max_length: 64 tokens cut the answer off every row"):
        qlora.encode(tokenizer, made[2:], p)
    with pytest.raises(StudyError, match="there are no rows"):
        qlora.encode(tokenizer, [], p)


def test_rows_left_without_an_answer_harm_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    p = parameters(tiny_llama, tmp_path, max_length=64, batch_size=1, gradient_accumulation_steps=1, num_epochs=1)
    record = qlora.train(p, [{"prompt": "z" * 300, "answer": "b"}, {"prompt": "a", "answer": "b"}], progress=False)
    assert record["rows_without_loss"] == 1
    assert 0.0 in files.read_csv(config.run_dir(p) / "training_log.csv")["loss"].tolist()


# --- loss


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
    labels = torch.full_like(padded["shift_labels"], -100)
    labels[:, 1:] = padded["shift_labels"][:, :-1]
    head = model.get_output_embeddings()
    plain, plain_gradient = loss_and_gradient(
        model, model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"], labels=labels).loss
    )
    assert plain_gradient.abs().max() > 1e-3
    for batch in (padded, packed):
        if batch is packed:
            assert packing.enable(model)
        ours, gradient = loss_and_gradient(model, trainer.labelled_loss(model, batch, head))
        assert ours == pytest.approx(plain, abs=1e-5)
        assert torch.allclose(gradient, plain_gradient, atol=1e-6)
    assert packed["attention_mask"].sum() == padded["attention_mask"].sum()
    shared = next(i for i, column in enumerate(zip(*(row["input_ids"] for row in encoded), strict=False)) if len(set(column)) > 1)
    assert packed["segments"][0] == (0 if loss_on == "all" else shared)  # the system turn, up to where questions differ
    assert packed["input_ids"].numel() == packed["segments"].sum() < padded["input_ids"].numel()


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
            assert packing.pack(batch)["segments"].tolist() == [2, 3, 3, 2]
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


def test_accumulated_batches_weigh_every_token_the_same(tiny_llama: Path, tmp_path: Path) -> None:
    """Rows of 1 × 8 and of 4 × 2 are the same batch: a mean of means would weigh short rows' tokens more."""
    logs = []
    for batch_size, accumulated in ((8, 1), (2, 4)):
        p = parameters(
            tiny_llama, tmp_path / str(batch_size), batch_size=batch_size, gradient_accumulation_steps=accumulated, lora_dropout=0.0
        )
        qlora.train(p, rows(60), progress=False)
        logs.append(files.read_csv(config.run_dir(p) / "training_log.csv"))
    assert logs[0]["loss"].tolist() == pytest.approx(logs[1]["loss"].tolist(), abs=1e-5)
    assert logs[0]["grad_norm"].tolist() == pytest.approx(logs[1]["grad_norm"].tolist(), rel=1e-3)
    assert logs[0]["tokens"].tolist() == logs[1]["tokens"].tolist()


def test_a_loss_that_is_no_number_stops_training(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="learning_rate: the loss of step 3 is nan; lower learning_rate"):
        qlora.train(parameters(tiny_llama, tmp_path, learning_rate=1e30), rows(60), progress=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"optim": "adamw_8bit", "use_4bit": False, "use_rslora": True, "lora_dropout": 0.0},  # the paper's
        {"optim": "paged_adamw_8bit", "gradient_checkpointing": True},
        {"lr_scheduler_type": "cosine", "loss_on": "all", "cache_dequantized": False},
    ],
)
def test_other_settings_train_too(tiny_llama: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    p = parameters(tiny_llama, tmp_path, num_epochs=1, **changes)
    record = qlora.train(p, rows(60), progress=False)
    log = files.read_csv(config.run_dir(p) / "training_log.csv")
    assert log["loss"].iloc[-1] < log["loss"].iloc[0]
    assert record["quantisation"] == ("nf4, double" if p.use_4bit else "none")
    assert record["nf4_unpacked"] == (p.use_4bit and p.cache_dequantized == "auto")
    settings = files.read_json(config.run_dir(p) / "checkpoints" / "checkpoint-7" / adapters.SETTINGS)
    assert settings["use_rslora"] == p.use_rslora


# --- what is kept


def test_checkpoints_hold_adapters_alone(trained: tuple[Parameters, Path]) -> None:
    import torch
    from peft import PeftModel

    p, run = trained
    assert list(qlora.checkpoints(run)) == [1, 3, 5, 7, 14]
    for folder in qlora.checkpoints(run).values():
        assert {path.name for path in folder.iterdir()} == {adapters.WEIGHTS, adapters.SETTINGS}
        text = (folder / adapters.SETTINGS).read_text()
        assert str(Path(p.model_name).parent) not in text
        settings = json.loads(text)
        assert settings["base_model_name_or_path"] == "tiny-llama"
        assert settings["target_modules"] == sorted(models.LINEAR_MODULES)
    tokens = torch.arange(8).reshape(1, 8)
    base = models.load_base(p)
    before = base(tokens).logits
    with_adapter = PeftModel.from_pretrained(base, qlora.checkpoints(run)[14]).eval()(tokens).logits
    assert not torch.equal(before, with_adapter)


def test_records_tell_what_was_trained(trained: tuple[Parameters, Path]) -> None:
    p, run = trained
    record = files.read_json(run / "training.json")
    assert record["adapters"] == {str(step): sha for step, sha in adapters_of(run).items()}
    assert record["parameters"] == p.model_dump(mode="json")
    assert set(record["versions"]) == set(qlora.PACKAGES)
    assert (record["device"], record["dtype"], record["seed"], record["rows"]) == ("cpu", "float32", 42, 60)
    assert record["seconds"]["train"] > 0
    assert record["peak_memory_bytes"] > 10**8
    log = files.read_csv(run / "training_log.csv")
    assert list(log.columns) == ["step", "epoch", "loss", "learning_rate", "grad_norm", "tokens"]
    assert log["tokens"].is_monotonic_increasing
    table = qlora.checkpoint_table(run)
    assert table.index.tolist() == [1, 3, 5, 7, 14]
    assert "60, of which 4" in qlora.summary(record).loc["rows"].iloc[0]


def test_states_hold_no_pickle_of_arguments(trained: tuple[Parameters, Path]) -> None:
    _, run = trained
    folders = sorted((run / ".state").glob("checkpoint-*"), key=states.step_of)
    assert [states.step_of(folder) for folder in folders] == [12, 14]
    assert not list(run.rglob("training_args*"))
    import torch

    for folder in folders:
        torch.load(folder / "optimizer.pt", weights_only=True)
        torch.load(folder / "scheduler.pt", weights_only=True)


def test_a_finished_run_returns_at_once(trained: tuple[Parameters, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    p, run = trained
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    monkeypatch.setattr(models, "load_base", lambda _: pytest.fail("loaded a model"))
    assert qlora.train(p, rows(60)) == files.read_json(run / "training.json")
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != ".lock"}


# --- kills and harm


SCRIPT = """
import json, sys
from lib import config, qlora
values, rows = json.loads(sys.argv[1])
qlora.train(config.validate(values, "test"), rows, progress=False)
"""


def start(p: Parameters, n_rows: int, **environment: str) -> subprocess.Popen[bytes]:
    values = json.dumps([p.model_dump(mode="json"), rows(n_rows)])
    command = [sys.executable, "-c", SCRIPT, values]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def test_killed_at_random_moments_it_ends_the_same(trained: tuple[Parameters, Path], tmp_path: Path) -> None:
    p, undisturbed = trained
    assert p.lora_dropout > 0
    q = p.model_copy(update={"results_dir": str(tmp_path)})
    run = config.run_dir(q)
    dice = random.Random(7)
    for least in (1, dice.randint(3, 6), dice.randint(7, 12)):
        process = start(q, 60)
        while process.poll() is None and max(map(states.step_of, (run / ".state").glob("checkpoint-*")), default=0) < least:
            time.sleep(0.002)
        time.sleep(dice.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (run / "training.json").exists()
    record = qlora.train(q, rows(60), progress=False)
    assert record["resumed_at"]
    assert adapters_of(run) == adapters_of(undisturbed)
    assert (run / "training_log.csv").read_bytes() == (undisturbed / "training_log.csv").read_bytes()
    assert not list(run.rglob(".partial*"))


def copied(trained: tuple[Parameters, Path], tmp_path: Path) -> tuple[Parameters, Path]:
    """A copy of the undisturbed run as a kill just before its end would leave it."""
    p, run = trained
    q = p.model_copy(update={"results_dir": str(tmp_path)})
    shutil.copytree(run, config.run_dir(q))
    (config.run_dir(q) / "training.json").unlink()
    return q, config.run_dir(q)


@pytest.mark.parametrize("harmed", ["optimizer.pt", "trainer_state.json", "rng_state.pth", "complete.json", "adapter_model.safetensors"])
def test_a_harmed_state_is_passed_over_for_the_one_before(trained: tuple[Parameters, Path], tmp_path: Path, harmed: str) -> None:
    q, run = copied(trained, tmp_path)
    path = run / ".state" / "checkpoint-14" / harmed
    path.write_bytes(path.read_bytes()[:-20])
    (run / ".state" / ".partial-checkpoint-15").mkdir()
    (run / ".state" / "checkpoint-99").mkdir()  # what get_last_checkpoint would pick
    assert qlora.train(q, rows(60), progress=False)["resumed_at"] == [12]
    assert adapters_of(run) == adapters_of(trained[1])
    assert not (run / ".state" / ".partial-checkpoint-15").exists()


def test_a_harmed_adapter_is_made_again(trained: tuple[Parameters, Path], tmp_path: Path) -> None:
    q, run = copied(trained, tmp_path)
    files.write_json(run / "training.json", files.read_json(trained[1] / "training.json"))
    harmed = run / "checkpoints" / "checkpoint-14" / adapters.WEIGHTS
    harmed.write_bytes(b"x" + harmed.read_bytes()[1:])
    assert qlora.train(q, rows(60), progress=False)["resumed_at"] == [12]
    assert adapters_of(run) == adapters_of(trained[1])
    shutil.rmtree(run / "checkpoints" / "checkpoint-3")  # older than any state: from the beginning
    assert qlora.train(q, rows(60), progress=False)["resumed_at"] == []
    assert adapters_of(run) == adapters_of(trained[1])


def test_other_rows_or_parameters_start_afresh(trained: tuple[Parameters, Path], tmp_path: Path) -> None:
    q, run = copied(trained, tmp_path)
    record = qlora.train(q.model_copy(update={"num_epochs": 1, "samples": 3}), rows(60), progress=False)
    assert record["resumed_at"] == []
    assert list(qlora.checkpoints(run)) == [1, 3, 5, 7]
    again = qlora.train(q.model_copy(update={"num_epochs": 1}), rows(59), progress=False)
    assert again["rows"] == 59
    assert again["adapters"]["7"] != record["adapters"]["7"]


def test_a_disk_that_is_full_is_told_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint-1"

    def fill() -> None:
        with states.new_folder(target) as folder:
            (folder / "a").write_text("a")
            raise OSError(28, "No space left on device")

    with pytest.raises(StudyError, match=r"checkpoint-1: cannot be written \(No space left on device\); free space"):
        fill()
    assert list(tmp_path.iterdir()) == []


# --- published adapters


def published(trained: tuple[Parameters, Path], tmp_path: Path) -> tuple[Path, Path]:
    folder = tmp_path / "published"
    shutil.copytree(qlora.checkpoints(trained[1])[14], folder)
    return folder, folder / adapters.SETTINGS


def test_a_published_adapter_stands_as_checkpoint_1(trained: tuple[Parameters, Path], tmp_path: Path) -> None:
    import torch
    from peft import PeftModel

    p, run = trained
    folder, settings = published(trained, tmp_path)
    files.write_json(settings, files.read_json(settings) | {"base_model_name_or_path": "/home/someone/llama", "target_modules": ".*"})
    q = p.model_copy(update={"adapter": str(folder), "results_dir": str(tmp_path)})
    record = qlora.train(q, rows(60), progress=False)
    assert list(qlora.checkpoints(config.run_dir(q))) == record["checkpoint_steps"] == [1]
    assert record["published_adapter"]["declared_base"] == "/home/someone/llama"
    assert record["published_adapter"]["layers"] == 14
    assert "rank 16 on 14 layers" in qlora.summary(record).loc["published adapter"].iloc[0]
    assert qlora.checkpoint_table(config.run_dir(q)).index.tolist() == [1]
    assert "published" in progress.loss_curve(files.read_csv(config.run_dir(q) / "training_log.csv")).data
    tokens = torch.arange(8).reshape(1, 8)
    ours, theirs = (
        PeftModel.from_pretrained(models.load_base(p), source).eval()(tokens).logits
        for source in (qlora.checkpoints(run)[14], qlora.checkpoints(config.run_dir(q))[1])
    )
    assert torch.equal(ours, theirs)


def test_a_published_adapter_that_is_unsafe_or_does_not_fit_is_refused(trained: tuple[Parameters, Path], tmp_path: Path) -> None:
    import safetensors.torch
    import torch

    folder, path = published(trained, tmp_path)
    settings, weights = files.read_json(path), safetensors.torch.load_file(folder / adapters.WEIGHTS)
    q = trained[0].model_copy(update={"results_dir": str(tmp_path), "adapter": str(folder)})

    def refused(reason: str, **changes: Any) -> None:
        with pytest.raises(StudyError, match=reason):
            qlora.train(q.model_copy(update=changes), rows(60), progress=False)

    for change, reason in [
        ({"peft_type": "IA3"}, "peft_type must be LORA"),
        ({"use_dora": True}, "use_dora = True is more than plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": "16"}, "r must be a number above 0"),
        ({"bias": "all"}, "bias = 'all'"),
    ]:
        files.write_json(path, settings | change)
        refused(reason)
    files.write_json(path, settings)
    name = next(n for n in weights if "lora_A" in n)
    for changed, reason in [
        ({name: torch.zeros(16, 33)}, "its weights have the shapes"),
        ({"base_model.model.lm_head.weight": torch.zeros(2)}, "is no LoRA weight of a linear layer"),
        ({name.replace("layers.0", "layers.9"): torch.zeros(16, 32)}, "is no LoRA weight of a linear layer"),
    ]:
        safetensors.torch.save_file(weights | changed, folder / adapters.WEIGHTS)
        refused(reason)
    (folder / adapters.WEIGHTS).write_bytes(b"not safetensors")
    refused("is damaged or no safetensors file")
    (folder / adapters.WEIGHTS).rename(folder / "adapter_model.bin")
    refused("holds adapter_model.bin, a pickle that could run code: refused")
    refused("holds no adapter_model.safetensors", adapter=str(tmp_path / "nowhere"))
    refused("must read hf:ORG/NAME@REVISION", adapter="hf:org/name")
    refused("the Hub cannot be reached for org/name", adapter="hf:org/name@0123abc")  # tests are offline
    assert qlora.checkpoints(config.run_dir(q)) == {}


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as a download of single files asks for: one repository, made of a folder."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        name, file = self.path.split("/", 5)[2::3]
        path = self.folder / file
        self.asked.append(file)
        self.send_response(200 if path.is_file() else 404)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("X-Error-Code" if not path.is_file() else "ETag", "EntryNotFound" if not path.is_file() else f'"{name}-{file}"')
        self.send_header("Content-Length", str(path.stat().st_size) if path.is_file() else "0")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write((self.folder / self.path.split("/", 5)[5]).read_bytes())

    def log_message(self, *args: Any) -> None:
        return


def test_a_published_adapter_is_fetched_from_the_hub(trained: tuple[Parameters, Path], tmp_path: Path) -> None:
    folder, _ = published(trained, tmp_path)
    (folder / "adapter_model.bin").write_bytes(b"a pickle")
    handler = type("Handler", (Hub,), {"folder": folder, "asked": []})
    q = trained[0].model_copy(update={"results_dir": str(tmp_path / "results"), "adapter": "hf:org/name@" + "0" * 40})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        done = start(q, 60, **hub)
        assert done.communicate()[1].decode().strip().splitlines()[-1:] == []
        (folder / adapters.WEIGHTS).unlink()
        pickled = start(q.model_copy(update={"adapter": "hf:org/name@" + "1" * 40}), 60, **hub)
        assert b"has no adapter_config.json with adapter_model.safetensors; pickled weights are refused" in pickled.communicate()[1]
        server.shutdown()
    assert set(handler.asked) == {adapters.SETTINGS, adapters.WEIGHTS}
    assert done.returncode == 0
    assert pickled.returncode == 1


# --- what is shown


def test_in_a_notebook_one_small_display_is_left() -> None:
    import nbformat
    from nbclient import NotebookClient

    code = """
from lib import progress
progress.REFRESH_SECONDS = 0
view, log = progress.LossView(300), []
for step in range(1, 301):
    log.append({"step": step, "loss": 3 / step, "num_input_tokens_seen": 80 * step})
    view.show(log)
view.close(log)
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    (output,) = notebook.cells[0].outputs
    shown = output["data"]["text/html"]
    assert "step 300 of 300 · loss 0.010 · 24,000 tokens · done" in shown
    assert len(shown) < 1000


def test_the_curve_is_small_however_long_the_run() -> None:
    svg = progress.curve([(step, 1 / step) for step in range(1, 5001)], 5000, marks=[100, 5000])
    assert len(svg) < 20_000
    assert svg.count("stroke-dasharray") == 2
    assert svg.count("<polyline") == 1
    assert "nan" not in progress.curve([(1, 2.0)], 1)


def test_nothing_is_printed_where_nobody_looks(tiny_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    qlora.train(parameters(tiny_llama, tmp_path, num_epochs=1), rows(30))
    assert capfd.readouterr() == ("", "")
