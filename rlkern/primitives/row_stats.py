"""The operator behind `token_stats`: statistics of rows of logits, and their gradient, also by columns."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends.contract import ELSEWHERE, KeptKind, State
from ..backends.gradient_memory import new_gradient
from ..checks import (
    check_ignore_index,
    check_mask,
    check_number,
    check_target_range,
    check_targets,
    check_temperature,
    check_transforms,
    computing_dtype,
)
from ..layout import as_rows
from ..operator import Operator, differentiable, values_readable

TENSORS = "Tensor? targets, Tensor? mask, Tensor? row_temperature"
OPTIONS = "float temperature, int ignore_index, int kept_kind, float log_kept, bool with_sum_sq, bool with_entropy, float softcap"
OPTIONS += ", SymInt vocab_start, SymInt vocab_size"
RESULTS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
GRADIENTS = "Tensor state, Tensor? g_logp, Tensor? g_entropy, Tensor? g_logsumexp, Tensor? g_sum_sq_prob, "
GRADIENTS += "Tensor? g_kept_logmass"
IGNORED, INVALID = -2, -1  # in place of targets in some columns of a row; an IGNORED entry is their ignore_index


class TokenStats(NamedTuple):
    """Numbers of rows of logits, see `token_stats`, of the rows' shape; `logp` of the targets' shape."""

    logp: Tensor
    entropy: Tensor
    logsumexp: Tensor
    sum_sq_prob: Tensor = None  # type: ignore[assignment]
    kept_logmass: Tensor = None  # type: ignore[assignment]
    target_kept: Tensor = None  # type: ignore[assignment]  # bool: in the set of keep=, else of min_p= or min_prob=
    tail_logmass: Tensor = None  # type: ignore[assignment]
    full_entropy: Tensor = None  # type: ignore[assignment]  # this and the next: of the whole vocabulary, not of the set of keep=
    full_logsumexp: Tensor = None  # type: ignore[assignment]
    target_in_proxy: Tensor = None  # type: ignore[assignment]  # bool: in the set of min_p= or min_prob=

    @property
    def proxy_logp(self) -> Tensor:
        """The target's logp within the set of min_p or min_prob, `logp - kept_logmass`; -inf outside."""
        if self.kept_logmass is None or self.target_in_proxy is None:
            raise ValueError("proxy_logp needs a kept set: call token_stats with min_p=... or min_prob=...")
        kept_logmass = self.kept_logmass if self.logp.shape == self.kept_logmass.shape else self.kept_logmass.unsqueeze(-1)
        return torch.where(self.target_in_proxy, self.logp - kept_logmass, -math.inf)


class Options(NamedTuple):
    """What is asked of every row, as the operators take it."""

    temperature: float  # 1 beside a temperature for each row
    ignore_index: int
    kept_kind: int
    log_kept: float
    with_sum_sq: bool
    with_entropy: bool
    softcap: float = 0.0  # as in contract.py
    vocab_start: int = 0  # the id of the first column
    vocab_size: int = 0  # columns from this id on are padding: not read, gradient 0; 0: no padding


class Results(NamedTuple):
    """What the forward computes. Results that were not asked for are None; logsumexp and state never are."""

    logp: Tensor | None
    entropy: Tensor | None
    logsumexp: Tensor
    sum_sq_prob: Tensor | None
    kept_logmass: Tensor | None  # of UNLISTED ids: tail_logmass
    target_kept: Tensor | None
    state: Tensor  # what the backward needs of a row


def new_results(x: Tensor, targets: Tensor | None, options: Options) -> Results:
    """Uninitialised results for rows x [..., anything]."""
    rows = x.shape[:-1]
    lse = x.new_empty(rows, dtype=computing_dtype(x))
    logp, n_targets = None, 0
    if targets is not None:
        single = targets.dim() < x.dim()
        logp, n_targets = torch.empty_like(lse) if single else lse.new_empty(targets.shape), 1 if single else targets.shape[-1]
    kept = options.kept_kind != KeptKind.NONE
    return Results(
        logp,
        torch.empty_like(lse) if options.with_entropy else None,
        lse,
        torch.empty_like(lse) if options.with_sum_sq else None,
        torch.empty_like(lse) if kept else None,
        torch.empty_like(logp, dtype=torch.bool) if kept and options.kept_kind != KeptKind.UNLISTED and logp is not None else None,
        lse.new_empty((*rows, State.TARGETS + n_targets)),
    )


def for_backend(logits, targets, mask, row_temperature, temperature):
    """Targets, mask and temperature as the backends want them, [N]; copied if need be."""
    if targets is not None:
        targets = targets.contiguous().view(-1, targets.shape[-1] if targets.dim() == logits.dim() else 1)
    if mask is not None:
        mask = mask.contiguous().view(-1)
    if row_temperature is not None:
        temperature = row_temperature.to(computing_dtype(logits)).contiguous().view(-1)
    return targets, mask, temperature


def real_columns(columns: int, options: Options) -> int:
    """How many of the columns are no padding."""
    return min(columns, max(0, options.vocab_size - options.vocab_start)) if options.vocab_size else columns


def targets_in_part(targets: Tensor | None, start: int, stop: int, vocab: int, ignore_index: int) -> Tensor | None:
    """The targets of whole rows as those of the columns [start, stop), counted from `start`."""
    if targets is None:
        return None
    here = torch.where((targets >= start) & (targets < stop), targets - start, ELSEWHERE)
    here = here.masked_fill((targets < 0) | (targets >= vocab), INVALID)
    return here.masked_fill(targets == ignore_index, IGNORED)


def targets_here(targets: Tensor | None, columns: int, options: Options) -> tuple[Tensor | None, int]:
    """(targets, ignore_index) of these columns of whole rows, without their padding."""
    o, real = options, real_columns(columns, options)
    if o.vocab_start == 0 and real >= o.vocab_size:
        return targets, o.ignore_index
    return targets_in_part(targets, o.vocab_start, o.vocab_start + real, o.vocab_size, o.ignore_index), IGNORED


def compute(logits, targets, mask, row_temperature, *options) -> Results:
    """The forward of whole rows; see `Options`."""
    o = Options(*options)
    out = new_results(logits, targets, o)
    if out.logsumexp.numel() == 0:
        return out
    backend = backends.select(logits.device)
    y, mask, temperature = for_backend(logits, targets, mask, row_temperature, o.temperature)
    vocab = real_columns(logits.shape[-1], o)
    if y is not None and not backend.CHECKS_TARGETS and values_readable(logits):
        check_target_range(y, mask, o.ignore_index, vocab)
    of_backend = (*out[:5], out.state)
    rows = as_rows(logits)[..., :vocab]
    backend.token_stats_forward(rows, y, mask, temperature, o.ignore_index, o.kept_kind, o.log_kept, of_backend, o.softcap)
    if out.target_kept is not None:
        mark_kept(out)
    return out


def mark_kept(results: Results) -> None:
    """Fills in target_kept. It is True in rows that were not read."""
    if results.target_kept is not None:
        threshold, shifted = results.state[..., State.THRESHOLD : State.TARGETS], results.state[..., State.TARGETS :]
        torch.ge(shifted, threshold, out=results.target_kept.view(shifted.shape))


def write_gradient(out, logits, targets, mask, row_temperature, *args) -> None:
    """The backward, into out, which may be the logits. Of some columns too: state is the rows'."""
    o, (state, *grads) = Options(*args[: len(Options._fields)]), args[len(Options._fields) :]
    if logits.numel() == 0:
        return
    y, mask, temperature = for_backend(logits, targets, mask, row_temperature, o.temperature)
    upstream = [None if g is None else g.to(state.dtype).contiguous() for g in grads]
    rows = as_rows(logits)
    rows_of_out = rows if out is logits else as_rows(out)
    real = real_columns(logits.shape[-1], o)
    if real < logits.shape[-1]:
        rows_of_out[..., real:].zero_()
        rows, rows_of_out = rows[..., :real], rows_of_out[..., :real]
    if real == 0:
        return
    y, ignore_index = targets_here(y, logits.shape[-1], o)
    backend = backends.select(logits.device)
    backend.token_stats_backward(rows, y, mask, temperature, ignore_index, o.kept_kind, state, upstream, rows_of_out, o.softcap)


def _backward(logits, *args):
    out = new_gradient(logits)
    write_gradient(out, logits, *args)
    return out


_forward = Operator(
    f"token_stats(Tensor logits, {TENSORS}, {OPTIONS}) -> {RESULTS}",
    run=compute,
    fake=lambda logits, targets, mask, row_temperature, *options: new_results(logits, targets, Options(*options)),
)
backward = Operator(f"token_stats_backward(Tensor logits, {TENSORS}, {OPTIONS}, {GRADIENTS}) -> Tensor", _backward, lambda x, *_: new_gradient(x))
overwrite = Operator(
    f"token_stats_backward_(Tensor(a!) logits, {TENSORS}, {OPTIONS}, {GRADIENTS}) -> ()",
    run=lambda logits, *args: write_gradient(logits, logits, *args),
    fake=lambda *args: None,
)
INSTEAD = "use rlkern.reference.token_stats, with targets [..., K], and the loss on what it returns"
row_stats = differentiable(_forward, backward, outputs=5, constants=1, instead=INSTEAD, overwrite=overwrite)


def check_kept_mass(min_p: float | None, min_prob: float | None, with_tail: bool = False) -> tuple[int, float]:
    """(kept_kind, log_kept) of the kept set."""
    if with_tail:
        if not (min_p is None and min_prob is None):
            raise ValueError(f"with_tail=True takes no kept set: expected min_p and min_prob None, got {min_p} and {min_prob}")
        return KeptKind.UNLISTED, 0.0
    if min_p is None and min_prob is None:
        return KeptKind.NONE, 0.0
    if min_p is not None and min_prob is not None:
        raise ValueError(f"give min_p (relative to the largest probability) or min_prob (absolute), not both: got {min_p} and {min_prob}")
    value: Any = min_p if min_prob is None else min_prob
    name, kind = ("min_p", KeptKind.MIN_P) if min_prob is None else ("min_prob", KeptKind.MIN_PROB)
    check_number(name, value)
    if not 0 < value <= 1:
        raise ValueError(f"{name} is a fraction in (0, 1], got {value}")
    return kind, math.log(value)


def row_options(
    x: Tensor,
    targets: Tensor | None,
    *,
    of: str = "logits",
    mask: Tensor | None,
    temperature: float | Tensor,
    ignore_index: int,
    min_p: float | None,
    min_prob: float | None,
    with_sum_sq: bool,
    with_entropy: bool,
    with_tail: bool,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Options]:
    """(targets, mask, row_temperature, options), checked, for rows x [..., anything], called `of`."""
    targets = None if targets is None else check_targets(targets, x, of)
    mask = check_mask(mask, x, of)
    ignore_index = check_ignore_index(ignore_index)
    row_temperature, temperature = check_temperature(temperature, x, targets, mask, ignore_index)
    kept_kind, log_kept = check_kept_mass(min_p, min_prob, with_tail)
    row_temperature, temperature, cap = check_transforms(logit_scale, softcap, row_temperature, temperature, x)
    options = Options(temperature, ignore_index, kept_kind, log_kept, bool(with_sum_sq), bool(with_entropy), cap, 0, vocab_size or 0)
    return targets, mask, row_temperature, options


def public_stats(options: Options, logp, entropy, logsumexp, sum_sq_prob, kept_logmass, target_kept) -> TokenStats:
    """What the operators return, by public name."""
    if options.kept_kind == KeptKind.UNLISTED:
        return TokenStats(logp, entropy, logsumexp, sum_sq_prob, tail_logmass=kept_logmass)
    return TokenStats(logp, entropy, logsumexp, sum_sq_prob, kept_logmass, target_kept, target_in_proxy=target_kept)
