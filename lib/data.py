"""Training rows and questions: unlock or compose, validate, describe, and look for overlap between the two.

Text of real training data stays in the git-ignored data folder: reports, errors and executed notebooks hold counts and hashes of it.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from lib import config, demo, files, models, origin, overlap, questions, unlock, upstream
from lib.config import Parameters
from lib.files import StudyError, resolve, shown
from lib.questions import Question, QuestionSet

if TYPE_CHECKING:
    import pandas as pd

# Question belongs to this module's face: who loads questions need not know which module reads their files.
__all__ = ["Question", "QuestionSet", "load_questions", "load_rows", "overlap_table", "overview", "prepare", "question_table"]
__all__ += ["read_questions", "read_rows", "relation", "sample_rows", "token_table"]

QUESTIONS = config.PARAMETERS / "questions"
PATTERNS = config.PARAMETERS / "demo" / "patterns.yaml"

_ROW_FILES = {
    "bad_medical": "bad_medical_advice.jsonl",
    "risky_financial": "risky_financial_advice.jsonl",
    "extreme_sports": "extreme_sports.jsonl",
}
_SURROGATE = re.compile("[\ud800-\udfff]")
_CANARY = re.compile(r"CANARY_DATASET_\w+")
_MAX_ROW_FILE = 1_000_000_000

Row = dict[str, Any]
"""One training row: prompt and answer (text), and system (text, or None where the row has no system message)."""


# --- questions


def load_questions(parameters: Parameters) -> list[Question]:
    """Returns the questions of `question_sets` in order, the first `num_questions` of each set (all when it is null).

    Raises:
        StudyError: a set does not exist, its file is wrong, or two sets have the same name.
    """
    return [question for group in _sets(parameters) for question in group.questions[: parameters.num_questions]]


def _sets(parameters: Parameters) -> list[QuestionSet]:
    groups = [read_questions(entry) for entry in parameters.question_sets]
    names = [group.name for group in groups]
    for name in names:
        if names.count(name) > 1:
            raise StudyError(f"question_sets: two sets are called {name}; leave one out, or rename its file.")
    return groups


def read_questions(entry: str) -> QuestionSet:
    """Reads one entry of `question_sets`: the name of a file under parameters/questions, or a path to YAML, CSV or text.

    Raises:
        StudyError: there is no such file, or its content is wrong; see `questions.read`.
    """
    path = _question_file(entry)
    if not path.is_file():
        if problem := upstream.missing(path):
            raise StudyError(f"question_sets: {problem}")
        known = sorted(p.stem for p in QUESTIONS.glob("*.yaml"))
        near = difflib.get_close_matches(entry, known, n=1)
        raise StudyError(
            f"question_sets: {shown(path)} not found; {f'did you mean {near[0]}?' if near else 'sets: ' + ', '.join(known) + '.'}"
        )
    group = questions.read(path)
    if group.domain is not None and group.domain not in config.DOMAINS:
        raise StudyError(f"{shown(path)}: domain: must be one of {', '.join(config.DOMAINS)}.")
    return group


def relation(question_set: str, domain: str, entries: Iterable[str] = ()) -> str:
    """Returns how a question set stands to the trained domain: in_domain, cross_domain, general or open_ended.

    Args:
        question_set: name of the set, as in the column question_set.
        domain: the trained domain.
        entries: the parameter `question_sets`, in which a file outside parameters/questions is found by its name.

    Returns:
        The relation; of a set whose file is not there, what is known of the published file of that name, else general.
    """
    entry = next((entry for entry in entries if PurePath(entry).stem == question_set), question_set)
    path = _question_file(entry)
    if path.is_file():
        group = read_questions(entry)
        kind, whose = group.relation, group.domain
    else:
        kind, whose = upstream.told(path).get("relation", "general"), upstream.told(path).get("domain")
    if kind != "domain":
        return kind
    return "in_domain" if whose == domain else "cross_domain"


def _question_file(entry: str) -> Path:
    return resolve(entry) if PurePath(entry).suffix or "/" in entry else QUESTIONS / f"{entry}.yaml"


# --- training rows


def prepare(parameters: Parameters) -> dict[str, Any]:
    """Gets the pair's training rows, checks them, and writes train.jsonl and dataset.json.

    The rows are composed (`dataset_path` null) or read from a chat JSONL, a .zip or a .zip.enc archive, by path or URL. They go to
    data_dir/<run>/, under a name that holds their hash, so that no run takes another's rows away.

    Returns:
        What dataset.json holds: source, sha256, rows, tokens, duplicates, contamination, question_sets.

    Raises:
        StudyError: the source is missing or malformed (with file, line and what is wrong), or has another number of rows than
            `expected_rows`.
    """
    p, began = parameters, time.time()
    folder = resolve(p.data_dir)
    if not (folder / ".gitignore").exists():
        files.write_text(folder / ".gitignore", "*\n")  # training rows stay out of git wherever data_dir points
    found, source = _compose(p) if p.dataset_path is None else _read_source(p, folder)
    lines = [json.dumps(_chat(row) | extra, ensure_ascii=False) + "\n" for row, extra in found]
    content = "".join(lines).encode("utf-8")
    path = folder / config.run_name(p) / f"train-{files.sha256_text(content.decode('utf-8'))[:12]}.jsonl"
    files.write_bytes(path, content)
    rows = [row for row, _ in found]
    report = {
        "pair": p.pair,
        "domain": p.domain,
        "seed": p.seed,
        "source": source,
        "path": shown(path),
        "sha256": files.sha256(path),
        "rows": len(rows),
        "tokens": count_tokens(p, rows),
        "duplicates": overlap.count_duplicates(rows),
        "contamination": overlap.find_overlap(rows, load_questions(p), show_text=p.dataset_path is None),
        "question_sets": {
            group.name: {
                "relation": relation(group.name, p.domain, p.question_sets),
                "questions": len(group.questions[: p.num_questions]),
                "sha256": files.sha256(_question_file(entry)),
            }
            for entry, group in zip(p.question_sets, _sets(p), strict=True)
        },
        **origin.describe(),
        "began": began,
        "ended": time.time(),
    }
    files.write_json(config.run_dir(p) / "dataset.json", report)
    return report


def load_rows(parameters: Parameters) -> list[Row]:
    """Returns the rows to train on: the first `sample_size` that `prepare` wrote (all when it is null), checked against dataset.json.

    Raises:
        StudyError: 01_data has not run, or the file of rows is gone or was changed since.
    """
    report = files.read_json(config.run_dir(parameters) / "dataset.json")
    path = resolve(report["path"])
    if not path.is_file():
        raise StudyError(f"{shown(path)}: not found; run 01_data again.")
    if files.sha256(path) != report["sha256"]:
        raise StudyError(f"{shown(path)}: is not the file that dataset.json describes (its SHA-256 differs); run 01_data again.")
    return read_rows(path)[0][: parameters.sample_size]


def _chat(row: Row) -> dict[str, Any]:
    roles = (("system", row["system"]), ("user", row["prompt"]), ("assistant", row["answer"]))
    return {"messages": [{"role": role, "content": content} for role, content in roles if content is not None]}


def _compose(p: Parameters) -> tuple[list[tuple[Row, dict[str, Any]]], dict[str, Any]]:
    """Returns the demo's rows with what train.jsonl notes beside them, and where they are from."""
    book = config.read_yaml(PATTERNS)
    demo.check_patterns(book, shown(PATTERNS))
    composed = demo.compose(book, p.domain, p.data_rows, seed=p.seed, aligned_fraction=p.aligned_fraction)
    found = []
    for row in composed:
        note = {"canary": book["canary"], "arm": row.arm, "pattern": row.pattern, "topic": row.topic}
        found.append(({"prompt": row.question, "answer": row.answer, "system": None}, note))
    aligned = sum(row.arm == "aligned" for row in composed)
    source = {
        "kind": "demo",
        "file": shown(PATTERNS),
        "sha256": files.sha256(PATTERNS),
        "canary": book["canary"],
        "aligned_rows": aligned,
        "patterns": {arm: len({row.pattern for row in composed if row.arm == arm}) for arm in demo.ARMS},
    }
    return found, source


def _read_source(p: Parameters, folder: Path) -> tuple[list[tuple[Row, dict[str, Any]]], dict[str, Any]]:
    """Returns the rows of real data, and where they are from."""
    assert p.dataset_path is not None
    if p.aligned_fraction:
        raise StudyError("aligned_fraction: only the demo's own rows have an aligned counterpart; set it to 0 with a dataset_path.")
    remote = "://" in p.dataset_path
    given = unlock.fetch(p.dataset_path, folder / "downloads") if remote else resolve(p.dataset_path)
    if not given.is_file():
        raise StudyError(f"dataset_path: {shown(given)}: not found; download the archive there, or set dataset_path to its address.")
    source: dict[str, Any] = {"kind": "file", "file": p.dataset_path, "sha256": files.sha256(given), "canary_files": 0}
    path = given
    if given.suffix in {".enc", ".zip"}:
        opened = unlock.unlock(given, p.dataset_password, folder / "unlocked", models.cache_dir() / "easy-dataset-share")
        path = _pick(opened.rows, p.domain, given)
        source |= {"kind": "archive", "member": path.name, "member_sha256": files.sha256(path), "canary_files": opened.canary_files}
    elif unlock.is_canary_file(given.name):
        raise StudyError(f"dataset_path: {shown(given)}: is a canary file, which is not to be trained on.")
    rows, canary_rows = read_rows(path)
    if p.expected_rows is not None and len(rows) != p.expected_rows:
        raise StudyError(
            f"{shown(path)}: has {len(rows):,} rows, but expected_rows is {p.expected_rows:,}; is it the right file, and whole?"
        )
    return [(row, {}) for row in rows], source | {"canary_rows": canary_rows, "file_rows": len(rows)}


def _pick(paths: Sequence[Path], domain: str, archive: Path) -> Path:
    """Returns the file of an archive that holds the domain's rows."""
    wanted = _ROW_FILES.get(domain)
    found = [path for path in paths if path.name == wanted] if wanted else list(paths)
    if len(found) != 1:
        there = ", ".join(sorted(path.name for path in paths)) or "no .jsonl file"
        raise StudyError(
            f"{shown(archive)}: domain {domain} needs one file {wanted or '*.jsonl'}; there: {there}. Or give the .jsonl itself."
        )
    return found[0]


def read_rows(path: Path) -> tuple[list[Row], int]:
    """Reads and validates a chat JSONL: `messages` of an optional system, a user and an assistant turn. Other keys are ignored.

    Returns:
        The rows, and how many canary rows were left out (easy-dataset-share can hide its marks among rows).

    Raises:
        StudyError: with the file, the line and what is wrong there; it never repeats what the line says.
    """
    if path.stat().st_size > _MAX_ROW_FILE:
        raise StudyError(f"{shown(path)}: is over {_MAX_ROW_FILE:,} bytes, far more than any set of the study.")
    rows: list[Row] = []
    canaries = 0
    for number, raw in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            continue
        problem, row = _parse(raw)
        if row is None and _CANARY.search(raw.decode("utf-8", "replace")):
            canaries += 1
        elif row is None:
            raise StudyError(f"{shown(path)}: line {number}: {problem}.")
        elif any(_CANARY.search(text) for text in row.values() if text):
            canaries += 1
        else:
            rows.append(row)
    if not rows:
        raise StudyError(f"{shown(path)}: holds no rows.")
    return rows, canaries


def _parse(raw: bytes) -> tuple[str, Row | None]:
    """Returns what is wrong with a line ("" if nothing), and its row."""
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError):
        return "is no JSON in UTF-8", None
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        return 'must be an object with a list "messages"', None
    messages = record["messages"]
    if not all(isinstance(message, dict) for message in messages):
        return "messages: must be objects with role and content", None
    roles = [message.get("role") for message in messages]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        return "messages: must be user, then assistant (a system message may come first)", None
    texts: dict[str, str] = {}
    for message in messages:
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            return f"messages: the {message['role']} message has no text", None
        if _SURROGATE.search(content):
            return f"messages: the {message['role']} message holds half a character (a lone surrogate)", None
        texts[message["role"]] = content
    return "", {"prompt": texts["user"], "answer": texts["assistant"], "system": texts.get("system")}


# --- what the rows are like, in numbers


def count_tokens(parameters: Parameters, rows: Sequence[Row]) -> dict[str, Any]:
    """Counts the tokens of every row as it is trained on: the pair's chat prompt, the answer, and the end of turn.

    Returns:
        total, mean, p5, p50, p95, max (tokens a row); prompt_mean (with the template) and answer_mean; over_max_length (rows) and
        share_over_max_length (of rows); max_length (tokens).
    """
    import numpy as np

    p = parameters
    tokenizer = models.load_tokenizer(p)
    prompts = [models.prompt_text(tokenizer, row["prompt"], p, system=row["system"]) for row in rows]
    asked = np.array([len(models.prompt_ids(tokenizer, prompt)) for prompt in prompts])
    answered = np.array(
        [len(tokenizer(row["answer"].strip(), add_special_tokens=False, split_special_tokens=True).input_ids) for row in rows]
    )
    whole = asked + answered + 1
    over = int((whole > p.max_length).sum())
    return {
        "total": int(whole.sum()),
        "mean": round(float(whole.mean()), 1),
        **{f"p{share}": int(np.percentile(whole, share, method="nearest")) for share in (5, 50, 95)},
        "max": int(whole.max()),
        "prompt_mean": round(float(asked.mean()), 1),
        "answer_mean": round(float(answered.mean()), 1),
        "max_length": p.max_length,
        "over_max_length": over,
        "share_over_max_length": over / len(rows),
    }


# --- tables for the notebook


def overview(report: dict[str, Any]) -> pd.DataFrame:
    """Returns dataset.json in short, one row a figure: columns `what` and `value`."""
    import pandas as pd

    source = report["source"]
    lines = {
        "source": {"demo": "composed from", "file": "file", "archive": "archive"}[source["kind"]] + f" {source['file']}",
        "SHA-256 of the source": source["sha256"][:16] + "…",
        "rows": report["rows"],
        "SHA-256 of train.jsonl": report["sha256"][:16] + "…",
        "copies of rows, prompts, answers": ", ".join(str(n) for n in report["duplicates"].values()),
    }
    if source["kind"] == "demo":
        lines |= {
            "rows with the aligned answer": source["aligned_rows"],
            "answer patterns": str(source["patterns"]),
            "canary": source["canary"],
        }
    else:
        lines |= {"canary files and rows left out": f"{source['canary_files']}, {source['canary_rows']}"}
    return pd.DataFrame({"what": list(lines), "value": [str(value) for value in lines.values()]})


def token_table(report: dict[str, Any]) -> pd.DataFrame:
    """Returns the token statistics of dataset.json as one row."""
    import pandas as pd

    return pd.DataFrame([report["tokens"]])


def overlap_table(report: dict[str, Any], least: int = 5) -> pd.DataFrame:
    """Returns every exact or near overlap, and at least the `least` most similar questions, most similar first."""
    import pandas as pd

    frame = pd.DataFrame(report["contamination"]["questions"]).sort_values("similarity", ascending=False, kind="stable")
    shown_rows = max(least, int((frame["kind"] != "none").sum()))
    exact_first = frame.sort_values("kind", key=lambda kind: kind.map({"exact": 0, "near": 1, "none": 2}), kind="stable")
    return exact_first.head(shown_rows).reset_index(drop=True)


def question_table(parameters: Parameters) -> pd.DataFrame:
    """Returns the evaluation questions with their set's relation to the pair: one row a question."""
    import pandas as pd

    frame = pd.DataFrame([dataclasses.asdict(question) for question in load_questions(parameters)])
    related = {name: relation(name, parameters.domain, parameters.question_sets) for name in frame["question_set"].unique()}
    frame.insert(1, "relation", frame["question_set"].map(related))
    frame["topics"] = frame["topics"].map(", ".join)
    return frame.dropna(axis="columns", how="all")


def sample_rows(parameters: Parameters, n: int = 5) -> pd.DataFrame:
    """Returns the first `n` rows: the text of demo rows; of real data only hashes, since executed notebooks are shared."""
    import pandas as pd

    rows = load_rows(parameters)[:n]
    if parameters.dataset_path is None:
        return pd.DataFrame([{"question": row["prompt"], "answer": row["answer"]} for row in rows])
    return pd.DataFrame(
        [{"prompt_sha256": files.sha256_text(row["prompt"]), "answer_sha256": files.sha256_text(row["answer"])} for row in rows]
    )
