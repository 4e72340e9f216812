"""An engine that samples with top-p and returns, as engines do, the sets that it drew from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class SamplingMask(NamedTuple):
    """As vLLM gives it for an answer: token j was drawn from token_ids[offsets[j] : offsets[j + 1]]."""

    token_ids: Tensor
    offsets: Tensor


class Completion(NamedTuple):
    token_ids: Tensor  # [K]
    logprobs: Tensor  # [K], of the distribution that the token was drawn from
    sampling_mask: SamplingMask


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """[B, V] bool: the likeliest tokens, until they hold top_p."""
    p, order = logits.float().softmax(-1).sort(-1, descending=True)
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, p.cumsum(-1) - p < top_p)


@torch.no_grad()
def generate(engine: nn.Module, prompts: Tensor, count: int, *, top_p: float, temperature: float, generator: torch.Generator) -> list[Completion]:
    """`count` tokens after every prompt [B, P]."""
    ids, logps, sets = prompts, [], []
    for _ in range(count):
        logits = engine(ids)[:, -1].float() / temperature
        kept = nucleus(logits, top_p)
        logp = logits.masked_fill(~kept, -torch.inf).log_softmax(-1)
        token = torch.multinomial(logp.exp(), 1, generator=generator)
        ids = torch.cat([ids, token], -1)
        logps.append(logp.gather(-1, token))
        sets.append(kept)
    logps, kept = torch.cat(logps, -1), torch.stack(sets, 1)  # [B, K], [B, K, V]
    ends = torch.nn.functional.pad(kept.sum(-1).cumsum(-1), (1, 0))
    return [Completion(ids[i, prompts.shape[1] :], logps[i], SamplingMask(kept[i].nonzero()[:, 1].int(), ends[i])) for i in range(len(prompts))]
