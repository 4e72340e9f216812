"""Lp-Reg (arXiv 2510.03222): keeps plausible rare tokens from being driven out by negative advantages."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...checks import check_choice, check_count, check_fraction, check_number, check_tokens, numbers
from ...parallel import Meeting
from ...primitives.batch_ranks import Batch, Call, added_up, agreed_batch
from ...primitives.group_selection import would_send_list
from ...primitives.kinks import bounded
from ...primitives.kl import check_kl, kl_penalty, resolve
from ...primitives.packing import Packed
from ...primitives.ratio import PolicyInputs, clean, clipped_ratio
from ...primitives.selection import fraction_capacity, select_fraction, select_fraction_of_batch, selected_means
from ...primitives.token_terms import TokenTerms
from ..aggregate import LossOutput, aggregate_terms
from ..arguments import check_clip, policy_inputs, refuse_context_group
from ..rollout_weights import RolloutWeights

KL_TERMS = ("sampled", "full")
SELECTIONS = ("negative", "all")


def _rarest(logp: Tensor, among: Tensor, rho: float, min_count: int) -> Tensor:
    """A group's lowest fraction rho by logp, at least one token; none if these are fewer than min_count."""
    return select_fraction(logp, among, among, rho, minimum=1, least=min_count)


def _rarest_of_batch(
    logp: Tensor,
    mask: Tensor,
    groups: list[tuple[Tensor, Tensor, float]],  # a group, those of it that may be selected, rho
    kl_of: Callable[[Tensor], TokenTerms],
    batch: Batch,
    min_count: int,
    capacity: int | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(what is selected here, metrics of all ranks) by `_rarest` of the groups' tokens on all ranks."""
    sizes = [mask.sum(), *(among.sum() for among, _, _ in groups)]
    tokens, *sizes = added_up(torch.stack([*sizes, *[mask.sum()] * (3 - len(sizes))]), batch).unbind()
    selected, chosen = torch.zeros_like(mask), torch.zeros_like(tokens)
    total = torch.zeros_like(tokens, dtype=torch.float64)
    for (among, candidates, fraction), size in zip(groups, sizes, strict=False):
        carried = torch.where(candidates, kl_of(candidates).values, math.nan)
        rarest, means = select_fraction_of_batch(
            logp, among, size, fraction, batch, minimum=1, least=min_count, capacity=capacity, carried=carried
        )  # fmt: skip
        selected = selected | (candidates & rarest)
        chosen, total = chosen + means.chosen, total + means.chosen * means.mean
    metrics = {"selected_fraction": chosen / tokens.clamp(min=1), "proxy_kl": total / chosen.clamp(min=1)}
    refused = tokens < 0  # by a rank whose arguments are wrong, where the host cannot be told
    return selected, {name: torch.where(refused, math.nan, value).to(logp.dtype) for name, value in metrics.items()}


def _full_kl(logp: Tensor, kept_logmass: Tensor | None, proxy_kl: Tensor | None) -> Tensor:
    """KL(proxy || policy) with its gradient, [B, T]."""
    if (kept_logmass is None) == (proxy_kl is None):
        raise ValueError("kl_term='full' needs exactly one of kept_logmass= (on-policy: KL = -log S) and proxy_kl= (from other logits), each [B, T]")
    if proxy_kl is not None:
        check_tokens("proxy_kl", proxy_kl, logp)
        return proxy_kl
    check_tokens("kept_logmass", kept_logmass, logp)
    return -kept_logmass  # type: ignore[operator]  # checked


def lp_reg_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    proxy_logp: Tensor,
    advantages: Tensor,
    mask: Tensor | Packed,
    *,
    rho: float = 0.01,
    kl_coef: float = 1.0,
    clip_low: float = 1.0,
    clip_high: float = 9.0,
    kl_term: str = "sampled",
    kl_kind: str = "k3",
    kl_clamp: float | None = 10.0,
    kept_logmass: Tensor | None = None,
    proxy_kl: Tensor | None = None,
    select_from: str | None = None,
    min_count: int = 2,
    rho_positive: float = 0.0,
    group: torch.distributed.ProcessGroup | None = None,
    select_over: str = "rank",
    capacity: int | None = None,
    log_ratio_clamp: float | None = None,
    weights: Tensor | RolloutWeights | None = None,
    aggregation: str | Tensor = "token-mean",
    normalizer: float | Tensor | None = None,
) -> LossOutput:
    """A policy gradient that pulls the rarest tokens with A < 0 to a proxy q: the policy without its noise.

    q keeps tokens with at least min_p times the largest probability (paper: 0.02), renormalised.
    `token_stats(logits, ids, min_p=0.02)` gives what is needed of it in the pass for logp: proxy_logp, and
    kept_logmass = log S, with KL(q || pi) = -log S.

    kl_term="sampled" is the official code (CarlanLark/Lp-Reg-dev). Its R: take the fraction rho with the
    lowest logp among the tokens with A < 0, and keep those with logp < proxy_logp. Per token

        in R       -A r + kl_coef * k3 of (logp; proxy_logp), clamped at kl_clamp; PPO's clip does not apply
        others     max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))

    k3's gradient is 1 - q / pi. Over all samples of pi its expectation is that of the full KL(q || pi). Only
    the tokens of R give their share of it here. The clamp at 10 switches it off where proxy_logp - logp >
    2.61. With kl_clamp=None it acts everywhere.

    kl_term="full" is the paper's Eq. 6. Its R: tokens with A < 0 and proxy_logp > -inf among the lowest
    fraction rho of **all** tokens. Per token

        -A clip(r, 1 - clip_low, 1 + clip_high) + kl_coef * [in R] KL(q || pi)          for either sign of A

    Args:
        logp, old_logp, advantages, mask, log_ratio_clamp, aggregation, normalizer: as in `ppo_loss`.
        proxy_logp: [B, T] float, detached: log q of the token taken, -inf outside q. q is from the old policy
            (the code) or the current one (on-policy).
        rho: in [0, 1]; the paper's 0.01 (14B), 0.005 (32B). It yields max(1, floor(rho * size of the group)).
        kl_coef: beta, >= 0.
        clip_low, clip_high: the ratio's bounds; the defaults are the paper's [0, 10].
        kl_kind, kl_clamp: for "sampled", see `kl_estimate`. Not "k1" ("kl"): its gradient is 1 for every
            token, which would drive those of R out.
        kept_logmass: [B, T] float, for "full" on-policy: log S of the current policy, with its gradient.
        proxy_kl: [B, T] float, for "full" with a proxy from other logits: KL(q || pi) with its gradient.
            token_divergence's "forward_kl" gives it if logits outside q's set are -inf.
        select_from: "negative" or "all", the group that rho refers to; None takes that of kl_term above.
        min_count: with fewer tokens no regularisation. The code's 2: none below 200 negatives at rho = 0.01.
        rho_positive: for "sampled", the same among A > 0 (the code's logp_pos_k_percent, always 0).
        group: data-parallel processes that hold the rows of a batch between them.
        select_over: with a group, "rank" compares the tokens of each process. "group" compares those of all
            and selects what one process would. That takes two collectives, a sum of 3 integers and a gather
            of 2 (capacity + 1) numbers; with rho_positive one gather more.
        capacity: for select_over="group", as in `select_bottom`, for each sign of A.
        weights: as in `ppo_loss`; multiply the regulariser too.

    Returns:
        LossOutput as that of `ppo_loss`; metrics also: selected_fraction, and proxy_kl, its mean over the
        selected tokens (0 if there are none). With select_over="group" these two are of the whole batch, and
        the same on all ranks.

    Raises:
        TypeError, ValueError: as `ppo_loss`, and for options of the other kl_term. With a group on CPUs every
            rank raises if one does, or if they disagree on what to select.
    """

    def checked() -> PolicyInputs:
        _check(kl_term, select_from, rho, rho_positive, kl_coef, min_count, kl_kind, kl_clamp, kept_logmass, proxy_kl)
        check_clip(clip_low, clip_high)
        x = policy_inputs(
            logp, old_logp, advantages, mask, weights=weights, log_ratio_clamp=log_ratio_clamp, aggregation=aggregation, normalizer=normalizer
        )
        refuse_context_group(x)
        check_tokens("proxy_logp", proxy_logp, logp)
        if kl_term == "full":
            _full_kl(logp, kept_logmass, proxy_kl)
        return x

    def would_exchange(meeting: Meeting, batch: Batch) -> None:
        if select_over == "group":
            meeting.would_add(lambda: [logp.new_empty(3, dtype=torch.int64)])
            for fraction in (rho, rho_positive) if rho_positive else (rho,):
                would_send_list(meeting, logp, fraction_capacity(batch, fraction, 1, capacity))

    call, what = Call("lp_reg_loss", group, capacity, None, select_over), (rho, rho_positive, min_count, kl_term, select_from)
    batch, x = agreed_batch(call, logp, checked, lambda _: what, would_exchange)
    sampled = kl_term == "sampled"
    from_all = (select_from or ("negative" if sampled else "all")) == "all"
    own, proxy = (numbers(t, x.advantages.dtype) for t in (logp, proxy_logp))
    negative = x.mask & (x.advantages < 0)
    fits = own < proxy if sampled else proxy > -math.inf
    groups = [(x.mask if from_all else negative, negative & fits, rho)]
    if rho_positive:
        positive = x.mask & (x.advantages > 0)
        groups.append((positive, positive & fits, rho_positive))

    def kl_of(where: Tensor) -> TokenTerms:
        if sampled:
            return kl_penalty(logp, proxy, where, kl_kind, kl_clamp)
        return TokenTerms(logp, torch.where(where, _full_kl(logp, kept_logmass, proxy_kl).to(own.dtype), 0))

    if batch is not None and select_over == "group":
        selected, kl_metrics = _rarest_of_batch(own, x.mask, groups, kl_of, batch, min_count, capacity)
        kl = kl_of(selected)
    else:
        selected, *others = (candidates & _rarest(own, among, fraction, min_count) for among, candidates, fraction in groups)
        for other in others:
            selected = selected | other
        kl = kl_of(selected)
        selected_fraction, _, mean_kl = selected_means(kl.values, selected, x.mask)
        kl_metrics = {"selected_fraction": selected_fraction, "proxy_kl": mean_kl}
    if sampled:
        ratio = clipped_ratio(x, clip_low, clip_high, unclipped=selected)
        policy = ratio.terms
    else:
        ratio, p = clipped_ratio(x, clip_low, clip_high), clean(x)
        policy = TokenTerms(logp, -p.advantages * bounded(p.ratio, 1 - clip_low, 1 + clip_high))
    terms = x.weigh(policy).plus(x.weigh_penalty(kl.scaled(kl_coef)))
    return LossOutput(aggregate_terms(terms, x.sequences, ratio.tokens, aggregation, normalizer), {**kl_metrics, **ratio.metrics})


def _check(kl_term, select_from, rho, rho_positive, kl_coef, min_count, kl_kind, kl_clamp, kept_logmass, proxy_kl) -> None:
    """Raises TypeError or ValueError for options of `lp_reg_loss` that are wrong or do not go together."""
    check_choice("kl_term", kl_term, KL_TERMS)
    check_choice("select_from", select_from, (None, *SELECTIONS))
    check_fraction("rho", rho)
    check_fraction("rho_positive", rho_positive)
    check_number("kl_coef", kl_coef, 0)
    check_count("min_count", min_count)
    check_kl(kl_kind, kl_clamp)
    if resolve(kl_kind) == ("k1", False):
        raise ValueError(f"kl_kind {kl_kind!r} lowers every selected token, whatever the proxy says: expected 'k3', 'k2', 'abs' or a kind with a +")
    if kl_term == "sampled" and (kept_logmass is not None or proxy_kl is not None):
        raise ValueError("kept_logmass and proxy_kl are for kl_term='full', got one of them with 'sampled'")
    if kl_term == "full" and rho_positive:
        raise ValueError(f"rho_positive is for kl_term='sampled', got {rho_positive} with 'full'")
