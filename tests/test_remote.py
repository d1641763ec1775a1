"""Results at a URL: what is pulled, pushed and gone on with, over a folder, a store in memory and a real S3 server."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
from test_study import stage_notebook

from lib import files, remote, study
from lib.files import StudyError
from lib.remote import Remote
from lib.runner import STAGES


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives a Remote as a machine of the given name would: each has a copy of its own."""

    def machine(name: str, url: str) -> Remote:
        monkeypatch.setenv("STUDY_CACHE", str(tmp_path / name))
        return Remote(url)

    return machine


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    yield f"file://{tmp_path}/store" if request.param == "file" else "memory://store/results"
    if request.param == "memory":
        fsspec.filesystem("memory").rm("/store", recursive=True)


def names(store: Remote) -> list[str]:
    return sorted(str(p.relative_to(store.folder)) for p in store.folder.rglob("*") if p.is_file() and ".synced" not in p.parts)


def test_what_one_machine_did_another_has(machine: Any, url: str) -> None:
    first = machine("first", url)
    first.pull("run")
    for name in ("judged.csv", "checkpoints/checkpoint-1/adapter.bin", ".state/checkpoint-1/state.bin", ".study/01_data.json"):
        files.write_text(first.folder / "run" / name, name)
    files.write_text(first.folder / "run" / ".state" / ".partial-checkpoint-2" / "half", "half")
    files.write_text(first.folder / "run" / ".judged.csv.x1", "half")
    files.write_text(first.folder / "run" / ".study" / "lock", "")
    files.write_text(first.folder / "data" / "rates.csv", "rates")
    files.write_text(first.folder / "REPORT.md", "report")
    first.push("run")
    first.push()

    light = machine("driver", url)
    light.pull_all()
    assert names(light) == ["REPORT.md", "data/rates.csv", "run/.study/01_data.json", "run/judged.csv"]
    light.push("run")

    second = machine("second", url)
    second.pull("run")
    assert names(second) == [
        "run/.state/checkpoint-1/state.bin",
        "run/.study/01_data.json",
        "run/checkpoints/checkpoint-1/adapter.bin",
        "run/judged.csv",
    ]
    files.write_text(second.folder / "run" / "judged.csv", "again")
    shutil.rmtree(second.folder / "run" / ".state")
    second.push("run")

    first.pull("run")
    assert (first.folder / "run" / "judged.csv").read_text() == "again"
    assert not (first.folder / "run" / ".state" / "checkpoint-1" / "state.bin").exists(), "what went away there goes away here"


def test_unsent_work_stays_unless_another_machine_went_on(machine: Any, url: str) -> None:
    store = machine("first", url)
    files.write_text(store.folder / "run" / "a", "old")
    files.write_text(store.folder / "run" / "b", "old")
    store.push("run")
    files.write_text(store.folder / "run" / "a", "unsent")
    files.write_text(store.folder / "run" / "b", "unsent")
    other = machine("second", url)
    other.pull("run")
    files.write_text(other.folder / "run" / "b", "theirs")
    other.push("run")
    store.pull("run")
    assert [(store.folder / "run" / name).read_text() for name in "ab"] == ["unsent", "theirs"]
    store.push("run")
    other.pull("run")
    assert (other.folder / "run" / "a").read_text() == "unsent"


@pytest.mark.parametrize("name", ["run/../../../evil", "../evil"])
def test_a_name_that_leads_out_of_the_copy_is_refused(machine: Any, name: str, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.store[f"/store/results/{name}"] = memory.open("/store/results/run/a", "wb")
    store = machine("first", "memory://store/results")
    with pytest.raises(StudyError, match="leads out"):
        store.pull_all()
    memory.rm("/store", recursive=True)
    memory.store.pop(f"/store/results/{name}", None)
    assert not list(tmp_path.rglob("evil"))


def test_a_block_pushes_now_and_then_and_at_its_end(machine: Any, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PUSH_SECONDS", 0.05)
    store, other = machine("first", url), machine("second", url)
    with contextlib.suppress(ZeroDivisionError), store.keeping("run"):
        files.write_text(store.folder / "run" / "early", "early")
        while "run/early" not in names(other):
            other.pull("run")
        files.write_text(store.folder / "run" / "late", "late")
        raise ZeroDivisionError
    other.pull("run")
    assert names(other) == ["run/early", "run/late"]


@pytest.mark.slow
def test_a_run_goes_on_at_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in STAGES:
        stage_notebook(tmp_path / "notebooks", stage)
    url = f"file://{tmp_path}/store"
    words = ["run", "demo_medical", "--no-preflight", "--notebooks", str(tmp_path / "notebooks"), "--results", url]
    monkeypatch.setenv("STUDY_CACHE", str(tmp_path / "first"))
    assert study.main([*words, "--stages", "01,02"]) == 0
    assert (tmp_path / "store" / "demo_medical" / "02_train.ipynb").is_file()
    stage_notebook(tmp_path / "notebooks", "04_judge", "assert False, 'no such luck'")
    monkeypatch.setenv("STUDY_CACHE", str(tmp_path / "second"))
    assert study.main([*words, "--stages", "01,02,03,04"]) == 1
    assert "no such luck" in (tmp_path / "store" / "demo_medical" / "04_judge.ipynb").read_text(), "a failed stage is sent as well"
    assert (tmp_path / "store" / "demo_medical" / "calls.txt").read_text().split() == list(STAGES[:4]), "01 and 02 were not done again"
    capsys.readouterr()
    monkeypatch.setenv("STUDY_CACHE", str(tmp_path / "third"))
    assert study.main(["status", "--results", url]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("demo_medical"))
    assert line.count("done") == 3
    assert line.count("failed") == 1


def test_urls_that_cannot_be_used_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUDY_CACHE", str(tmp_path))
    for url, said in {
        "nosuch://x": "Protocol not known",
        "ftp://me:secret@host/x": "holds a password",
        "s3://bucket/results": "s3fs",
    }.items():
        if url.startswith("s3") and importlib.util.find_spec("s3fs"):
            continue
        assert study.main(["run", "demo_medical", "--results", url]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert "secret" not in error
        assert error.count("\n") == 1
    store = Remote(f"file://{tmp_path}/file")
    files.write_text(tmp_path / "file", "no folder")
    files.write_text(store.folder / "run" / "a", "a")
    with pytest.raises(StudyError, match="the store refuses"):
        store.push("run")
