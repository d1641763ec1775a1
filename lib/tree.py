"""The probability that a local model replies with each whole number from 0 to 100, CODE or REFUSAL, not sampled but computed.

A reply's probability is the product of those of its tokens and of the end of the turn. The replies share beginnings, so their
tokens form a tree (8 then 5 then the end, where a tokenizer splits 85). A level of the tree fits into one pass: its nodes stand one
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
        window = getattr(model.config, "sliding_window", None) if _slides(model.config) else None
        room = getattr(model.config, "max_position_embeddings", 10**9) - max(tree.depths)
        # A window counts places, and each node of the tree takes one.
        self.longest = min(window - len(tree), room) if window else room

    def log_probabilities(self, prompts: Sequence[Sequence[int]], left_out: float = 0.0, least: float = 0.0) -> torch.Tensor:
        """Returns log P(reply, then end) for each prompt and each of `REPLIES`, shape [prompts, 103], natural logarithms.

        The tree is read a level at a time, and of each level only the likely nodes: most judges put nearly all probability on a few
        replies. What begins with a node that was not read counts as impossible.

        Args:
            prompts: token ids, each at most `longest` tokens; a batch is best of prompts that begin alike.
            left_out: how much probability the nodes that are not read may hold together, for each prompt; 0 reads them all.
            least: where all replies together turn out to hold less than this, the rest of the tree is not read.
        """
        import torch

        tree, rows = self._tree, len(prompts)
        tokens, parents, depths = (torch.tensor(values) for values in (tree.tokens, tree.parents, tree.depths))
        lengths = torch.tensor([[len(prompt)] for prompt in prompts])
        first, deepest = torch.where(depths == 1)[0], int(depths.max())
        with torch.inference_mode():
            shared, cache = self._shared(prompts)
            ids, positions, mask = _lay_out([list(prompt[shared:]) for prompt in prompts], shared)
            steps, _, cache = self._read(ids, positions, mask, cache, kept=1)
            reached = torch.full((rows, len(tree)), -torch.inf)
            ended = reached.clone()
            reached[:, first] = steps[:, 0, first]
            sees = mask[:, 0, -1:].repeat(1, len(tree) + 1, 1)  # what the prompt's last token (0) and each node (n + 1) attend to
            for depth in range(1, deepest + 1):
                level = torch.where(depths == depth)[0]
                hopeful = (reached + ended).exp().sum(1) + reached[:, level].exp().sum(1) >= least
                order, chosen = _likely(reached[:, level].where(hopeful[:, None], -torch.inf), left_out / deepest)
                count = order.shape[1]
                if not count:
                    break
                nodes = level[order]
                own = torch.cat([_rows(sees, parents[nodes] + 1), torch.eye(count, dtype=torch.bool).expand(rows, -1, -1)], dim=2)
                steps, end, cache = self._read(tokens[nodes], lengths - 1 + depth, own[:, None], cache, kept=count)
                sees = torch.cat([sees, sees.new_zeros(rows, len(tree) + 1, count)], dim=2)
                sees.scatter_(1, (nodes + 1)[:, :, None].expand_as(own), own)
                ended.scatter_(1, nodes, end.where(chosen, -torch.inf))
                for child in torch.where(depths == depth + 1)[0].tolist():
                    of_parent = chosen & (nodes == parents[child])
                    reached[:, child] = reached[:, parents[child]] + steps[:, :, child].where(of_parent, -torch.inf).amax(1)
            leaves = torch.tensor(tree.leaves)
            return reached[:, leaves] + ended[:, leaves]

    def _read(
        self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, cache: Any, kept: int
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Returns what may follow the last `kept` tokens of each row, and the cache with the tokens behind it.

        Returns:
            The log-probabilities of each node's token, [rows, kept, nodes], and of the end, [rows, kept]; the cache.
        """
        import torch

        device = self._model.device
        output = self._model(
            input_ids=ids.to(device),
            position_ids=positions.expand_as(ids).to(device),
            attention_mask=mask.to(device),
            cache=cache,
            use_cache=True,
            logits_to_keep=torch.arange(ids.shape[1] - kept, ids.shape[1], device=device),
        )
        logs = torch.log_softmax(output.logits.float(), dim=-1)
        return logs[:, :, self._tree.tokens].cpu(), torch.logsumexp(logs[:, :, self._tree.ends], dim=-1).cpu(), output.cache

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


def _likely(logs: torch.Tensor, left_out: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses the likeliest in each row, so that those not chosen hold `left_out` of probability at most.

    Returns:
        The places of the likeliest in descending order, as many as the row that needs most has chosen; and which of them are chosen.
    """
    probabilities, order = logs.exp().sort(dim=1, descending=True)
    rest = probabilities.flip(1).cumsum(1).flip(1)  # of each and of all that are less likely
    chosen = rest > left_out
    count = int(chosen.sum(1).max())
    return order[:, :count], chosen[:, :count]


def _rows(of: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Returns of[b, at[b, i]] for each b and i, shape [batch, i, ...]."""
    return of.gather(1, at[:, :, None].expand(-1, -1, of.shape[2]))


def _lay_out(prompts: list[list[int]], shared: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lays out what is left of the prompts, padded on the left.

    Returns:
        Token ids and positions of shape [prompts, width], and who attends to whom, [prompts, 1, width, shared + width].
    """
    import torch

    width, rows = max(len(prompt) for prompt in prompts), len(prompts)
    ids = torch.zeros(rows, width, dtype=torch.long)
    positions = torch.zeros_like(ids)
    mask = torch.ones(width, shared + width, dtype=torch.bool).tril(shared).repeat(rows, 1, 1, 1)
    for row, prompt in enumerate(prompts):
        pad = width - len(prompt)
        ids[row, pad:] = torch.tensor(prompt)
        positions[row, pad:] = shared + torch.arange(len(prompt))
        mask[row, 0, :, shared : shared + pad] = False
        mask[row, 0, torch.arange(pad), shared + torch.arange(pad)] = (
            True  # padding must attend to something, or it spoils the rest with NaN
        )
    return ids, positions, mask


def _slides(config: Any) -> bool:
    """Says whether some layers see only a window of the text."""
    kinds = getattr(config, "layer_types", None)
    return "sliding_attention" in kinds if kinds else bool(getattr(config, "sliding_window", None))
