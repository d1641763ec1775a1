"""One training in several processes (data parallel), as `accelerate launch -m lib.qlora` and torchrun start them.

A launcher tells each process its place by RANK, LOCAL_RANK and WORLD_SIZE. Without it there is one process, and everything here is nothing.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

from lib import files
from lib.config import Parameters
from lib.files import StudyError


def processes() -> int:
    """Returns how many processes train together."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_first() -> bool:
    """Says whether this is the process that writes the run's files."""
    return int(os.environ.get("RANK") or 0) == 0


def local_rank() -> int | None:
    """Returns which of this machine's GPUs is this process's; None where it is alone."""
    return int(os.environ.get("LOCAL_RANK") or 0) if processes() > 1 else None


def split(parameters: Parameters, count: int) -> tuple[int, int]:
    """Returns rows a forward pass and forward passes a step, for each of `count` processes, so that a step sees the same rows in all.

    Raises:
        StudyError: the rows of a step do not divide by the number of processes.
    """
    p = parameters
    group = p.batch_size * p.gradient_accumulation_steps
    if group % count:
        raise StudyError(
            f"batch_size: a step sees {p.batch_size} × {p.gradient_accumulation_steps} = {group} rows, which {count} processes cannot "
            "share; use a number of processes that divides it."
        )
    each = group // count
    batch = math.gcd(each, p.batch_size)  # never more rows at once than fit one process alone
    return batch, each // batch


def join(cpu: bool) -> None:
    """Lets the processes find each other (gloo on the CPU, NCCL on GPUs)."""
    if processes() > 1:
        from accelerate import PartialState

        PartialState(cpu=True, backend="gloo") if cpu else PartialState()


def wait() -> None:
    """Waits until all processes are here."""
    if processes() > 1:
        import torch.distributed

        torch.distributed.barrier()


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Holds a lock for all processes: the first holds it, the others wait for it to have it."""
    with files.lock(path, what=what) if is_first() else contextlib.nullcontext():
        wait()
        yield
        wait()
