"""A policy with an output matrix of its own: whole in one process, or cut over the ranks of a group."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import rlkern

from .model import Transformer


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[ranks, *x.shape], x of every rank."""
    out = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(out, x.contiguous(), group=group)
    return torch.stack(out)


class Policy(nn.Module):
    """A transformer and an output matrix [V, width], in one process and in plain PyTorch."""

    def __init__(self, vocab: int, length: int, width: int, depth: int):
        super().__init__()
        self.vocab, self.body = vocab, Transformer(vocab, length, width, depth)
        self.weight = nn.Parameter(0.02 * torch.randn(vocab, width))

    def stats(self, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(logp, entropy) of the last `count` tokens of ids [N, T], each [N, count]."""
        log_p = F.linear(self.body.hidden(ids[:, :-1])[:, -count:], self.weight).log_softmax(-1)
        return log_p.gather(-1, ids[:, -count:].unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


class ShardedPolicy(nn.Module):
    """The same policy with the rows of its output matrix cut over the ranks; the rest is on every rank.

    As in Megatron-LM each rank has as many rows, so the last ones hold padding. NaN stands there: nothing may
    read it.
    """

    def __init__(self, whole: Policy, group: dist.ProcessGroup):
        super().__init__()
        self.vocab, self.body, self.group = whole.vocab, whole.body, group
        columns = -(-whole.vocab // dist.get_world_size(group))
        self.start, self.end = rlkern.parallel.vocab_range(columns, group)
        rows = whole.weight.detach()[self.start : self.end]
        self.weight = nn.Parameter(F.pad(rows, (0, 0, 0, columns - len(rows)), value=math.nan))

    def stats(self, ids: Tensor, count: int) -> rlkern.TokenStats:
        """Log-probability and entropy of the last `count` tokens of ids [N, T], the same on every rank."""
        hidden = self.body.hidden(ids[:, :-1])[:, -count:]
        return rlkern.linear_token_stats(hidden, self.weight, ids[:, -count:], group=self.group, vocab_size=self.vocab)

    @torch.no_grad()
    def sample(self, prompts: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """Continues every prompt by `count` tokens: [N, P] -> [N, P + count]. No rank has a row of logits.

        The argmax of logits + Gumbel noise is a draw from their softmax. Each rank finds its own, and the
        ranks exchange two numbers a row. The noise is drawn for the whole vocabulary on every rank, so any
        number of ranks draws the same tokens.
        """
        ids, real = prompts, max(min(self.end, self.vocab) - self.start, 0)
        for _ in range(count):
            logits = F.linear(self.body.hidden(ids)[:, -1], self.weight[:real])
            noise = torch.empty(len(ids), self.vocab, dtype=logits.dtype).exponential_(generator=generator)
            value, own = (logits - noise[:, self.start : self.start + real].log()).max(-1)
            best = gathered(torch.stack([value, (own + self.start).to(value.dtype)]), self.group)  # [ranks, 2, N]
            winner = best[:, 0].argmax(0)
            ids = torch.cat([ids, best[:, 1].gather(0, winner.unsqueeze(0)).long().T], -1)
        return ids

    def whole(self, of: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """`of` each parameter in the order of `Policy.parameters()`, the output matrix's from all ranks."""
        of_weight = gathered(of(self.weight), self.group).flatten(0, 1)[: self.vocab]
        return [of_weight, *map(of, self.body.parameters())]
