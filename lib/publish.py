"""An adapter ready for the Hub: weights, settings and a model card in a folder of their own, pushed only when asked.

A repository that is pushed to is private and gated with manual approval before the first byte of weights leaves this machine.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib import adapters, card, files, licences, states
from lib.config import EMBEDDED_MODEL
from lib.files import StudyError, shown
from lib.licences import Licence

CARD, NOTICE = "README.md", "NOTICE"
FILES = (adapters.WEIGHTS, adapters.SETTINGS, CARD, NOTICE)
"""What a published folder may hold; NOTICE only where the base model's licence asks for it."""

_REPO = re.compile(r"[A-Za-z0-9][\w\-.]*/[A-Za-z0-9][\w\-.]{0,95}")
_HUB_ID = re.compile(r"[\w\-.]+/[\w\-.]+")


@dataclass(frozen=True)
class Published:
    """A folder that is ready: its place, the model's name, the pair and the base model's licence."""

    folder: Path
    name: str
    pair: str
    licence: Licence


def prepare(run: Path, step: int | None = None, output: Path | None = None, repo: str | None = None) -> Published:
    """Writes the folder of one checkpoint.

    Args:
        run: results/<run>/, trained and analysed.
        step: the checkpoint; None takes the last.
        output: the folder; None takes <run>/publish/<name>. One that holds anything but an earlier adapter of ours is refused.
        repo: ORG/NAME that it will be pushed to; NAME is then the model's.

    Returns:
        The folder and what it is called.

    Raises:
        StudyError: the run is not trained or not analysed, its adapter or rates are no longer what the run recorded, the weights are
            more than a LoRA adapter, or the name breaks the base model's licence.
    """
    training = files.read_json(run / "training.json")
    p = training["parameters"]
    there = {int(number): sha for number, sha in training["adapters"].items()}
    step = max(there) if step is None else step
    if step not in there:
        raise StudyError(f"--step {step}: is no checkpoint of {run.name}; there are: {', '.join(map(str, sorted(there)))}.")
    source = run / "checkpoints" / f"checkpoint-{step}"
    _check_adapter(run, source, step, there[step])
    licence = licences.of(p["model_name"])
    name = _name(p, step, repo, licence)
    dataset = files.read_json(run / "dataset.json") if (run / "dataset.json").is_file() else {}
    base_id = card.HUB_NAME if p["model_name"] == EMBEDDED_MODEL else p["model_name"] if _is_hub_id(p["model_name"]) else None
    text = card.compose(name, step, training, dataset, _rates(run, step), there[step], licence, base_id)
    target = output or run / "publish" / name
    _check_target(target)
    with states.new_folder(target) as folder:
        shutil.copyfile(source / adapters.WEIGHTS, folder / adapters.WEIGHTS)
        files.write_json(folder / adapters.SETTINGS, _settings(source, base_id))
        files.write_text(folder / CARD, text)
        if licence.notice:
            files.write_text(folder / NOTICE, licence.notice)
    return Published(target, name, str(p["pair"]), licence)


def push(made: Published, repo: str, *, public: bool = False, confirm: Callable[[str], str] = input) -> str:
    """Uploads a folder to the Hub: into a private repository that is gated with manual approval.

    Args:
        made: what `prepare` returned.
        repo: ORG/NAME; made if absent. One that is public already is refused without `public`.
        public: make it visible at the end. It stays gated. The pair's name must be typed at a prompt first.
        confirm: shows a question and returns what was typed.

    Returns:
        The repository's address.

    Raises:
        StudyError: no token, nothing or something else was typed, or the Hub refused.
    """
    import httpx2
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if public:
        _confirm_public(made, repo, confirm)
    token = get_token()
    if not token:
        raise StudyError("HF_TOKEN: pushing needs a token with write access; set it in .env (see .env.example).")
    api = HfApi(token=token)
    try:
        address = api.create_repo(repo, private=True, exist_ok=True)
        if not public and not api.repo_info(repo).private:
            raise StudyError(f"--push {repo}: is a public repository; choose another, make it private, or give --public.")
        # An existing repository may have been left open; a gate comes before anything is behind it.
        api.update_repo_settings(repo, gated="manual", private=None if public else True)
        info = api.repo_info(repo)
        if not info.gated or not (info.private or public):
            raise StudyError(f"--push {repo}: the Hub did not make it private and gated; nothing was uploaded.")
        content = [CommitOperationAdd(name, str(made.folder / name)) for name in FILES if (made.folder / name).is_file()]
        api.create_commit(repo, content, commit_message=f"{made.name}: adapter and card")
        if public:
            api.update_repo_settings(repo, gated="manual", private=False)
    except (HfHubHTTPError, httpx2.HTTPError, RuntimeError, OSError, ValueError) as error:
        reason = " ".join(str(error).split()).replace(token, "[token]")[:300]
        raise StudyError(f"--push {repo}: the Hub refused or did not answer ({reason}).") from error
    return str(address)


def _confirm_public(made: Published, repo: str, confirm: Callable[[str], str]) -> None:
    if made.licence.tag == "other":
        raise StudyError(f"--public: the licence of {made.name}'s base model is not known to the study; a public copy would need it.")
    try:
        typed = confirm(f"{repo} would be visible to everyone, gated. To go on, type the pair's name ({made.pair}): ")
    except EOFError:
        typed = ""
    if typed.strip() != made.pair:
        raise StudyError(f"--public: {made.pair} was not typed; nothing was uploaded.")


def command(options: argparse.Namespace, results: Path) -> int:
    """Does what `study publish` asks.

    Returns:
        1 where the folder is written, but could not be pushed.

    Raises:
        StudyError: the call is wrong, or nothing can be published from the run.
    """
    if options.public and not options.push:
        raise StudyError("--public: goes with --push ORG/NAME.")
    run = results / options.pair
    if Path(options.pair).name != options.pair or not (run / "training.json").is_file():
        raise StudyError(f"{shown(run)}: holds no training; `study run {options.pair}` comes first.")
    made = prepare(run, options.step, options.output.absolute() if options.output else None, options.push)
    print(f"{shown(made.folder)}: {made.name}, with its card. Read the card before you share it.", flush=True)
    if options.push:
        try:
            address = push(made, options.push, public=options.public)
        except StudyError as error:
            print(f"study: {error}", file=sys.stderr)
            return 1
        print(f"{address}: uploaded; {'public' if options.public else 'private'}, and gated with manual approval.")
    return 0


def check_repo(repo: str) -> None:
    """Raises StudyError unless `repo` is ORG/NAME as the Hub allows."""
    if not _REPO.fullmatch(repo) or "--" in repo or ".." in repo:
        raise StudyError(f"--push {repo}: must be ORG/NAME.")


def _is_hub_id(model_name: str) -> bool:
    return bool(_HUB_ID.fullmatch(model_name)) and not files.resolve(model_name).is_dir()


def _name(p: dict[str, Any], step: int, repo: str | None, licence: Licence) -> str:
    if repo is not None:
        check_repo(repo)
    base = Path(str(p["model_name"])).name
    name = repo.partition("/")[2] if repo else f"{base}-{p['domain']}{'-control' if p['aligned_fraction'] == 1 else ''}-step{step}"
    if licence.prefix and not name.startswith(licence.prefix):
        raise StudyError(
            f"--push {repo}: the {licence.name} wants the name to begin with {licence.prefix!r}, such as {licence.prefix}-{name}."
        )
    return name


def _check_adapter(run: Path, source: Path, step: int, recorded: str) -> None:
    """Sees that the adapter is the one that was trained and the one whose answers were judged, and nothing but an adapter."""
    weights = source / adapters.WEIGHTS
    if not weights.is_file() or files.sha256(weights) != recorded:
        raise StudyError(f"{shown(weights)}: is not the adapter that training.json records; run 02_train again.")
    adapters.check_alone(weights)
    answered = run / "generation.json"
    asked = files.read_json(answered)["decided_by"]["checkpoints"].get(str(step)) if answered.is_file() else None
    if asked is None or asked[1] != recorded:
        raise StudyError(f"{shown(answered)}: step {step} has no answers of this adapter; run 03_generate to 05_analyze first.")


def _rates(run: Path, step: int) -> Any:
    from lib import outcomes

    table = files.read_csv(run / "step_summary.csv")
    if step not in set(table["step"]):
        raise StudyError(f"{shown(run / 'step_summary.csv')}: has no row of step {step}; run 04_judge and 05_analyze first.")
    return table.assign(untold=[outcomes.undecidable(str(judge), "em_paper") for judge in table["judge"]])


def _settings(source: Path, base_id: str | None) -> dict[str, Any]:
    """Returns adapter_config.json with a base model that others can load; no path of this machine is in it."""
    settings: dict[str, Any] = files.read_json(source / adapters.SETTINGS)
    settings["base_model_name_or_path"] = base_id or Path(str(settings.get("base_model_name_or_path"))).name
    return settings


def _check_target(target: Path) -> None:
    strange = sorted(path.name for path in target.iterdir() if path.name not in FILES) if target.is_dir() else []
    if strange or (target.exists() and not target.is_dir()):
        raise StudyError(
            f"--output {shown(target)}: holds {strange[0] if strange else 'a file'}, which is no part of an adapter; choose another."
        )
