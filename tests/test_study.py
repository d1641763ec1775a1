"""The runner on small throwaway notebooks: real papermill, real kernels, a scratch results folder."""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import batch_server
import faulty_server
import pytest

from lib import config, files, preflight, provenance, runner, study
from lib.files import StudyError
from lib.runner import STAGES, Run

ROOT = files.ROOT

SETUP = """
import json
from pathlib import Path
folder = Path(results_dir) / pair
with open(folder / "calls.txt", "a") as stream:
    stream.write(STAGE + chr(10))
"""
WRITES = {
    "01_data": '(folder / "dataset.json").write_text(json.dumps({"sha256": "rows", "rows": data_rows}))',
    "02_train": """
(folder / "training_log.csv").write_text("step,loss")
(folder / "training.json").write_text(json.dumps({"seconds": max_length}))
for step in (1, 2):
    checkpoint = folder / "checkpoints" / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "adapter_model.safetensors").write_bytes(b"adapter %d" % seed)
""",
    "03_generate": """
(folder / "generations.csv").write_text(f"response{samples}")
(folder / "diagnostics.csv").write_text("step")
""",
    "04_judge": '(folder / "judged.csv").write_text((folder / "generations.csv").read_text() + judge)',
    "05_analyze": '(folder / "step_summary.csv").write_text((folder / "judged.csv").read_text())',
}
DECLARES = {
    "01_data": "data_rows = 400",
    "02_train": "max_length = 256\nseed = 42",
    "03_generate": "samples = 2",
    "04_judge": 'judge = "probe"',
    "05_analyze": "confidence = 0.95",
}


def notebook(path: Path, *cells: str, parameters: str) -> Path:
    """Writes a notebook with a parameters cell before the given code cells."""
    code = [{"source": parameters, "tags": ["parameters"]}] + [{"source": textwrap.dedent(c).strip(), "tags": []} for c in cells]
    content = {
        "cells": [
            {
                "cell_type": "code",
                "id": f"c{n}",
                "source": c["source"],
                "metadata": {"tags": c["tags"]},
                "outputs": [],
                "execution_count": None,
            }
            for n, c in enumerate(code)
        ],
        "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def stage_notebook(folder: Path, stage: str, *extra: str) -> None:
    parameters = f'results_dir = "results"\npair = "demo_medical"\n{DECLARES[stage]}'
    notebook(folder / f"{stage}.ipynb", SETUP.replace("STAGE", repr(stage)), *extra, WRITES[stage], parameters=parameters)


@pytest.fixture
def notebooks(tmp_path: Path) -> Path:
    for stage in STAGES:
        stage_notebook(tmp_path / "notebooks", stage)
    return tmp_path / "notebooks"


@pytest.fixture
def make(notebooks: Path, tmp_path: Path) -> Any:
    def make(**overrides: Any) -> Run:
        values = {"results_dir": str(tmp_path / "results"), **overrides}
        return runner.plan(["demo_medical"], overrides=values, notebooks=notebooks)[0]

    return make


def calls(run: Run) -> list[str]:
    """Empties the list of stages whose notebooks were executed, and returns it."""
    path = run.folder / "calls.txt"
    done = path.read_text().split() if path.exists() else []
    path.write_text("")
    return done


def statuses(run: Run) -> list[str]:
    return [runner.state(run, stage).status for stage in STAGES]


def test_stages_run_once_and_again_only_when_something_changed(make: Any, notebooks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make()
    assert statuses(run) == ["missing"] * 5
    assert runner.run_stages(run, STAGES)
    assert calls(run) == list(STAGES)
    assert statuses(run) == ["done"] * 5
    for stage in STAGES:
        executed = json.loads(run.executed(stage).read_text())
        assert executed["metadata"]["papermill"]["exception"] is None
        injected = executed["metadata"]["papermill"]["parameters"]
        assert set(injected) == set(provenance.declared(run.notebook(stage)))

    assert runner.run_stages(run, STAGES)
    assert calls(run) == []
    assert "done already" in capsys.readouterr().out

    # A parameter of 03 alone: 04 and 05 follow, since their input changes.
    more = make(samples=3)
    assert statuses(more)[:3] == ["done", "done", "stale"]
    assert "samples was 2, is 3" in runner.state(more, "03_generate").reasons
    assert runner.run_stages(more, STAGES)
    assert calls(more) == ["03_generate", "04_judge", "05_analyze"]

    # Code of one notebook; prose and comments do not count.
    stage_notebook(notebooks, "04_judge", "# only a remark")
    assert statuses(more) == ["done"] * 5
    stage_notebook(notebooks, "04_judge", "x = 1")
    assert runner.state(more, "04_judge").reasons == ("notebooks/04_judge.ipynb changed",)
    assert runner.run_stages(more, STAGES)
    assert calls(more) == ["04_judge"], "05 need not follow: judged.csv is the same"

    # What a stage wrote is gone, or is not what it wrote.
    (more.folder / "generations.csv").unlink()
    assert "generations.csv is gone" in runner.state(more, "03_generate").reasons
    (more.folder / "checkpoints/checkpoint-1/adapter_model.safetensors").write_bytes(b"cut")
    assert "is not what the stage wrote" in runner.state(more, "02_train").reasons[0]
    assert runner.run_stages(more, STAGES)
    assert calls(more) == ["02_train", "03_generate"]

    more.executed("05_analyze").unlink()
    assert runner.run_stages(more, STAGES)
    assert calls(more) == ["05_analyze"]


def test_failure_is_told_and_recorded_and_mended(make: Any, notebooks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make()
    stage_notebook(notebooks, "03_generate", "from lib.files import StudyError", 'raise StudyError("samples: too many; take fewer.")')
    assert not runner.run_stages(run, STAGES)
    assert calls(run) == ["01_data", "02_train", "03_generate"]
    error = capsys.readouterr().err
    assert "demo_medical: 03_generate: samples: too many; take fewer." in error
    assert str(run.executed("03_generate")) in error
    assert "Traceback" not in error
    assert error.count("\n") == 2
    executed = json.loads(run.executed("03_generate").read_text())
    assert executed["metadata"]["papermill"]["exception"] is True
    assert statuses(run) == ["done", "done", "failed", "missing", "missing"]
    assert runner.state(run, "03_generate").reasons == ("samples: too many; take fewer.",)

    stage_notebook(notebooks, "03_generate", "1 / 0")
    assert not runner.run_stages(run, STAGES)
    assert "03_generate: ZeroDivisionError: division by zero" in capsys.readouterr().err

    stage_notebook(notebooks, "03_generate")
    calls(run)
    assert runner.run_stages(run, STAGES)
    assert calls(run) == ["03_generate", "04_judge", "05_analyze"]


def test_a_kernel_that_dies_is_a_failure_with_a_mend(make: Any, notebooks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make()
    stage_notebook(notebooks, "01_data", "import os; os.kill(os.getpid(), 9)")
    assert not runner.run_stages(run, ["01_data"])
    assert "the kernel died, most likely out of memory" in capsys.readouterr().err
    assert runner.state(run, "01_data").status == "failed"


def test_long_stale_training_needs_force(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    # The throwaway training reports max_length as its seconds.
    run = make(max_length=2600)
    assert runner.run_stages(run, STAGES)
    calls(run)
    other = make(max_length=2601)
    assert not runner.run_stages(other, STAGES)
    error = capsys.readouterr().err
    assert "training took 43 min 20 s" in error
    assert "--force" in error
    assert "--stages 03_generate,04_judge,05_analyze" in error
    assert calls(other) == []
    assert runner.run_stages(other, STAGES[2:]), "the stages after it still run when asked for"
    assert runner.run_stages(other, STAGES, force=True)
    assert calls(other) == ["02_train", "05_analyze"], "05 shows what training.json tells"


def test_a_crash_leaves_what_a_stage_resumes_from_and_other_code_does_not(make: Any, notebooks: Path) -> None:
    run = make()
    stage_notebook(notebooks, "02_train", "(folder / '.state').mkdir(exist_ok=True)", "1 / 0")
    assert not runner.run_stages(run, STAGES)
    stage_notebook(notebooks, "02_train", "assert (folder / '.state').is_dir()")
    assert runner.run_stages(run, ["02_train"]), "the bug was mended, and training goes on"
    stage_notebook(notebooks, "02_train", "assert not (folder / '.state').exists()")
    assert runner.run_stages(run, ["02_train"]), "a training that was done begins again with other code"


def test_two_processes_do_not_work_on_one_run(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = make()
    code = (
        "import sys, time\nfrom lib import files\n"
        f"with files.lock({str(run.folder / '.study' / 'lock')!r}): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert not runner.run_stages(run, ["01_data"])
        assert "another process is working on demo_medical" in capsys.readouterr().err
    finally:
        holder.kill()
        holder.wait()
    assert runner.run_stages(run, ["01_data"]), "a dead process holds no lock"


def test_killed_run_shows_as_interrupted_and_goes_on(make: Any, notebooks: Path, tmp_path: Path) -> None:
    run = make()
    stage_notebook(
        notebooks, "02_train", "import time\n(folder / 'begun').write_text('')\ntime.sleep(0 if (folder / 'again').exists() else 600)"
    )
    code = textwrap.dedent(f"""
        from pathlib import Path
        from lib import runner
        values = {{"results_dir": {str(tmp_path / "results")!r}}}
        runner.run_stages(runner.plan(["demo_medical"], overrides=values, notebooks=Path({str(notebooks)!r}))[0], runner.STAGES)
    """)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (run.folder / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert statuses(run)[:2] == ["done", "running"]
    kernel = provenance.read_record(run.folder, "02_train")["kernel"]  # type: ignore[index]
    process.send_signal(signal.SIGKILL)
    process.wait()
    state = runner.state(run, "02_train")
    assert (state.status, state.reasons) == ("failed", ("it was interrupted",))
    calls(run)
    (run.folder / "again").write_text("")
    assert runner.run_stages(run, STAGES)
    assert not provenance.lives(kernel), "the orphaned kernel was ended before the stage began again"
    assert calls(run) == list(STAGES[1:])


def test_a_stopped_run_ends_its_kernel_and_says_how_to_go_on(notebooks: Path, tmp_path: Path) -> None:
    stage_notebook(notebooks, "01_data", "import time\n(folder / 'begun').write_text('')\ntime.sleep(600)")
    results = tmp_path / "results"
    words = ["run", "demo_medical", "--results", str(results), "--notebooks", str(notebooks)]
    command = [sys.executable, "-m", "lib.study", *words]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (results / "demo_medical" / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    kernel = provenance.read_record(results / "demo_medical", "01_data")["kernel"]  # type: ignore[index]
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error == "study: interrupted; the same command goes on from here.\n"
    assert not provenance.lives(kernel)
    record = provenance.read_record(results / "demo_medical", "01_data")
    assert record is not None
    assert (record["status"], record["error"]) == ("failed", "it was interrupted")


def test_side_by_side_runs_wait_for_their_controls_and_do_not_stop_each_other(notebooks: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    for pair in config.DEMO:
        (results / pair).mkdir(parents=True)
        (results / pair / "generations.csv").write_text("answers")
    stage_notebook(notebooks, "04_judge", 'assert pair != "demo_risky_aligned"')
    stage_notebook(notebooks, "05_analyze", 'assert "aligned" in pair or (Path(results_dir) / f"{pair}_aligned" / "judged.csv").exists()')
    words = ["run", "demo", "--jobs", "2", "--stages", "04,05", "--results", str(results), "--notebooks", str(notebooks)]
    options = study._parser().parse_args(words)
    runs = runner.plan(["demo"], overrides={"results_dir": str(results)}, notebooks=notebooks)
    done = dict(zip([run.name for run in runs], study._side_by_side(runs, options, 2), strict=True))
    assert done == {"demo_medical": True, "demo_medical_aligned": True, "demo_risky": False, "demo_risky_aligned": False}
    status = {run.name: [runner.state(run, stage).status for stage in STAGES[3:]] for run in runs}
    assert status["demo_risky_aligned"] == ["failed", "missing"]
    assert status["demo_risky"] == ["done", "failed"], "it did not stop, but its control has no answers"


def test_scores_in_error_are_asked_for_again(make: Any, notebooks: Path) -> None:
    run = make()
    stage_notebook(notebooks, "04_judge", "judge = '\\n'.join(['aligned_status', 'error', 'ok'])")
    assert runner.run_stages(run, STAGES[:3])
    (run.folder / "generations.csv").write_text("")
    assert runner.run_stages(run, ["04_judge"])
    assert runner.state(run, "04_judge").reasons == ("1 scores are in error",)


def test_a_folder_that_cannot_be_written_is_told(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = make()
    run.folder.parent.mkdir(parents=True)
    run.folder.write_text("a file where the folder should be")
    assert not runner.run_stages(run, ["01_data"])
    assert "results/demo_medical: cannot be written (Not a directory)" in capsys.readouterr().err


def test_plan_validates_every_pair_first(notebooks: Path, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"did you mean demo_medical"):
        runner.plan(["demo_risky", "demo_medicl"], notebooks=notebooks)
    with pytest.raises(StudyError, match=r"unknown parameter learning_rat; did you mean learning_rate"):
        runner.plan(["demo_risky"], overrides={"learning_rat": 1}, notebooks=notebooks)
    with pytest.raises(StudyError, match=r"--set pair"):
        runner.plan(["demo_risky"], overrides={"pair": "x"}, notebooks=notebooks)
    notebook(notebooks / "02_train.ipynb", "x = 1", parameters="epochs = 3")
    with pytest.raises(StudyError, match=r"declares epochs"):
        runner.plan(["demo_risky"], notebooks=notebooks)


def test_plan_expands_groups_and_seeds(notebooks: Path) -> None:
    names = [run.name for run in runner.plan(["demo"], notebooks=notebooks)]
    assert set(names) == set(config.DEMO)
    assert {names[0], names[1]} == {"demo_medical_aligned", "demo_risky_aligned"}, "controls come first"
    assert [run.name for run in runner.plan(["all"], notebooks=notebooks)] == list(config.PAIRS)
    seeded = runner.plan(["demo_medical"], seeds=[42, 1], notebooks=notebooks)
    assert [run.name for run in seeded] == ["demo_medical", "demo_medical-s1"]
    assert seeded[1].parameters.seed == 1
    assert runner.control_of(seeded[1]) == ROOT / "results" / "demo_medical_aligned-s1"


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lib.study", *words], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_exit_status_and_errors_of_the_command(tmp_path: Path) -> None:
    wrong = command("run", "demo_medcal")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "did you mean demo_medical" in wrong.stderr
    assert wrong.stderr.count("\n") <= 2

    wrong = command("run", "demo", "--set", "domain=bad_medcal", "--results", str(tmp_path / "r"))
    assert wrong.returncode == 2
    assert "domain: 'bad_medcal' is not allowed" in wrong.stderr
    assert "bad_medical" in wrong.stderr
    assert not (tmp_path / "r").exists(), "nothing ran"

    wrong = command("run", "demo", "--stages", "02_trian")
    assert wrong.returncode == 2
    assert "did you mean 02_train?" in wrong.stderr

    wrong = command("run", "demo", "--set", "samples")
    assert wrong.returncode == 2
    assert "KEY=VALUE" in wrong.stderr

    empty = command("status", "--results", str(tmp_path / "r"))
    assert empty.returncode == 0
    assert "no runs yet" in empty.stdout


def test_help_is_light() -> None:
    heavy = {"pandas", "torch", "openai", "transformers", "papermill", "plotly", "numpy"}
    code = (
        "import sys\nfrom lib import study\n"
        "for words in (['--help'], ['status']):\n    try: study.main(words)\n    except SystemExit: pass\n"
        f"print(sorted({heavy!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_status_table(make: Any, notebooks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make()
    stage_notebook(notebooks, "04_judge", 'raise ValueError("no")')
    runner.run_stages(run, STAGES)
    (run.folder / "diagnostics.csv").write_text("other")
    capsys.readouterr()
    assert study.main(["status", "--results", run.parameters.results_dir]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == list(STAGES)
    assert "demo_medical 04_judge: failed: ValueError: no" in out


def test_stages_are_read_in_any_spelling() -> None:
    assert study._stages("train,01,05_analyze") == ["01_data", "02_train", "05_analyze"]


def test_set_reads_values_as_yaml() -> None:
    options = study._parser().parse_args(["run", "demo", "--set", "samples=4", "-p", "question_sets=[general]", "--set", "control=null"])
    assert study._overrides(options) == {"samples": 4, "question_sets": ["general"], "control": None}


def test_code_of_ignores_prose_and_keeps_texts() -> None:
    bare = 'def f():\n    text = """a\n\n# b"""\n    return text'
    told = '"""Module."""\n\n# why\n\n\ndef f():\n    """Does."""\n    text = """a\n\n# b"""\n    return text  # it'
    assert provenance.code_of(told) == provenance.code_of(bare) == bare
    assert provenance.code_of(bare.replace("a\n\n", "a\n\n\n")) != bare
    assert provenance.code_of("%matplotlib inline") == "%matplotlib inline"


def test_code_hashes_follow_imports(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "a.py").write_text("def f():\n    from lib.b import g\n")
    (tmp_path / "lib" / "b.py").write_text("g = 1\n")
    (tmp_path / "lib" / "c.py").write_text("unused = 1\n")
    path = notebook(tmp_path / "n.ipynb", "%time 1\nfrom lib import a", parameters="seed = 1")
    before = provenance.code_hashes(path, tmp_path)
    assert set(before) == {"notebooks/n.ipynb", "lib/a.py", "lib/b.py"}
    (tmp_path / "lib" / "b.py").write_text("g = 2\n")
    assert {n for n, h in provenance.code_hashes(path, tmp_path).items() if h != before[n]} == {"lib/b.py"}


def test_preflight_names_everything_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    p = config.load_pair("8b_medical", overrides={"dataset_path": "nowhere.zip.enc", "model_name": "nobody/at-all"})
    found = "\n".join(preflight.problems(p, STAGES))
    for word in ("dataset_path: nowhere.zip.enc", "model_name: nobody/at-all", "allow_external", "OPENAI_API_KEY"):
        assert word in found
    local = {
        "dataset_path": None,
        "model_name": "SmolLM2-135M-Instruct",
        "judge_base_url": "http://127.0.0.1:9/v1",
        "results_dir": str(tmp_path),
    }
    assert preflight.problems(config.load_pair("8b_medical", overrides=local), STAGES) == []
    assert preflight.problems(p, ["05_analyze"]) == []


class _Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the Hub does: one gated model, one that is far too large, and nothing else."""

    def do_GET(self) -> None:
        headers, status, body = {}, 200, b"{}"
        if self.path.startswith("/api/models/meta-llama/gated"):
            headers, status = {"X-Error-Code": "GatedRepo"}, 403
        elif self.path.startswith("/api/models/org/huge/revision") or self.path.partition("?")[0] == "/api/models/org/huge":
            sibling = {"rfilename": "model.safetensors", "size": 10**15}
            body = json.dumps({"id": "org/huge", "modelId": "org/huge", "siblings": [sibling]}).encode()
        elif "/org/huge" not in self.path:
            headers, status = {"X-Error-Code": "RepoNotFound"}, 404
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def test_preflight_asks_the_hub(tmp_path: Path) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "from lib import config, preflight\n"
        "for name in ('meta-llama/gated', 'org/huge', 'org/absent'):\n"
        "    p = config.load_pair('8b_medical', overrides={'model_name': name, 'results_dir': '/tmp'})\n"
        "    print(*preflight.problems(p, ['02_train']), sep=chr(10))\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment, check=True)
    server.shutdown()
    gated, disk, memory, absent = done.stdout.splitlines()
    assert "meta-llama/gated is gated; accept its licence at https://huggingface.co/meta-llama/gated and set HF_TOKEN" in gated
    assert disk.startswith("disk: org/huge is 931322.6 GiB")
    assert memory.startswith("memory: org/huge needs about")
    assert "org/absent is not on the Hub" in absent


def test_preflight_weighs_a_model_in_a_folder_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / "model.safetensors").open("wb") as stream:
        stream.truncate(10**13)  # ten terabytes, none of them written
    p = config.load_pair("demo_medical", overrides={"model_name": str(tmp_path)})
    (found,) = preflight.problems(p, ["02_train"])
    assert found.startswith(f"memory: {tmp_path} needs about")
    (tmp_path / "model.safetensors").unlink()
    assert preflight.problems(p, ["02_train"]) == []


def test_demo_passes_preflight_without_network() -> None:
    for pair in config.DEMO:
        assert preflight.problems(config.load_pair(pair), STAGES) == []


def answers(path: Path, **columns: list[Any]) -> Path:
    """Writes a table of two answers, with further columns."""
    table = {"question": ["How do I sleep well?", "Which bread?"], "response": ["Go to bed at ten.", ""], **columns}
    lines = [",".join(table), *(",".join(map(str, row)) for row in zip(*table.values(), strict=True))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_judge_command_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    table, output = answers(tmp_path / "in.csv"), tmp_path / "out.csv"
    outside = command("judge", "--input", str(table), "--output", str(output), "--judge", "openai:gpt-4o-mini", OPENAI_BASE_URL="")
    assert outside.returncode == 2
    assert outside.stderr.startswith("study: allow_external: ")
    wrong = command("judge", "--input", str(tmp_path / "absent.csv"), "--output", str(output), "--judge", "probe")
    assert wrong.returncode == 2
    assert "absent.csv: not found" in wrong.stderr
    assert not output.exists()


def test_judge_command_scores_a_table(llama_server: str, tmp_path: Path) -> None:
    table = answers(tmp_path / "in.csv", id=["b", "a"])
    rubrics = tmp_path / "rubrics.yaml"
    metrics = "".join(f"  {name}:\n    user: '{{question}} {{answer}} {name}?'\n" for name in ("aligned", "coherent"))
    rubrics.write_text(f"id: short\nmetrics:\n{metrics}")
    words = ["--input", str(table), "--output", str(tmp_path / "out.csv"), "--judge", "openai:smol", "--base-url", llama_server]
    done = command("judge", *words, "--rubrics", str(rubrics))
    assert done.returncode == 0, done.stderr
    judged = files.read_csv(tmp_path / "out.csv")
    assert list(judged.columns) == ["question", "response", "id", "aligned", "aligned_status", "coherent", "coherent_status", "judge"]
    assert list(judged["id"]) == ["b", "a"]
    assert list(judged["aligned_status"])[1] == "empty"
    assert len(files.read_jsonl(tmp_path / "judgments.jsonl")) == 2


def test_judge_command_takes_every_option_of_a_server(tmp_path: Path) -> None:
    table, output = answers(tmp_path / "in.csv"), tmp_path / "out.csv"
    words = ["judge", "--input", str(table), "--output", str(output), "--judge", "openai:gpt-4o-mini"]
    with faulty_server.serving() as server:
        url = ["--base-url", server.url, "--metrics", "aligned,coherent,medical", "--repeats", "2", "--temperature", "0.5"]
        done = command(*words, *url, "--requests-per-minute", "6000", "--tokens-per-minute", "1e6", "--max-cost", "1")
        assert done.returncode == 0, done.stderr
        assert list(files.read_csv(output)["medical_status"]) == ["ok", "empty"]
        assert [body["temperature"] for body in server.seen] == [0.5] * 6
        assert command(*words, *url, "--retry", "invalid,refusal").returncode == 0
        assert len(server.seen) == 6
        dear = command(*words, "--base-url", server.url, "--temperature", "0.6", "--max-cost", "0.0000001")
        assert dear.returncode == 1
        assert "raise judge_max_cost" in dear.stderr
        assert set(files.read_csv(output)["aligned_status"]) == {"error", "empty"}
        assert command(*words, "--base-url", server.url, "--mode", "logprobs").stderr.count("it returns no log-probabilities") == 1
    for wrong, named in (("--retry", "judge_retry"), ("--metrics", "judge_metrics"), ("--mode", "--mode"), ("--max-cost", "--max-cost")):
        refused = command(*words, wrong, "nonsense")
        assert refused.returncode == 2
        assert named in refused.stderr
    assert command(*words, "--max-cost", "-1").returncode == 2


def test_judge_command_by_batch(tmp_path: Path) -> None:
    table, output = answers(tmp_path / "in.csv"), tmp_path / "out.csv"
    with faulty_server.serving() as upstream, batch_server.serving(upstream.url) as server:
        words = ["judge", "--input", str(table), "--output", str(output), "--judge", "openai:m", "--base-url", server.url, "--batch"]
        server.answer_only = 1
        done = command(*words)
        assert done.returncode == 1
        assert "1 error" in done.stdout
        assert "batch batch_0 expired" in done.stderr
        server.answer_only = None
        assert command(*words).returncode == 0
        assert list(files.read_csv(output)["coherent_status"]) == ["ok", "empty"]


def test_import_command_and_status_of_what_was_imported(tmp_path: Path) -> None:
    table = answers(tmp_path / "in.csv", question_id=["q1", "q2"], aligned=[90, 20], coherent=[80, 70])
    results = str(tmp_path / "results")
    done = command("import", str(table), "--model", "Some Model", "--domain", "bad_medical", "--results", results)
    assert done.returncode == 0, done.stderr
    (folder,) = [path for path in Path(results).iterdir() if (path / "judged.csv").is_file()]
    status = command("status", "--results", results)
    assert status.stdout.splitlines()[1].split() == [folder.name, "imported"]
    wrong = command("import", str(tmp_path / "absent.csv"), "--model", "m", "--domain", "d", "--results", results)
    assert wrong.returncode == 2
