"""A real HTTP server on loopback that speaks as much of the Hugging Face Hub as an upload uses, and keeps what it is sent."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from loopback import LoopbackServer, QuietHandler

TOKEN = "hf_loopbackloopbackloopbackloopback00"


class Hub(LoopbackServer):
    """`repos` holds visibility, gate and files by repository; `seen` every request as method, path and body; `stored` LFS objects."""

    def __init__(self) -> None:
        super().__init__(Handler)
        self.repos: dict[str, dict[str, Any]] = {}
        self.seen: list[tuple[str, str, Any]] = []
        self.stored: dict[str, bytes] = {}
        self.deaf_to_gates = False


class Handler(QuietHandler):
    server: Hub

    def answer(self, status: int, content: Any = None) -> None:
        body = json.dumps(content if content is not None else {}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def read(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        whole = b""
        while size := int(self.rfile.readline(), 16):
            whole += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return whole

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.seen.append(("GET", path, None))
        name = path.removeprefix("/api/models/")
        repo = self.server.repos.get(name)
        if repo is None:
            self.answer(404, {"error": "Repository not found"})
        else:
            self.answer(
                200, {"id": name, "modelId": name, "private": repo["private"], "gated": repo["gated"], "sha": "0" * 40, "siblings": []}
            )

    def do_PUT(self) -> None:
        content, path = self.read(), self.path.partition("?")[0]
        if path.startswith("/stored/"):
            self.server.seen.append(("PUT", path, len(content)))
            self.server.stored[path.removeprefix("/stored/")] = content
            self.answer(200)
            return
        body = json.loads(content)
        self.server.seen.append(("PUT", path, body))
        repo = self.server.repos[path.removeprefix("/api/models/").removesuffix("/settings")]
        if "gated" in body and not self.server.deaf_to_gates:
            repo["gated"] = body["gated"]
        if "visibility" in body:
            repo["private"] = body["visibility"] == "private"
        self.answer(200)

    def do_POST(self) -> None:
        content, path = self.read(), self.path.partition("?")[0]
        lines = [json.loads(line) for line in content.splitlines() if line.strip()]
        self.server.seen.append(("POST", path, lines))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid credentials in Authorization header"})
        elif path == "/api/repos/create":
            self._create(lines[0])
        elif path == "/api/validate-yaml":
            self.answer(200, {"warnings": [], "errors": []})
        elif "/preupload/" in path:
            modes = [{"path": f["path"], "uploadMode": _mode(f["path"]), "shouldIgnore": False, "oid": None} for f in lines[0]["files"]]
            self.answer(200, {"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{self.server.url}/stored/{o['oid']}"}}}
                for o in lines[0]["objects"]
            ]
            self.answer(200, {"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            self._commit(path.removeprefix("/api/models/").partition("/commit/")[0], lines)
        else:
            self.answer(404, {"error": f"no {path} here"})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.server.repos:
            self.answer(409, {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"})
            return
        self.server.repos[name] = {"private": asked.get("visibility") == "private", "gated": False, "files": {}}
        self.answer(200, {"url": f"{self.server.url}/{name}"})

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        repo = self.server.repos[name]
        repo["when_committed"] = {"private": repo["private"], "gated": repo["gated"]}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repo["files"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                stored = self.server.stored[value["oid"]]
                assert hashlib.sha256(stored).hexdigest() == value["oid"]
                repo["files"][value["path"]] = stored
        self.answer(200, {"commitUrl": f"{self.server.url}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40})


def _mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"


@contextmanager
def serving() -> Iterator[Hub]:
    """Serves within a `with` block."""
    hub = Hub()
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
