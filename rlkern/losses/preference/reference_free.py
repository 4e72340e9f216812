"""SimPO, CPO and ORPO: preference losses without a reference, with the NLL that their papers add."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...checks import FINITE, check_choice, check_number
from .dpo import DPOOutput, dpo_loss

_NLL = {"token": "sft", "sequence": "sft_norm"}


def _with_nll(kind: str, chosen: Tensor, rejected: Tensor, nll_coef: float, nll: str, **options: Any) -> DPOOutput:
    check_number("nll_coef", nll_coef, 0, FINITE)
    check_choice("nll", nll, _NLL)
    types, weights = ((kind, _NLL[nll]), (1.0, nll_coef)) if nll_coef else ((kind,), (1.0,))
    return dpo_loss(chosen, rejected, None, None, loss_type=types, loss_weights=weights, **options)


def simpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    beta: float = 2.0,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
    *,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    nll_coef: float = 0.0,
    nll: str = "token",
    weights: Tensor | None = None,
) -> DPOOutput:
    """SimPO (arXiv 2405.14734, eq. 6): -log sigmoid(beta (x_c - x_r) - gamma), x the mean over a response.

    gamma is a margin of the rewards beta x, not of x: the authors' `gamma_beta_ratio` is gamma / beta. They
    use beta 2 to 10 and gamma 0.5 to 1.6. TRL, Liger and LLaMA-Factory start at beta 0.1. TRL and axolotl add
    an NLL of weight 1 unless cpo_alpha is 0: nll_coef=1.

    Args:
        policy_chosen_logps, policy_rejected_logps: [B] float, sums over the responses, with gradient.
        beta: > 0.
        gamma: >= 0.
        label_smoothing: eps in [0, 0.5), the rate of flipped labels: adds eps times the margin.
        chosen_lengths, rejected_lengths: [B] numbers of response tokens. An empty response counts as 1.
        nll_coef: weight >= 0 of the chosen responses' negative log-likelihood.
        nll: its mean over all their "token"s, the same in every entry, or over those of each "sequence".
        weights: [B] float, multiplied with the losses, detached.

    Returns:
        DPOOutput(losses, chosen_rewards, rejected_rewards), each [B], float32 (float64 if an input is).
        Rewards are beta x.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices and options other than the above.
    """
    lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
    options = {"beta": beta, "gamma": gamma, "label_smoothing": label_smoothing, "weights": weights}
    return _with_nll("simpo", policy_chosen_logps, policy_rejected_logps, nll_coef, nll, **lengths, **options)


def orpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    beta: float = 0.1,
    *,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    nll_coef: float = 1.0,
    nll: str = "sequence",
    weights: Tensor | None = None,
) -> DPOOutput:
    """ORPO (arXiv 2403.07691, eq. 6, 7): NLL - beta log sigmoid(log odds(x_c) - log odds(x_r)).

    x is the mean log-probability of a response's tokens, odds = e^x / (1 - e^x). Finite with finite slopes up
    to x_c = 0, where TRL's form is NaN. The slope by x_r is beta sigmoid(log q) / (1 - e^x_r), q the odds of
    the rejected response over those of the chosen one. It is large for a response that is nearly certain, and
    multiplies 1 - p of its tokens on the way to the logits. So log-probabilities must be float32 at least,
    and at most 0.

    Args:
        policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths, nll, weights: as in
            `simpo_loss`. TRL takes the NLL over prompt and response, "token" of `sft_labels=` in
            `dpo_loss_from_logits`.
        beta: weight of the odds ratio, > 0, the paper's lambda.
        nll_coef: weight of the NLL, >= 0.

    Returns:
        As `simpo_loss`.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices and options other than the above.
    """
    lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
    return _with_nll("orpo", policy_chosen_logps, policy_rejected_logps, nll_coef, nll, beta=beta, weights=weights, **lengths)


def cpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    *,
    chosen_lengths: Tensor | None = None,
    nll_coef: float = 1.0,
    nll: str = "token",
    weights: Tensor | None = None,
) -> DPOOutput:
    """CPO (arXiv 2401.08417, eq. 3): NLL - log sigmoid(beta (p_c - p_r)), p the sum over a response.

    Args:
        policy_chosen_logps, policy_rejected_logps, beta, label_smoothing, nll, weights: as in `simpo_loss`.
        chosen_lengths: [B] numbers of tokens, which the NLL needs.
        nll_coef: weight of the NLL, >= 0. At 0 it is `dpo_loss` with reference_free.

    Returns:
        As `simpo_loss`, but for rewards beta p.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices and options other than the above, and for missing
            lengths.
    """
    options = {"beta": beta, "label_smoothing": label_smoothing, "chosen_lengths": chosen_lengths, "weights": weights}
    return _with_nll("cpo", policy_chosen_logps, policy_rejected_logps, nll_coef, nll, **options)
