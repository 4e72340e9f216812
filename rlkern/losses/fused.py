"""Losses by name or of the caller, from hidden states and the lm_head: three products of the head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_choice, check_count, check_flags, check_number, check_tokens, computing_dtype, shown
from ..operator import traced
from ..primitives.kl import check_kl, kl_penalty
from ..primitives.known import KnownLoss, RowStats, check_sum, known_loss
from ..primitives.linear import linear_token_stats
from ..primitives.packing import Packed, Rows, per_token
from ..primitives.plans import check_logits_dtype, check_workspace, rows_at_once
from ..primitives.projection import check_num_valid, gathering, whole_head
from ..primitives.row_stats import TokenStats, row_options
from .aggregate import LossOutput, aggregate_terms, aggregate_values
from .policy.cispo import cispo_loss
from .policy.ppo import ppo_loss
from .policy.reinforce import reinforce_loss
from .policy.sapo import sapo_loss
from .z_loss import lse_penalty

_POLICIES: dict[str, tuple[Callable, tuple[str, ...]]] = {  # and the options that they have
    "ppo": (ppo_loss, ("clip_low", "clip_high", "dual_clip", "log_ratio_clamp")),
    "reinforce": (reinforce_loss, ()),
    "cispo": (cispo_loss, ("clip_low", "clip_high", "cap", "log_ratio_clamp")),
    "sapo": (sapo_loss, ("log_ratio_clamp",)),
    "ce": (reinforce_loss, ()),
}
LOSSES = tuple(_POLICIES)


class _Penalty(NamedTuple):
    """The KL to a reference."""

    reference_logp: Tensor
    coef: float
    kind: str
    clamp: float | None
    scale: Tensor | None


class FusedOutput(NamedTuple):
    """loss: 0-d, carries the gradient.
    metrics: as in `LossOutput`; none of a loss of the caller's.
    stats: those of all rows, without gradient.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    stats: TokenStats


class _NamedLoss:
    """A loss by its name, of statistics [B, T]. It sums over tokens, so a token's slope does not depend on
    the others' statistics: those that are not known yet may be 0."""

    def __init__(
        self,
        policy: Callable[[Tensor], LossOutput],
        sequences: Rows | Packed,
        zeros: Tensor,
        how: tuple,
        kl: _Penalty | None,
        coefs: tuple[float, float],
    ):
        self.policy, self.sequences, self.zeros, self.how, self.kl = policy, sequences, zeros, how, kl
        self.entropy_coef, self.lse_coef = coefs
        self.metrics: dict[str, Tensor] = {}

    def of(self, logp: Tensor, entropy: Tensor, logsumexp: Tensor) -> LossOutput:
        loss, metrics = self.policy(logp)
        aggregation, normalizer = self.how
        if self.kl is not None:
            tokens = self.sequences.mask.sum().clamp(min=1)
            kl = kl_penalty(logp, self.kl.reference_logp, self.sequences.mask, self.kl.kind, self.kl.clamp)
            metrics = {**metrics, "kl": kl.values.sum() / tokens}
            if self.kl.scale is not None:
                kl = kl.scaled(self.kl.scale).dropped(self.kl.scale == 0)
            loss = loss + aggregate_terms(kl.scaled(self.kl.coef), self.sequences, tokens, aggregation, normalizer)
        if self.entropy_coef:
            loss = loss - self.entropy_coef * aggregate_values(entropy, self.sequences, aggregation, normalizer)
        if self.lse_coef:
            loss = loss + lse_penalty(logsumexp, self.mask(), coef=self.lse_coef, aggregation=aggregation, normalizer=normalizer)
        return LossOutput(loss, metrics)

    def mask(self) -> Tensor | Packed:
        """As losses take it."""
        return self.sequences if isinstance(self.sequences, Packed) else self.sequences.mask

    def of_rows(self, rows: RowStats) -> Tensor:
        return self.of(*(self._among_all(x, rows.index) for x in (rows.logp, rows.entropy, rows.logsumexp))).loss

    def _among_all(self, x: Tensor | None, index: slice | Tensor) -> Tensor:
        if x is None:
            return self.zeros
        everything = self.zeros.flatten().clone()
        everything[index] = x
        return everything.view(self.zeros.shape)

    def of_all(self, stats: TokenStats) -> Tensor:
        entropy = self.zeros if stats.entropy is None else stats.entropy
        loss, self.metrics = self.of(stats.logp, entropy, stats.logsumexp)
        return loss


class _CallersLoss:
    def __init__(self, loss: Callable[[RowStats], Tensor]):
        self.of_rows = loss
        self.metrics: dict[str, Tensor] = {}

    def of_all(self, stats: TokenStats) -> Tensor:
        n, lead = stats.logsumexp.numel(), stats.logsumexp.dim()
        rows: Any = (None if x is None else x.reshape(n, *x.shape[lead:]) for x in stats)
        value = self.of_rows(RowStats.of(TokenStats(*rows), slice(0, n)))
        check_sum(value)
        return value


def _refuse(of: str, **options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name} is no option of {of}, expected None, got {shown(value)}")


def _policy(loss: str, of_policy: dict[str, Any], shared: dict[str, Any], *given: Any) -> Callable[[Tensor], LossOutput]:
    """The loss of that name by logp alone; given: old_logp, advantages, mask."""
    function, options = _POLICIES[loss]
    own = {name: value for name, value in of_policy.items() if name in options and value is not None}
    _refuse(f"loss={loss!r}", **{name: value for name, value in of_policy.items() if name not in options})
    if loss == "ppo":
        own.setdefault("log_ratio_clamp", None)  # as in GRPO
    return lambda logp: function(logp, *given, **own, **shared)


def _kl(sequences: Rows | Packed, zeros: Tensor, reference_logp, coef: float, kind: str, clamp: float | None, scale) -> _Penalty | None:
    check_kl(kind, clamp)
    if reference_logp is None:
        if coef != 0:
            raise ValueError(f"kl_coef={coef} needs reference_logp= [B, T]")
        return None
    check_tokens("reference_logp", reference_logp, zeros, of="targets")
    if scale is not None:
        scale = torch.where(sequences.mask, per_token("kl_scale", scale, zeros, sequences, of="targets"), 0)
    return _Penalty(reference_logp, coef, kind, clamp, scale)


def _check_expected(expected_grad: float | Tensor) -> float | Tensor:
    """A number, or 0-d."""
    if isinstance(expected_grad, Tensor):
        if expected_grad.numel() != 1 or expected_grad.requires_grad or not expected_grad.is_floating_point():
            raise ValueError(f"expected_grad must be a number or one float without gradient, got {shown(expected_grad)}")
        return expected_grad.reshape(()).clone()  # a GradScaler's is updated in place
    check_number("expected_grad", expected_grad)
    if expected_grad == 0:
        raise ValueError("expected_grad must not be 0: the gradient would be lost")
    return expected_grad


def linear_fused_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logp: Tensor | None = None,
    advantages: Tensor | None = None,
    mask: Tensor | Packed | None = None,
    *,
    loss: str | Callable[[RowStats], Tensor] = "ppo",
    bias: Tensor | None = None,
    workspace: int | None = None,
    chunk_rows: int | None = None,
    logits_dtype: torch.dtype | None = None,
    num_valid: int | None = None,
    gathered: Callable[[], Any] | None = None,
    expected_grad: float | Tensor = 1.0,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    reference_logp: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_kind: str = "k3",
    kl_clamp: float | None = None,
    kl_scale: Tensor | None = None,
    entropy_coef: float = 0.0,
    lse_coef: float = 0.0,
    clip_low: float | None = None,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    cap: float | None = None,
    log_ratio_clamp: float | None = None,
    weights: Tensor | None = None,
    aggregation: str | Tensor = "token-mean",
    normalizer: float | Tensor | None = None,
    min_p: float | None = None,
    min_prob: float | None = None,
    with_sum_sq: bool = False,
    with_entropy: bool = True,
    with_tail: bool = False,
    group=None,
) -> FusedOutput:
    """A token-level loss of `hidden @ weight.T + bias`, with its gradients complete in the forward.

    Logits are made once, a chunk of rows at a time: three products of the head for any such loss, two if
    weight is frozen, in the memory of one chunk. `linear_token_stats` and a loss take as many only where all
    logits fit.

        out = linear_fused_loss(hidden, lm_head.weight, ids, old_logp, advantages, mask, loss="ppo")

        def my_loss(rows):                                  # rows.logp, rows.entropy, ... [n] with gradient
            ratio = (rows.logp - old_logp.flatten()[rows.index]).exp()
            return -(weights.flatten()[rows.index] * ratio.clamp(max=5.0)).sum()

        out = linear_fused_loss(hidden, lm_head.weight, ids, mask=mask, loss=my_loss)

    Args:
        hidden, weight, targets, bias, logits_dtype, num_valid, gathered, temperature, ignore_index,
            logit_scale, softcap: as in `linear_token_stats`; group must be None. A loss by its name takes
            hidden [B, T, H] and targets [B, T].
        old_logp, advantages, mask: as in `ppo_loss`, without gradient. old_logp may be None (on-policy), the
            mask too (all tokens), the advantages with "ce". With a `Packed` as mask hidden is [N, H] or [1,
            N, H].
        loss: "ppo" (that of GRPO too), "reinforce", "cispo", "sapo": as the losses of these names. "ce":
            -logp, with advantages as weights if given. Or a function of `RowStats`, in plain PyTorch, that
            returns the sum over the rows it is given, its normaliser included. It sees each row once, in
            order. It may not keep tensors that carry gradient, nor use others than those of its rows. Rows
            that the mask leaves out, with num_valid only on request, come with statistics of 0, and must
            add 0.
        workspace: bytes of a chunk of logits; None takes 1 GiB, on a CPU 256 MiB. chunk_rows: rows of a chunk
            instead.
        expected_grad: what the loss's gradient will be multiplied by in the backward: a number that is not 0,
            or a one-element tensor. 1 / accumulation steps, the scale of a GradScaler. Any other is right
            too; it costs a pass over the gradients, and for 16-bit ones a second rounding.
        reference_logp, kl_coef, kl_kind, kl_clamp, kl_scale: a KL penalty, as in `grpo_loss`.
        entropy_coef: times the aggregated entropy, subtracted.
        lse_coef: lambda of `lse_penalty`, added.
        clip_low, clip_high: 0.2 if None. Of "ppo" and "cispo". dual_clip: of "ppo". cap: of "cispo".
        log_ratio_clamp: as in `grpo_loss`; of "ppo", "cispo", "sapo".
        weights, aggregation, normalizer: as in `ppo_loss`.
        min_p, min_prob, with_sum_sq, with_entropy, with_tail: as in `token_stats`, for a function.

    Returns:
        FusedOutput(loss, metrics, stats): 0-d, float32 (float64 for float64); the metrics of the loss of that
        name, with a reference also kl; TokenStats without gradient. The gradients by hidden, weight and bias
        are held from the forward to the backward. A second backward (retain_graph=True) computes them again,
        from what old_logp and its like, or the function's tensors, hold by then. Under torch.compile and of a
        tensor subclass this is `linear_token_stats` and the loss on it.

    Raises:
        TypeError, ValueError, IndexError: as `linear_token_stats` and the losses; for options that the loss
            does not have, and a function that does not return a 0-d float tensor, or takes a gradient by
            another tensor than its rows.
    """
    if group is not None:
        raise ValueError("group: vocabulary-parallel weights are not supported in this version, expected None")
    if targets is None:
        raise TypeError("targets must be an integer tensor, got None")
    expected_grad = _check_expected(expected_grad)
    with gathering(gathered):
        hidden, weight, bias = whole_head(hidden, weight, bias)
        check_flags(with_sum_sq=with_sum_sq, with_entropy=with_entropy, with_tail=with_tail)
        rows: dict[str, Any] = {
            **{"mask": mask, "temperature": temperature, "ignore_index": ignore_index, "with_entropy": with_entropy},
            **{"min_p": min_p, "min_prob": min_prob, "with_sum_sq": with_sum_sq, "with_tail": with_tail},
            **{"logit_scale": logit_scale, "softcap": softcap},
        }
        y, counted, row_temperature, o = row_options(hidden, targets, of="hidden", **rows)
        dtype = check_logits_dtype(logits_dtype, hidden.dtype)
        if chunk_rows is not None:
            check_count("chunk_rows", chunk_rows, 1)
        check_num_valid(num_valid, hidden)
        workspace = check_workspace(workspace, hidden.device.type)
        of_policy = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip, "cap": cap, "log_ratio_clamp": log_ratio_clamp}
        check_number("kl_coef", kl_coef, 0)
        check_number("entropy_coef", entropy_coef)
        check_number("lse_coef", lse_coef, 0)
        if callable(loss):
            given = {"old_logp": old_logp, "advantages": advantages, "reference_logp": reference_logp, "kl_scale": kl_scale, "weights": weights}
            coefs = {"kl_coef": kl_coef, "entropy_coef": entropy_coef, "lse_coef": lse_coef}
            how: Any = {"kl_clamp": kl_clamp, "aggregation": aggregation, "normalizer": normalizer}
            if isinstance(aggregation, str) and aggregation == "token-mean":
                del how["aggregation"]
            _refuse("a loss that is a function", **given, **how, **of_policy, **{name: c or None for name, c in coefs.items()})
            of: Any = _CallersLoss(loss)
        elif isinstance(loss, str):
            check_choice("loss", loss, LOSSES)
            if not isinstance(mask, Packed) and (hidden.dim() != 3 or targets.shape != hidden.shape[:2]):
                raise ValueError(f"loss={loss!r} takes hidden [B, T, H] and targets [B, T], got {tuple(hidden.shape)} and {tuple(targets.shape)}")
            if entropy_coef and not with_entropy:
                raise ValueError(f"entropy_coef={entropy_coef} needs with_entropy=True, got False")
            zeros = torch.zeros(targets.shape, dtype=computing_dtype(hidden), device=hidden.device)
            if advantages is None:
                if loss != "ce":
                    raise TypeError(f"loss={loss!r} needs advantages [B, T], [B, 1] or [B], got None")
                advantages = torch.ones_like(zeros)
            among = targets != ignore_index if counted is None else counted & (targets != ignore_index)
            shared = {"weights": weights, "aggregation": aggregation, "normalizer": normalizer}
            sequences = mask.like(zeros).among(among) if isinstance(mask, Packed) else Rows(among)
            policy = _policy(loss, of_policy, shared, old_logp, advantages, sequences if isinstance(mask, Packed) else among)
            kl = _kl(sequences, zeros, reference_logp, kl_coef, kl_kind, kl_clamp, kl_scale)
            of = _NamedLoss(policy, sequences, zeros, (aggregation, normalizer), kl, (entropy_coef, lse_coef))
            of.of(zeros, zeros, zeros)  # raises for arguments that do not fit
        else:
            raise TypeError(f"loss must be one of {', '.join(LOSSES)} or a function of RowStats, got {shown(loss)}")
        needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
        if needs_grad and not traced(hidden):
            chunk = chunk_rows or rows_at_once(weight.shape[0], dtype.itemsize, workspace)
            skips = isinstance(loss, str) or num_valid is not None
            total = of.of_all if isinstance(loss, str) else None
            known = KnownLoss(of.of_rows, total, expected_grad, chunk, dtype, num_valid, skips, gathered)
            value, stats = known_loss(hidden, weight, bias, y, counted, row_temperature, o, known)
            return FusedOutput(value, of.metrics, stats)
    stats = linear_token_stats(
        hidden, weight, targets, bias=bias, workspace=workspace, logits_dtype=logits_dtype, num_valid=num_valid, chunk_rows=chunk_rows,
        gathered=gathered, **rows,
    )  # fmt: skip
    value = of.of_all(stats)
    return FusedOutput(value, of.metrics, TokenStats(*(None if x is None else x.detach() for x in stats)))
