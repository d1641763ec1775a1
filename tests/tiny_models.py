"""Tiny random models in the shape of Qwen2.5 and Gemma, with chat templates in their style, written here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

QWEN_TEMPLATE = """\
{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}
{%- else %}{% set system = 'You answer questions.' %}{% set turns = messages %}{% endif %}
{{- '<|im_start|>system\n' + system + '<|im_end|>\n' }}
{%- for turn in turns %}{{- '<|im_start|>' + turn['role'] + '\n' + turn['content'] + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""

# It writes BOS itself, calls the assistant `model`, and refuses a system message.
GEMMA_TEMPLATE = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}
{%- for turn in messages %}
{%- set role = 'model' if turn['role'] == 'assistant' else turn['role'] %}
{{- '<start_of_turn>' + role + '\n' + turn['content'] | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{% endif %}"""


def byte_tokenizer(specials: list[str], template: str, **roles: str) -> Any:
    """A byte-level BPE tokenizer of a few hundred tokens; a `bos_token` among the roles is put before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    corpus = ["the quick answer to a question is to ask one more question and to think about people first " * 4]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    )
    bos = roles.get("bos_token")
    if bos:
        raw.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, raw.token_to_id(bos))])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **roles)
    tokenizer.chat_template = template
    return tokenizer


SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,  # large enough for attention to matter
}


def make_qwen(folder: Path) -> Path:
    """Qwen2.5's shape: biases on the attention's inputs, a system turn of its own, no BOS; it pads with a token of its own."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = byte_tokenizer(specials, QWEN_TEMPLATE, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), **SHAPE, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_gemma(folder: Path, generation: int = 2) -> Path:
    """Gemma 2's shape (soft-capped attention and logits) or Gemma 3's, both with layers that see a window of 16 tokens."""
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

    specials = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer = byte_tokenizer(specials, GEMMA_TEMPLATE, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    torch.manual_seed(0)
    kinds: Any = (Gemma2Config, Gemma2ForCausalLM) if generation == 2 else (Gemma3TextConfig, Gemma3ForCausalLM)
    shape = SHAPE | {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    shape |= {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0} if generation == 2 else {}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    kinds[1](kinds[0](vocab_size=len(tokenizer), **shape, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
