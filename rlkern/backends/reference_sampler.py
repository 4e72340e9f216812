"""What a sampler's rules keep, in plain PyTorch: by sorting."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..layout import row_chunks
from .contract import mass_bits


def sampler_threshold(logits, mask, temperature, top_k, top_p, log_min_p, joint, out) -> None:
    vocab, thresholds = logits.shape[-1], out.view(-1)
    rank = torch.arange(vocab, device=logits.device)
    for a, rows, flat in row_chunks(logits):
        x = logits[a, rows].sort(-1, descending=True).values.double()  # NaN comes first
        t = temperature[flat].double().unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
        m = x[:, :1]
        finite = (x > -math.inf).sum(-1, keepdim=True)
        kept = torch.minimum(finite, (x >= m + log_min_p * t).sum(-1, keepdim=True))  # that many of the largest
        if top_k > 0:
            last = x.gather(-1, (finite.clamp(1, top_k)) - 1)
            kept = torch.minimum(kept, (x >= last).sum(-1, keepdim=True))
        if top_p < 1:
            masses = (((x - m) / t).exp() * 2.0 ** mass_bits(vocab)).round().long()
            masses = masses if joint else masses.masked_fill(rank >= kept, 0)
            total = masses.cumsum(-1)
            limit = (top_p * total[:, -1:].double()).ceil().long().clamp(min=1).minimum(total[:, -1:])
            kept = torch.minimum(kept, (total - masses < limit).sum(-1, keepdim=True))
        least = torch.where(m.isfinite(), x.gather(-1, kept.clamp(min=1) - 1), math.nan)
        if isinstance(t, Tensor):
            least = torch.where(t > 0, least, math.nan)
        thresholds[flat] = least.squeeze(-1).to(out.dtype)
    if mask is not None:
        thresholds.masked_fill_(~mask, -math.inf)
