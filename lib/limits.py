"""What a judge may cost and how fast it may be asked: prices, a budget that is never passed, and an even pace."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from lib import files
from lib.files import StudyError

_BURST_SECONDS = 1.0
_LOOK_SECONDS = 0.05
_MESSAGE_TOKENS = 16  # what a chat template adds to a message, generously
_MARGIN = 1.25


@dataclass(frozen=True)
class Limits:
    """What a judge may cost and how fast it may be asked; None is no limit.

    Attributes:
        price: of the judge's model; None where it is not known or costs nothing.
        max_cost: dollars in all.
        spent: dollars that earlier calls have cost, other judges' of the same answers included.
        requests_per_minute: calls, retries of the client not counted.
        tokens_per_minute: prompt and reply tokens together.
    """

    price: Price | None = None
    max_cost: float | None = None
    spent: float = 0.0
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None


@dataclass(frozen=True)
class Price:
    """US dollars for a million tokens."""

    input: float
    output: float

    def of(self, prompt_tokens: float, completion_tokens: float) -> float:
        """Returns what so many tokens cost, in dollars."""
        return (prompt_tokens * self.input + completion_tokens * self.output) / 1e6

    @property
    def in_batch(self) -> Price:
        """The price of the same tokens through the Batch API: half."""
        return Price(self.input / 2, self.output / 2)


def price_of(path: str | Path, model: str) -> Price | None:
    """Returns a model's price from a price table, or None where it has none.

    Args:
        path: YAML with `prices`, a mapping of models to `input` and `output`; a relative path is taken from the repository root.
        model: a dated name takes the price of its undated one unless it has its own.

    Raises:
        StudyError: the table is missing or malformed.
    """
    path = files.resolve(path)
    where = files.shown(path)
    if not path.is_file():
        raise StudyError(f"{where}: not found; judge_prices names a table such as parameters/prices.yaml.")
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))["prices"]
        prices = {str(name): Price(float(entry["input"]), float(entry["output"])) for name, entry in table.items()}
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise StudyError(f"{where}: prices: must map each model to input and output, in dollars for a million tokens.") from error
    return prices.get(model) or prices.get(re.sub(r"-\d{4}-\d{2}-\d{2}$", "", model))


def spent(path: str | Path, tokens: Mapping[tuple[str, bool], Sequence[float]]) -> float:
    """Returns what calls have cost over all judges, in dollars; a judge without a price costs nothing.

    Args:
        path: the price table.
        tokens: prompt and reply tokens by judge (`openai:MODEL`) and by whether the calls came in a batch.
    """
    prices = {judge: price_of(path, judge.partition(":")[2]) for judge, _ in tokens}
    told = [(prices[judge], in_batch, counts) for (judge, in_batch), counts in tokens.items()]
    return sum((price.in_batch if in_batch else price).of(*counts) for price, in_batch, counts in told if price)


class TokenBound:
    """An upper bound for the tokens of a prompt that has not been sent, from what earlier prompts turned out to have.

    A byte-level tokenizer never has more tokens than bytes. For ASCII text the bound falls, after the first reply, to the
    largest number of tokens a byte seen so far and a quarter more; other characters stay at one token a byte.
    """

    def __init__(self) -> None:
        self._ratio = 1.0
        self._seen = 0.0

    def of(self, messages: list[dict[str, str]]) -> int:
        """Returns the bound for chat messages, in tokens."""
        plain, other = _bytes(messages)
        return round(plain * self._ratio) + other + _MESSAGE_TOKENS * (len(messages) + 1)

    def learn(self, messages: list[dict[str, str]], prompt_tokens: int) -> None:
        """Takes in how many tokens a prompt had by the server's count."""
        plain, other = _bytes(messages)
        if plain > 10 * other:
            self._seen = max(self._seen, prompt_tokens / plain)
            self._ratio = min(1.0, _MARGIN * self._seen)


def _bytes(messages: list[dict[str, str]]) -> tuple[int, int]:
    text = "".join(message["content"] for message in messages)
    plain = sum(character.isascii() for character in text)
    return plain, len(text.encode("utf-8", "replace")) - plain


class Budget:
    """Money for calls: a call's highest possible cost is set aside before it is sent, and its true cost booked after."""

    def __init__(self, price: Price, limit: float, spent: float) -> None:
        self.price = price
        self.limit = limit
        self.spent = spent
        self._aside = 0.0
        self._settled = asyncio.Condition()

    async def set_aside(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """Sets money aside for a call; waits while calls in flight might yet turn out cheaper than feared.

        Returns:
            The sum in dollars, or None where the budget cannot bear the call.
        """
        most = self.price.of(prompt_tokens, completion_tokens)
        async with self._settled:
            while self.spent + self._aside + most > self.limit:
                if self._aside <= 0:
                    return None
                await self._settled.wait()
            self._aside += most
            return most

    async def settle(self, aside: float, cost: float) -> None:
        """Books the true cost of a call for which `aside` was set aside."""
        async with self._settled:
            self._aside = self._aside - aside if self._aside - aside > 1e-12 else 0.0
            self.spent += cost
            self._settled.notify_all()


class Pace:
    """Lets through so many units a minute, evenly, after a first second's worth at once. None is no limit."""

    def __init__(self, per_minute: float | None) -> None:
        self._seconds_each = 60.0 / per_minute if per_minute else 0.0
        self._due = 0.0
        self._turn = asyncio.Lock()

    async def wait(self, units: float) -> None:
        """Waits until `units` may pass; who comes first goes first."""
        if not self._seconds_each:
            return
        clock = asyncio.get_running_loop().time
        async with self._turn:
            while self._due > clock():  # looked at again and again, since units given back bring it nearer
                await asyncio.sleep(min(self._due - clock(), _LOOK_SECONDS))
            self._due = max(self._due, clock() - _BURST_SECONDS) + units * self._seconds_each

    def give_back(self, units: float) -> None:
        """Takes back units that were let through but not used."""
        self._due -= units * self._seconds_each
