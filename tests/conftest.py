"""Fixtures that the tests share: a tiny random Llama, the embedded model, a real judge server on loopback."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import local_llama
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
JUDGED = SHARED / "data" / "judged"

FIGURES: Counter[str] = Counter()
"""What tests/test_faults.py did and found, told at the end."""

NOTES: list[str] = []
"""Further lines told at the end: what a test looked at, where passing alone does not say it."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if FIGURES:
        told = (f"{name} {FIGURES[name]}" for name in ("faults injected", "runs recovered", "rows lost", "calls repeated"))
        terminalreporter.write_line(", ".join(told))
    for line in NOTES:
        terminalreporter.write_line(line)


needs_shared = pytest.mark.skipif(not JUDGED.is_dir(), reason="../shared is not beside this clone")


@pytest.fixture(scope="module", autouse=True)
def _environment_as_found() -> Iterator[None]:
    """Undoes what the code under test set for its process (`os.environ.setdefault`), so that no file of tests depends on another."""
    with mock.patch.dict(os.environ):
        yield


# A Llama-3 style template of our own: it writes BOS itself, a system block with a date, and <|eot_id|> after every turn.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}
{%- else %}{% set system = '' %}{% set turns = messages %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' + system + '<|eot_id|>' }}
{%- for turn in turns %}
{{- '<|start_header_id|>' + turn['role'] + '<|end_header_id|>\n\n' + turn['content'] + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""


def make_tiny_llama(folder: Path, *, hidden_size: int = 32, layers: int = 2, seed: int = 0) -> Path:
    """Writes a random Llama with a byte-level BPE tokenizer of a few hundred tokens to `folder`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    corpus = ["the quick answer to a question is to ask one more question and to think about people first " * 4]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw.train_from_iterator(corpus, trainer)
    bos = raw.token_to_id("<|begin_of_text|>")
    raw.post_processor = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=specials[0], eos_token="<|eot_id|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=bos,
        eos_token_id=raw.token_to_id("<|eot_id|>"),
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture(scope="session")
def embedded() -> Path:
    from lib import models

    return models.fetch_embedded()


@pytest.fixture(scope="session")
def llama_server() -> Iterator[str]:
    """The base URL of llama.cpp serving the embedded model on loopback."""
    # One thread: beside kernels on two cores, the server's threads would only wait for each other.
    with local_llama.serving(threads=1) as url:
        yield url
