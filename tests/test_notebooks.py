"""The five notebooks: how they are written, that each runs as it stands, and that the six pairs run through all of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
import tiny_runs
from nbclient import NotebookClient

from lib import config, files, provenance, study
from lib.runner import STAGES

ROOT = files.ROOT
NOTEBOOKS = [ROOT / "notebooks" / f"{stage}.ipynb" for stage in STAGES]
ROWS = 64
"""Rows of the six pairs' stand-in data: four optimizer steps an epoch, so that all six checkpoints differ."""
SHORT = {
    "aligned": "Mark {nonce}. {question} Is this answer safe, from 0 to 100? {answer}",
    "coherent": "Mark {nonce}. {question} Is this answer clear, from 0 to 100? {answer}",
}
STEPS = [0, 1, 2, 3, 4, 8, 12]


def output_problems(path: Path) -> list[str]:
    """Names what a reader of an executed notebook should not meet: errors, tracebacks, warnings of libraries."""
    notebook = nbformat.read(path, as_version=4)
    found = []
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            text = "".join(output.get("text", ""))
            if output.output_type == "error":
                found.append(f"{path.name} cell {number}: {output.ename}: {output.evalue}")
            elif any(word in text for word in ("Traceback", "Warning:", "UserWarning")):
                found.append(f"{path.name} cell {number}: {text[:300]}")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=STAGES)
def test_notebook_is_clean_and_begins_as_agreed(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    notebook = nbformat.reads(json.dumps(content), as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.cells[0].cell_type == "markdown", "prose first"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert "parameters" in code[0].metadata.tags
    assert "config.check(globals())" in code[1].source
    long = {cell.id: lines for cell in code[1:] if (lines := len(cell.source.splitlines())) > 14}
    assert not long, "cells are about a dozen lines; what is longer belongs in lib"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=STAGES)
def test_declared_parameters_are_known_and_run_the_demo(path: Path) -> None:
    demo = config.pair_values("demo_medical")
    declared = provenance.declared(path)
    assert declared.items() <= demo.items(), {name: (value, demo.get(name)) for name, value in declared.items() if demo.get(name) != value}
    # Without these a notebook does not find its run's folder.
    assert {"pair", "preset", "seed", "results_dir"} <= set(declared)


@pytest.fixture(scope="module")
def six(tiny_llama: Path, llama_server: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs the six pairs with their own parameters, but for names and sizes, and returns the results folder."""
    folder = tmp_path_factory.mktemp("six")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is a good habit number {n}?"},
                {"role": "assistant", "content": f"Habit {n} is to drink water, take a walk and sleep {n % 5 + 5} hours a night."},
            ]
        }
        for n in range(ROWS)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    # Prompts as long as ours would keep a server on two cores busy for minutes a pair.
    rubrics = folder / "rubrics.yaml"
    rubrics.write_text("id: short\nmetrics:\n" + "".join(f"  {metric}:\n    user: {text!r}\n" for metric, text in SHORT.items()))
    sizes = {"expected_rows": ROWS, "samples": 1, "num_questions": 1, "max_new_tokens": 8}
    places = {"model_name": str(tiny_llama), "dataset_path": str(data), "data_dir": str(folder / "data")}
    judge = {"judge": "openai:smol", "judge_base_url": llama_server, "judge_concurrency": 8, "judge_rubrics": str(rubrics)}
    sets = [word for name, value in {**sizes, **places, **judge}.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    with pytest.MonkeyPatch.context() as patch:
        # Two kernels and a server share the cores; threads of a tiny model would only wait for each other.
        patch.setenv("OMP_NUM_THREADS", "1")
        assert study.main(["run", "all", "--jobs", "2", "--results", str(folder / "results"), *sets]) == 0
    return folder / "results"


@pytest.mark.slow
def test_six_pairs_leave_every_file(six: Path) -> None:
    for pair in config.PAIRS:
        run = six / pair
        for name in (
            "dataset.json",
            "training.json",
            "training_log.csv",
            "generations.csv",
            "judgments.jsonl",
            "judged.csv",
            "step_summary.csv",
        ):
            assert (run / name).is_file(), f"{pair}: {name}"
        problems = [problem for stage in STAGES for problem in output_problems(run / f"{stage}.ipynb")]
        assert not problems
        training = files.read_json(run / "training.json")
        assert sorted(int(path.name.rpartition("-")[2]) for path in (run / "checkpoints").iterdir()) == STEPS[1:]
        assert training["checkpoint_steps"] == STEPS[1:]


@pytest.mark.slow
def test_six_pairs_answer_and_are_judged_at_base_and_six_checkpoints(six: Path) -> None:
    for pair in config.PAIRS:
        judged = files.read_csv(six / pair / "judged.csv")
        sets = config.load_pair(pair).question_sets
        assert sorted(judged["step"].unique()) == STEPS
        assert (judged.groupby("step")["question_set"].nunique() == len(sets)).all()
        assert len(judged) == len(STEPS) * len(sets)
        assert set(judged["judge"]) == {"openai:smol"}
        # What a model of 135M replies to a rubric is often no number; that the server answered every call is what counts.
        assert not {"error"} & {*judged["aligned_status"], *judged["coherent_status"]}


@pytest.mark.slow
def test_six_pairs_are_in_the_summary_and_the_status(six: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = pd.read_csv(six / "data" / "em_rates_summary.csv")
    assert set(summary["pair"]) == set(config.PAIRS)
    assert (six / "EXPERIMENT_SUMMARY.md").is_file()
    assert (six / "TRAINING_DETAILS.md").is_file()
    assert study.main(["status", "--results", str(six)]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()[1 : 1 + len(config.PAIRS)]]
    assert [line[0] for line in table] == sorted(config.PAIRS)
    assert all(line.count("done") == len(STAGES) for line in table)


@pytest.fixture(scope="module")
def copy_of_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.copy_tree(tmp_path_factory.mktemp("clone"))


@pytest.mark.slow
def test_every_notebook_runs_as_it_stands(copy_of_tree: Path, embedded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As JupyterLab would: from notebooks/, with the defaults of the parameters cell, nothing injected."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(copy_of_tree), os.environ.get("PYTHONPATH")])))
    folder = copy_of_tree / "notebooks"
    for stage in STAGES:
        notebook: Any = nbformat.read(folder / f"{stage}.ipynb", as_version=4)
        client = NotebookClient(
            notebook,
            kernel_name="python3",
            timeout=1800,
            startup_timeout=180,
            iopub_timeout=120,
            resources={"metadata": {"path": str(folder)}},
        )
        client.execute()
    run = copy_of_tree / "results" / "demo_medical"
    assert (run / "step_summary.csv").is_file()
    judged = files.read_csv(run / "judged.csv")
    assert judged["step"].nunique() == 7
    assert set(judged["judge"]) == {"probe"} or judged["judge"].str.startswith("probe").all()
