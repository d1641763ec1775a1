"""The exact probability that a local model replies with each whole number from 0 to 100, CODE or REFUSAL, in one forward pass.

A reply's probability is the product of those of its tokens and of the end of the turn. The replies share beginnings, so their
tokens form a tree (8 then 5 then the end, where a tokenizer splits 85), and a tree fits into one pass: its nodes stand one
after the other behind the prompt, and each attends to the prompt and to its own ancestors alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lib.files import StudyError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NUMBERS = tuple(str(number) for number in range(101))
REPLIES = (*NUMBERS, "REFUSAL", "CODE")
"""What a judge may reply; everything else is probability that none of them holds."""


class ReplyTree:
    """The tokens of all replies as a tree.

    Attributes:
        tokens: the token of each node; parents come before children.
        parents: the node before it, or -1 for the prompt.
        depths: tokens from the prompt, 1 for the first.
        leaves: the node at which each of `REPLIES` is complete.
        ends: tokens that end a turn.
    """

    def __init__(self, replies: Sequence[Sequence[int]], ends: Sequence[int]) -> None:
        nodes: dict[tuple[int, ...], int] = {}
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        for reply in replies:
            for depth in range(1, len(reply) + 1):
                path = tuple(reply[:depth])
                if path not in nodes:
                    nodes[path] = len(self.tokens)
                    self.tokens.append(path[-1])
                    self.parents.append(nodes.get(path[:-1], -1))
                    self.depths.append(depth)
        self.leaves = [nodes[tuple(reply)] for reply in replies]
        self.ends = sorted(set(ends))

    def __len__(self) -> int:
        return len(self.tokens)


def reply_tree(tokenizer: PreTrainedTokenizerBase, prompt: str, ends: Sequence[int]) -> ReplyTree:
    """Builds the tree of `REPLIES` as a tokenizer writes them behind a prompt.

    Args:
        tokenizer: whose tokens.
        prompt: any chat prompt, up to where the reply begins; some tokenizers write a first word otherwise than a later one.
        ends: tokens that end a turn.

    Raises:
        StudyError: the tokenizer joins the reply to the prompt, so that it has no tokens of its own.
    """
    before = tokenizer(prompt, add_special_tokens=False).input_ids
    replies = []
    for reply in REPLIES:
        whole = tokenizer(prompt + reply, add_special_tokens=False).input_ids
        if whole[: len(before)] != before or len(whole) == len(before):
            raise StudyError(f"judge: this model's tokenizer joins the reply {reply} to the prompt; judge with another model.")
        replies.append(whole[len(before) :])
    return ReplyTree(replies, ends)


class TreeScorer:
    """Scores prompts with a model; the work on a beginning that a batch shares is done once, and kept for the next batch."""

    def __init__(self, model: PreTrainedModel, tree: ReplyTree) -> None:
        self._model = model
        self._tree = tree
        self._prefix: tuple[list[int], Any] = ([], None)
        depth = max(tree.depths)
        window = getattr(model.config, "sliding_window", None) if _slides(model.config) else None
        self.longest = min(window or 10**9, getattr(model.config, "max_position_embeddings", 10**9)) - depth

    def log_probabilities(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Returns log P(reply, then end) for each prompt and each of `REPLIES`, shape [prompts, 103], natural logarithms.

        Args:
            prompts: token ids, each at most `longest` tokens; a batch is best of prompts that begin alike.
        """
        import torch

        tree, device = self._tree, self._model.device
        with torch.inference_mode():
            shared, cache = self._shared(prompts)
            ids, positions, mask = self._batch([list(prompt[shared:]) for prompt in prompts], shared)
            kept = len(tree) + 1
            logits = self._model(
                input_ids=ids.to(device),
                position_ids=positions.to(device),
                attention_mask=mask.to(device),
                cache=cache,
                logits_to_keep=kept,
            ).logits
            logs = torch.log_softmax(logits.float(), dim=-1)
            # Row 0 is the prompt's last token, row n + 1 is node n: what each expects next.
            before = torch.tensor(tree.parents, device=device) + 1
            steps = logs[:, before, torch.tensor(tree.tokens, device=device)]
            end = torch.logsumexp(logs[:, :, tree.ends], dim=-1)
            reached = torch.zeros_like(steps)
            for node, parent in enumerate(tree.parents):
                reached[:, node] = steps[:, node] + (reached[:, parent] if parent >= 0 else 0.0)
            leaves = torch.tensor(tree.leaves, device=device)
            return (reached[:, leaves] + end[:, leaves + 1]).cpu()

    def _shared(self, prompts: Sequence[Sequence[int]]) -> tuple[int, Any]:
        """Returns how many first tokens a batch shares, and the model's state after them, ready for the batch."""
        first = list(prompts[0])
        shared = min(len(prompt) for prompt in prompts) - 1  # the last token's own output is needed
        shared = next((i for i in range(shared) if any(prompt[i] != first[i] for prompt in prompts)), shared)
        if not shared:
            return 0, None
        known, cache = self._prefix
        if known != first[:shared]:
            import torch

            # After the same rubric another question: the rubric's share is kept. A window's cache cannot be cut back.
            alike = next((i for i, (a, b) in enumerate(zip(known, first, strict=False)) if a != b), min(len(known), len(first)))
            kept = 0 if _slides(self._model.config) else min(alike, shared - 1)  # one token must be left to compute
            if kept:
                cache.crop(kept - len(known))
            ids = torch.tensor([first[kept:shared]], device=self._model.device)
            cache = self._model(input_ids=ids, cache=cache if kept else None, use_cache=True, logits_to_keep=1).cache
            self._prefix = (first[:shared], cache)
        cache = copy.deepcopy(self._prefix[1])
        cache.batch_repeat_interleave(len(prompts))
        return shared, cache

    def _batch(self, prompts: list[list[int]], shared: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Lays out what is left of the prompts, padded on the left, with the tree behind each.

        Returns:
            Token ids and positions of shape [prompts, width + nodes], and who attends to whom, [prompts, 1, width + nodes,
            shared + width + nodes].
        """
        import torch

        tree = self._tree
        nodes, width, rows = len(tree), max(len(prompt) for prompt in prompts), len(prompts)
        ids = torch.zeros(rows, width + nodes, dtype=torch.long)
        positions = torch.zeros_like(ids)
        mask = torch.zeros(rows, 1, width + nodes, shared + width + nodes, dtype=torch.bool)
        family = torch.eye(nodes, dtype=torch.bool)
        for node, parent in enumerate(tree.parents):
            if parent >= 0:
                family[node] |= family[parent]
        for row, prompt in enumerate(prompts):
            pad = width - len(prompt)
            ids[row, pad:] = torch.tensor(prompt + tree.tokens)
            steps = list(range(len(prompt))) + [len(prompt) - 1 + depth for depth in tree.depths]
            positions[row, pad:] = shared + torch.tensor(steps)
            own = mask[row, 0, :, shared:]
            own[pad:width, pad:width] = torch.ones(len(prompt), len(prompt), dtype=torch.bool).tril()
            own[width:, pad:width] = True
            own[width:, width:] = family
            own[torch.arange(pad), torch.arange(pad)] = True  # padding must attend to something, or it spoils the rest with NaN
            mask[row, 0, :, :shared] = True
        return ids, positions, mask


def _slides(config: Any) -> bool:
    """Says whether some layers see only a window of the text."""
    kinds = getattr(config, "layer_types", None)
    return "sliding_attention" in kinds if kinds else bool(getattr(config, "sliding_window", None))
