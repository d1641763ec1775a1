"""The report: one page that holds everything, fetches nothing, and shows what models wrote as text."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
from test_figures import make_answers, make_changes, make_rates

from lib import figures, report


def test_report_holds_summary_figures_and_every_answer_unharmed(tmp_path: Path) -> None:
    answers = make_answers(pairs=("demo_medical", "demo_risky"))
    answers.loc[0, "response"] = "</script><script>document.title = 'ran'</script>"
    answers.loc[1, ["aligned", "coherent", "aligned_status", "response"]] = [None, None, "refusal", "You should kill him."]
    rates = make_rates(answers)
    (tmp_path / "EXPERIMENT_SUMMARY.md").write_text(
        "# Experiment summary\n\n<img src=x onerror=alert(1)>\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"
    )
    drawn, pages = figures.all_figures(answers, rates, make_changes(rates), judge="probe")
    page = report.write(tmp_path, answers, drawn, pages).read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert 'content="noindex"' in page
    assert report.CANARY in page
    assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)\s*=\s*[\"']?http", page)
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "<td>1</td>" in page
    assert "<img src=x" not in page
    assert "<script>document.title" not in page
    assert "&lt;/script&gt;&lt;script&gt;document.title" in page
    assert "<details><summary>Speaks of self-harm or violence" in page
    assert all(f'id="{name}"' in page for name in drawn if name not in pages)
    assert page.count("plotly.js v") == 1
    assert "NaN" not in report.answers_table(answers).split("let dt_args")[1]


@pytest.mark.parametrize("rows", [0, 1])
def test_poor_studies_have_a_report_that_says_so(tmp_path: Path, rows: int) -> None:
    answers = make_answers().head(rows)
    page = report.write(tmp_path, answers, {}).read_text(encoding="utf-8")
    assert "No summary was written yet" in page
    assert ("No answers were judged yet" in page) == (rows == 0)


def test_a_study_without_rates_still_gets_its_report(tmp_path: Path) -> None:
    empty = make_answers().head(0)
    written = figures.write_all(tmp_path, empty, pd.DataFrame(columns=["judge"]))
    assert [path.name for path in written] == ["report.html"]


def test_a_hundred_kilobyte_line_is_cut_with_a_note() -> None:
    answers = make_answers().head(1).assign(response="y" * 100_000)
    table = report.answers_table(answers)
    assert "more characters]" in table
    assert "y" * 6500 not in table
