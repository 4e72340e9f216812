"""Direct preference optimisation (arXiv 2305.18290) and its family, from log-probabilities or logits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...checks import FINITE, check_choice, check_flags, check_number, check_positive, expect, expect_alike
from ...primitives.sequence import check_labels, next_tokens
from ...primitives.token_stats import token_stats
from .dpo_types import F_DIVERGENCES, PAIR_LOSSES, Pairs


class DPOOutput(NamedTuple):
    """Each [B], one entry a pair. The rewards beta * log(policy / reference) are detached."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


class _Options(NamedTuple):
    beta: float
    label_smoothing: float
    loss_types: tuple[str, ...]
    loss_weights: tuple[float, ...]
    f_divergence: str
    f_alpha: float
    discopop_tau: float
    reference_free: bool

    def uses(self, option: str) -> list[str]:
        """The loss types in use that listen to the option."""
        return [name for name in self.loss_types if option in PAIR_LOSSES[name].uses]

    def refuse_sorted(self, what: str) -> None:
        for name in self.loss_types:
            if PAIR_LOSSES[name].sorts_batch:
                raise ValueError(f"loss_type {name!r} sorts the batch, so its entries belong to no pair: it cannot be combined with {what}")


def _sequence(name: str, value: Sequence[Any]) -> tuple:
    if not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence, got {type(value).__name__}")
    return tuple(value)


def _loss_types(loss_type: str | Sequence[str], ipo: bool) -> tuple[str, ...]:
    names = (loss_type,) if isinstance(loss_type, str) else _sequence("loss_type", loss_type)
    if ipo:
        if names not in (("sigmoid",), ("ipo",)):
            raise ValueError(f"ipo=True stands for loss_type='ipo', got loss_type={loss_type!r} as well")
        return ("ipo",)
    if not names:
        raise ValueError("loss_type is an empty sequence, expected at least one name")
    for name in names:
        check_choice("loss_type", name, PAIR_LOSSES)
    return names


def _loss_weights(loss_weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    if loss_weights is None:
        return (1.0,) * count
    weights = _sequence("loss_weights", loss_weights)
    if len(weights) != count:
        raise ValueError(f"loss_weights must have one entry for each of the {count} loss types, got {len(weights)}")
    for weight in weights:
        check_number("loss_weights", weight, -FINITE, FINITE)
    return weights


def _options(beta, label_smoothing, ipo, reference_free, loss_type, loss_weights, f_divergence, f_alpha, discopop_tau) -> _Options:
    """The options checked. One that nothing listens to is a mistake, which would otherwise stay unseen."""
    check_positive("beta", beta, FINITE)
    check_positive("discopop_tau", discopop_tau, FINITE)
    check_number("f_alpha", f_alpha, -FINITE, FINITE)
    check_number("label_smoothing", label_smoothing)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is the rate of flipped labels, 0 <= label_smoothing < 0.5, got {label_smoothing}")
    check_flags(ipo=ipo, reference_free=reference_free)
    check_choice("f_divergence", f_divergence, F_DIVERGENCES)
    names = _loss_types(loss_type, ipo)
    weights = _loss_weights(loss_weights, len(names))
    options = _Options(beta, label_smoothing, names, weights, f_divergence, f_alpha, discopop_tau, reference_free)
    what = "ipo=True" if ipo else f"loss_type {loss_type!r}"
    if label_smoothing > 0 and not options.uses("label_smoothing"):
        raise ValueError(f"{what} takes no label_smoothing, got {label_smoothing}")
    if f_divergence != "reverse_kl" and not options.uses("f_divergence"):
        raise ValueError(f"{what} takes no f_divergence, got {f_divergence!r}")
    if "exo_pair" in names and label_smoothing == 0:
        raise ValueError("loss_type 'exo_pair' needs label_smoothing > 0 (its paper: 1e-3), got 0")
    return options


def _pair_losses(policy, reference, sft_logps, lengths, weights, o: _Options) -> DPOOutput:
    """The losses of checked [B] tensors of one dtype. policy, reference and lengths are (chosen, rejected).

    The reference is detached.
    """
    chosen, rejected = policy[0] - reference[0], policy[1] - reference[1]
    rewards = [(o.beta * log_ratio).detach() for log_ratio in (chosen, rejected)]
    policy_margin, reference_margin = policy[0] - policy[1], reference[0] - reference[1]
    if o.reference_free:
        (chosen, rejected), reference_margin = policy, torch.zeros_like(reference_margin)
    score = F_DIVERGENCES[o.f_divergence]
    chosen_score, rejected_score = score(chosen, o.f_alpha), score(rejected, o.f_alpha)
    margin = o.beta * (chosen_score - rejected_score)
    margins = (policy_margin, reference_margin, chosen, rejected, chosen_score, rejected_score, margin)
    pairs = Pairs(*margins, sft_logps, lengths[0], lengths[1], o.beta, o.label_smoothing, o.discopop_tau)
    terms = ((PAIR_LOSSES[name].function(pairs), weight) for name, weight in zip(o.loss_types, o.loss_weights, strict=True))
    losses = reduce(torch.add, (loss if weight == 1 else weight * loss for loss, weight in terms))
    if weights is not None:  # an impossible response of weight 0 has an infinite loss, which does not count
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

    "sigmoid" with eps > 0 is conservative DPO, -(1-eps) ls(u) - eps ls(-u). TRL's "sigmoid" ignores eps.
    "robust" is unbiased under labels flipped at rate eps. "ipo" is also the original code's. "bco_pair" has
    no running reward shift. Entry i of both "aot" is the i-th of the order, no pair. "sft" has the same
    number in every entry. Only "sigmoid", "robust", "exo_pair" and the two "aot" listen to label_smoothing.

    f-divergences (f-DPO, arXiv 2309.16240), of the log ratio a: reverse_kl a; forward_kl -exp(-a);
    js_divergence log sigmoid(a); alpha_divergence exp((f_alpha-1) a)/(f_alpha-1), a itself at f_alpha = 1.
    Exponents stop at 80. "aot", "aot_unpaired", "apo_zero" and the first term of "apo_down" take a and b.

    TRL 1.16 adds constants so that the divergences are 0 at a = 0. That matters where lengths divide them, in
    "sigmoid_norm" and "ipo_norm". It also gives a and b to "nca_pair", "bco_pair", "sppo_hard" and all of
    "apo_down".

    Args:
        policy_chosen_logps, policy_rejected_logps: [B] float; gradients flow into these.
        reference_chosen_logps, reference_rejected_logps: [B] float, used detached. Both may be None with
            reference_free.
        beta: strength of the pull towards the reference, > 0.
        label_smoothing: eps above, in [0, 0.5).
        ipo: the original code's switch for loss_type="ipo".
        reference_free: the losses take the reference for uniform. The rewards use it where it is given, as
            the original code's do.
        loss_type: a name of the table, or several: their sum, weighted by loss_weights (1 each by default).
        chosen_lengths, rejected_lengths: [B] numbers of response tokens, for "sigmoid_norm", "ipo_norm" and
            "sft" (the chosen ones).
        weights: [B] float, multiplied with the losses, detached (WPO, arXiv 2406.11827; importance weights).
            Not with "aot", "aot_unpaired".

    Returns:
        DPOOutput(losses, chosen_rewards, rejected_rewards), each [B], float32 (float64 if an input is). All
        arithmetic is in that dtype. Log-probabilities of -inf are legal where the loss has a limit; -inf in
        both policy and reference is NaN.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices, names and options other than the above, for
        missing lengths, and for label_smoothing or f_divergence where no loss type in use listens to it.
    """
    options = _options(beta, label_smoothing, ipo, reference_free, loss_type, loss_weights, f_divergence, f_alpha, discopop_tau)
    given: dict[str, Any] = {"policy_chosen_logps": policy_chosen_logps, "policy_rejected_logps": policy_rejected_logps}
    if not (reference_free and reference_chosen_logps is None and reference_rejected_logps is None):
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
    return _pair_losses(policy, reference, policy[0], lengths, weights, options)


def _check_extras(logps, chosen_lengths, rejected_lengths, weights, options: _Options) -> None:
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


def _check_batch(logits, labels, reference_logps, ld_alpha, reference_free: bool) -> None:
    check_labels(labels, logits)
    if logits.dim() != 3 or logits.shape[0] % 2:
        raise ValueError(f"logits must be [2B, T, V], the chosen rows and then as many rejected ones, got shape {tuple(logits.shape)}")
    if ld_alpha is not None:
        check_number("ld_alpha", ld_alpha, 0, 1)
    if reference_logps is None and reference_free:
        return
    layout = "[2B] or [2B, T] (None with reference_free=True)" if ld_alpha is None else "[2B, T], one a token for ld_alpha"
    shapes = (labels.shape[:1], labels.shape) if ld_alpha is None else (labels.shape,)
    expect("reference_logps", reference_logps, "float", layout, shape=shapes, like=("logits", logits))


def _check_weighting(use_weighting: bool, max_weight: float | None, options: _Options) -> None:
    check_flags(use_weighting=use_weighting)
    if max_weight is not None:
        check_positive("max_weight", max_weight, FINITE)
        if not use_weighting:
            raise ValueError(f"max_weight bounds the weights of use_weighting=True, got {max_weight} with {use_weighting=}")
    if use_weighting:
        options.refuse_sorted("use_weighting")


def _response_sums(logps: Tensor, counted: Tensor, ld_alpha: float | None) -> Tensor:
    """[2B, T] -> [2B]: the sum of each response. With ld_alpha, that of LD-DPO.

    It counts the tokens behind the length of the pair's shorter response ld_alpha times.
    """
    if ld_alpha is None:
        return logps.sum(-1)
    shared = torch.minimum(*counted.sum(-1).chunk(2)).repeat(2).unsqueeze(-1)
    head = counted.cumsum(-1) <= shared
    sums = torch.where(head, logps, 0).sum(-1)
    return sums + ld_alpha * torch.where(head, 0, logps).sum(-1) if ld_alpha else sums


def _wpo_weights(stats, counted: Tensor, max_weight: float | None) -> Tensor:
    """[B], detached."""
    surplus = stats.logp.detach() - torch.where(counted, stats.sum_sq_prob.detach(), 1).log()
    chosen, rejected = (surplus.sum(-1) / counted.sum(-1).clamp(min=1)).chunk(2)
    weights = (chosen + rejected).exp()
    return weights if max_weight is None else weights.clamp(max=max_weight)


def dpo_loss_from_logits(
    logits: Tensor,
    labels: Tensor,
    reference_logps: Tensor | None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    ipo: bool = False,
    reference_free: bool = False,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    discopop_tau: float = 0.05,
    use_weighting: bool = False,
    max_weight: float | None = None,
    ld_alpha: float | None = None,
    shift: bool = True,
    ignore_index: int = -100,
    temperature: float | Tensor = 1.0,
    inplace_backward: bool = False,
) -> DPOOutput:
    """`dpo_loss` on the logits of a batch: the chosen responses, then the rejected ones in the same order.

    The logits are read once and their gradient is written once. Softmax and log-probabilities of the
    vocabulary never exist in memory.

    Args:
        logits: [2B, T, V] of the policy, chosen rows first, not sliced.
        labels: [2B, T] integer, `ignore_index` on prompt and padding.
        reference_logps: [2B] sums over the same tokens (`sequence_logps` of the reference's logits), or [2B,
            T] per token: `token_logprobs(reference_logits, next_tokens(labels))`, where position t holds the
            token at t + 1 (with shift=False: its own). Per token is required by ld_alpha. None with
            reference_free.
        use_weighting: WPO (arXiv 2406.11827). The weight of a pair is the product over its two responses of
            exp(mean_t(log pi(y_t) - log sum_v pi_v^2)), detached. Not with "aot", "aot_unpaired".
        max_weight: the weight stops here (the WPO authors: 1).
        ld_alpha: LD-DPO (arXiv 2409.06411), in [0, 1]: tokens behind the length of the shorter response of
            the pair count ld_alpha times, in the policy and in the reference. "sft" and the lengths are not
            affected.
        shift: logits at t predict the label at t + 1. False: labels are aligned with the logits already.
        temperature, inplace_backward: as in `rlkern.token_stats`.
        The rest: as in `dpo_loss`. Lengths are counted here.

    Returns:
        DPOOutput(losses, chosen_rewards, rejected_rewards), each [B], float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices and options other than the above; IndexError as
        `rlkern.token_stats`.
    """
    options = _options(beta, label_smoothing, ipo, reference_free, loss_type, loss_weights, f_divergence, f_alpha, discopop_tau)
    check_flags(shift=shift)
    _check_batch(logits, labels, reference_logps, ld_alpha, reference_free)
    _check_weighting(use_weighting, max_weight, options)
    targets = next_tokens(labels, ignore_index) if shift else labels
    stats = token_stats(
        logits,
        targets,
        temperature=temperature,
        ignore_index=ignore_index,
        with_sum_sq=use_weighting,
        with_entropy=False,
        inplace_backward=inplace_backward,
    )
    counted = targets != ignore_index
    policy = _response_sums(stats.logp, counted, ld_alpha)
    reference = torch.zeros_like(policy) if reference_logps is None else reference_logps.detach().to(policy.dtype)
    if reference.dim() == 2:
        reference = _response_sums(torch.where(counted, reference, 0), counted, ld_alpha)
    weights = _wpo_weights(stats, counted, max_weight) if use_weighting else None
    lengths = counted.sum(-1).to(policy.dtype).chunk(2)
    sft_logps = stats.logp.chunk(2)[0].sum(-1)
    return _pair_losses(policy.chunk(2), reference.chunk(2), sft_logps, lengths, weights, options)
