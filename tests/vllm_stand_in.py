"""What the worker sees as `vllm` in tests: the documented names and arguments, with transformers and peft behind them.

It says whether we call vLLM as its documentation asks. It says nothing of vLLM itself, which needs a GPU and has never run here.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

__version__ = "0.33.0"

# Of vLLM's EngineArgs, those that we may give.
ENGINE = {
    *("model", "trust_remote_code", "dtype", "seed", "max_model_len", "max_num_seqs", "gpu_memory_utilization", "generation_config"),
    *("load_format", "quantization", "enable_lora", "max_lora_rank", "max_loras", "max_cpu_loras"),
}


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    max_tokens: int | None = 16
    prompt_logprobs: int | None = None
    detokenize: bool = True


@dataclass(frozen=True)
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str

    def __post_init__(self) -> None:
        assert self.lora_int_id > 0


class LLM:
    def __init__(self, model: str, **settings: Any) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        assert set(settings) <= ENGINE, settings
        if "fail" in os.environ.get("STAND_IN", ""):
            raise RuntimeError("No available memory for the cache blocks.")
        print("a banner on standard output, as vLLM writes them")
        self.settings, self.wrap = settings, PeftModel
        self.base = AutoModelForCausalLM.from_pretrained(model)
        told = {**settings, "model": model, "environment": dict(os.environ)}
        with open(os.environ["STAND_IN_LOG"], "a") as stream:
            stream.write(json.dumps(told) + "\n")

    def generate(self, prompts: Any, sampling_params: Any, *, use_tqdm: bool, lora_request: Any) -> list[Any]:
        assert len(prompts) == len(sampling_params) == len(lora_request)
        with open(os.environ["STAND_IN_LOG"], "a") as stream:
            stream.write(json.dumps([vars(s) for s in sampling_params]) + "\n")
        return [self._one(*one) for one in zip(prompts, sampling_params, lora_request, strict=True)]

    @torch.inference_mode()
    def _one(self, prompt: dict[str, list[int]], told: SamplingParams, lora: LoRARequest | None) -> Any:
        assert lora is None or self.settings["enable_lora"]
        ids = list(prompt["prompt_token_ids"])
        assert len(ids) + told.max_tokens <= self.settings["max_model_len"]
        model = self.wrap.from_pretrained(self.base, lora.lora_path) if lora else self.base
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        logprobs = None
        if told.prompt_logprobs is not None:
            pairs = enumerate(ids[1:])
            logprobs = [None, *({token: SimpleNamespace(logprob=float(logits[at, token])), 0: None} for at, token in pairs)]
            logprobs[1:] = [{t: v for t, v in found.items() if v} for found in logprobs[1:]]
        drawn: list[int] = []
        generator = torch.Generator().manual_seed(told.seed or 0)
        while len(drawn) < told.max_tokens and not (drawn and drawn[-1] in told.stop_token_ids):
            last = model(torch.tensor([ids + drawn])).logits[0, -1]
            if told.temperature == 0:
                drawn.append(int(last.argmax()))
            else:
                drawn.append(int(torch.multinomial((last / told.temperature).softmax(-1), 1, generator=generator)))
        if lora:
            self.base = model.unload()
        reason = "stop" if drawn[-1] in told.stop_token_ids else "length"
        output = SimpleNamespace(token_ids=tuple(drawn), finish_reason=reason)
        return SimpleNamespace(outputs=[output], prompt_token_ids=ids, prompt_logprobs=logprobs)
