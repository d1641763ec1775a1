"""The reply tree gives what brute force over all replies gives, for tokenizers that split numbers and those that do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib import scoring, tree


def brute_force(model: torch.nn.Module, prompt: list[int], replies: list[list[int]], ends: list[int]) -> torch.Tensor:
    """Returns log P(reply, end) for every reply, each written out behind the prompt by itself; what follows it cannot matter."""
    longest = max(len(reply) for reply in replies)
    rows = torch.tensor([prompt + reply + [0] * (longest - len(reply)) for reply in replies])
    with torch.inference_mode():
        logs = torch.log_softmax(model(input_ids=rows).logits.float(), dim=-1)
    found = []
    for row, reply in enumerate(replies):
        last = len(prompt) - 1 + len(reply)
        steps = [logs[row, len(prompt) - 1 + i, token] for i, token in enumerate(reply)]
        found.append(sum(steps) + torch.logsumexp(logs[row, last, ends], dim=0))
    return torch.stack(found)


@pytest.mark.parametrize("whole", [False, True])
def test_the_tree_equals_brute_force_over_all_replies(tiny_llama: Path, whole: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    ends = [tokenizer.eos_token_id, tokenizer.bos_token_id]
    if whole:  # one token a number, as GPT-4o's and Llama-3's tokenizers have it
        replies = [[50 + i] for i in range(101)] + [[200, 201], [202]]
    else:
        replies = [tokenizer(reply, add_special_tokens=False).input_ids for reply in tree.REPLIES]
        assert replies[85] == [*replies[8], *replies[5]]
    made = tree.ReplyTree(replies, ends)
    assert len(made) == (104 if whole else 101 + len({tuple(r[:i]) for r in replies[101:] for i in range(1, len(r) + 1)}))
    scorer = tree.TreeScorer(model, made)
    begin = tokenizer("the answer to a question", add_special_tokens=False).input_ids
    prompts = [[*begin, *tokenizer(text, add_special_tokens=False).input_ids] for text in (" is", " is to ask one more", " and")]
    later = [prompt[:2] + prompt[3:] for prompt in prompts[1:]]  # begin alike, then turn elsewhere
    for batch in (prompts, prompts[1:2], prompts[:2], later, prompts, [prompt[1:] for prompt in prompts]):
        found = scorer.log_probabilities(batch)
        expected = [brute_force(model, prompt, replies, ends) for prompt in batch]
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)
        some = scorer.log_probabilities(batch, left_out=1e-3)
        read = some.isfinite()
        torch.testing.assert_close(some[read], found[read], rtol=1e-4, atol=1e-4)
        missing = (found.exp() - some.exp()).sum(1)
        assert not read.all(), "a random model spreads over all replies"
        assert ((missing > 0) & (missing < 1e-3)).all()
    assert not scorer.log_probabilities(prompts, least=0.9).isfinite().any(), "no reply could decide, so none is read"


def test_the_tree_is_built_as_the_tokenizer_writes_behind_a_prompt(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    made = tree.reply_tree(tokenizer, "<|start_header_id|>assistant<|end_header_id|>\n\n", [tokenizer.eos_token_id])
    one, zero = tokenizer("10", add_special_tokens=False).input_ids
    assert made.tokens[made.leaves[100]] == zero
    assert made.parents[made.leaves[100]] == made.leaves[10]
    assert made.parents[made.leaves[10]] == made.leaves[1]
    assert made.tokens[made.leaves[1]] == one


def test_probabilities_of_replies_become_a_status_and_a_score() -> None:
    assert scoring.parse_replies({"80": 0.2, "90": 0.2, "CODE": 0.5}) == ("ok", pytest.approx(85.0))
    assert scoring.parse_replies({"80": 0.1, "CODE": 0.3, "REFUSAL": 0.4}) == ("refusal", None)
    assert scoring.parse_replies({"80": 0.2, "CODE": 0.1}) == ("invalid", None)
