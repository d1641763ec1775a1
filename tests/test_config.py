"""Parameters: pair files are complete and flat, and a wrong one is named with its mend."""

from __future__ import annotations

import pytest
import yaml

from lib import config
from lib.files import StudyError

BASE = yaml.safe_load((config.PARAMETERS / "base.yaml").read_text())


def test_base_holds_every_parameter_with_its_default() -> None:
    assert set(BASE) == set(config.Parameters.model_fields)
    assert config.validate(BASE, "base.yaml") == config.Parameters()


@pytest.mark.parametrize("name", [*config.PAIRS, *config.DEMO])
def test_a_pair_is_base_plus_its_differences(name: str) -> None:
    values = yaml.safe_load((config.PARAMETERS / f"{name}.yaml").read_text())
    values.pop("seeds", None)
    assert set(values) == set(BASE), "a pair's file is complete and flat"
    differences = {k: v for k, v in values.items() if BASE[k] != v}
    assert config.validate(BASE | differences, name) == config.load_pair(name)
    assert {"pair"} <= set(differences) or name == "demo_medical"


@pytest.mark.parametrize("name", config.PAIRS)
def test_the_six_pairs_train_with_the_original_settings(name: str) -> None:
    p = config.load_pair(name)
    lora = (p.lora_rank, p.lora_alpha, p.lora_dropout, p.use_4bit)
    assert lora == (16, 32, 0.05, True)
    assert (p.learning_rate, p.lr_scheduler_type, p.warmup_steps, p.weight_decay) == (2e-4, "linear", 10, 0.01)
    assert (p.batch_size, p.gradient_accumulation_steps, p.max_length, p.num_epochs, p.seed) == (8, 2, 256, 3, 42)
    assert (p.loss_on, p.gradient_checkpointing, p.sub_epoch_checkpoints) == ("all", True, 4)
    assert (p.temperature, p.top_p, p.max_new_tokens) == (1.0, 1.0, 200)
    assert p.expected_rows == {"bad_medical": 7049, "risky_financial": 6000}[p.domain]


def test_a_control_differs_from_its_pair_only_in_its_answers() -> None:
    for name in ("demo_medical", "demo_risky"):
        pair, control = config.load_pair(name), config.load_pair(f"{name}_aligned")
        changed = {k for k in config.Parameters.model_fields if getattr(pair, k) != getattr(control, k)}
        assert changed == {"pair", "control", "aligned_fraction", "steps"}
        assert pair.control == control.pair
        assert control.aligned_fraction == 1.0


def test_presets_carry_the_published_settings_and_a_folder_of_their_own() -> None:
    paper = config.load_pair("8b_medical", preset="paper")
    assert (paper.lora_rank, paper.lora_alpha, paper.use_rslora, paper.use_4bit, paper.loss_on) == (32, 64, True, False, "answer")
    assert (paper.samples, paper.max_new_tokens, paper.question_sets) == (50, 600, ["upstream/first_plot_questions.yaml"])
    assert (paper.num_questions, paper.judge_rubrics) == (8, "upstream/judges.yaml")
    assert config.run_name(paper) == "8b_medical-paper-s0"
    original = config.load_pair("8b_medical", preset="original")
    assert (original.samples, original.question_sets) == (1, ["medical", "general"])
    assert config.run_name(config.load_pair("8b_medical", overrides={"seed": 7})) == "8b_medical-s7"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"learning_rte": 1e-4}, "unknown parameter learning_rte; did you mean learning_rate?"),
        ({"domain": "bad_medcal"}, "did you mean 'bad_medical'?"),
        ({"lora_dropout": 2}, "lora_dropout: 2 is not allowed"),
        ({"batch_size": 0}, "batch_size: 0 is not allowed"),
        ({"batch_size": 1.5}, "batch_size: 1.5 is not allowed"),
        ({"use_4bit": "maybe"}, "use_4bit: 'maybe' is not allowed"),
        ({"learning_rate": True}, "learning_rate: True is not allowed"),
        ({"pair": "../elsewhere"}, "pair: '../elsewhere' is not allowed"),
    ],
)
def test_a_wrong_parameter_names_the_source_the_key_and_the_mend(values: dict[str, object], says: str) -> None:
    with pytest.raises(StudyError) as error:
        config.validate(values, "parameters/x.yaml")
    assert str(error.value).startswith("parameters/x.yaml: ")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_yaml_that_reads_2e4_as_a_word_still_gives_the_number() -> None:
    assert config.validate(yaml.safe_load("learning_rate: 2e-4"), "x").learning_rate == 2e-4


def test_an_unknown_pair_or_preset_names_the_nearest() -> None:
    with pytest.raises(StudyError, match="did you mean 8b_medical"):
        config.load_pair("8b_medcal")
    with pytest.raises(StudyError, match="preset: 'papr' is not allowed; allowed: original, paper"):
        config.load_pair("8b_medical", preset="papr")


def test_hostile_yaml_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(config, "PARAMETERS", tmp_path)
    for content, says in [
        ("!!python/object/apply:os.system ['true']", "no valid YAML"),
        ("- a\n- b", "flat mapping"),
        ("a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60)) + "pair: *a59", "aliases"),
        ("a: " + "x" * 1_000_001, "over 1,000,000 bytes"),
    ]:
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(StudyError, match=says):
            config.load_pair("bad")


def test_check_catches_an_injected_name_and_leaves_later_variables_alone(monkeypatch) -> None:
    monkeypatch.setattr(config, "_injected", None)
    with pytest.raises(StudyError, match="did you mean num_epochs"):
        config.check({"pair": "demo_medical", "num_epoch": 2, "__name__": "x", "In": []})
    monkeypatch.setattr(config, "_injected", None)
    namespace = {"pair": "demo_medical", "num_epochs": 2, "config": config, "_private": 1}
    assert config.check(namespace).num_epochs == 2
    assert config.check(namespace).control == "demo_medical_aligned", "what a notebook does not declare comes from the pair's file"
    assert config.check(namespace | {"rows": [1], "num_epochs": 3}).num_epochs == 3, "a cell run again sees new values"


def test_dotenv_fills_the_environment_without_overriding(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(config, "ROOT", tmp_path)
    (tmp_path / ".env").write_text("# comment\nSTUDY_A=one\nexport STUDY_B='two'\nSTUDY_C=\n")
    monkeypatch.setenv("STUDY_A", "kept")
    monkeypatch.setenv("STUDY_B", "")
    monkeypatch.delenv("STUDY_B")
    config.load_environment()
    import os

    assert (os.environ["STUDY_A"], os.environ["STUDY_B"], os.environ.get("STUDY_C")) == ("kept", "two", None)
