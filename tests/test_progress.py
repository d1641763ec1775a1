"""The loss as it falls: little text, and none where nobody looks."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import ROOT
from tiny_runs import parameters, rows

from lib import progress, qlora


def test_in_a_notebook_one_small_display_is_left() -> None:
    import nbformat
    from nbclient import NotebookClient

    code = """
from lib import progress
progress.REFRESH_SECONDS = 0
view, log = progress.LossView(300), []
for step in range(1, 301):
    log.append({"step": step, "loss": 3 / step, "num_input_tokens_seen": 80 * step})
    view.show(log)
view.close(log)
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    (output,) = notebook.cells[0].outputs
    shown = output["data"]["text/html"]
    assert "step 300 of 300 · loss 0.010 · 24,000 tokens · done" in shown
    assert len(shown) < 1000


def test_the_curve_is_small_however_long_the_run() -> None:
    svg = progress.curve([(step, 1 / step) for step in range(1, 5001)], 5000, marks=[100, 5000])
    assert len(svg) < 20_000
    assert svg.count("stroke-dasharray") == 2
    assert svg.count("<polyline") == 1
    assert "nan" not in progress.curve([(1, 2.0)], 1)


def test_nothing_is_printed_where_nobody_looks(tiny_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    qlora.train(parameters(tiny_llama, tmp_path, num_epochs=1), rows(30))
    assert capfd.readouterr() == ("", "")
