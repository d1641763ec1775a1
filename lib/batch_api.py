"""The endpoints of the Batch API, for files and for batches, and what stands in a batch's result files.

Whatever a server does becomes a value or a `FailedError` whose words hold no key; see `lib.batch` for what is done about it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lib import chat
from lib.chat import Endpoint, Reply

URL = "/v1/chat/completions"
"""What every line of a request file asks for."""

_PAGES = 20
_IDENTIFIER = re.compile(r"[\w.:\-]{1,200}")


class FailedError(Exception):
    """A request that got no answer, with the status that the server gave it, if it gave one."""

    def __init__(self, said: str, status: int | None = None) -> None:
        super().__init__(said)
        self.status = status

    @property
    def refused(self) -> bool:
        """The server understood and would not do it; asking again is pointless, and it has done nothing."""
        return self.status is not None and 400 <= self.status < 500 and self.status not in {408, 409, 429}


@contextmanager
def opened(endpoint: Endpoint) -> Iterator[Server]:
    """Opens a session with an endpoint."""
    import openai

    chat.hush_client()
    # A redirect would send answers to a host that was not announced.
    http = openai.DefaultHttpxClient(follow_redirects=False, timeout=endpoint.timeout)
    client = openai.OpenAI(
        api_key=endpoint.key, base_url=endpoint.base_url, timeout=endpoint.timeout, max_retries=endpoint.max_retries, http_client=http
    )
    with client:
        yield Server(client, endpoint)


class Server:
    """The endpoints for files and batches; every failure is a `FailedError` whose words hold no key."""

    def __init__(self, client: Any, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._client = client

    def upload(self, path: Path) -> str:
        """Uploads a request file and returns its id."""
        with path.open("rb") as stream:
            told = self._json(self._client.files.with_raw_response.create, file=(path.name, stream), purpose="batch")
        return self._identifier(told)

    def create(self, input_file_id: str) -> str:
        """Submits a batch and returns its id. Not tried again here: after a timeout the server may have it all the same."""
        send = self._client.with_options(max_retries=0).batches.with_raw_response.create
        return self._identifier(self._json(send, input_file_id=input_file_id, endpoint=URL, completion_window="24h"))

    def find(self, input_file_id: str) -> str | None:
        """Returns the id of the batch that was made from an uploaded file, or None."""
        after: dict[str, Any] = {}
        for _ in range(_PAGES):
            page = self._json(self._client.batches.with_raw_response.list, limit=100, **after)
            data = page.get("data")
            found = data if isinstance(data, list) else []
            for entry in found:
                if isinstance(entry, dict) and entry.get("input_file_id") == input_file_id:
                    return self._identifier(entry)
            if not found or not page.get("has_more"):
                break
            after = {"after": self._identifier(found[-1])}
        return None

    def look(self, batch_id: str) -> dict[str, Any]:
        """Returns how a batch stands."""
        return self._json(self._client.batches.with_raw_response.retrieve, batch_id)

    def lines(self, file_id: Any) -> list[bytes]:
        """Returns the lines of a result file; none if there is no such file."""
        if file_id is None:
            return []
        raw = self._sent(self._client.files.with_raw_response.content, self._identifier({"id": file_id}))
        return [line for line in raw.split(b"\n") if line.strip()]

    def _json(self, send: Callable[..., Any], *given: Any, **named: Any) -> dict[str, Any]:
        try:
            told = json.loads(self._sent(send, *given, **named))
        except (ValueError, RecursionError):
            told = None
        if not isinstance(told, dict):
            raise FailedError("its reply is no JSON object")
        return told

    def _sent(self, send: Callable[..., Any], *given: Any, **named: Any) -> bytes:
        try:
            content: bytes = send(*given, **named).http_response.content
            return content
        except chat.refused() as error:
            said = chat.refusal(type(error).__name__, str(error), "", self.endpoint.key).raw[:300]
            raise FailedError(said, getattr(error, "status_code", None)) from error

    def _identifier(self, told: Any) -> str:
        value = told.get("id") if isinstance(told, dict) else None
        if not isinstance(value, str) or not _IDENTIFIER.fullmatch(value) or chat.redact(value, self.endpoint.key) != value:
            raise FailedError("its reply holds no id")
        return value


def answered(told: dict[str, Any]) -> int:
    """Returns how many calls a batch has answered so far, by the server's count."""
    counts = told.get("request_counts")
    values = [counts.get(name) for name in ("completed", "failed")] if isinstance(counts, dict) else []
    return sum(value for value in values if isinstance(value, int) and value > 0)


def reason(told: dict[str, Any], key: str) -> str:
    """Returns the first of the errors that a batch as a whole has, as `code: message`, or ""."""
    errors = told.get("errors")
    listed = errors.get("data") if isinstance(errors, dict) else None
    first = listed[0] if isinstance(listed, list) and listed else None
    return _error(first, key) if isinstance(first, dict) else ""


def _error(error: dict[str, Any], key: str) -> str:
    said = ": ".join(str(error[name]) for name in ("code", "message") if error.get(name) is not None)
    return " ".join(chat.redact(said, key).split())[:300]


def read_line(line: bytes, mode: str, key: str) -> tuple[str, Reply]:
    """Reads a line of an output or error file: the call's key, "" where there is none, and how the call ended."""
    try:
        entry = json.loads(line)
        name, response, error = entry["custom_id"], entry.get("response"), entry.get("error")
    except chat.malformed():
        return "", Reply("error", "no JSON", mode)
    status = response.get("status_code") if isinstance(response, dict) else None
    body = response.get("body") if isinstance(response, dict) else None
    if status == 200:
        return str(name), chat.read_reply(body, mode, key)
    if isinstance(body, dict) and isinstance(body.get("error"), dict):
        error = body["error"]
    told = error if isinstance(error, dict) else {}
    kind = f"status {status}" if isinstance(status, int) else "not answered"
    return str(name), chat.refusal(kind, _error(told, key), mode, key, status if isinstance(status, int) else None, told.get("code"))
