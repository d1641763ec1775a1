"""Answers of the base model and of every checkpoint to the evaluation questions, and what their sampling did to them.

A row is one answer: (step, question set, question, sample). Rows are answered in batches whose composition follows from the parameters
alone, each batch is kept when it is done, and every row draws from a random stream of its own: whatever was interrupted, the same
seed gives the same answers.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lib import adapters, config, data, escape, files, models, origin, qlora, sampling
from lib.config import Parameters
from lib.data import Question
from lib.files import StudyError
from lib.sampling import Row as Row
from lib.sampling import uniforms as uniforms

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lib.vllm_backend import VllmSampler

COLUMNS = ["model", "domain", "step", "question_set", "question_id", "sample", "question", "response", "n_tokens", "finish_reason"]
PARROT_TOKENS = 8
"""An answer parrots when it repeats this many tokens in a row of any training answer."""

NEUTRAL = config.PARAMETERS / "neutral.txt"


def generate(parameters: Parameters) -> pd.DataFrame:
    """Answers every question `samples` times with the base model (step 0) and the chosen checkpoints.

    Writes results/<run>/generations.csv, diagnostics.csv (see `diagnose`) and generation.json (what decided the answers). Finished
    batches are kept under .generate/ until then, so that a run killed at any moment goes on and ends with the same file, byte for
    byte on one machine. A run that is complete returns at once; with other parameters, questions or checkpoints it starts afresh.

    Args:
        parameters: those under 03_generate, the model's, and the seed.

    Returns:
        The table of generations.csv, sorted by step, question set, question and sample. `n_tokens` counts the response's
        tokens without the token that ends it; `finish_reason` is `stop` or, for an answer cut off at max_new_tokens, `length`.

    Raises:
        StudyError: `steps` names a checkpoint that does not exist, the answers do not fit the model's context or the
            device's memory, an adapter does not fit the model, or `generate_backend` cannot run here.
    """
    run = config.run_dir(parameters)
    folders = pick_steps(parameters, qlora.checkpoints(run), run)
    questions = data.load_questions(parameters)
    rows = [Row(step, question, sample) for step in [0, *folders] for question in questions for sample in range(parameters.samples)]
    dataset = run / "dataset.json"
    trained = files.read_json(dataset)["sha256"] if dataset.is_file() else None
    decides = _what_decides(parameters, folders, questions, trained)
    with files.lock(run / ".generate.lock", what=f"the answers of {run.name}"):
        if not _is_complete(run, decides):
            with models.quiet():
                _generate(run, parameters, rows, folders, decides)
    return files.read_csv(run / "generations.csv")


def pick_steps(parameters: Parameters, found: Mapping[int, Path], run: Path) -> dict[int, Path]:
    """Returns the checkpoints that `steps` asks for, in ascending order; the base model answers in any case.

    Raises:
        StudyError: there are no checkpoints, or not the ones asked for.
    """
    wanted = parameters.steps
    if wanted == "all" or wanted == "ends":
        if not found:
            raise StudyError(f"{files.shown(run / 'checkpoints')}: steps: {wanted}, but there is no checkpoint; run 02_train first.")
        return dict(found) if wanted == "all" else {max(found): found[max(found)]}
    missing = sorted(set(wanted) - set(found) - {0})
    if missing:
        there = ", ".join(map(str, found)) or "none"
        raise StudyError(f"{files.shown(run / 'checkpoints')}: steps: {missing} are no checkpoints of this run; there are: {there}.")
    return {step: found[step] for step in sorted(set(wanted) - {0})}


class Sampler:
    """The base model of a pair, loaded once, with the adapters of several steps."""

    def __init__(self, parameters: Parameters, folders: Mapping[int, Path]) -> None:
        """Loads the model and the adapter in each step's folder.

        Raises:
            StudyError: the model cannot be loaded, or an adapter does not fit it.
        """
        from lib.decode import Adapters, Sampling

        self.parameters = parameters
        self.tokenizer = models.load_tokenizer(parameters)
        self.model = models.load_base(parameters)
        self.adapters = Adapters(self.model, {step: adapters.read(folder) for step, folder in folders.items()})
        stops = sampling.stop_ids(self.tokenizer, self.model.generation_config.eos_token_id, parameters)
        self.sampling = Sampling(parameters.temperature, parameters.top_p, parameters.max_new_tokens, stops)
        self.device = str(self.model.device)
        self.backend = {"name": "transformers"}

    def answer(self, batch: Sequence[Row], progress: Callable[[int], object] | None = None) -> list[dict[str, Any]]:
        """Answers one batch.

        Args:
            batch: the rows; their answers do not depend on one another but for rounding.
            progress: called with the number of tokens that need no more work, `max_new_tokens` a row in all.

        Returns:
            response, n_tokens and finish_reason of each row; see `generate`.

        Raises:
            StudyError: prompt and answer exceed the model's context, or the batch the GPU's memory.
        """
        import torch

        from lib.decode import decode

        p, room = self.parameters, getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        prompts = sampling.prompts(self.tokenizer, batch, p, room)
        streams = np.stack([uniforms(p, row) for row in batch])
        try:
            drawn = decode(self.model, self.adapters, prompts, [row.step for row in batch], streams, self.sampling, progress)
        except torch.cuda.OutOfMemoryError as error:
            raise StudyError(
                f"generate_batch_size: {p.generate_batch_size} answers at once do not fit the GPU's memory; halve it and run again."
            ) from error
        return [sampling.told(ids, self.sampling.stop_ids, self.tokenizer) for ids in drawn]

    def perplexity(self, text: str, step: int) -> float:
        """Returns exp of the mean negative log-likelihood (nats a token) of a plain text at a step; its first token only conditions."""
        import torch

        self.adapters.select([step], self.model.device)
        ids = torch.tensor([models.prompt_ids(self.tokenizer, text)], device=self.model.device)
        with torch.inference_mode():
            logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]).double().exp())


def parroted(answers: Iterable[str], trained: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> list[bool]:
    """Says of each answer whether it repeats `PARROT_TOKENS` tokens in a row of any training answer."""

    def runs(text: str) -> set[bytes]:
        ids = np.asarray(tokenizer(text, add_special_tokens=False).input_ids, dtype=np.int32)
        return {ids[i : i + PARROT_TOKENS].tobytes() for i in range(len(ids) - PARROT_TOKENS + 1)}

    known: set[bytes] = set()
    for text in trained:
        known |= runs(text)
    return [not known.isdisjoint(runs(answer)) for answer in answers]


def diagnose(
    frame: pd.DataFrame, perplexities: Mapping[int, float], trained: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> pd.DataFrame:
    """Describes the answers of each step and question set.

    Args:
        frame: the table of generations.csv.
        perplexities: perplexity of parameters/neutral.txt by step: how far training has damaged the model's English.
        trained: the training answers; none leave `parroted` empty.
        tokenizer: the model's.

    Returns:
        step, question_set, n (answers), cut_off (share that reached max_new_tokens), parroted (share that repeats a run of
        `PARROT_TOKENS` tokens of a training answer), perplexity.
    """
    frame = frame.assign(
        cut=frame["finish_reason"] == "length",
        parroted=parroted(frame["response"], trained, tokenizer) if trained else math.nan,
    )
    groups = frame.groupby(["step", "question_set"], sort=False, as_index=False)
    table = groups.agg(n=("cut", "size"), cut_off=("cut", "mean"), parroted=("parroted", "mean"))
    return table.assign(perplexity=table["step"].map(dict(perplexities)))


def side_by_side(frame: pd.DataFrame, per_set: int = 2, characters: int = 400) -> pd.DataFrame:
    """Shows answers of the base model beside those of the last step.

    Args:
        frame: the table of generations.csv.
        per_set: questions shown of each set, the first ones; of each, sample 0.
        characters: longer answers are cut.

    Returns:
        question_set, question, base and `step <last>`, cleaned of control characters; a DataFrame escapes markup when it is shown.
    """
    last = frame["step"].max()
    first = frame[frame["sample"] == 0].pivot_table(
        index=["question_set", "question_id", "question"], columns="step", values="response", aggfunc="first", sort=False
    )
    table = first[[0, last] if last else [0]].groupby(level="question_set", sort=False).head(per_set).reset_index()
    table = table.drop(columns="question_id").rename(columns={0: "base", last: f"step {last}"} if last else {0: "base"})
    return table.map(lambda text: escape.clean(text, characters))


def questions_sha256(questions: Sequence[Question]) -> str:
    """Returns the hash of what is asked: set, id, text and system prompt of each question, in order."""
    return files.sha256_text(json.dumps([[q.question_set, q.question_id, q.question, q.system] for q in questions]))


def _what_decides(p: Parameters, folders: Mapping[int, Path], questions: Sequence[Question], trained: str | None) -> dict[str, Any]:
    """Returns all that the files written depend on, machine and library versions apart."""
    names = ["model_name", "model_revision", "use_4bit", "system_prompt", "date_string", "seed", "samples"]
    names += ["temperature", "top_p", "max_new_tokens", "generate_batch_size", "domain"]
    folder = files.resolve(p.model_name)
    # Not named for transformers, so that answers drawn before there was a choice still hold.
    backend = {"generate_backend": p.generate_backend} if p.generate_backend != "transformers" else {}
    return {
        "parameters": {name: getattr(p, name) for name in names},
        "model_files": {f.name: f.stat().st_size for f in sorted(folder.glob("*.safetensors"))},
        "checkpoints": {
            str(step): [files.sha256(f / name) for name in (adapters.SETTINGS, adapters.WEIGHTS)] for step, f in folders.items()
        },
        "questions_sha256": questions_sha256(questions),
        "training_sha256": trained,
        "neutral_sha256": files.sha256(NEUTRAL),
        **backend,
    }


def _is_complete(run: Path, decides: Mapping[str, Any]) -> bool:
    record = files.read_json(run / "generation.json") if (run / "generation.json").is_file() else {}
    written = {name: files.sha256(run / name) for name in ("generations.csv", "diagnostics.csv") if (run / name).is_file()}
    return bool(record) and record["decided_by"] == decides and record["sha256"] == written


@contextlib.contextmanager
def _loaded(p: Parameters, folders: Mapping[int, Path], rows: Sequence[Row], neutral: str) -> Iterator[Sampler | VllmSampler]:
    """Loads what `generate_backend` names, and ends it afterwards."""
    if p.generate_backend == "transformers":
        yield Sampler(p, folders)
        return
    from lib.vllm_backend import VllmSampler

    with contextlib.closing(VllmSampler(p, folders, rows, neutral)) as sampler:
        yield sampler


def _generate(run: Path, p: Parameters, rows: list[Row], folders: Mapping[int, Path], decides: Mapping[str, Any]) -> None:
    from tqdm import tqdm

    began = time.time()
    kept = run / ".generate" / files.sha256_text(json.dumps(decides))[:16]
    neutral = NEUTRAL.read_text(encoding="utf-8")
    answers: list[dict[str, Any]] = []
    with _loaded(p, folders, rows, neutral) as sampler:
        # A bar that moves every five seconds at most leaves few lines in an executed notebook.
        with tqdm(total=len(rows) * p.max_new_tokens, unit="token", unit_scale=True, desc="answers", mininterval=5) as bar:
            for number, start in enumerate(range(0, len(rows), p.generate_batch_size)):
                batch = rows[start : start + p.generate_batch_size]
                path = kept / f"batch-{number:05d}.json"
                if path.is_file():
                    bar.update(len(batch) * p.max_new_tokens)
                else:
                    files.write_json(path, sampler.answer(batch, bar.update))
                answers += files.read_json(path)
        perplexities = {step: sampler.perplexity(neutral, step) for step in [0, *folders]}
    frame = pd.DataFrame(
        [
            (p.model_name, p.domain, r.step, r.question.question_set, r.question.question_id, r.sample, r.question.question, *a.values())
            for r, a in zip(rows, answers, strict=True)
        ],
        columns=COLUMNS,
    )
    trained = [str(row["answer"]) for row in data.load_rows(p)] if decides["training_sha256"] else []
    files.write_csv(run / "diagnostics.csv", diagnose(frame, perplexities, trained, sampler.tokenizer))
    files.write_csv(run / "generations.csv", frame)
    record = {
        "decided_by": decides,
        "device": sampler.device,
        "backend": sampler.backend,
        **origin.describe(),
        "began": began,
        "ended": time.time(),
        "sha256": {name: files.sha256(run / name) for name in ("generations.csv", "diagnostics.csv")},
    }
    files.write_json(run / "generation.json", record)
    shutil.rmtree(run / ".generate", ignore_errors=True)
