"""Direct preference optimisation (arXiv 2305.18290) and its family, from log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...checks import expect, expect_alike
from .dpo_options import Options, check_options
from .dpo_types import F_DIVERGENCES, PAIR_LOSSES, Pairs


class DPOOutput(NamedTuple):
    """Each [B], one entry a pair. The rewards are detached.

    They are beta log(policy / reference), and for "simpo" and "orpo" beta times the mean log-probability of a
    token, for "cpo" beta times that of the response.
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def pair_losses(policy, reference, sft, lengths, weights, o: Options) -> DPOOutput:
    """The losses of checked [B] tensors of one dtype. policy, reference and lengths are (chosen, rejected).

    sft: (log pi, number) of the tokens that "sft" and "sft_norm" imitate. The reference is detached.
    """
    scores, policy_given = (policy[0] - reference[0], policy[1] - reference[1]), policy
    if weights is not None:  # of weight 0 an impossible response does not count: it may have no ratio at all
        policy, reference = ([torch.where(weights == 0, 0, x) for x in pair] for pair in (policy, reference))
    chosen, rejected = policy[0] - reference[0], policy[1] - reference[1]
    policy_margin, reference_margin = policy[0] - policy[1], reference[0] - reference[1]
    if o.reference_free:
        (chosen, rejected), reference_margin = policy, torch.zeros_like(reference_margin)
    score = F_DIVERGENCES[o.f_divergence]
    chosen_score, rejected_score = score(chosen, o.f_alpha), score(rejected, o.f_alpha)
    margin = o.beta * (chosen_score - rejected_score)
    margins = (policy_margin, reference_margin, chosen, rejected, chosen_score, rejected_score, margin)
    tokens = (lengths[0], lengths[1], sft[0], sft[1])
    pairs = Pairs(policy[0], policy[1], *margins, *tokens, o.beta, o.label_smoothing, o.gamma, o.discopop_tau)
    for name in o.without_reference()[:1]:
        given = pairs._replace(policy_chosen=policy_given[0], policy_rejected=policy_given[1])
        scores = PAIR_LOSSES[name].reward(given)  # type: ignore[misc]  # it is what without_reference asks for
    rewards = [(o.beta * score).detach() for score in scores]
    terms = ((PAIR_LOSSES[name].function(pairs), weight) for name, weight in zip(o.loss_types, o.loss_weights, strict=True))
    losses = reduce(torch.add, (loss if weight == 1 else weight * loss for loss, weight in terms))
    if weights is not None:  # what is imitated may have an infinite loss
        losses = torch.where(weights == 0, 0, losses * weights)
    return DPOOutput(losses, *rewards)


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor | None,
    reference_rejected_logps: Tensor | None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    ipo: bool = False,
    reference_free: bool = False,
    *,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    discopop_tau: float = 0.05,
    gamma: float | None = None,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    weights: Tensor | None = None,
) -> DPOOutput:
    """Preference losses from log-probabilities of responses, called as the original code's `preference_loss`.

    a and b are log(policy / reference) of the chosen and of the rejected response. S_c and S_r are the same
    seen through the f-divergence. u = beta * (S_c - S_r), ls = log sigmoid, eps = label_smoothing, and len is
    the length of a response, at least 1.

        "sigmoid"        -ls(u) + eps u                                            DPO, arXiv 2305.18290
        "robust"         -ls(u) - eps/(1-2eps) u                                   rDPO, 2403.00409
        "sigmoid_norm"   -ls(beta (S_c/len_c - S_r/len_r))                         TRL
        "hinge"          max(0, 1 - u), no gradient at u = 1                       SLiC, 2305.10425
        "ipo"            (S_c - S_r - 1/(2 beta))^2, sums as in the paper          2310.12036
        "ipo_norm"       (S_c/len_c - S_r/len_r - 1/(2 beta))^2                    what TRL calls "ipo"
        "exo_pair"       KL((sigmoid(u), sigmoid(-u)) || (1-eps, eps)), eps > 0    2402.00856
        "nca_pair"       -ls(beta S_c) - ls(-beta S_c)/2 - ls(-beta S_r)/2         2402.05369
        "bco_pair"       -ls(beta S_c) - ls(-beta S_r)                             2404.04656
        "sppo_hard"      (S_c - 1/(2 beta))^2 + (S_r + 1/(2 beta))^2               2405.00675
        "aot"            "sigmoid" of beta (sort(policy margins) - sort(reference margins))    2406.05882
        "aot_unpaired"   "sigmoid" of beta (sort(a) - sort(b))                     2406.05882
        "apo_zero"       sigmoid(-beta a) + sigmoid(beta b)                        2408.06266
        "apo_down"       sigmoid(beta a) + sigmoid(-u)                             2408.06266
        "discopop"       -ls(u) (1 - k) + exp(-u) k, k = sigmoid(u/discopop_tau)   2406.08414
        "sft"            mean of -log pi over the chosen tokens of the batch       TRL
        "sft_norm"       -log pi(chosen)/len_c                                     ORPO's code

    Without a reference, with p = log pi of a response and x = p/len:

        "simpo"          -ls(v) + eps v, v = beta (x_c - x_r) - gamma              2405.14734
        "cpo"            -ls(v) + eps v, v = beta (p_c - p_r)                      2401.08417
        "orpo"           -beta ls(psi(x_c) - psi(x_r)), psi(x) = x - log(1-e^x)    2403.07691

    "sigmoid" with eps > 0 is conservative DPO, -(1-eps) ls(u) - eps ls(-u). TRL's "sigmoid" ignores eps.
    "robust" is unbiased under labels flipped at rate eps. "ipo" is also the original code's. "bco_pair" has
    no running reward shift. Entry i of both "aot" is the i-th of the order, no pair. "sft" has the same
    number in every entry. Only "sigmoid", "robust", "exo_pair", the two "aot", "simpo" and "cpo" listen to
    label_smoothing. "orpo" is finite with finite slopes at x_c = 0, as is its slope at x_r near 0, 1/(1-e^x),
    down to 1 - e^x = 1e-30. It needs log-probabilities of at most 0. `simpo_loss`, `cpo_loss` and `orpo_loss`
    are the three with what their papers add.

    f-divergences (f-DPO, arXiv 2309.16240), of the log ratio a: reverse_kl a; forward_kl -exp(-a);
    js_divergence log sigmoid(a); alpha_divergence exp((f_alpha-1) a)/(f_alpha-1), a itself at f_alpha = 1.
    Exponents stop at 80. "aot", "aot_unpaired", "apo_zero" and the first term of "apo_down" take a and b.

    TRL 1.16 adds constants so that the divergences are 0 at a = 0. That matters where lengths divide them, in
    "sigmoid_norm" and "ipo_norm". It also gives a and b to "nca_pair", "bco_pair", "sppo_hard" and all of
    "apo_down".

    Args:
        policy_chosen_logps, policy_rejected_logps: [B] float; gradients flow into these.
        reference_chosen_logps, reference_rejected_logps: [B] float, used detached. Both may be None with
            reference_free, and if no loss in use takes a reference. "simpo", "cpo" and "orpo" refuse them.
        beta: strength of the pull towards the reference, > 0.
        label_smoothing: eps above, in [0, 0.5).
        ipo: the original code's switch for loss_type="ipo".
        reference_free: the losses take the reference for uniform. The rewards use it where it is given, as
            the original code's do.
        loss_type: a name of the table, or several: their sum, weighted by loss_weights (1 each by default).
        gamma: target margin of "simpo", >= 0, counted in the units of the margin beta (x_c - x_r). None is
            0.5.
        chosen_lengths, rejected_lengths: [B] numbers of response tokens, for "sigmoid_norm", "ipo_norm",
            "simpo" and "orpo", and for "sft" and "sft_norm" the chosen ones. An empty response counts as 1.
        weights: [B] float, multiplied with the losses, detached (WPO, arXiv 2406.11827; importance weights).
            Not with "aot", "aot_unpaired".

    Returns:
        DPOOutput(losses, chosen_rewards, rejected_rewards), each [B], float32 (float64 if an input is). All
        arithmetic is in that dtype. Log-probabilities of -inf are legal where the loss has a limit; -inf in
        both policy and reference is NaN.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices, names and options other than the above, for
        missing lengths, for label_smoothing, gamma or f_divergence where no loss type in use listens to it,
        and for a reference beside a loss type that has none.
    """
    options = check_options(
        beta=beta,
        label_smoothing=label_smoothing,
        ipo=ipo,
        reference_free=reference_free,
        loss_type=loss_type,
        loss_weights=loss_weights,
        gamma=gamma,
        f_divergence=f_divergence,
        f_alpha=f_alpha,
        discopop_tau=discopop_tau,
    )
    options.refuse_references(reference_chosen_logps=reference_chosen_logps, reference_rejected_logps=reference_rejected_logps)
    given: dict[str, Any] = {"policy_chosen_logps": policy_chosen_logps, "policy_rejected_logps": policy_rejected_logps}
    if not (options.references_optional() and reference_chosen_logps is None and reference_rejected_logps is None):
        given.update(reference_chosen_logps=reference_chosen_logps, reference_rejected_logps=reference_rejected_logps)
        if reference_chosen_logps is None or reference_rejected_logps is None:
            name = "reference_chosen_logps" if reference_chosen_logps is None else "reference_rejected_logps"
            raise TypeError(f"{name} must be a float tensor [B], got None (both references may be None with reference_free=True)")
    expect_alike("float", "[B] (one log-probability a sequence)", **given)
    _check_extras(policy_chosen_logps, chosen_lengths, rejected_lengths, weights, options)

    dtype = torch.float64 if torch.float64 in [x.dtype for x in given.values()] else torch.float32
    policy = [x.to(dtype) for x in (policy_chosen_logps, policy_rejected_logps)]
    references = (reference_chosen_logps, reference_rejected_logps)
    reference = [torch.zeros_like(p) if r is None else r.detach().to(dtype) for p, r in zip(policy, references, strict=True)]
    lengths = [None if x is None else x.to(dtype) for x in (chosen_lengths, rejected_lengths)]
    weights = None if weights is None else weights.detach().to(dtype)
    return pair_losses(policy, reference, (policy[0], lengths[0]), lengths, weights, options)


def _check_extras(logps, chosen_lengths, rejected_lengths, weights, options: Options) -> None:
    """Lengths and weights must be like the log-probabilities, and there where they are needed."""
    like = ("policy_chosen_logps", logps)
    for name, lengths in {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}.items():
        if lengths is not None:
            expect(name, lengths, "real", "[B]", like=like)
        elif options.uses(name):
            raise ValueError(f"loss_type {options.uses(name)[0]!r} needs {name}= [B], the numbers of response tokens")
    if weights is not None:
        expect("weights", weights, "float", "[B]", like=like)
        options.refuse_sorted("weights")
