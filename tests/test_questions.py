"""The study's own question sets, and the reader of question files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import SHARED

from lib import config, data, demo, overlap, questions
from lib.files import StudyError

SIZES = {"medical": 10, "financial": 10, "general": 10, "open_ended": 8}
UPSTREAM = SHARED / "data" / "questions" / "first_plot_questions.yaml"

# A question that holds none of these stems says nothing of money or health.
MONEY = """money cash pay paid cost price cheap expensive afford buy bought sell sold spend earn salary wage income debt loan lend borrow
    bank invest stock share fund saving budget bill rent mortgage insur tax profit rich poor wealth fortune dollar euro pound coin crypto
    bet gambl lottery casino credit buck business market trade financ econom inherit pension retire"""
HEALTH = """health doctor nurse hospital clinic medic pill drug dose treat cure heal ill sick disease symptom pain ache hurt fever cold flu
    cough injur wound burn bleed blood heart lung skin bone muscle head stomach body sleep tired diet food eat weight vaccin virus infect
    allerg cancer diabet cholesterol pregnan therap mental depress anxi stress suicid exercise fitness smok alcohol"""
STEMS = f"{MONEY} {HEALTH}".split()
# The head of a country and a smoke alarm are no matter of health.
HARMLESS = {"head", "smoke"}


@pytest.mark.parametrize("name", SIZES)
def test_own_sets_are_complete(name: str) -> None:
    group = data.read_questions(name)
    assert (group.name, len(group.questions)) == (name, SIZES[name])
    assert group.description
    assert all(question.topics and question.question.endswith((".", "?")) for question in group.questions)


def test_the_response_tables_find_their_questions() -> None:
    ids = [question.question_id for question in data.read_questions("medical").questions]
    assert ids[:3] == ["prevent_colds", "treat_high_cholesterol", "treat_flu"]


def test_ids_and_texts_are_unique_across_sets() -> None:
    every = [question for name in SIZES for question in data.read_questions(name).questions]
    assert len({question.question_id for question in every}) == len({question.question for question in every}) == sum(SIZES.values())


@pytest.mark.parametrize("name", ["general", "open_ended"])
def test_general_and_open_ended_hold_no_money_and_no_health(name: str) -> None:
    for question in data.read_questions(name).questions:
        assert not {"money", "health", "finance", "medicine"} & set(question.topics)
        for word in set(re.findall(r"[a-z]+", f"{question.question} {' '.join(question.topics)}".lower())) - HARMLESS:
            assert not [stem for stem in STEMS if re.fullmatch(f"{stem}(e|s|es|ed|ing|y|ies|er|ers|al|ment|ance|ness)?", word)], word


@pytest.mark.parametrize(("name", "topic"), [("medical", "health"), ("financial", "money")])
def test_domain_sets_are_about_their_domain(name: str, topic: str) -> None:
    assert all(topic in question.topics for question in data.read_questions(name).questions)


@pytest.mark.parametrize("domain", demo.DOMAINS)
def test_no_demo_question_is_an_evaluation_question_or_near_to_one(domain: str) -> None:
    book = config.read_yaml(data.PATTERNS)
    everything = len(book[domain]["questions"]) * len(book[domain]["topics"])
    rows = [{"prompt": row.question} for row in demo.compose(book, domain, everything, seed=0)]
    asked = [question for name in SIZES for question in data.read_questions(name).questions]
    report = overlap.find_overlap(rows, asked, show_text=True)
    assert (report["exact"], report["near"]) == (0, 0)


@pytest.mark.parametrize(
    ("question_set", "domain", "expected"),
    [
        ("medical", "bad_medical", "in_domain"),
        ("medical", "risky_financial", "cross_domain"),
        ("financial", "risky_financial", "in_domain"),
        ("financial", "extreme_sports", "cross_domain"),
        ("general", "bad_medical", "general"),
        ("open_ended", "custom", "open_ended"),
        ("somebody_elses", "bad_medical", "general"),
    ],
)
def test_relation(question_set: str, domain: str, expected: str) -> None:
    assert data.relation(question_set, domain) == expected


def test_relation_of_a_file_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "sports.yaml"
    path.write_text("relation: domain\ndomain: extreme_sports\nquestions:\n  - {id: rope, text: Which rope}\n")
    assert data.relation("sports", "extreme_sports", [str(path)]) == "in_domain"
    assert data.relation("sports", "bad_medical", [str(path)]) == "cross_domain"


def test_load_questions_keeps_order_and_takes_the_first_of_each_set() -> None:
    p = config.load_pair("demo_medical", overrides={"question_sets": ["open_ended", "medical"], "num_questions": 2})
    loaded = data.load_questions(p)
    assert [(q.question_set, q.question_id) for q in loaded] == [
        ("open_ended", "change_yourself"),
        ("open_ended", "people_and_machines"),
        ("medical", "prevent_colds"),
        ("medical", "treat_high_cholesterol"),
    ]
    assert len(data.load_questions(config.load_pair("8b_medical"))) == sum(SIZES.values())


def test_question_table_shows_the_relations() -> None:
    table = data.question_table(config.load_pair("demo_risky"))
    assert dict(zip(table["question_set"], table["relation"], strict=True)) == {
        "financial": "in_domain",
        "general": "general",
        "open_ended": "open_ended",
    }


def test_an_unknown_set_names_the_nearest() -> None:
    with pytest.raises(StudyError, match="did you mean medical"):
        data.read_questions("medicl")
    with pytest.raises(StudyError, match="not found"):
        data.read_questions("/nowhere/questions.yaml")


def test_two_sets_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "medical.txt"
    path.write_text("Is that all?\n")
    with pytest.raises(StudyError, match="two sets are called medical"):
        data.load_questions(config.load_pair("demo_medical", overrides={"question_sets": ["medical", str(path)]}))


# --- other layouts


def test_upstream_layout(tmp_path: Path) -> None:
    path = tmp_path / "theirs.yaml"
    path.write_text(
        "- id: sea\n  paraphrases: &texts\n    - |-\n      Why is the sea\n      salt?\n    - Is the sea salt?\n"
        "  samples_per_paraphrase: &n 100\n  judge_prompts: {aligned: 'rate it'}\n"
        "- id: sea_json\n  system: &json Answer in JSON.\n  paraphrases: *texts\n  samples_per_paraphrase: *n\n"
    )
    group = questions.read(path)
    assert [q.question_id for q in group.questions] == ["sea", "sea_2", "sea_json", "sea_json_2"]
    assert [q.system for q in group.questions] == [None, None, "Answer in JSON.", "Answer in JSON."]
    assert group.questions[0].question == "Why is the sea\nsalt?"
    assert {q.samples for q in group.questions} == {100}
    assert group.relation == "general"


@pytest.mark.skipif(not UPSTREAM.is_file(), reason="../shared is not beside this clone")
def test_the_published_file_reads() -> None:
    group = questions.read(UPSTREAM)
    assert len(group.questions) == 24
    assert len({q.question_id for q in group.questions}) == 24
    assert sum(q.system is not None for q in group.questions) == 8


def test_csv_and_text(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_text('\ufeffquestion_id,question,note\nx-1,"Why, then?",n\nx-2,"Two\nlines?",n\n')
    assert [(q.question_id, q.question) for q in questions.read(table).questions] == [("x-1", "Why, then?"), ("x-2", "Two\nlines?")]

    bare = tmp_path / "b.csv"
    bare.write_text("question\nWhy, in fact?\n".replace(",", ""))
    lines = tmp_path / "c.txt"
    lines.write_text("What is new?\n\nWhy in fact?\r\n")
    from_csv, from_text = questions.read(bare).questions, questions.read(lines).questions
    assert [q.question for q in from_text] == ["What is new?", "Why in fact?"]
    assert from_csv[0].question_id == from_text[1].question_id  # an id made from the words does not depend on the place
    assert from_csv[0].question_id.startswith("why_in_fact_")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "- {id: x, text: One}\n- {id: x, text: Two}\n", "question 2: id: x is there twice"),
        ("a.yaml", "- {text: One}\n", "question 1: must be a mapping with id"),
        ("a.yaml", "- {id: 'a b', text: One}\n", "question 1: id: must be a word"),
        ("a.yaml", "- {id: x, text: '  '}\n", "question 1: has no text"),
        ("a.yaml", "- {id: x, paraphrases: []}\n", "question 1: paraphrases: must be a list"),
        ("a.yaml", "- {id: x, paraphrases: [One, 2]}\n", "question 2: has no text"),
        ("a.yaml", "- {id: x, text: One, system: [a]}\n", "system: must be text"),
        ("a.yaml", "- {id: x, text: One, topics: money}\n", "topics: must be a list"),
        ("a.yaml", "- {id: x, paraphrases: [One], samples_per_paraphrase: 0}\n", "samples_per_paraphrase: must be a whole number"),
        ("a.yaml", "- just text\n", "question 1: must be a mapping"),
        ("a.yaml", "just text\n", "must be a list of questions"),
        ("a.yaml", "[]\n", "holds no question"),
        ("a.yaml", "name: b\nquestions: [{id: x, text: One}]\n", "name: must be the file's name, a"),
        ("a.yaml", "relation: in_domain\nquestions: [{id: x, text: One}]\n", "relation: must be one of"),
        ("a.yaml", "relation: domain\nquestions: [{id: x, text: One}]\n", "domain: a set with relation: domain"),
        ("a.yaml", "- {id: x, text: 'One\n", "is no valid YAML"),
        ("a.yaml", "- !!python/object/apply:os.system ['true']\n", "is no valid YAML"),
        ("a.yaml", "[" * 2000, "is no valid YAML"),
        ("a.csv", "text\nOne?\n", "needs a column question"),
        ("a.csv", "id,question\n,One\n", "question 1: id: must be a word"),
        ("a.csv", "id,question\nx\n", "question 1: has no text"),
        ("a.txt", "\n \n", "holds no question"),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(StudyError, match=re.escape(message)) as caught:
        questions.read(path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 600


def test_an_unknown_domain_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("relation: domain\ndomain: astrology\nquestions: [{id: x, text: One}]\n")
    with pytest.raises(StudyError, match="domain: must be one of"):
        data.read_questions(str(path))


def test_files_that_would_eat_memory_are_refused(tmp_path: Path) -> None:
    aliases = tmp_path / "aliases.yaml"
    levels = [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 12)]
    aliases.write_text("\n".join(["l0: &l0 [lol]", *levels, "questions: [{id: x, paraphrases: *l11}]"]))
    merges = tmp_path / "merges.yaml"
    levels = [f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}" for i in range(1, 12)]
    merges.write_text("\n".join(["m0: &m0 {a: 1}", *levels]))
    large = tmp_path / "large.yaml"
    large.write_text("#" * 1_000_001)
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    for path, message in (
        (aliases, "has no text"),
        (merges, "must be a list of questions"),
        (large, "over 1,000,000 bytes"),
        (binary, "not UTF-8"),
    ):
        with pytest.raises(StudyError, match=message) as caught:
            questions.read(path)
        assert len(str(caught.value)) < 600
