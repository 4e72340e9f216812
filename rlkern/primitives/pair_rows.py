"""The operator behind `token_divergence` and `pair_stats`: numbers of two rows, and their gradients."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .. import backends
from ..backends.contract import PairKind, PairState
from ..backends.gradient_memory import new_gradient
from ..checks import check_target_range, computing_dtype
from ..layout import as_rows
from ..operator import Operator, differentiable, values_readable

_EXCHANGED = {  # the same divergence with both distributions' places exchanged, and what becomes of beta
    PairKind.REVERSE_KL: (PairKind.FORWARD_KL, False),
    PairKind.FORWARD_KL: (PairKind.REVERSE_KL, False),
    PairKind.MIXED_KL: (PairKind.MIXED_KL, True),
    PairKind.JSD: (PairKind.JSD, True),
    PairKind.SKEW_FORWARD_KL: (PairKind.SKEW_REVERSE_KL, False),
    PairKind.SKEW_REVERSE_KL: (PairKind.SKEW_FORWARD_KL, False),
    PairKind.ALPHA: (PairKind.ALPHA, True),
    PairKind.TOTAL_VARIATION: (PairKind.TOTAL_VARIATION, False),
}
REFERENCE_ONLY = (PairKind.ALPHA, PairKind.TOTAL_VARIATION)  # no trainer asks for them by name


class PairOptions(NamedTuple):
    """What is asked of every pair, as the operators take it."""

    temperature: float  # 1 beside a temperature for each row
    other_temperature: float
    ignore_index: int
    kind: int
    beta: float
    vocab: int  # so many columns count
    with_stats: bool  # the entropy and all that is the other's
    other_grad: bool
    softcap: float = 0.0  # as in contract.py
    other_softcap: float = 0.0


N_OPTIONS = len(PairOptions._fields)


def new_pair_results(logits, other, targets, mask, row_temperature, other_row_temperature, *options):
    """(divergence, logp, entropy, logsumexp, other_logp, other_entropy, other_logsumexp, state)"""
    o, rows = PairOptions(*options), logits.shape[:-1]

    def new(wanted=True, *columns):
        return logits.new_empty((*rows, *columns), dtype=computing_dtype(logits)) if wanted else None

    logp, with_other = o.with_stats and targets is not None, o.with_stats or o.other_grad
    return new(), new(logp), new(o.with_stats), new(o.with_stats), new(logp), new(o.with_stats), new(with_other), new(True, PairState.WIDTH)


def _backend(device: torch.device, kind: int):
    return backends.reference if kind in REFERENCE_ONLY else backends.select(device)


def for_backend(logits, targets, mask, row_temperature, other_row_temperature, temperature, other_temperature):
    """Targets [N, 1], mask and temperatures [N] as the backends want them; copied if need be."""
    dtype, n = computing_dtype(logits), math.prod(logits.shape[:-1])
    targets = None if targets is None else targets.contiguous().view(-1, 1)
    mask = None if mask is None else mask.contiguous().view(-1)
    if row_temperature is None and other_row_temperature is None:
        return targets, mask, temperature, other_temperature
    pairs = ((row_temperature, temperature), (other_row_temperature, other_temperature))
    return (
        targets,
        mask,
        *(logits.new_full((n,), number, dtype=dtype) if rows is None else rows.to(dtype).contiguous().view(-1) for rows, number in pairs),
    )


def compute_pair(logits, other, targets, mask, row_temperature, other_row_temperature, *options):
    """The results of new_pair_results, computed."""
    o = PairOptions(*options)
    out = new_pair_results(logits, other, targets, mask, row_temperature, other_row_temperature, *options)
    if out[0].numel() == 0:
        return out
    backend = _backend(logits.device, o.kind)
    y, mask, t, other_t = for_backend(logits, targets, mask, row_temperature, other_row_temperature, o.temperature, o.other_temperature)
    if y is not None and not backend.CHECKS_TARGETS and values_readable(logits):
        check_target_range(y, mask, o.ignore_index, o.vocab)
    z, w = (as_rows(x)[..., : o.vocab] for x in (logits, other))
    backend.pair_forward(z, w, y, mask, t, other_t, o.ignore_index, o.kind, o.beta, out, o.softcap, o.other_softcap)
    return out


def write_pair_gradient(out, logits, other, targets, mask, row_temperature, other_row_temperature, *args) -> None:
    """The gradient by the logits into out, which may be the logits."""
    o, (state, *grads) = PairOptions(*args[:N_OPTIONS]), args[N_OPTIONS : N_OPTIONS + 5]
    if logits.numel() == 0:
        return
    rows, rows_of_out = as_rows(logits), as_rows(out)
    rows_of_out[..., o.vocab :].zero_()
    if o.vocab == 0:
        return
    y, mask, t, other_t = for_backend(logits, targets, mask, row_temperature, other_row_temperature, o.temperature, o.other_temperature)
    upstream = [None if g is None else g.to(state.dtype).contiguous() for g in grads]
    z, w, dz = (x[..., : o.vocab] for x in (rows, as_rows(other), rows_of_out))
    backend, caps = _backend(logits.device, o.kind), (o.softcap, o.other_softcap)
    backend.pair_backward(z, w, y, mask, t, other_t, o.ignore_index, o.kind, o.beta, state, upstream, dz, *caps)


def exchange_pair(logits, other, targets, mask, row_temperature, other_row_temperature, *args):
    """The arguments of write_pair_gradient for the divergence's gradient by `other`."""
    o, state, g_divergence = PairOptions(*args[:N_OPTIONS]), args[N_OPTIONS], args[N_OPTIONS + 1]
    kind, complement = _EXCHANGED[o.kind]
    options = o._replace(temperature=o.other_temperature, other_temperature=o.temperature, softcap=o.other_softcap, other_softcap=o.softcap)
    options = options._replace(kind=kind, beta=1 - o.beta if complement else o.beta)
    s = state.unbind(-1)
    mean_slope = s[PairState.OTHER_MEAN_SLOPE]
    if kind == PairKind.SKEW_FORWARD_KL:
        mean_slope = mean_slope.clamp(min=0)  # not below 0 by rounding: of this kind the sign says something
    columns = torch.zeros_like(state)
    for to, column in (
        (PairState.MAX, s[PairState.OTHER_MAX]),
        (PairState.REST, s[PairState.OTHER_REST]),
        (PairState.REF, s[PairState.OTHER_REF]),
        (PairState.OTHER_REF, s[PairState.REF]),
        (PairState.OFFSET, -s[PairState.OFFSET]),
        (PairState.MEAN_SLOPE, mean_slope),
    ):
        columns[..., to] = column
    if targets is not None:  # they only tell which rows are skipped
        ignored = targets == o.ignore_index
        mask = ~ignored if mask is None else mask & ~ignored
    return other, logits, None, mask, other_row_temperature, row_temperature, *options, columns, g_divergence, None, None, None


def _backward(logits, other, *args):
    *args, wanted = args
    by_logits = by_other = None
    if wanted[0]:
        by_logits = new_gradient(logits)
        write_pair_gradient(by_logits, logits, other, *args)
    if wanted[1]:
        by_other = new_gradient(other)
        if args[4 + N_OPTIONS + 1] is None:  # no gradient by the divergence
            by_other.zero_()
        else:
            write_pair_gradient(by_other, *exchange_pair(logits, other, *args))
    return by_logits, by_other


PAIR_ROWS = "Tensor? targets, Tensor? mask, Tensor? row_temperature, Tensor? other_row_temperature"
PAIR_OPTIONS = "float temperature, float other_temperature, int ignore_index, int kind, float beta, SymInt vocab, bool with_stats, bool other_grad"
PAIR_OPTIONS += ", float softcap, float other_softcap"
PAIR_GRADIENTS = "Tensor state, Tensor? g_divergence, Tensor? g_logp, Tensor? g_entropy, Tensor? g_logsumexp"
PAIR_RESULTS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
_forward = Operator(f"pair_stats(Tensor logits, Tensor other, {PAIR_ROWS}, {PAIR_OPTIONS}) -> {PAIR_RESULTS}", compute_pair, new_pair_results)
pair_backward = Operator(
    f"pair_stats_backward(Tensor logits, Tensor other, {PAIR_ROWS}, {PAIR_OPTIONS}, {PAIR_GRADIENTS}, bool[] wanted) -> (Tensor, Tensor)",
    run=_backward,
    fake=lambda logits, other, *args: tuple(new_gradient(x) if wanted else None for x, wanted in zip((logits, other), args[-1], strict=True)),
)
pair_overwrite = Operator(
    f"pair_stats_backward_(Tensor(a!) logits, Tensor other, {PAIR_ROWS}, {PAIR_OPTIONS}, {PAIR_GRADIENTS}) -> ()",
    run=lambda logits, *args: write_pair_gradient(logits, logits, *args),
    fake=lambda *args: None,
)
INSTEAD = "use rlkern.reference.token_divergence"
pair_rows = differentiable(_forward, pair_backward, outputs=4, constants=3, wrt=2, instead=INSTEAD, overwrite=pair_overwrite)
