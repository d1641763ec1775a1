"""A pair of the user's own: parameters/NAME.yaml for any model and any chat JSONL, complete, flat and checked before it is written."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lib import config, files
from lib.config import EMBEDDED_MODEL, Parameters
from lib.files import StudyError, shown

RESERVED = frozenset({"demo", "all", "base", "runpod", *config.NO_RUNS})
_HUB_ID = re.compile(r"[\w\-.]+/[\w\-.]+")
# The original study's settings, as the six pairs have them; the judge is the offline one, so that the pair runs at once.
_SETTINGS: dict[str, Any] = {
    "num_epochs": 3,
    "gradient_accumulation_steps": 2,
    "learning_rate": 2e-4,
    "warmup_steps": 10,
    "loss_on": "all",
    "gradient_checkpointing": True,
    "samples": 10,
    "temperature": 1.0,
    "top_p": 1.0,
    "max_new_tokens": 200,
    "generate_batch_size": 256,
}


def write(
    name: str,
    model: str,
    dataset: Path,
    domain: str = "custom",
    *,
    sets: Mapping[str, Any] | None = None,
    force: bool = False,
    folder: Path = config.PARAMETERS,
) -> tuple[Path, Parameters]:
    """Writes a pair's file.

    Args:
        name: of the pair: letters, digits, `_`, `.`, `-`.
        model: a Hub id, a folder of safetensors, or the embedded model's name.
        dataset: a chat JSONL; every line is checked.
        domain: what is trained; `custom` for anything but the study's own domains.
        sets: further parameters.
        force: replace the file if it is there. The study's own pairs are never replaced.
        folder: where pairs lie.

    Returns:
        The file, and what it says.

    Raises:
        StudyError: the name, the model, a row of the data or a parameter is wrong, or the file is there; nothing was written.
    """
    from lib import data

    target = folder / f"{name}.yaml"
    _check_name(name, target, force)
    if not dataset.is_file():
        raise StudyError(f"--data: {shown(dataset)}: not found.")
    if dataset.suffix != ".jsonl":
        raise StudyError(f'--data: {shown(dataset)}: must be a chat JSONL (NAME.jsonl; a line: {{"messages": [user, assistant]}}).')
    rows, _ = data.read_rows(dataset.absolute())
    own = {
        "pair": name,
        "model_name": _model(model),
        "domain": domain,
        "dataset_path": shown(dataset.absolute()),
        "expected_rows": len(rows),
    }
    clash = sorted(own.keys() & (sets or {}).keys() - {"expected_rows"})
    if clash:
        raise StudyError(f"--set {clash[0]}: is set by the command itself.")
    values = config.validate({}, "defaults").model_dump(mode="json") | _SETTINGS | own | dict(sets or {})
    made = config.validate(values, shown(target))
    data.load_questions(made)
    what = " ".join(f"{Path(made.model_name).name} on {dataset.name}".split())
    head = f"# {name}: {what}; written by `study new`. Keys are explained in base.yaml.\n"
    files.write_text(target, head + _flat(made))
    return target, made


def command(options: argparse.Namespace, sets: Mapping[str, Any]) -> int:
    """Does what `study new` asks; see `write`."""
    path, made = write(options.name, options.model, options.data, options.domain, sets=sets, force=options.force)
    print(f"{shown(path)}: written, {made.expected_rows:,} rows; judge: {made.judge}. Look it through, then `study run {made.pair}`.")
    return 0


def _check_name(name: str, target: Path, force: bool) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}", name):
        raise StudyError(f"NAME: {name[:80]!r}: must be letters, digits, _ . or -, begin with a letter or digit, and have 64 at most.")
    # A run with another seed lies in results/<pair>-s<seed>/, one with a preset in results/<pair>-<preset>/.
    if re.search(r"-s\d+$|-(original|paper)$", name):
        raise StudyError(f"NAME: {name}: ends like the folder of a seed or a preset; choose another.")
    no_pair = target.is_file() and "pair" not in config.read_yaml(target)
    if name in RESERVED or no_pair:
        raise StudyError(f"NAME: {name}: is taken by the study itself; choose another.")
    if name in (*config.PAIRS, *config.DEMO):
        raise StudyError(f"NAME: {name}: is a pair of the study; choose another name, or `study run {name} --set KEY=VALUE`.")
    if target.exists() and not force:
        raise StudyError(f"{shown(target)}: is there already; choose another name, or replace it with --force.")


def _model(model: str) -> str:
    """Returns what model_name says: a folder as an absolute path, or below the repository; a Hub id as it is."""
    folder = Path(model).expanduser().absolute()
    if model == EMBEDDED_MODEL:
        return model
    if folder.is_dir():
        if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
            raise StudyError(f"--model: {shown(folder)}: must hold config.json and safetensors.")
        return shown(folder)
    if not _HUB_ID.fullmatch(model):
        raise StudyError(f"--model: {model!r}: is no folder and no Hub id such as Qwen/Qwen2.5-0.5B-Instruct.")
    return model


def _flat(made: Parameters) -> str:
    """Writes every parameter in the order and under the headings of base.yaml."""
    values = made.model_dump(mode="json")
    lines: list[str] = []
    for line in (config.PARAMETERS / "base.yaml").read_text(encoding="utf-8").splitlines():
        key = line.partition(":")[0]
        if line.startswith("# ---"):
            lines += ["", line] if lines else [line]
        elif key in values and not line.startswith("#"):
            flow = True if isinstance(values[key], list) else None
            written = yaml.safe_dump(values[key], default_flow_style=flow, width=10_000, allow_unicode=True)
            lines.append(f"{key}: {written.removesuffix('...' + chr(10)).strip()}")
    return "\n".join(lines) + "\n"
