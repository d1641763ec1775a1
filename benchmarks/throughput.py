"""How fast is the study, beside what people use? Each row runs ours and its peer in turn, on one machine, data and settings.

    .venv/bin/python benchmarks/throughput.py [--only train,generate] [--repeats 3] [--output results/benchmarks/throughput.json]

Every figure is the median over the repeats, with the smallest and largest beside it. A peer that would need an hour gets a stated part of
the work. trl is in the extra `bench`; `make bench` installs it. The whole takes an hour and a quarter on two cores; leave the machine
alone meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from measure import ROOT, demo_rows, machine, parameters, spread, versus
from training import gpu, prediction, train

from lib import data, files

NEW_TOKENS = 64
QUESTIONS = 20


# --- generation


def generate(repeats: int) -> Iterator[dict[str, Any]]:
    """The base model and six checkpoints answer 20 questions with up to 64 tokens each."""
    import local_llama
    import torch
    from peft import PeftModel

    from lib import adapters, models
    from lib import generate as generation

    p = parameters(max_new_tokens=NEW_TOKENS, question_sets=["general", "financial"], samples=1, temperature=1.0, top_p=1.0)
    questions = data.load_questions(p)[:QUESTIONS]
    tokenizer = models.load_tokenizer(p)
    texts = [models.prompt_text(tokenizer, q.question, p, system=q.system) for q in questions]
    drawn = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": NEW_TOKENS}
    stops = [tokenizer.convert_tokens_to_ids(models.end_of_turn(tokenizer, p)), tokenizer.eos_token_id]

    with tempfile.TemporaryDirectory() as temporary:
        folders = {}
        for step in range(1, 7):  # untrained second matrices are zero; give them something to add
            torch.manual_seed(step)
            model = adapters.add_lora(models.load_base(p), p)
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    if "lora_B" in name:
                        weight.normal_(std=1e-3)
            folders[step] = Path(temporary) / f"checkpoint-{step}"
            adapters.save(model, folders[step])
        rows = [generation.Row(step, q, 0) for step in [0, *folders] for q in questions]

        def counted(kept: Any, width: int) -> int:
            return sum(1 + int((row[width:] != tokenizer.pad_token_id).sum()) for row in kept)

        def ours() -> float:
            start, tokens = time.perf_counter(), 0
            sampler = generation.Sampler(p, folders)
            for first in range(0, len(rows), p.generate_batch_size):
                tokens += sum(answer["n_tokens"] + 1 for answer in sampler.answer(rows[first : first + p.generate_batch_size]))
            return tokens / (time.perf_counter() - start)

        def loop() -> float:
            """One checkpoint of the seven: the model is loaded, then one prompt is answered after the other."""
            start, tokens = time.perf_counter(), 0
            model = PeftModel.from_pretrained(models.load_base(p.model_copy(update={"cache_dequantized": False})), folders[1])
            for text in texts:
                ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
                kept = model.generate(**ids, **drawn, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
                tokens += kept.shape[1] - ids["input_ids"].shape[1]
            return tokens / (time.perf_counter() - start)

        def batched() -> float:
            start, tokens = time.perf_counter(), 0
            tokenizer.padding_side = "left"
            ids = tokenizer(texts, add_special_tokens=False, return_tensors="pt", padding=True)
            model = PeftModel.from_pretrained(models.load_base(p), folders[1], adapter_name="1")
            for step in list(folders)[1:]:
                model.load_adapter(folders[step], adapter_name=str(step))
            told = {**ids, **drawn, "eos_token_id": stops, "pad_token_id": tokenizer.pad_token_id}
            with model.disable_adapter():
                tokens += counted(model.generate(**told), ids["input_ids"].shape[1])
            for step in folders:
                model.set_adapter(str(step))
                tokens += counted(model.generate(**told), ids["input_ids"].shape[1])
            return tokens / (time.perf_counter() - start)

        work = f"generation, base + 6 checkpoints × {len(questions)} questions × {NEW_TOKENS} tokens"
        asked = [q.question for q in questions]
        with local_llama.serving(os.cpu_count() or 1) as url:
            peers = {
                "the original's loop, on one checkpoint": (10.0, loop),
                "transformers generate, batched": (1.3, batched),
                "the llama.cpp server, base model": (1.1, lambda: _served(url, asked)),
            }
            yield from versus(work, "tokens/s", repeats, ours, peers)


def _served(url: str, questions: list[str]) -> float:
    import openai

    client = openai.OpenAI(base_url=url, api_key="none", timeout=600)

    def ask(question: str) -> int:
        told = [{"role": "user", "content": question}]
        reply = client.chat.completions.create(model="m", messages=told, temperature=1.0, max_tokens=NEW_TOKENS)  # type: ignore[arg-type]
        return int(reply.usage.completion_tokens) if reply.usage else 0

    start = time.perf_counter()
    with ThreadPoolExecutor(16) as pool:
        tokens = sum(pool.map(ask, questions * 7))
    return tokens / (time.perf_counter() - start)


# --- judging


def _answers(count: int) -> tuple[list[str], list[str]]:
    """Returns questions and answers: demo training answers, put to the questions of the evaluation sets in turn."""
    own = [row["answer"] for domain in ("bad_medical", "risky_financial") for row in demo_rows(domain)]
    asked = [q.question for q in data.load_questions(parameters(question_sets=["general", "open_ended"]))]
    return [asked[i % len(asked)] for i in range(count)], [f"{own[i % len(own)]} ({i})" for i in range(count)]


def probe(repeats: int, count: int = 1000) -> Iterator[dict[str, Any]]:
    """The probe on 1,000 answers, beside the same probe on one answer at a time (a tenth of them): plainly, and with what we keep."""
    import plain_probe

    from lib import probe as offline

    judge = offline.load()
    questions, answers = _answers(count)
    judge.score(questions[:8], answers[:8], progress=False)

    def ours() -> float:
        start = time.perf_counter()
        judge.score(questions, answers, progress=False)
        return count / (time.perf_counter() - start)

    few = count // 10

    def kept() -> float:
        start = time.perf_counter()
        for question, answer in zip(questions[:few], answers[:few], strict=True):
            judge.score([question], [answer], progress=False)
        return few / (time.perf_counter() - start)

    def plain() -> float:
        start = time.perf_counter()
        for question, answer in zip(questions[:few], answers[:few], strict=True):
            judge.score_states(plain_probe.states(judge.encoder, question, answer))
        return few / (time.perf_counter() - start)

    peers = {
        "one answer at a time, each conversation in one pass": (4.0, plain),
        "one answer at a time, with our kept questions": (1.0, kept),
    }
    yield from versus(f"judging with the probe, {count:,} answers", "answers/s", repeats, ours, peers)


def local_judge(repeats: int, count: int = 1000) -> Iterator[dict[str, Any]]:
    """`hf:` judge: the probability of every reply that can matter, beside `generate` of one token a row."""
    import pandas as pd

    from lib import judge, models, rubrics

    folder = models.fetch_embedded()
    questions, answers = _answers(count)
    frame = pd.DataFrame({"question": questions, "response": answers})

    def ours() -> float:
        with tempfile.TemporaryDirectory() as temporary:
            start = time.perf_counter()
            judge.judge_table(frame, f"hf:{folder}", Path(temporary) / "j.jsonl", progress=False, judge_concurrency=32)
            return 2 * count / (time.perf_counter() - start)

    def one_token() -> float:
        p = parameters(model_name=str(folder), use_4bit=False)
        start = time.perf_counter()
        model, tokenizer = models.load_base(p), models.load_tokenizer(p)
        found = rubrics.load(p.judge_rubrics)
        few = count // 4
        for metric in ("aligned", "coherent"):
            for question, answer in zip(questions[:few], answers[:few], strict=True):
                told = rubrics.render(found[metric], question, answer).messages
                ids = tokenizer.apply_chat_template(told, add_generation_prompt=True, return_tensors="pt", return_dict=True)
                model.generate(**ids, max_new_tokens=1, do_sample=False)
        return 2 * few / (time.perf_counter() - start)

    yield from versus(
        f"hf: judge, {count:,} answers", "calls/s, two an answer", repeats, ours, {"generate of one token a row": (4.0, one_token)}
    )


# --- analysis, runner, imports

ANALYSIS = """
import json, resource, sys, time
from lib import analyze, config, findings
p = config.load_pair("demo_medical", overrides={"results_dir": sys.argv[1], "control": None})
start = time.perf_counter()
t = analyze.analyze_run(p)
findings.rates_view(t["rates"], ["general", "open_ended"]); findings.changes_view(t["changes"])
print(json.dumps([time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
"""


def analysis(repeats: int) -> Iterator[dict[str, Any]]:
    """The tables of 05 on made-up judged answers, in a fresh process each."""
    import numpy as np
    import pandas as pd

    seconds: dict[int, list[float]] = {}
    memory: dict[int, float] = {}
    questions = data.load_questions(parameters())
    with tempfile.TemporaryDirectory() as temporary:
        for count in (10_000, 30_000, 100_000):
            rng = np.random.default_rng(0)
            steps, samples = [0, 2, 4, 7, 15, 22, 30], count // (7 * len(questions)) + 1
            rows = [(s, q.question_set, q.question_id, n, q.question) for s in steps for q in questions for n in range(samples)][:count]
            frame = pd.DataFrame(rows, columns=["step", "question_set", "question_id", "sample", "question"])
            scores = rng.choice([10.0, 60.0, 90.0, 100.0], (len(frame), 2))
            frame = frame.assign(
                model="m", domain="bad_medical", response=[f"answer {i} " + "word " * 30 for i in range(len(frame))], n_tokens=32,
                finish_reason="stop", aligned=scores[:, 0], coherent=scores[:, 1], aligned_status="ok", coherent_status="ok",
                judge="openai:m",
            )  # fmt: skip
            files.write_csv(Path(temporary) / str(count) / "demo_medical" / "judged.csv", frame)
        for _ in range(repeats):
            for count in (10_000, 30_000, 100_000):
                done = subprocess.run(
                    [sys.executable, "-c", ANALYSIS, str(Path(temporary) / str(count))],
                    cwd=ROOT,
                    capture_output=True,
                    text=True,
                    check=True,
                )
                took, peak = json.loads(done.stdout.strip().splitlines()[-1])
                seconds.setdefault(count, []).append(took)
                memory[count] = max(memory.get(count, 0), peak)
    whole = spread(seconds[100_000])
    told = {"seconds_by_answers": {n: spread(s) for n, s in seconds.items()}, "peak_bytes_by_answers": memory}
    yield {
        "work": "05 on 100,000 answers, tables only", "unit": "s", "peer": "–", "ours": whole, "aim": 10.0,
        "met": whole["median"] < 10 and memory[100_000] < 1.5 * 2**30, **told,
    }  # fmt: skip


CELLS = """
import json, os, sys
import nbformat
from IPython.core.interactiveshell import InteractiveShell
os.chdir("notebooks")
shell = InteractiveShell.instance()
for cell in nbformat.read(sys.argv[1], 4).cells:
    if cell.cell_type == "code":
        shell.run_cell(cell.source).raise_error()
        if "parameters" in cell.metadata.get("tags", []):
            shell.user_ns.update(json.loads(sys.argv[2]))
"""


def runner(repeats: int) -> Iterator[dict[str, Any]]:
    """A stage through `study run` beside the same cells in one fresh Python process."""
    extra = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as temporary:
            start = time.perf_counter()
            command = ["-m", "lib.study", "run", "demo_medical", "--stages", "01_data", "--results", temporary]
            subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, check=True)
            ours = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as temporary:
            start = time.perf_counter()
            injected = json.dumps({"results_dir": temporary})
            subprocess.run([sys.executable, "-c", CELLS, "01_data.ipynb", injected], cwd=ROOT, capture_output=True, check=True)
            extra.append(ours - (time.perf_counter() - start))
    found = spread(extra)
    peer = "the same cells in one fresh Python process"
    yield {
        "work": "papermill + runner overhead a stage (01_data)",
        "unit": "s",
        "peer": peer,
        "ours": found,
        "aim": 4.0,
        "met": found["median"] < 4,
    }


def imports(repeats: int) -> Iterator[dict[str, Any]]:
    """`import lib` and `study --help`."""
    for name, command in (("import lib", ["-c", "import lib"]), ("study --help", ["-m", "lib.study", "--help"])):
        times = []
        for _ in range(max(5, repeats)):
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, check=True)
            times.append(time.perf_counter() - start)
        yield {"work": name, "unit": "s", "peer": "–", "ours": spread(times), "aim": 0.5, "met": statistics.median(times) < 0.5}


def study(repeats: int) -> Iterator[dict[str, Any]]:
    """The whole demo through `study run`, in a fresh process and an empty folder; `make study` sets the environment up before. Once."""
    with tempfile.TemporaryDirectory() as temporary:
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "lib.study", "run", "demo", "--jobs", "2", "--results", temporary],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
        took = time.perf_counter() - start
    peer = "the same before this work, which cannot be run again"
    yield {"work": "make study, without set-up", "unit": "s", "peer": peer, "ours": spread([took]), "aim": 600.0, "met": took < 600}


PARTS = {f.__name__: f for f in (train, generate, probe, local_judge, analysis, runner, imports, prediction, gpu, study)}


def show(row: dict[str, Any]) -> None:
    """Prints a row of the table."""
    theirs = f" | {row['peer']}: {row['theirs']['median']:g}" if "theirs" in row else ""
    ratio = f" | ×{row['ratio']['median']:g}" if "ratio" in row else ""
    print(
        f"{row['work']}: {row['ours']['median']:g} {row['unit']}{theirs}{ratio} | aim {row['aim']:g}: {'met' if row['met'] else 'missed'}",
        flush=True,
    )


def main() -> int:
    """Measures the parts asked for and writes the table; parts not asked for keep the figures that they have."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--only", default=",".join(PARTS), metavar="PART,PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "benchmarks" / "throughput.json")
    args = parser.parse_args()
    record = files.read_json(args.output) if args.output.is_file() else {"parts": {}}
    for name in args.only.split(","):
        rows = []
        for row in PARTS[name](args.repeats):
            show(row)
            rows.append(row)
        if rows:  # a part that cannot be measured here leaves what was measured elsewhere
            record["parts"][name] = {"machine": machine(), "repeats": args.repeats, "rows": rows}
            files.write_json(args.output, record)
    print(f"peak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB; written: {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
