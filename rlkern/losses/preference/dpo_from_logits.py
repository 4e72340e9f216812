"""The DPO family from the logits of a batch of pairs, padded or packed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...checks import FINITE, check_choice, check_flags, check_number, check_positive, expect
from ...primitives.packing import Packed, Rows
from ...primitives.token_stats import token_stats
from .dpo import DPOOutput, pair_losses
from .dpo_options import Options, check_options
from .dpo_types import PAIR_LOSSES
from .responses import check_reference, check_responses, responses_of, union

_PAIRS = ("halves", "interleaved")


def _check_batch(logits, labels, packed, pairs: str, shift: bool, ignore_index: int) -> None:
    check_choice("pairs", pairs, _PAIRS)
    count = check_responses(logits, labels, packed, shift, ignore_index, rows="2B")
    if count % 2 and packed is None:
        raise ValueError(f"logits must be [2B, T, V], the chosen rows and then as many rejected ones, got shape {tuple(logits.shape)}")
    if count % 2:
        raise ValueError(f"packed must hold pairs, an even number of sequences, got {count}")


def _check_weighting(use_weighting: bool, max_weight: float | None, ld_alpha: float | None, packed: Packed | None, options: Options) -> None:
    check_flags(use_weighting=use_weighting)
    if max_weight is not None:
        check_positive("max_weight", max_weight, FINITE)
        if not use_weighting:
            raise ValueError(f"max_weight bounds the weights of use_weighting=True, got {max_weight} with {use_weighting=}")
    if use_weighting:
        options.refuse_sorted("use_weighting")
    if ld_alpha is not None:
        check_number("ld_alpha", ld_alpha, 0, 1)
        if packed is not None and packed.group_name:
            raise ValueError("ld_alpha counts the tokens of a response in their order, which no rank of packed(group=) has: expected None")


class _Pairs(NamedTuple):
    """How sequences are paired: halves, chosen ones first, or in turn."""

    interleaved: bool

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[2B] -> (chosen, rejected), [B] each."""
        if self.interleaved:
            return x[::2], x[1::2]
        return x[: len(x) // 2], x[len(x) // 2 :]

    def chosen(self, x: Tensor) -> Tensor:
        """bool [2B], of the device of x [2B]."""
        places = torch.arange(x.shape[0], device=x.device)
        return places % 2 == 0 if self.interleaved else places < len(x) // 2

    def both(self, x: Tensor) -> Tensor:
        """[B] -> [2B]: the same for both of a pair."""
        return torch.stack((x, x), -1).flatten() if self.interleaved else torch.cat((x, x))


def _first_tokens(responses: Rows | Packed, pairs: _Pairs) -> Tensor:
    """bool: the tokens of a response up to the length of the pair's shorter one."""
    shared = pairs.both(torch.minimum(*pairs.split(responses.lengths)))
    return responses.rank() < responses.spread(shared)


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
    gamma: float | None = None,
    sft_labels: Tensor | None = None,
    use_weighting: bool = False,
    max_weight: float | None = None,
    ld_alpha: float | None = None,
    shift: bool = True,
    ignore_index: int = -100,
    temperature: float | Tensor = 1.0,
    inplace_backward: bool = False,
    packed: Packed | None = None,
    pairs: str = "halves",
) -> DPOOutput:
    """`dpo_loss` on the logits of a batch: the chosen responses, then the rejected ones in the same order.

    The logits are read once and their gradient is written once. Softmax and log-probabilities of the
    vocabulary never exist in memory. Sums over a response run in float64 and are rounded once.

    Args:
        logits: [2B, T, V] of the policy, chosen rows first, not sliced. With packed [N, V] or [1, N, V].
        labels: [2B, T] integer, `ignore_index` on prompt and padding. With packed [N] or [1, N].
        reference_logps: [2B] (packed [S] or [S, 1]) sums over the same tokens (`sequence_logps` of the
            reference's logits), or in the shape of labels per token: `token_logprobs(reference_logits,
            next_tokens(labels))`, where position t holds the token at t + 1 (with shift=False: its own). Per
            token is required by ld_alpha. None with reference_free, or if no loss in use takes a reference.
        sft_labels: as labels, the tokens that "sft" and "sft_norm" imitate, where these are others: with the
            prompt in TRL's ORPO. Only those of chosen responses matter, and they must be the labels wherever
            both count. Rows that count in either are read, once.
        use_weighting: WPO (arXiv 2406.11827). The weight of a pair is the product over its two responses of
            exp(mean_t(log pi(y_t) - log sum_v pi_v^2)), detached. Not with "aot", "aot_unpaired".
        max_weight: the weight stops here (the WPO authors: 1).
        ld_alpha: LD-DPO (arXiv 2409.06411), in [0, 1]: tokens behind the length of the shorter response of
            the pair count ld_alpha times, in the policy and in the reference. "sft" and the lengths are not
            affected.
        packed: `rlkern.packed` of S = 2B sequences, one behind the other. What counts are its counted tokens
            whose label is not ignore_index. Its mask is of the rows of logits, as in every loss: a mask of
            tokens is moved as shift moves the labels, next_tokens(mask, False, packed=pack). Most need none.
            With a group every rank has the same losses, from its part of the tokens: report one. The
            gradients of the ranks add up, for which they must not be averaged.
        pairs: where the two of a pair are: "halves", all chosen before all rejected (TRL, LLaMA-Factory,
            OpenRLHF), or "interleaved", in turn, chosen first (NeMo-RL). Also of padded rows.
        shift: logits at t predict the label at t + 1. False: labels are aligned with the logits already.
        temperature, inplace_backward: as in `rlkern.token_stats`.
        The rest: as in `dpo_loss`. Lengths are counted here.

    Returns:
        DPOOutput(losses, chosen_rewards, rejected_rewards), each [B], float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices and options other than the above; IndexError as
        `rlkern.token_stats`.
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
    _check_batch(logits, labels, packed, pairs, shift, ignore_index)
    _check_weighting(use_weighting, max_weight, ld_alpha, packed, options)
    options.refuse_references(reference_logps=reference_logps)
    if reference_logps is not None or not options.references_optional():
        check_reference(reference_logps, logits, labels, packed, "[2B]", only_tokens="" if ld_alpha is None else "ld_alpha")
    imitates = any(PAIR_LOSSES[name].imitates for name in options.loss_types)
    if sft_labels is not None:
        expect("sft_labels", sft_labels, "integer", "as labels", like=("labels", labels))
        if not imitates:
            raise ValueError(f"sft_labels are for the loss types 'sft' and 'sft_norm', got them with {loss_type!r}")

    order = _Pairs(pairs == "interleaved")
    targets, responses = responses_of(labels, packed, shift, ignore_index)
    counted, sequences, imitated = responses.mask, responses, responses
    if sft_labels is not None:
        sft_targets, imitated = responses_of(sft_labels, packed, shift, ignore_index, only=order.chosen(responses.lengths))
        targets = union(targets, sft_targets, ignore_index)
        sequences = responses.adding(targets != ignore_index)
    options_of_rows: dict[str, Any] = {"temperature": temperature, "ignore_index": ignore_index, "inplace_backward": inplace_backward}
    stats = token_stats(logits, targets, with_sum_sq=use_weighting, with_entropy=False, **options_of_rows)

    # What to add up, a column each: one exchange where sequences lie on several ranks.
    head = None if ld_alpha is None else _first_tokens(responses, order)

    def of_responses(x: Tensor) -> Tensor:
        x = x if sft_labels is None else torch.where(counted, x, 0)
        return x if head is None else torch.where(head, x, ld_alpha * x if ld_alpha else 0)

    columns = {"policy": of_responses(stats.logp)}
    reference = None if reference_logps is None else reference_logps.detach().to(stats.logp.dtype)
    if reference is not None and reference.shape == labels.shape:
        columns["reference"] = of_responses(reference)
    if use_weighting:
        surplus = stats.logp.detach() - torch.where(counted, stats.sum_sq_prob.detach(), 1).log()
        columns["surplus"] = surplus if sft_labels is None else torch.where(counted, surplus, 0)
    if imitates and (ld_alpha is not None or sft_labels is not None):
        columns["sft"] = torch.where(imitated.mask, stats.logp, 0)
    sums = dict(zip(columns, sequences.sums(*columns.values()), strict=True))

    policy, lengths = sums["policy"], responses.lengths.to(stats.logp.dtype)
    weights = None
    if use_weighting:
        chosen, rejected = order.split(sums["surplus"] / lengths.clamp(min=1))
        weights = (chosen + rejected).exp() if max_weight is None else (chosen + rejected).exp().clamp(max=max_weight)
    if reference is None:
        reference = torch.zeros_like(policy)
    reference = sums["reference"] if "reference" in sums else reference.reshape(-1)
    sft = order.split(sums.get("sft", policy))[0], order.split(imitated.lengths.to(policy.dtype))[0]
    return pair_losses(order.split(policy), order.split(reference), sft, order.split(lengths), weights, options)
