"""TRL's fused LM head on rlkern's kernels: log-probabilities from hidden states, never with all the logits.

Tiles of logits, [tokens, vocabulary], are projected one after the other into one buffer. `token_stats` reads
each. What the tiles of one token say is merged: with w_r the mass of tile r, log p = log p_r + log w_r and
H = sum w_r (H_r - log w_r). The backward projects each tile again and writes its gradient over it.

`rlkern.linear_token_stats` lacks what TRL's callers need: softcaps and scales of the logits, a mean logit and
the first choice, a weight that ZeRO-3 has taken away by the time of the backward, and tiles that also cut the
vocabulary, as long as TRL's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...checks import computing_dtype
from ...operator import values_readable
from ...primitives.projection import MM_INTO_FLOAT32
from ...primitives.token_stats import token_stats

_TILE_BYTES = 1 << 28  # TRL's own tile, 4096 x 32768 in bfloat16
_OPTIONAL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class _Head:
    """One call's projection in tiles, and what lies between it and the softmax, with its gradient."""

    def __init__(self, hidden, weight, bias, targets, dtype, temperature, chunk_size, softcap, scale) -> None:
        self.hidden, self.weight, self.bias, self.targets, self.dtype = hidden, weight, bias, targets, dtype
        self.softcap, self.scale = softcap, scale
        # z = scale * x / temperature: a positive scale needs no pass of its own
        self.folded = softcap is None and scale > 0
        self.temperature = temperature / scale if self.folded else temperature
        self.columns = min(chunk_size, len(weight))
        self.tokens = max(1, min(len(hidden), _TILE_BYTES // (self.columns * torch.empty(0, dtype=dtype).element_size())))
        self.buffer = hidden.new_empty((self.tokens, self.columns), dtype=dtype)

    def token_ranges(self) -> Iterator[slice]:
        for start in range(0, len(self.hidden), self.tokens):
            yield slice(start, min(start + self.tokens, len(self.hidden)))

    def column_ranges(self) -> Iterator[slice]:
        for start in range(0, len(self.weight), self.columns):
            yield slice(start, min(start + self.columns, len(self.weight)))

    def project(self, tokens: slice, columns: slice) -> Tensor:
        tile = self.buffer[: tokens.stop - tokens.start, : columns.stop - columns.start].detach()
        torch.mm(self.hidden[tokens].to(self.dtype), self.weight[columns].to(self.dtype).t(), out=tile)
        return tile if self.bias is None else tile.add_(self.bias[columns].to(self.dtype))

    def transform(self, tile: Tensor) -> Tensor:
        """The logits as the softmax sees them, before the temperature."""
        if self.folded:
            return tile
        z = tile.to(computing_dtype(tile)) * self.scale
        return z if self.softcap is None else (z / self.softcap).tanh_().mul_(self.softcap)

    def transform_backward(self, z: Tensor | None, d_z: Tensor) -> Tensor:
        if self.folded:
            return d_z
        if self.softcap is not None:
            d_z = d_z * (1 - (z / self.softcap).square_())
        return (d_z * self.scale).to(self.dtype)

    def local(self, tokens: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """The targets counted from the tile's first column, 0 outside of it, and whether they are inside."""
        targets = self.targets[tokens] - columns.start
        inside = (targets >= 0) & (targets < columns.stop - columns.start)
        return torch.where(inside, targets, 0), inside


class FusedLMHead(torch.autograd.Function):
    """(log p, entropy, log sum p^2, mean logit, is_top1), each [N]. All but log p only if among `outputs`.

    hidden [N, H], weight [V, H], bias [V] or None, targets [N]. With x = hidden @ weight.T + bias, logits are
    softcap * tanh(scale * x / softcap) / temperature; without a softcap scale * x / temperature. The first
    two carry gradients to hidden, weight and bias.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, chunk_size, softcap=None, scale=1.0, outputs=_OPTIONAL):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        ctx.set_materialize_grads(False)
        ctx.dtype, ctx.options = dtype, (temperature, chunk_size, softcap, scale)
        if values_readable(targets):
            _check_targets(targets, len(weight))
        head = _Head(hidden, weight, bias, targets, dtype, *ctx.options)
        merged = [_token_block(head, tokens, outputs) for tokens in head.token_ranges()] or [_token_block(head, slice(0, 0), outputs)]
        log_mass, tile_entropy, *results = (None if parts[0] is None else torch.cat(parts, -1) for parts in zip(*merged, strict=True))
        ctx.save_for_backward(hidden, weight, bias, targets, log_mass, tile_entropy, results[1])
        entropy = results[1].clone() if "entropy" in outputs else None  # the caller may write into it
        ctx.mark_non_differentiable(*(x for x in results[2:] if x is not None))
        return results[0], entropy, *results[2:]

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logp, g_entropy, *_):
        from trl.trainer.utils import maybe_gather_lm_head_ctx  # ZeRO-3 has the weight in shards by now

        hidden, weight, bias, targets, *merged = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        with maybe_gather_lm_head_ctx(weight, bias):
            sums = [
                torch.zeros(x.shape, dtype=computing_dtype(x), device=x.device) if need else None
                for x, need in zip((hidden, weight, bias), needs, strict=True)
            ]
            if len(hidden) and (g_logp is not None or g_entropy is not None):
                head = _Head(hidden, weight, bias, targets, ctx.dtype, *ctx.options)
                for tokens in head.token_ranges():
                    for r, columns in enumerate(head.column_ranges()):
                        _tile_backward(head, tokens, columns, r, merged, g_logp, g_entropy, *sums)
            grads = (None if total is None else total.to(x.dtype) for x, total in zip((hidden, weight, bias), sums, strict=True))
            return *grads, None, None, None, None, None, None


def _check_targets(targets: Tensor, vocab: int) -> None:
    if targets.numel() and not (0 <= targets.amin() and targets.amax() < vocab):
        raise IndexError(f"targets must be token ids in [0, {vocab}), got {targets.amin().item()} to {targets.amax().item()}")


def _token_block(head: _Head, tokens: slice, outputs: tuple[str, ...]) -> tuple[Tensor | None, ...]:
    """For these tokens: log mass and entropy of each tile [R, n], then the five outputs [n]."""
    lse, entropies, sum_sq = [], [], []
    logp: Any = 0
    total: Any = 0
    top: tuple[Tensor, Tensor] | None = None
    for columns in head.column_ranges():
        z = head.transform(head.project(tokens, columns))
        local, inside = head.local(tokens, columns)
        stats = token_stats(z, local, temperature=head.temperature, with_sum_sq="log_sum_sq_probs" in outputs)
        lse.append(stats.logsumexp)
        entropies.append(stats.entropy)
        sum_sq.append(stats.sum_sq_prob)
        logp = torch.where(inside, stats.logp, logp)
        if "mean_logits" in outputs:
            total = total + z.sum(-1, dtype=stats.logp.dtype)
        if "is_top1" in outputs and len(local):
            # the first of several largest logits wins, as in argmax
            largest, where = z.max(-1)
            hit = inside & (where == local)
            top = (largest, hit) if top is None else (torch.maximum(top[0], largest), torch.where(largest > top[0], hit, top[1]))
    log_mass = torch.log_softmax(torch.stack(lse), 0)
    mass = log_mass.exp()
    inside = torch.stack([head.local(tokens, columns)[1] for columns in head.column_ranges()])
    entropy = torch.stack(entropies)
    h = torch.where(mass > 0, mass * (entropy - log_mass), 0).sum(0)
    logp = logp + torch.where(inside, log_mass, 0).sum(0)
    log_sum_sq = None
    if "log_sum_sq_probs" in outputs:
        log_sum_sq = torch.where(mass > 0, mass.square() * torch.stack(sum_sq), 0).sum(0).log()
    mean = total / (len(head.weight) * head.temperature) if "mean_logits" in outputs else None
    is_top1 = (logp.new_zeros(0, dtype=torch.bool) if top is None else top[1]) if "is_top1" in outputs else None
    return log_mass, entropy, logp, h, log_sum_sq, mean, is_top1


def _tile_backward(head, tokens, columns, r, merged, g_logp, g_entropy, d_hidden, d_weight, d_bias) -> None:
    """Adds this tile's part to the gradients."""
    log_mass, tile_entropy, entropy = merged[0][r, tokens], merged[1][r, tokens], merged[2][tokens]
    local, inside = head.local(tokens, columns)
    mass = log_mass.exp()
    to_logp = to_entropy = None
    to_lse = torch.zeros_like(mass)  # of the tile: its mass against the others'
    if g_logp is not None:
        g = g_logp[tokens].to(mass.dtype)
        to_logp = g * inside
        to_lse += g * (inside.to(mass.dtype) - mass)
    if g_entropy is not None:
        g = g_entropy[tokens].to(mass.dtype)
        to_entropy = g * mass
        to_lse += torch.where(mass > 0, g * mass * (tile_entropy - log_mass - entropy), 0)
    z = head.transform(head.project(tokens, columns)).requires_grad_()
    with torch.enable_grad():
        stats = token_stats(z, local, temperature=head.temperature, inplace_backward=head.softcap is None)
        upstream = (to_logp, to_entropy, to_lse if len(merged[0]) > 1 else None)
        pairs = [(out, g) for out, g in zip(stats[:3], upstream, strict=True) if out is not None and g is not None]
        (d_z,) = torch.autograd.grad([out for out, _ in pairs], z, [g for _, g in pairs])
    d_tile = head.transform_backward(z.detach(), d_z)
    if d_hidden is not None:
        _add_product(d_hidden[tokens], d_tile, head.weight[columns].to(head.dtype), len(merged[0]) == 1)
    if d_weight is not None:
        _add_product(d_weight[columns], d_tile.t(), head.hidden[tokens].to(head.dtype), head.tokens >= len(head.hidden))
    if d_bias is not None:
        d_bias[columns] += d_tile.sum(0, dtype=d_bias.dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor, alone: bool) -> None:
    """total += a @ b; total = a @ b if that is alone.

    Products are not rounded to a's dtype, only their sum, later: the rounding of many adds up to a bias.
    """
    if alone:
        total.copy_(a @ b)
    elif a.dtype != total.dtype and a.is_cuda and MM_INTO_FLOAT32:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


class LogpAndEntropy(FusedLMHead):
    """The fused head as TRL 1.14 calls it: two results, and no argument that chooses them."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, chunk_size, softcap=None, scale=1.0):
        return FusedLMHead.forward(ctx, hidden, weight, bias, targets, temperature, chunk_size, softcap, scale, ("entropy",))[:2]

    @staticmethod
    def backward(ctx, g_logp, g_entropy):
        return FusedLMHead.backward(ctx, g_logp, g_entropy)[:-1]
