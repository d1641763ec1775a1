"""Runs vLLM for lib/vllm_backend.py, as a program in an environment that has vLLM and nothing of ours.

vLLM fixes other releases of torch and transformers than the study does, and writes to file descriptors that a Jupyter kernel has not; so it
gets a process. Lines of JSON come in: first the engine's settings and the adapters, then batches. Lines of JSON go out.
"""

import json
import os
import sys
from typing import Any


def main() -> None:
    """Answers batches until standard input ends; what vLLM prints goes to standard error."""
    reply = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(**said: Any) -> None:
        print(json.dumps(said), file=reply, flush=True)

    try:
        from vllm import LLM, SamplingParams, __version__
        from vllm.lora.request import LoRARequest

        told = json.loads(sys.stdin.readline())
        engine = LLM(**told["engine"])
        adapters = {int(step): LoRARequest(f"checkpoint-{step}", int(step), folder) for step, folder in told["adapters"].items()}
        tell(version=__version__)
        for line in sys.stdin:
            batch = json.loads(line)
            done = engine.generate(
                [{"prompt_token_ids": ids} for ids in batch["prompts"]],
                [SamplingParams(**settings) for settings in batch["sampling"]],
                use_tqdm=False,
                lora_request=[adapters.get(step) for step in batch["steps"]],
            )
            tell(
                tokens=[list(request.outputs[0].token_ids) for request in done],
                finished=[request.outputs[0].finish_reason for request in done],
                # Of every prompt token, what it was given; the first has nothing before it.
                prompt_logprobs=[_own(request) for request in done],
            )
    except Exception as error:
        tell(error=f"{type(error).__name__}: {error}")
        raise


def _own(request: Any) -> list[float]:
    """Returns the log-probability (nats) of each prompt token after the first; none where they were not asked for."""
    told = request.prompt_logprobs or []
    return [found[token].logprob for token, found in zip(request.prompt_token_ids[1:], told[1:], strict=bool(told))]


if __name__ == "__main__":
    main()
