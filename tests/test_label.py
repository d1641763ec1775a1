"""Labels by people: the sample's chances hold, the sheet is blind and goes on, every label is on disk at once, nothing is live."""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_analyze import HOSTILE, make_run

from lib import analyze, files, label, runner, study
from lib.files import StudyError
from lib.sheet import _SCRIPT, Sheet


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("results"), "8b_medical", samples=3)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "results" / "8b_medical"))


def label_all(run: Path, rater: str, misaligned: str = "no") -> None:
    for item in label.items(run, rater):
        label.append(run, rater, item["answer"], misaligned, "yes")


# ---------------------------------------------------------------- the sample


def test_the_sample_is_seeded_exact_and_reaches_every_band(run: Path, tmp_path: Path) -> None:
    sample = label.draw(run, 60, seed=3)
    assert len(sample) == sample["answer"].nunique() == 60
    pd.testing.assert_frame_equal(label.read_sample(run), sample, check_dtype=False)
    again = Path(shutil.copytree(run, tmp_path / "again"))
    shutil.rmtree(again / "labels")
    assert label.draw(again, 60, seed=3).equals(sample)
    shutil.rmtree(again / "labels")
    assert not label.draw(again, 60, seed=4)["answer"].equals(sample["answer"])
    everything = label.population(analyze.read_run(run))
    assert set(sample["band"]) == set(everything["band"])
    assert set(sample["step"]) == {0, 10, 20}
    assert np.allclose(sample["weight"], 1 / sample["probability"])
    with pytest.raises(StudyError, match="is there already"):
        label.draw(run, 60)


def test_rare_and_doubtful_cells_are_drawn_more_often(run: Path) -> None:
    sample = label.draw(run, 60)
    told = sample.assign(doubtful=sample["band"].isin(label.DOUBTFUL))
    ratio = told["probability"] * np.sqrt(told["cell_answers"]) / np.where(told["doubtful"], 2, 1)
    assert ratio[told["probability"] < 1].std() < 1e-12
    assert sample.loc[sample["cell_answers"] <= 2, "probability"].min() > sample.loc[sample["cell_answers"] >= 16, "probability"].max()


def test_chances_of_inclusion_are_what_the_draws_show() -> None:
    rng = np.random.default_rng(0)
    size = np.append(rng.uniform(0.05, 3, 38), [9, 8])
    chance = label.inclusion(size, 17)
    assert chance.sum() == pytest.approx(17)
    assert chance.max() == 1.0
    below = chance < 1
    assert np.allclose(chance[below] / size[below], (chance[below] / size[below])[0])
    drawn = np.zeros(40)
    for start in (np.arange(2000) + 0.5) / 2000:
        chosen = label.systematic(chance, start)
        assert len(chosen) == 17
        drawn[chosen] += 1 / 2000
    assert np.abs(drawn - chance).max() < 2e-3
    assert label.inclusion(size, 99).tolist() == [1.0] * 40


def test_weights_recover_the_runs_total(run: Path) -> None:
    """The weighted sample estimates a mean without bias: over many seeds it is that of all answers."""
    answers = label.population(analyze.read_run(run))
    truth = (answers["band"] == "0-20").mean()
    estimates = []
    for seed in range(150):
        shutil.rmtree(run / "labels", ignore_errors=True)
        sample = label.draw(run, 40, seed)
        estimates.append((sample["weight"] * (sample["band"] == "0-20")).sum() / len(answers))
    assert abs(np.mean(estimates) - truth) < 4 * np.std(estimates) / np.sqrt(150) + 1e-9


def test_only_scored_answers_with_text_are_drawn_and_each_once(run: Path) -> None:
    judged = files.read_csv(run / "judged.csv")
    judged.loc[:9, "response"] = "  "
    judged.loc[10:19, ["aligned", "aligned_status"]] = [np.nan, "invalid"]
    second = judged.assign(judge="openai:other", aligned=50.0, aligned_status="ok")
    files.write_csv(run / "judged.csv", pd.concat([judged, second], ignore_index=True))
    sample = label.draw(run, 10_000)
    assert len(sample) == len(judged) - 10, "what the second judge scored can be drawn too"
    assert (sample["band"] == "no score").sum() == 10
    assert (sample["weight"] == 1).all()
    files.write_csv(run / "judged.csv", judged.assign(aligned=np.nan, aligned_status="error"))
    shutil.rmtree(run / "labels")
    with pytest.raises(StudyError, match="no answer is scored"):
        label.draw(run)


# ---------------------------------------------------------------- labels


def test_a_label_is_on_disk_at_once_and_the_last_counts(run: Path) -> None:
    label.append(run, "anna", "0" * 16, "yes", "yes")
    label.append(run, "anna", "1" * 16, "cannot tell", "no")
    label.append(run, "anna", "0" * 16, "no", "yes")
    label.append(run, "ben", "0" * 16, "yes", "no")
    lines = (run / "labels" / "anna.csv").read_text().splitlines()
    assert lines[0] == "answer,misaligned,coherent,time"
    assert len(lines) == 4, "appended, never rewritten"
    told = label.read_labels(run).set_index(["rater", "answer"])
    assert told.loc[("anna", "0" * 16), "misaligned"] == "no"
    assert told.loc[("anna", "1" * 16), "misaligned"] == "cannot tell"
    assert told.loc[("ben", "0" * 16), "coherent"] == "no"
    assert len(label.read_labels(run, ["ben"])) == 1


def test_a_torn_line_is_passed_over_and_a_wrong_one_is_named(run: Path) -> None:
    label.append(run, "anna", "0" * 16, "yes", "yes")
    path = run / "labels" / "anna.csv"
    whole = path.read_bytes()
    for cut in range(len(whole) - 45, len(whole)):  # wherever a crash tears the last line
        path.write_bytes(whole[:cut])
        label.append(run, "anna", "1" * 16, "no", "yes")
        assert set(label.read_labels(run)["answer"]) - {"0" * 16} == {"1" * 16}
    path.write_text(path.read_text() + "2222222222222222,perhaps,yes,2026-01-01T00:00:00Z\n")
    with pytest.raises(StudyError, match=r"anna\.csv: line \d+: perhaps,yes: no label; misaligned is one of yes, no, cannot tell"):
        label.read_labels(run)


def _append_many(run: Path, rater: str, first: int) -> None:
    for number in range(first, first + 40):
        label.append(run, rater, f"{number:016x}", "yes", "no")


def test_labels_appended_by_several_processes_are_all_there(run: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_append_many, args=(run, "anna", 100 * n)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(label.read_labels(run)) == 120
    assert (run / "labels" / "anna.csv").read_text().count("answer,") == 1


@pytest.mark.parametrize("rater", ["", "../anna", "sample", "Sample", "a b", "x" * 41, ".hidden"])
def test_a_rater_needs_a_plain_name(run: Path, rater: str) -> None:
    with pytest.raises(StudyError, match="--rater"):
        label.append(run, rater, "0" * 16, "yes", "yes")


# ---------------------------------------------------------------- the sheet


def press(sheet: Sheet, misaligned: str = "yes", coherent: str = "yes", answer: str | None = None) -> None:
    """What the page sends when both questions are answered."""
    content = {"kind": "label", "answer": answer or sheet.shown["answer"], "misaligned": misaligned, "coherent": coherent}
    sheet._handle_custom_msg(content, [])


def test_the_page_gets_question_and_answer_and_nothing_else(run: Path) -> None:
    judged = files.read_csv(run / "judged.csv")
    judged["model"], judged["response"] = "secret-model-name", [f"{HOSTILE} {n}" for n in range(len(judged))]
    files.write_csv(run / "judged.csv", judged)
    label.draw(run, 30)
    sheet = label.sheet(run, "anna")
    state = json.dumps({name: value for name, value in sheet.get_state().items() if name != "_esm"}, default=str)
    assert "secret-model-name" not in state
    assert "8b_medical" not in state
    assert set(sheet.shown) == {"place", "answer", "question", "response", "status", "turn"}
    assert "\x1b" not in sheet.shown["response"]
    assert "innerHTML" not in _SCRIPT
    assert "insertAdjacentHTML" not in _SCRIPT


def test_raters_see_the_same_answers_in_orders_of_their_own(run: Path) -> None:
    sample = label.draw(run, 60)
    orders = [[item["answer"] for item in label.items(run, rater)] for rater in ("anna", "ben", "anna")]
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(sample["answer"])
    steps = sample.set_index("answer")["step"]
    assert abs(np.corrcoef(np.arange(60), steps[orders[0]])[0, 1]) < 0.4, "the order tells nothing of the step"


def test_the_sheet_saves_goes_on_and_goes_back(run: Path) -> None:
    label.draw(run, 5)
    sheet = label.sheet(run, "anna")
    first = sheet.shown["answer"]
    press(sheet, "yes", "no")
    assert label.read_labels(run)[["answer", "misaligned", "coherent"]].to_numpy().tolist() == [[first, "yes", "no"]]
    assert sheet.shown["place"] == "1 of 5 labelled by anna"
    second = sheet.shown["answer"]
    press(sheet, "no", answer=first)  # the key was pressed twice before the next answer came
    press(sheet, "perhaps")
    assert sheet.shown["status"].startswith("Not saved")
    assert sheet.shown["answer"] == second
    assert len(label.read_labels(run)) == 1

    later = label.sheet(run, "anna")
    assert later.shown["answer"] == second, "another session goes on where this one stopped"
    later._handle_custom_msg({"kind": "back"}, [])
    assert later.shown["answer"] == first
    assert later.shown["status"] == "Your label so far: misaligned yes, not coherent"
    press(later, "cannot tell")
    assert later.shown["answer"] == second
    for _ in range(4):
        press(later, "no")
    assert "All answers are labelled" in later.shown["question"]
    assert later.position == 5
    press(later, "no", answer=first)
    told = label.read_labels(run).set_index("answer")["misaligned"]
    assert (len(told), told[first]) == (5, "cannot tell")


def test_labels_of_answers_that_were_made_anew_are_not_taken(run: Path) -> None:
    label.draw(run, 10)
    judged = files.read_csv(run / "judged.csv")
    files.write_csv(run / "judged.csv", judged.assign(response="another answer"))
    with pytest.raises(StudyError, match=r"10 of 10 answers are not in judged\.csv any more"):
        label.sheet(run, "anna")


DRIVER = """
<!doctype html><meta charset="utf-8"><body><div id="sheet"></div><pre id="result">nothing</pre><script type="module">
const source = document.getElementById("source").textContent;
const { default: widget } = await import(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
const items = [["a1", "<img src=x onerror=\\"document.title='ran'\\">"], ["b2", "second"], ["c3", "third"]];
let at = 0, listener = null;
const sent = [];
const shown = () => ({ answer: items[at][0], question: "Q<b>", response: items[at][1], place: `${at}`, status: "", turn: sent.length });
const model = {
  get: () => shown(), on: (_, f) => { listener = f; }, off: () => {},
  send: (m) => { sent.push(m); if (!window.slow) { at = m.kind === "back" ? Math.max(0, at - 1) : Math.min(2, at + 1); listener(); } },
};
widget.render({ model, el: document.getElementById("sheet") });
const press = (key, more = {}) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, ...more }));
let leaked = 0;
document.addEventListener("keydown", () => { leaked += 1; });
press("y"); press("x");
press("c"); press("n", { repeat: true }); press("n", { ctrlKey: true }); press("u");
press("Backspace");
const cells = document.querySelector(".response").textContent;
document.querySelectorAll("button")[1].click(); document.querySelectorAll("button")[3].click();
window.slow = true;
press("y"); press("c"); press("y"); press("c"); press("Backspace");
const images = document.querySelectorAll("#sheet img").length;
document.getElementById("result").textContent = JSON.stringify({ sent, cells, leaked, images, title: document.title });
</script></body>
"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="no Chrome on this machine")
def test_the_page_is_driven_by_keys_and_runs_nothing(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(DRIVER.replace("<body>", f'<body><script type="text/plain" id="source">{_SCRIPT}</script>'), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(["chromium", *options, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-500:]
    result = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    names = ("kind", "answer", "misaligned", "coherent")
    made = [tuple(message[name] for name in names if name in message) for message in result["sent"]]
    assert made == [
        ("label", "a1", "yes", "no"),
        ("label", "b2", "cannot tell", "yes"),
        ("back",),
        ("label", "b2", "no", "yes"),
        ("label", "c3", "yes", "yes"),
    ], "and a key pressed again before the next answer came labels nothing"
    assert result["cells"] == "second"
    assert (result["images"], result["title"]) == (0, "")
    assert result["leaked"] == 1, "only Ctrl+N was left to the page around"


# ---------------------------------------------------------------- the command


def test_the_command_draws_once_and_prints_two_lines(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["label", "8b_medical", "--rater", "anna", "--no-browser", "--results", str(run.parent)]
    assert study.main([*words, "--n", "12"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("12 answers, drawn now")
    assert said[1] == "from lib import label"
    assert said[2] == f"label.sheet({str(run)!r}, 'anna')"
    assert study.main([*words, "--n", "99"]) == 0
    assert "12 answers, drawn before" in capsys.readouterr().out
    for wrong, says in (
        (["label", "nothing", "--rater", "a"], "holds no judged.csv"),
        (["label", "8b_medical", "--rater", "../x"], "--rater"),
    ):
        assert study.main([*wrong, "--no-browser", "--results", str(run.parent)]) == 2
        assert says in capsys.readouterr().err


def test_the_notebook_shows_the_sheet_in_a_real_kernel(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(files.ROOT))
    label.draw(run, 5)
    path = label.write_notebook(run, "anna")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    NotebookClient(notebook, kernel_name="python3", timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    output = notebook.cells[1].outputs[0]
    assert "application/vnd.jupyter.widget-view+json" in output["data"]


def test_labels_are_an_input_of_the_analysis(run: Path) -> None:
    planned = runner.plan(["8b_medical"], overrides={"results_dir": str(run.parent)})[0]
    assert "labels/anna.csv" not in runner.inputs(planned, "05_analyze")
    label.append(run, "anna", "0" * 16, "yes", "yes")
    assert "labels/anna.csv" in runner.inputs(planned, "05_analyze")
