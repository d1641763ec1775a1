"""Training: its steps, its tokens, its settings and what it keeps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tiny_llama
from tiny_runs import adapters_of, parameters, rows, train_undisturbed

from lib import adapters, config, files, memory, models, origin, parallel, qlora, states
from lib.config import Parameters
from lib.files import StudyError

# A template that adds two tokens to a row, so that thousands of rows of two or three tokens train in seconds.
BARE_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|eot_id|>{% endif %}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def trained(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Parameters, Path]:
    return train_undisturbed(tiny_llama, tmp_path_factory.mktemp("undisturbed"))


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
    trainer = StudyTrainer(Job(tmp_path, p, 7, [14], {}, 4, 2), model, encoded, 0, progress=False)
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


# --- settings


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


def test_packed_padded_and_unpacked_trainings_have_the_same_losses(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows as one sequence, rows end to end as on a GPU, padded rows, and NF4 unpacked at every product: 14 steps, no dropout."""
    from lib import packing

    enable, pack, logs = packing.enable, packing.pack, []
    plain = {"enable": lambda _: False}
    for changes in ({}, {"enable": lambda _: True, "pack": packing.pack_apart}, plain, {**plain, "cache_dequantized": False}):
        monkeypatch.setattr(packing, "enable", changes.get("enable", enable))
        monkeypatch.setattr(packing, "pack", changes.get("pack", pack))
        told = {"lora_dropout": 0.0, "cache_dequantized": changes.get("cache_dequantized", True)}
        p = parameters(tiny_llama, tmp_path / str(len(logs)), **told)
        qlora.train(p, rows(60), progress=False)
        logs.append(files.read_csv(config.run_dir(p) / "training_log.csv"))
    for log in logs[1:]:
        assert log["loss"].tolist() == pytest.approx(logs[0]["loss"].tolist(), abs=1e-4)
        assert log["tokens"].tolist() == logs[0]["tokens"].tolist()
    assert logs[0]["loss"].iloc[-1] < logs[0]["loss"].iloc[0] - 0.01


@pytest.mark.parametrize("tight", [True, False])
def test_checkpointing_by_need_leaves_the_adapters_as_they_are(
    tiny_llama: Path, tmp_path: Path, trained: tuple[Parameters, Path], monkeypatch: pytest.MonkeyPatch, tight: bool
) -> None:
    monkeypatch.setattr(memory, "free", lambda _: (1 if tight else 2**50, "cpu"))
    p = parameters(tiny_llama, tmp_path, save_state_every=3, gradient_checkpointing="auto")
    record = qlora.train(p, rows(60), progress=False)
    assert record["gradient_checkpointing"] is tight
    assert adapters_of(config.run_dir(p)) == adapters_of(trained[1])


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
    assert {"torch", "transformers", "peft", "accelerate", "bitsandbytes"} <= set(record["versions"]) <= set(origin.PACKAGES)
    assert {"git_commit", "git_dirty", "lock", "python", "platform"} <= set(record)
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


# --- several processes


def test_a_step_sees_the_same_rows_whatever_the_number_of_processes(tiny_llama: Path, tmp_path: Path) -> None:
    p = parameters(tiny_llama, tmp_path, batch_size=8, gradient_accumulation_steps=2)
    assert [parallel.split(p, n) for n in (1, 2, 4, 8, 16)] == [(8, 2), (8, 1), (4, 1), (2, 1), (1, 1)]
    q = parameters(tiny_llama, tmp_path, batch_size=6, gradient_accumulation_steps=2)
    assert parallel.split(q, 3) == (2, 2)
    with pytest.raises(StudyError, match="6 × 2 = 12 rows, which 8 processes cannot share"):
        parallel.split(q, 8)


@pytest.mark.slow
def test_two_processes_train_as_one_does(tiny_llama: Path, tmp_path: Path) -> None:
    """Two gloo processes on the CPU, dropout 0: the same steps, checkpoints and losses; then they go on from a state as one would."""
    from lib import data

    logs = {}
    for count in (1, 2):
        sets: dict[str, Any] = {
            **{
                "model_name": str(tiny_llama),
                "results_dir": str(tmp_path / str(count)),
                "data_dir": str(tmp_path / "data"),
                "device": "cpu",
            },
            **{
                "data_rows": 60,
                "sample_size": None,
                "batch_size": 4,
                "gradient_accumulation_steps": 2,
                "num_epochs": 2,
                "lora_dropout": 0.0,
            },
            **{"save_state_every": 3},
        }
        p = config.load_pair("demo_medical", overrides=sets)
        run = config.run_dir(p)
        data.prepare(p)
        words = [word for name, value in sets.items() for word in ("--set", f"{name}={json.dumps(value)}")]
        # accelerate starts several CPU processes only across machines; torchrun, which it calls for GPUs, starts them here.
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m", "lib.qlora"]
        done = subprocess.run(
            [*line, "--pair", "demo_medical", *words],
            cwd=config.ROOT,
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        record = files.read_json(run / "training.json")
        assert (record["processes"], record["total_steps"], record["checkpoint_steps"]) == (count, 14, [1, 2, 3, 4, 5, 7, 14])
        assert list(qlora.checkpoints(run)) == record["checkpoint_steps"]
        logs[count] = files.read_csv(run / "training_log.csv")
        assert {path.name for path in (run / ".state" / "checkpoint-14").glob("rng*")} == (
            {"rng_state.pth"} if count == 1 else {"rng_state_0.pth", "rng_state_1.pth"}
        )
    assert logs[2]["loss"].tolist() == pytest.approx(logs[1]["loss"].tolist(), abs=1e-4)
    assert logs[2]["learning_rate"].tolist() == pytest.approx(logs[1]["learning_rate"].tolist())
    assert logs[2]["tokens"].tolist() == logs[1]["tokens"].tolist()
    assert qlora.train(p, data.load_rows(p), progress=False)["processes"] == 2, "the notebook finds it done"
