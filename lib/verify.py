"""Does a run still match what it was made from? Recomputes every hash that its stages recorded.

`study status` says which stages would run again; this says which file, setting or code is no longer what a run recorded, wherever the
record stands: .study/<stage>.json, dataset.json, training.json, generation.json, judgments.jsonl.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lib import config, files, origin, provenance, runner
from lib.config import Parameters
from lib.files import StudyError
from lib.runner import STAGES, Run

GONE = "gone"
_RECORDS = ("dataset.json", "training.json", "generation.json", "judgments.jsonl", "judged.csv")
_ANSWER = ["step", "question_set", "question_id", "sample", "question", "response"]


class Check(NamedTuple):
    """One thing looked at: which run, what, what its record says and what is found now (hashes in hex, settings as they read)."""

    run: str
    item: str
    recorded: str
    found: str


def folders(results: Path, names: Sequence[str] = ()) -> list[Path]:
    """Returns the runs under `results`, or those of the pairs or runs named.

    Raises:
        StudyError: nothing bears one of the names.
    """
    found = {path.parent for name in _RECORDS for path in results.glob(f"*/{name}")}
    found |= {path.parents[1] for path in results.glob("*/.study/*.json")}
    there = sorted(folder for folder in found if folder.name not in config.NO_RUNS)
    if not names:
        return there
    chosen: list[Path] = []
    for name in config.expand_pairs(list(names)):
        own = [folder for folder in there if name in {folder.name, _pair(folder)}]
        if not own:
            known = ", ".join(folder.name for folder in there) or "none"
            raise StudyError(f"{files.shown(results)}: no run of {name} (there: {known}).")
        chosen += own
    return list(dict.fromkeys(chosen))


def _pair(folder: Path) -> str | None:
    records = (provenance.read_record(folder, stage) for stage in STAGES)
    return next((record.get("pair") for record in records if record), None)


def checks(folder: Path, run: Run | None = None) -> list[Check]:
    """Compares all that a run recorded with what is there now.

    Args:
        folder: results/<run>/.
        run: the run with the parameters that its pair has now; None (its pair is gone) leaves out what only they can tell.

    Returns:
        What was looked at, each item once, in the order of the stages; one that holds has recorded == found. Empty for answers that
        were imported, of which nothing is recorded.
    """
    found: list[tuple[str, Any, Any]] = []
    if run is not None:
        found += [check for stage in STAGES for check in _stage(run, stage)]
    told = {name: _json(folder / name) for name in ("dataset.json", "training.json", "generation.json")}
    parameters = run.parameters if run is not None else _parameters(told["training.json"])
    for look in (_dataset, _training, _generation):
        found += _looked(look, folder, told, parameters)
    found += _looked(_judging, folder, told, parameters)
    named = [Check(folder.name, item, _text(recorded), _text(now)) for item, recorded, now in found]
    return list(dict.fromkeys(named))


def command(results: Path, names: Sequence[str], recorded: Mapping[str, Run | str]) -> int:
    """Does what `study verify` asks: prints what no longer matches.

    Args:
        results: the folder of the runs.
        names: pairs or runs; none takes all.
        recorded: by folder, the run with its present parameters, or a word on why there is none.

    Returns:
        1 where anything differs, else 0.
    """
    chosen = folders(results, names)
    found: list[Check] = []
    for folder in chosen:
        run = recorded.get(folder.name)
        if isinstance(run, str) and run != "imported":
            found.append(Check(folder.name, "parameters", "those of a pair", run))
        found += checks(folder, run if isinstance(run, Run) else None)
    wrong = [check for check in found if check.recorded != check.found]
    if wrong:
        print(table(wrong))
    print(f"{len(chosen)} runs, {len(found)} items looked at; no longer as recorded: {len(wrong)}")
    return 1 if wrong else 0


def _looked(look: Callable[..., Iterator[tuple[str, Any, Any]]], *given: Any) -> list[tuple[str, Any, Any]]:
    """Collects checks; a file that cannot be read is one that does not hold."""
    made: list[tuple[str, Any, Any]] = []
    try:
        for check in look(*given):
            made.append(check)
    except (StudyError, KeyError, TypeError, AttributeError, ValueError) as error:
        made.append((f"{look.__name__.removeprefix('_')}: record", "readable", f"{type(error).__name__}: {error}"))
    return made


def _text(value: Any) -> str:
    return GONE if value is None else value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _json(path: Path) -> dict[str, Any]:
    with contextlib.suppress(StudyError):
        content = files.read_json(path)
        return content if isinstance(content, dict) else {}
    return {}


def _parameters(training: dict[str, Any]) -> Parameters | None:
    with contextlib.suppress(StudyError):
        return config.validate(training["parameters"], "training.json") if "parameters" in training else None
    return None


def _sha(path: Path) -> str | None:
    return files.sha256(path) if path.is_file() else None


def _stage(run: Run, stage: str) -> Iterator[tuple[str, Any, Any]]:
    """Compares a stage's record: parameters, code, what it read, what it wrote, and what fixed its libraries."""
    record = provenance.read_record(run.folder, stage)
    if record is None or record["status"] != "done":
        return
    now = {n: json.dumps(v) for n, v in run.values(stage).items() if n != "results_dir"}
    old = {n: json.dumps(v) for n, v in record["parameters"].items()}
    yield from ((f"parameter {n}", old.get(n, "not recorded"), now.get(n, GONE)) for n in sorted({*old} | {*now}))
    code = provenance.code_hashes(run.notebook(stage))
    yield from ((f"code of {n}", record["code"].get(n, "not recorded"), code.get(n)) for n in sorted({*record["code"], *code}))
    read = runner.input_stamps(run, stage)
    for name in sorted({*record["inputs"], *read}):
        was, found = record["inputs"].get(name, {}).get("sha256"), read.get(name, {}).get("sha256")
        yield f"{stage} read {name}", "absent" if was is None else was, "absent" if found is None else found
    written = runner.outputs(run, stage)
    yield from ((name, stamp["sha256"], _sha(written.get(name, run.folder / name))) for name, stamp in record["outputs"].items())
    yield from _lock(record)


def _lock(record: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    told, now = record.get("origin", record).get("lock"), origin.lock()
    if told:
        yield told["file"], told["sha256"], now["sha256"] if now and now["file"] == told["file"] else None


def _dataset(folder: Path, told: dict[str, dict[str, Any]], p: Parameters | None) -> Iterator[tuple[str, Any, Any]]:
    record = told["dataset.json"]
    if not record:
        return
    yield f"training rows {record['path']}", record["sha256"], _sha(files.resolve(record["path"]))
    source = record["source"]
    if "://" not in source["file"]:
        yield f"data source {source['file']}", source["sha256"], _sha(files.resolve(source["file"]))
    for name, group in record["question_sets"].items():
        entries = [entry for entry in (p.question_sets if p else [name]) if Path(entry).stem == name]
        path = files.resolve(entries[0]) if entries and Path(entries[0]).suffix else config.PARAMETERS / "questions" / f"{name}.yaml"
        yield f"questions {name}", group["sha256"], _sha(path)
    yield from _lock(record)


def _training(folder: Path, told: dict[str, dict[str, Any]], p: Parameters | None) -> Iterator[tuple[str, Any, Any]]:
    from lib import adapters, data, states

    record, dataset = told["training.json"], told["dataset.json"]
    if not record:
        return
    for step, sha in record["adapters"].items():
        name = f"checkpoints/checkpoint-{step}/{adapters.WEIGHTS}"
        yield name, sha, _sha(folder / name)
    if "log_sha256" in record:
        yield "training_log.csv", record["log_sha256"], _sha(folder / "training_log.csv")
    for step in sorted(set(map(str, states.checkpoints(folder))) - set(record["adapters"])):
        yield f"checkpoints/checkpoint-{step}/{adapters.WEIGHTS}", "not recorded", "there"
    if dataset and record["dataset_sha256"]:
        yield "training.json: dataset_sha256", record["dataset_sha256"], dataset["sha256"]
    trained = _parameters(record)
    if trained is None:
        yield "training.json: parameters", "as trained", "no longer valid parameters"
    elif dataset and files.resolve(dataset["path"]).is_file():
        rows = data.read_rows(files.resolve(dataset["path"]))[0][: trained.sample_size]
        yield "training.json: rows trained on", record["fingerprint"]["rows_sha256"], states.fingerprint(trained, rows)["rows_sha256"]
    yield from _lock(record)


def _generation(folder: Path, told: dict[str, dict[str, Any]], p: Parameters | None) -> Iterator[tuple[str, Any, Any]]:
    from lib import adapters, data, generate

    record = told["generation.json"]
    if not record:
        return
    decided = record["decided_by"]
    yield from ((name, sha, _sha(folder / name)) for name, sha in record["sha256"].items())
    for step, (settings, weights) in decided["checkpoints"].items():
        for name, sha in ((adapters.SETTINGS, settings), (adapters.WEIGHTS, weights)):
            yield f"checkpoints/checkpoint-{step}/{name}", sha, _sha(folder / f"checkpoints/checkpoint-{step}" / name)
    if decided["training_sha256"]:
        yield "generation.json: training_sha256", decided["training_sha256"], told["dataset.json"].get("sha256")
    yield "parameters/neutral.txt", decided["neutral_sha256"], _sha(generate.NEUTRAL)
    if p is not None:
        yield "generation.json: questions asked", decided["questions_sha256"], generate.questions_sha256(data.load_questions(p))
    yield from _lock(record)


def _judging(folder: Path, told: dict[str, dict[str, Any]], p: Parameters | None) -> Iterator[tuple[str, Any, Any]]:
    """Compares the rubrics that each judge was last asked with, and the answers that were judged with those generated."""
    last: dict[tuple[str, str], str] = {}
    for line in files.read_jsonl(folder / "judgments.jsonl"):
        last[line["judge"], line["metric"]] = line["rubric_sha256"]
    if p is not None and last:
        from lib import probe, rubrics

        asked = {metric: rubric.sha256 for metric, rubric in rubrics.load(p.judge_rubrics).items()}
        weights = _sha(probe.FOLDER / probe.WEIGHTS)
        for (judge, metric), sha in last.items():
            yield f"rubric of {judge} for {metric}", sha, weights if judge == "probe" else asked.get(metric)
    if (folder / "generations.csv").is_file() and (folder / "judged.csv").is_file():
        answers, judged = files.read_csv(folder / "generations.csv"), files.read_csv(folder / "judged.csv")
        given = _answers_hash(answers)
        for name in judged["judge"].unique():
            yield f"answers that {name} judged", given, _answers_hash(judged[judged["judge"] == name])


def _answers_hash(frame: Any) -> str:
    rows = frame[_ANSWER].astype(str).sort_values(_ANSWER).to_numpy().tolist()
    return files.sha256_text(json.dumps(rows))


def table(found: Sequence[Check]) -> str:
    """Writes checks as lines of run, item, recorded and found; hashes are cut to twelve digits."""
    lines = [("run", "item", "recorded", "found"), *((c.run, c.item, _short(c.recorded), _short(c.found)) for c in found)]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join("  ".join([*(word.ljust(width) for word, width in zip(line, widths, strict=False)), line[3]]) for line in lines)


def _short(value: str) -> str:
    plain = " ".join(value.split())
    is_hash = len(plain) == 64 and set(plain) <= set("0123456789abcdef")
    return plain[:12] if is_hash else plain if len(plain) <= 60 else plain[:59] + "…"
