"""Training beside trl's SFTTrainer, on the CPU and on an NVIDIA GPU, and the time that 02_train predicts for the demo."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from measure import demo_rows, parameters, spread, versus

STEPS = 5
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
"""The shape of Llama-3.1-8B."""
GPU_BYTES = 24e9
"""What a training at the original settings must fit into."""


def matrix_rate() -> float:
    """Returns the machine's fp32 matrix rate, operations a second, on 2048³ products."""
    import torch

    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    a @ b
    start = time.perf_counter()
    for _ in range(10):
        a @ b
    return 10 * 2 * 2048**3 / (time.perf_counter() - start)


def rates(
    p: Any, rows: list[dict[str, Any]], folder: str, load: Callable[[str], Any]
) -> tuple[Any, Any, dict[str, list[float]], list[Any]]:
    """Prepares ours and trl's trainer for the same rows in the same order.

    Args:
        p: the parameters.
        rows: training rows.
        folder: for what the trainers write.
        load: returns the base model with LoRA, for `ours` or for `trl`.

    Returns:
        Two functions that train and return tokens a second, padding not counted, over the steps after the first; where they leave the
        losses; and the encoded rows, those of the first step before the others.
    """
    import numpy as np
    import torch
    from transformers import TrainerCallback

    from lib import models, qlora
    from lib.trainer import Job, StudyTrainer

    tokenizer = models.load_tokenizer(p)
    encoded = qlora.encode(tokenizer, rows, p).rows
    group = p.batch_size * p.gradient_accumulation_steps
    order = np.random.default_rng((p.seed, 0)).permutation(len(encoded))[: (STEPS + 1) * group]
    used = [encoded[i] for i in order]
    tokens = sum(len(row["input_ids"]) for row in used[group:])
    schedule = qlora.plan(p, len(encoded))
    losses: dict[str, list[float]] = {}

    class Clock(TrainerCallback):
        """Times the steps after the first."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if state.global_step == 1:
                self.start = time.perf_counter()
            self.end = time.perf_counter()
            control.should_training_stop = state.global_step == STEPS + 1

    def run(trainer: Any, name: str) -> float:
        clock = Clock()
        trainer.add_callback(clock)
        trainer.train()
        losses[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return tokens / (clock.end - clock.start)

    def ours() -> float:
        manifest: dict[str, Any] = {"seconds": 0.0, "adapters": {}}
        job = Job(Path(folder), p, schedule.steps_per_epoch, [], manifest, p.batch_size, p.gradient_accumulation_steps)
        return run(StudyTrainer(job, load("ours"), encoded, int(tokenizer.pad_token_id), progress=False), "ours")

    def theirs() -> float:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        device = models.pick_device(p)
        told = SFTConfig(
            output_dir=folder,
            max_steps=schedule.total,
            per_device_train_batch_size=p.batch_size,
            gradient_accumulation_steps=p.gradient_accumulation_steps,
            learning_rate=p.learning_rate,
            lr_scheduler_type=p.lr_scheduler_type,
            warmup_steps=p.warmup_steps,
            weight_decay=p.weight_decay,
            optim=p.optim,
            max_length=p.max_length,
            train_sampling_strategy="sequential",
            completion_only_loss=True,
            gradient_checkpointing=p.gradient_checkpointing,
            bf16=models.pick_dtype(device) == torch.bfloat16,
            use_cpu=device.type == "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        masks = [[int(label >= 0) for label in row["labels"]] for row in used]
        table = Dataset.from_dict({"input_ids": [row["input_ids"] for row in used], "completion_mask": masks})
        return run(SFTTrainer(load("trl"), args=told, train_dataset=table, processing_class=tokenizer), "trl")

    return ours, theirs, losses, used


def train(repeats: int) -> Iterator[dict[str, Any]]:
    """Steps of the demo's training, dropout 0, beside trl's SFTTrainer on the same rows in the same order."""
    import torch

    from lib import adapters, models

    p = parameters(lora_dropout=0.0, device="cpu")

    def load(name: str) -> Any:
        torch.manual_seed(p.seed)
        unpack = "auto" if name == "ours" else False
        return adapters.add_lora(models.load_base(p.model_copy(update={"cache_dequantized": unpack})), p)

    matrix = []
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs, losses, used = rates(p, demo_rows(p.domain)[: p.sample_size], folder, load)

        def rated() -> float:
            matrix.append(matrix_rate())
            return float(ours())

        (row,) = versus("QLoRA step, SmolLM2-135M NF4, batch 8", "tokens/s", repeats, rated, {"trl SFTTrainer": (3.0, theirs)})
    model, timed = load("ours"), used[p.batch_size :]
    tokens = sum(len(row["input_ids"]) for row in timed)
    linear = sum(m.in_features * m.out_features for n, m in model.named_modules() if n.endswith("base_layer"))
    low_rank = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    head = model.get_output_embeddings().weight.numel()
    labelled = sum(label >= 0 for row in timed for label in row["labels"])
    # A frozen weight costs a product forward and one backward; a trained one two backward; logits are needed for labelled tokens alone.
    work = tokens * (4 * linear + 6 * low_rank) + 4 * head * labelled
    used_share = row["ours"]["median"] * work / tokens / statistics.median(matrix)
    gap = max(abs(a - b) for a, b in zip(losses["ours"], losses["trl"], strict=True))
    yield row | {"largest_loss_difference": gap, "aim_loss_difference": 1e-3, "met": row["met"] and gap <= 1e-3}
    machine = {"work": "the same", "unit": "share of the fp32 matrix rate, useful tokens alone", "peer": "2048³ matrix product"}
    rate = {"ours": {"median": round(used_share, 3)}, "theirs": spread([r / 1e9 for r in matrix]) | {"unit": "GFLOP/s"}}
    yield machine | rate | {"ratio": {"median": round(used_share, 3)}, "aim": 0.65, "met": used_share >= 0.65}


def gpu(repeats: int) -> Iterator[dict[str, Any]]:
    """QLoRA of a random model in the shape of Llama-3.1-8B at the original settings, beside trl: tokens a second, and peak memory.

    It takes 16 GB of disk for a while. Without an NVIDIA GPU there is no row.
    """
    import torch

    if not torch.cuda.is_available():
        print("gpu: there is no NVIDIA GPU here, so nothing was measured.")
        return
    from transformers import LlamaConfig, LlamaForCausalLM

    from lib import adapters, models

    tokenizer = models.load_tokenizer(parameters())
    peaks: dict[str, list[float]] = {"ours": [], "trl": []}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("cuda"):
                model = LlamaForCausalLM(LlamaConfig(**LLAMA_8B))
        finally:
            torch.set_default_dtype(torch.float32)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model
        p = parameters(preset="original", model_name=folder, use_4bit=True, num_epochs=1, gradient_checkpointing=True, batch_size=8,
                       gradient_accumulation_steps=2, learning_rate=2e-4, warmup_steps=10, loss_on="all", device="cuda")  # fmt: skip

        def load(name: str) -> Any:
            torch.manual_seed(p.seed)
            return adapters.add_lora(models.load_base(p), p)

        ours, theirs, _, _ = rates(p, demo_rows(p.domain), folder, load)

        def watched(name: str, measure: Callable[[], float]) -> Callable[[], float]:
            def run() -> float:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                found = measure()
                peaks[name].append(torch.cuda.max_memory_allocated())
                return found

            return run

        work = f"QLoRA, Llama-3.1-8B's shape, original settings, {torch.cuda.get_device_name()}"
        peers = {"trl SFTTrainer": (1.0, watched("trl", theirs))}
        yield from versus(work, "tokens/s", repeats, watched("ours", ours), peers)
    memory = {name: spread([value / 1e9 for value in values]) for name, values in peaks.items()}
    told = {"work": "the same, peak GPU memory", "unit": "GB", "peer": "trl SFTTrainer", "ours": memory["ours"], "theirs": memory["trl"]}
    yield told | {"aim": GPU_BYTES / 1e9, "met": max(peaks["ours"]) < GPU_BYTES}


def prediction(repeats: int) -> Iterator[dict[str, Any]]:
    """The time that 02_train predicts for the demo, beside the time that its training then takes."""
    from lib import estimate, qlora

    ratios, told, took = [], [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as temporary:
            p = parameters(results_dir=temporary)
            rows = demo_rows(p.domain)[: p.sample_size]
            told.append(float(estimate.estimate(p, rows).seconds or 0))
            took.append(float(qlora.train(p, rows, progress=False)["seconds"]["train"]))
            ratios.append(told[-1] / took[-1])
    row = {
        "work": "time predicted before the demo's training",
        "unit": "s",
        "peer": "the training",
        "ours": spread(told),
        "theirs": spread(took),
    }
    yield row | {"ratio": spread(ratios), "aim": 0.25, "met": all(abs(ratio - 1) <= 0.25 for ratio in ratios)}
