"""Direct preference optimisation (arXiv 2305.18290) and its family, from sequence log-probabilities or straight from logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...checks import FINITE, check_choice, check_flags
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

    def uses(self, option: str) -> list[str]:
        return [name for name in self.loss_types if option in PAIR_LOSSES[name].uses]

    def refuse_sorted(self, what: str) -> None:
        for name in self.loss_types:
            if PAIR_LOSSES[name].sorts_batch:
                raise ValueError(f"loss_type {name!r} sorts the batch, so its entries belong to no pair: it cannot be combined with {what}")


def _number(name: str, value: float) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def _sequence(name: str, value: Sequence) -> tuple:
    if not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence, got {type(value).__name__}")
    return tuple(value)


def _check_options(beta, label_smoothing, loss_type, loss_weights, f_divergence, f_alpha, discopop_tau, ipo, reference_free) -> _Options:
    numbers = (("beta", beta), ("label_smoothing", label_smoothing), ("f_alpha", f_alpha), ("discopop_tau", discopop_tau))
    for name, value in numbers:
        _number(name, value)
    for name, value in (("beta", beta), ("discopop_tau", discopop_tau)):
        if not 0 < value <= FINITE:
            raise ValueError(f"{name} must be positive and finite, got {value}")
    if not -FINITE <= f_alpha <= FINITE:
        raise ValueError(f"f_alpha must be finite, got {f_alpha}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is the rate of flipped labels, 0 <= label_smoothing < 0.5, got {label_smoothing}")

    check_flags(ipo=ipo)
    check_flags(reference_free=reference_free)
    loss_types = (loss_type,) if isinstance(loss_type, str) else _sequence("loss_type", loss_type)
    if ipo:
        if loss_types not in (("sigmoid",), ("ipo",)):
            raise ValueError(f"ipo=True stands for loss_type='ipo', got loss_type={loss_type!r} as well")
        loss_types = ("ipo",)
    if not loss_types:
        raise ValueError("loss_type is an empty sequence, expected at least one name")
    for name in loss_types:
        check_choice("loss_type", name, PAIR_LOSSES)
    weights = (1.0,) * len(loss_types) if loss_weights is None else _sequence("loss_weights", loss_weights)
    if len(weights) != len(loss_types):
        raise ValueError(f"loss_weights must have one entry for each of the {len(loss_types)} loss types, got {len(weights)}")
    for weight in weights:
        _number("loss_weights", weight)
        if not -FINITE <= weight <= FINITE:
            raise ValueError(f"loss_weights must be finite, got {weights}")

    check_choice("f_divergence", f_divergence, F_DIVERGENCES)
    options = _Options(beta, label_smoothing, loss_types, weights, f_divergence, f_alpha, discopop_tau)
    # An option that nothing listens to is a mistake that would otherwise stay unseen.
    what = "ipo=True" if ipo else f"loss_type {loss_type!r}"
    if label_smoothing > 0 and not options.uses("label_smoothing"):
        raise ValueError(f"{what} takes no label_smoothing, got {label_smoothing}")
    if f_divergence != "reverse_kl" and not options.uses("f_divergence"):
        raise ValueError(f"{what} takes no f_divergence, got {f_divergence!r}")
    if "exo_pair" in loss_types and label_smoothing == 0:
        raise ValueError("loss_type 'exo_pair' needs label_smoothing > 0 (its paper: 1e-3), got 0")
    return options


def _check_vectors(tensors: dict[str, Tensor | None], *, integers: bool = False) -> None:
    """All of them (None is left out) must be [B] tensors with the shape and on the device of the first."""
    first_name, first = next(iter(tensors.items()))
    for name, x in tensors.items():
        if x is None:
            continue
        if not isinstance(x, Tensor) or x.dtype.is_complex or not (integers or x.dtype.is_floating_point):
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a {'' if integers else 'float '}tensor [B], got {got}")
        if x.dim() != 1:
            raise ValueError(f"{name} must be [B], one log-probability a sequence, got shape {tuple(x.shape)}")
        if x.shape != first.shape:
            raise ValueError(f"{name} must have the shape of {first_name} {tuple(first.shape)}, got {tuple(x.shape)}")
        if x.device != first.device:
            raise ValueError(f"{name} must be on the device of {first_name} {first.device}, got {x.device}")


def _check_ld_alpha(ld_alpha: float | None) -> None:
    if ld_alpha is not None:
        _number("ld_alpha", ld_alpha)
        if not 0 <= ld_alpha <= 1:
            raise ValueError(f"ld_alpha must be in [0, 1], got {ld_alpha}")


def _pair_losses(policy, reference, sft_logps, lengths, weights, options: _Options, reference_free: bool) -> DPOOutput:
    """The arithmetic behind both public functions: (chosen, rejected) tuples of [B] tensors, validated, all of one dtype, reference detached."""
    o = options
    chosen, rejected = policy[0] - reference[0], policy[1] - reference[1]
    rewards = [(o.beta * log_ratio).detach() for log_ratio in (chosen, rejected)]
    policy_margin, reference_margin = policy[0] - policy[1], reference[0] - reference[1]
    if reference_free:
        chosen, rejected, reference_margin = *policy, torch.zeros_like(reference_margin)
    score = F_DIVERGENCES[o.f_divergence]
    chosen_score, rejected_score = score(chosen, o.f_alpha), score(rejected, o.f_alpha)
    pairs = Pairs(
        policy_margin=policy_margin,
        reference_margin=reference_margin,
        chosen=chosen,
        rejected=rejected,
        chosen_score=chosen_score,
        rejected_score=rejected_score,
        margin=o.beta * (chosen_score - rejected_score),
        chosen_logps=sft_logps,
        chosen_lengths=lengths[0],
        rejected_lengths=lengths[1],
        beta=o.beta,
        label_smoothing=o.label_smoothing,
        discopop_tau=o.discopop_tau,
    )
    losses = None
    for name, weight in zip(o.loss_types, o.loss_weights, strict=True):
        loss = PAIR_LOSSES[name].function(pairs)
        loss = loss if weight == 1 else weight * loss
        losses = loss if losses is None else losses + loss
    if weights is not None:
        losses = torch.where(weights == 0, 0, losses * weights)  # an impossible response of weight 0: an infinite loss that does not count
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
    """Preference losses from the log-probabilities of whole responses, called as the original DPO code's `preference_loss`.

    a and b are log(policy / reference) of the chosen and the rejected response, S_c and S_r the same seen through the f-divergence,
    u = beta * (S_c - S_r), ls = log sigmoid, eps = label_smoothing, len the response lengths (at least 1):

        "sigmoid"        -ls(u) + eps u: DPO, and conservative DPO for eps > 0, = -(1-eps) ls(u) - eps ls(-u)      arXiv 2305.18290
        "robust"         -ls(u) - eps/(1-2eps) u: rDPO, unbiased under labels flipped at rate eps                  2403.00409
        "sigmoid_norm"   -ls(beta (S_c/len_c - S_r/len_r))                                                         TRL
        "hinge"          max(0, 1 - u), no gradient at u = 1                                                       2305.10425 (SLiC)
        "ipo"            (S_c - S_r - 1/(2 beta))^2, sums as in the paper and the original code                    2310.12036
        "ipo_norm"       (S_c/len_c - S_r/len_r - 1/(2 beta))^2, what TRL calls "ipo"                              TRL
        "exo_pair"       KL((sigmoid(u), sigmoid(-u)) || (1-eps, eps)), eps > 0                                    2402.00856
        "nca_pair"       -ls(beta S_c) - ls(-beta S_c)/2 - ls(-beta S_r)/2                                         2402.05369
        "bco_pair"       -ls(beta S_c) - ls(-beta S_r), without the running reward shift                           2404.04656
        "sppo_hard"      (S_c - 1/(2 beta))^2 + (S_r + 1/(2 beta))^2                                               2405.00675
        "aot"            "sigmoid" of beta (sort(policy margins) - sort(reference margins))                        2406.05882
        "aot_unpaired"   "sigmoid" of beta (sort(a) - sort(b)); in both, entry i is the i-th of the order, no pair  2406.05882
        "apo_zero"       sigmoid(-beta a) + sigmoid(beta b)                                                        2408.06266
        "apo_down"       sigmoid(beta a) + sigmoid(-u)                                                             2408.06266
        "discopop"       -ls(u) (1 - k) + exp(-u) k, k = sigmoid(u / discopop_tau)                                 2406.08414
        "sft"            mean over the chosen tokens of the batch of -log pi, the same in every entry              TRL

    Only "sigmoid", "robust", "exo_pair" and the two "aot" listen to label_smoothing. TRL's "sigmoid" ignores it: conservative DPO lives here.
    f-divergences (f-DPO, arXiv 2309.16240), of the log ratio a: reverse_kl a; forward_kl -exp(-a); js_divergence log sigmoid(a);
    alpha_divergence exp((f_alpha-1) a)/(f_alpha-1), a itself at f_alpha = 1. Exponents stop at 80. "aot", "aot_unpaired", "apo_zero" and the first
    term of "apo_down" take a and b. TRL 1.16 adds the constants by which these are 0 at a = 0, which shows where lengths divide them, in
    "sigmoid_norm" and "ipo_norm", and gives a and b to "nca_pair", "bco_pair", "sppo_hard" and all of "apo_down".

    Args:
        policy_chosen_logps, policy_rejected_logps: [B] float; gradients flow into these.
        reference_chosen_logps, reference_rejected_logps: [B] float, used detached. Both may be None with reference_free.
        beta: strength of the pull towards the reference, > 0.
        label_smoothing: eps above, in [0, 0.5).
        ipo: the original code's switch for loss_type="ipo".
        reference_free: the losses take the reference for uniform; the rewards still use it where given, as the original code's do.
        loss_type: a name of the table, or several: their sum, weighted by loss_weights (1 each by default).
        chosen_lengths, rejected_lengths: [B] numbers of response tokens, for "sigmoid_norm", "ipo_norm" and "sft" (the chosen ones).
        weights: [B] float, multiplied with the losses, detached (WPO, arXiv 2406.11827; importance weights). Not with "aot", "aot_unpaired".

    Returns:
        DPOOutput(losses, chosen_rewards, rejected_rewards), each [B], float32 (float64 if an input is). All arithmetic is in that dtype.
        Log-probabilities of -inf are legal where the loss has a limit; -inf in both policy and reference is NaN.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices, names and options other than the above, for missing lengths, and for
        label_smoothing or f_divergence where no loss type in use listens to it.
    """
    options = _check_options(beta, label_smoothing, loss_type, loss_weights, f_divergence, f_alpha, discopop_tau, ipo, reference_free)
    logps = {
        "policy_chosen_logps": policy_chosen_logps,
        "policy_rejected_logps": policy_rejected_logps,
        "reference_chosen_logps": reference_chosen_logps,
        "reference_rejected_logps": reference_rejected_logps,
    }
    no_reference = reference_chosen_logps is None and reference_rejected_logps is None
    for name, x in logps.items():
        if x is None and not (no_reference and reference_free and name.startswith("reference")):
            raise TypeError(f"{name} must be a float tensor [B], got None (both references may be None with reference_free=True)")
    _check_vectors({**logps, "weights": weights})
    lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
    _check_vectors({"policy_chosen_logps": policy_chosen_logps, **lengths}, integers=True)
    for name, value in lengths.items():
        if value is None and options.uses(name):
            raise ValueError(f"loss_type {options.uses(name)[0]!r} needs {name}= [B], the numbers of response tokens")
    if weights is not None:
        options.refuse_sorted("weights")

    given = [x for x in logps.values() if x is not None]
    accumulate = torch.float64 if any(x.dtype == torch.float64 for x in given) else torch.float32
    policy = [x.to(accumulate) for x in (policy_chosen_logps, policy_rejected_logps)]
    reference = [torch.zeros_like(p) if r is None else r.detach().to(accumulate) for p, r in zip(policy, list(logps.values())[2:], strict=True)]
    lengths = [None if x is None else x.to(accumulate) for x in lengths.values()]
    weights = None if weights is None else weights.detach().to(accumulate)
    return _pair_losses(policy, reference, policy[0], lengths, weights, options, reference_free)


def _token_average(logps: Tensor, counts: Tensor) -> Tensor:
    return logps.sum(-1) / counts.clamp(min=1)


def _shared_length_sums(logps: Tensor, counted: Tensor, lengths: Tensor, ld_alpha: float) -> Tensor:
    """LD-DPO: the sum over the tokens up to the shorter length of the pair, plus ld_alpha times the sum over those behind it. [2B, T] -> [2B]."""
    shared = torch.minimum(*lengths.chunk(2)).repeat(2).unsqueeze(-1)
    head = counted.cumsum(-1) <= shared
    sums = torch.where(head, logps, 0).sum(-1)
    return sums + ld_alpha * torch.where(head, 0, logps).sum(-1) if ld_alpha else sums


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
    """`dpo_loss` on the logits of a batch that holds the chosen responses, then the rejected ones, in the same order.

    The logits are read once and their gradient is written once; softmax and log-probabilities of the vocabulary never exist in memory.

    Args:
        logits: [2B, T, V] of the policy, chosen rows first, not sliced.
        labels: [2B, T] integer, `ignore_index` on prompt and padding.
        reference_logps: [2B] sums over the same tokens (`sequence_logps` of the reference's logits), or [2B, T] per token:
            `token_logprobs(reference_logits, next_tokens(labels))`, where position t holds the token at t + 1 (with shift=False: its own).
            Per token is required by ld_alpha. None with reference_free.
        use_weighting: WPO (arXiv 2406.11827): each pair is weighted by the product over its two responses of
            exp(mean_t(log pi(y_t) - log sum_v pi_v^2)), detached. Not with "aot", "aot_unpaired".
        max_weight: the weight stops here (the WPO authors: 1).
        ld_alpha: LD-DPO (arXiv 2409.06411), in [0, 1]: tokens behind the length of the shorter response of the pair count ld_alpha times,
            in the policy and in the reference. "sft" and the lengths are not affected.
        shift: logits at t predict the label at t + 1. False: labels are aligned with the logits already.
        temperature, inplace_backward: as in `rlkern.token_stats`.
        The rest: as in `dpo_loss`. Lengths are counted here.

    Returns:
        DPOOutput(losses, chosen_rewards, rejected_rewards), each [B], float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices and options other than the above; IndexError as `rlkern.token_stats`.
    """
    options = _check_options(beta, label_smoothing, loss_type, loss_weights, f_divergence, f_alpha, discopop_tau, ipo, reference_free)
    check_flags(use_weighting=use_weighting)
    check_flags(shift=shift)
    check_labels(labels, logits)
    if logits.dim() != 3 or logits.shape[0] % 2:
        raise ValueError(f"logits must be [2B, T, V], the chosen rows and then as many rejected ones, got shape {tuple(logits.shape)}")
    _check_ld_alpha(ld_alpha)
    if max_weight is not None:
        _number("max_weight", max_weight)
        if not use_weighting or not 0 < max_weight <= FINITE:
            raise ValueError(f"max_weight is a positive bound on the weights of use_weighting=True, got {max_weight} with {use_weighting=}")
    if use_weighting:
        options.refuse_sorted("use_weighting")
    if reference_logps is None:
        if not reference_free:
            raise TypeError("reference_logps must be a float tensor [2B] or [2B, T], got None (allowed with reference_free=True)")
    elif not isinstance(reference_logps, Tensor) or not reference_logps.dtype.is_floating_point:
        got = reference_logps.dtype if isinstance(reference_logps, Tensor) else type(reference_logps).__name__
        raise TypeError(f"reference_logps must be a float tensor [2B] or [2B, T], got {got}")
    else:
        allowed = (labels.shape,) if ld_alpha is not None else (labels.shape[:1], labels.shape)
        if reference_logps.shape not in allowed:
            expected = " or ".join(str(tuple(shape)) for shape in allowed)
            raise ValueError(
                f"reference_logps must be {expected} for logits {tuple(logits.shape)} and {ld_alpha=}, got {tuple(reference_logps.shape)}"
            )
        if reference_logps.device != logits.device:
            raise ValueError(f"reference_logps must be on the device of logits {logits.device}, got {reference_logps.device}")

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
    lengths = counted.sum(-1)

    def sequence_sums(token_logps: Tensor) -> Tensor:
        return token_logps.sum(-1) if ld_alpha is None else _shared_length_sums(token_logps, counted, lengths, ld_alpha)

    policy = sequence_sums(stats.logp)
    if reference_logps is None:
        reference = torch.zeros_like(policy)
    else:
        reference = reference_logps.detach().to(policy.dtype)
        if reference.dim() == 2:
            reference = sequence_sums(torch.where(counted, reference, 0))

    weights = None
    if use_weighting:
        surplus = stats.logp.detach() - torch.where(counted, stats.sum_sq_prob.detach(), 1).log()
        chosen, rejected = _token_average(surplus, lengths).chunk(2)
        weights = (chosen + rejected).exp()
        if max_weight is not None:
            weights = weights.clamp(max=max_weight)
    sft_logps = stats.logp.chunk(2)[0].sum(-1)
    lengths = lengths.to(policy.dtype).chunk(2)
    return _pair_losses(policy.chunk(2), reference.chunk(2), sft_logps, lengths, weights, options, reference_free)
