"""KTO (arXiv 2402.01306): single responses that are desirable or not, and its unpaired relative APO-zero."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...checks import FINITE, as_bool, check_choice, check_number, check_positive, computing_dtype, expect, expect_alike
from ...parallel import Meeting, add_up
from ...primitives.packing import Packed
from ...primitives.sequence_sums import wide
from ...primitives.token_stats import token_stats
from .responses import check_reference, check_responses, responses_of

_LOSS_TYPES = ("kto", "apo_zero_unpaired")


class KTOOutput(NamedTuple):
    """Each [B], one entry a response. The rewards beta * log(policy / reference) are detached."""

    losses: Tensor
    rewards: Tensor


def complement(x: Tensor) -> Tensor:
    """1 - sigmoid(x), with accurate value and slope on both sides: neither 1 - 1 nor a slope of s (1 - 1)."""
    return torch.where(x > 0, torch.sigmoid(-x), 1 - torch.sigmoid(x))


def _check_options(beta, kl, loss_type: str, desirable_weight: float, undesirable_weight: float) -> None:
    check_positive("beta", beta, FINITE)
    check_choice("loss_type", loss_type, _LOSS_TYPES)
    check_number("desirable_weight", desirable_weight, 0, FINITE)
    check_number("undesirable_weight", undesirable_weight, 0, FINITE)
    if loss_type == "apo_zero_unpaired":
        if kl is not None:
            raise ValueError(f"loss_type 'apo_zero_unpaired' has no baseline: kl must be None, got {type(kl).__name__}")
    elif kl is None:
        raise ValueError("loss_type 'kto' needs kl=, the baseline that kto_baseline returns, or 0.0")
    elif not isinstance(kl, Tensor):
        check_number("kl", kl, -FINITE, FINITE)


def _check_sequences(like: Tensor, of: str, size: int, kl, desirable, weights) -> None:
    named = (of, like)
    if isinstance(kl, Tensor):
        expect("kl", kl, "float", "[] or [1], one number", shape=((), (1,)), like=named)
    expect("desirable", desirable, "real", "[B] or [B, 1], one a response", shape=((size,), (size, 1)), like=named)
    if weights is not None:
        expect("weights", weights, "float", "[B] or [B, 1], one a response", shape=((size,), (size, 1)), like=named)


def _losses(policy, reference, desirable, kl, weights, beta, desirable_weight, undesirable_weight) -> KTOOutput:
    log_ratio = policy - reference
    baseline = 0.0 if kl is None else kl.detach().to(policy.dtype).reshape(()) if isinstance(kl, Tensor) else kl
    desirable = as_bool(desirable).reshape(-1)
    x = beta * (log_ratio - baseline)
    weights = None if weights is None else weights.detach().to(x.dtype).reshape(-1)
    if weights is not None or 0 in (desirable_weight, undesirable_weight):
        # Of weight 0 an impossible response does not count. It may have no ratio at all.
        weightless = torch.where(desirable, desirable_weight == 0, undesirable_weight == 0)
        x = torch.where(weightless if weights is None else weightless | (weights == 0), 0, x)
    losses = complement(torch.where(desirable, x, -x))
    if desirable_weight != 1 or undesirable_weight != 1:
        losses = torch.where(desirable, desirable_weight * losses, undesirable_weight * losses)
    if weights is not None:
        losses = losses * weights
    return KTOOutput(losses, (beta * log_ratio).detach())


def kto_loss(
    policy_logps: Tensor,
    reference_logps: Tensor,
    desirable: Tensor,
    beta: float = 0.1,
    *,
    kl: float | Tensor | None = None,
    loss_type: str = "kto",
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    weights: Tensor | None = None,
) -> KTOOutput:
    """KTO (arXiv 2402.01306, eq. 7), with a = log(policy / reference) of a response and a baseline z:

        desirable      desirable_weight   * sigmoid(-beta (a - z))
        undesirable    undesirable_weight * sigmoid( beta (a - z))

    "apo_zero_unpaired" (2408.06266, as in TRL) is the same with z = 0. TRL and Liger compute 1 - sigmoid, in
    float32 0 without a gradient from 17 on. The authors keep desirable_weight times the number of desirable
    responses over undesirable_weight times that of the others between 1 and 4/3.

    Args:
        policy_logps: [B] float, the responses' log-probabilities, with gradient.
        reference_logps: [B] float, used detached.
        desirable: [B] bool or number, nonzero where the response is desirable.
        beta: > 0.
        kl: z, a number or a tensor of one, used detached: `kto_baseline`. "kto" needs one, if only 0.0;
            "apo_zero_unpaired" takes none.
        loss_type: "kto" or "apo_zero_unpaired".
        desirable_weight, undesirable_weight: >= 0.
        weights: [B] float, multiplied with the losses, detached.

    Returns:
        KTOOutput(losses, rewards), each [B], float32 (float64 if an input is). Take the mean over all
        responses.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices and options other than the above.
    """
    _check_options(beta, kl, loss_type, desirable_weight, undesirable_weight)
    expect_alike("float", "[B] (one log-probability a response)", policy_logps=policy_logps, reference_logps=reference_logps)
    _check_sequences(policy_logps, "policy_logps", len(policy_logps), kl, desirable, weights)
    dtype = torch.float64 if torch.float64 in (policy_logps.dtype, reference_logps.dtype) else torch.float32
    policy, reference = policy_logps.to(dtype), reference_logps.detach().to(dtype)
    return _losses(policy, reference, desirable, kl, weights, beta, desirable_weight, undesirable_weight)


@torch.no_grad()
def kto_baseline(policy_kl_logps: Tensor, reference_kl_logps: Tensor, *, group: torch.distributed.ProcessGroup | None = None) -> Tensor:
    """KTO's baseline z = max(0, mean of log(policy / reference)) over mismatched prompts and completions.

    Completion i + 1 with prompt i, the last prompt with the first completion. A batch of one has no other
    completion: with its own there is no baseline in that number. The maximum is taken after the mean over all
    processes.

    Args:
        policy_kl_logps, reference_kl_logps: [B] float, log-probabilities of the completions.
        group: data-parallel processes, which hold other completions, of any number: one sum of two numbers.

    Returns:
        0-d, float32 (float64 if an input is), without gradient, the same on all ranks. 0 of no completion.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices and groups other than the above. On CPUs every rank
            of the group raises if one does.
    """
    given: dict[str, Any] = {"policy_kl_logps": policy_kl_logps, "reference_kl_logps": reference_kl_logps}
    with Meeting("kto_baseline", group, policy_kl_logps) as meeting:
        if isinstance(policy_kl_logps, Tensor):
            meeting.would_add(lambda: [policy_kl_logps.new_empty(2, dtype=wide(policy_kl_logps))])
        expect_alike("float", "[B] (one log-probability a completion)", **given)
        if meeting.exchanges:
            meeting.about()
    difference = policy_kl_logps.to(wide(policy_kl_logps)) - reference_kl_logps
    parts = torch.stack((difference.sum(), torch.ones_like(difference).sum()))
    total, count = add_up(parts, meeting.group_name) if meeting.ranks > 1 else parts
    double = torch.float64 in (policy_kl_logps.dtype, reference_kl_logps.dtype)
    return (total / count.clamp(min=1)).clamp(min=0).to(torch.float64 if double else torch.float32)


def kto_loss_from_logits(
    logits: Tensor,
    labels: Tensor,
    reference_logps: Tensor,
    desirable: Tensor,
    *,
    kl: float | Tensor | None = None,
    beta: float = 0.1,
    loss_type: str = "kto",
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    weights: Tensor | None = None,
    shift: bool = True,
    ignore_index: int = -100,
    temperature: float | Tensor = 1.0,
    inplace_backward: bool = False,
    packed: Packed | None = None,
) -> KTOOutput:
    """`kto_loss` on the logits of a batch, which are read once and whose gradient is written once.

    Args:
        logits: [B, T, V] of the policy, not sliced. With packed [N, V] or [1, N, V].
        labels: [B, T] integer, `ignore_index` on prompt and padding. With packed [N] or [1, N].
        reference_logps: [B] (packed [S] or [S, 1]) sums over the same tokens, or in the shape of labels per
            token, as in `dpo_loss_from_logits`.
        desirable, weights: [B], with packed [S].
        packed, shift: as in `dpo_loss_from_logits`.
        temperature, inplace_backward: as in `rlkern.token_stats`.
        The rest: as in `kto_loss`.

    Returns:
        KTOOutput(losses, rewards), each [B] (packed [S]), float32 (float64 for float64 logits).

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices and options other than the above; IndexError as
            `rlkern.token_stats`.
    """
    _check_options(beta, kl, loss_type, desirable_weight, undesirable_weight)
    size = check_responses(logits, labels, packed, shift, ignore_index)
    check_reference(reference_logps, logits, labels, packed, "[B]")
    _check_sequences(logits, "logits", size, kl, desirable, weights)
    targets, sequences = responses_of(labels, packed, shift, ignore_index)
    rows: dict[str, Any] = {"temperature": temperature, "ignore_index": ignore_index, "inplace_backward": inplace_backward}
    logp = token_stats(logits, targets, with_entropy=False, **rows).logp
    reference = reference_logps.detach().to(computing_dtype(logp))
    per_token = reference.shape == labels.shape
    policy, *sums = sequences.sums(logp, reference) if per_token else sequences.sums(logp)
    return _losses(policy, sums[0] if per_token else reference.reshape(-1), desirable, kl, weights, beta, desirable_weight, undesirable_weight)
