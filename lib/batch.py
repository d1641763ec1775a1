"""The Batch API of OpenAI and those who copy it: the same calls at half the price, within a day.

What is on its way is written down beside the record of calls, in judgments.batches.json, before and after every step with the server:
a process that is killed at any moment goes on with the batches that it had, and no call is submitted, or paid for, twice. That file
holds what is needed to read a batch's results without the answers at hand: for each call its key, metric, repeat and rubric's hash
(the mark in a prompt is made from rubric, question and answer, so it needs no keeping). The request file, judgments.batch-*.jsonl,
stays beside it until the batch is merged.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from lib import batch_api, chat, files, journal
from lib.batch_api import FailedError, Server
from lib.chat import Endpoint, Outcome, Reply
from lib.files import StudyError
from lib.journal import Journal
from lib.limits import Limits, TokenBound
from lib.rubrics import Prompt

MAX_REQUESTS = 50_000
"""Requests that the API takes in one batch."""
MAX_BYTES = 200_000_000
"""Size that it takes of a request file."""

_ENDED = ("completed", "failed", "expired", "cancelled")
_MERGED = "merged"
_FIRST_PAUSE, _LONGEST_PAUSE, _GROWTH = 1.0, 60.0, 1.5  # seconds between looks at a batch
_PATIENCE = 20


@dataclass(frozen=True)
class Request:
    """One call to submit: what its line of judgments.jsonl will hold, and its prompt, rendered when its turn comes."""

    key: str
    metric: str
    repeat: int
    rubric_sha256: str
    prompt: Callable[[], Prompt]


@dataclass
class Batch:
    """A batch as judgments.batches.json has it.

    Attributes:
        judge: as the column `judge` has it.
        base_url: the server, without any credentials that its address holds.
        mode: how replies are scored, `text` or `logprobs`.
        file: name of the request file, beside judgments.jsonl.
        sha256: of that file.
        bound: prompt and reply tokens that it has at most.
        rubrics: the rubric's hash of each metric.
        calls: for each key its metric, its repeat, and the characters of the answer that the judge does not see; emptied by merging.
        input_file_id: of the uploaded request file; null until then.
        id: of the batch; null until it is submitted.
        status: `written`, `uploaded`, `submitted`, at last `merged`.
        ended: how the server says it ended.
        counts: statuses of its calls, once merged.
    """

    judge: str
    base_url: str
    mode: str
    file: str
    sha256: str
    bound: list[int]
    rubrics: dict[str, str]
    calls: dict[str, list[Any]]
    input_file_id: str | None = None
    id: str | None = None
    status: str = "written"
    ended: str | None = None
    counts: dict[str, int] = field(default_factory=dict)


class _StoppedError(Exception):
    """Why judging stops early."""


def book_of(log: Path) -> Path:
    """Returns where the batches of a judgments.jsonl are written down."""
    return log.with_name(f"{log.stem}.batches.json")


def read(log: Path) -> list[Batch]:
    """Reads the batches of a judgments.jsonl; none where there is no such file.

    Raises:
        StudyError: the file is harmed.
    """
    book = book_of(log)
    try:
        return [Batch(**entry) for entry in files.read_json(book)] if book.exists() else []
    except (TypeError, AttributeError, StudyError) as error:
        raise StudyError(
            f"{files.shown(book)}: is no list of batches; restore it, or delete it to ask again what was submitted, and pay again."
        ) from error


def refuse_open(log: Path, keys: Iterable[str], fetched: Sequence[Batch] = ()) -> None:
    """Keeps calls that are on their way in a batch from being made, and paid for, a second time.

    Raises:
        StudyError: some of the calls with these keys are in a batch that is not in `fetched`.
    """
    asked = set(keys)
    known = {entry.sha256 for entry in fetched}
    for entry in read(log):
        waiting = len(asked & entry.calls.keys())
        if waiting and entry.input_file_id and entry.sha256 not in known:
            where = f"batch {entry.id or entry.input_file_id} at {entry.base_url}"
            raise StudyError(
                f"{files.shown(book_of(log))}: {waiting:,} of these calls are in {where}; fetch them with "
                "judge_batch: true (study judge --batch) and that address, or delete the file to ask, and pay, again."
            )


def ask_all(endpoint: Endpoint, requests: Sequence[Request], limits: Limits, log: Journal, *, name: str, progress: bool) -> Outcome:
    """Makes calls in batches and records every one; fetches first what an earlier process submitted.

    Calls go out in order, as many at once as the API and `max_cost` allow: the cost of a batch is bounded from above before it is
    submitted, at half the price of single calls, and what it turns out to cost lets more go out after it. Where a provider takes no
    more tokens at once, smaller batches follow each other. Limits by the minute do not apply. A call that a batch did not answer
    (failed, expired, cancelled) has the status error.

    Args:
        endpoint: the server; in logprobs mode one single call finds out whether it gives them, and if not all are scored by text.
        requests: calls to make.
        limits: price, max_cost and spent count.
        log: takes the replies; its path says where the batches are written down.
        name: of the judge.
        progress: draw a progress bar and say what is submitted.

    Returns:
        Why it stopped early, if it did, and what the calls merged by this process cost.

    Raises:
        StudyError: a call is in a batch at another server, or a file cannot be written.
    """
    with batch_api.opened(endpoint) as server:
        course = _Course(server, requests, limits, log, name, progress)
        stopped = ""
        try:
            course.run()
        except _StoppedError as error:
            stopped = str(error)
    return Outcome(stopped, course.cost if limits.price else None)


class _Course:
    """One process's way through its batches."""

    def __init__(self, server: Server, requests: Sequence[Request], limits: Limits, log: Journal, name: str, progress: bool) -> None:
        self.cost = 0.0
        self._server, self._endpoint = server, server.endpoint
        self._log, self._name, self._progress = log, name, progress
        self._price = limits.price.in_batch if limits.price else None
        self._most = limits.max_cost if limits.price else None
        self._spent = limits.spent
        self._bound = TokenBound()
        self._largest, self._in_turn = MAX_REQUESTS, False
        self._mode = ""
        self._book = read(log.path)
        parts = urlsplit(self._endpoint.base_url)
        self._url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
        self._open = [b for b in self._book if b.status != _MERGED and (b.judge, b.base_url) == (name, self._url)]
        for batch in [batch for batch in self._open if batch.input_file_id is None]:  # the server never heard of it
            self._forget(batch)
        refuse_open(log.path, (request.key for request in requests), self._open)
        self._requests = {request.key: request for request in requests}
        submitted = {key for batch in self._open for key in batch.calls}
        self._waiting = deque(request for request in requests if request.key not in submitted)
        self._done = 0
        total = len(submitted) + len(self._waiting)
        self._bar = tqdm(total=total, unit="call", desc=name, disable=not progress)

    def run(self) -> None:
        """Goes on until every call is recorded.

        Raises:
            _StoppedError: it cannot.
        """
        with self._bar:
            for batch in list(self._open):
                self._submit(batch)
            while True:
                while part := self._part():
                    self._submit(self._written(part))
                if not self._open:
                    break
                self._wait()
        if self._waiting:
            spent = self._spent + self.cost
            raise _StoppedError(f"another batch might pass the limit of ${self._most:g} (${spent:.4f} spent); raise judge_max_cost.")

    def _part(self) -> list[tuple[Request, Prompt, bytes, list[int]]]:
        """Takes the calls of the next batch from those that wait, with their lines and the most tokens that they may have."""
        if not self._waiting or (self._in_turn and self._open):
            return []
        self._mode = self._mode or chat.settled_mode(self._endpoint, self._name)
        part: list[tuple[Request, Prompt, bytes, list[int]]] = []
        size, cost = 0, self._spent + self.cost + sum(self._dollars(batch.bound) for batch in self._open)
        limit = self._endpoint.token_limit(self._mode)
        while self._waiting and len(part) < self._largest:
            request = self._waiting[0]
            prompt = request.prompt()
            body = self._endpoint.body(prompt.messages, self._mode, request.repeat, limit)
            line = json.dumps({"custom_id": request.key, "method": "POST", "url": batch_api.URL, "body": body}, ensure_ascii=False)
            data = line.encode("utf-8", "replace") + b"\n"
            tokens = [self._bound.of(prompt.messages), limit]
            size, cost = size + len(data), cost + self._dollars(tokens)
            if (part and size > MAX_BYTES) or (self._most is not None and cost > self._most):
                break
            part.append((self._waiting.popleft(), prompt, data, tokens))
        return part

    def _dollars(self, tokens: Sequence[int]) -> float:
        return self._price.of(tokens[0], tokens[1]) if self._price else 0.0

    def _written(self, part: Sequence[tuple[Request, Prompt, bytes, list[int]]]) -> Batch:
        """Writes the request file of a batch, then the batch itself into the book."""
        content = b"".join(data for _, _, data, _ in part)
        sha256 = hashlib.sha256(content).hexdigest()
        path = self._log.path.with_name(f"{self._log.path.stem}.batch-{sha256[:12]}.jsonl")
        files.write_bytes(path, content)
        batch = Batch(
            judge=self._name,
            base_url=self._url,
            mode=self._mode,
            file=path.name,
            sha256=sha256,
            bound=[sum(tokens[place] for *_, tokens in part) for place in (0, 1)],
            rubrics={request.metric: request.rubric_sha256 for request, *_ in part},
            calls={request.key: [request.metric, request.repeat, prompt.left_out] for request, prompt, *_ in part},
        )
        self._book.append(batch)
        self._open.append(batch)
        self._save()
        return batch

    def _save(self) -> None:
        lines = ",\n".join(json.dumps(asdict(batch), ensure_ascii=False) for batch in self._book)
        files.write_text(book_of(self._log.path), f"[\n{lines}\n]\n")

    def _submit(self, batch: Batch) -> None:
        """Brings a batch to where the server works on it, from wherever an earlier process left it."""
        if batch.id:
            self._say(f"going on with batch {batch.id} ({len(batch.calls):,} calls)")
            return
        batch.id = self._found(batch) if batch.input_file_id else None
        try:
            if batch.input_file_id is None:
                batch.input_file_id = self._server.upload(self._log.path.with_name(batch.file))
                batch.status = "uploaded"
                self._save()
            batch.id = batch.id or self._created(batch)
        except FailedError as error:
            if error.refused or batch.input_file_id is None:  # the server has nothing of it: its calls are asked for again next time
                self._forget(batch)
            raise _StoppedError(f"{self._endpoint.host} did not take a batch ({error}).") from error
        batch.status = "submitted"
        self._save()
        self._say(f"batch {batch.id}: {len(batch.calls):,} calls submitted; after an interrupt the same command goes on from here")

    def _created(self, batch: Batch) -> str:
        """Submits an uploaded batch; where no answer came, the server's list says whether it has it."""
        for attempt in range(self._endpoint.max_retries + 1):
            try:
                return self._server.create(batch.input_file_id or "")
            except FailedError as error:
                failed = error
                if error.refused:
                    break
            time.sleep(min(_FIRST_PAUSE * _GROWTH**attempt, _LONGEST_PAUSE))
            if found := self._found(batch):
                return found
        raise failed

    def _found(self, batch: Batch) -> str | None:
        """Returns the id of a batch that the server may have without our knowing."""
        try:
            return self._server.find(batch.input_file_id or "")
        except FailedError as error:
            if error.status in {404, 405, 501}:  # it keeps no list
                return None
            raise _StoppedError(f"{self._endpoint.host} does not say whether it has a batch ({error}).") from error

    def _wait(self) -> None:
        """Looks at the open batches, at growing intervals, until one has ended and is merged."""
        pause, in_a_row, waiting = _FIRST_PAUSE, 0, len(self._open)
        while True:
            under_way, failed = 0, False
            for batch in list(self._open):
                try:
                    told = self._server.look(batch.id or "")
                    if told.get("status") in _ENDED:
                        self._merge(batch, told)
                    under_way += batch_api.answered(told) if batch in self._open else 0
                except FailedError as error:
                    failed = True
                    if error.refused or in_a_row >= _PATIENCE:
                        where = files.shown(book_of(self._log.path))
                        raise _StoppedError(
                            f"batch {batch.id} cannot be fetched ({error}); if the server has lost it, delete {where} to ask again."
                        ) from error
            self._bar.n = self._done + under_way
            self._bar.set_postfix({"batches": len(self._open)} | ({"cost": f"${self.cost:.4f}"} if self._price else {}))
            if len(self._open) < waiting:
                return
            in_a_row = in_a_row + 1 if failed else 0
            time.sleep(pause)
            pause = min(pause * _GROWTH, _LONGEST_PAUSE)

    def _merge(self, batch: Batch, told: dict[str, Any]) -> None:
        """Records how every call of a batch that has ended came out.

        Raises:
            FailedError: its results could not be fetched; nothing is recorded.
            _StoppedError: the batch failed as a whole, after it is recorded.
        """
        why = batch_api.reason(told, self._endpoint.key)
        if told["status"] == "failed" and why.startswith("token_limit_exceeded") and self._put_back(batch):
            return
        found: dict[str, Reply] = {}
        strange = 0
        for line in [*self._server.lines(told.get("output_file_id")), *self._server.lines(told.get("error_file_id"))]:
            key, reply = batch_api.read_line(line, batch.mode, self._endpoint.key)
            if key not in batch.calls:
                strange += 1
            elif key not in found or found[key].status == "error":
                found[key] = reply
        lost = Reply("error", f"batch {told['status']} without an answer to this call{': ' if why else ''}{why}", batch.mode)
        replies = {key: found.get(key, lost) for key in batch.calls}
        self._record(batch, replies)
        batch.counts = dict(Counter(reply.status for reply in replies.values()))
        self._done += len(replies)
        batch.ended = told["status"]
        self._forget(batch)
        if strange:
            self._say(f"batch {batch.id}: {strange:,} lines of its results are no answer to a call of ours and were left out", always=True)
        if batch.ended != "completed":
            self._say(f"batch {batch.id} {batch.ended}; what it did not answer is in error and asked again next time", always=True)
        if batch.ended == "failed":
            raise _StoppedError(f"batch {batch.id} failed ({why or 'no reason given'}).")

    def _record(self, batch: Batch, replies: dict[str, Reply]) -> None:
        """Writes a batch's lines into the journal, but for those that a process wrote that was killed before it had marked the batch."""

        def lines() -> Iterator[dict[str, Any]]:
            for key, reply in replies.items():
                metric, repeat, left_out = batch.calls[key]
                usage = reply.usage | {"batch": batch.id} | ({"answer_chars_left_out": left_out} if left_out else {})
                before = (self._log.records.get(key) or {}).get("usage") or {}
                used = [reply.usage.get(name) or 0 for name in ("prompt_tokens", "completion_tokens")]
                if before.get("batch") != batch.id:
                    self.cost += self._dollars(used)
                    yield journal.line(key, self._name, metric, repeat, batch.rubrics[metric], **(reply.told | {"usage": usage}))
                if used[0] and key in self._requests:
                    self._bound.learn(self._requests[key].prompt().messages, used[0])

        self._log.write(lines())
        self._log.sync()

    def _put_back(self, batch: Batch) -> bool:
        """Takes back the calls of a batch that was too much for the provider's queue; says whether there is a smaller way."""
        own = [self._requests[key] for key in batch.calls if key in self._requests]
        if len(own) < len(batch.calls) or (len(self._open) == 1 and len(own) == 1):
            return False
        if len(self._open) == 1:
            self._largest = len(own) // 2
        self._in_turn = True
        self._waiting.extendleft(reversed(own))
        batch.ended = "failed"
        self._forget(batch)
        return True

    def _forget(self, batch: Batch) -> None:
        """Marks a batch as done with and removes its request file."""
        batch.status, batch.calls = _MERGED, {}
        self._open.remove(batch)
        self._save()
        with contextlib.suppress(OSError):
            self._log.path.with_name(batch.file).unlink()

    def _say(self, text: str, always: bool = False) -> None:
        if self._progress or always:
            tqdm.write(f"{self._name}: {text}.", file=sys.stderr)
