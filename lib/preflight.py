"""What a run needs, looked at before hours are spent: data, model and licence, judge and key, disk and memory.

Looks only at what is cheap to look at, and without torch. What is in a local cache asks nothing of the network.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from lib import chat, config, files, gpu, upstream, vllm_backend
from lib.config import EMBEDDED_MODEL, Parameters
from lib.files import shown

_RESULTS_BYTES = 2 * 1024**3  # adapters of eight steps and two training states of an 8B model at rank 16


def problems(p: Parameters, stages: Sequence[str], *, elsewhere: bool = False) -> list[str]:
    """Returns a line for everything that would make the stages fail, each naming the parameter and the mend.

    Args:
        p: the parameters of one run.
        stages: the stages that are to run.
        elsewhere: other machines run them, so this one's memory and cache say nothing.
    """
    found: list[str] = []
    if "01_data" in stages:
        found += _data(p)
    if {"02_train", "03_generate"} & set(stages):
        found += _model(p, elsewhere) + _adapter(p)
    if "03_generate" in stages and p.generate_backend == "vllm" and not elsewhere:
        found += vllm_backend.problems(p)
    if "04_judge" in stages:
        found += [line for own in config.each_judge(p) for line in _judge(own)]
    return found + _published(p, stages) + _disk(p)


def _published(p: Parameters, stages: Sequence[str]) -> list[str]:
    """Names the published files that the parameters call for and that nobody has fetched, or that were changed."""
    asked = [("question_sets", entry) for entry in p.question_sets] if {"01_data", "03_generate"} & set(stages) else []
    asked += [("judge_rubrics", p.judge_rubrics)] if "04_judge" in stages and {p.judge, *p.other_judges} != {"probe"} else []
    found = []
    for name, entry in asked:
        try:
            upstream.check(files.resolve(entry))
        except files.StudyError as error:
            found.append(f"{name}: {error}")
    return found


def _data(p: Parameters) -> list[str]:
    if p.dataset_path is None or "://" in p.dataset_path:
        return []
    path = files.resolve(p.dataset_path)
    if path.exists():
        return []
    return [f"dataset_path: {shown(path)} is not there; put the file there, or give its path or URL with --set dataset_path=..."]


def _adapter(p: Parameters) -> list[str]:
    if not p.adapter or p.adapter.startswith("hf:"):
        return []
    path = files.resolve(p.adapter)
    return [] if (path / "adapter_config.json").is_file() else [f"adapter: {shown(path)} holds no adapter_config.json."]


def _model(p: Parameters, elsewhere: bool) -> list[str]:
    if p.model_name == EMBEDDED_MODEL:
        return []
    folder = files.resolve(p.model_name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            return [f"model_name: {shown(folder)} holds no config.json."]
        return [] if elsewhere else _memory(p, sum(path.stat().st_size for path in folder.glob("*.safetensors")))
    size, problem = _hub(p.model_name, p.model_revision)
    if problem:
        return [problem]
    return [] if elsewhere else _disk_of(p, size) + _memory(p, size)


@functools.cache
def _hub(name: str, revision: str | None) -> tuple[int, str]:
    """Returns the bytes of a Hub model's weights and an empty text, or 0 and what keeps us from it."""
    import httpx2
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        cached = Path(snapshot_download(name, revision=revision, local_files_only=True))
        weights = list(cached.glob("*.safetensors"))
        if weights and (cached / "config.json").is_file():
            return sum(path.stat().st_size for path in weights), ""
    except (LocalEntryNotFoundError, ValueError, OSError):
        pass
    if constants.HF_HUB_OFFLINE:
        return 0, f"model_name: {name} is not in the local cache, and HF_HUB_OFFLINE keeps it from being fetched."
    try:
        api = HfApi()
        api.auth_check(name)
        info = api.model_info(name, revision=revision, files_metadata=True)
    except GatedRepoError:
        token = "with the token's account" if os.environ.get("HF_TOKEN") else "and set HF_TOKEN in .env to that account's token"
        return 0, f"model_name: {name} is gated; accept its licence at https://huggingface.co/{name} {token}."
    except RepositoryNotFoundError:
        return 0, f"model_name: {name} is not on the Hub, or is private; check the spelling, or set HF_TOKEN in .env."
    except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        return 0, f"model_name: {name} is not in the local cache, and the Hub does not answer ({' '.join(str(error).split())[:120]})."
    return sum(s.size or 0 for s in info.siblings or () if s.rfilename.endswith(".safetensors")), ""


def _disk_of(p: Parameters, weights: int) -> list[str]:
    """Compares a Hub model that is not in the local cache with the disk. `weights`: bytes of its safetensors."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    free = _free(cache)
    if free >= weights or any(cache.glob(f"models--{p.model_name.replace('/', '--')}/snapshots/*/*.safetensors")):
        return []
    return [f"disk: {p.model_name} is {_gb(weights)}, and {_gb(free)} are free in {cache}; set HF_HOME to a larger disk."]


def _memory(p: Parameters, weights: int) -> list[str]:
    """Compares a model with the memory there is. `weights`: bytes of its safetensors, two a parameter.

    It looks at the weights alone; 02_train's estimate, which needs torch, counts the rest before any weight is loaded.
    """
    # NF4 packs a parameter of two bytes into about half a byte; gradients, activations and the CUDA context come on top.
    need = int(weights * (0.3 if p.use_4bit else 1.0)) + min(weights, 3 * 1024**3)
    gpu = 0 if p.device == "cpu" else _gpu_bytes()
    have, where = (gpu, "GPU memory") if gpu else (_memory_bytes(), "memory")
    if need > have:
        return [f"memory: {p.model_name} needs about {_gb(need)}; there are {_gb(have)} of {where}; choose another model or machine."]
    if not gpu and p.device != "mps" and weights > 2 * 1024**3:
        print(f"{p.pair}: no NVIDIA GPU was found; training {p.model_name} on the CPU takes days.", flush=True)
    return []


def _judge(p: Parameters) -> list[str]:
    if not p.judge.startswith("openai:"):
        return []
    config.load_environment()
    address = p.judge_base_url or os.environ.get("OPENAI_BASE_URL") or chat.OPENAI_URL
    if chat.is_loopback(address):
        return []
    host = urlsplit(address).hostname or address
    found = []
    if not p.allow_external:
        found.append(f"allow_external: the judge {p.judge} would send all answers to {host}; allow it with --set allow_external=true.")
    if not os.environ.get("OPENAI_API_KEY"):
        found.append(f"OPENAI_API_KEY: the judge {p.judge} needs a key; set it in .env (see .env.example) or in the environment.")
    return found


def _disk(p: Parameters) -> list[str]:
    need = _RESULTS_BYTES if p.model_name != EMBEDDED_MODEL and not files.resolve(p.model_name).is_dir() else _RESULTS_BYTES // 16
    folder = files.resolve(p.results_dir)
    free = _free(folder)
    return [] if free >= need else [f"results_dir: {_gb(free)} are free at {shown(folder)}, and a run needs about {_gb(need)}."]


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _memory_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().total)


def _gpu_bytes() -> int:
    """Returns the memory of the largest NVIDIA GPU that may be used, 0 where there is none."""
    return max((card.memory for card in gpu.cards()), default=0)


def _gb(size: int) -> str:
    return f"{size / 1024**3:.1f} GiB"
