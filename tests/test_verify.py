"""`study verify`: a run that is as it was recorded passes, and every kind of change to what it was made from is named."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import faulty_server
import pytest
import tiny_runs
from conftest import ROOT

from lib import analyze, config, data, files, generate, judge, origin, provenance, qlora, runner, study, verify
from lib.config import Parameters
from lib.files import StudyError
from lib.runner import STAGES, Run

RUBRICS, ROWS = "rubrics.yaml", "data"


def stages(p: Parameters) -> None:
    data.prepare(p)
    qlora.train(p, data.load_rows(p), progress=False)
    generate.generate(p)
    judge.judge_run(p)
    analyze.analyze_run(p)


def recorded(run: Run) -> None:
    """Writes the records that `study run` would, without five kernels."""
    for stage in STAGES:
        record = {
            **{"status": "done", "stage": stage, "pair": run.parameters.pair, "preset": None, "overrides": run.overrides},
            **{"notebooks": "notebooks", "started": provenance.now(), "ended": provenance.now(), "unfinished": [], "seconds": 1},
            **{"parameters": {n: v for n, v in run.values(stage).items() if n != "results_dir"}, "origin": origin.describe()},
            **{"code": provenance.code_hashes(run.notebook(stage)), "inputs": runner.input_stamps(run, stage)},
            "outputs": provenance.stamps(runner.outputs(run, stage)),
        }
        provenance.write_record(run.folder, stage, record)


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    shutil.copy(config.PARAMETERS / "questions" / "general.yaml", folder / "general.yaml")
    shutil.copy(config.PARAMETERS / "rubrics" / "default.yaml", folder / RUBRICS)
    return folder


@pytest.fixture(scope="module")
def run(made: Path, tiny_llama: Path) -> Run:
    with faulty_server.serving() as server:
        overrides = {
            **{"model_name": str(tiny_llama), "results_dir": str(made / "results"), "data_dir": str(made / ROWS), "device": "cpu"},
            **{"data_rows": 16, "sample_size": 16, "batch_size": 8, "samples": 1, "num_questions": 2, "max_new_tokens": 4},
            **{"question_sets": [str(made / "general.yaml")], "judge_rubrics": str(made / RUBRICS), "extra_checkpoints": []},
            **{"judge": "openai:gpt", "judge_base_url": server.url},
        }
        (found,) = runner.plan(["demo_medical"], overrides=overrides)
        stages(found.parameters)
    recorded(found)
    return found


def wrong(run: Run) -> list[str]:
    return [check.item for check in verify.checks(run.folder, run) if check.recorded != check.found]


def test_an_untouched_run_matches_in_every_item(run: Run) -> None:
    looked = verify.checks(run.folder, run)
    assert [check for check in looked if check.recorded != check.found] == []
    items = " ".join(check.item for check in looked)
    for what in (
        *("training rows ", "data source parameters/demo/patterns.yaml", "questions general", "checkpoint-2/adapter_model.safetensors"),
        *(
            "training.json: rows trained on",
            "generation.json: questions asked",
            "parameters/neutral.txt",
            "rubric of openai:gpt for aligned",
        ),
        *("answers that openai:gpt judged", "generations.csv", "judged.csv", "step_summary.csv", "code of lib/qlora.py", "parameter seed"),
        origin.LOCKS[1] if not (ROOT / origin.LOCKS[0]).is_file() else origin.LOCKS[0],
    ):
        assert what in items, what


def flip(path: Path) -> None:
    """Changes one byte, at the same length and time: a stamp by size and time would not notice."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    import os

    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


CHANGES: dict[str, tuple[Callable[[Run, Path], object], str]] = {
    "adapter": (lambda run, _: flip(run.folder / "checkpoints/checkpoint-1/adapter_model.safetensors"), "checkpoint-1/adapter_model"),
    "adapter gone": (lambda run, _: shutil.rmtree(run.folder / "checkpoints/checkpoint-1"), "checkpoint-1/adapter_model"),
    "settings of an adapter": (lambda run, _: flip(run.folder / "checkpoints/checkpoint-1/adapter_config.json"), "adapter_config.json"),
    "answers": (lambda run, _: flip(run.folder / "generations.csv"), "generations.csv"),
    "scores": (lambda run, _: flip(run.folder / "judged.csv"), "judged.csv"),
    "rates": (lambda run, _: flip(run.folder / "step_summary.csv"), "step_summary.csv"),
    "rows": (lambda _, made: flip(next((made / ROWS).rglob("train-*.jsonl"))), "training rows "),
    "questions": (lambda _, made: rewrite(made / "general.yaml", "?", "??"), "generation.json: questions asked"),
    "rubrics": (lambda _, made: rewrite(made / RUBRICS, "aligned", "Aligned "), "judge_rubrics"),
}


def rewrite(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_change_is_named(run: Run, made: Path, tmp_path: Path, change: str) -> None:
    kept = shutil.copytree(made, tmp_path / "kept")
    act, item = CHANGES[change]
    try:
        act(run, made)
        assert any(item in found for found in wrong(run)), wrong(run)
    finally:
        shutil.rmtree(made)
        shutil.copytree(kept, made)
    assert wrong(run) == []


def test_other_parameters_and_other_code_are_named(run: Run) -> None:
    other = Run(run.parameters.model_copy(update={"samples": 3}), run.notebooks, None, run.overrides)
    assert wrong(other) == ["parameter samples"]
    record = provenance.read_record(run.folder, "02_train")
    assert record is not None
    old = {**record, "code": {**record["code"], "lib/qlora.py": "0" * 64}}
    provenance.write_record(run.folder, "02_train", old)
    assert wrong(run) == ["code of lib/qlora.py"]
    provenance.write_record(run.folder, "02_train", record)


def test_every_stage_records_what_made_it(run: Run) -> None:
    for name in ("dataset.json", "training.json", "generation.json"):
        record = files.read_json(run.folder / name)
        assert record["began"] <= record["ended"]
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        assert record["git_commit"] == (commit or None)
        assert record["versions"]["torch"]
        assert record["lock"]["sha256"] == files.sha256(ROOT / record["lock"]["file"])
    assert files.read_json(run.folder / "generation.json")["decided_by"]["parameters"]["seed"] == 42
    assert files.read_json(run.folder / "dataset.json")["seed"] == 42


def test_the_commands_table_and_status(run: Run, made: Path) -> None:
    words = [sys.executable, "-m", "lib.study", "verify", "--results", str(made / "results")]
    whole = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert whole.stdout.endswith("no longer as recorded: 0\n")
    summary = run.folder / "step_summary.csv"
    kept = summary.read_bytes()
    summary.unlink()
    torn = subprocess.run([*words, "demo_medical"], cwd=ROOT, capture_output=True, text=True)
    summary.write_bytes(kept)
    assert torn.returncode == 1
    head, line, last = torn.stdout.splitlines()
    assert head.split() == ["run", "item", "recorded", "found"]
    assert line.split() == ["demo_medical", "step_summary.csv", files.sha256(summary)[:12], "gone"]
    assert last.endswith("no longer as recorded: 1")


def test_an_unknown_run_is_a_wrong_call_and_imported_answers_have_nothing_to_check(tmp_path: Path) -> None:
    (tmp_path / "imported").mkdir()
    (tmp_path / "imported" / "judged.csv").write_text("question,response,aligned,coherent\n")
    assert study.main(["verify", "--results", str(tmp_path)]) == 0
    assert study.main(["verify", "8b_medical", "--results", str(tmp_path)]) == 2
    with pytest.raises(StudyError, match=r"no run of 8b_medical \(there: imported\)"):
        verify.folders(tmp_path, ["8b_medical"])


def test_a_record_that_cannot_be_read_is_named_not_a_crash(run: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run.folder, tmp_path / "results" / run.folder.name))
    shutil.rmtree(folder / ".study")
    record = files.read_json(folder / "training.json")
    del record["adapters"]
    files.write_json(folder / "training.json", record)
    found = [check for check in verify.checks(folder) if check.recorded != check.found]
    assert [check.item for check in found] == ["training: record"]


def test_tiny_runs_without_study_records_are_checked_by_their_own_files(tiny_llama: Path, tmp_path: Path) -> None:
    _, folder = tiny_runs.train_undisturbed(tiny_llama, tmp_path)
    looked = verify.checks(folder)
    assert {check.item for check in looked} >= {f"checkpoints/checkpoint-{s}/adapter_model.safetensors" for s in (1, 3, 5, 7, 14)}
    assert all(check.recorded == check.found for check in looked)
