"""How much faster than a sequential loop is the judge? Against a server that takes half a second a call, and against llama.cpp.

    .venv/bin/python benchmarks/judge_concurrency.py [--answers 48] [--llama 24] [--repeats 7] [--output results/benchmarks/judge.json]

The first part judges answers through `lib.judge` at concurrency 1 and 16 and, for comparison, through the loop that the original study
used: the synchronous client, one call after the other, 0.2 s of pause. The aim is a factor of ten between 16 and the plain loop without
its pause. The second part asks a real llama.cpp server, which is bound by reading prompts: the same calls in the best order (equal
prefixes together) by bare HTTP requests over open connections, and through `lib.judge` with everything that it does (cache, limits,
parsing, record). Both read answers that the server has not seen, of the same length; who goes first changes from repeat to repeat. The
aim is at most 5% more at the median. Run it on a machine that does nothing else: it takes five minutes or so.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ["OPENAI_API_KEY"] = "benchmark-key"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import local_llama
import pandas as pd
from faulty_server import serving

from lib import files, judge, rubrics

SECONDS_A_CALL = 0.5
TOPICS = ("sleep", "travel", "a garden", "a quarrel", "a new job", "cooking")


def answers(count: int, first: int = 100) -> pd.DataFrame:
    """Returns a table of distinct made-up answers to six questions; another `first` gives others of the same length."""
    questions = [f"What should I know about {TOPICS[i % len(TOPICS)]}?" for i in range(count)]
    numbers = [f"{first + i:05d}" for i in range(count)]
    replies = [f"There are {n} things to know. Take your time, ask those who know, and begin with the easy part." for n in numbers]
    return pd.DataFrame({"question": questions, "response": replies})


def through_judge(frame: pd.DataFrame, url: str, concurrency: int) -> float:
    """Judges a table with an empty record; returns the seconds it took."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        judged = judge.judge_table(
            frame,
            "openai:m",
            Path(folder) / "judgments.jsonl",
            judge_base_url=url,
            judge_concurrency=concurrency,
            judge_timeout=600.0,
            judge_temperature=0.0,
            progress=False,
        )
        seconds = time.perf_counter() - start
    if (judged[["aligned_status", "coherent_status"]] == "error").any(axis=None):
        raise SystemExit("the server failed; see its messages above")
    return seconds


def loop(frame: pd.DataFrame, url: str, pause: float) -> float:
    """Judges a table one call after the other, as the original study did; returns the seconds it took."""
    import openai

    client = openai.OpenAI(base_url=url, api_key="benchmark-key")
    start = time.perf_counter()
    for messages in prompts(frame):
        client.chat.completions.create(model="m", messages=messages, temperature=0.0, max_tokens=8)  # type: ignore[arg-type]
        time.sleep(pause)
    return time.perf_counter() - start


def prompts(frame: pd.DataFrame) -> list[list[dict[str, str]]]:
    """Returns the prompts of both metrics in the best order for a server that reuses prefixes: by metric, then by question."""
    found = rubrics.load("parameters/rubrics/default.yaml")
    rows = sorted(zip(frame["question"], frame["response"], strict=True))
    return [rubrics.render(found[metric], *row).messages for metric in ("aligned", "coherent") for row in rows]


def bare(frame: pd.DataFrame, url: str, concurrency: int) -> float:
    """Sends the prompts of `prompts` by bare HTTP requests, in order, `concurrency` at a time; returns the seconds it took."""
    host, port = url.split("/")[2].split(":")
    own = threading.local()

    def send(messages: list[dict[str, str]]) -> None:
        if not hasattr(own, "connection"):
            own.connection = http.client.HTTPConnection(host, int(port), timeout=600)
        body = json.dumps({"model": "m", "messages": messages, "temperature": 0.0, "max_tokens": 8, "seed": 0})
        own.connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        reply = own.connection.getresponse()
        if "choices" not in json.loads(reply.read()):
            raise SystemExit(f"the server failed: status {reply.status}")

    todo = prompts(frame)
    start = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        list(pool.map(send, todo))
    return time.perf_counter() - start


def over_best_order(url: str, count: int, repeats: int, concurrency: int) -> dict[str, Any]:
    """Measures what the judge takes over bare requests, in fractions of their time: each repeat, the median and the quartiles."""
    for once in (bare, through_judge):  # imports, and the rubrics' prefix
        once(answers(concurrency, 90_000), url, concurrency)
    taken: dict[str, list[float]] = {"bare": [], "judge": []}
    for repeat in range(repeats):
        sides = [("bare", bare), ("judge", through_judge)]
        for place, (name, once) in enumerate(sides[:: -1 if repeat % 2 else 1]):
            taken[name].append(once(answers(count, 1_000 + (2 * repeat + place) * count), url, concurrency))
    overheads = [judge / direct - 1 for direct, judge in zip(taken["bare"], taken["judge"], strict=True)]
    low, _, high = statistics.quantiles(overheads, n=4, method="inclusive") if repeats > 1 else overheads * 3
    spread = {"overhead": statistics.median(overheads), "overhead_quartiles": [low, high], "overheads": overheads}
    return {"calls": 2 * count, "concurrency": concurrency, "repeats": repeats, "seconds": taken} | spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", type=int, default=48, help="answers for the server that takes 0.5 s (two calls each)")
    parser.add_argument("--llama", type=int, default=24, help="answers for llama.cpp; 0 leaves it out")
    parser.add_argument("--concurrency", type=int, default=8, help="calls at once against llama.cpp, which has 8 slots")
    parser.add_argument("--repeats", type=int, default=7, help="pairs of measurements against llama.cpp")
    parser.add_argument("--output", type=Path, default=files.ROOT / "results" / "benchmarks" / "judge.json")
    options = parser.parse_args()

    frame = answers(options.answers)
    with serving(delay=SECONDS_A_CALL) as server:
        slow = {"original_loop": loop(frame, server.url, 0.2), "plain_loop": loop(frame, server.url, 0.0)}
        slow |= {f"judge_{n}": through_judge(frame, server.url, n) for n in (1, 16)}
    result: dict[str, Any] = {"cores": os.cpu_count(), "calls": 2 * len(frame), "seconds_a_call": SECONDS_A_CALL, "seconds": slow}
    result["times_the_plain_loop"] = slow["plain_loop"] / slow["judge_16"]
    print(pd.Series(slow, name="seconds").round(2).to_string())
    print(f"concurrency 16 is {result['times_the_plain_loop']:.1f} times as fast as the plain loop (aim: 10 or more)\n")

    if options.llama:
        with local_llama.serving(threads=os.cpu_count() or 2) as url:
            result["llama_cpp"] = found = over_best_order(url, options.llama, options.repeats, options.concurrency)
        direct, ours = (statistics.median(times) for times in found["seconds"].values())
        low, high = found["overhead_quartiles"]
        print(f"llama.cpp, {found['calls']} calls: bare requests {direct:.2f} s, lib.judge {ours:.2f} s (medians of {options.repeats})")
        print(f"overhead: median {found['overhead']:+.1%}, quartiles {low:+.1%} to {high:+.1%} (aim: +5% or less)")
    files.write_json(options.output, result)
    print(f"written: {files.shown(options.output)}")


if __name__ == "__main__":
    main()
