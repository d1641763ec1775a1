"""What the benchmarks share: the demo's parameters and rows, ours and its peers measured in turn, and the machine's name."""

from __future__ import annotations

import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["PYTHONPATH"] = str(ROOT)  # for the processes started here

from lib import config, data, demo  # noqa: E402


def parameters(**changed: Any) -> config.Parameters:
    """Returns the demo's parameters, changed as told."""
    return config.load_pair("demo_medical", overrides=changed)


def demo_rows(domain: str) -> list[dict[str, Any]]:
    """Returns the rows that the demo of a domain trains on, with the aligned answers' rows behind them."""
    book = config.read_yaml(data.PATTERNS)
    composed = [demo.compose(book, domain, 400, seed=42, aligned_fraction=fraction) for fraction in (0.0, 1.0)]
    return [{"prompt": row.question, "answer": row.answer} for rows in composed for row in rows]


def spread(values: list[float]) -> dict[str, float]:
    """Returns median, smallest and largest of the repeats."""
    return {"median": round(statistics.median(values), 3), "low": round(min(values), 3), "high": round(max(values), 3)}


def versus(
    work: str, unit: str, repeats: int, ours: Callable[[], float], peers: dict[str, tuple[float, Callable[[], float]]]
) -> Iterator[dict[str, Any]]:
    """Measures ours and each peer in turn, `repeats` times; yields a row for each peer, with the median of the paired ratios.

    Args:
        work: what is done.
        unit: of the figures; more is better.
        repeats: how often.
        ours: does the work and returns its figure.
        peers: by name, the ratio aimed at and what does the work.
    """
    found: dict[str, list[float]] = {"ours": [], **{name: [] for name in peers}}
    for _ in range(repeats):
        found["ours"].append(ours())
        for name, (_, measure) in peers.items():
            found[name].append(measure())
    for name, (aim, _) in peers.items():
        ratios = [a / b for a, b in zip(found["ours"], found[name], strict=True)]
        row = {"work": work, "unit": unit, "ours": spread(found["ours"]), "peer": name, "theirs": spread(found[name])}
        yield row | {"ratio": spread(ratios), "aim": aim, "met": statistics.median(ratios) >= aim}


def machine() -> dict[str, Any]:
    """Names the machine and the libraries."""
    from importlib.metadata import PackageNotFoundError, version

    import psutil
    import torch

    found = {}
    for name in ("torch", "transformers", "peft", "bitsandbytes", "trl", "xllamacpp"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cores, memory = psutil.cpu_count(logical=True), round(psutil.virtual_memory().total / 2**30, 1)
    return {"cpu": model, "cores": cores, "memory_gib": memory, "gpu": card, "versions": found}
