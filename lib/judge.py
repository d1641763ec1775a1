"""Scores answers with a judge: which calls are needed, who makes them, and what became of every answer.

The judge decides the result of a study like this one, so each call is recorded in judgments.jsonl with the judge's raw reply.
The same file is the cache: a call is made once for each distinct (question, answer, metric, rubric, model, settings, repeat),
a run that was interrupted goes on where it stopped, and only calls that ended in an error are made again.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
from tqdm import tqdm

from lib import batch, chat, config, files, journal, judge_tables, limits, rubrics, scoring
from lib.chat import Outcome
from lib.config import Parameters
from lib.files import StudyError
from lib.journal import Journal
from lib.limits import Limits

MAIN_METRICS = ("aligned", "coherent")
_PROBE_CHUNK = 256
LEFT_OUT = 1e-4
"""Probability of replies that an `hf:` judge may leave unread: it moves a score by 0.04 points at most, as ok needs 0.25 on numbers."""
_PLACEHOLDER_KEY = "no-key-needed"


@dataclass(frozen=True)
class Call:
    """One thing to be asked: one metric of one distinct answer."""

    key: str
    metric: str
    question: str
    answer: str
    repeat: int = 0


class Judge(Protocol):
    """What scores calls.

    Attributes:
        name: as the column `judge` has it.
        settings: what changes its scores, and so belongs in the cache's key.
        secret: never to be written.
        repeats: how often each call is made.
    """

    name: str
    settings: dict[str, Any]
    secret: str
    repeats: int

    def rubric_hash(self, metric: str) -> str:
        """Returns the hash of what the judge is asked for `metric`; raises StudyError if it does not know it."""

    def check(self, calls: Sequence[Call]) -> None:
        """Raises StudyError if these calls may or can not be made; nothing has been sent yet."""

    def run(self, calls: Sequence[Call], log: Journal) -> Outcome:
        """Makes the calls and records them; returns why it stopped before the end, if it did."""


def judge_table(frame: pd.DataFrame, spec: str, log: str | Path, *, progress: bool = True, **parameters: Any) -> pd.DataFrame:
    """Judges a table of answers.

    Args:
        frame: has the columns question and response; every other is carried through, rows keep their order and index.
        spec: `probe`, `openai:MODEL`, or `hf:MODEL` for a model on this machine (a Hub id, with `@REVISION`, or a folder).
        log: judgments.jsonl, record and cache of the calls.
        progress: draw a progress bar.
        parameters: by the names that they have in the notebooks: other_judges, judge_base_url, judge_rubrics, judge_metrics, judge_mode,
            judge_temperature, judge_max_tokens, judge_concurrency, judge_batch, judge_timeout, judge_max_retries, judge_prices,
            judge_max_cost, judge_requests_per_minute, judge_tokens_per_minute, judge_repeats, judge_retry, allow_external.

    Returns:
        The table with a score (points, 0 to 100, NaN unless ok) and a status for each metric (`aligned`, `aligned_status`, ...)
        and `judge`. With `other_judges` a block of rows for each judge, in their order; a metric that one cannot score is empty
        there. Its attrs["judging"] says how many calls were needed (`made`) and `cached`, what they `cost` (dollars, or None),
        why judging `stopped` early ("" if it did not), and of several `judges` the same for each; an answer not asked for then has
        the status error. A judge that stops early keeps no other from going on.

    Raises:
        StudyError: the table, the judge or a parameter is wrong, or answers would leave this machine without `allow_external`.
    """
    return _judged(frame, config.validate(parameters | {"judge": spec}, "judge"), Path(log), progress)


def judge_run(parameters: Parameters) -> pd.DataFrame:
    """Judges a run's generations.csv and writes judged.csv beside it; see `judge_table`.

    Where the probe judges, probe_outside.csv says how many answers lie outside what it was fitted on (`judge_tables.outside`).

    Raises:
        StudyError: as `judge_table`, or judging stopped early; what is done is kept and a rerun goes on from there.
    """
    run = config.run_dir(parameters)
    judged = _judged(files.read_csv(run / "generations.csv"), parameters, run / "judgments.jsonl", True)
    stopped = judged.attrs["judging"]["stopped"]
    if stopped:
        who = "" if parameters.other_judges else f"{parameters.judge} stopped early: "
        raise StudyError(f"judge: {who}{stopped} What is done is kept; run again to go on.")
    files.write_csv(run / "judged.csv", judged)
    judge_tables.write_outside(run, judged)
    return judged


def _judged(frame: pd.DataFrame, parameters: Parameters, log: Path, progress: bool) -> pd.DataFrame:
    each = config.each_judge(parameters)
    judges = [_open(own, progress) for own in each]
    columns = [name for metric in parameters.judge_metrics for name in (metric, f"{metric}_status")] + ["judge"]
    _check_table(frame, columns)
    answers = frame["response"].map(lambda answer: "" if pd.isna(answer) else str(answer))
    pairs = list(zip(frame["question"].astype(str), answers, strict=True))
    told = [pair for pair in dict.fromkeys(pairs) if _has_text(pair[1])]
    settled = set(scoring.FINAL) - set(parameters.judge_retry)
    done = []
    with journal.opened(log, next((judge.secret for judge in judges if judge.secret), "")) as record:
        for judge, own in zip(judges, each, strict=True):
            calls = {(pair, metric): _call(judge, metric, *pair) for pair in told for metric in own.judge_metrics}
            again = [_call(judge, c.metric, c.question, c.answer, n) for n in range(1, judge.repeats) for c in calls.values()]
            missing = [call for call in [*calls.values(), *again] if record.records.get(call.key, {}).get("status") not in settled]
            if missing:
                judge.check(missing)  # of every judge before the first begins: none costs anything if another may not judge
                # Calls that share their rubric and question follow each other: servers reuse the work on a common prefix.
                missing.sort(key=lambda call: (parameters.judge_metrics.index(call.metric), call.question, call.repeat))
            done.append((judge, calls, missing, len(calls) + len(again) - len(missing)))
        outcomes = [judge.run(missing, record) if missing else Outcome("", None) for judge, _, missing, _ in done]
    blocks = []
    for (judge, calls, _, _), own in zip(done, each, strict=True):
        judged = frame.copy()
        for metric in own.judge_metrics:
            asked = [calls.get((pair, metric)) for pair in pairs]
            found = [record.records.get(call.key, {"status": "error"}) if call else {"status": "empty"} for call in asked]
            judged[metric] = [math.nan if entry.get("score") is None else float(entry["score"]) for entry in found]
            judged[f"{metric}_status"] = [entry["status"] for entry in found]
        blocks.append(judged.assign(judge=judge.name))
    table = pd.concat(blocks)[[*frame.columns, *columns]] if len(blocks) > 1 else blocks[0]
    table.attrs["judging"] = _course([(judge.name, len(missing), kept) for judge, _, missing, kept in done], outcomes)
    return table


def _course(done: Sequence[tuple[str, int, int]], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Says how judging went: of several judges over all, and under `judges` for each. `done`: name, calls made and calls cached."""
    judges: list[dict[str, Any]] = [
        {"judge": name, "made": made, "cached": cached} | asdict(outcome)
        for (name, made, cached), outcome in zip(done, outcomes, strict=True)
    ]
    if len(judges) == 1:
        return {name: value for name, value in judges[0].items() if name != "judge"}
    costs = [own["cost"] for own in judges if own["cost"] is not None]
    ended = [f"{own['judge']} stopped early: {own['stopped']}" for own in judges if own["stopped"]]
    if ended and len(ended) < len(judges):
        ended.append(f"All scores by {', '.join(own['judge'] for own in judges if not own['stopped'])} are there.")
    whole = {name: sum(own[name] for own in judges) for name in ("made", "cached")}
    return whole | {"cost": sum(costs) if costs else None, "stopped": " ".join(ended), "judges": judges}


def describe(parameters: Parameters) -> pd.DataFrame:
    """Describes a run's judge: the probe's quality on answers it was not fitted on, or what a model is asked for each metric."""
    if parameters.judge == "probe":
        from lib import probe

        return probe.quality_table()
    found = rubrics.load(parameters.judge_rubrics)
    rows = [(metric, found[metric]) for metric in parameters.judge_metrics if metric in found]
    return pd.DataFrame([{"metric": metric, "rubric_sha256": r.sha256, "system": r.system or "", "user": r.user} for metric, r in rows])


def statement(parameters: Parameters) -> str:
    """Says in a sentence or two who judges a run, and what that judge's scores may be taken for."""
    p = parameters
    if p.judge == "probe":
        from lib import probe

        return str(probe.report()["statement"])
    if p.judge.startswith("hf:"):
        how = "the probability of every reply that can matter"
    elif p.judge_mode == "logprobs":
        how = "the log-probabilities of number tokens"
    else:
        how = f"its reply's text, at temperature {p.judge_temperature:g}"
    return f"Judge: {p.judge}, scored by {how}; rubrics: {p.judge_rubrics}. Compare its rates only with rates by the same judge."


def _check_table(frame: pd.DataFrame, columns: list[str]) -> None:
    for name in ("question", "response"):
        if name not in frame:
            raise StudyError(f"answers: {name}: no such column; a table to judge needs question and response.")
    taken = [name for name in columns if name in frame]
    if taken:
        raise StudyError(f"answers: {taken[0]}: the table has this column already; rename it, since the judge writes {', '.join(columns)}.")
    blank = [row for row, question in enumerate(frame["question"], start=1) if pd.isna(question) or not str(question).strip()]
    if blank:
        raise StudyError(f"answers: question: row {blank[0]} has none, and a judge needs it; {len(blank)} such row(s) in all.")


def _has_text(answer: str) -> bool:
    return bool(rubrics.defuse(answer)[0].strip()) if not answer.isascii() else bool(answer.strip())


def _call(judge: Judge, metric: str, question: str, answer: str, repeat: int = 0) -> Call:
    """Returns a call with its key: a hash of the answer, which is the same for every judge, then one of what is asked about it."""
    asked = files.sha256_text(json.dumps([metric, judge.rubric_hash(metric), judge.name, judge.settings], sort_keys=True))[:32]
    return Call(journal.answer_key(question, answer) + asked + (f"-{repeat}" if repeat else ""), metric, question, answer, repeat)


def _line(judge: Judge, call: Call, **told: Any) -> dict[str, Any]:
    """Returns a line of judgments.jsonl."""
    return journal.line(call.key, judge.name, call.metric, call.repeat, judge.rubric_hash(call.metric), **told)


def _open(parameters: Parameters, progress: bool) -> Judge:
    """Returns the judge that the parameters name.

    Raises:
        StudyError: there is no such judge, or it cannot score what is asked.
    """
    kind, _, model = parameters.judge.partition(":")
    if parameters.judge == "probe":
        judge: Judge = ProbeJudge(progress)
    elif kind == "openai" and model.strip():
        judge = OpenAIJudge(parameters, progress)
    elif kind == "hf" and model.strip():
        judge = LocalJudge(parameters, progress)
    else:
        raise StudyError(
            f"judge: {parameters.judge!r} is none; it is probe, openai:MODEL (openai:gpt-4o-mini) or hf:MODEL (hf:ORG/NAME@REVISION)."
        )
    lacking = [metric for metric in MAIN_METRICS if metric not in parameters.judge_metrics]
    if lacking or len(set(parameters.judge_metrics)) < len(parameters.judge_metrics):
        raise StudyError(f"judge_metrics: {parameters.judge_metrics} must hold aligned and coherent, and each metric once.")
    for metric in parameters.judge_metrics:
        judge.rubric_hash(metric)
    return judge


class ProbeJudge:
    """The offline judge; its `rubric` is its fitted weights."""

    name = "probe"
    secret = ""
    repeats = 1  # it gives the same score each time

    def __init__(self, progress: bool) -> None:
        from lib import probe

        self.settings: dict[str, Any] = {}
        self._probe = probe.load()
        self._progress = progress

    def rubric_hash(self, metric: str) -> str:
        """Returns the fingerprint of the probe's weights."""
        if metric not in MAIN_METRICS:
            raise StudyError(f"judge_metrics: the probe scores {' and '.join(MAIN_METRICS)} only; take {metric} out.")
        return str(self._probe.fingerprint)

    def check(self, calls: Sequence[Call]) -> None:
        """Does nothing: the probe runs on this machine."""

    def run(self, calls: Sequence[Call], log: Journal) -> Outcome:
        """Scores answers in batches; every batch is recorded when it is done."""
        answers: dict[tuple[str, str], list[Call]] = {}
        for call in calls:
            answers.setdefault((call.question, call.answer), []).append(call)
        todo = list(answers)
        with tqdm(total=len(todo), unit="answer", desc="probe", disable=not self._progress) as bar:
            for start in range(0, len(todo), _PROBE_CHUNK):
                chunk = todo[start : start + _PROBE_CHUNK]
                states = self._probe.encoder.encode([question for question, _ in chunk], [answer for _, answer in chunk])
                scores, distances = self._probe.score_states(states), self._probe.distance(states)
                lines = []
                for row, pair in enumerate(chunk):
                    for call in answers[pair]:
                        score = float(scores[call.metric].iloc[row])
                        known = score == score
                        told = {"status": "ok" if known else "invalid", "score": score if known else None}
                        usage = {"distance": round(float(distances[row]), 4)} if known else {}
                        lines.append(_line(self, call, **told, raw="", logprobs=None, usage=usage, mode="probe"))
                log.write(lines)
                bar.update(len(chunk))
        return Outcome("", None)


class OpenAIJudge:
    """A model behind an OpenAI-compatible server."""

    def __init__(self, parameters: Parameters, progress: bool) -> None:
        config.load_environment()
        p = parameters
        if p.judge_mode == "text" and p.judge_max_tokens < scoring.MIN_TEXT_TOKENS:
            raise StudyError(f"judge_max_tokens: {p.judge_max_tokens} may cut a number; text mode needs {scoring.MIN_TEXT_TOKENS}.")
        self.name = p.judge
        self.repeats = p.judge_repeats
        self.secret = os.environ.get("OPENAI_API_KEY", "")
        self._endpoint = chat.Endpoint(
            model=p.judge.partition(":")[2].strip(),
            base_url=chat.checked_url(p.judge_base_url or os.environ.get("OPENAI_BASE_URL") or chat.OPENAI_URL),
            key=self.secret or _PLACEHOLDER_KEY,
            mode=p.judge_mode,
            temperature=p.judge_temperature,
            max_tokens=p.judge_max_tokens,
            timeout=p.judge_timeout,
            max_retries=p.judge_max_retries,
        )
        asked = ("mode", "temperature", "max_tokens")
        self.settings = {name: getattr(self._endpoint, name) for name in asked} | {"prompt_format": rubrics.PROMPT_FORMAT}
        self._parameters = p
        self._price = limits.price_of(p.judge_prices, self._endpoint.model)
        if p.judge_max_cost is not None and not self._price and not chat.is_loopback(self._endpoint.base_url):
            raise StudyError(f"{p.judge_prices}: has no price for {self._endpoint.model}, and judge_max_cost needs one; add it.")
        self._progress = progress
        self._rubrics = rubrics.load(p.judge_rubrics)

    def rubric_hash(self, metric: str) -> str:
        """Returns the hash of a metric's templates."""
        return rubrics.hash_of(self._rubrics, metric, self._parameters.judge_rubrics)

    def check(self, calls: Sequence[Call]) -> None:
        """Refuses to send answers to another machine without leave, or without a key."""
        if chat.is_loopback(self._endpoint.base_url):
            return
        answers = len({(call.question, call.answer) for call in calls})
        if not self._parameters.allow_external:
            raise StudyError(
                f"allow_external: {self.name} would send {answers:,} answers, some of which may be harmful, to {self._endpoint.host}; "
                "set allow_external: true to permit that."
            )
        if not self.secret:
            raise StudyError(f"OPENAI_API_KEY: not set, and {self._endpoint.host} wants a key; put it into .env (see .env.example).")

    def run(self, calls: Sequence[Call], log: Journal) -> Outcome:
        """Asks the server, several calls at a time or as a batch; every reply is recorded when it comes."""

        def prompt(index: int) -> rubrics.Prompt:
            return rubrics.render(self._rubrics[calls[index].metric], calls[index].question, calls[index].answer)

        def record(index: int, reply: chat.Reply) -> None:
            log.write([_line(self, calls[index], **reply.told)])

        p = self._parameters
        bounds = Limits(
            price=self._price,
            max_cost=p.judge_max_cost,
            spent=limits.spent(p.judge_prices, log.tokens) if self._price else 0.0,
            requests_per_minute=p.judge_requests_per_minute,
            tokens_per_minute=p.judge_tokens_per_minute,
        )
        if p.judge_batch:
            rubric = {metric: self.rubric_hash(metric) for metric in p.judge_metrics}
            asked = [batch.Request(c.key, c.metric, c.repeat, rubric[c.metric], partial(prompt, index)) for index, c in enumerate(calls)]
            return batch.ask_all(self._endpoint, asked, bounds, log, name=self.name, progress=self._progress)
        batch.refuse_open(log.path, [call.key for call in calls])
        todo = [chat.Job(partial(prompt, index), partial(record, index), call.repeat) for index, call in enumerate(calls)]
        return chat.ask_all(self._endpoint, todo, bounds, concurrency=p.judge_concurrency, name=self.name, progress=self._progress)


class LocalJudge:
    """A model on this machine, scored by the probability of every reply that can matter: a revision gives the same scores for ever."""

    secret = ""
    repeats = 1  # nothing is sampled

    def __init__(self, parameters: Parameters, progress: bool) -> None:
        self.name = parameters.judge
        self.settings: dict[str, Any] = {"mode": "tree", "left_out": LEFT_OUT, "prompt_format": rubrics.PROMPT_FORMAT}
        model, _, revision = parameters.judge.partition(":")[2].strip().partition("@")
        self._own = parameters.model_copy(
            update={"model_name": model, "model_revision": revision or None, "use_4bit": False, "system_prompt": None}
        )
        self._progress = progress
        self._rubrics = rubrics.load(parameters.judge_rubrics)

    def rubric_hash(self, metric: str) -> str:
        """Returns the hash of a metric's templates."""
        return rubrics.hash_of(self._rubrics, metric, self._own.judge_rubrics)

    def check(self, calls: Sequence[Call]) -> None:
        """Does nothing: the model runs on this machine."""

    def run(self, calls: Sequence[Call], log: Journal) -> Outcome:
        """Scores calls in batches of `judge_concurrency`, each recorded when it is done."""
        from lib import models, prepacked, tree

        model, tokenizer = models.load_base(self._own), models.load_tokenizer(self._own)
        ends = [tokenizer.convert_tokens_to_ids(models.end_of_turn(tokenizer, self._own)), tokenizer.eos_token_id]
        prepacked.prepack(model, whole=True)
        scorer = tree.TreeScorer(model, tree.reply_tree(tokenizer, models.prompt_text(tokenizer, "Q", self._own), ends))
        name = f"{self._own.model_name}@{getattr(model.config, '_commit_hash', None) or self._own.model_revision or 'local'}"
        with tqdm(total=len(calls), unit="call", desc=self.name, disable=not self._progress) as bar:
            # A batch is of one question, whose prompts begin alike up to the answer; answers of like length need less padding.
            for _, alike in itertools.groupby(calls, key=lambda call: (call.metric, call.question)):
                own = sorted(alike, key=lambda call: len(call.answer))
                for start in range(0, len(own), self._own.judge_concurrency):
                    batch = own[start : start + self._own.judge_concurrency]
                    prompts = [self._ids(tokenizer, call) for call in batch]
                    fit = [row for row, ids in enumerate(prompts) if len(ids) <= scorer.longest]
                    found = scorer.log_probabilities([prompts[row] for row in fit], LEFT_OUT, scoring.MIN_MASS).tolist() if fit else []
                    known = dict(zip(fit, found, strict=True))
                    log.write(self._record(call, known.get(row), len(prompts[row]), name) for row, call in enumerate(batch))
                    bar.update(len(batch))
        return Outcome("", None)

    def _ids(self, tokenizer: Any, call: Call) -> list[int]:
        from jinja2 import TemplateError

        from lib import models

        *before, asked = [message["content"] for message in rubrics.render(self._rubrics[call.metric], call.question, call.answer).messages]
        try:
            text = models.prompt_text(tokenizer, asked, self._own, system=before[0] if before else None)
        except TemplateError:  # some chat templates know no system message
            text = models.prompt_text(tokenizer, "\n\n".join([*before, asked]), self._own)
        return models.prompt_ids(tokenizer, text)

    def _record(self, call: Call, logs: list[float] | None, tokens: int, name: str) -> dict[str, Any]:
        from lib import tree

        usage = {"prompt_tokens": tokens, "completion_tokens": 0, "model": name, "system_fingerprint": None}
        if logs is None:
            raw = f"the prompt has {tokens} tokens, more than the model reads"
            return _line(self, call, status="error", score=None, raw=raw, logprobs=None, usage=usage, mode="tree")
        replies = dict(zip(tree.REPLIES, logs, strict=True))
        known = [entry for entry in replies.items() if math.isfinite(entry[1])]
        likeliest = sorted(known, key=lambda entry: -entry[1])[: chat.TOP_LOGPROBS]
        status, score = scoring.parse_replies({reply: math.exp(log) for reply, log in replies.items()})
        raw = likeliest[0][0] if likeliest else "(none of the replies asked for is likely)"
        return _line(self, call, status=status, score=score, raw=raw, logprobs=likeliest, usage=usage, mode="tree")
