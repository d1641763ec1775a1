"""One OpenAI-compatible server as a judge: every call becomes a status, and nothing that a server does becomes an exception.

OpenAI, Azure's v1 endpoint, vLLM and llama.cpp speak the same protocol. Retries, back-off and Retry-After are the official
client's own.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import ipaddress
import json
import logging
import re
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from tqdm import tqdm

from lib import scoring
from lib.files import StudyError
from lib.limits import Budget, Limits, Pace, TokenBound
from lib.rubrics import Prompt

if TYPE_CHECKING:
    from openai import AsyncOpenAI

OPENAI_URL = "https://api.openai.com/v1"
_OPENAI_HOSTS = ("api.openai.com", ".openai.azure.com")
TOP_LOGPROBS = 20
"""Alternatives asked for at each reply token in logprobs mode; 20 is OpenAI's limit and the paper's number."""

_RAW_CHARS = 2_000
_T = TypeVar("_T")
# Looks like a credential, also where a server masks the middle of the key that it was given.
_CREDENTIAL = re.compile(r"\bsk-[\w\-*•.]{4,}|(?i:\bbearer\s+)[\w\-.~+/*]{4,}=*")


@dataclass(frozen=True)
class Endpoint:
    """Where a judge is and how it is asked.

    Attributes:
        model: the name the server knows.
        base_url: the server's `/v1` address.
        key: sent as the bearer token; shown nowhere.
        mode: `text` or `logprobs`.
        temperature: of the judge's sampling.
        max_tokens: reply tokens a call.
        timeout: seconds an attempt may take.
        max_retries: attempts after the first, on 408, 409, 429, 5xx and connection errors.
    """

    model: str
    base_url: str
    key: str = field(repr=False)
    mode: str
    temperature: float
    max_tokens: int
    timeout: float
    max_retries: int

    @property
    def host(self) -> str:
        """The server's name, without any credentials that its address holds."""
        return urlsplit(self.base_url).hostname or self.base_url

    def token_limit(self, mode: str) -> int:
        """Reply tokens a call; one may be enough for log-probabilities, but would cut a number in text."""
        return self.max_tokens if mode == self.mode else scoring.MIN_TEXT_TOKENS

    def body(self, messages: list[dict[str, str]], mode: str, seed: int, max_tokens: int) -> dict[str, Any]:
        """Returns the body of a chat completion request, as it is sent by itself and as a line of a batch."""
        request: dict[str, Any] = {"model": self.model, "messages": messages, "temperature": self.temperature, "seed": seed}
        # OpenAI's newer models refuse the old name of the limit; other servers may not know the new one, and would ramble.
        request["max_completion_tokens" if self.host.endswith(_OPENAI_HOSTS) else "max_tokens"] = max_tokens
        return request | ({"logprobs": True, "top_logprobs": TOP_LOGPROBS} if mode == "logprobs" else {})


@dataclass(frozen=True)
class Reply:
    """How one call ended; the fields are those of judgments.jsonl.

    Attributes:
        status: one of `scoring.STATUSES`.
        score: points (0 to 100) if status is ok.
        raw: the reply's text, or the error's.
        logprobs: the likeliest first tokens with their log-probabilities, in logprobs mode.
        usage: prompt_tokens, completion_tokens, model, system_fingerprint (as the server returned them) and retries.
        mode: how the reply was scored.
        http_status: of a refused request.
    """

    status: str
    raw: str
    mode: str
    score: float | None = None
    logprobs: list[tuple[str, float]] | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    http_status: int | None = None

    @property
    def told(self) -> dict[str, Any]:
        """What a line of judgments.jsonl holds of it."""
        return {name: getattr(self, name) for name in ("status", "score", "raw", "logprobs", "usage", "mode")}


def is_loopback(base_url: str) -> bool:
    """Says whether an address is this machine, so that what is sent there leaves it not."""
    host = urlsplit(base_url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def checked_url(base_url: str) -> str:
    """Returns an address that can be called.

    Raises:
        StudyError: it is no http or https address.
    """
    parts = urlsplit(base_url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise StudyError(f"judge_base_url: {base_url!r} is no address; it looks like http://127.0.0.1:8080/v1.")
    return base_url


def redact(text: str, key: str) -> str:
    """Returns a server's words without the key or anything that looks like one."""
    return _CREDENTIAL.sub("[key]", text.replace(key, "[key]") if len(key) > 5 else text)


class Chat:
    """A session with an endpoint; use `session` to open one."""

    def __init__(self, endpoint: Endpoint, client: AsyncOpenAI) -> None:
        self.endpoint = endpoint
        self.mode = endpoint.mode
        self._client = client

    async def settle_mode(self) -> str:
        """Finds out by one call whether the server can be scored by log-probabilities; if not, the session falls back to text.

        Returns:
            Why the session fell back, or "" where it did not have to.
        """
        if self.mode == "text":
            return ""
        messages = [{"role": "user", "content": "Write the number 85 and nothing else."}]
        try:
            reply = await self._create(messages, seed=0, max_tokens=scoring.MIN_TEXT_TOKENS)
            positions = [scoring.top_tokens(entry["top_logprobs"]) for entry in _choice(reply)["logprobs"]["content"]]
        except malformed():
            positions = []
        except refused() as error:
            if getattr(error, "status_code", None) not in {400, 404, 422, 501}:
                return ""  # not about log-probabilities: the calls themselves will tell
            positions = []
        if any(positions) and scoring.whole_numbers(positions):
            return ""
        self.mode = "text"
        return "its tokenizer splits numbers" if any(positions) else "it returns no log-probabilities"

    async def ask(self, messages: list[dict[str, str]], seed: int) -> Reply:
        """Asks for one judgment. Whatever the server does, a reply comes back; only cancellation passes through.

        Args:
            messages: the rendered rubric.
            seed: for servers that sample reproducibly.
        """
        try:
            reply = await self._create(messages, seed=seed, max_tokens=self.endpoint.token_limit(self.mode))
        except refused() as error:
            return self._refusal(error)
        except malformed() as error:
            return Reply("error", f"malformed reply: {type(error).__name__}", self.mode)
        return read_reply(reply, self.mode, self.endpoint.key)

    async def _create(self, messages: list[dict[str, str]], *, seed: int, max_tokens: int) -> Any:
        request = self.endpoint.body(messages, self.mode, seed, max_tokens)
        # The raw response: the client fills its typed objects with whatever a server sends, so the JSON is read here.
        raw = await self._client.chat.completions.with_raw_response.create(**request)
        reply = json.loads(raw.http_response.content)
        if isinstance(reply, dict) and raw.retries_taken:
            reply["retries"] = raw.retries_taken
        return reply

    def _refusal(self, error: Exception) -> Reply:
        status = getattr(error, "status_code", None)
        return refusal(type(error).__name__, str(error), self.mode, self.endpoint.key, status, getattr(error, "code", None))


def read_reply(reply: Any, mode: str, key: str) -> Reply:
    """Scores the JSON that a server gave for one call; whatever shape it has, a record of it comes back.

    Args:
        reply: a chat completion, if the server keeps to the protocol.
        mode: `text` or `logprobs`.
        key: never to be in the record.
    """
    try:
        return _score(reply, mode, key)
    except malformed() as error:
        said = redact(json.dumps(reply, ensure_ascii=False), key)
        return Reply("error", f"malformed reply: {type(error).__name__}: {said}"[:_RAW_CHARS], mode, usage=_usage(reply))


def _score(reply: Any, mode: str, key: str) -> Reply:
    choice = _choice(reply)
    message = choice["message"]
    content = message["content"]
    if not isinstance(content, str | None):
        raise TypeError("content is no text")
    text = redact(content if content is not None else str(message.get("refusal") or ""), key)
    usage = _usage(reply)
    if mode == "logprobs":
        top = scoring.top_tokens(choice["logprobs"]["content"][0]["top_logprobs"])
        status, score = scoring.parse_logprobs(top)
        return Reply(status, text[:_RAW_CHARS], "logprobs", score, top, usage)
    status, score = scoring.parse_text(text, cut=choice.get("finish_reason") == "length")
    return Reply(status, text[:_RAW_CHARS], "text", score, None, usage)


def refusal(kind: str, said: str, mode: str, key: str, status: int | None = None, code: Any = None) -> Reply:
    """Returns the record of a request that got no judgment: one line that names what happened and holds no key."""
    # A provider's content filter gives the same answer next time: that call has no score, and is no fault to be tried again.
    filtered = status == 400 and code == "content_filter"
    raw = f"{kind}: {' '.join(redact(said, key).split())}"[:_RAW_CHARS]
    return Reply("invalid" if filtered else "error", raw, mode, http_status=status)


@contextlib.asynccontextmanager
async def session(endpoint: Endpoint) -> AsyncIterator[Chat]:
    """Opens a session with an endpoint, in the running event loop."""
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    hush_client()
    # A redirect would send answers to a host that was not announced.
    http = DefaultAsyncHttpxClient(follow_redirects=False, timeout=endpoint.timeout)
    client = AsyncOpenAI(
        api_key=endpoint.key, base_url=endpoint.base_url, timeout=endpoint.timeout, max_retries=endpoint.max_retries, http_client=http
    )
    async with client:
        yield Chat(endpoint, client)


def hush_client() -> None:
    """Keeps the client's log at warnings: at its debug level it logs whole requests, answers included."""
    for name in ("openai", "httpx", "httpx2", "httpcore", "httpcore2"):
        logging.getLogger(name).setLevel(logging.WARNING)


def refused() -> tuple[type[Exception], ...]:
    """What the client raises for a request that got no reply: statuses, timeouts, broken connections and bodies."""
    import httpx2
    import openai

    return (openai.OpenAIError, httpx2.HTTPError)


def malformed() -> tuple[type[Exception], ...]:
    """What reading a reply of another shape raises."""
    return (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError)


def _choice(reply: Any) -> Any:
    choice = reply["choices"][0]
    if not isinstance(choice, dict):
        raise TypeError("choice is no object")
    return choice


def _usage(reply: Any) -> dict[str, Any]:
    """Returns what a reply says about itself, in types that the journal can hold."""
    said = reply if isinstance(reply, dict) else {}
    counts: Any = said["usage"] if isinstance(said.get("usage"), dict) else {}
    usage: dict[str, Any] = {}
    for name in ("prompt_tokens", "completion_tokens"):
        value = counts.get(name)
        usage[name] = value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
    for name in ("model", "system_fingerprint"):
        usage[name] = str(said[name])[:200] if said.get(name) is not None else None
    if said.get("retries"):
        usage["retries"] = said["retries"]
    return usage


@dataclass(frozen=True)
class Job:
    """One call to make: its prompt, rendered when its turn comes, what takes its reply, and its seed."""

    prompt: Callable[[], Prompt]
    record: Callable[[Reply], None]
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What a batch of calls came to: why it stopped before the last ("" if it did not), and its cost (dollars, None if unknown)."""

    stopped: str
    cost: float | None


def settled_mode(endpoint: Endpoint, name: str) -> str:
    """Returns the mode in which a server can be scored: the endpoint's, or text where it gives no log-probabilities; see `Chat`."""

    async def settle() -> str:
        async with session(endpoint) as chat:
            await _settle(chat, name)
            return chat.mode

    return endpoint.mode if endpoint.mode == "text" else _in_thread(settle())


async def _settle(chat: Chat, name: str) -> None:
    reason = await chat.settle_mode()
    if reason:
        tqdm.write(f"{name}: {reason}, so scores are read from the reply's text, not from log-probabilities.", file=sys.stderr)


def ask_all(endpoint: Endpoint, jobs: Sequence[Job], limits: Limits, *, concurrency: int, name: str, progress: bool) -> Outcome:
    """Makes calls in order, `concurrency` at a time and within limits. An interrupt leaves recorded what was recorded."""
    return _in_thread(_ask_all(endpoint, jobs, limits, concurrency, name, progress))


async def _ask_all(endpoint: Endpoint, jobs: Sequence[Job], limits: Limits, concurrency: int, name: str, progress: bool) -> Outcome:
    waiting = iter(jobs)
    with tqdm(total=len(jobs), unit="call", desc=name, disable=not progress) as bar:
        async with session(endpoint) as chat:
            await _settle(chat, name)
            course = _Course(chat, limits, patience=max(20, 2 * concurrency))

            async def work() -> None:
                for job in waiting:
                    reply = await course.take(job)
                    if reply is None:
                        return
                    job.record(reply)
                    bar.update()
                    bar.set_postfix(course.counts(), refresh=False)

            await asyncio.gather(*(work() for _ in range(min(concurrency, len(jobs)))))
    return Outcome(course.stopped, course.cost if limits.price else None)


class _Course:
    """Takes calls one by one within limits, and stops where going on is pointless or too dear.

    Pointless is a wrong key, an unknown model, or a server that is gone.
    """

    def __init__(self, chat: Chat, limits: Limits, patience: int) -> None:
        self.stopped = ""
        self.cost = 0.0
        self._tokens = self._errors = self._in_a_row = 0
        self._replied = False
        self._chat = chat
        self._patience = patience
        self._price = limits.price
        self._bound = TokenBound()
        self._requests, self._rate = Pace(limits.requests_per_minute), Pace(limits.tokens_per_minute)
        self._budget = None
        if limits.price and limits.max_cost is not None:
            self._budget = Budget(limits.price, limits.max_cost, limits.spent)

    async def take(self, job: Job) -> Reply | None:
        """Makes a call; None when it was not made because the course has stopped."""
        prompt = job.prompt()
        most, reply_most = self._bound.of(prompt.messages), self._chat.endpoint.token_limit(self._chat.mode)
        await self._requests.wait(1)
        await self._rate.wait(most + reply_most)
        aside = await self._budget.set_aside(most, reply_most) if self._budget and not self.stopped else 0.0
        if aside is None and self._budget and not self.stopped:
            spent, limit = self._budget.spent, self._budget.limit
            self.stopped = f"another call might pass the limit of ${limit:g} (${spent:.4f} spent); raise judge_max_cost."
        if self.stopped:
            if self._budget and aside:
                await self._budget.settle(aside, 0.0)
            return None
        reply = await self._chat.ask(prompt.messages, job.seed)
        if prompt.left_out:
            reply = replace(reply, usage=reply.usage | {"answer_chars_left_out": prompt.left_out})
        used = [reply.usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        if used[0] is not None:
            self._bound.learn(prompt.messages, used[0])
        # Of a call without a count a provider may have done, and charge, all of the work, unless it refused it.
        told = used if None not in used else [0, 0] if reply.http_status else [most, reply_most]
        tokens = [count or 0 for count in told]
        self._rate.give_back(most + reply_most - sum(tokens))
        cost = self._price.of(*tokens) if self._price else 0.0
        if self._budget and aside is not None:
            await self._budget.settle(aside, cost)
        self._count(reply, sum(count or 0 for count in used), cost)
        return reply

    def counts(self) -> dict[str, str]:
        """Returns what a progress bar shows besides calls and time left."""
        shown = {"tokens": f"{self._tokens:,}", "errors": f"{self._errors}"}
        return shown | ({"cost": f"${self.cost:.4f}"} if self._price else {})

    def _count(self, reply: Reply, tokens: int, cost: float) -> None:
        self._tokens += tokens
        self.cost += cost
        if reply.status != "error":
            self._replied, self._in_a_row = True, 0
            return
        self._errors += 1
        self._in_a_row += 1
        if not self.stopped and not self._replied and reply.http_status in {401, 403, 404}:
            self.stopped = f"the server refused ({reply.raw[:300]})."
        elif not self.stopped and self._in_a_row >= self._patience:
            self.stopped = f"{self._in_a_row} calls in a row failed ({reply.raw[:300]})."


def _in_thread(main: Coroutine[Any, Any, _T]) -> _T:
    """Runs a coroutine to its end in an event loop of its own: a notebook's kernel already has one running.

    An interrupt (Ctrl-C, or Jupyter's stop button) cancels it, waits until it has put everything away, and goes on upwards.
    """
    outcome: concurrent.futures.Future[_T] = concurrent.futures.Future()
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []

    async def tracked() -> _T:
        task = asyncio.current_task()
        assert task is not None
        running.append((asyncio.get_running_loop(), task))
        return await main

    def body() -> None:
        try:
            outcome.set_result(asyncio.run(tracked()))
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=body, name="judge")
    thread.start()
    try:
        return outcome.result()
    except KeyboardInterrupt:
        for loop, task in running:
            loop.call_soon_threadsafe(task.cancel)
        thread.join()
        raise
