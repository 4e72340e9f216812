"""Advantage estimators: from rewards to what the policy losses multiply with. Functions on [B] or [B, T].

`groups` says which responses answer the same prompt. An int G: every G neighbours do; G divides B. An integer
tensor [B]: any ids.

Rewards may be of any real dtype. A NaN reward means "not scored": it takes no part in any mean and its
advantage is 0. Results are float32 (float64 for float64 rewards), without gradient. Sums run in float64.
Nothing is read on the host. Wrong dtypes, shapes, devices and numbers raise TypeError or ValueError.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import FINITE, Like, check_choice, check_count, check_flags, check_number, check_positive, expect

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


# --- input --------------------------------------------------------------------------------------------------


def _real(name: str, x: Tensor, layout: str, like: Like | None = None, shape: Any = None) -> Tensor:
    """x, checked as by `expect`, as float64 without gradient."""
    expect(name, x, "real", layout, like=like, shape=shape)
    return x.detach().double()


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
            self.order = None  # the members of a group are neighbours already
            rank = self.index = torch.arange(n, device=like.device) // groups
        else:
            expect("groups", groups, "integer", "[B], one id a response", shape=(n,), like=(name, like))
            # Ids become 0, 1, ... in sorted order; torch.unique would wait for the device.
            ids, self.order = groups.long().sort(dim=0, stable=True)
            rank = (torch.cat([ids[:1], ids]).diff() != 0).long().cumsum(0)
            self.index = torch.empty_like(rank).scatter_(0, self.order, rank)
        # There are at most as many groups as members. The missing ones are empty.
        self.offsets = torch.searchsorted(rank, torch.arange(n + 1, device=like.device))
        self.scored = torch.ones(n, dtype=torch.bool, device=like.device) if scored is None else scored
        self.size = self.total(torch.ones(n, dtype=torch.float64, device=like.device))

    def _reduce(self, x: Tensor, how: str, neutral: float) -> Tensor:
        """Adds in one fixed order. index_add_ adds in any order on a GPU."""
        x = torch.where(self.scored.view(-1, *(1,) * (x.dim() - 1)), x, neutral)
        x = x if self.order is None else x[self.order]
        # `unsafe` leaves out checks, which wait for the device.
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
        """(whether this member alone is the largest, the largest of the others, -inf without others)."""
        best = self.scored & (x == self.largest(x))
        alone = best & (self.total(best.double()) == 1)
        return alone, self.largest(torch.where(alone, -math.inf, x))


def _outcome(rewards: Tensor, groups: int | Tensor) -> tuple[Tensor, Groups]:
    r = _real("rewards", rewards, "[B]")
    return r, Groups(groups, r, ~r.isnan())


def _finish(advantages: Tensor, rewards: Tensor, scored: Tensor) -> Tensor:
    return _like(torch.where(scored, advantages, 0), rewards)


# --- one reward a response: [B] -> [B] ----------------------------------------------------------------------


def grpo(rewards: Tensor, groups: int | Tensor, *, scale: str = "group", eps: float = 1e-6, singletons: str = "reward") -> Tensor:
    """(r - mean of its group) / (std + eps), GRPO (arXiv 2402.03300). Standard deviations are unbiased.

    Args:
        rewards: [B].
        groups: see the module.
        scale: TRL's scale_rewards. "group" divides by the std of the group, "batch" by that of all raw
            rewards, "none" does not divide.
        eps: 1e-6 in verl, 1e-4 in TRL.
        singletons: a group with one scored response. "reward": mean 0 and group std 1 (verl). "zero": the
            advantage is 0 (TRL).
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
    """(r - mean of its group) / (std of all raw rewards of the batch + eps), Lite PPO (arXiv 2508.08221).

    This is `grpo` with scale="batch". The rest of the recipe: `ppo_loss` with clip 0.2,
    aggregation="token-mean", no KL. ROLL's `div_std_global` divides by the std of the group-centred rewards
    instead, which is smaller.
    """
    return grpo(rewards, groups, scale="batch", eps=eps, singletons="zero")


def rloo(rewards: Tensor, groups: int | Tensor) -> Tensor:
    """r minus the mean of the *other* responses, n/(n-1) (r - mean) (RLOO, arXiv 2402.14740).

    A group of one keeps its reward.
    """
    r, g = _outcome(rewards, groups)
    a = torch.where(g.size == 1, r, g.centred(r) * g.size / (g.size - 1).clamp(min=1))
    return _finish(a, rewards, g.scored)


def opo(rewards: Tensor, lengths: Tensor, groups: int | Tensor) -> Tensor:
    """r - sum(length r) / sum(length) over its group (OPO, arXiv 2505.23585). `lengths` [B].

    A group of one keeps its reward.
    """
    r, g = _outcome(rewards, groups)
    lengths = _real("lengths", lengths, "[B]", ("rewards", r))
    best = g.largest(r)
    total = g.total(lengths)
    shifted = r - best
    a = shifted - g.total(lengths * shifted) / torch.where(total == 0, 1, total)
    return _finish(torch.where(g.size == 1, r, a), rewards, g.scored)


def gpg(rewards: Tensor, groups: int | Tensor, *, f_norm: float = 1.0) -> Tensor:
    """B / #{r != 0} (r - mean of its group) / f_norm (GPG, arXiv 2504.02546, as verl has it).

    A group of one keeps its reward.
    """
    check_positive("f_norm", f_norm, FINITE)
    r, g = _outcome(rewards, groups)
    alpha = len(r) / (g.scored & (r != 0)).sum().clamp(min=1).double()
    a = alpha * torch.where(g.size == 1, r, g.centred(r)) / f_norm
    return _finish(a, rewards, g.scored)


def pass_at_k(rewards: Tensor, groups: int | Tensor, *, scale_by_std: bool = True, eps: float = 1e-6) -> Tensor:
    """(max - second) / (std + eps) for the best response of a group, 0 for the others (arXiv 2503.19595).

    As verl has it. All are 0 where several are best, and in a group of one (verl refuses these).
    """
    check_flags(scale_by_std=scale_by_std)
    check_number("eps", eps, 0, FINITE)
    r, g = _outcome(rewards, groups)
    alone, second = g.unique_best(r)
    a = torch.where(alone & (g.size > 1), r - second, 0)
    return _finish(a / (g.std(r) + eps) if scale_by_std else a, rewards, g.scored)


def combine_rewards(rewards: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weighted sum of several rewards, [B, K] and [K] (default: ones) -> [B].

    NaN entries are left out. The sum is NaN where all are NaN (TRL).
    """
    r = _real("rewards", rewards, "[B, K]")
    weights = r.new_ones(r.shape[1]) if weights is None else weights
    w = _real("weights", weights, "[K]", ("rewards", r), r.shape[1:])
    return _like(torch.where(r.isnan().all(-1), math.nan, (r * w).nansum(-1)), rewards)


def gdpo(rewards: Tensor, groups: int | Tensor, weights: Tensor | None = None, *, eps: float = 1e-4) -> Tensor:
    """GDPO, TRL's "normalize_then_sum".

    Each reward is normalised in its group. The weighted sum is then normalised over the batch.
    rewards [B, K], weights [K] -> [B]. TRL's "sum_then_normalize" is
    `grpo(combine_rewards(rewards, weights), groups, eps=1e-4)`.
    """
    r = _real("rewards", rewards, "[B, K]")
    each = [grpo(column, groups, eps=eps, singletons="zero").where(~column.isnan(), math.nan) for column in r.unbind(-1)]
    total = combine_rewards(torch.stack(each, -1) if each else r, weights)
    return _like(grpo(total, max(len(total), 1), eps=eps, singletons="zero"), rewards)


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int, *, factor: float = 1.0) -> Tensor:
    """What DAPO (arXiv 2503.14476) adds to the reward of long responses.

    0 up to max_length - buffer, then falling to -factor at max_length.
    lengths [B] -> [B] float32, in [-factor, 0].
    """
    check_number("max_length", max_length, 0, FINITE)
    check_number("buffer", buffer)
    if not 0 < buffer <= max_length:
        raise ValueError(f"buffer must be in (0, max_length = {max_length}], got {buffer}")
    check_number("factor", factor, 0, FINITE)
    excess = _real("lengths", lengths, "[B]") - (max_length - buffer)
    return (-factor * (excess / buffer).clamp(0, 1)).float()


# --- rewards per token: [B, T] -> [B, T] --------------------------------------------------------------------


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the masked tokens of the whole batch, 0 elsewhere.

    The variance is unbiased. shift_mean=False adds the mean back. [B, T] -> [B, T].
    """
    check_flags(shift_mean=shift_mean)
    check_number("eps", eps, 0, FINITE)
    x = _real("values", values, "[B, T]")
    kept = _real("mask", mask, "[B, T]", ("values", x)) != 0
    count = kept.sum()
    mean = torch.where(kept, x, 0).sum() / count.clamp(min=1)
    centred = torch.where(kept, x - mean, 0)
    scaled = centred * (centred.square().sum() / (count - 1).clamp(min=1) + eps).rsqrt()
    return _like(scaled if shift_mean else torch.where(kept, scaled + mean, 0), values)


def _running_sum(x: Tensor) -> Tensor:
    """cumsum(-1) of [B, T], adding in one fixed order. That of a GPU is not fixed."""
    step = 1
    while step < x.shape[-1]:
        x = torch.cat([x[:, :step], x[:, step:] + x[:, :-step]], -1)
        step *= 2
    return x


def _reward_to_go(rewards: Tensor) -> Tensor:
    return _running_sum(rewards.flip(-1)).flip(-1)


def _tokens(token_rewards: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    r = _real("token_rewards", token_rewards, "[B, T]")
    kept = _real("mask", mask, "[B, T]", ("token_rewards", r)) != 0
    return torch.where(kept, r, 0), kept


def reinforce_plus_plus(token_rewards: Tensor, mask: Tensor, *, gamma: float = 1.0) -> TokenAdvantages:
    """Discounted returns, whitened over the batch (REINFORCE++, arXiv 2501.03262).

    Masked tokens, such as a tool's output, are stepped over: rewards behind them count for the tokens before
    them, as in verl 0.9.1. (verl 0.8 began anew there.)
    """
    check_number("gamma", gamma, 0, 1)
    r, kept = _tokens(token_rewards, mask)
    running, columns = r.new_zeros(len(r)), []
    for reward, keep in zip(reversed(r.unbind(1)), reversed(kept.unbind(1)), strict=True):
        running = torch.where(keep, reward + gamma * running, running)
        columns.append(torch.where(keep, running, 0))
    returns = torch.stack(columns[::-1], 1) if columns else r
    return TokenAdvantages(_like(whiten(returns, kept), token_rewards), _like(returns, token_rewards))


def reinforce_plus_plus_baseline(rewards: Tensor, groups: int | Tensor, mask: Tensor) -> Tensor:
    """r - mean of its group, on every token, whitened over the tokens of the batch.

    REINFORCE++-baseline, arXiv 2501.03262. rewards [B] -> [B, T]. A group of one keeps its reward. Tokens of
    unscored responses are 0 and not part of the whitening.
    """
    r, g = _outcome(rewards, groups)
    kept = _real("mask", mask, "[B, T]") != 0
    expect("mask", mask, "real", "[B, T]", shape=(len(r), mask.shape[1]), like=("rewards", r))
    a = torch.where(g.size == 1, r, g.centred(r)).unsqueeze(-1).expand(kept.shape)
    return _like(whiten(a, kept & g.scored.unsqueeze(-1)), rewards)


def remax(token_rewards: Tensor, greedy_rewards: Tensor, mask: Tensor) -> TokenAdvantages:
    """Reward to go minus the reward of the greedy response to the same prompt (ReMax, arXiv 2310.10505).

    greedy_rewards: [B].
    """
    r, kept = _tokens(token_rewards, mask)
    baseline = _real("greedy_rewards", greedy_rewards, "[B]", ("token_rewards", r), r.shape[:1])
    returns = _reward_to_go(r)
    advantages = torch.where(kept, returns - baseline.unsqueeze(-1), 0)
    return TokenAdvantages(_like(advantages, token_rewards), _like(torch.where(kept, returns, 0), token_rewards))


def gae(token_rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 1.0, normalize: bool = True) -> TokenAdvantages:
    """Generalised advantage estimation (arXiv 1506.02438), as if masked tokens were not there.

    delta_t = r_t + gamma V_next - V_t, A_t = delta_t + gamma lam A_next. "next" is the next token that the
    mask counts: others, such as a tool's output, are stepped over. values [B, T] are the critic's. normalize
    whitens the advantages over the batch; the returns A + V are taken before.
    """
    check_number("gamma", gamma, 0, 1)
    check_number("lam", lam, 0, 1)
    check_flags(normalize=normalize)
    r, kept = _tokens(token_rewards, mask)
    v = torch.where(kept, _real("values", values, "[B, T]", ("token_rewards", r)), 0)
    next_value = advantage = r.new_zeros(len(r))
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

    A = G - B, B_t = sum(G_t W_t) / (sum(W_t) + eps) over the group, W = cumsum(1 - 2 pi + sum_v pi_v^2). G is
    the reward to go. W is the accumulated squared norm of the score. A group of one has no baseline.

    Args:
        token_rewards, mask: [B, T].
        logp, sum_sq_prob: [B, T], of `token_stats(..., with_sum_sq=True)`.
        importance_weights: [B, T]; their squares multiply the terms of W.
        zero_tail: no baseline for the tokens of a group's longest response behind the end of the second
            longest.
    """
    check_number("eps", eps, 0, FINITE)
    check_flags(zero_tail=zero_tail)
    r, kept = _tokens(token_rewards, mask)
    like = ("token_rewards", r)
    g = Groups(groups, r, name="token_rewards")
    w = 1 - 2 * _real("logp", logp, "[B, T]", like).exp() + _real("sum_sq_prob", sum_sq_prob, "[B, T]", like)
    if importance_weights is not None:
        w = w * _real("importance_weights", importance_weights, "[B, T]", like).square()
    returns = torch.where(kept, _reward_to_go(r), 0)
    weight = torch.where(kept, _running_sum(torch.where(kept, w, 0)), 0)
    baseline = g.total(returns * weight) / (g.total(weight) + eps)
    none = (g.size == 1).unsqueeze(-1)
    if zero_tail:
        longest, second = g.unique_best(kept.sum(-1).double())
        none = none | (longest.unsqueeze(-1) & (torch.arange(r.shape[1], device=r.device) >= second.unsqueeze(-1)))
    advantages = torch.where(kept, returns - torch.where(none, 0, baseline), 0)
    return TokenAdvantages(_like(advantages, token_rewards), _like(returns, token_rewards))
