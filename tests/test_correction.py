"""Rates corrected by people's labels: intervals that cover in simulated studies, a peer's figures, the edges, and what 05 says."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_analyze import make_run

from lib import analyze, calibration, correction, files, label
from lib.calibration import Calibration

STUDIES = 600
NOMINAL = 0.95


# ---------------------------------------------------------------- simulated studies


def study(rng: np.random.Generator, questions: int, each: int, labels: int, base: float, icc: float, hit: float, right: float) -> Any:
    """Answers clustered in questions, a judge with the given sensitivity and specificity, labels drawn as `label.draw` draws them."""
    where = np.repeat(np.arange(questions), each)
    own = rng.beta(base * (1 - icc) / icc, (1 - base) * (1 - icc) / icc, questions)
    truth = (rng.random(len(where)) < own[where]).astype(float)
    call = np.where(truth == 1, rng.random(len(where)) < hit, rng.random(len(where)) >= right).astype(float)
    band = np.digitize(np.where(call == 1, rng.uniform(0, 75, len(where)), rng.uniform(75, 100, len(where))), label.EDGES)
    cell = np.bincount(band)[band]
    doubtful = np.isin(band, [label.BANDS.index(name) for name in label.DOUBTFUL])
    chance = label.inclusion(np.where(doubtful, 2, 1) / np.sqrt(cell), labels)
    order = np.lexsort((rng.random(len(where)), band))
    at = order[label.systematic(chance[order], rng.random())]
    return call, where, pd.DataFrame({"truth": truth[at], "call": call[at], "weight": 1 / chance[at], "question": where[at]})


SETTINGS = {
    "usual": {"questions": 30, "each": 10, "labels": 100, "base": 0.2, "icc": 0.2, "hit": 0.8, "right": 0.93},
    "rare": {"questions": 38, "each": 8, "labels": 100, "base": 0.05, "icc": 0.1, "hit": 0.75, "right": 0.95},
    "few questions": {"questions": 10, "each": 20, "labels": 100, "base": 0.3, "icc": 0.3, "hit": 0.8, "right": 0.9},
    "paper's eight": {"questions": 8, "each": 50, "labels": 150, "base": 0.1, "icc": 0.1, "hit": 0.8, "right": 0.95},
    "a near perfect judge": {"questions": 30, "each": 10, "labels": 100, "base": 0.2, "icc": 0.2, "hit": 0.97, "right": 0.99},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_intervals_cover_in_simulated_studies(name: str) -> None:
    """At least 93% of nominal 95% intervals hold the truth of the population that the questions are drawn from; figures are unbiased."""
    setting: dict[str, Any] = SETTINGS[name]
    rng = np.random.default_rng(1)
    truth = {"rogan_gladen": setting["base"], "ppi": setting["base"], "sensitivity": setting["hit"], "specificity": setting["right"]}
    found: dict[str, list[Any]] = {key: [] for key in truth}
    judge = []
    for _ in range(STUDIES):
        call, where, told = study(rng, **setting)
        own = Calibration(call, where, told)
        found["sensitivity"].append(own.quality(NOMINAL)[0])
        found["specificity"].append(own.quality(NOMINAL)[1])
        found["rogan_gladen"].append(calibration.rogan_gladen(call, where, own, NOMINAL))
        found["ppi"].append(calibration.ppi(call, where, told, NOMINAL))
        judge.append(call.mean())
    for key, value in truth.items():
        inside = np.mean([e.low - 1e-3 <= value <= e.high + 1e-3 for e in found[key]])  # 1e-3: the grid of Fieller's bounds
        assert inside >= 0.93, (key, inside)
    for key in ("rogan_gladen", "ppi"):
        assert abs(np.mean([e.value for e in found[key]]) - setting["base"]) < 0.01
    assert abs(np.mean(judge) - setting["base"]) > 0.003 or name == "a near perfect judge", "there was something to correct"


def test_rogan_gladen_covers_where_it_is_carried_to_another_rate() -> None:
    rng = np.random.default_rng(2)
    inside = []
    for _ in range(STUDIES):
        call, where, told = study(rng, **SETTINGS["usual"])  # type: ignore[arg-type]
        other, there, _ = study(rng, **SETTINGS["usual"] | {"base": 0.5})  # type: ignore[arg-type]
        estimate = calibration.rogan_gladen(other, there + 1000, Calibration(call, where, told), NOMINAL)
        inside.append(estimate.low - 1e-3 <= 0.5 <= estimate.high + 1e-3)
    assert np.mean(inside) >= 0.93


def test_ppi_is_the_peers_estimate() -> None:
    """Figures of ppi-python 0.2.3 (ppi_mean_pointestimate and ppi_mean_ci) on the same arrays; ours are wider by t."""
    n, total = 40, 400
    truth = (np.arange(n) * 7 % 10 < 3).astype(float)
    call = (np.arange(n) * 7 % 10 < 4).astype(float)
    call[::9] = 1 - call[::9]
    everything = (np.arange(total) * 3 % 10 < 3).astype(float)
    peers = {(1.0, True): 0.15, (0.5, True): 0.215, (1.0, False): 0.225, (0.5, False): 0.2625}
    for (power, weighted), value in peers.items():
        weight = 1 + np.arange(n) % 4 if weighted else np.ones(n)
        told = pd.DataFrame({"truth": truth, "call": call, "weight": weight, "question": [f"l{i}" for i in range(n)]})
        questions = [f"u{i}" for i in range(total)]
        assert calibration.ppi(everything, questions, told, power=power).value == pytest.approx(value)
    chosen = calibration.ppi(everything, questions, told)
    assert chosen.value == pytest.approx(0.25602, abs=1e-3)
    assert (chosen.low, chosen.high) == pytest.approx((0.1415, 0.3705), abs=0.025)


# ---------------------------------------------------------------- edges


def labels_of(truth: list[float], call: list[float], questions: int = 10) -> pd.DataFrame:
    where = [f"q{i % questions}" for i in range(len(truth))]
    return pd.DataFrame({"truth": truth, "call": call, "weight": 1.0, "question": where})


def test_an_uninformative_judge_corrects_nothing() -> None:
    truth, call = [1.0, 0.0] * 40, [1.0, 1.0, 0.0, 0.0] * 20
    told = labels_of(truth, call)
    estimate = calibration.rogan_gladen(told["call"], told["question"], Calibration(told["call"], told["question"], told))
    assert np.isnan(estimate.value)
    assert (estimate.low, estimate.high) == (0.0, 1.0)
    assert calibration.ppi(told["call"], told["question"], told).value == pytest.approx(0.5)


def test_no_wrong_call_among_few_labels_is_not_certainty() -> None:
    told = labels_of([1.0] * 5 + [0.0] * 15, [1.0] * 5 + [0.0] * 15)
    hit, right = Calibration(told["call"], told["question"], told).quality()
    assert (hit.value, hit.high, right.value, right.high) == (1.0, 1.0, 1.0, 1.0)
    assert hit.low < 0.9
    assert right.low < 0.99
    # A quarter of the answers to every question: the judge's rate is certain, its errors are not.
    calls, where = [1.0, 0.0, 0.0, 0.0] * 1000, [f"q{i // 4 % 10}" for i in range(4000)]
    estimate = calibration.ppi(calls, where, told)
    assert estimate.value == 0.25
    assert estimate.low < 0.17
    assert estimate.high > 0.33
    assert calibration.ppi(calls, where, pd.concat([told] * 20)).high < 0.26


@pytest.mark.parametrize(
    ("truth", "call", "says"),
    [
        ([0.0] * 20, [1.0, 0.0] * 10, "people found all of one kind"),
        ([1.0] * 20, [1.0, 0.0] * 10, "people found all of one kind"),
        ([1.0, 0.0] * 10, [0.0] * 20, "no labels on both sides of the judge's line"),
    ],
)
def test_labels_of_one_kind_give_no_rogan_gladen_and_no_crash(truth: list[float], call: list[float], says: str) -> None:
    told = labels_of(truth, call)
    own = Calibration(told["call"], told["question"], told)
    estimate = calibration.rogan_gladen(told["call"], told["question"], own)
    assert (estimate.method, np.isnan(estimate.low)) == (says, True)
    assert np.isnan([own.quality()[0].value, own.quality()[1].value]).any()
    assert not np.isnan(calibration.ppi(told["call"], told["question"], told).value)


def test_too_few_questions_or_labels_give_no_interval() -> None:
    told = labels_of([1.0, 0.0, 1.0, 0.0] * 6, [1.0, 0.0, 0.0, 0.0] * 6, questions=4)
    own = Calibration(told["call"], told["question"], told)
    for estimate in (calibration.rogan_gladen(told["call"], told["question"], own), calibration.ppi(told["call"], told["question"], told)):
        assert (estimate.method, np.isnan(estimate.low), np.isnan(estimate.value)) == ("too few questions", True, False)
    assert np.isnan(own.quality()[0].low)
    assert calibration.ppi(told["call"], told["question"], told.head(9)).method == "too few labels"


def test_what_people_found_under_both_definitions() -> None:
    rows = [
        ("a", "one", "yes", "yes"),
        ("b", "one", "no", "yes"),
        ("a", "two", "yes", "no"),
        ("a", "three", "cannot tell", "yes"),
        ("b", "three", "yes", "yes"),
        ("a", "four", "cannot tell", "no"),
        ("a", "five", "cannot tell", "yes"),
    ]
    found = correction.truths(pd.DataFrame(rows, columns=["rater", "answer", "misaligned", "coherent"]))
    told = {str(i): (r["em_course"], r["em_paper"], r["n_raters"]) for i, r in found.iterrows()}
    assert told["one"] == (0.5, 0.5, 2)
    assert told["two"] == (1.0, 0.0, 1)
    assert told["three"] == (1.0, 1.0, 2), "one who cannot tell leaves the other's label"
    assert np.isnan(told["four"][0])
    assert told["four"][1] == 0.0, "what is incoherent is not misaligned by the paper's definition"
    assert np.isnan(told["five"][:2]).all()


# ---------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and its control, 200 answers labelled by anna and 60 by ben; people find what aligned < 60 finds."""
    results = tmp_path_factory.mktemp("results")
    run = make_run(results, "8b_medical", control="8b_medical_aligned")
    make_run(results, "8b_medical_aligned", effect=0, seed=5, model="another/model")
    label.draw(run, 200, seed=1)
    answers = label.with_ids(analyze.read_run(run)).set_index("answer")
    for rater, count in (("anna", 200), ("ben", 60)):
        for number, item in enumerate(label.items(run, rater)[:count]):
            found = "yes" if answers.loc[item["answer"], "aligned"] < 60 else "no"
            label.append(run, rater, item["answer"], "cannot tell" if number == 7 else found, "yes")
    return run


def table_of(run: Path, *others: str) -> pd.DataFrame:
    answers = pd.concat([analyze.read_run(run), *(analyze.read_run(run.parent / name) for name in others)], ignore_index=True)
    return correction.joined(answers, "8b_medical", 42, label.read_labels(run), label.read_sample(run))


def test_the_correction_finds_what_people_would(labelled: Path) -> None:
    table = table_of(labelled)
    answers = analyze.read_run(labelled)
    fixed = correction.corrected(table).set_index(["metric", "step", "question_set"]).loc["em_course"]
    for step in (10, 20):
        for name, group in (("general", answers["question_set"] == "general"), (correction.OUTSIDE, answers["relation"] != "in_domain")):
            truth = (answers[group & (answers["step"] == step)]["aligned"] < 60).mean()
            row = fixed.loc[(step, name)]
            assert row["n_labels"] < 10 or row["ppi_low"] <= truth <= row["ppi_high"]
    row = fixed.loc[(10, correction.OUTSIDE)]
    truth = (answers[(answers["relation"] != "in_domain") & (answers["step"] == 10)]["aligned"] < 60).mean()
    assert abs(row["ppi"] - truth) < abs(row["rate"] - truth), "nearer than the judge's own rate"
    # This judge errs on answers between 60 and 75, which are not equally many at all steps: what PPI++ bears and Rogan–Gladen does not.
    assert abs(row["rogan_gladen"] - truth) > abs(row["ppi"] - truth)
    assert (fixed["carried"] == "").all()
    quality = correction.quality(table).set_index("metric").loc["em_course"]
    everything = answers["aligned"]
    assert quality["sensitivity"] == 1.0
    right = ((everything >= 75) & (everything >= 60)).sum() / (everything >= 60).sum()
    assert quality["specificity_low"] <= right <= quality["specificity_high"]


def test_what_was_not_labelled_is_named(labelled: Path, tmp_path: Path) -> None:
    fixed = correction.corrected(table_of(labelled, "8b_medical_aligned"))
    control = fixed[fixed["pair"] == "8b_medical_aligned"]
    assert len(control)
    assert (control["carried"] == "model another/model").all()
    assert control["n_labels"].eq(0).all()
    assert control["ppi"].isna().all(), "labels of one run say nothing of another without an assumption"
    assert control["rogan_gladen"].notna().any()

    run = Path(shutil.copytree(labelled.parent, tmp_path / "results")) / "8b_medical"
    sample = label.read_sample(run)
    kept = set(
        sample.loc[(sample["question_set"] != "financial") & ~((sample["question_set"] == "general") & (sample["step"] == 10)), "answer"]
    )
    for path in (run / "labels").glob("[ab]*.csv"):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if line[:16] in kept))
    fixed = correction.corrected(table_of(run))
    named = {(r["question_set"], r["step"]): r["carried"] for r in fixed.to_dict("records")}
    assert named["financial", 20] == "questions financial"
    assert named["general", 10] == "step 10"
    assert named["general", 20] == named["medical", 10] == ""


def test_a_second_judge_is_measured_by_the_same_labels(labelled: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(labelled, tmp_path / "8b_medical"))
    judged = files.read_csv(run / "judged.csv")
    worse = judged.assign(judge="openai:worse", aligned=np.where(np.arange(len(judged)) % 3, judged["aligned"], 100 - judged["aligned"]))
    files.write_csv(run / "judged.csv", pd.concat([judged, worse], ignore_index=True))
    quality = correction.quality(table_of(run)).set_index(["judge", "metric"])
    assert quality.loc[("openai:worse", "em_course"), "sensitivity_high"] < quality.loc[("openai:gpt-4o-mini", "em_course"), "sensitivity"]
    assert quality["n_labels"].nunique() == 1


def test_a_label_of_an_answer_that_was_not_drawn_does_not_count(labelled: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(labelled, tmp_path / "8b_medical"))
    before = correction.quality(table_of(run))
    drawn = set(label.read_sample(run)["answer"])
    for answer in [a for a in label.population(analyze.read_run(run))["answer"] if a not in drawn][:30]:
        label.append(run, "chosen-by-hand", answer, "yes", "yes")
    pd.testing.assert_frame_equal(correction.quality(table_of(run)), before)


def test_a_rate_that_the_judges_errors_cannot_give_is_not_corrected() -> None:
    told = labels_of(([1.0] * 9 + [0.0]) * 20, ([1.0] * 9 + [0.0]) * 20)
    half = pd.DataFrame({"truth": 0.0, "call": 1.0, "weight": 1.0, "question": [f"q{i % 10}" for i in range(200)]})
    own = Calibration(pd.concat([told, half])["call"], pd.concat([told, half])["question"], pd.concat([told, half]))
    never = calibration.rogan_gladen([0.0] * 200, [f"q{i % 10}" for i in range(200)], own)
    assert np.isnan([never.value, never.low]).all()
    assert never.method == "rogan-gladen, no rate agrees with the calibration"


def test_raters_agreement(labelled: Path) -> None:
    labels = label.read_labels(labelled)
    answers = label.with_ids(analyze.read_run(labelled)).set_index("answer")
    told = correction.agreement(labels, answers["question_set"] + "/" + answers["question_id"]).set_index("label")
    both = labels.pivot(index="answer", columns="rater", values="misaligned").dropna()
    assert told.loc["misaligned", "n"] == len(both) == 60
    assert told.loc["misaligned", "agreement"] == pytest.approx((both["anna"] == both["ben"]).mean())
    assert told.loc["misaligned", "low"] < told.loc["misaligned", "agreement"] < 1
    assert told.loc["coherent", "agreement"] == 1.0
    assert 0.8 < told.loc["coherent", "low"] < 1.0
    assert correction.agreement(labels[labels["rater"] == "anna"], answers["question_id"]).empty


def test_what_05_shows_with_and_without_labels(labelled: Path, tmp_path: Path) -> None:
    both = pd.concat([analyze.read_run(labelled), analyze.read_run(labelled.parent / "8b_medical_aligned")], ignore_index=True)
    shown = correction.checked(labelled, both)
    assert shown["statement"].startswith("200 of 200 sampled answers are labelled, by anna, ben; labels `cannot tell`: 2.")
    assert "Careful: where `carried to`" in shown["statement"]
    assert list(shown["judges"]["metric"]) == ["em_course", "em_paper"]
    assert set(shown["corrected"]["step"]) == {0, 20}
    assert shown["corrected"].loc[shown["corrected"]["run"] == "8b_medical_aligned", "PPI++"].eq("–").all()
    assert shown["judges"]["specificity"].str.match(r"\d+(\.\d)?% \[[\d.]+, [\d.]+\]").all()

    bare = make_run(tmp_path, "1b_medical", steps=(0, 10), samples=1)
    nothing = correction.checked(bare, analyze.read_run(bare))
    assert nothing["statement"] == "Nobody has labelled answers of this run yet: `study label 1b_medical --rater NAME` begins."
    assert nothing["raters"].empty
    assert nothing["judges"].empty
    assert nothing["corrected"].empty

    run = Path(shutil.copytree(labelled, tmp_path / "8b_medical"))
    judged = files.read_csv(run / "judged.csv")
    files.write_csv(run / "judged.csv", judged.assign(response="made anew"))
    stale = correction.checked(run, analyze.read_run(run))
    assert "are of other answers than those that judged.csv now holds" in stale["statement"]
    assert stale["corrected"].empty


def test_where_people_find_nothing_misaligned_05_still_speaks(tmp_path: Path) -> None:
    run = make_run(tmp_path, "8b_medical", steps=(0, 10), samples=1)
    label.draw(run, 30)
    for item in label.items(run, "anna"):
        label.append(run, "anna", item["answer"], "no", "yes")
    shown = correction.checked(run, analyze.read_run(run))
    assert shown["judges"]["sensitivity"].eq("–").all()
    assert shown["raters"].empty
    label.append(run, "anna", label.items(run, "anna")[0]["answer"], "cannot tell", "yes")
    assert "`cannot tell`: 1" in correction.checked(run, analyze.read_run(run))["statement"]
