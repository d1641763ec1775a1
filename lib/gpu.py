"""The NVIDIA cards of this machine, as the driver's own program tells of them: without torch, and without taking memory on any."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """One card that this process may use: its UUID, name, memory (bytes, in all and free) and compute capability."""

    uuid: str
    name: str
    memory: int
    free: int
    capability: tuple[int, int]


def cards() -> list[Card]:
    """Returns the cards that CUDA would show, in its order; none where nvidia-smi is absent or fails.

    CUDA_VISIBLE_DEVICES counts, with indices and UUIDs; as in CUDA, what follows an entry that names no card is left out.
    """
    program = shutil.which("nvidia-smi")
    if not program:
        return []
    asked = "uuid,name,memory.total,memory.free,compute_cap"
    try:
        done = subprocess.run(
            [program, f"--query-gpu={asked}", "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=60, check=True
        )
        found = [_read(line) for line in done.stdout.splitlines() if line.strip()]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    kept: list[Card] = []
    for word in (entry.strip() for entry in visible.split(",")):
        matching = [card for i, card in enumerate(found) if word == str(i) or (word.startswith("GPU-") and card.uuid.startswith(word))]
        if len(matching) != 1:
            break
        kept += matching
    return kept


def _read(line: str) -> Card:
    uuid, name, total, free, capability = (word.strip() for word in line.split(","))
    major, minor = capability.split(".")
    return Card(uuid, name, int(total) * 1024**2, int(free) * 1024**2, (int(major), int(minor)))
