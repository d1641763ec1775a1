"""The response browser: filters that equal plain pandas, panes that differ, exports and HTML that hold no live text."""

from __future__ import annotations

import shutil
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import pandas as pd
import pytest
from test_figures import HOSTILE, make_answers

from lib import answer_index, browse, files, panes, scores, tables


@pytest.fixture(scope="module")
def answers() -> pd.DataFrame:
    frame = make_answers(pairs=("demo_medical", "demo_risky"))
    frame.loc[3, ["aligned", "coherent", "aligned_status", "coherent_status"]] = [np.nan, np.nan, "refusal", "refusal"]
    frame.loc[5, "response"] = "the needle in this haystack"
    return frame


@pytest.fixture
def browser(answers: pd.DataFrame, tmp_path: Path) -> browse.Browser:
    made = browse.browser(answers, tmp_path)
    assert isinstance(made, browse.Browser)
    return made


def test_filters_equal_plain_selection(answers: pd.DataFrame) -> None:
    index = answer_index.Index(answers)
    found = index.select(answer_index.Filters(run="demo_risky", step=50, question_set="general", low=20, high=60))
    general = answers[(answers["pair"] == "demo_risky") & (answers["step"] == 50) & (answers["question_set"] == "general")]
    plain = general[general["aligned"].between(20, 60)]
    assert found.tolist() == plain.index.tolist()
    assert len(found)


def test_label_course_keeps_what_the_paper_calls_misaligned() -> None:
    frame = make_answers(judge="openai:gpt-4o-mini")
    frame["aligned"] = 10.0
    index = answer_index.Index(frame)
    assert len(index.select(answer_index.Filters(label="course"))) == len(index.select(answer_index.Filters(label="paper"))) == len(frame)


def test_search_and_unscored_answers(answers: pd.DataFrame) -> None:
    index = answer_index.Index(answers)
    assert index.select(answer_index.Filters(text="  NEEDLE ")).tolist() == [5]
    assert index.select(answer_index.Filters(label="refusal")).tolist() == [3]
    assert 3 not in index.select(answer_index.Filters(low=1))
    assert index.select(answer_index.Filters(order="least aligned first"))[-1] == 3
    assert len(index.select(answer_index.Filters(text="nowhere at all"))) == 0


def test_next_previous_and_count(browser: browse.Browser, answers: pd.DataFrame) -> None:
    assert browser.step.value == 50, "the base beside the last step is seen first"
    browser.step.value = browse.ANY
    assert browser.count.value == f"of {len(answers)} found among {len(answers)}"
    assert browser.previous.disabled
    browser.next.click()
    assert browser.place.value == 2
    browser.previous.click()
    assert browser.place.value == 1
    browser.text.value = "needle"
    assert browser.count.value.startswith("of 1 found")
    assert browser.next.disabled
    browser.text.value = "nowhere at all"
    assert "No answer passes" in browser.asked.value
    browser.text.value = ""
    assert "step" in browser.right.value


def test_slider_follows_one_question_through_training(browser: browse.Browser) -> None:
    assert browser.shown.value == 50
    assert browser.beside.value == (None, 0)
    assert "base model (step 0)" in browser.left.value
    assert "≠ step 0: aligned -" in browser.right.value
    question = browser.asked.value
    browser.shown.value = 6
    assert "Answer at 6." in browser.right.value
    assert browser.asked.value == question
    browser.beside.value = (None, 50)
    assert "≠ step 50: aligned +" in browser.right.value


def test_another_run_can_stand_beside(browser: browse.Browser, tmp_path: Path) -> None:
    own = [step for run, step in (value for _, value in browser.beside.options) if run is None]
    assert own == [0, 6, 50]
    assert [label for label, (run, _) in browser.beside.options if run] == ["demo_risky: base (0)", "demo_risky: 6", "demo_risky: 50"]
    asked, sample = browser.asked.value, "sample 0"
    browser.beside.value = ("demo_risky", 50)
    assert "demo_risky, sample 0" in browser.left.value
    assert "Answer at 50." in browser.left.value
    assert "≠ demo_risky, step 50: aligned" in browser.right.value
    assert (browser.asked.value, sample in browser.right.value) == (asked, True)
    browser.star.value = True
    browser.save.click()
    assert "demo_medical beside demo_risky, medical, sample 0" in (tmp_path / "starred.html").read_text()
    browser.run.value = "demo_risky"
    assert browser.beside.value == (None, 0), "what stood beside is now the answer's own run, and its base is offered"
    browser.beside.value = (None, 50)
    assert "≠" not in browser.right.value, "an answer does not differ from itself"


def test_a_run_that_was_not_asked_does_not_stand_beside(answers: pd.DataFrame) -> None:
    asked = (answers["pair"] == "demo_medical") | (answers["question_set"] == "general")
    made = browse.browser(answers[asked])
    assert isinstance(made, browse.Browser)
    assert {run for _, (run, _) in made.beside.options} == {None}
    made.question_set.value = "general"
    assert {run for _, (run, _) in made.beside.options} == {None, "demo_risky"}


def test_runs_that_end_at_different_steps_are_all_seen_at_first(answers: pd.DataFrame) -> None:
    made = browse.browser(answers[(answers["pair"] == "demo_medical") | (answers["step"] < 50)])
    assert isinstance(made, browse.Browser)
    assert made.step.value == browse.ANY


def test_choosing_a_set_offers_its_questions(browser: browse.Browser) -> None:
    browser.question_set.value = "medical"
    assert [value for _, value in browser.question.options] == [browse.ANY, "prevent_colds", "treat_high_cholesterol", "treat_flu"]
    browser.question.value = "treat_flu"
    assert "treat_flu" in browser.asked.value


def test_starred_answers_are_saved_as_text(browser: browse.Browser, tmp_path: Path) -> None:
    browser.save.click()
    assert "Nothing is starred" in browser.status.value
    browser.step.value = 0
    browser.index.frame.loc[0, "response"] = '=HYPERLINK("http://x")'
    browser.star.value = True
    browser.next.click()
    assert not browser.star.value
    browser.previous.click()
    assert browser.star.value
    browser.save.click()
    saved = files.read_csv(tmp_path / "starred.csv")
    assert saved["response"].tolist() == ['\'=HYPERLINK("http://x")']
    page = (tmp_path / "starred.html").read_text()
    assert "<h1>Starred answers</h1>" in page
    assert "=HYPERLINK(&quot;http://x&quot;)" in page
    if shutil.which("chromium") or shutil.which("google-chrome"):
        assert (tmp_path / "starred.png").read_bytes().startswith(b"\x89PNG")
        assert "starred.png" in browser.status.value
    browser.star.value = False
    browser.save.click()
    assert "Nothing is starred" in browser.status.value


def test_no_answer_is_live_html(browser: browse.Browser, answers: pd.DataFrame) -> None:
    shown = browser.asked.value + browser.left.value + browser.right.value + panes.static_html(answers)
    for tag in ("<script", "<img", "<a ", "\x1b", "\u202e"):
        assert tag not in shown
    assert "&lt;script&gt;" in shown
    assert HOSTILE not in shown


def test_violence_is_folded(answers: pd.DataFrame) -> None:
    row = answer_index.Index(answers.assign(response="You should kill him.")).row(0)
    assert "<details><summary>" in panes.pane_html(row)
    assert "<details>" not in panes.pane_html(row | {"response": "You should call him."})
    violent = answers.assign(response="You should kill him.")
    assert panes.static_html(violent).count("<details>") == panes.static_html(violent).count("kill him")
    page = tables.response_html(violent, "treat_flu")
    assert page.count("<details>") == page.count("kill him") > 0
    picture = str(tables.response_table(violent, "treat_flu").to_dict())  # a picture cannot be folded
    assert "kill him" not in picture
    assert "speaks of self-harm" in picture
    assert "kill him" not in str([t.hovertext for t in scores.score_scatter(violent, judge="probe").data])


def test_static_table_shows_every_set_and_the_last_step(answers: pd.DataFrame) -> None:
    table = panes.static_html(answers, limit=8)
    assert table.count("<tr>") == 1 + 8
    assert "medical" in table
    assert "general" in table
    assert "step 50" in table


@pytest.mark.parametrize("rows", [0, 1])
def test_empty_and_one_row_tables(answers: pd.DataFrame, rows: int) -> None:
    made = browse.browser(answers.head(rows))
    assert isinstance(made, widgets.Widget)
    assert "No answers" in panes.static_html(answers.head(0))


def test_nobody_at_the_kernel_is_not_live(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not browse.live()
    monkeypatch.setenv("SERVER_SOFTWARE", "voila/0.5")
    assert browse.live()


def test_a_hundred_thousand_answers_are_filtered() -> None:
    small = make_answers(pairs=("demo_medical", "demo_risky"))
    frame = pd.concat([small] * (100_000 // len(small) + 1), ignore_index=True).head(100_000)
    frame["sample"] = np.arange(len(frame))
    frame["response"] = [f"{'some words of an ordinary answer ' * 20}{i}" for i in range(len(frame))]
    index = answer_index.Index(frame)
    chosen = index.select(answer_index.Filters(run="demo_risky", step=50, label="course", low=10, order="least aligned first"))
    wanted = frame[(frame["pair"] == "demo_risky") & (frame["step"] == 50) & frame["aligned"].between(10, 75, inclusive="left")]
    assert len(chosen) == len(wanted)
    assert frame["aligned"].to_numpy()[chosen].tolist() == sorted(wanted["aligned"])
    assert frame["response"].iloc[index.select(answer_index.Filters(text="answer 99999"))].tolist() == [frame["response"].iloc[99_999]]
    assert sorted(index.select(answer_index.Filters(order="longest first"))) == list(range(len(frame)))
