"""Boundary-guided policy optimisation of masked-diffusion models, "diffusion BGPO" (arXiv 2510.11683).

And the exact objective that it bounds. Of sequence b, Monte-Carlo draw j has the ELBO estimate ell_j
(`masked_elbo`), the weight omega_j (the draws of a sequence sum to 1) and the log ratio d_j = s (ell_j - old
ell_j). The objective is A exp(sum_j omega_j d_j). BGPO maximises a lower bound that is a sum over the draws:

    A >= 0:  sum_j omega_j A (1 + d_j)         A < 0:  sum_j omega_j A exp(d_j)                Eq. 13, 14

So each draw is backpropagated by itself, and memory does not grow with their number. Value and gradient of
the bound are those of the objective where all d_j are 0. Other papers call other methods BGPO (2106.12112,
2511.18919).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.contract import LARGEST_EXPONENT
from ..checks import computing_dtype, expect
from ..operator import values_readable
from ..primitives.elbo import ELBORows, elbo_rows
from ..primitives.kinks import bounded
from ..primitives.kl import ESTIMATES
from ..primitives.packing import Packed
from ..primitives.ratio import clipped_surrogate
from .options import Given, Options, advantage_vector, bgpo_options, factor, other_elbo, scale_factor


class BGPOStats(NamedTuple):
    """Of one call, detached, on the device. All are [B] but token_logp."""

    ell: Tensor  # the ELBO of this draw
    d: Tensor  # its log ratio to the old one, times ratio_scale; 0 on-policy
    ratio: Tensor  # what the clip bounds: 1 + d where A > 0, exp(d) elsewhere, before the clip
    clipped: Tensor  # 1 where a bound (clip, dual_clip or max_log_ratio) stops the gradient, else 0
    token_logp: Tensor  # shaped like targets, 0 where not counted: the old_token_logp of a later update


class BGPOOutput(NamedTuple):
    """loss: 0-d, carries the gradient, to be summed over the draws.
    stats: see `BGPOStats`.
    """

    loss: Tensor
    stats: BGPOStats


def check_elbo(ell: Tensor) -> None:
    """Raises ValueError for an ELBO of -inf."""
    if values_readable(ell) and ell.isneginf().any():
        raise ValueError(
            f"a counted target has logit -inf, probability 0, in sequences {ell.isneginf().nonzero().flatten().tolist()}: "
            "keep positions whose clean token the model forbids (the mask token itself) out of mask"
        )


def check_old(old_elbo: Tensor | None, old_token_logp: Tensor | None, rows: ELBORows, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Both detached and in the dtype of the computation. At most one is given."""
    if old_elbo is not None and old_token_logp is not None:
        raise ValueError("give old_elbo or old_token_logp, not both: they say the same")
    return other_elbo("old_elbo", old_elbo, like), None if old_token_logp is None else rows.old(old_token_logp)


def log_ratio(ell: Tensor, token_logp: Tensor, old_elbo: Tensor | None, old_token_logp: Tensor | None, rows: ELBORows) -> Tensor:
    """ell - old ell, [B]. Token by token where the old log-probabilities are given; 0 on-policy."""
    if old_token_logp is not None:
        return rows.sums(token_logp - old_token_logp)
    return ell - (ell.detach() if old_elbo is None else old_elbo)


class Surrogate(NamedTuple):
    value: Tensor  # [B]: A * ratio after the clip, with the gradient by d
    ratio: Tensor  # [B]: before the clip
    stopped: Tensor  # bool [B]: a bound stops the gradient


def surrogate(d: Tensor, advantages: Tensor, options: Options, *, bound: bool) -> Surrogate:
    """PPO's clipped A * ratio. The ratio is exp(d), or with `bound`, where A > 0, 1 + d.

    Where A = 0, value and gradient are 0 for any d, infinite ones included.
    """
    low, high = options.clip
    d = torch.where(advantages == 0, 0, d)  # selected: a product with 0 would turn an infinite ratio into NaN
    ratio = bounded(d, high=options.max_log_ratio).exp()  # bounded before exp: the clip never meets an infinite one
    stopped = d > options.max_log_ratio
    if bound:
        ratio = torch.where(advantages > 0, 1 + d, ratio)
        stopped = stopped & (advantages < 0)
    value = -clipped_surrogate(ratio, advantages, low, high, options.dual_clip)
    ratio = ratio.detach()
    stopped = stopped | torch.where(advantages < 0, ratio < 1 - low, (advantages > 0) & (ratio > 1 + high))
    if options.dual_clip is not None:
        stopped = stopped | ((advantages < 0) & (ratio > options.dual_clip))
    return Surrogate(value, ratio, stopped)


_KL_SLOPES = {  # the derivatives of the estimates
    "k1": torch.ones_like,
    "k2": lambda x: x,
    "k3": lambda x: torch.where(x < -LARGEST_EXPONENT, 0, -torch.expm1(-x)),
}


class Exact(NamedTuple):
    """Without gradient."""

    value: Tensor  # [B]: the objective A exp(d), clipped, minus the KL penalty
    slope: Tensor  # [B]: its derivative by d
    stopped: Tensor  # bool [B]: a bound stops the policy's part


@torch.no_grad()
def exact_objective(d: Tensor, delta: Tensor | None, advantages: Tensor, options: Options) -> Exact:
    """d, delta: the log ratios to the old policy and to the reference (None: no penalty).

    They differ by a constant, so one derivative serves both.
    """
    value, ratio, stopped = surrogate(d, advantages, options, bound=False)
    slope = torch.where(stopped, 0, advantages * ratio)
    if delta is not None:
        value = value - options.kl_coef * ESTIMATES[options.kl](delta)
        slope = slope - options.kl_coef * _KL_SLOPES[options.kl](delta)
    return Exact(value, slope, stopped)


def bgpo_loss(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor,
    advantages: Tensor,
    old_elbo: Tensor | None = None,
    *,
    mc_weight: float | Tensor,
    mask: Tensor | Packed | None = None,
    seq_weight: float | Tensor | None = None,
    ratio_scale: float | Tensor | None = None,
    clip: tuple[float, float] | None = None,
    dual_clip: float | None = None,
    max_log_ratio: float = 20.0,
    preset: str | None = None,
    lengths: Tensor | None = None,
    response_width: int | None = None,
    ref_elbo: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: str = "k2",
    old_token_logp: Tensor | None = None,
    seq_idx: Tensor | None = None,
    num_seqs: int | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
) -> BGPOOutput:
    """The diffusion BGPO loss of one Monte-Carlo draw a sequence (arXiv 2510.11683, Eq. 13-19).

    Backpropagate each draw's loss, and step once after all. With c = seq_weight, omega = mc_weight, s =
    ratio_scale and d = s (ell - old ell), the loss is -sum_b c_b omega_b g_b plus the KL penalty:

        A > 0:  g = A min(1 + d, 1 + clip[1])
        A < 0:  g = A min(max(exp(min(d, max_log_ratio)), 1 - clip[0]), dual_clip)
        A = 0:  g = 0, exactly
        KL:     + c omega kl_coef f(s (ell - ref ell))
        f(x) =  x for kl="k1", x^2 / 2 for "k2", exp(-x) + x - 1 for "k3"

    No gradient flows where a bound is exceeded. The sum over the draws is a lower bound of the exact
    objective, clipped alike, with any of the KL penalties; dual_clip breaks that where A < 0. On-policy the
    expected gradient of k2 is that of KL(pi || ref), that of k3 is that of KL(ref || pi), and that of k1 is
    0, as far as an ELBO is a log-probability. For A > 0 without clip the old policy does not enter the
    gradient. Draws of several samples, or of several sequences, may share a call in any grouping: a draw is
    just a sequence here, with its own mc_weight.

    The paper and the code that follows it do not normalise alike, so there is no default. Options given win
    over the preset:

        preset          ratio_scale           seq_weight          clip        dual_clip
        "paper"         1                     1 / B               none        none
        "reference"     1 / response_width    lengths / sum       0.2, 0.2    3           yjyddq/DARE
        "recommended"   1 / lengths           1 / B               0.2, 0.2    none        off-policy

    With ratio_scale=1, d is a sum over the response. At 512 tokens kernel noise in bfloat16 logits alone
    moves it by tenths, and exp(d) explodes off-policy. B and the sum are those of the call. With several
    micro-batches, data-parallel processes or stacked draws give seq_weight yourself: 1 over the number of
    sequences of the whole step, times the number of processes where gradients are averaged. clip=(1.0,
    math.inf) clips nothing.

    Args:
        logits, targets, weight, mask, seq_idx, num_seqs, temperature, ignore_index, inplace_backward: of the
            draw, as in `masked_elbo`.
        advantages: [B] or [B, 1] float, finite. They, mc_weight, seq_weight and ratio_scale must not require
            grad.
        old_elbo: [B] float, detached: the ELBO of the same draw (same mask, same weight, dropout off) under
            the policy that produced the data. None: on-policy. d = 0 exactly, the gradient flows, and no pass
            of the old policy is needed.
        mc_weight: omega, a number or [B], in [0, 1]: 1/n for n draws a sequence; the draws of a sequence sum
            to 1.
        seq_weight: c, a number or [B], >= 0.
        ratio_scale: s, a number or [B], >= 0; an infinite entry (1/L of an empty response) counts as 0.
        clip: (low, high): the ratio stops mattering below 1 - low (A < 0) and above 1 + high (A > 0). low in
            [0, 1].
        dual_clip: the ratio stops mattering above it where A < 0; >= 1.
        max_log_ratio: bounds the exponent where A < 0; no gradient beyond. In [0, 80].
        lengths: [B] numbers of response tokens, for the presets.
        response_width: the padded number of response tokens, for "reference".
        ref_elbo: [B] float, the reference model's ELBO of the same draw, detached.
        kl_coef, kl: >= 0; "k1", "k2" or "k3".
        old_token_logp: shaped like targets, in place of old_elbo: the old policy's log-probabilities of the
            same draw, detached. d then keeps the digits that the difference of two long sums loses.

    Returns:
        BGPOOutput(loss, stats): 0-d, float32 (float64 for float64 logits), connected to the graph even where
        nothing counts; `BGPOStats`.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices, names and options other than the above. On a CPU
        (on a GPU with RLKERN_DEBUG=1) also for advantages or weights out of range and for counted targets
        with logit -inf. Otherwise as `masked_elbo`.
    """
    rows = elbo_rows(logits, targets, weight, mask=mask, seq_idx=seq_idx, num_seqs=num_seqs, ignore_index=ignore_index)
    like = rows.weight.new_empty(rows.num_seqs)
    advantages = advantage_vector(advantages, like)
    old_elbo, old_token_logp = check_old(old_elbo, old_token_logp, rows, like)
    ref_elbo = other_elbo("ref_elbo", ref_elbo, like)
    given = Given(
        seq_weight=seq_weight,
        ratio_scale=ratio_scale,
        clip=clip,
        dual_clip=dual_clip,
        max_log_ratio=max_log_ratio,
        ref_elbo=ref_elbo,
        kl_coef=kl_coef,
        kl=kl,
        preset=preset,
        lengths=lengths,
        response_width=response_width,
    )
    options = bgpo_options(given, like)
    share = factor("seq_weight", options.seq_weight, like) * factor("mc_weight", mc_weight, like, 1)
    scale = scale_factor(options.ratio_scale, like)

    token_logp = rows.token_logp(logits, temperature=temperature, inplace_backward=inplace_backward)
    ell = rows.sums(token_logp)
    check_elbo(ell)
    d = scale * log_ratio(ell, token_logp, old_elbo, old_token_logp, rows)
    objective = surrogate(d, advantages, options, bound=True)
    loss = -objective.value
    if ref_elbo is not None:
        loss = loss + kl_coef * ESTIMATES[kl](scale * (ell - ref_elbo))
    stats = BGPOStats(ell.detach(), d.detach(), objective.ratio, objective.stopped.to(ell.dtype), token_logp.detach())
    return BGPOOutput((share * loss).sum(), stats)


@torch.no_grad()
def elbo_coeff(
    elbo: Tensor,
    old_elbo: Tensor | None,
    advantages: Tensor,
    *,
    ratio_scale: float | Tensor,
    clip: tuple[float, float] | None = None,
    dual_clip: float | None = None,
    max_log_ratio: float = 20.0,
    ref_elbo: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: str = "k2",
) -> Tensor:
    """The derivative q of the exact ELBO objective: its gradient in two passes, constant memory, no bound.

    With B = sum_j omega_j ell_j and d = s (B - old B) the objective of a sequence is A exp(d), clipped as PPO
    clips its ratio, minus kl_coef f(s (B - ref B)). q is its derivative by s B. A first pass without gradient
    sums B over the draws. The second backpropagates, one draw at a time,

        loss_j = -(c * q * omega_j * s * masked_elbo(draw j)).sum()

    That is one forward a draw more than BGPO. On-policy neither B nor a first pass is needed: q = A.

    Args:
        elbo: [B] float, summed over all draws.
        old_elbo, ref_elbo: [B] float, the same sum over the same draws under the old policy and the
            reference. old_elbo=None: on-policy.
        advantages, ratio_scale, clip, dual_clip, max_log_ratio, kl_coef, kl: as in `bgpo_loss`, but the ratio
            is exp(d) for either sign of A.

    Returns:
        [B] like elbo, without gradient; 0 where A = 0 or a bound is exceeded (the KL's part stays).

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices and options other than the above.
    """
    expect("elbo", elbo, "float", "[B] (one a sequence)")
    elbo = elbo.to(computing_dtype(elbo))
    given = Given(
        seq_weight=1.0,
        ratio_scale=ratio_scale,
        clip=clip,
        dual_clip=dual_clip,
        max_log_ratio=max_log_ratio,
        ref_elbo=ref_elbo,
        kl_coef=kl_coef,
        kl=kl,
    )
    options = bgpo_options(given, elbo)
    scale, advantages = scale_factor(options.ratio_scale, elbo), advantage_vector(advantages, elbo)
    old_elbo, ref_elbo = other_elbo("old_elbo", old_elbo, elbo), other_elbo("ref_elbo", ref_elbo, elbo)
    d = scale * (elbo - (elbo if old_elbo is None else old_elbo))
    delta = None if ref_elbo is None else scale * (elbo - ref_elbo)
    return exact_objective(d, delta, advantages, options).slope
