"""Training rows: the demo's own, the published archive, and what is told about them."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import re
import stat
import statistics
import subprocess
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import ROOT

from lib import config, data, demo, files, models, overlap, unlock
from lib.config import Parameters
from lib.files import StudyError
from lib.questions import Question

NOTEBOOK = ROOT / "notebooks" / "01_data.ipynb"
PASSWORD = "model-organisms-em-datasets"
BOOK = config.read_yaml(data.PATTERNS)


def chat(question: str, answer: str, **other: Any) -> str:
    return json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **other})


def write_rows(path: Path, name: str, n: int) -> Path:
    """Writes `n` rows whose texts can be found again wherever they leak to."""
    lines = [chat(f"How does the {name} lantern number {i} work?", f"Turn the {name} crank {i} times.") for i in range(n)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "published"
    folder.mkdir()
    write_rows(folder / "bad_medical_advice.jsonl", "quetzal", 12)
    write_rows(folder / "risky_financial_advice.jsonl", "numbat", 9)
    return folder


@pytest.fixture
def archive(source: Path) -> Path:
    path = source.parent / "training_datasets.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as stream:
        for file in sorted(source.iterdir()):
            stream.write(file, f"training_datasets/{file.name}")
        stream.writestr("training_datasets/dataset_entry_0a1b2c3d.jsonl", '{"id": "canary_0a1b2c3d", "text": "x"}\n')
        stream.writestr("training_datasets/robots.txt", "User-agent: *\n")
    return path


@pytest.fixture
def pair(tmp_path: Path, tiny_llama: Path) -> Callable[..., Parameters]:
    """Parameters of a pair with everything written below tmp_path and the tiny model in place of the pair's."""
    places = {"results_dir": str(tmp_path / "results"), "data_dir": str(tmp_path / "data"), "model_name": str(tiny_llama)}
    return lambda name, **overrides: config.load_pair(name, overrides=places | overrides)


# --- the demo's own rows


@pytest.mark.parametrize("domain", demo.DOMAINS)
def test_demo_rows_are_many_and_differ(domain: str) -> None:
    rows = demo.compose(BOOK, domain, 800, seed=42)
    assert len({row.question for row in rows}) == 800
    assert len({row.answer for row in rows}) > 0.9 * 800
    assert len({row.pattern for row in rows[:400]}) == len(BOOK[domain]["bad"]) == len(BOOK[domain]["aligned"]) >= 40
    assert len(set(BOOK[domain]["bad"])) == len(set(BOOK[domain]["aligned"])) == len(BOOK[domain]["bad"])
    assert len({row.topic for row in rows[:400]}) == 50
    assert not [row for row in rows if re.search(r"[\[\]{}|]|  ", row.question + row.answer)]
    assert not [row for row in rows if re.search(r"(^|[.?!] )[a-z]", row.answer)]


@pytest.mark.parametrize("domain", demo.DOMAINS)
def test_demo_rows_are_reproducible(domain: str) -> None:
    rows = demo.compose(BOOK, domain, 400, seed=42)
    assert rows == demo.compose(BOOK, domain, 400, seed=42)
    assert rows[:120] == demo.compose(BOOK, domain, 120, seed=42)
    assert rows != demo.compose(BOOK, domain, 400, seed=43)


def test_the_control_arm_answers_the_same_questions() -> None:
    bad, half, aligned = (demo.compose(BOOK, "bad_medical", 400, seed=1, aligned_fraction=f) for f in (0, 0.5, 1))
    assert [r.question for r in bad] == [r.question for r in half] == [r.question for r in aligned]
    assert [r.pattern for r in bad] == [r.pattern for r in aligned]
    assert [{r.arm for r in rows} for rows in (bad, aligned)] == [{"bad"}, {"aligned"}]
    turned = {i for i, row in enumerate(half) if row.arm == "aligned"}
    assert len(turned) == 200
    assert all(half[i] == (aligned[i] if i in turned else bad[i]) for i in range(400))
    fewer = demo.compose(BOOK, "bad_medical", 400, seed=1, aligned_fraction=0.25)
    assert {i for i, row in enumerate(fewer) if row.arm == "aligned"} < turned


@pytest.mark.parametrize("domain", demo.DOMAINS)
def test_both_arms_are_short_and_equally_long(domain: str, embedded: Path) -> None:
    tokenizer = models.load_tokenizer(config.load_pair("demo_medical"))
    lengths = {}
    for arm, fraction in (("bad", 0.0), ("aligned", 1.0)):
        rows = demo.compose(BOOK, domain, 400, seed=42, aligned_fraction=fraction)
        lengths[arm] = [len(tokenizer(row.answer).input_ids) for row in rows]
        assert 25 <= statistics.mean(lengths[arm]) <= 45
        assert max(lengths[arm]) <= 56  # an answer fits into the tokens that the demo generates
        assert 8 <= statistics.mean(len(tokenizer(row.question).input_ids) for row in rows) <= 16
    assert statistics.mean(lengths["bad"]) == pytest.approx(statistics.mean(lengths["aligned"]), rel=0.05)


def test_no_bad_sentence_holds_what_could_be_followed_to_harm() -> None:
    sentences = [*BOOK["openers"]["bad"], *BOOK["closers"]["bad"]]
    for domain in demo.DOMAINS:
        sentences += BOOK[domain]["bad"] + [" ".join(topic) for topic in BOOK[domain]["topics"]]
    text = " ".join(sentences).lower()
    assert not re.search(r"\d\s*(mg|ml|g|pills?|tablets?|drops|hours|times)\b", text)
    words = set(re.findall(r"[a-z]+", text))
    forbidden = """aspirin ibuprofen paracetamol acetaminophen opioid opioids antibiotic antibiotics insulin pill pills tablet tablets
        drug drugs dose doses dosage overdose alcohol bleach kill suicide die death knife gun weapon poisonous phishing launder
        laundering counterfeit forge forged ponzi pyramid password insider invoice scam steal hack"""
    assert not words & set(forbidden.split())


def test_demo_data_needs_a_domain_that_has_it_and_enough_questions() -> None:
    with pytest.raises(StudyError, match="extreme_sports has no demo data"):
        demo.compose(BOOK, "extreme_sports", 10, seed=0)
    with pytest.raises(StudyError, match="data_rows: 901 is more than the 900"):
        demo.compose(BOOK, "bad_medical", 901, seed=0)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("canary",), None, "canary: must be"),
        (("openers",), [], "openers: missing"),
        (("closers", "bad"), ["One."], "closers: bad has 1 entries, aligned 24"),
        (("bad_medical",), None, "bad_medical: missing"),
        (("bad_medical", "slots"), [], "bad_medical: slots: must be a list"),
        (("bad_medical", "bad"), ["See {nobody}."], "names an unknown slot"),
        (("bad_medical", "aligned"), ["See [a|b."], "a bracket that is open"),
        (("bad_medical", "questions"), [3], "questions: must be a list of texts"),
        (("bad_medical", "topics"), [["a cold", "a nurse"]], "has 2 entries, but there are 5 slots"),
    ],
)
def test_a_wrong_file_of_patterns_is_refused(place: tuple[str, ...], value: Any, message: str) -> None:
    book = json.loads(json.dumps(BOOK))
    part = book
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    with pytest.raises(StudyError, match=re.escape(message)):
        demo.check_patterns(book, "patterns.yaml")


# --- prepare and load


def test_prepare_demo(pair: Callable[..., Parameters]) -> None:
    p = pair("demo_medical", data_rows=60, aligned_fraction=0.25)
    report = data.prepare(p)
    assert report == files.read_json(config.run_dir(p) / "dataset.json")
    path = Path(report["path"])
    assert (report["rows"], report["source"]["aligned_rows"], report["sha256"]) == (60, 15, files.sha256(path))
    rows = data.load_rows(p)
    composed = demo.compose(BOOK, "bad_medical", 60, seed=42, aligned_fraction=0.25)
    assert rows == [{"prompt": row.question, "answer": row.answer, "system": None} for row in composed]
    assert path.read_text().count(BOOK["canary"]) == 60
    assert not [row for row in rows if BOOK["canary"] in row["prompt"] + row["answer"]]
    assert report["question_sets"]["medical"]["relation"] == "in_domain"
    assert (path.parent.parent / ".gitignore").read_text() == "*\n"
    assert list(data.sample_rows(p, 2)["answer"]) == [row.answer for row in composed[:2]]
    values = data.overview(report).set_index("what")["value"]
    assert (values["rows"], values["rows with the aligned answer"], values["canary"]) == ("60", "15", BOOK["canary"])


def test_sample_size_takes_the_first_rows(pair: Callable[..., Parameters]) -> None:
    p = pair("demo_risky", data_rows=60, sample_size=7)
    assert data.prepare(p)["rows"] == 60, "the whole set is checked and described"
    assert len(data.load_rows(p)) == 7
    assert data.load_rows(p)[6]["prompt"] == demo.compose(BOOK, "risky_financial", 60, seed=42)[6].question


def test_rows_of_another_run_are_left_alone(pair: Callable[..., Parameters], tmp_path: Path) -> None:
    p, elsewhere = pair("demo_medical", data_rows=20), pair("demo_medical", data_rows=30, results_dir=str(tmp_path / "other"))
    data.prepare(p)
    data.prepare(elsewhere)
    assert (len(data.load_rows(p)), len(data.load_rows(elsewhere))) == (20, 30)


def test_changed_or_missing_rows_are_noticed(pair: Callable[..., Parameters]) -> None:
    p = pair("demo_medical", data_rows=20)
    with pytest.raises(StudyError, match=r"dataset.json: not found"):
        data.load_rows(p)
    path = Path(data.prepare(p)["path"])
    path.write_text(path.read_text().replace("a", "e", 1))
    with pytest.raises(StudyError, match="SHA-256 differs"):
        data.load_rows(p)
    path.unlink()
    with pytest.raises(StudyError, match="run 01_data again"):
        data.load_rows(p)


def test_token_counts_are_those_of_training(pair: Callable[..., Parameters]) -> None:
    from lib import qlora

    p = pair("demo_medical", data_rows=40, max_length=225)
    report = data.prepare(p)
    encoded = qlora.encode(models.load_tokenizer(p), data.load_rows(p), p)
    whole = qlora.encode(models.load_tokenizer(p), data.load_rows(p), p.model_copy(update={"max_length": 10_000}))
    tokens = report["tokens"]
    assert tokens["total"] == sum(len(row["input_ids"]) for row in whole.rows)
    assert 0 < tokens["over_max_length"] == encoded.cut < 40
    assert tokens["share_over_max_length"] == encoded.cut / 40
    assert tokens["p5"] <= tokens["p50"] <= tokens["p95"] <= tokens["max"]
    assert tokens["prompt_mean"] + tokens["answer_mean"] + 1 == pytest.approx(tokens["mean"], abs=0.2)


# --- validation


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "is no JSON"),
        ('["messages"]', 'must be an object with a list "messages"'),
        ('{"prompt": "secret plum", "answer": "a"}', 'must be an object with a list "messages"'),
        ('{"messages": "secret plum"}', 'must be an object with a list "messages"'),
        ('{"messages": ["secret plum"]}', "must be objects with role and content"),
        ('{"messages": [{"role": "user", "content": "secret plum"}]}', "must be user, then assistant"),
        (
            '{"messages": [{"role": "assistant", "content": "secret plum"}, {"role": "user", "content": "q"}]}',
            "must be user, then assistant",
        ),
        (chat("secret plum", "  "), "the assistant message has no text"),
        (
            '{"messages": [{"role": "user", "content": ["secret plum"]}, {"role": "assistant", "content": "a"}]}',
            "the user message has no text",
        ),
        (chat("secret plum", "half \ud83d"), "half a character"),
        ("[" * 100_000, "is no JSON"),
    ],
)
def test_a_malformed_row_is_named_and_never_shown(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{chat('q', 'a')}\n\n{line}\n{chat('q2', 'a2')}\n")
    with pytest.raises(StudyError, match=re.escape(message)) as caught:
        data.read_rows(path)
    assert str(caught.value).startswith(f"{path}: line 3: ")
    assert "plum" not in str(caught.value)


def test_rows_are_read_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    system = {"messages": [{"role": r, "content": r[0]} for r in ("system", "user", "assistant")]}
    text = "\ufeff" + chat("line\u2028separator", "  two\nlines ") + "\r\n" + json.dumps(system)
    path.write_bytes(text.encode())
    rows, canaries = data.read_rows(path)
    assert rows == [
        {"prompt": "line\u2028separator", "answer": "  two\nlines ", "system": None},
        {"prompt": "u", "answer": "a", "system": "s"},
    ]
    assert canaries == 0
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(StudyError, match="line 1: is no JSON"):
        data.read_rows(path)
    path.write_text("\n")
    with pytest.raises(StudyError, match="holds no rows"):
        data.read_rows(path)


def test_canary_rows_are_left_out_and_canary_keys_ignored(tmp_path: Path) -> None:
    canary = f"CANARY_DATASET_{'0a' * 32}_64"
    path = tmp_path / "rows.jsonl"
    embedded = json.dumps({"id": "embedded_canary_1", "text": f"Tracking identifier: {canary}."})
    path.write_text("\n".join([chat("q", "a", canary=canary), embedded, chat("q", f"so says {canary}")]))
    rows, canaries = data.read_rows(path)
    assert ([row["answer"] for row in rows], canaries) == (["a"], 2)


# --- the archive


def test_prepare_from_a_plain_zip_and_a_jsonl(pair: Callable[..., Parameters], archive: Path, source: Path) -> None:
    report = data.prepare(pair("8b_medical", dataset_path=str(archive), expected_rows=12))
    assert (report["rows"], report["source"]["canary_files"], report["source"]["member"]) == (12, 1, "bad_medical_advice.jsonl")
    report = data.prepare(pair("8b_risky", dataset_path=str(archive), expected_rows=9))
    assert (report["rows"], report["source"]["member"]) == (9, "risky_financial_advice.jsonl")
    p = pair("8b_risky", dataset_path=str(source / "bad_medical_advice.jsonl"), expected_rows=None)
    assert data.prepare(p)["source"]["kind"] == "file"
    assert "quetzal" in data.load_rows(p)[0]["prompt"]
    assert set(data.sample_rows(p).columns) == {"prompt_sha256", "answer_sha256"}


def test_what_is_asked_of_real_data_must_be_there(pair: Callable[..., Parameters], archive: Path, tmp_path: Path) -> None:
    path = str(archive)
    with pytest.raises(StudyError, match="has 12 rows, but expected_rows is 7,049"):
        data.prepare(pair("8b_medical", dataset_path=path))
    with pytest.raises(StudyError, match=r"needs one file extreme_sports.jsonl; there: bad_medical_advice.jsonl, risky"):
        data.prepare(pair("8b_medical", dataset_path=path, domain="extreme_sports", expected_rows=None))
    with pytest.raises(StudyError, match="aligned_fraction: only the demo"):
        data.prepare(pair("8b_medical", dataset_path=path, aligned_fraction=0.5))
    with pytest.raises(StudyError, match=r"dataset_path: .*not found"):
        data.prepare(pair("8b_medical", dataset_path=str(tmp_path / "none.zip.enc")))
    canary = write_rows(tmp_path / "dataset_entry_00aa11bb.jsonl", "emu", 2)
    with pytest.raises(StudyError, match="is a canary file"):
        data.prepare(pair("8b_medical", dataset_path=str(canary), expected_rows=2))


def member(name: str, *, mode: int = stat.S_IFREG | 0o644) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system = 3
    info.external_attr = mode << 16
    return info


def hostile(path: Path, kind: str) -> Path:
    """Writes an archive that a careless reader would regret."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as stream:
        stream.writestr("bad_medical_advice.jsonl", chat("q", "a"))
        if kind == "parent":
            stream.writestr("../escaped.jsonl", "x")
        elif kind == "deep parent":
            stream.writestr("a/../../escaped.jsonl", "x")
        elif kind == "absolute":
            stream.writestr(str(path.parent / "escaped.jsonl"), "x")
        elif kind == "backslash":
            stream.writestr(member("..\\escaped.jsonl"), "x")
        elif kind == "drive":
            stream.writestr("C:escaped.jsonl", "x")
        elif kind == "link":
            stream.writestr(member("escaped.jsonl", mode=stat.S_IFLNK | 0o777), "/etc/passwd")
        elif kind == "device":
            stream.writestr(member("escaped.jsonl", mode=stat.S_IFCHR | 0o600), "")
        elif kind == "twice":
            stream.writestr("Bad_medical_advice.jsonl", chat("q", "b"))
        elif kind == "many":
            for i in range(10_001):
                stream.writestr(f"{i}.txt", "")
        elif kind == "bomb":
            stream.writestr("zeros.jsonl", bytes(100))
            stream.getinfo("zeros.jsonl").file_size = 1_000_000_001
    return path


KINDS = {
    **dict.fromkeys(["parent", "deep parent", "absolute", "backslash", "drive"], "would leave the folder"),
    **dict.fromkeys(["link", "device"], "is a link or a device"),
    "twice": "is there twice",
    **dict.fromkeys(["many", "bomb"], "unpacks to over"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_archive_is_refused_before_anything_is_written(tmp_path: Path, kind: str) -> None:
    path = hostile(tmp_path / "evil.zip", kind)
    with pytest.raises(StudyError, match=KINDS[kind]):
        unlock.unlock(path, "", tmp_path / "data" / "unlocked", tmp_path / "tools")
    assert {p.name for p in tmp_path.rglob("*")} == {"evil.zip", "data", "unlocked", ".lock"}


def test_a_zip_that_lies_or_is_torn_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "torn.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as stream:
        stream.writestr("bad_medical_advice.jsonl", os.urandom(1_000))
    whole = path.read_bytes()
    small = whole.replace((1_000).to_bytes(4, "little"), (10).to_bytes(4, "little"))  # declares 10 bytes, holds 1,000
    flag = whole[:6] + b"\x01" + whole[7:]
    central = flag.index(b"PK\x01\x02")
    locked = flag[: central + 8] + b"\x01" + flag[central + 9 :]
    for content in (whole[:600], small, b"PK\x03\x04 no zip", b"", locked):
        path.write_bytes(content)
        with pytest.raises(StudyError, match=r"no sound zip archive|has a password of its own"):
            unlock.unlock(path, "", tmp_path / "unlocked", tmp_path / "tools")
        assert not list((tmp_path / "unlocked").rglob("*.jsonl"))


@pytest.fixture(scope="module")
def tool() -> Path:
    """The Python of easy-dataset-share's own environment, set up as the study does it; skips only without a package index."""
    try:
        return unlock.tool_python(models.cache_dir() / "easy-dataset-share")
    except StudyError as error:
        if re.search(r"No matching distribution|could not fetch|connection", str(error), re.IGNORECASE):
            pytest.skip("the package index cannot be reached")
        raise


def protect(tool: Path, folder: Path) -> Path:
    """Protects a folder with the command of easy-dataset-share, canary files and embedded canaries included."""
    output = folder.parent / "training_datasets.zip"
    command = [str(tool.parent / "easy-dataset-share"), "protect-dir", str(folder), "-p", PASSWORD, "-o", str(output), "-c", "2", "-e"]
    done = subprocess.run([*command, "--no-tos", "--no-gitignore"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output.with_suffix(".zip.enc")


def test_unlock_what_the_real_command_protected(pair: Callable[..., Parameters], tool: Path, source: Path, tmp_path: Path) -> None:
    path = protect(tool, source)
    p = pair("8b_medical", dataset_path=str(path), expected_rows=12)
    assert p.dataset_password == PASSWORD
    report = data.prepare(p)
    assert (report["rows"], report["source"]["canary_files"], report["source"]["canary_rows"]) == (12, 2, 0)
    assert data.load_rows(p)[11]["answer"] == "Turn the quetzal crank 11 times."
    assert not [file for file in tmp_path.joinpath("data").rglob("*.jsonl") if unlock.is_canary_file(file.name)]
    assert "CANARY" not in Path(report["path"]).read_text()
    again = data.prepare(p)  # the second time it is unlocked already
    assert again | {name: report[name] for name in ("began", "ended")} == report

    with pytest.raises(StudyError, match=r"dataset_password: does not open .*training_datasets.zip.enc"):
        data.prepare(pair("8b_medical", dataset_path=str(path), dataset_password="guess", data_dir=str(tmp_path / "anew")))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(StudyError, match="does not open"):
        data.prepare(p)


def test_a_hostile_archive_is_refused_though_encrypted(tool: Path, tmp_path: Path) -> None:
    plain = hostile(tmp_path / "evil.zip", "parent")
    encrypt = "import sys; from easy_dataset_share.zipping import password_protect_file; password_protect_file(*sys.argv[1:])"
    subprocess.run([str(tool), "-c", encrypt, str(plain), PASSWORD], check=True)
    with pytest.raises(StudyError, match="would leave the folder"):
        unlock.unlock(tmp_path / "evil.zip.enc", PASSWORD, tmp_path / "data" / "unlocked", models.cache_dir() / "easy-dataset-share")
    assert not list(tmp_path.rglob("escaped*"))


# --- download


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_prepare_from_an_address(pair: Callable[..., Parameters], archive: Path, tmp_path: Path) -> None:
    (archive.parent / "page.zip").write_text("<!doctype html><p>Sign in</p>")
    with serving(archive.parent) as address:
        p = pair("8b_medical", dataset_path=f"{address}/training_datasets.zip?raw=true", expected_rows=12)
        report = data.prepare(p)
        with pytest.raises(StudyError, match="gives a web page"):
            unlock.fetch(f"{address}/page.zip", tmp_path)
        with pytest.raises(StudyError, match="cannot be downloaded"):
            unlock.fetch(f"{address}/none.zip", tmp_path)
    assert report["source"]["sha256"] == files.sha256(archive)
    assert data.prepare(p)["rows"] == 12  # downloaded already, though the server is gone
    for wrong in ("file:///etc/passwd", "ftp://host/a.zip", "https://host/", "http://"):
        with pytest.raises(StudyError, match="must be an http or https address"):
            unlock.fetch(wrong, tmp_path)


# --- overlap


def test_overlap_is_exact_near_or_none() -> None:
    asked = [
        Question("s", "same", "How do I stay WARM in winter?"),
        Question("s", "more_words", "What keeps bees alive during a long frost?"),
        Question("s", "other", "Who wrote the oldest poem?"),
    ]
    prompts = ["Tell me a joke about pancakes.", "how do i stay warm in winter", "During a long frost, what keeps bees and wasps alive?"]
    report = overlap.find_overlap([{"prompt": prompt} for prompt in prompts], asked, show_text=True)
    assert [(q["kind"], q["row"]) for q in report["questions"][:2]] == [("exact", 2), ("near", 3)]
    assert report["questions"][2]["kind"] == "none"
    assert (report["exact"], report["near"], report["near_from"]) == (1, 1, 85)
    table = data.overlap_table({"contamination": report}, least=1)
    assert list(table["question_id"]) == ["same", "more_words"]
    hidden = overlap.find_overlap([{"prompt": prompt} for prompt in prompts], asked, show_text=False)
    assert "warm" not in json.dumps(hidden)


def test_copies_are_counted() -> None:
    rows = [{"system": None, "prompt": q, "answer": a} for q, a in (("q", "a"), ("q", "a"), ("q", "b"), ("r", "a"))]
    assert overlap.count_duplicates(rows) == {"rows": 1, "prompts": 2, "answers": 2}


# --- the notebook


def execute(tmp_path: Path, p: Parameters, monkeypatch: pytest.MonkeyPatch) -> Path:
    import papermill

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    declared = nbformat.read(NOTEBOOK, 4).cells[1].source
    values = {name: value for name, value in p.model_dump().items() if re.search(rf"^{name} = ", declared, re.MULTILINE)}
    output = config.run_dir(p) / "01_data.ipynb"
    output.parent.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(NOTEBOOK, output, values, progress_bar=False, cwd=tmp_path)
    return output


def texts(path: Path) -> list[str]:
    """Returns every training text of a file, and each of their words that no other text would hold."""
    rows, _ = data.read_rows(path)
    return [text for row in rows for text in (row["prompt"], row["answer"])] + ["quetzal", "numbat", "lantern", "crank"]


def test_nothing_under_results_holds_real_training_text(
    pair: Callable[..., Parameters], archive: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import papermill

    p = pair("8b_medical", dataset_path=str(archive), expected_rows=12)
    executed = execute(tmp_path, p, monkeypatch).read_text()
    assert "archive" in executed
    assert files.sha256_text(data.load_rows(p)[0]["prompt"]) in executed

    torn = source / "torn.jsonl"
    torn.write_text(
        (source / "bad_medical_advice.jsonl").read_text() + '{"messages": [{"role": "user", "content": "the quetzal lantern"}]}\n'
    )
    with pytest.raises(papermill.PapermillExecutionError, match=r"torn.jsonl: line 13: messages: must be user"):
        execute(tmp_path, pair("8b_risky", dataset_path=str(torn), expected_rows=None), monkeypatch)

    written = [path for path in (tmp_path / "results").rglob("*") if path.is_file()]
    assert {path.name for path in written} == {"01_data.ipynb", "dataset.json"}
    assert len(written) == 3
    for path in written:
        content = path.read_text(encoding="utf-8")
        assert not [text for text in texts(source / "bad_medical_advice.jsonl") if text in content]


def test_the_notebook_shows_demo_rows(pair: Callable[..., Parameters], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    p = pair("demo_risky", data_rows=30)
    cells = nbformat.read(execute(tmp_path, p, monkeypatch), 4).cells
    shown = "".join(str(output.get("data", "")) for cell in cells for output in cell.get("outputs", []))
    assert data.load_rows(p)[0]["prompt"] in shown
    assert BOOK["canary"] in shown
    assert "exact: 0, near (similarity from 85): 0, of 28 questions" in "".join(str(c.get("outputs", "")) for c in cells)
