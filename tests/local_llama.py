"""A real OpenAI-compatible server on loopback: llama.cpp with the embedded model, for tests and benchmarks."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def serving(threads: int) -> Iterator[str]:
    """Serves the embedded GGUF on a free port of 127.0.0.1 and yields the base URL."""
    import xllamacpp

    from lib import models

    params = xllamacpp.CommonParams()
    params.model.path = str(models.embedded_gguf())
    params.n_ctx, params.n_parallel, params.hostnames = 16384, 8, ["127.0.0.1"]
    params.verbosity = 1  # errors only: it logs every call otherwise
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        params.port = free.getsockname()[1]
    server = xllamacpp.Server(params)
    yield f"{server.listening_address}/v1"
    del server
