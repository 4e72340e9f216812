"""The losses of the DPO family, one small function each, on what they have in common: `Pairs`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ...backends.contract import LARGEST_EXPONENT
from ...primitives.kinks import bounded, excess

_SATURATED = 1e4  # sigmoid(-x) is zero here, in float64 too


class Pairs(NamedTuple):
    """A batch of preference pairs. Tensors are [B] in float32 or float64. Lengths may be None: not given."""

    policy_chosen: Tensor  # log pi(chosen)
    policy_rejected: Tensor  # log pi(rejected)
    policy_margin: Tensor  # log pi(chosen) - log pi(rejected)
    reference_margin: Tensor  # the same of the reference
    chosen: Tensor  # log pi / pi_ref of the chosen response
    rejected: Tensor  # of the rejected one
    chosen_score: Tensor  # chosen and rejected seen through the f-divergence
    rejected_score: Tensor
    margin: Tensor  # beta * (chosen_score - rejected_score), called u below
    chosen_lengths: Any
    rejected_lengths: Any
    sft_logps: Tensor  # log pi of the chosen sequences' tokens to imitate
    sft_lengths: Any  # their numbers
    beta: float
    label_smoothing: float
    gamma: float
    discopop_tau: float


# --- f-divergences: log ratio -> score (f-DPO, arXiv 2309.16240) --------------------------------------------


def reverse_kl(log_ratio: Tensor, alpha: float) -> Tensor:
    return log_ratio


def alpha_divergence(log_ratio: Tensor, alpha: float) -> Tensor:
    """ratio^(alpha - 1) / (alpha - 1). At alpha = 1 its varying part is the log ratio."""
    if abs(alpha - 1) < 1e-6:
        return log_ratio
    return bounded((alpha - 1) * log_ratio, high=LARGEST_EXPONENT).exp() / (alpha - 1)


def forward_kl(log_ratio: Tensor, alpha: float) -> Tensor:
    return alpha_divergence(log_ratio, 0.0)


def js_divergence(log_ratio: Tensor, alpha: float) -> Tensor:
    return logsigmoid(log_ratio)


F_DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
    "alpha_divergence": alpha_divergence,
}

# --- losses: Pairs -> [B] -----------------------------------------------------------------------------------


def _tilted(u: Tensor, slope: float) -> Tensor:
    """-log sigmoid(u) + slope * u, without cancellation.

    DPO has slope 0, conservative DPO eps, robust DPO -eps / (1 - 2 eps).
    """
    loss = -logsigmoid(u)
    if not slope:
        return loss
    return torch.where(u == -math.inf, (slope - 1) * u, loss + slope * u)  # the limit, not inf - inf


def sigmoid(p: Pairs) -> Tensor:
    return _tilted(p.margin, p.label_smoothing)


def robust(p: Pairs) -> Tensor:
    return _tilted(p.margin, -p.label_smoothing / (1 - 2 * p.label_smoothing))


def _token_margin(p: Pairs) -> Tensor:
    """The difference of the scores per token; an empty response has one."""
    return p.chosen_score / p.chosen_lengths.clamp(min=1) - p.rejected_score / p.rejected_lengths.clamp(min=1)


def sigmoid_norm(p: Pairs) -> Tensor:
    return -logsigmoid(p.beta * _token_margin(p))


def hinge(p: Pairs) -> Tensor:
    return excess(1 - p.margin)


def ipo(p: Pairs) -> Tensor:
    return (p.chosen_score - p.rejected_score - 0.5 / p.beta).square()


def ipo_norm(p: Pairs) -> Tensor:
    return (_token_margin(p) - 0.5 / p.beta).square()


def exo_pair(p: Pairs) -> Tensor:
    # The loss has finite limits, its terms have not.
    u, eps = bounded(p.margin, -_SATURATED, _SATURATED), p.label_smoothing
    return torch.sigmoid(u) * (logsigmoid(u) - math.log1p(-eps)) + torch.sigmoid(-u) * (logsigmoid(-u) - math.log(eps))


def nca_pair(p: Pairs) -> Tensor:
    chosen, rejected = p.beta * p.chosen_score, p.beta * p.rejected_score
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def bco_pair(p: Pairs) -> Tensor:
    return -logsigmoid(p.beta * p.chosen_score) - logsigmoid(-p.beta * p.rejected_score)


def sppo_hard(p: Pairs) -> Tensor:
    return (p.chosen_score - 0.5 / p.beta).square() + (p.rejected_score + 0.5 / p.beta).square()


def _sorted(x: Tensor) -> Tensor:
    """Stable: of equal entries the first takes the gradient of the first rank, on every device."""
    return x.sort(stable=True).values


def aot(p: Pairs) -> Tensor:
    gap = _sorted(p.policy_margin) - _sorted(p.reference_margin)
    return _tilted(p.beta * gap, p.label_smoothing)


def aot_unpaired(p: Pairs) -> Tensor:
    gap = _sorted(p.chosen) - _sorted(p.rejected)
    return _tilted(p.beta * gap, p.label_smoothing)


def apo_zero(p: Pairs) -> Tensor:
    return torch.sigmoid(-p.beta * p.chosen) + torch.sigmoid(p.beta * p.rejected)


def apo_down(p: Pairs) -> Tensor:
    return torch.sigmoid(p.beta * p.chosen) + torch.sigmoid(-p.margin)


def discopop(p: Pairs) -> Tensor:
    u = bounded(p.margin, -_SATURATED, _SATURATED)
    gate = u / p.discopop_tau
    # exp(-u) * sigmoid(gate) as one exponential. Where one factor overflows, the other vanishes.
    return -logsigmoid(p.margin) * torch.sigmoid(-gate) + torch.exp(logsigmoid(gate) - u)


def sft(p: Pairs) -> Tensor:
    token_mean = -p.sft_logps.sum() / p.sft_lengths.sum().clamp(min=1)
    return token_mean.expand(p.sft_logps.shape).clone()  # a caller may write into it


def sft_norm(p: Pairs) -> Tensor:
    return -p.sft_logps / p.sft_lengths.clamp(min=1)


# --- without a reference ------------------------------------------------------------------------------------


def token_means(p: Pairs) -> tuple[Tensor, Tensor]:
    """Mean log-probabilities of the responses' tokens; an empty response has one, of 0."""
    return p.policy_chosen / p.chosen_lengths.clamp(min=1), p.policy_rejected / p.rejected_lengths.clamp(min=1)


def sums(p: Pairs) -> tuple[Tensor, Tensor]:
    return p.policy_chosen, p.policy_rejected


def simpo(p: Pairs) -> Tensor:
    chosen, rejected = token_means(p)
    return _tilted(p.beta * (chosen - rejected) - p.gamma, p.label_smoothing)


def cpo(p: Pairs) -> Tensor:
    return _tilted(p.beta * (p.policy_chosen - p.policy_rejected), p.label_smoothing)


_LEAST_COMPLEMENT = 1e-30  # of a probability that rounds to 1, so that its logarithm and reciprocal exist
_LOG_HALF = math.log(0.5)


def _complement(logp: Tensor, least: float) -> Tensor:
    """1 - exp(logp), at least `least`; the slope is -exp(logp) there too."""
    complement = -torch.expm1(logp)
    return torch.where(complement < least, least + (complement - complement.detach()), complement)


def log_odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """log(odds(chosen) / odds(rejected)) of log-probabilities, inf where the chosen one is 0."""
    return chosen - rejected - _complement(chosen, 0).log() + _complement(rejected, _LEAST_COMPLEMENT).log()


def odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log sigmoid(log_odds_ratio), with finite slopes up to log-probabilities of 0.

    q is the odds of the rejected response over those of the chosen one. Where the chosen one is likely, q has
    a finite slope and log q has not, so log(1 + q) is taken of q. Elsewhere q may overflow: it is taken of
    log q. Where one form holds the other is given a number of its own range: a product of 0 and inf is NaN.
    """
    likely = chosen > _LOG_HALF
    least = _complement(rejected, _LEAST_COMPLEMENT).log()
    near, far = torch.where(likely, chosen, _LOG_HALF), torch.where(likely, _LOG_HALF, chosen)
    q = (rejected - near - least).exp() * _complement(near, 0)
    log_q = rejected - far - least + _complement(far, 0).log()
    return torch.where(likely, q.log1p(), -logsigmoid(-log_q))


def orpo(p: Pairs) -> Tensor:
    return p.beta * odds_ratio(*token_means(p))


class PairLoss(NamedTuple):
    """A loss, and which options it listens to.

    These are "label_smoothing", "f_divergence", "gamma", "chosen_lengths" and "rejected_lengths".
    """

    function: Callable[[Pairs], Tensor]
    uses: tuple[str, ...] = ("f_divergence",)
    sorts_batch: bool = False  # entry i is no longer pair i
    policy_only: bool = False  # takes no reference
    imitates: bool = False  # of the tokens of sft_labels
    reward: Callable[[Pairs], tuple[Tensor, Tensor]] | None = None  # over beta, if there can be no reference


_LENGTHS = ("chosen_lengths", "rejected_lengths")

PAIR_LOSSES: dict[str, PairLoss] = {
    "sigmoid": PairLoss(sigmoid, ("label_smoothing", "f_divergence")),
    "robust": PairLoss(robust, ("label_smoothing", "f_divergence")),
    "sigmoid_norm": PairLoss(sigmoid_norm, ("f_divergence", *_LENGTHS)),
    "hinge": PairLoss(hinge),
    "ipo": PairLoss(ipo),
    "ipo_norm": PairLoss(ipo_norm, ("f_divergence", *_LENGTHS)),
    "exo_pair": PairLoss(exo_pair, ("label_smoothing", "f_divergence")),
    "nca_pair": PairLoss(nca_pair),
    "bco_pair": PairLoss(bco_pair),
    "sppo_hard": PairLoss(sppo_hard),
    "aot": PairLoss(aot, ("label_smoothing",), sorts_batch=True),
    "aot_unpaired": PairLoss(aot_unpaired, ("label_smoothing",), sorts_batch=True),
    "apo_zero": PairLoss(apo_zero, ()),
    "apo_down": PairLoss(apo_down),
    "discopop": PairLoss(discopop),
    "sft": PairLoss(sft, ("chosen_lengths",), policy_only=True, imitates=True),
    "sft_norm": PairLoss(sft_norm, ("chosen_lengths",), policy_only=True, imitates=True),
    "simpo": PairLoss(simpo, ("label_smoothing", "gamma", *_LENGTHS), policy_only=True, reward=token_means),
    "cpo": PairLoss(cpo, ("label_smoothing",), policy_only=True, reward=sums),
    "orpo": PairLoss(orpo, _LENGTHS, policy_only=True, reward=token_means),
}
