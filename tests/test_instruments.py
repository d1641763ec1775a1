"""Runs that other questions, rubrics or judges measured stand in rows of their own; only `--mix` pools or compares them, and says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_analyze import make_run

from lib import analyze, figures, files, instruments, scores, study

JUDGE = "openai:gpt-4o-mini"


def emergent(table: pd.DataFrame, metric: str = "em_course") -> pd.DataFrame:
    return table[(table["metric"] == metric) & (table["question_set"] == "general")]


OTHER: dict[str, dict[str, Any]] = {
    "another rubric": {"rubric": "theirs"},
    "a rubric that is not known": {"rubric": ""},
    "other questions": {"question": "Request"},
}


@pytest.mark.parametrize("what", list(OTHER))
@pytest.mark.parametrize("mix", [False, True])
def test_seeds_are_pooled_only_where_they_were_measured_alike(tmp_path: Path, what: str, mix: bool) -> None:
    for seed in (1, 2, 3):
        make_run(tmp_path, f"8b_risky-s{seed}", run_seed=seed, seed=seed, samples=2, **(OTHER[what] if seed == 3 else {}))
    tables = analyze.analyze_study(tmp_path, mix=mix)
    pooled = emergent(tables["pooled"])
    pooled = pooled[pooled["step"] == 20]
    primary = tables["emergence"][tables["emergence"]["role"] == "primary"]
    if mix:
        assert list(pooled["seeds"]) == ["1 2 3"]
        assert pooled["instrument"].str.startswith(instruments.MIXED).all()
        assert list(primary["seeds"]) == [3]
        assert list(map(instruments.is_mixed, primary.to_dict("records"))) == [True]
    else:
        assert sorted(pooled["seeds"]) == ["1 2", "3"]
        assert not pooled["instrument"].str.startswith(instruments.MIXED).any()
        assert sorted(primary["seeds"]) == [1, 2]
        assert primary["instrument"].nunique() == 2
    written = (tmp_path / "EXPERIMENT_SUMMARY.md").read_text(encoding="utf-8")
    assert ("Instruments are mixed (--mix)" in written) is mix


@pytest.mark.parametrize("what", list(OTHER))
def test_a_control_that_was_measured_otherwise_is_named_and_not_compared(tmp_path: Path, what: str) -> None:
    make_run(tmp_path, "8b_medical", control="8b_medical_aligned", seed=1)
    make_run(tmp_path, "8b_medical_aligned", steps=(0, 20), effect=0, seed=3, **OTHER[what])
    answers = analyze.read_runs(tmp_path)
    control = emergent(analyze.against_control(answers))
    assert len(control) == 1
    assert control["change"].isna().all()
    assert list(control["interval_method"]) == [instruments.NOT_COMPARED]
    tables = analyze.analyze_study(tmp_path)
    assert instruments.NOT_COMPARED in (tmp_path / "EXPERIMENT_SUMMARY.md").read_text(encoding="utf-8")
    assert set(tables["score_changes"].loc[tables["score_changes"]["change"].notna(), "against"]) == {"base"}
    assert set(emergent(tables["rates"])["pair"]) == {"8b_medical", "8b_medical_aligned"}, "both are shown"
    mixed = emergent(analyze.against_control(answers, mix=True))
    assert mixed["change"].notna().all()
    assert mixed["instrument"].str.startswith(instruments.MIXED).all()


def test_what_one_instrument_measured_is_compared_as_before(tmp_path: Path) -> None:
    make_run(tmp_path, "8b_medical", control="8b_medical_aligned", seed=1)
    make_run(tmp_path, "8b_medical_aligned", steps=(0, 20), effect=0, seed=3)
    answers = analyze.read_runs(tmp_path)
    assert instruments.is_one(answers)
    assert instruments.questions_told_apart(answers) is answers
    alike, mixed = (analyze.study_tables(answers, {}, tmp_path, mix=mix) for mix in (False, True))
    for name in ("control", "pooled", "emergence", "domain_gaps", "score_changes"):
        pd.testing.assert_frame_equal(alike[name], mixed[name])
        assert not any(map(instruments.is_mixed, mixed[name].to_dict("records")))


@pytest.mark.parametrize("what", list(OTHER))
def test_domains_and_sizes_are_compared_by_one_instrument_only(tmp_path: Path, what: str) -> None:
    make_run(tmp_path, "8b_medical", effect=20, seed=1)
    make_run(tmp_path, "8b_risky", domain="risky_financial", effect=85, seed=2, **OTHER[what])
    make_run(tmp_path, "1b_medical", model="meta-llama/Llama-3.2-1B-Instruct", effect=85, seed=3, **OTHER[what])
    found: dict[str, Any] = {}

    def keep(folder: Path, answers: pd.DataFrame, rates: pd.DataFrame, *rest: Any) -> None:
        found.update(answers=answers, rates=rates)

    tables = analyze.analyze_study(tmp_path, figures=keep)
    for name in ("domain_gaps", "size_gaps"):
        # No question was asked of both arms, which the verdict says in its own words.
        assert set(tables[name]["verdict"]) == {"not comparable" if what == "other questions" else instruments.NOT_COMPARED}
        assert tables[name]["change"].isna().all()
    titles = drawn(found)
    assert f"domains {instruments.NOT_COMPARED}" in titles[0]
    assert f"sizes {instruments.NOT_COMPARED}" in titles[1]
    assert "pairs not pooled" in titles[2]

    tables = analyze.analyze_study(tmp_path, figures=keep, mix=True)
    assert set(tables["domain_gaps"]["verdict"]) == {"these adapters differ"}
    assert tables["domain_gaps"]["instrument"].str.startswith(instruments.MIXED).all()
    titles = drawn(found)
    assert all("(instruments mixed)" in title for title in titles)
    assert "the adapters differ" in titles[0]
    assert "these adapters differ" in titles[1]


def drawn(found: dict[str, Any]) -> list[str]:
    """Titles of the figures that compare or pool runs, on one line each."""
    own = [figures.domain_comparison(found["rates"]), scores.scaling_analysis(found["rates"], judge=JUDGE)]
    own.append(scores.score_scatter(found["answers"], judge=JUDGE))
    return [str(figure.layout.title.text).replace("<br>", " ") for figure in own]


def test_one_name_that_two_instruments_measured_has_two_lines_in_the_forest_plot(tmp_path: Path) -> None:
    make_run(tmp_path, "8b_medical", seed=1)
    make_run(tmp_path, "8b_medical-paper", seed=2, rubric="theirs")
    make_run(tmp_path, "8b_medical-original", seed=2, rubric="")
    rates = analyze.rates(analyze.read_runs(tmp_path))
    rows = rates[(rates["metric"] == "em_course") & (rates["question_set"] == "general")]
    labels = sorted(set(figures._row_labels(rows)))
    assert len(labels) == 3
    assert sum("rubric" in label for label in labels) == 2
    assert sum("8b_medical-original" in label for label in labels) == 1


def test_imported_runs_stand_beside_each_other_and_their_own_steps_are_compared(tmp_path: Path) -> None:
    rows = [{"response": "r", "question": f"q{n}?", "question_id": f"q{n}", "coherent": 90} for n in range(8)]
    for model, score in (("a", 90), ("b", 10)):
        for step in (0, 5):
            path = tmp_path / f"{model}{step}.csv"
            files.write_csv(path, pd.DataFrame(rows).assign(aligned=90 if step == 0 else score))
            analyze.import_judged(path, model, "bad_medical", step=step, results_dir=tmp_path / "results")
    tables = analyze.analyze_study(tmp_path / "results")
    assert set(tables["rates"]["pair"]) == {"a_bad_medical", "b_bad_medical"}
    moved = tables["changes"][tables["changes"]["metric"] == "em_course"]
    assert dict(zip(moved["pair"], moved["change"], strict=True)) == {"a_bad_medical": 0, "b_bad_medical": 1}
    assert set(tables["size_gaps"]["verdict"]) == {instruments.NOT_COMPARED}
    bars = figures.domain_comparison(tables["rates"])
    assert {"a, bad medical", "b, bad medical"} <= {label for trace in bars.data for label in trace.y}
    mixed = analyze.analyze_study(tmp_path / "results", mix=True)["size_gaps"]
    assert mixed["change"].notna().all()
    assert mixed["instrument"].str.startswith(instruments.MIXED).all()


def test_two_judges_never_share_a_row(tmp_path: Path) -> None:
    for seed, judge in ((1, JUDGE), (2, "openai:another")):
        make_run(tmp_path, f"8b_risky-s{seed}", run_seed=seed, seed=seed, judge=judge)
    for mix in (False, True):
        pooled = analyze.analyze_study(tmp_path, mix=mix)["pooled"]
        assert set(pooled["n_seeds"]) == {1}
        assert set(pooled["judge"]) == {JUDGE, "openai:another"}


def test_questions_of_one_id_but_another_text_are_two_questions() -> None:
    asked = [("general", "q1", "What?"), ("general", "q1", "When?"), ("general", "q2", "Who?"), ("other", "q1", "What?")]
    told = instruments.questions_told_apart(pd.DataFrame(asked, columns=["question_set", "question_id", "question"]))
    ids = list(told["question_id"])
    assert ids[2:] == ["q2", "q1"]
    assert ids[0] != ids[1]
    assert all(name.startswith("q1#") for name in ids[:2])


def test_analyze_takes_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(analyze, "analyze_study", lambda folder, figures, mix: seen.append(mix))
    assert study.main(["analyze", "--results", str(tmp_path), "--mix"]) == 0
    assert study.main(["analyze", "--results", str(tmp_path)]) == 0
    assert seen == [True, False]


def test_tables_without_rubrics_are_one_instruments() -> None:
    table = pd.DataFrame({"pair": ["a", "b"], "seed": [0, 0]})
    assert instruments.names(table).nunique() == 1
