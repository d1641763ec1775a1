"""A real HTTP server on loopback that speaks enough of the OpenAI protocol to answer well, slowly, or in every wrong way.

What it does is decided by text in the prompt, so that a fault belongs to an answer and not to the order of arrival. Run as a
script it serves on a port, appends a line to a file for every call that it answers well, and lives as long as its parent.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loopback import LoopbackServer, QuietHandler

SCORE = "73"


def completion(content: Any = SCORE, **more: Any) -> dict[str, Any]:
    """Returns a well-formed reply, or one spoilt by `more`."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop", "logprobs": None}
    usage = {"prompt_tokens": 100, "completion_tokens": 2, "total_tokens": 102}
    head = {"id": "x", "object": "chat.completion", "created": 1, "model": "judge-2026-01-01", "system_fingerprint": "fp_1"}
    return head | {"choices": [choice], "usage": usage} | more


class FaultyServer(LoopbackServer):
    """Counts what it is asked; `seen` holds each request's body, `faults` what it did for a fault named in a prompt."""

    base = "/v1"
    request_queue_size = 256

    def __init__(self, port: int = 0, delay: float = 0.0, log: Path | None = None, well: Any = None) -> None:
        super().__init__(Handler, port)
        self.delay = delay
        self.log = log
        self.well = well or completion()
        self.seen: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.faults: Counter[str] = Counter()
        self.turns: Counter[tuple[str, str]] = Counter()
        self.times: list[float] = []
        self.in_flight = self.most_in_flight = 0
        self.mutex = threading.Lock()


class Handler(QuietHandler):
    server: FaultyServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        server = self.server
        with server.mutex:
            server.seen.append(body)
            server.keys.append(self.headers.get("Authorization", ""))
            server.times.append(time.monotonic())
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
        try:
            if server.delay:
                time.sleep(server.delay)
            fault = next((name for name in FAULTS if f"FAULT {name};" in prompt), None)
            if fault is None:
                self.reply(200, server.well(prompt) if callable(server.well) else server.well)
                if server.log:
                    with server.mutex, server.log.open("a") as stream:
                        stream.write(json.dumps(prompt) + "\n")
            else:
                with server.mutex:
                    server.faults[fault] += 1
                    server.turns[fault, prompt] += 1
                    turn = server.turns[fault, prompt]
                FAULTS[fault](self, turn)
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with server.mutex:
                server.in_flight -= 1

    def reply(self, status: int, content: Any, headers: dict[str, str] | None = None, *, length: int | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data) if length is None else length))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
        if length is not None:
            self.close_connection = True


def _first_then_well(status: int, headers: dict[str, str] | None = None) -> Any:
    """Fails once with a status and answers well when asked again."""

    def act(handler: Handler, turn: int) -> None:
        if turn % 2:
            handler.reply(status, {"error": {"message": "not now"}}, headers)
        else:
            handler.reply(200, completion())

    return act


def _echo(handler: Handler, _: int) -> None:
    handler.reply(400, {"error": {"message": f"bad header {handler.headers['Authorization']}", "code": None}})


def _echo_in_reply(handler: Handler, _: int) -> None:
    handler.reply(200, completion(handler.headers["Authorization"], model=handler.headers["Authorization"]))


def _slow(handler: Handler, _: int) -> None:
    time.sleep(3)
    handler.reply(200, completion())


def _drop(handler: Handler, _: int) -> None:
    handler.close_connection = True
    handler.connection.close()


def _fixed(content: Any, status: int = 200, headers: dict[str, str] | None = None, length: int | None = None) -> Any:
    return lambda handler, _: handler.reply(status, content, headers, length=length)


_WHOLE = json.dumps(completion()).encode()

FAULTS: dict[str, Any] = {
    "429 once": _first_then_well(429, {"Retry-After": "0.3"}),
    "500 once": _first_then_well(500),
    "429 always": _fixed({"error": {"message": "slow down"}}, 429, {"Retry-After": "0.05"}),
    "500 always": _fixed({"error": {"message": "boom"}}, 500, {"Retry-After": "0.05"}),
    "timeout": _slow,
    "dropped": _drop,
    "not json": _fixed(b"<html>proxy says no</html>"),
    "half json": _fixed(_WHOLE[: len(_WHOLE) // 2]),
    "truncated body": _fixed(_WHOLE[:40], length=len(_WHOLE)),
    "no choices": _fixed(completion(choices=[])),
    "null choices": _fixed(completion(choices=None)),
    "choices text": _fixed(completion(choices="73")),
    "list": _fixed([1, 2]),
    "null": _fixed(None),
    "number content": _fixed(completion(73)),
    "null content": _fixed(completion(None)),
    "text usage": _fixed(completion(usage={"prompt_tokens": "many", "completion_tokens": -1})),
    "usage text": _fixed(completion(usage="lots")),
    "prose": _fixed(completion("I would give it 100")),
    "out of range": _fixed(completion("101")),
    "noise": lambda handler, turn: handler.reply(200, completion(("80", "70", "60")[(turn - 1) % 3])),
    "refusal": _fixed(completion("REFUSAL")),
    "code": _fixed(completion("CODE")),
    "cut": _fixed(completion("7", choices=[{"message": {"content": "7"}, "finish_reason": "length"}])),
    "surrogate": _fixed(json.dumps(completion("\ud800")).encode()),
    "filtered": _fixed({"error": {"message": "filtered", "code": "content_filter"}}, 400),
    "too long": _fixed({"error": {"message": "context length exceeded"}}, 400),
    "redirect": lambda handler, _: handler.reply(307, {}, {"Location": handler.server.url + "/elsewhere"}),
    "echo": _echo,
    "echo in reply": _echo_in_reply,
}
"""What the server does for a prompt that holds `FAULT <name>;`."""


@contextmanager
def serving(**options: Any) -> Iterator[FaultyServer]:
    """Serves within a `with` block."""
    server = FaultyServer(**options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    with serving(port=0, delay=float(sys.argv[1]), log=Path(sys.argv[2])) as lasting:
        print(lasting.url, flush=True)
        sys.stdin.read()
