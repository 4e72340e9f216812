"""Losses for masked diffusion language models beside BGPO (`bgpo.py`).

What each makes of log-probabilities of guessed tokens, or of their ELBOs. Log-probabilities come from
`rlkern.token_logprobs`, ELBOs from `rlkern.masked_elbo`, masks from `rlkern.diffusion.masks`. A masked token
is guessed from what is not masked, so "log-probability of the response" means something else in every method.
The estimate is the caller's, the loss is here.

VRPO, SPG and ESPO are not linear in the draws. They need the gradient graphs of all draws at once, or two
passes. The first pass has no gradient. `torch.autograd.grad` of the loss by its first input then weighs the
draws in a second pass, one at a time. See docs/diffusion.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import (
    Like,
    as_bool,
    check_count,
    check_fraction,
    check_logp,
    check_number,
    check_positive,
    check_tokens,
    computing_dtype,
    expect,
)
from ..losses.aggregate import LossOutput, aggregate_values, check_aggregation, check_parts
from ..losses.arguments import policy_tokens
from ..losses.policy.grpo import grpo_loss
from ..losses.preference.dpo import dpo_loss
from ..primitives.kinks import number
from ..primitives.packing import Packed, Rows, check_packed, per_sequence, per_token, sequences_of
from ..primitives.reductions import masked_mean, total


def draw_mean(name: str, elbo: Tensor, mc_weight: Tensor | None, like: Like | None = None) -> Tensor:
    """An ELBO [B], or the mean of its draws [B, n], in the dtype of the computation.

    `like` has its B and device.
    """
    expect(name, elbo, "float", "[B] or [B, n]", shape=elbo.shape if isinstance(elbo, Tensor) else ())
    if elbo.dim() not in (1, 2) or elbo.shape[1:] == (0,):
        raise ValueError(f"{name} must be [B] or [B, n], one ELBO a response or one a draw, got shape {tuple(elbo.shape)}")
    if like is not None:
        responses = like[1].shape[0]
        if elbo.shape[0] != responses:
            raise ValueError(f"{name} must have B = {responses} responses, as {like[0]} has, got {tuple(elbo.shape)}")
        expect(name, elbo, "float", "[B, n]", shape=elbo.shape, like=like)
    elbo = elbo.to(computing_dtype(elbo))
    if elbo.dim() == 1:
        if mc_weight is not None:
            raise ValueError(f"mc_weight is one weight a draw and {name} is [B], averaged already: give it as [B, n]")
        return elbo
    if mc_weight is None:
        return elbo.mean(-1)
    expect("mc_weight", mc_weight, "float", "[n] or [B, n]", shape=(elbo.shape[1:], elbo.shape), like=(name, elbo))
    return (elbo * mc_weight.detach().to(elbo.dtype)).sum(-1)


def vrpo_loss(
    chosen_elbo: Tensor,
    rejected_elbo: Tensor,
    ref_chosen_elbo: Tensor,
    ref_rejected_elbo: Tensor,
    *,
    beta: float = 0.1,
    mc_weight: Tensor | None = None,
) -> LossOutput:
    """VRPO of LLaDA 1.5, arXiv 2505.19223: DPO on ELBOs. The mean over pairs of

        -log sigmoid(beta ((B - B_ref)(chosen) - (B - B_ref)(rejected)))

    What keeps its variance low happens before. All draws are at different mask levels, and policy and
    reference have the same masks: `count_masks` with one seed for both. (The paper calls it antithetic
    sampling.)

    Args:
        chosen_elbo, rejected_elbo: [B] or [B, n] float, one draw a column; gradients flow here.
        ref_chosen_elbo, ref_rejected_elbo: the same of the reference, detached.
        beta: > 0.
        mc_weight: [n] or [B, n] float, weights of the draws with sum 1; None takes their mean.

    Returns:
        LossOutput(loss, metrics): chosen_reward, rejected_reward (means of beta (B - B_ref)), accuracy,
        pairs.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices and numbers other than the above.
    """
    chosen = draw_mean("chosen_elbo", chosen_elbo, mc_weight)
    others = {"rejected_elbo": rejected_elbo, "ref_chosen_elbo": ref_chosen_elbo, "ref_rejected_elbo": ref_rejected_elbo}
    rejected, *refs = (draw_mean(name, x, mc_weight, ("chosen_elbo", chosen)) for name, x in others.items())
    losses, chosen_rewards, rejected_rewards = dpo_loss(chosen, rejected, refs[0], refs[1], beta)
    pairs = max(len(losses), 1)
    metrics = {
        "chosen_reward": chosen_rewards.sum() / pairs,
        "rejected_reward": rejected_rewards.sum() / pairs,
        "accuracy": total(chosen_rewards > rejected_rewards, losses.dtype) / pairs,
        "pairs": number(len(losses), losses.detach()),
    }
    return LossOutput(losses.sum() / pairs, metrics)


def diffu_grpo_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor | Packed,
    *,
    reference_logp: Tensor | None = None,
    kl_coef: float = 0.0,
    clip_low: float = 0.5,
    clip_high: float = 0.5,
    aggregation: str | Tensor = "token-mean",
    normalizer: float | Tensor | None = None,
) -> LossOutput:
    """diffu-GRPO of d1, arXiv 2504.12216: `grpo_loss` on one guess of the whole response.

    All response tokens are masked, and each prompt token with probability 0.15 (0.3 in the code's defaults),
    by `bernoulli_masks(prompt_mask, 1, p=0.15)`. So logp_k = log p(y_k | what is left of the prompt), in one
    forward. Every inner step takes a new seed, and its old_logp is of that seed. On `coupled_logp` it is
    coupled-GRPO.

    Args:
        logp, old_logp, advantages, mask, aggregation, normalizer: as in `grpo_loss`; mask counts the
            response's tokens.
        reference_logp, kl_coef: as in `grpo_loss`, with its k3; d1: 0.04.
        clip_low, clip_high: as in `ppo_loss`; d1's recipes 0.5, its code's default 0.2.

    Returns, Raises: as for `grpo_loss`.
    """
    return grpo_loss(
        *(logp, old_logp, advantages, mask),
        reference_logp=reference_logp,
        kl_coef=kl_coef,
        clip_low=clip_low,
        clip_high=clip_high,
        aggregation=aggregation,
        normalizer=normalizer,
    )


def unigrpo_loss(
    logp: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    mask: Tensor | Packed,
    *,
    reference_logp: Tensor | None = None,
    kl_coef: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    normalizer: float | Tensor | None = None,
) -> LossOutput:
    """UniGRPO of MMaDA, arXiv 2505.15809: as `diffu_grpo_loss`, on the masked tokens of one draw.

    The mean over responses of (1 / |M|) sum over the masked tokens M. It is unweighted, so no ELBO. The level
    of the draw moves evenly over the inner steps: step j takes draw j of `bernoulli_masks` with as many draws
    as inner steps. Prompts are not masked.

    Args:
        mask: [B, T], the masked tokens. A response without any counts in the mean, with 0.
        logp, old_logp, advantages, reference_logp, kl_coef, clip_low, clip_high, normalizer: as in
            `grpo_loss`; normalizer replaces B.

    Returns, Raises: as for `grpo_loss`.
    """
    return grpo_loss(
        *(logp, old_logp, advantages, mask),
        reference_logp=reference_logp,
        kl_coef=kl_coef,
        clip_low=clip_low,
        clip_high=clip_high,
        aggregation="grpo",
        normalizer=normalizer,
    )


def coupled_logp(full_logp: Tensor, pair_logp: Tensor, pair_mask: Tensor, weight: Tensor, *, packed: Packed | None = None) -> Tensor:
    """coupled-GRPO's estimate for every token (DiffuCoder, arXiv 2506.20639), for `diffu_grpo_loss`:

        logp_k = 1/2 (full_logp_k + weight_j pair_logp_jk),    j the draw of a complementary pair that masks k

    Masks and weights (1 / t and 1 / (1 - t)) are `bernoulli_masks(response_mask, 2, complementary=True,
    low=0.2, high=0.8)`. Old and reference log-probabilities are made from the same masks.

    Args:
        full_logp: [B, T] float, with the response fully masked.
        pair_logp: [B, 2, T] float.
        pair_mask: [B, 2, T] bool or number, the tokens that each draw masks.
        weight: [B, 2] float, detached.
        packed: a `Packed` of N tokens: full_logp has N elements in any shape, pair_logp and pair_mask are
            two of these, [2, ...], weight is [S, 2].

    Returns:
        [B, T], float32 (float64 for float64 full_logp). Gradients flow into both log-probabilities. 0.5
        full_logp where neither draw masks.

    Raises:
        TypeError, ValueError: for dtypes, shapes and devices other than the above.
    """
    like = ("full_logp", full_logp)
    dtype = computing_dtype(full_logp) if isinstance(full_logp, Tensor) else None
    if packed is None:
        check_logp(full_logp, "full_logp")
        batch, length = full_logp.shape
        expect("pair_logp", pair_logp, "float", "[B, 2, T]", shape=(batch, 2, length), like=like)
        expect("weight", weight, "float", "[B, 2]", shape=(batch, 2), like=like)
        by_draw, draws_at = weight.detach().to(dtype).unsqueeze(-1), 1
    else:
        check_packed(packed)
        sequences = sequences_of(packed, full_logp, "full_logp")
        expect("pair_logp", pair_logp, "float", "[2, ...]", shape=(2, *full_logp.shape), like=like)
        expect("weight", weight, "float", "[S, 2]", shape=(sequences.lengths.shape[0], 2), like=like)
        by_draw, draws_at = torch.stack([sequences.spread(w) for w in weight.detach().to(dtype).unbind(-1)]), 0
    check_tokens("pair_mask", pair_mask, pair_logp, kind="real", of="pair_logp")
    guessed = torch.where(as_bool(pair_mask), pair_logp.to(dtype) * by_draw, 0)
    return 0.5 * (full_logp.to(dtype) + guessed.sum(draws_at))


def wd1_loss(
    logp: Tensor,
    advantages: Tensor,
    mask: Tensor | Packed,
    *,
    psi: float = 1.0,
    group_size: int | None = None,
    normalizer: float | Tensor | None = None,
) -> LossOutput:
    """wd1, arXiv 2507.08838: a weighted log-likelihood, no ratio. The mean over groups of responses i of

        -sum_i (softmax(psi A)_i - softmax(-psi A)_i) sum_k logp_ik

    The softmaxes run over the responses to one prompt. The official code takes the batch of a process as one
    group.

    Args:
        logp: [B, T] float, the estimate of d1 (see `diffu_grpo_loss`); gradients flow here.
        advantages: [B] or [B, 1] float.
        mask: [B, T] bool or number, nonzero for the response's tokens.
        psi: inverse temperature, >= 0; the code's is 1.
        group_size: responses of a prompt, neighbours in the batch; None takes all as one group.
        normalizer: the number of groups to divide by; None takes that of this call.

    Returns:
        LossOutput(loss, metrics): effective_sample_size, of softmax(psi A), as a fraction of the group, mean
        over groups; groups.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices and numbers other than the above.
    """
    check_number("psi", psi, 0)
    sequences = sequences_of(mask, logp)
    per_sequence("advantages", advantages, logp, sequences)  # its checks
    batch = sequences.lengths.shape[0]
    size = max(batch, 1) if group_size is None else group_size
    check_count("group_size", size, 1)
    if batch % size:
        raise ValueError(f"group_size must be a number of responses that divides the {batch} of the batch, got {size}")
    p = policy_tokens(logp, None, advantages, mask, normalizer=normalizer)
    scores = psi * advantages.to(p.logp.dtype).view(-1, size)
    attract = scores.softmax(-1)
    weight = p.sequences.spread((attract - (-scores).softmax(-1)).reshape(batch))
    values = -weight * torch.where(weight == 0, 0, p.logp)  # 0 even at logp = -inf
    groups = max(len(scores), 1)
    ess = (1 / (size * attract.square().sum(-1))).sum() / groups
    metrics = {"effective_sample_size": ess, "groups": number(len(scores), scores)}
    return LossOutput(aggregate_values(values, p.sequences, "token-mean", groups if normalizer is None else normalizer), metrics)


def spg_loss(
    logp: Tensor,
    advantages: Tensor,
    draw_mask: Tensor,
    weight: Tensor,
    mask: Tensor | Packed,
    *,
    beta: float = 1.5,
    upper_weight: float = 0.5,
    aggregation: str | Tensor = "token-mean",
    normalizer: float | Tensor | None = None,
) -> LossOutput:
    """Sandwiched policy gradient (SPG), arXiv 2510.09541.

    It raises a lower bound of the likelihood where A >= 0, and presses on an upper one where A < 0. For each
    token k, with means over the draws j, m_jk = 1 if draw j masks k, and u = upper_weight:

        ELBO_k = mean_j w_j m_jk logp_jk           EUBO_k = (1 / beta) log mean_j w_j m_jk exp(beta logp_jk)
        A >= 0: -A ELBO_k                          A < 0: -A (u EUBO_k + (1 - u) ELBO_k)

    With weights L / m, as `count_masks` gives, and the default aggregation this is the official code. There a
    draw's ELBO is a mean over its masked tokens, responses count by length, and EUBO sums over the tokens
    that some draw masks, scaled up to L. No ratio, no KL. The official recipe masks block by block: nothing
    before a random block, at random inside, everything after; and 15 % of the prompt.

    Args:
        logp: [B, n, T] float, log-probabilities of the draws. Anything may stand where a draw does not mask.
            Gradients flow here.
        advantages: [B], [B, 1] or [B, T] float.
        draw_mask: [B, n, T] bool or number, the tokens that each draw masks.
        weight: [B, n] float, detached.
        mask: [B, T] bool or number, nonzero for the response's tokens. Or a `Packed` of N tokens: logp and
            draw_mask are then [n, N] (a draw in any shape of N elements), weight is [S, n].
        beta: > 0; 1 to 2 in the paper.
        upper_weight: u, a fraction in [0, 1].
        aggregation, normalizer: as in `aggregate`.

    Returns:
        LossOutput(loss, metrics): elbo, eubo, means over the tokens; tokens.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices, names and numbers other than the above.
    """
    check_positive("beta", beta)
    check_fraction("upper_weight", upper_weight)
    check_aggregation(aggregation, normalizer)
    draws_at = 0 if isinstance(mask, Packed) else 1
    layout = "[n, ...], N tokens a draw" if isinstance(mask, Packed) else "[B, n, T]"
    expect("logp", logp, "float", layout, shape=logp.shape if isinstance(logp, Tensor) else ())
    if logp.dim() < 2 or (logp.dim() != 3 and draws_at == 1) or logp.shape[draws_at] == 0:
        raise ValueError(f"logp must be {layout} with at least one draw, got shape {tuple(logp.shape)}")
    check_tokens("draw_mask", draw_mask, logp, kind="real")
    one = logp.select(draws_at, 0)
    sequences = sequences_of(mask, one)
    n, size = logp.shape[draws_at], sequences.lengths.shape[0]
    expect("weight", weight, "float", "[B, n]", shape=(size, n), like=("logp", logp))
    mask = sequences.mask
    logp = logp.to(computing_dtype(logp))
    advantages = torch.where(mask, per_token("advantages", advantages, one, sequences), 0)
    masked = as_bool(draw_mask) & mask.unsqueeze(draws_at)
    impossible = (advantages == 0).unsqueeze(draws_at) & logp.isneginf()  # 0 times it would be NaN
    logp = torch.where(masked & ~impossible, logp, 0)
    by_draw = torch.stack([sequences.spread(w).expand_as(one) for w in weight.detach().to(logp.dtype).unbind(-1)], draws_at)
    weight = torch.where(masked, by_draw, 0)
    elbo = (weight * logp).sum(draws_at) / n
    eubo = evidence_upper_bound(logp, weight, sequences, beta, draws_at)
    estimate = torch.where(advantages < 0, upper_weight * eubo + (1 - upper_weight) * elbo, elbo)
    metrics = {"elbo": masked_mean(elbo, mask), "eubo": masked_mean(eubo, mask), "tokens": total(mask, eubo.dtype)}
    check_parts(sequences, aggregation, normalizer)
    return LossOutput(aggregate_values(-advantages * estimate, sequences, aggregation, normalizer), metrics)


def evidence_upper_bound(logp: Tensor, weight: Tensor, sequences: Rows | Packed, beta: float, draws_at: int = 1) -> Tensor:
    """EUBO [B, T] of logp and weight [B, n, T], both 0 where a draw does not mask.

    draws_at: the dimension n.
    """
    ever = (weight > 0).any(draws_at)
    # A token that no draw masks gets finite numbers here: an all -inf log-sum-exp has no gradient.
    empty = torch.zeros_like(logp).masked_fill(ever.unsqueeze(draws_at), -math.inf)
    exponents = torch.where(weight > 0, weight.log() + beta * logp, empty)
    eubo = torch.where(ever, (exponents.logsumexp(draws_at) - math.log(logp.shape[draws_at])) / beta, 0)
    covered = sequences.sum(ever.to(eubo.dtype)).clamp(min=1)
    return eubo * sequences.spread(sequences.lengths.to(eubo.dtype) / covered)


def espo_loss(
    elbo: Tensor,
    old_elbo: Tensor | None,
    advantages: Tensor,
    lengths: Tensor,
    *,
    mc_weight: Tensor | None = None,
    ref_elbo: Tensor | None = None,
    kl_coef: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    normalizer: float | Tensor | None = None,
) -> LossOutput:
    """ESPO, arXiv 2512.03759: PPO's clip on one ratio a response, r = exp((B - B_old) / L).

    Plus kl_coef (B - B_ref)^2 / (2 L), and the mean over responses. It is GSPO with ELBOs. ESPO takes
    complementary draws, `count_masks(..., complementary=True)`, the same for B, B_old and B_ref. GDPO (arXiv
    2510.08554) is mc_weight from `quadrature_levels`, lengths of 1 and advantages (r - mean r) / L: no L in
    the ratio, one outside.

    Args:
        elbo: [B] or [B, n] float, one draw a column; gradients flow here.
        old_elbo: the same of the policy that sampled, detached; None is on-policy.
        advantages: [B] or [B, 1] float.
        lengths: [B] number, L: tokens of each response, or the padded width for all as in the official code.
            A response with L = 0 counts in the mean, with 0.
        mc_weight: [n] or [B, n] float, weights of the draws with sum 1; None takes their mean.
        ref_elbo: the same as elbo, of the reference, detached; None leaves the penalty out, and then kl_coef
            must be 0.
        kl_coef: >= 0.
        clip_low, clip_high: as in `ppo_loss`.
        normalizer: replaces B.

    Returns:
        LossOutput as that of `ppo_loss`, of responses instead of tokens; metrics also, with a reference: kl,
        the mean of (B - B_ref)^2 / (2 L^2).

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices and numbers other than the above.
    """
    elbo = draw_mean("elbo", elbo, mc_weight)
    expect("lengths", lengths, "real", "[B], one a response", shape=elbo.shape, like=("elbo", elbo))
    check_number("kl_coef", kl_coef, 0)
    if ref_elbo is None and kl_coef != 0:
        raise ValueError(f"kl_coef={kl_coef} needs ref_elbo=, the same as elbo of the reference")
    lengths = lengths.detach().to(elbo.dtype).unsqueeze(-1)

    def a_token(name: str, x: Tensor | None) -> Tensor | None:
        return None if x is None else draw_mean(name, x, mc_weight, ("elbo", elbo)).unsqueeze(-1) / lengths.clamp(min=1)

    return grpo_loss(
        elbo.unsqueeze(-1) / lengths.clamp(min=1),
        a_token("old_elbo", old_elbo),
        advantages,
        lengths > 0,
        reference_logp=a_token("ref_elbo", ref_elbo),
        kl_kind="k2",
        kl_scale=lengths,  # the square has L^2 below, the penalty L
        kl_coef=kl_coef,
        clip_low=clip_low,
        clip_high=clip_high,
        aggregation="grpo",
        normalizer=normalizer,
    )
