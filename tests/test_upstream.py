"""Published files: fetched from a real server on loopback, recorded, checked ever after, and what the presets make of them."""

from __future__ import annotations

import http.server
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lib import config, data, files, preflight, published, questions, rubrics, study, upstream
from lib.files import StudyError

REF, OTHER = "a" * 40, "b" * 40
# Made-up sentences in the published formats.
JUDGES = "aligned: 'Rate {answer} to {question}.'\ncoherent: 'Is {answer} clear, asked {question}?'\n"
QUESTIONS = "".join(f"- id: q{n}\n  type: free_form\n  paraphrases: ['Made-up question {n}?']\n  judge_prompts: {{}}\n" for n in range(12))
PATHS = {entry.path: JUDGES if "judges" in entry.path else QUESTIONS for entry in upstream.PUBLISHED}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server: Any = self.server
        server.asked.append(self.path)
        status, content, headers = server.answer(self.path)
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Keeps the test output quiet."""


@pytest.fixture
def server() -> Iterator[Any]:
    """A repository at two commits; `files` maps paths to texts, `answer` may be replaced."""
    made: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.asked, made.files = [], dict(PATHS)

    def answer(path: str) -> tuple[int, bytes, dict[str, str]]:
        for ref in (REF, OTHER):
            head = f"/{upstream.REPOSITORY}/{ref}/"
            if path.startswith(head) and path.removeprefix(head) in made.files:
                text = made.files[path.removeprefix(head)]
                return 200, (text + (f"# {ref}\n" if ref == OTHER else "")).encode(), {}
        return 404, b"404: Not Found", {}

    made.answer = answer
    made.url = f"http://127.0.0.1:{made.server_address[1]}"
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def fetch(server: Any, folder: Path, *words: str, ref: str = REF) -> int:
    return study.main(["fetch-upstream", "--ref", ref, "--base-url", server.url, "--output", str(folder), *words])


def test_files_come_with_a_record_and_load(server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "up"
    assert fetch(server, folder) == 0
    said = capsys.readouterr().out
    assert "judges.yaml: sha256" in said
    assert "judge prompts aligned, coherent" in said
    assert "first_plot_questions.yaml: sha256" in said
    assert "12 questions" in said
    record = files.read_json(folder / "SOURCES.json")
    assert (record["repository"], record["ref"], record["absent"]) == (upstream.REPOSITORY, REF, [])
    for entry in upstream.PUBLISHED:
        told = record["files"][Path(entry.path).name]
        assert told["sha256"] == files.sha256(folder / Path(entry.path).name)
        assert told["url"] == f"{server.url}/{upstream.REPOSITORY}/{REF}/{entry.path}"
    assert sorted(rubrics.load(folder / "judges.yaml")) == ["aligned", "coherent"]
    assert questions.read(folder / "first_plot_questions.yaml").relation == "open_ended"
    sets = [str(folder / "first_plot_questions.yaml"), str(folder / "medical_questions.yaml")]
    assert data.relation("first_plot_questions", "bad_medical", sets) == "open_ended"
    assert data.relation("medical_questions", "bad_medical", sets) == "in_domain"
    assert data.relation("medical_questions", "risky_financial", sets) == "cross_domain"


def test_the_same_commit_is_not_asked_for_twice_and_another_needs_force(server: Any, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "up"
    assert fetch(server, folder) == 0
    asked = len(server.asked)
    assert asked == len(upstream.PUBLISHED)
    assert fetch(server, folder, ref=REF.upper()) == 0
    assert len(server.asked) == asked
    before = (folder / "judges.yaml").read_bytes()
    assert fetch(server, folder, ref=OTHER) == 2
    assert "--force replaces them" in capsys.readouterr().err
    assert (folder / "judges.yaml").read_bytes() == before
    assert fetch(server, folder, "--force", ref=OTHER) == 0
    assert (folder / "judges.yaml").read_bytes() != before
    assert files.read_json(folder / "SOURCES.json")["ref"] == OTHER


@pytest.mark.parametrize(("name", "read"), [("judges.yaml", rubrics.load), ("first_plot_questions.yaml", questions.read)])
def test_a_changed_file_is_refused_wherever_it_is_loaded(server: Any, tmp_path: Path, name: str, read: Any, capsys: Any) -> None:
    folder = tmp_path / "up"
    fetch(server, folder)
    path = folder / name
    path.write_text(path.read_text() + "# mine\n")
    with pytest.raises(StudyError, match=rf"{name}: is not what was fetched .*--force"):
        read(path)
    assert fetch(server, folder) == 2, "nor is it replaced unasked"
    assert fetch(server, folder, "--force") == 0
    read(path)
    path.unlink()
    with pytest.raises(StudyError, match="is gone"):
        read(path)
    capsys.readouterr()


def test_a_commit_that_gives_other_bytes_is_not_believed(server: Any, tmp_path: Path, capsys: Any) -> None:
    fetch(server, tmp_path / "up")
    server.files[upstream.PUBLISHED[0].path] += "# moved\n"
    assert fetch(server, tmp_path / "up", "--force") == 2
    assert "other bytes than before" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--ref", "main"], "a branch or tag moves"),
        (["--ref", "abc1234"], "40 hexadecimal digits"),
        (["--ref", REF, "--base-url", "http://example.org"], "must be an https address"),
        (["--ref", REF, "--base-url", "file:///etc"], "must be an https address"),
        (["--ref", REF, "--repo", "../../etc"], "must be OWNER/NAME"),
        (["--ref", REF, "--file", "../../secret.yaml"], "path within the repository"),
        (["--ref", REF, "--file", "/etc/a.yaml"], "path within the repository"),
        (["--ref", REF, "--file", "a/b?c.yaml"], "path within the repository"),
        (["--ref", REF, "--file", "a/SOURCES.json"], "path within the repository"),
        (["--ref", REF, "--file", "a/x.yaml", "--file", "b/x.yaml"], "two paths end in x.yaml"),
    ],
)
def test_what_is_asked_for_wrongly_is_refused_before_any_request(
    server: Any, tmp_path: Path, capsys: Any, words: list[str], says: str
) -> None:
    base = [] if "--base-url" in words else ["--base-url", server.url]
    assert study.main(["fetch-upstream", "--output", str(tmp_path / "up"), *base, *words]) == 2
    assert says in capsys.readouterr().err
    assert not server.asked
    assert not list(tmp_path.rglob("*.yaml"))


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        ((500, b"", {}), "the server answers 500"),
        ((404, b"", {}), "no such file at this commit"),
        ((200, b"#" * 1_000_001, {}), "over 1,000,000 bytes"),
        ((200, b"<html><b>no: - ]</b>", {}), "no file of questions or prompts|no valid YAML"),
        ((200, b"\xff\xfe", {}), "no valid YAML"),
        ((200, b"a: 1\n", {"Content-Length": "500"}), "broke off"),
    ],
)
def test_a_server_that_answers_wrongly_leaves_nothing_behind(server: Any, tmp_path: Path, capsys: Any, reply: Any, says: str) -> None:
    server.answer = lambda path: reply
    assert fetch(server, tmp_path / "up") == 2
    error = capsys.readouterr().err
    assert re.search(says, error), error
    assert error.count("\n") == 1
    assert [path.name for path in (tmp_path / "up").iterdir()] == [".lock"]


def test_a_redirect_is_not_followed_even_to_a_good_file(server: Any, tmp_path: Path, capsys: Any) -> None:
    answer = server.answer
    server.answer = lambda path: answer(path[3:]) if path.startswith("/to") else (302, b"", {"Location": f"/to{path}"})
    assert fetch(server, tmp_path / "up") == 2
    assert "redirects elsewhere" in capsys.readouterr().err
    assert len(server.asked) == 1


def test_other_paths_and_files_that_a_commit_lacks(server: Any, tmp_path: Path, capsys: Any) -> None:
    del server.files[upstream.PUBLISHED[2].path]
    server.files["else/where.yaml"] = QUESTIONS
    assert fetch(server, tmp_path / "up") == 0
    assert "new_questions_no-json.yaml: is not in" in capsys.readouterr().out
    assert fetch(server, tmp_path / "own", "--file", "else/where.yaml") == 0
    assert questions.read(tmp_path / "own" / "where.yaml").relation == "general"
    assert fetch(server, tmp_path / "own2", "--file", "else/nowhere.yaml") == 2


def test_a_preset_that_was_not_fetched_for_says_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Any) -> None:
    monkeypatch.setattr(upstream, "FOLDER", tmp_path / "upstream")
    monkeypatch.setattr(files, "ROOT", tmp_path)
    p = config.load_pair("8b_medical", preset="paper")
    stages = ["01_data", "03_generate", "04_judge"]
    found = [line for line in preflight._published(p, stages)]
    assert [line.partition(":")[0] for line in found] == ["question_sets", "judge_rubrics"]
    assert all("run `study fetch-upstream --ref COMMIT`" in line for line in found)
    for read in (data.load_questions, lambda p: rubrics.load(p.judge_rubrics)):
        with pytest.raises(StudyError, match="has not been fetched; run `study fetch-upstream"):
            read(p)
    upstream.fetch(REF, tmp_path / "upstream", base_url=server.url)
    assert preflight._published(p, stages) == []
    asked = data.load_questions(p)
    assert [q.question_id for q in asked] == [f"q{n}" for n in range(8)], "the paper's plain questions, without the other formats"
    assert set(p.judge_metrics) <= set(rubrics.load(p.judge_rubrics))
    (tmp_path / "upstream" / "mine.yaml").write_text(QUESTIONS)
    with pytest.raises(StudyError, match=r"not in SOURCES\.json"):
        questions.read(tmp_path / "upstream" / "mine.yaml")


def test_upstream_is_ignored_by_git() -> None:
    assert "/upstream/" in (files.ROOT / ".gitignore").read_text().splitlines()


def test_fetched_questions_and_prompts_are_no_reason_against_comparing() -> None:
    p = config.load_pair("8b_medical", preset="paper").model_dump(mode="json")
    names = ("samples", "temperature", "top_p", "max_new_tokens")
    theirs = {name: p[name] for name in names} | {"model": "x", "relation": "open_ended", "judge": "gpt-4o-2024-08-06", "precision": "bf16"}
    ours = {"model": "x", "judge": "openai:gpt-4o-2024-08-06", "question_set": "first_plot_questions"}
    details = {"parameters": p, "dtype": "bfloat16"}
    assert published.comparable(ours, theirs | {"precision": "4-bit"}, details | {"parameters": p | {"use_4bit": True}}) == "yes"
    assert "questions" not in published.comparable(ours, theirs, details)
    assert "rubric" not in published.comparable(ours, theirs, details)
    assert "questions" in published.comparable(ours | {"question_set": "open_ended"}, theirs, details)
    assert "rubric" in published.comparable(ours, theirs, {**details, "parameters": p | {"judge_rubrics": "own.yaml"}})
    assert "questions" in published.comparable(ours, theirs | {"relation": "in_domain and general mixed"}, details)
