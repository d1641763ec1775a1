"""A real HTTP server on loopback with the files and batches endpoints; it runs a batch by asking another server line by line.

The other server is llama.cpp, or `faulty_server` for faults that belong to one answer. Faults of a batch as a whole are attributes here.
"""

from __future__ import annotations

import email
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from loopback import LoopbackServer, QuietHandler


class BatchServer(LoopbackServer):
    """Keeps files and batches in memory.

    Attributes:
        files: content by id.
        batches: by id, as the API shows them.
        hold: batches wait for this event before they end.
        answer_only: lines that are run before the batch expires; None runs all.
        end_as: status of a batch that runs to its end, and `errors` its errors as a whole (then no line is run).
        queue: most lines that batches under way may have together, as a provider's limit of enqueued tokens; None is no limit.
        spoil: lines put among the results.
        faults: statuses to answer with, once each, by `METHOD /path`; 0 does what is asked and drops the connection without a reply.
        seen: every request, as `METHOD /path`.
        name: how the ids of batches begin.
    """

    base = "/v1"

    def __init__(self, upstream: str) -> None:
        super().__init__(Handler)
        self.upstream = upstream
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.hold = threading.Event()
        self.hold.set()
        self.hold_reply = threading.Event()
        self.hold_reply.set()
        self.answer_only: int | None = None
        self.end_as = "completed"
        self.errors: list[dict[str, Any]] = []
        self.queue: int | None = None
        self.spoil: list[bytes] = []
        self.faults: dict[str, list[int]] = {}
        self.seen: list[str] = []
        self.auth: set[str] = set()
        self.name = "batch"

    def keep(self, kind: str, content: bytes) -> str:
        name = f"{kind}-{len(self.files)}"
        self.files[name] = content
        return name

    def lines_of(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]

    def submit(self, request: dict[str, Any]) -> dict[str, Any]:
        name = f"{self.name}_{len(self.batches)}"
        batch = {"id": name, "object": "batch", "input_file_id": request["input_file_id"], "status": "validating", "errors": None}
        batch |= {"output_file_id": None, "error_file_id": None, "created_at": int(time.time())}
        found = self.problems(batch, request)
        under_way = sum(len(self.lines_of(b)) for b in self.batches.values() if b["status"] == "in_progress")
        if not found and self.queue is not None and under_way + len(self.lines_of(batch)) > self.queue:
            found = [{"code": "token_limit_exceeded", "message": "Enqueued token limit reached.", "line": None}]
        self.batches[name] = batch
        if found:
            return batch | self.ended(batch, "failed", errors={"object": "list", "data": found})
        batch["status"] = "in_progress"
        batch["request_counts"] = {"total": len(self.lines_of(batch)), "completed": 0, "failed": 0}
        threading.Thread(target=self.work, args=(batch,), daemon=True).start()
        return batch

    def problems(self, batch: dict[str, Any], request: dict[str, Any]) -> list[dict[str, Any]]:
        """Checks an input file as the API does."""
        lines = self.lines_of(batch)
        names = [line["custom_id"] for line in lines]
        wrong = len(set(names)) < len(names) or any(set(line) != {"custom_id", "method", "url", "body"} for line in lines)
        wrong |= any((line["method"], line["url"]) != ("POST", request["endpoint"]) for line in lines)
        wrong |= request["completion_window"] != "24h" or len({line["body"]["model"] for line in lines}) != 1
        return [{"code": "invalid_file", "message": "a line is wrong", "line": 1}] if wrong else self.errors

    def ended(self, batch: dict[str, Any], status: str, **more: Any) -> dict[str, Any]:
        batch |= {"status": status} | more
        return batch

    def work(self, batch: dict[str, Any]) -> None:
        good, bad = list(self.spoil), []
        for place, line in enumerate(self.lines_of(batch)):
            entry: dict[str, Any] = {"id": f"req_{place}", "custom_id": line["custom_id"], "response": None, "error": None}
            if self.answer_only is not None and place >= self.answer_only:
                entry["error"] = {"code": "batch_expired", "message": "This request could not be executed in time."}
            else:
                try:
                    status, body = self.forward(line["body"])
                    entry["response"] = {"status_code": status, "request_id": f"r{place}", "body": body}
                except (OSError, ValueError) as error:
                    entry["error"] = {"code": "server_error", "message": type(error).__name__}
            fine = entry["response"] is not None and entry["response"]["status_code"] == 200
            (good if fine else bad).append(json.dumps(entry).encode())
            batch["request_counts"]["completed" if fine else "failed"] += 1
        self.hold.wait()
        more = {}
        for kind, lines in (("output", good), ("error", bad)):
            if lines:  # not in the order of the requests
                more[f"{kind}_file_id"] = self.keep(kind, b"\n".join(lines[::-1]) + b"\n")
        self.ended(batch, "expired" if self.answer_only is not None else self.end_as, **more)

    def forward(self, body: Any) -> tuple[int, Any]:
        headers = {"Content-Type": "application/json", "Authorization": next(iter(self.auth), "")}
        request = urllib.request.Request(f"{self.upstream}/chat/completions", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                return reply.status, json.loads(reply.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())


class Handler(QuietHandler):
    server: BatchServer

    def do_GET(self) -> None:
        self.answer("GET")

    def do_POST(self) -> None:
        self.answer("POST")

    def answer(self, method: str) -> None:
        server = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, _, query = self.path.removeprefix("/v1").partition("?")
        server.seen.append(f"{method} {path}")
        server.auth.add(self.headers["Authorization"])
        faults = server.faults.get(f"{method} {path}")
        fault = faults.pop(0) if faults else None
        if fault:
            said = {"message": f"no: {self.headers['Authorization']}", "code": None}
            return self.reply(fault, {"error": said}, {"Retry-After": "0.05"})
        told = self.told(method, path, query, body)
        if fault == 0:
            self.close_connection = True
            return self.connection.close()
        if method == "POST" and path == "/batches":
            server.hold_reply.wait()
        if isinstance(told, tuple):
            return self.reply(*told)
        return self.reply(200, told) if told is not None else self.reply(404, {"error": {"message": "no such thing"}})

    def told(self, method: str, path: str, query: str, body: bytes) -> Any:
        server = self.server
        first, *rest = path.strip("/").split("/")
        if (method, path) == ("POST", "/files"):
            message = email.message_from_bytes(b"Content-Type: " + self.headers["Content-Type"].encode() + b"\r\n\r\n" + body)
            parts = {part.get_param("name", header="content-disposition"): part for part in message.get_payload()}
            assert parts["purpose"].get_payload() == "batch"
            assert parts["file"].get_filename().endswith(".jsonl")
            return {"id": server.keep("file", parts["file"].get_payload(decode=True)), "object": "file"}
        if first == "files" and rest[1:] == ["content"]:
            return server.files.get(rest[0])
        if (method, path) == ("POST", "/batches"):
            return server.submit(json.loads(body))
        if (method, path) == ("GET", "/batches"):
            newest = list(server.batches.values())[::-1]
            after = query.partition("after=")[2].partition("&")[0]
            place = next((n + 1 for n, batch in enumerate(newest) if batch["id"] == after), 0)
            return {"object": "list", "data": newest[place : place + 2], "has_more": place + 2 < len(newest)}
        if first == "batches":
            return server.batches.get(rest[0])
        return server.forward(json.loads(body)) if path == "/chat/completions" else None

    def reply(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving(upstream: str) -> Iterator[BatchServer]:
    """Serves within a `with` block."""
    server = BatchServer(upstream)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.hold.set()
        server.hold_reply.set()
        server.shutdown()
        server.server_close()
