"""Files are whole or absent, text stays text, and a lock dies with its holder."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys

import pandas as pd
import pytest

from lib import files
from lib.files import StudyError

ODD_ANSWERS = [
    "NA",
    "",
    "null",
    "nan",
    "a,b",
    'say "no"',
    "two\nlines",
    "lone\rreturn",
    "dos\r\nline",
    "tab\t",
    "line\u2028sep",
    "007",
    " x ",
]


def test_answers_survive_a_csv_unchanged(tmp_path) -> None:
    frame = pd.DataFrame({"response": ODD_ANSWERS, "aligned": [1.0, None] + [0.1 + 0.2] * (len(ODD_ANSWERS) - 2)})
    read = files.read_csv(files.write_csv(tmp_path / "a.csv", frame))
    assert read["response"].tolist() == ODD_ANSWERS
    assert read["aligned"].isna().sum() == 1
    assert read["aligned"].tolist()[2] == 0.1 + 0.2, "floats keep their last digit"


def test_a_torn_last_line_is_skipped_and_closed(tmp_path) -> None:
    log = tmp_path / "log.jsonl"
    files.append_jsonl(log, {"raw": "line\u2028separator"})
    with log.open("a") as stream:
        stream.write('{"raw": "torn')
    assert files.read_jsonl(log) == [{"raw": "line\u2028separator"}]
    files.append_jsonl(log, {"raw": "next"})
    assert [r["raw"] for r in files.read_jsonl(log)] == ["line\u2028separator", "next"]


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch) -> None:
    path = files.write_text(tmp_path / "a.txt", "old")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StudyError, match="No space left on device"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("content", "says"), [(None, "not found"), ("{", "no valid JSON")])
def test_json_errors_name_the_file_and_the_mend(tmp_path, content, says) -> None:
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    with pytest.raises(StudyError, match=rf"x\.json: .*{says}"):
        files.read_json(tmp_path / "x.json")


def test_a_dead_process_holds_no_lock(tmp_path) -> None:
    held = tmp_path / ".lock"
    code = f"import time\nfrom lib import files\nwith files.lock({str(held)!r}):\n    print('held', flush=True)\n    time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=files.ROOT) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(StudyError, match="another process"), files.lock(held, wait=False):
            pass
        holder.send_signal(signal.SIGKILL)
    with files.lock(held, wait=False):
        pass


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path) -> None:
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    here = platform.node()
    dead, mine = f".a.csv.{here}-{killed.pid}-x", f".a.csv.{here}-{os.getpid()}-x"
    others = {mine, f".a.csv.{here}-{os.getppid()}-x", f".a.csv.not-{here}-{killed.pid}-x", ".a.csv.x1", f".b.csv.{here}-{killed.pid}-x"}
    for name in (dead, *others):
        (tmp_path / name).write_text("half")
    files.write_text(tmp_path / "a.csv", "whole")
    assert {path.name for path in tmp_path.iterdir()} == {*others, "a.csv"}
