"""Which tokens of a response a masked diffusion model has to guess, and with which weight.

The weights make the guesses an estimate of the ELBO. The ELBO of a response of L tokens is a sum over its
2^L - 1 patterns of masked tokens. A pattern with m of them weighs 1 / (m C(L, m)). Both samplers have these
weights in expectation: `count_masks` (LLaDA's likelihood evaluation, arXiv 2502.09992, and what diffusion RL
codes use) and `bernoulli_masks` (LLaDA's training loss).

A mask is a function of (seed, rollout, draw, place in the response). So none needs to be stored between the
old policy's pass and the new one's, and draw j alone is draw j of all n. Padding, the make-up of the batch
and the device do not change it. Everything happens on the device of the response mask. Nothing is read on the
host.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checks import as_bool, check_count, check_flags, check_index, check_number, expect

__all__ = ["MaskDraws", "bernoulli_masks", "count_masks", "quadrature_levels"]

_GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, an odd number, as int64
_NEVER = torch.iinfo(torch.int64).max


class MaskDraws(NamedTuple):
    """n draws for each response, or one of them without the dimension n.

    mask: bool [B, n, S] or [B, S], True for a token to replace by the mask id and to guess. False outside of
        the response.
    weight: float32 [B, n] or [B], the factor of the guesses' log-probabilities. 0 where a draw masks nothing.
    """

    mask: Tensor
    weight: Tensor


# --- random numbers that are functions of their indices -----------------------------------------------------


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right. The >> of int64 tensors copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's output (Steele, Lea, Flood 2014):

    a permutation of 64-bit integers that scatters neighbours.
    """
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift(x, 31)


def _hash(state: Tensor, index: Tensor | int) -> Tensor:
    """The index-th child of a state. Different indices of one state never collide."""
    return _mix(state + (index + 1) * _GOLDEN)


def _uniform(bits: Tensor) -> Tensor:
    """float64 in [0, 1)."""
    return _shift(bits, 11).to(torch.float64) * 2.0**-53


class _Stream(NamedTuple):
    """The random bits of a batch."""

    shared: Tensor  # [B, 1], of a rollout
    own: Tensor  # [B, n], of one of its draws
    tokens: Tensor  # [B, n, S], of a token of that draw


def _stream(response: Tensor, rollouts: Tensor, draws: Tensor, seed: int | Tensor) -> _Stream:
    """response bool [B, S], rollouts int64 [B], draws int64 [n]. Child 0 of a state is its own number."""
    state = _hash(_hash(rollouts.new_zeros(()) + seed, 0), rollouts).unsqueeze(1)
    children = _hash(state, 1 + draws)
    place = response.cumsum(-1).unsqueeze(1)  # 1, 2, ... in the response, wherever that stands in the row
    return _Stream(_hash(state, 0), _hash(children, 0), _hash(children.unsqueeze(-1), place))


def _spread(stream: _Stream, draws: Tensor, num_draws: int, stratified: bool) -> Tensor:
    """float64 [B, n], each uniform in [0, 1).

    Stratified: one number, moved on by 1/num_draws from draw to draw.
    """
    if not stratified:
        return _uniform(stream.own)
    # Divided by a tensor. CUDA multiplies by the reciprocal of a Python number, and a last bit decides about
    # masks.
    draws = draws.to(torch.float64)
    return (_uniform(stream.shared) + draws / draws.new_full((), num_draws)) % 1.0


class _Request(NamedTuple):
    response: Tensor  # bool [B, S]
    draws: Tensor  # int64 [n], the draws wanted
    slots: Tensor  # int64 [n]: a complementary pair shares one
    num_slots: int
    stream: _Stream


def _check_seed(seed: int | Tensor, device: torch.device) -> int | Tensor:
    """An int64, or a 0-d tensor of one."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(f"seed must be an int or one int64, got {seed.dtype} {tuple(seed.shape)}")
        if seed.device != device and seed.device.type != "cpu":
            raise ValueError(f"seed must be on the device of response_mask {device} or on the CPU, got {seed.device}")
        return seed.reshape(())
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed must be an int or a tensor of one int64, got {type(seed).__name__}")
    if not -(1 << 63) <= seed < 1 << 63:
        raise ValueError(f"seed must be an int64, got {seed}")
    return seed


def _request(response_mask, num_mc, seed, draw, rollouts, stratified, complementary) -> _Request:
    check_flags(stratified=stratified, complementary=complementary)
    expect("response_mask", response_mask, "real", "[B, S]")
    batch, device = response_mask.shape[0], response_mask.device
    check_count("num_mc", num_mc, 1)
    if complementary and num_mc % 2:
        raise ValueError(f"num_mc must be an even number with complementary=True, two draws a pair, got {num_mc}")
    if draw is not None:
        check_index("draw", draw, num_mc)
    seed = _check_seed(seed, device)
    if rollouts is None:
        rollouts = torch.arange(batch, device=device)
    expect("rollouts", rollouts, "integer", "[B], one number a row", shape=(batch,), like=("response_mask", response_mask))
    response = as_bool(response_mask)
    draws = torch.arange(num_mc, device=device) if draw is None else torch.arange(draw, draw + 1, device=device)
    slots, num_slots = (draws // 2, num_mc // 2) if complementary else (draws, num_mc)
    return _Request(response, draws, slots, num_slots, _stream(response, rollouts.long(), slots, seed))


def _result(mask: Tensor, weight: Tensor, draw: int | None) -> MaskDraws:
    weight = weight.to(torch.float32)
    return MaskDraws(mask, weight) if draw is None else MaskDraws(mask.squeeze(1), weight.squeeze(1))


@torch.no_grad()
def count_masks(
    response_mask: Tensor,
    num_mc: int,
    *,
    seed: int | Tensor,
    draw: int | None = None,
    rollouts: Tensor | None = None,
    stratified: bool = True,
    complementary: bool = False,
) -> MaskDraws:
    """Exactly m tokens masked, m uniform in 1 ... L, any m of them alike; weight L / m.

    A draw is never empty and no weight is above L, so this sampler has less variance than the other.
    Stratified, the num_mc values of m of a response are spread evenly: m_j = floor((u + j L / num_mc) mod L)
    + 1 with one u uniform in [0, L). Each is still exactly uniform. (The formula that LLaDA and its
    descendants use, with torch.round, favours even m.)

    Complementary: of the draws 2i and 2i + 1 each masks what the other leaves, so every token is guessed
    once. m is then uniform in 0 ... L. The weights are (L + 1) / m and (L + 1) / (L - m), for the mean of all
    draws to be unbiased. One draw of a pair may be empty. This is ESPO's scheme.

    Args:
        response_mask: [B, S] bool or number, nonzero for the tokens of the response. Prompt and padding are
            never masked. L may differ from row to row.
        num_mc: n, draws a response; even for complementary ones.
        seed: int, or an int64 tensor of one element. torch.randint with a generator makes one without a sync.
        draw: j returns draw j alone, without the dimension n; None returns all.
        rollouts: int64 [B], the number of each row among all rollouts; None counts the rows. Give it where a
            batch is split. Two processes would draw the same masks without it.
        stratified: False draws every m by itself.

    Returns:
        MaskDraws(mask, weight). A row without response has no mask and weight 0.

    Raises:
        TypeError, ValueError, IndexError: for dtypes, shapes, devices and numbers other than the above.
    """
    r = _request(response_mask, num_mc, seed, draw, rollouts, stratified, complementary)
    lengths = r.response.sum(-1, keepdim=True)
    u = _spread(r.stream, r.slots, r.num_slots, stratified)
    choices = lengths + 1 if complementary else lengths
    count = torch.minimum((u * choices).long(), (choices - 1).clamp(min=0))  # the product may round up
    if not complementary:
        count = torch.minimum(count + 1, lengths)
    keys = torch.where(r.response.unsqueeze(1), r.stream.tokens, _NEVER)
    if keys.shape[-1] > 0:
        last = keys.sort(-1).values.gather(-1, (count - 1).clamp(min=0).unsqueeze(-1))
        keys = keys <= last
    mask = keys.bool() & r.response.unsqueeze(1) & (count > 0).unsqueeze(-1)
    if complementary:
        odd = r.draws % 2 == 1
        mask = (mask ^ odd.unsqueeze(-1)) & r.response.unsqueeze(1)
        count = torch.where(odd, lengths - count, count)
    return _result(mask, torch.where(count > 0, choices.to(torch.float64) / count.clamp(min=1), 0), draw)


@torch.no_grad()
def bernoulli_masks(
    response_mask: Tensor,
    num_mc: int,
    *,
    seed: int | Tensor,
    draw: int | None = None,
    rollouts: Tensor | None = None,
    stratified: bool = True,
    complementary: bool = False,
    low: float = 1e-3,
    high: float = 1.0,
    p: float | Tensor | None = None,
) -> MaskDraws:
    """Every token masked by itself with probability p, p uniform in [low, high); weight 1 / p.

    low = 0, high = 1 gives the ELBO without bias, but with unbounded weights. LLaDA trains with low = 1e-3. A
    draw may mask nothing. Keep it in the mean: its estimate of 0 is part of the expectation.

    Complementary: of the draws 2i and 2i + 1 each masks what the other leaves. The second has weight 1 / (1 -
    p). Needs high < 1. coupled-GRPO: low = 0.2, high = 0.8.

    Args:
        response_mask, num_mc, seed, draw, rollouts: as in `count_masks`.
        stratified: spreads the num_mc values of p evenly over the interval; False draws every one by itself.
        low, high: 0 <= low < high <= 1.
        p: replaces the drawn levels: a number in (0, 1], or a float tensor of such that broadcasts to [B,
            num_mc] ([B, num_mc / 2] for pairs). A constant for diffu-GRPO's prompts (0.15),
            `quadrature_levels` for GDPO.

    Returns:
        MaskDraws(mask, weight).

    Raises:
        TypeError, ValueError, IndexError: for dtypes, shapes, devices and numbers other than the above.
    """
    check_flags(complementary=complementary)
    check_number("low", low, 0, 1)
    check_number("high", high, 0, 1)
    if low >= high:
        raise ValueError(f"low must be below high, got {low} and {high}")
    if complementary and p is None and high == 1:
        raise ValueError("complementary masks weigh 1 / (1 - p): give high below 1, got 1")
    r = _request(response_mask, num_mc, seed, draw, rollouts, stratified, complementary)
    if p is None:
        p = low + (high - low) * _spread(r.stream, r.slots, r.num_slots, stratified)
    else:
        p = _levels(p, r)
    mask = (_uniform(r.stream.tokens) < p.unsqueeze(-1)) & r.response.unsqueeze(1)
    if complementary:
        odd = r.draws % 2 == 1
        mask = (mask ^ odd.unsqueeze(-1)) & r.response.unsqueeze(1)
        p = torch.where(odd, 1 - p, p)
    return _result(mask, torch.where(mask.any(-1), 1 / p, 0), draw)


def _levels(p: float | Tensor, r: _Request) -> Tensor:
    """The caller's levels as float64 [B, n]."""
    shape = (r.response.shape[0], r.num_slots)
    if not isinstance(p, Tensor):
        check_number("p", p, 0, 1)
        if p == 0:
            raise ValueError("p must be above 0: the weight is 1 / p")
        p = r.response.new_full((), p, dtype=torch.float64)
    elif not p.dtype.is_floating_point:
        raise TypeError(f"p must be a number or a float tensor, got {p.dtype}")
    if p.device != r.response.device:
        raise ValueError(f"p must be on the device of response_mask {r.response.device}, got {p.device}")
    try:
        p = p.detach().to(torch.float64).expand(shape)
    except RuntimeError:
        raise ValueError(f"p must broadcast to {shape}, one level a draw (or a pair), got {tuple(p.shape)}") from None
    return p.index_select(1, r.slots)


def quadrature_levels(n: int, *, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """(p, mc_weight), each float64 [n]: the Gauss-Legendre rule on (0, 1).

    It is exact for polynomials in p of degree below 2n. GDPO takes p as the levels of `bernoulli_masks` and
    mc_weight, whose sum is 1, in place of 1 / n, n = 2 or 3. The ELBO's integrand is a smooth polynomial of
    degree L - 1 in p.

    Raises:
        TypeError, ValueError: for n that is no integer or below 1, and for what is no device.
    """
    check_count("n", n, 1)
    try:
        device = torch.empty(0, device=device).device
    except Exception as error:  # whatever this PyTorch has against it
        raise ValueError(f"device must be one that this PyTorch has, got {device!r}: {error}") from None
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return torch.from_numpy((nodes + 1) / 2).to(device), torch.from_numpy(weights / 2).to(device)
