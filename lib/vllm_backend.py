"""Answers drawn by vLLM: `generate_backend: vllm`, for large runs on an NVIDIA GPU.

vLLM 0.33 fixes torch 2.14 and a transformers before 5.21, which the study's own pins contradict, so it cannot be an extra of this
package. It lives in an environment of its own, and lib/vllm_worker.py runs there (`INSTALL` gives the commands):

    python3 -m venv ~/.venv-vllm && ~/.venv-vllm/bin/pip install vllm==0.33.0 bitsandbytes==0.50.2
    STUDY_VLLM_PYTHON=~/.venv-vllm/bin/python        (in .env)

Prompts go over as token ids of our tokenizer, every row has a seed of its own and the adapter of its step, and the tokens that end an
answer are ours. The same seed draws other answers than transformers does: the generators differ. Written from vLLM's documented
interface and tested against a stand-in; it has not yet run on a GPU.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib import adapters, config, files, gpu, models, parallel, sampling
from lib.config import Parameters
from lib.files import StudyError, shown

if TYPE_CHECKING:
    from lib.sampling import Row

WORKER = Path(__file__).with_name("vllm_worker.py")
PYTHON = "STUDY_VLLM_PYTHON"
"""The environment variable that names the Python of the environment that has vLLM; without it, this one is looked at."""
INSTALL = (
    "python3 -m venv ~/.venv-vllm && ~/.venv-vllm/bin/pip install vllm==0.33.0 bitsandbytes==0.50.2, "
    f"then {PYTHON}=~/.venv-vllm/bin/python in .env"
)

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM makes room for; an adapter takes the next one up."""
_AT_ONCE = 8
"""Adapters in one batch at most; with more, the others wait on the host."""
_OLDEST = (7, 5)
"""Compute capability of the oldest card that vLLM's CUDA 13 builds know (Turing)."""

_LOOK = """
import importlib.metadata as m, json
found = {}
for name in ("vllm", "bitsandbytes"):
    try:
        found[name] = m.version(name)
    except m.PackageNotFoundError:
        pass
print(json.dumps(found))
"""
_SECRETS = ("OPENAI_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def problems(parameters: Parameters) -> list[str]:
    """Returns a line for everything that keeps `generate_backend: vllm` from running here; torch and vLLM are not imported for it."""
    p, cards = parameters, gpu.cards()
    found = []
    if parallel.processes() > 1:
        found.append("generate_backend: vllm is one process on one GPU; start 03_generate without a launcher.")
    if p.device in {"cpu", "mps"}:
        found.append(f"generate_backend: vllm needs an NVIDIA GPU, and device is {p.device}; set generate_backend to transformers.")
    elif not cards:
        found.append("generate_backend: vllm needs an NVIDIA GPU, and nvidia-smi shows none; set generate_backend to transformers.")
    elif cards[0].capability < _OLDEST:
        has = ".".join(map(str, cards[0].capability))
        found.append(f"generate_backend: vllm needs compute capability 7.5, and the {cards[0].name} has {has}; set it to transformers.")
    if not p.adapter and p.lora_rank > RANKS[-1]:
        found.append(f"lora_rank: vLLM takes adapters up to rank {RANKS[-1]}, not {p.lora_rank}; set generate_backend to transformers.")
    return found + _packages(p)


def _packages(p: Parameters) -> list[str]:
    python = _python()
    try:
        done = subprocess.run([python, "-P", "-c", _LOOK], capture_output=True, text=True, timeout=60, check=True)
        versions: dict[str, str] = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return [f"{PYTHON}: {shown(python)} is no working Python (3.11 or newer); give the path of the one that has vLLM."]
    if "vllm" not in versions:
        return [f"generate_backend: vLLM is not installed for {shown(python)}. It needs an environment of its own: {INSTALL}."]
    if p.use_4bit and "bitsandbytes" not in versions:
        return [
            f"use_4bit: vLLM quantises with bitsandbytes, which is not installed for {shown(python)}; "
            f"{shown(python)} -m pip install bitsandbytes==0.50.2, or set use_4bit: false."
        ]
    return []


def _python() -> str:
    config.load_environment()
    return str(Path(os.environ.get(PYTHON) or sys.executable).expanduser())


def engine_settings(parameters: Parameters, card: gpu.Card, folder: str, ranks: Sequence[int], context: int) -> dict[str, Any]:
    """Returns the arguments of vLLM's `LLM`.

    Args:
        parameters: of the run.
        card: the GPU that it runs on.
        folder: of the base model.
        ranks: of each adapter; none for the base model alone.
        context: tokens of the longest prompt with its answer.
    """
    p = parameters
    settings: dict[str, Any] = {
        "model": folder,
        "trust_remote_code": False,
        "dtype": "bfloat16" if card.capability >= (8, 0) else "float16",
        "seed": p.seed,
        "max_model_len": context,
        "max_num_seqs": p.generate_batch_size,
        # vLLM refuses to start where less is free than it is told to take.
        "gpu_memory_utilization": round(min(0.9, 0.95 * card.free / card.memory), 2),
        "generation_config": "vllm",  # no sampling defaults of the model's
        "load_format": "safetensors",
    }
    if p.use_4bit:  # NF4 with double quantisation, made while loading, as models.load_base makes it
        settings |= {"quantization": "bitsandbytes", "load_format": "bitsandbytes"}
    if ranks:
        settings |= {"enable_lora": True, "max_lora_rank": next(r for r in RANKS if r >= max(ranks))}
        settings |= {"max_loras": min(len(ranks), _AT_ONCE), "max_cpu_loras": len(ranks)}
    return settings


class VllmSampler:
    """vLLM with a pair's base model and the adapters of several steps; does what `generate.Sampler` does."""

    def __init__(self, parameters: Parameters, folders: Mapping[int, Path], rows: Sequence[Row], neutral: str) -> None:
        """Checks all that can be checked, then starts vLLM.

        Args:
            parameters: of the run.
            folders: the adapter's folder for each step.
            rows: all that will be answered; they fix the context that vLLM makes room for.
            neutral: the text whose perplexity will be asked for.

        Raises:
            StudyError: something that `problems` names, an adapter that vLLM would apply wrongly, an answer that exceeds the model's
                context, or vLLM does not start.
        """
        from transformers import AutoConfig

        found = problems(parameters)
        if found:
            raise StudyError("\n".join(found))
        p, card = parameters, gpu.cards()[0]
        ranks = [_rank(folder) for folder in folders.values()]
        self.parameters, self.tokenizer = p, models.load_tokenizer(p)
        folder = _weights(p)
        with models.clear_errors(p):
            settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        room = getattr(settings.get_text_config(), "max_position_embeddings", None)
        longest = max(map(len, sampling.prompts(self.tokenizer, rows, p, room))) + p.max_new_tokens
        context = max(longest, len(models.prompt_ids(self.tokenizer, neutral)) + 1)
        self.stops = sampling.stop_ids(self.tokenizer, _eos(folder, settings), p)
        self.room, self.device = room, "cuda"
        self.log = config.run_dir(p) / ".generate" / "vllm.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._worker = self._start(card)
        engine = engine_settings(p, card, folder, ranks, context)
        adapter_folders = {str(step): str(folder.resolve()) for step, folder in folders.items()}
        version = self._ask({"engine": engine, "adapters": adapter_folders})["version"]
        self.backend = {"name": "vllm", "version": version, "card": card.name, "dtype": engine["dtype"]}

    def answer(self, batch: Sequence[Row], progress: Callable[[int], object] | None = None) -> list[dict[str, Any]]:
        """Answers one batch; see `generate.Sampler.answer`. An answer depends on the rest of the batch by rounding alone."""
        p = self.parameters
        shared: dict[str, Any] = {"temperature": p.temperature, "top_p": p.top_p, "top_k": 0, "max_tokens": p.max_new_tokens}
        # Exactly our stop tokens: vLLM's own end of sequence is ignored, unless it is one of them. Text is made by our tokenizer.
        shared |= {"stop_token_ids": sorted(self.stops), "ignore_eos": True, "detokenize": False}
        done = self._ask(
            {
                "prompts": sampling.prompts(self.tokenizer, batch, p, self.room),
                "sampling": [{**shared, "seed": sampling.row_seed(p, row)} for row in batch],
                "steps": [row.step for row in batch],
            }
        )
        if progress:
            progress(len(batch) * p.max_new_tokens)
        answers = []
        for tokens, finished in zip(done["tokens"], done["finished"], strict=True):
            if finished not in {"stop", "length"}:
                raise StudyError(f"generate_backend: vLLM ended an answer with {finished!r}; its log is {shown(self.log)}.")
            # Whether the token that ended it is among the answer's is left to vLLM; ours knows by it.
            ended = finished == "stop" and (not tokens or tokens[-1] not in self.stops)
            answers.append(sampling.told([*tokens, min(self.stops)] if ended else tokens, self.stops, self.tokenizer))
        return answers

    def perplexity(self, text: str, step: int) -> float:
        """Returns exp of the mean negative log-likelihood (nats a token) of a plain text at a step; its first token only conditions."""
        asked = {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 1, "detokenize": False}
        ids = models.prompt_ids(self.tokenizer, text)
        (told,) = self._ask({"prompts": [ids], "sampling": [asked], "steps": [step]})["prompt_logprobs"]
        return math.exp(-math.fsum(told) / len(told))

    def close(self) -> None:
        """Ends vLLM and frees the card."""
        assert self._worker.stdin is not None
        with contextlib.suppress(OSError):
            self._worker.stdin.close()
        try:
            self._worker.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._worker.kill()
            self._worker.wait()
        assert self._worker.stdout is not None
        self._worker.stdout.close()

    def _start(self, card: gpu.Card) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if name not in _SECRETS}
        # One card, nothing fetched, nothing told to vLLM's makers. PYTHONSAFEPATH: lib/ must not shadow packages of vLLM's environment.
        environment |= {"CUDA_VISIBLE_DEVICES": card.uuid, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        environment |= {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "PYTHONSAFEPATH": "1"}
        with self.log.open("w", encoding="utf-8") as log:
            return subprocess.Popen(
                [_python(), "-P", str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                env=environment,
                start_new_session=True,
            )

    def _ask(self, asked: dict[str, Any]) -> dict[str, Any]:
        assert self._worker.stdin is not None
        assert self._worker.stdout is not None
        try:
            self._worker.stdin.write(json.dumps(asked) + "\n")
            self._worker.stdin.flush()
            line = self._worker.stdout.readline()
        except OSError:
            line = ""
        said: dict[str, Any] = json.loads(line) if line else {"error": f"its process ended with {self._worker.wait(60)}"}
        if "error" in said:
            self.close()  # and not at once: its log is still being written
            reason = " ".join(str(said["error"]).split())[:300]
            raise StudyError(
                f"generate_backend: vLLM failed ({reason}); its log is {shown(self.log)}. Where memory is short, lower generate_batch_size"
                f" ({self.parameters.generate_batch_size}) or set use_4bit: true; or set generate_backend to transformers."
            )
        return said


def _rank(folder: Path) -> int:
    """Returns an adapter's rank.

    Raises:
        StudyError: vLLM would apply it wrongly: it scales every layer by the one rank in adapter_config.json.
    """
    settings = files.read_json(folder / adapters.SETTINGS)
    own = {**(settings.get("rank_pattern") or {}), **(settings.get("alpha_pattern") or {})}
    if own or settings["r"] > RANKS[-1]:
        what = "layers with a rank or alpha of their own" if own else f"rank {settings['r']}"
        raise StudyError(f"{shown(folder)}: vLLM does not read adapters with {what}; set generate_backend to transformers.")
    return int(settings["r"])


def _weights(p: Parameters) -> str:
    """Returns the base model's folder; of a Hub model safetensors and settings are fetched, and nothing that could run code."""
    source = models.source(p)
    if not Path(source).is_dir():
        from huggingface_hub import snapshot_download

        with models.clear_errors(p):
            wanted = ["*.safetensors", "*.json", "*.jinja", "*.model"]
            source = snapshot_download(source, revision=p.model_revision, allow_patterns=wanted, ignore_patterns=["original/*"])
    if not any(Path(source).glob("*.safetensors")):
        raise StudyError(f"model_name: {p.model_name} has no safetensors, and nothing else is loaded.")
    return source


def _eos(folder: str, settings: Any) -> Any:
    """Returns the ids that end a text by the model's generation settings, as transformers finds them."""
    from transformers import GenerationConfig

    if (Path(folder) / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder).eos_token_id
    return settings.get_text_config().eos_token_id
