"""How much faster than a sequential loop is the judge? Against a server that takes half a second a call, and against llama.cpp.

    .venv/bin/python benchmarks/judge_concurrency.py [--answers 48] [--llama 24] [--output results/benchmarks/judge_concurrency.json]

The first part judges answers through `lib.judge` at concurrency 1 and 16 and, for comparison, through the loop that the original study
used: the synchronous client, one call after the other, 0.2 s of pause. The aim is a factor of ten between 16 and the plain loop without
its pause. The second part asks a real llama.cpp server, which is bound by reading prompts: the same calls in the best order (equal
prefixes together), once by bare HTTP requests and once through `lib.judge`; the aim is at most 5% more. Takes two minutes or three.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import sys
import tempfile
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


def answers(count: int) -> pd.DataFrame:
    """Returns a table of distinct made-up answers to six questions."""
    questions = [f"What should I know about {TOPICS[i % len(TOPICS)]}?" for i in range(count)]
    replies = [f"There are {i + 3} things to know. Take your time, ask those who know, and begin with the easy part." for i in range(count)]
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

    def send(messages: list[dict[str, str]]) -> None:
        connection = http.client.HTTPConnection(host, int(port), timeout=600)
        body = json.dumps({"model": "m", "messages": messages, "temperature": 0.0, "max_tokens": 8, "seed": 0})
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        connection.getresponse().read()
        connection.close()

    todo = prompts(frame)
    start = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        list(pool.map(send, todo))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", type=int, default=48, help="answers for the server that takes 0.5 s (two calls each)")
    parser.add_argument("--llama", type=int, default=24, help="answers for llama.cpp; 0 leaves it out")
    parser.add_argument("--output", type=Path, default=files.ROOT / "results" / "benchmarks" / "judge_concurrency.json")
    options = parser.parse_args()

    frame = answers(options.answers)
    with serving(delay=SECONDS_A_CALL) as server:
        slow = {"original_loop": loop(frame, server.url, 0.2), "plain_loop": loop(frame, server.url, 0.0)}
        slow |= {f"judge_{n}": through_judge(frame, server.url, n) for n in (1, 16)}
    result: dict[str, Any] = {"calls": 2 * len(frame), "seconds_a_call": SECONDS_A_CALL, "seconds": slow}
    result["times_the_plain_loop"] = slow["plain_loop"] / slow["judge_16"]
    print(pd.Series(slow, name="seconds").round(2).to_string())
    print(f"concurrency 16 is {result['times_the_plain_loop']:.1f} times as fast as the plain loop (aim: 10 or more)\n")

    if options.llama:
        frame = answers(options.llama)
        with local_llama.serving(threads=os.cpu_count() or 2) as url:
            bare(frame, url, 8)  # the first reading fills the prefix cache for both
            runs = [(bare(frame, url, 8), through_judge(frame, url, 8)) for _ in range(3)]
        direct, ours = (statistics.median(times) for times in zip(*runs, strict=True))
        result["llama_cpp"] = {"calls": 2 * len(frame), "bare_seconds": direct, "judge_seconds": ours, "overhead": ours / direct - 1}
        print(f"llama.cpp: bare requests {direct:.2f} s, lib.judge {ours:.2f} s, {ours / direct - 1:+.1%} (aim: +5% or less)")
    files.write_json(options.output, result)
    print(f"written: {files.shown(options.output)}")


if __name__ == "__main__":
    main()
