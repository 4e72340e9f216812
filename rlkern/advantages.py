"""Advantage estimators: from rewards to what the policy losses multiply with. Small functions on [B] or [B, T], without a gradient.

`groups` says which responses answer the same prompt: an int G when every G neighbours do (B divisible by G), or an integer tensor [B] of any
ids. Rewards may be any real dtype; a NaN reward means "not scored": it takes no part in any mean and its advantage is 0. Results are float32
(float64 for float64 rewards), sums run in float64, and nothing is read on the host.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import FINITE, check_choice, check_count, check_flags, check_number, check_positive

__all__ = [
    "TokenAdvantages",
    "combine_rewards",
    "dr_grpo",
    "gae",
    "gdpo",
    "gpg",
    "grpo",
    "lite_ppo",
    "opo",
    "otb",
    "overlong_penalty",
    "pass_at_k",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "remax",
    "rloo",
    "whiten",
]


class TokenAdvantages(NamedTuple):
    """Both [B, T], 0 where masked. `returns` is what a critic is trained on."""

    advantages: Tensor
    returns: Tensor


# --- input -----------------------------------------------------------------------------------------------------------------------------------


def _real(name: str, x: Tensor, layout: str, *, of: tuple[str, Tensor] | None = None, dims: slice = slice(None)) -> Tensor:
    """float64 and detached. `of` is the name and tensor whose dimensions `dims` are the shape that is asked for, and whose device."""
    if not isinstance(x, Tensor) or x.dtype.is_complex:
        raise TypeError(f"{name} must be a real tensor {layout}, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    if of is None:
        if x.dim() != layout.count(",") + 1:
            raise ValueError(f"{name} must be {layout}, got shape {tuple(x.shape)}")
        return x.detach().double()
    other, like = of
    if x.shape != like.shape[dims]:
        raise ValueError(f"{name} must be {layout} with shape {tuple(like.shape[dims])} as {other} has it, got {tuple(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on the device of {other} {like.device}, got {x.device}")
    return x.detach().double()


def _kept(mask: Tensor, of: tuple[str, Tensor] | None = None) -> Tensor:
    return _real("mask", mask, "[B, T]", of=of) != 0


def _like(result: Tensor, rewards: Tensor) -> Tensor:
    return result.to(torch.float64 if rewards.dtype == torch.float64 else torch.float32)


class Groups:
    """Statistics over the members of a group, handed back to each member: [B, ...] -> [B, ...]."""

    def __init__(self, groups: int | Tensor, like: Tensor, scored: Tensor | None = None, name: str = "rewards"):
        n = like.shape[0]
        if isinstance(groups, bool) or not isinstance(groups, (int, Tensor)):
            raise TypeError(f"groups must be the size of a group or an integer tensor of ids [B], got {type(groups).__name__}")
        if isinstance(groups, int):
            check_count("groups", groups, 1)
            if n % groups:
                raise ValueError(f"groups is the size of every group of {name}: {n} responses cannot be divided into groups of {groups}")
            self.order = None  # of a group they stand together already
            rank = self.index = torch.arange(n, device=like.device) // groups
        else:
            if groups.dtype.is_floating_point or groups.dtype.is_complex:
                raise TypeError(f"groups must hold integer ids, got {groups.dtype}")
            if groups.shape != (n,):
                raise ValueError(f"groups must be [B] with shape {(n,)}, one id for each of the {name}, got {tuple(groups.shape)}")
            if groups.device != like.device:
                raise ValueError(f"groups must be on the device of the {name} {like.device}, got {groups.device}")
            # Ids become 0, 1, ... in sorted order; torch.unique would wait for the device.
            ids, self.order = groups.long().sort(dim=0, stable=True)
            rank = (torch.cat([ids[:1], ids]).diff() != 0).long().cumsum(0)
            self.index = torch.empty_like(rank).scatter_(0, self.order, rank)
        # There are no more groups than members; those that there are not are empty.
        self.offsets = torch.searchsorted(rank, torch.arange(n + 1, device=like.device))
        self.scored = torch.ones(n, dtype=torch.bool, device=like.device) if scored is None else scored
        self.size = self.total(torch.ones(n, dtype=torch.float64, device=like.device))

    def _reduce(self, x: Tensor, how: str, neutral: float) -> Tensor:
        """Always in the same order: index_add_ adds in any order on a GPU."""
        x = torch.where(self.scored.view(-1, *(1,) * (x.dim() - 1)), x, neutral)
        x = x if self.order is None else x[self.order]
        # `unsafe` leaves out checks that wait for the device.
        return torch.segment_reduce(x, how, offsets=self.offsets, unsafe=True, initial=neutral)[self.index]

    def total(self, x: Tensor) -> Tensor:
        return self._reduce(x, "sum", 0.0)

    def mean(self, x: Tensor) -> Tensor:
        return self.total(x) / self.size.clamp(min=1)

    def largest(self, x: Tensor) -> Tensor:
        return self._reduce(x, "max", -math.inf)

    def centred(self, x: Tensor) -> Tensor:
        """x minus its mean, exactly 0 where all members are equal."""
        shifted = x - self.largest(x)
        return shifted - self.mean(shifted)

    def std(self, x: Tensor) -> Tensor:
        """Unbiased; 0 for a group of one."""
        return (self.total(self.centred(x).square()) / (self.size - 1).clamp(min=1)).sqrt()

    def unique_best(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(whether this member alone is the largest, the largest of the others); for a group of one the second is -inf."""
        best = self.scored & (x == self.largest(x))
        alone = best & (self.total(best.double()) == 1)
        return alone, self.largest(torch.where(alone, -math.inf, x))


def _outcome(rewards: Tensor, groups: int | Tensor) -> tuple[Tensor, Groups]:
    r = _real("rewards", rewards, "[B]")
    return r, Groups(groups, r, ~r.isnan())


def _finish(advantages: Tensor, rewards: Tensor, scored: Tensor) -> Tensor:
    return _like(torch.where(scored, advantages, 0), rewards)


# --- one reward a response: [B] -> [B] -------------------------------------------------------------------------------------------------------


def grpo(rewards: Tensor, groups: int | Tensor, *, scale: str = "group", eps: float = 1e-6, singletons: str = "reward") -> Tensor:
    """(r - mean of its group) / (std + eps), GRPO (arXiv 2402.03300). Standard deviations are unbiased.

    Args:
        rewards: [B].
        groups: see the module.
        scale: "group" divides by the std of the group, "batch" by that of all raw rewards, "none" does not divide (TRL's scale_rewards).
        eps: 1e-6 in verl, 1e-4 in TRL.
        singletons: a group with one scored response: "reward" leaves mean 0 and group std 1 (verl), "zero" makes the advantage 0 (TRL).
    """
    check_choice("scale", scale, ("group", "batch", "none"))
    check_choice("singletons", singletons, ("reward", "zero"))
    check_number("eps", eps, 0, FINITE)
    r, g = _outcome(rewards, groups)
    keeps_reward = (g.size == 1) & (singletons == "reward")
    a = torch.where(keeps_reward, r, g.centred(r))
    if scale == "group":
        a = a / (torch.where(keeps_reward, 1, g.std(r)) + eps)
    elif scale == "batch":
        a = a / (Groups(max(len(r), 1), r, g.scored).std(r) + eps)
    return _finish(a, rewards, g.scored)


def dr_grpo(rewards: Tensor, groups: int | Tensor) -> Tensor:
    """r - mean of its group (Dr.GRPO, arXiv 2503.20783): `grpo` with scale="none"."""
    return grpo(rewards, groups, scale="none")


def lite_ppo(rewards: Tensor, groups: int | Tensor, *, eps: float = 1e-6) -> Tensor:
    """(r - mean of its group) / (std of all raw rewards of the batch + eps), Lite PPO (arXiv 2508.08221): `grpo` with scale="batch".

    The rest of the recipe: `ppo_loss` with clip 0.2, aggregation="token-mean", no KL. ROLL's `div_std_global` divides by the std of the
    group-centred rewards instead, which is smaller.
    """
    return grpo(rewards, groups, scale="batch", eps=eps, singletons="zero")


def rloo(rewards: Tensor, groups: int | Tensor) -> Tensor:
    """r minus the mean of the *other* responses, n/(n-1) (r - mean) (RLOO, arXiv 2402.14740). A group of one keeps its reward."""
    r, g = _outcome(rewards, groups)
    a = torch.where(g.size == 1, r, g.centred(r) * g.size / (g.size - 1).clamp(min=1))
    return _finish(a, rewards, g.scored)


def opo(rewards: Tensor, lengths: Tensor, groups: int | Tensor) -> Tensor:
    """r - sum(length r) / sum(length) over its group (OPO, arXiv 2505.23585). `lengths` [B]. A group of one keeps its reward."""
    r, g = _outcome(rewards, groups)
    lengths = _real("lengths", lengths, "[B]", of=("rewards", r))
    best = g.largest(r)
    total = g.total(lengths)
    shifted = r - best
    a = shifted - g.total(lengths * shifted) / torch.where(total == 0, 1, total)
    return _finish(torch.where(g.size == 1, r, a), rewards, g.scored)


def gpg(rewards: Tensor, groups: int | Tensor, *, f_norm: float = 1.0) -> Tensor:
    """B / #{r != 0} (r - mean of its group) / f_norm (GPG, arXiv 2504.02546, as verl has it). A group of one keeps its reward."""
    check_positive("f_norm", f_norm, FINITE)
    r, g = _outcome(rewards, groups)
    alpha = len(r) / (g.scored & (r != 0)).sum().clamp(min=1).double()
    a = alpha * torch.where(g.size == 1, r, g.centred(r)) / f_norm
    return _finish(a, rewards, g.scored)


def pass_at_k(rewards: Tensor, groups: int | Tensor, *, scale_by_std: bool = True, eps: float = 1e-6) -> Tensor:
    """Only the best response of a group counts, by its lead over the second: (max - second) / (std + eps) (arXiv 2503.19595, as verl has it).

    All zero where the best is not alone, and for a group of one (verl refuses these).
    """
    check_flags(scale_by_std=scale_by_std)
    check_number("eps", eps, 0, FINITE)
    r, g = _outcome(rewards, groups)
    alone, second = g.unique_best(r)
    a = torch.where(alone & (g.size > 1), r - second, 0)
    return _finish(a / (g.std(r) + eps) if scale_by_std else a, rewards, g.scored)


def combine_rewards(rewards: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weighted sum of several rewards, [B, K] and [K] (default: ones) -> [B]. NaN entries are left out; NaN where all are (TRL)."""
    r = _real("rewards", rewards, "[B, K]")
    w = torch.ones_like(r[:1]).squeeze(0) if weights is None else _real("weights", weights, "[K]", of=("rewards", r), dims=slice(1, None))
    return _like(torch.where(r.isnan().all(-1), math.nan, (r * w).nansum(-1)), rewards)


def gdpo(rewards: Tensor, groups: int | Tensor, weights: Tensor | None = None, *, eps: float = 1e-4) -> Tensor:
    """GDPO, TRL's "normalize_then_sum": each reward is normalised in its group, then summed with its weight, then normalised over the batch.

    rewards [B, K], weights [K] -> [B]. TRL's "sum_then_normalize" is `grpo(combine_rewards(rewards, weights), groups, eps=1e-4)`.
    """
    r = _real("rewards", rewards, "[B, K]")
    each = [grpo(column, groups, eps=eps, singletons="zero").where(~column.isnan(), math.nan) for column in r.unbind(-1)]
    total = combine_rewards(torch.stack(each, -1) if each else r, weights)
    return _like(grpo(total, max(len(total), 1), eps=eps, singletons="zero"), rewards)


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int, *, factor: float = 1.0) -> Tensor:
    """What DAPO (arXiv 2503.14476) adds to the reward of long responses: 0 up to max_length - buffer, falling to -factor at max_length.

    lengths [B] -> [B] float32, in [-factor, 0].
    """
    check_number("max_length", max_length, 0, FINITE)
    check_number("buffer", buffer)
    if not 0 < buffer <= max_length:
        raise ValueError(f"buffer must be in (0, max_length = {max_length}], got {buffer}")
    check_number("factor", factor, 0, FINITE)
    excess = _real("lengths", lengths, "[B]") - (max_length - buffer)
    return (-factor * (excess / buffer).clamp(0, 1)).float()


# --- rewards per token: [B, T] -> [B, T] -----------------------------------------------------------------------------------------------------


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the masked tokens of the whole batch, 0 elsewhere. The variance is unbiased.

    shift_mean=False adds the mean back. [B, T] -> [B, T].
    """
    check_flags(shift_mean=shift_mean)
    check_number("eps", eps, 0, FINITE)
    x = _real("values", values, "[B, T]")
    kept = _kept(mask, ("values", x))
    count = kept.sum()
    mean = torch.where(kept, x, 0).sum() / count.clamp(min=1)
    centred = torch.where(kept, x - mean, 0)
    scaled = centred * (centred.square().sum() / (count - 1).clamp(min=1) + eps).rsqrt()
    return _like(scaled if shift_mean else torch.where(kept, scaled + mean, 0), values)


def _running_sum(x: Tensor) -> Tensor:
    """cumsum(-1) of [B, T], always in the same order, which that of a GPU is not."""
    step = 1
    while step < x.shape[-1]:
        x = torch.cat([x[:, :step], x[:, step:] + x[:, :-step]], -1)
        step *= 2
    return x


def _reward_to_go(rewards: Tensor) -> Tensor:
    return _running_sum(rewards.flip(-1)).flip(-1)


def _tokens(token_rewards: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    r = _real("token_rewards", token_rewards, "[B, T]")
    kept = _kept(mask, ("token_rewards", r))
    return torch.where(kept, r, 0), kept


def reinforce_plus_plus(token_rewards: Tensor, mask: Tensor, *, gamma: float = 1.0) -> TokenAdvantages:
    """Discounted returns, whitened over the batch (REINFORCE++, arXiv 2501.03262). Masked tokens, such as a tool's output, are stepped over:
    what comes behind them counts for what stands before them (as in verl 0.9.1; its 0.8 began anew there)."""
    check_number("gamma", gamma, 0, 1)
    r, kept = _tokens(token_rewards, mask)
    running, columns = torch.zeros_like(r[:, 0]) if r.shape[1] else None, []
    for reward, keep in zip(reversed(r.unbind(1)), reversed(kept.unbind(1)), strict=True):
        running = torch.where(keep, reward + gamma * running, running)
        columns.append(torch.where(keep, running, 0))
    returns = torch.stack(columns[::-1], 1) if columns else r
    return TokenAdvantages(_like(whiten(returns, kept), token_rewards), _like(returns, token_rewards))


def reinforce_plus_plus_baseline(rewards: Tensor, groups: int | Tensor, mask: Tensor) -> Tensor:
    """r - mean of its group, on every token, then whitened over the tokens of the batch (REINFORCE++-baseline, arXiv 2501.03262).

    rewards [B] -> [B, T]. A group of one keeps its reward. Tokens of unscored responses are 0 and do not enter the whitening.
    """
    r, g = _outcome(rewards, groups)
    kept = _kept(mask)
    if kept.shape[0] != len(r) or kept.device != r.device:
        raise ValueError(f"mask must be [B, T] with B = {len(r)} as rewards have it, on {r.device}, got {tuple(kept.shape)} on {kept.device}")
    a = torch.where(g.size == 1, r, g.centred(r)).unsqueeze(-1).expand(kept.shape)
    return _like(whiten(a, kept & g.scored.unsqueeze(-1)), rewards)


def remax(token_rewards: Tensor, greedy_rewards: Tensor, mask: Tensor) -> TokenAdvantages:
    """Reward to go minus the reward of the greedy response to the same prompt, greedy_rewards [B] (ReMax, arXiv 2310.10505)."""
    r, kept = _tokens(token_rewards, mask)
    baseline = _real("greedy_rewards", greedy_rewards, "[B]", of=("token_rewards", r), dims=slice(1))
    returns = _reward_to_go(r)
    advantages = torch.where(kept, returns - baseline.unsqueeze(-1), 0)
    return TokenAdvantages(_like(advantages, token_rewards), _like(torch.where(kept, returns, 0), token_rewards))


def gae(token_rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 1.0, normalize: bool = True) -> TokenAdvantages:
    """Generalised advantage estimation (arXiv 1506.02438) that steps over masked tokens, such as a tool's output, as if they were not there.

    delta_t = r_t + gamma V_next - V_t, A_t = delta_t + gamma lam A_next, where "next" is the next masked-in token.
    values [B, T] of the critic; normalize whitens the advantages over the batch, the returns A + V are taken before.
    """
    check_number("gamma", gamma, 0, 1)
    check_number("lam", lam, 0, 1)
    check_flags(normalize=normalize)
    r, kept = _tokens(token_rewards, mask)
    like = ("token_rewards", r)
    v = torch.where(kept, _real("values", values, "[B, T]", of=like), 0)
    next_value = advantage = torch.zeros_like(r[:, 0]) if r.shape[1] else None
    columns = []
    for reward, value, keep in zip(*(reversed(x.unbind(1)) for x in (r, v, kept)), strict=True):
        delta = reward + gamma * next_value - value
        advantage = torch.where(keep, delta + gamma * lam * advantage, advantage)
        next_value = torch.where(keep, value, next_value)
        columns.append(advantage)
    advantages = torch.where(kept, torch.stack(columns[::-1], 1), 0) if columns else r
    returns = advantages + v
    return TokenAdvantages(_like(whiten(advantages, kept) if normalize else advantages, token_rewards), _like(returns, token_rewards))


def otb(
    token_rewards: Tensor,
    logp: Tensor,
    sum_sq_prob: Tensor,
    groups: int | Tensor,
    mask: Tensor,
    *,
    importance_weights: Tensor | None = None,
    zero_tail: bool = True,
    eps: float = 1e-8,
) -> TokenAdvantages:
    """Optimal token baseline, one for every position of a group (verl's "optimal_token_baseline").

    A = G - B, B_t = sum(G_t W_t) / (sum(W_t) + eps) over the group, W = cumsum(1 - 2 pi + sum_v pi_v^2): the squared norm of the score,
    accumulated. G is the reward to go. A group of one has no baseline.

    Args:
        token_rewards, mask: [B, T].
        logp, sum_sq_prob: [B, T], of `token_stats(..., with_sum_sq=True)`.
        importance_weights: [B, T]; their squares multiply the terms of W.
        zero_tail: no baseline for the longest response of a group where it stands alone, behind the length of the second longest.
    """
    check_number("eps", eps, 0, FINITE)
    check_flags(zero_tail=zero_tail)
    r, kept = _tokens(token_rewards, mask)
    like = ("token_rewards", r)
    g = Groups(groups, r, name="token_rewards")
    pi, s2 = _real("logp", logp, "[B, T]", of=like).exp(), _real("sum_sq_prob", sum_sq_prob, "[B, T]", of=like)
    w = 1 - 2 * pi + s2
    if importance_weights is not None:
        w = w * _real("importance_weights", importance_weights, "[B, T]", of=like).square()
    returns = torch.where(kept, _reward_to_go(r), 0)
    weight = torch.where(kept, _running_sum(torch.where(kept, w, 0)), 0)
    baseline = g.total(returns * weight) / (g.total(weight) + eps)
    none = (g.size == 1).unsqueeze(-1)
    if zero_tail:
        longest, second = g.unique_best(kept.sum(-1).double())
        none = none | (longest.unsqueeze(-1) & (torch.arange(r.shape[1], device=r.device) >= second.unsqueeze(-1)))
    advantages = torch.where(kept, returns - torch.where(none, 0, baseline), 0)
    return TokenAdvantages(_like(advantages, token_rewards), _like(returns, token_rewards))
