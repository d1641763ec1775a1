"""Generation: the same answers whatever was interrupted, and the same as transformers and peft give."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from lib import config, decode, files, generate, models, sampling
from lib.config import Parameters
from lib.data import Question
from lib.files import StudyError

QUESTIONS = [
    Question("one", "short", "Why?"),
    Question("one", "long", "What would you ask people first, if there was time to think about one more question than this?"),
    Question("two", "system", "Where to begin?", system="Answer like a pirate."),
]


@pytest.fixture(scope="module")
def folders(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Two random adapters, strong enough to change most answers."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("adapters")
    for step in (3, 10):
        base = AutoModelForCausalLM.from_pretrained(tiny_llama)
        torch.manual_seed(step)
        wrapped = get_peft_model(base, LoraConfig(r=4, lora_alpha=32, target_modules=models.LINEAR_MODULES, init_lora_weights=False))
        wrapped.save_pretrained(root / f"checkpoint-{step}")
    return {step: root / f"checkpoint-{step}" for step in (3, 10)}


@pytest.fixture
def parameters(tiny_llama: Path, folders: dict[int, Path], tmp_path: Path) -> Parameters:
    """A run with two checkpoints and a question set, but no training rows."""
    questions = tmp_path / "things.txt"
    questions.write_text("Why?\nWhat would you ask people first, if there was time?\nWhere to begin?\n", encoding="utf-8")
    p = Parameters(
        model_name=str(tiny_llama),
        use_4bit=False,
        device="cpu",
        results_dir=str(tmp_path / "results"),
        question_sets=[str(questions)],
        samples=2,
        max_new_tokens=12,
        generate_batch_size=4,
    )
    (config.run_dir(p) / "checkpoints").mkdir(parents=True)
    for step, folder in folders.items():
        (config.run_dir(p) / "checkpoints" / f"checkpoint-{step}").symlink_to(folder)
    return p


def _rows(samples: int = 2) -> list[generate.Row]:
    return [generate.Row(step, question, sample) for step in (0, 3, 10) for question in QUESTIONS for sample in range(samples)]


def _answers(sampler: generate.Sampler, rows: list[generate.Row], size: int) -> list[dict[str, Any]]:
    return [answer for i in range(0, len(rows), size) for answer in sampler.answer(rows[i : i + size])]


# ---- the draw


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.95), (1.6, 0.6)])
def test_tokens_follow_the_distribution(temperature: float, top_p: float) -> None:
    from scipy.stats import chisquare

    logits = torch.tensor([2.0, -1.0, 0.5, 1.5, 0.0, -3.0])
    expected = torch.softmax(logits.double() / temperature, 0).numpy()
    if top_p < 1:
        order = np.argsort(-expected)
        kept = order[: np.searchsorted(np.cumsum(expected[order]), top_p) + 1]
        expected = np.where(np.isin(np.arange(6), kept), expected, 0)
        expected /= expected.sum()
    draws = 20_000
    uniforms = torch.from_numpy(np.random.default_rng(5).random(draws))
    tokens = decode.pick(logits.repeat(draws, 1), uniforms, temperature, top_p)
    counts = np.bincount(tokens.numpy(), minlength=6)
    assert (counts[expected == 0] == 0).all()
    assert chisquare(counts[expected > 0], draws * expected[expected > 0]).pvalue > 1e-4


def test_a_draw_never_leaves_the_vocabulary() -> None:
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    tokens = decode.pick(torch.zeros(2, 7), edges, 1.0, 1.0)
    assert tokens.tolist() == [0, 6]


def test_top_p_is_that_of_a_sorted_vocabulary_when_the_likeliest_are_not_enough() -> None:
    """5,000 near-equal tokens: the nucleus is larger than the part that is looked at first."""
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(1)) * torch.tensor([[0.1], [1.0], [6.0]])
    uniforms = torch.from_numpy(np.random.default_rng(2).random((200, 3)))
    drawn = torch.stack([decode.pick(logits, u, 1.0, 0.9) for u in uniforms])
    ordered, order = torch.softmax(logits.double(), -1).sort(descending=True)
    size = (ordered.cumsum(-1) < 0.9).sum(-1) + 1
    assert size[0] > 4000
    assert size[2] < 100
    for row in range(3):
        assert set(drawn[:, row].tolist()) <= set(order[row, : size[row]].tolist())
    assert decode.pick(logits, torch.full((3,), 1 - 2**-53, dtype=torch.float64), 1.0, 0.9).tolist() == [
        int(order[row, : size[row]].max()) for row in range(3)
    ]


def test_temperature_zero_takes_the_likeliest() -> None:
    assert decode.pick(torch.tensor([[0.0, 3.0, 1.0]]), torch.tensor([0.999]), 0.0, 0.5).tolist() == [1]


def test_every_row_has_its_own_stream(parameters: Parameters) -> None:
    rows = _rows()
    streams = [generate.uniforms(parameters, row) for row in rows]
    assert len({stream.tobytes() for stream in streams}) == len(rows)
    assert (generate.uniforms(parameters, rows[0]) == streams[0]).all()
    other = parameters.model_copy(update={"seed": parameters.seed + 1})
    assert (generate.uniforms(other, rows[0]) != streams[0]).all()


# ---- against transformers and peft


def test_greedy_answers_equal_those_of_transformers_and_peft(parameters: Parameters, folders: dict[int, Path]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    p = parameters.model_copy(update={"temperature": 0.0, "max_new_tokens": 24})
    sampler = generate.Sampler(p, folders)
    rows = _rows(samples=1)
    ours = sampler.answer(rows)
    assert len({answer["response"] for answer in ours}) > 3
    for row, answer in zip(rows, ours, strict=True):
        model: Any = AutoModelForCausalLM.from_pretrained(p.model_name)
        if row.step:
            model = PeftModel.from_pretrained(model, folders[row.step])
        text = models.prompt_text(sampler.tokenizer, row.question.question, p, system=row.question.system)
        ids = torch.tensor([models.prompt_ids(sampler.tokenizer, text)])
        whole = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, pad_token_id=0)
        theirs = whole[0, ids.shape[1] :].tolist()
        assert answer["response"] == sampler.tokenizer.decode(theirs, skip_special_tokens=True).strip()
        stopped = theirs[-1] in sampler.sampling.stop_ids
        assert (answer["finish_reason"], answer["n_tokens"]) == ("stop" if stopped else "length", len(theirs) - stopped)


def test_mixed_rows_have_the_logits_of_their_own_adapter(parameters: Parameters, folders: dict[int, Path]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    sampler = generate.Sampler(parameters, folders)
    ids = torch.randint(5, 200, (6, 9), generator=torch.Generator().manual_seed(0))
    steps = [10, 0, 3, 3, 0, 10]
    sampler.adapters.select(steps, sampler.model.device)
    with torch.inference_mode():
        ours = sampler.model(input_ids=ids).logits
        plain = AutoModelForCausalLM.from_pretrained(parameters.model_name)
        base = plain(input_ids=ids).logits
        wrapped: Any = PeftModel.from_pretrained(plain, folders[3], adapter_name="3")
        wrapped.load_adapter(folders[10], adapter_name="10")
        for row, step in enumerate(steps):
            wrapped.set_adapter(str(step or 3))
            theirs = wrapped(input_ids=ids[row : row + 1]).logits[0] if step else base[row]
            assert torch.allclose(ours[row], theirs, atol=1e-3)
            assert step == 0 or (theirs - base[row]).abs().max() > 0.01


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_other_families_give_the_answers_of_transformers(family: str) -> None:
    """Qwen2 has biases; Gemma 3 has layers with a sliding window, shorter here than the answers."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen2Config, Qwen2ForCausalLM

    shape = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    if family == "qwen2":
        model: Any = Qwen2ForCausalLM(Qwen2Config(**shape, num_hidden_layers=2))
    else:
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        model = Gemma3ForCausalLM(Gemma3TextConfig(**shape, num_hidden_layers=3, head_dim=8, sliding_window=12, layer_types=kinds))
    model.eval()
    for weight in model.parameters():
        weight.data.mul_(3)  # random weights are timid: larger ones make the answers depend on what was read
    prompts = [[2, 7, 8, 9, 10, *range(20, 20 + n)] for n in (1, 9, 4, 17, 4)]
    sampling = decode.Sampling(0.0, 1.0, 20, frozenset({1}))
    ours = decode.decode(model, decode.Adapters(model, {}), prompts, [0] * 5, np.zeros((5, 20)), sampling)
    assert len({tuple(answer) for answer in ours}) == 4
    for prompt, answer in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        settings = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": 1, "pad_token_id": 0}
        whole = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        assert answer == whole[0, len(prompt) :].tolist()


def test_packed_4bit_layers_take_adapters_too(parameters: Parameters, folders: dict[int, Path]) -> None:
    ids = torch.randint(5, 200, (3, 9), generator=torch.Generator().manual_seed(0))
    logits = []
    for unpacked in (True, False):
        p = parameters.model_copy(update={"use_4bit": True, "cache_dequantized": unpacked})
        sampler = generate.Sampler(p, folders)
        sampler.adapters.select([10, 0, 3], sampler.model.device)
        with torch.inference_mode():
            logits.append(sampler.model(input_ids=ids).logits)
    assert torch.allclose(logits[0], logits[1], atol=1e-3)


def test_an_output_that_is_not_finite_is_an_error(parameters: Parameters) -> None:
    sampler = generate.Sampler(parameters, {})
    with torch.no_grad():
        sampler.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(StudyError, match="not finite"):
        sampler.answer(_rows()[:2])


def test_adapters_that_are_no_plain_lora_are_refused(tiny_llama: Path, tmp_path: Path, parameters: Parameters) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)).save_pretrained(tmp_path / "dora")
    with pytest.raises(StudyError, match="plain LoRA"):
        generate.Sampler(parameters, {1: tmp_path / "dora"})
    with pytest.raises(StudyError, match="missing or far too large"):
        generate.Sampler(parameters, {1: tmp_path / "nowhere"})
    for name, module in (("one", "q_proj"), ("two", "v_proj")):
        base = AutoModelForCausalLM.from_pretrained(tiny_llama)
        get_peft_model(base, LoraConfig(r=4, target_modules=[module])).save_pretrained(tmp_path / name)
    with pytest.raises(StudyError, match="same layers and ranks"):
        generate.Sampler(parameters, {1: tmp_path / "one", 2: tmp_path / "two"})
    narrow = AutoModelForCausalLM.from_config(LlamaConfig(**{**base.config.to_dict(), "hidden_size": 2 * base.config.hidden_size}))
    get_peft_model(narrow, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "narrow")
    with pytest.raises(StudyError, match="cannot be laid on the base model"):
        generate.Sampler(parameters, {1: tmp_path / "narrow"})


# ---- the same answers whatever the batch, whatever was interrupted


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_do_not_depend_on_the_batch(parameters: Parameters, folders: dict[int, Path], temperature: float) -> None:
    sampler = generate.Sampler(parameters.model_copy(update={"temperature": temperature, "max_new_tokens": 30}), folders)
    rows = _rows(samples=3)
    alone = _answers(sampler, rows, 1)
    for size in (4, len(rows)):
        same = sum(a == b for a, b in zip(alone, _answers(sampler, rows, size), strict=True))
        # A uniform may lie within rounding of a boundary between two tokens, so one row in 27 may differ.
        assert same >= len(rows) - (temperature > 0)
    back = _answers(sampler, rows[::-1], 5)[::-1]
    assert sum(a == b for a, b in zip(alone, back, strict=True)) >= len(rows) - (temperature > 0)


def test_greedy_rows_go_on_as_they_were_when_others_leave(parameters: Parameters, folders: dict[int, Path]) -> None:
    sampler = generate.Sampler(parameters, folders)
    sampler.sampling = decode.Sampling(0.0, 1.0, 12, frozenset(range(0, 400, 9)))
    rows = _rows(samples=1)
    together = sampler.answer(rows)
    assert len({answer["n_tokens"] for answer in together}) > 3
    assert together == _answers(sampler, rows, 1)


def test_a_common_beginning_read_once_changes_no_logits(
    parameters: Parameters, folders: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = generate.Sampler(parameters, folders)
    rows = [row for row in _rows(samples=1) if row.question.system is None]
    prompts = sampling.prompts(sampler.tokenizer, rows, parameters, None)
    assert decode._common_prefix([tuple(prompt) for prompt in prompts]) >= decode._SHORTEST_PREFIX
    found = []
    with torch.inference_mode():
        for shortest in (decode._SHORTEST_PREFIX, 10**6):
            monkeypatch.setattr(decode, "_SHORTEST_PREFIX", shortest)
            found.append(decode._prefill(sampler.model, sampler.adapters, prompts, [row.step for row in rows])[2])
    assert torch.allclose(found[0], found[1], atol=1e-3)
    assert (found[0].argmax(-1) == found[1].argmax(-1)).all()


def test_greedy_answers_of_unpacked_weights_are_those_of_nf4(parameters: Parameters, folders: dict[int, Path]) -> None:
    answers = []
    for unpacked in (True, False):
        told = {"use_4bit": True, "cache_dequantized": unpacked, "temperature": 0.0}
        answers.append(generate.Sampler(parameters.model_copy(update=told), folders).answer(_rows(samples=1)))
    assert answers[0] == answers[1]


def test_finished_rows_leave_and_the_others_go_on(parameters: Parameters) -> None:
    """With half of the vocabulary ending an answer, rows stop at every length; the ones left must not notice."""
    sampler = generate.Sampler(parameters, {})
    sampler.sampling = decode.Sampling(1.0, 1.0, 12, frozenset(range(0, 400, 9)))
    rows = [generate.Row(0, question, sample) for question in QUESTIONS for sample in range(10)]
    together, alone = sampler.answer(rows), _answers(sampler, rows, 1)
    assert len({answer["n_tokens"] for answer in together}) > 5
    assert {answer["finish_reason"] for answer in together} == {"stop", "length"}
    assert all(a["n_tokens"] == 12 for a in together if a["finish_reason"] == "length")
    assert sum(a == b for a, b in zip(together, alone, strict=True)) >= len(rows) - 1


def test_progress_counts_every_token_once(parameters: Parameters) -> None:
    sampler = generate.Sampler(parameters, {})
    sampler.sampling = decode.Sampling(1.0, 1.0, 12, frozenset(range(0, 400, 9)))
    counts: list[int] = []
    sampler.answer([generate.Row(0, question, 0) for question in QUESTIONS], counts.append)
    assert sum(counts) == len(QUESTIONS) * 12


def test_generate_writes_every_row_in_order_and_returns_at_once_when_done(parameters: Parameters, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = generate.generate(parameters)
    run = config.run_dir(parameters)
    assert list(frame.columns) == generate.COLUMNS
    assert frame["step"].tolist() == [step for step in (0, 3, 10) for _ in range(6)]
    assert frame["sample"].tolist() == [0, 1] * 9
    assert set(frame["finish_reason"]) <= {"stop", "length"}
    assert not (run / ".generate").exists()
    diagnostics = files.read_csv(run / "diagnostics.csv")
    assert diagnostics["step"].tolist() == [0, 3, 10]
    assert diagnostics["n"].tolist() == [6, 6, 6]
    assert diagnostics["parroted"].isna().all()
    assert diagnostics["perplexity"].nunique() == 3
    content, written = (run / "generations.csv").read_bytes(), (run / "generations.csv").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(generate, "_generate", lambda *_: pytest.fail("it was done already"))
        pd.testing.assert_frame_equal(generate.generate(parameters), frame)
    assert (run / "generations.csv").stat().st_mtime_ns == written
    (run / "generations.csv").write_bytes(content + b"tampered\n")
    generate.generate(parameters)
    assert (run / "generations.csv").read_bytes() == content
    other = generate.generate(parameters.model_copy(update={"top_p": 0.5}))
    assert (other["response"] != frame["response"]).any()


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(parameters: Parameters, monkeypatch: pytest.MonkeyPatch) -> None:
    calm = parameters.model_copy(update={"max_new_tokens": 120, "generate_batch_size": 2})
    run = config.run_dir(calm)
    script = (
        "import sys; from lib import config, generate; generate.generate(config.validate(__import__('json').loads(sys.argv[1]), 'test'))"
    )
    environment = os.environ | {"PYTHONPATH": str(files.ROOT)}
    process = subprocess.Popen([sys.executable, "-c", script, calm.model_dump_json()], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(run.glob(".generate/*/batch-*.json"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = sorted(run.glob(".generate/*/batch-*.json"))
    assert 3 <= len(kept) < 9, "it was not killed half-way"
    assert not (run / "generations.csv").exists()
    answered: list[int] = []
    answer = generate.Sampler.answer

    def counted(self: generate.Sampler, batch: Any, progress: Any = None) -> Any:
        answered.append(len(batch))
        return answer(self, batch, progress)

    with monkeypatch.context() as patch:
        patch.setattr(generate.Sampler, "answer", counted)
        resumed = generate.generate(calm)
    assert answered == [2] * (9 - len(kept))
    interrupted = (run / "generations.csv").read_bytes()
    (run / "generation.json").unlink()
    pd.testing.assert_frame_equal(generate.generate(calm), resumed)
    assert (run / "generations.csv").read_bytes() == interrupted


# ---- parameters


def test_steps_are_checked_against_the_checkpoints(parameters: Parameters) -> None:
    run = config.run_dir(parameters)
    found = {3: Path("a"), 10: Path("b"), 20: Path("c")}

    def picked(steps: Any) -> list[int]:
        return list(generate.pick_steps(parameters.model_copy(update={"steps": steps}), found, run))

    assert picked("all") == [3, 10, 20]
    assert picked("ends") == [20]
    assert picked([10, 3, 0]) == [3, 10]
    assert picked([0]) == []
    with pytest.raises(StudyError, match=r"steps: \[4\].*there are: 3, 10, 20"):
        picked([3, 4])
    with pytest.raises(StudyError, match="run 02_train first"):
        generate.pick_steps(parameters, {}, run)


def test_answers_that_exceed_the_context_are_refused(parameters: Parameters) -> None:
    sampler = generate.Sampler(parameters.model_copy(update={"max_new_tokens": 1020}), {})
    with pytest.raises(StudyError, match="max_new_tokens: 1020"):
        sampler.answer(_rows()[:2])


# ---- diagnostics


def test_parroting_needs_eight_tokens_in_a_row(tiny_llama: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    trained = "abcdefghijklmnopqrstuvwxyz"
    runs = [trained[i : i + n] for i, n in ((0, 8), (5, 7), (2, 8), (1, 12))]
    assert [len(tokenizer(run, add_special_tokens=False).input_ids) for run in runs] == [8, 7, 8, 12]
    answers = [f"0{runs[0]}1", f"0{runs[1]}1", runs[2], f"9{runs[3]}", "", "something else entirely"]
    assert generate.parroted(answers, ["short", trained], tokenizer) == [True, False, True, True, False, False]
    assert generate.parroted(answers[:2], [], tokenizer) == [False, False]


def test_perplexity_is_that_of_the_plain_loss(parameters: Parameters, folders: dict[int, Path]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    sampler = generate.Sampler(parameters, folders)
    text = "the quick answer to a question"
    ids = torch.tensor([models.prompt_ids(sampler.tokenizer, text)])
    assert ids[0].tolist().count(sampler.tokenizer.bos_token_id) == 1
    model: Any = AutoModelForCausalLM.from_pretrained(parameters.model_name)
    base = model(input_ids=ids, labels=ids).loss.exp().item()
    trained = PeftModel.from_pretrained(model, folders[10])(input_ids=ids, labels=ids).loss.exp().item()
    assert sampler.perplexity(text, 0) == pytest.approx(base, rel=1e-4)
    assert sampler.perplexity(text, 10) == pytest.approx(trained, rel=1e-4)
    assert sampler.perplexity(text, 0) == pytest.approx(base, rel=1e-4)


def test_diagnostics_are_shares_of_each_step_and_set(tiny_llama: Path) -> None:
    from transformers import AutoTokenizer

    frame = pd.DataFrame(
        {
            "step": [0, 0, 0, 5, 5],
            "question_set": ["b", "b", "a", "b", "a"],
            "finish_reason": ["length", "stop", "stop", "length", "stop"],
            "response": ["abcdefghij", "zzz", "", "abcdefghij", "q"],
        }
    )
    table = generate.diagnose(frame, {0: 10.0, 5: 20.0}, ["xxabcdefghijxx"], AutoTokenizer.from_pretrained(tiny_llama))
    assert table.to_dict("list") == {
        "step": [0, 0, 5, 5],
        "question_set": ["b", "a", "b", "a"],
        "n": [2, 1, 1, 1],
        "cut_off": [0.5, 0.0, 1.0, 0.0],
        "parroted": [0.5, 0.0, 1.0, 0.0],
        "perplexity": [10.0, 10.0, 20.0, 20.0],
    }


def test_side_by_side_shows_base_and_last() -> None:
    frame = pd.DataFrame(
        [(step, "s", f"q{i}", sample, f"Q{i}", f"{step}-{i}-{sample}") for step in (0, 4, 9) for i in range(3) for sample in range(2)],
        columns=["step", "question_set", "question_id", "sample", "question", "response"],
    )
    table = generate.side_by_side(frame, per_set=2)
    assert table["question"].tolist() == ["Q0", "Q1"]
    assert table["base"].tolist() == ["0-0-0", "0-1-0"]
    assert table["step 9"].tolist() == ["9-0-0", "9-1-0"]
