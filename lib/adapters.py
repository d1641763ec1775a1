"""LoRA adapters: put on a base model, written and read as safetensors, and taken over from others only after a check.

An adapter's folder holds adapter_model.safetensors and adapter_config.json, which PEFT loads anywhere: no pickle, no path of the
machine that made it, and the same bytes for the same weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib import files, models
from lib.config import Parameters
from lib.files import StudyError, shown

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = "adapter_model.safetensors"
SETTINGS = "adapter_config.json"

_PICKLES = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")
_HUB = re.compile(r"hf:(?P<repo>[\w.\-]+/[\w.\-]+)@(?P<revision>[\w.\-/]+)")
_KEY = re.compile(r"base_model\.model\.(?P<module>[\w.]+)\.lora_(?P<side>[AB])\.weight")
_MAX_SETTINGS_BYTES = 1_000_000


def add_lora(base: PreTrainedModel, parameters: Parameters) -> Any:
    """Puts a fresh LoRA adapter on the linear layers of attention and MLP, seeded by `seed`; the base stays frozen.

    Models whose layers bear other names than Llama's get it on all their linear layers but the output layer.

    Returns:
        A `peft.PeftModel` around `base`, its adapter in fp32.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    p = parameters
    last_names = {name.rpartition(".")[2] for name, _ in base.named_modules()}
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=p.lora_rank,
        lora_alpha=p.lora_alpha,
        lora_dropout=p.lora_dropout,
        use_rslora=p.use_rslora,
        target_modules=models.LINEAR_MODULES if last_names.issuperset(models.LINEAR_MODULES) else "all-linear",
    )
    set_seed(p.seed)
    model = get_peft_model(base, settings)
    model.peft_config["default"].base_model_name_or_path = _public_name(p)
    return model


def save(model: Any, folder: Path) -> str:
    """Writes the adapter of a `PeftModel` into `folder` and returns the SHA-256 of its weights."""
    import safetensors.torch
    from peft import get_peft_model_state_dict

    # "auto" would ask the Hub whether the vocabulary has grown; it has not.
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    content = safetensors.torch.save({name: weights[name].contiguous() for name in sorted(weights)}, metadata={"format": "pt"})
    files.write_bytes(folder / WEIGHTS, content)
    _write_settings(folder, model.peft_config["default"].to_dict())
    return files.sha256(folder / WEIGHTS)


def check_alone(path: Path) -> None:
    """Sees that a safetensors file holds LoRA weights and nothing else.

    Raises:
        StudyError: a tensor belongs to a whole or merged model, or the file is no safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as weights:
            strange = [key for key in weights.keys() if not _KEY.fullmatch(key)]  # noqa: SIM118
            told = set(weights.metadata() or {}) - {"format"}
    except (SafetensorError, OSError) as error:
        raise StudyError(f"{shown(path)}: is damaged or no safetensors file ({error}).") from error
    if strange or told:
        what = f"{strange[0][:120]}, which is no LoRA weight" if strange else f"metadata {sorted(told)[0][:120]}"
        raise StudyError(f"{shown(path)}: holds {what}; only an adapter alone is published.")


def load(model: Any, folder: Path) -> None:
    """Reads the weights in `folder` into the adapter that `model` already bears.

    Raises:
        StudyError: the weights are those of another adapter.
    """
    import safetensors.torch
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    weights = safetensors.torch.load_file(folder / WEIGHTS)
    ours = get_peft_model_state_dict(model, save_embedding_layers=False)
    if {n: w.shape for n, w in weights.items()} != {n: w.shape for n, w in ours.items()}:
        raise StudyError(f"{shown(folder)}: its adapter has other layers or another rank than this run's; delete the folder.")
    set_peft_model_state_dict(model, weights)


def read(folder: Path) -> dict[str, tuple[Any, Any]]:
    """Reads an adapter for decoding; PEFT would put it on the model, a layer at a time.

    Returns:
        By the layer's name in the base model, the tensors A (rank × in) and B (out × rank) times the adapter's scaling.

    Raises:
        StudyError: it cannot be read, or is more than plain LoRA on linear layers.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    settings = _settings_of(folder / SETTINGS)
    try:
        weights = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise StudyError(f"{shown(folder / WEIGHTS)}: cannot be read ({error}); delete the folder and run 02_train again.") from error
    sides: dict[str, dict[str, Any]] = {}
    for key, tensor in weights.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise StudyError(f"{shown(folder / WEIGHTS)}: {key[:120]} is no plain LoRA weight of a linear layer; only that is read.")
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    found = {}
    for module, own in sides.items():
        if set(own) != {"A", "B"}:
            raise StudyError(f"{shown(folder / WEIGHTS)}: {module} lacks one of its two matrices; the adapter is no plain LoRA.")
        rank = own["A"].shape[0]
        found[module] = (own["A"], own["B"] * (settings["lora_alpha"] / (math.sqrt(rank) if settings.get("use_rslora") else rank)))
    return found


def take(parameters: Parameters, folder: Path) -> dict[str, Any]:
    """Copies the published adapter that `adapter` names into `folder`, once it is known to be safe and to fit the base model.

    Returns:
        source, sha256 of the weights, rank, the base model that the adapter names, and the number of layers it changes.

    Raises:
        StudyError: it cannot be found or fetched, is a pickle, is no plain LoRA, or does not fit the base model.
    """
    from safetensors import SafetensorError, safe_open

    where = _fetch(parameters) if (parameters.adapter or "").startswith("hf:") else files.resolve(parameters.adapter or "")
    settings = _read_settings(where, parameters)
    try:
        with safe_open(where / WEIGHTS, framework="pt") as weights:
            shapes = {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise StudyError(f"adapter: {shown(where / WEIGHTS)} is damaged or no safetensors file ({error}).") from error
    ranks = _checked_ranks(shapes, settings, parameters)
    files.write_bytes(folder / WEIGHTS, (where / WEIGHTS).read_bytes())
    # Only what plain LoRA needs is taken over, with the layers named in full: no pattern of a stranger is ever evaluated.
    _write_settings(
        folder,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": settings["r"],
            "lora_alpha": settings["lora_alpha"],
            "lora_dropout": 0.0,
            "use_rslora": bool(settings.get("use_rslora")),
            "bias": "none",
            "target_modules": sorted(ranks),
            "rank_pattern": {module: rank for module, rank in ranks.items() if rank != settings["r"]},
            "base_model_name_or_path": _public_name(parameters),
        },
    )
    return {
        "source": parameters.adapter,
        "sha256": files.sha256(folder / WEIGHTS),
        "rank": settings["r"],
        "layers": len(ranks),
        "declared_base": settings.get("base_model_name_or_path"),
    }


def _public_name(parameters: Parameters) -> str:
    """Returns the base model's name without a path of this machine."""
    name = parameters.model_name
    return Path(name).name if Path(name).is_absolute() else name


def _write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    # PEFT keeps target_modules as a set, whose order changes from one process to the next.
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    files.write_json(folder / SETTINGS, dict(sorted((plain | {"inference_mode": True}).items())))


def _fetch(parameters: Parameters) -> Path:
    """Downloads the two files of an adapter on the Hub; no other file is ever asked for."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    match = _HUB.fullmatch(parameters.adapter or "")
    if match is None:
        raise StudyError(f"adapter: {parameters.adapter} must read hf:ORG/NAME@REVISION; the revision, a commit, fixes what is fetched.")
    repo, revision = match["repo"], match["revision"]
    try:
        paths = [hf_hub_download(repo, name, revision=revision) for name in (SETTINGS, WEIGHTS)]
    except LocalEntryNotFoundError as error:
        raise StudyError(f"adapter: the Hub cannot be reached for {repo}; try again with a connection.") from error
    except EntryNotFoundError as error:
        raise StudyError(f"adapter: {repo}@{revision} has no {SETTINGS} with {WEIGHTS}; pickled weights are refused.") from error
    except GatedRepoError as error:
        raise StudyError(f"adapter: {repo} is gated; accept its terms on the Hub and set HF_TOKEN in .env.") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise StudyError(f"adapter: {repo}@{revision} cannot be fetched ({' '.join(str(error).split())[:200]}); check the name.") from error
    return Path(paths[0]).parent


def _read_settings(where: Path, parameters: Parameters) -> dict[str, Any]:
    """Reads and checks adapter_config.json: plain LoRA (rank-stabilised or not) and nothing that PEFT would do besides."""
    if not (where / WEIGHTS).is_file():
        pickles = [name for name in _PICKLES if (where / name).is_file()]
        reason = f"holds {pickles[0]}, a pickle that could run code: refused; ask for safetensors" if pickles else f"holds no {WEIGHTS}"
        raise StudyError(f"adapter: {shown(where)} {reason}.")
    return _settings_of(where / SETTINGS)


def _settings_of(path: Path) -> dict[str, Any]:
    """Reads and checks an adapter_config.json by itself; see `_read_settings`."""
    if not path.is_file() or path.stat().st_size > _MAX_SETTINGS_BYTES:
        raise StudyError(f"adapter: {shown(path)} is missing or far too large; it must be the adapter's own settings.")
    settings = files.read_json(path)
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise StudyError(f"adapter: {shown(path)}: peft_type must be LORA.")
    for name in ("r", "lora_alpha"):
        if not isinstance(settings.get(name), int | float) or isinstance(settings[name], bool) or settings[name] <= 0:
            raise StudyError(f"adapter: {shown(path)}: {name} must be a number above 0.")
    unsupported = ("use_dora", "modules_to_save", "alpha_pattern", "layer_replication", "fan_in_fan_out", "trainable_token_indices")
    odd = [name for name in unsupported if settings.get(name)] + (["bias"] if settings.get("bias", "none") != "none" else [])
    if odd:
        raise StudyError(f"adapter: {shown(path)}: {odd[0]} = {settings[odd[0]]!r} is more than plain LoRA; only that is read.")
    return settings


def _checked_ranks(shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], parameters: Parameters) -> dict[str, int]:
    """Returns the rank by layer, once every tensor is an A or a B of a linear layer of the base model, with that layer's shape."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with models.clear_errors(parameters):
        shape_of = AutoConfig.from_pretrained(models.source(parameters), revision=parameters.model_revision, trust_remote_code=False)
        with torch.device("meta"):
            bare = AutoModelForCausalLM.from_config(shape_of, trust_remote_code=False)
    linear = {name: m for name, m in bare.named_modules() if isinstance(m, torch.nn.Linear)}
    sides: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        match = _KEY.fullmatch(key)
        if match is None or match["module"] not in linear:
            raise StudyError(
                f"adapter: {key[:120]} is no LoRA weight of a linear layer of {parameters.model_name}; "
                f"was it made for {settings.get('base_model_name_or_path')}?"
            )
        sides.setdefault(match["module"], {})[match["side"]] = shape
    ranks = {}
    for module, found in sides.items():
        layer = linear[module]
        rank = found["A"][0] if len(found.get("A", ())) == 2 else 0
        wanted = {"A": (rank, layer.in_features), "B": (layer.out_features, rank)}
        if found != wanted or rank == 0:
            raise StudyError(
                f"adapter: {module}: its weights have the shapes {found}, but {parameters.model_name} needs {wanted}; "
                f"was it made for {settings.get('base_model_name_or_path')}?"
            )
        ranks[module] = rank
    if not ranks:
        raise StudyError("adapter: its file holds no weights.")
    return ranks
