"""The primitives as torch operators: validation, schema, fake implementations and autograd. The maths is in `reference.py`.

Each public function checks its input, then calls an `autograd.Function` around two opaque operators (forward, backward). Opaque on purpose:
torch.compile keeps them whole and fuses the [B, T] arithmetic around them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, spare
from .checks import check_flag, check_number
from .rows import (
    DEBUG,
    OnlyOnce,
    accumulation_dtype,
    as_rows,
    check_ignore_index,
    check_logits,
    check_mask,
    check_target_range,
    check_targets,
    check_temperature,
    watched,
)

STATE_SIZE = 6  # columns of the backward's row state before the targets' own, see backends.py
_KEPT_NONE, _KEPT_MIN_P, _KEPT_MIN_PROB = 0, 1, 2

_SECOND = "use rlkern.reference.token_stats, with targets [..., K], and the loss on what it returns"

_lib = torch.library.Library("rlkern", "DEF")
_ROW_ARGS = "Tensor? targets, Tensor? mask, Tensor? row_temperature, float temperature, int ignore_index"
_GRAD_ARGS = "Tensor? g_logp, Tensor? g_entropy, Tensor? g_logsumexp, Tensor? g_sum_sq_prob, Tensor? g_kept_logmass"


class TokenStats(NamedTuple):
    """What one row of logits says of one token; see `token_stats`. All fields have the shape of the rows, `logp` that of the targets."""

    logp: Tensor
    entropy: Tensor | None
    logsumexp: Tensor
    sum_sq_prob: Tensor | None = None
    kept_logmass: Tensor | None = None
    target_kept: Tensor | None = None  # bool: the target is in the kept set

    @property
    def proxy_logp(self) -> Tensor:
        """log-probability of the target after renormalising over the kept set, `logp - kept_logmass`; -inf where the target was not kept."""
        if self.kept_logmass is None:
            raise ValueError("proxy_logp needs a kept set: call token_stats with min_p=... or min_prob=...")
        kept_logmass = self.kept_logmass if self.logp.shape == self.kept_logmass.shape else self.kept_logmass.unsqueeze(-1)
        return torch.where(self.target_kept, self.logp - kept_logmass, -math.inf)


def _row_inputs(logits, targets, mask, row_temperature, temperature):
    """The operators' arguments as the backends want them; every conversion is of [N] size, and none when the input already fits."""
    if targets is not None:
        targets = targets.contiguous().view(-1, targets.shape[-1] if targets.dim() == logits.dim() else 1)
    if mask is not None:
        mask = mask.contiguous().view(-1)
    if row_temperature is not None:
        temperature = row_temperature.to(accumulation_dtype(logits)).contiguous().view(-1)
    return targets, mask, temperature


# --- forward ---------------------------------------------------------------------------------------------------------------------------------

_lib.define(
    f"token_stats(Tensor logits, {_ROW_ARGS}, int kept_kind, float log_kept, bool with_sum_sq, bool with_entropy=True) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _new_stats(logits, targets, kept_kind, with_sum_sq, with_entropy=True):
    """(logp, entropy, logsumexp, sum_sq_prob, kept_logmass, state), uninitialised; None for what was not asked for."""
    acc, rows = accumulation_dtype(logits), logits.shape[:-1]
    n_targets = 0 if targets is None else targets.shape[-1] if targets.dim() == logits.dim() else 1
    return (
        None if targets is None else logits.new_empty(targets.shape, dtype=acc),
        logits.new_empty(rows, dtype=acc) if with_entropy else None,
        logits.new_empty(rows, dtype=acc),
        logits.new_empty(rows, dtype=acc) if with_sum_sq else None,
        logits.new_empty(rows, dtype=acc) if kept_kind else None,
        logits.new_empty((*rows, STATE_SIZE + n_targets), dtype=acc),
    )


def _token_stats(logits, targets, mask, row_temperature, temperature, ignore_index, kept_kind, log_kept, with_sum_sq, with_entropy=True):
    out = _new_stats(logits, targets, kept_kind, with_sum_sq, with_entropy)
    if out[2].numel() == 0:
        return out
    backend = backends.select(logits.device)
    targets, mask, temperature = _row_inputs(logits, targets, mask, row_temperature, temperature)
    if targets is not None and (DEBUG or (logits.device.type == "cpu" and not getattr(backend, "CHECKS_TARGETS", False))):
        check_target_range(targets, mask, ignore_index, logits.shape[-1])
    backend.token_stats_forward(as_rows(logits), targets, mask, temperature, ignore_index, kept_kind, log_kept, out)
    return out


def _as_op(function):
    """An operator cannot return None: a tensor without elements stands for it."""

    def op(logits, *args):
        return tuple(logits.new_empty(0, dtype=accumulation_dtype(logits)) if t is None else t for t in function(logits, *args))

    return op


def _token_stats_fake(logits, targets, mask, row_temperature, temperature, ignore_index, kept_kind, log_kept, with_sum_sq, with_entropy=True):
    return _new_stats(logits, targets, kept_kind, with_sum_sq, with_entropy)


# --- backward --------------------------------------------------------------------------------------------------------------------------------

_lib.define(
    f"token_stats_backward(Tensor logits, {_ROW_ARGS}, Tensor state, {_GRAD_ARGS}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_lib.define(
    f"token_stats_backward_(Tensor(a!) logits, {_ROW_ARGS}, Tensor state, {_GRAD_ARGS}) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _write_gradient(out, logits, targets, mask, row_temperature, temperature, ignore_index, state, *grads):
    if logits.numel() == 0:
        return
    y, mask, temperature = _row_inputs(logits, targets, mask, row_temperature, temperature)
    grads = [None if g is None else g.to(state.dtype).contiguous() for g in grads]
    rows = as_rows(logits)
    out = rows if out is logits else as_rows(out)
    backends.select(logits.device).token_stats_backward(rows, y, mask, temperature, ignore_index, state, grads, out)


def _new_gradient(logits, *args):
    """Contiguous; but where the logits are a slice that leaves little out, with the slice's strides, so that a kernel meets the same alignment
    in the rows it reads and in those it writes."""
    if logits.is_contiguous():
        return spare.empty(logits)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(logits.shape, logits.stride(), strict=True))
    if logits.numel() < extent <= 1.125 * logits.numel():
        return logits.new_empty_strided(logits.shape, logits.stride())
    return spare.empty(logits)


def _token_stats_backward(logits, *args):
    out = _new_gradient(logits)
    _write_gradient(out, logits, *args)
    return out


def _token_stats_backward_(logits, *args):
    _write_gradient(logits, logits, *args)


_lib.impl("token_stats", _as_op(_token_stats), "CompositeExplicitAutograd")
_lib.impl("token_stats_backward", _token_stats_backward, "CompositeExplicitAutograd")
_lib.impl("token_stats_backward_", _token_stats_backward_, "CompositeExplicitAutograd")
torch.library.register_fake("rlkern::token_stats", _as_op(_token_stats_fake), lib=_lib)
torch.library.register_fake("rlkern::token_stats_backward", _new_gradient, lib=_lib)
torch.library.register_fake("rlkern::token_stats_backward_", lambda *args: None, lib=_lib)


def _refuse(ctx, *grads):
    # Without this, torch.compile(torch.func.grad(f)) returns zeros without a word (pytorch/pytorch#193279).
    raise RuntimeError(
        "rlkern's operators are differentiated by torch.autograd, once, through rlkern.token_stats and its relatives; not by torch.func"
    )


for _name in ("token_stats", "token_stats_backward"):
    torch.library.register_autograd(f"rlkern::{_name}", _refuse, setup_context=lambda ctx, inputs, output: None, lib=_lib)

_op = torch.ops.rlkern.token_stats.default
_op_backward = torch.ops.rlkern.token_stats_backward.default
_op_backward_ = torch.ops.rlkern.token_stats_backward_.default


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, mask, row_temperature, options, inplace_backward):
        run = _op if watched(logits) else _token_stats
        logp, entropy, lse, sum_sq, kept, state = run(logits, targets, mask, row_temperature, *options)
        temperature, ignore_index, kept_kind, _, with_sum_sq, with_entropy = options
        ctx.save_for_backward(logits, targets, mask, row_temperature, state)
        ctx.constants = (temperature, ignore_index, kept_kind, with_sum_sq, with_entropy, inplace_backward)
        ctx.set_materialize_grads(False)
        if torch.compiler.is_compiling():  # Dynamo of torch 2.6 has no place for a None here
            ctx.mark_non_differentiable(state)
            return logp, entropy, lse, sum_sq, kept, state
        # Outputs that were not asked for are not handed to autograd, nor paid for.
        if not kept_kind:
            return logp, entropy, lse, sum_sq if with_sum_sq else None, None, None
        ctx.mark_non_differentiable(state)
        return logp, entropy, lse, sum_sq if with_sum_sq else None, kept, state

    @staticmethod
    def backward(ctx, *grads):
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return (_gradient(ctx, grads[:-1]), None, None, None, None, None)
        with torch.no_grad():  # create_graph=True
            d_logits = _gradient(ctx, grads[:-1])
        return (OnlyOnce.apply(d_logits, ctx.saved_tensors[0], _SECOND), None, None, None, None, None)


def _gradient(ctx, grads) -> Tensor:
    logits, targets, mask, row_temperature, state = ctx.saved_tensors
    temperature, ignore_index, kept_kind, with_sum_sq, with_entropy, inplace_backward = ctx.constants
    g_logp, g_entropy, g_logsumexp, g_sum_sq_prob, g_kept_logmass = grads
    args = (
        *(logits, targets, mask, row_temperature, temperature, ignore_index, state),
        # torch.compile hands zeros also to the outputs that were not asked for
        *(None if targets is None else g_logp, g_entropy if with_entropy else None, g_logsumexp),
        *(g_sum_sq_prob if with_sum_sq else None, g_kept_logmass if kept_kind else None),
    )
    if not inplace_backward or torch.compiler.is_compiling():
        return (_op_backward if watched(logits) else _token_stats_backward)(*args)
    (_op_backward_ if watched(logits) else _token_stats_backward_)(*args)
    # A second consumer that saved the logits must raise, not read the gradient that now stands there.
    torch.autograd.graph.increment_version(logits)
    return logits.detach()


# --- public ----------------------------------------------------------------------------------------------------------------------------------


def _check_kept(min_p: float | None, min_prob: float | None) -> tuple[int, float]:
    if min_p is not None and min_prob is not None:
        raise ValueError(f"give min_p (relative to the largest probability) or min_prob (absolute), not both: got {min_p} and {min_prob}")
    for name, value, kind in (("min_p", min_p, _KEPT_MIN_P), ("min_prob", min_prob, _KEPT_MIN_PROB)):
        if value is not None:
            check_number(name, value)
            if not 0 < value <= 1:
                raise ValueError(f"{name} is a fraction in (0, 1], got {value}")
            return kind, math.log(value)
    return _KEPT_NONE, 0.0


def _check_inplace(logits: Tensor) -> None:
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(f"inplace_backward writes the gradient over the logits: their last stride must be 1, got {logits.stride(-1)}")
    if any(size > 1 and stride == 0 for size, stride in zip(logits.shape, logits.stride(), strict=True)):
        raise ValueError(f"inplace_backward cannot write into expanded logits (strides {logits.stride()} share memory)")
    if logits.dim() > 3:
        try:
            logits.detach().view(-1, *logits.shape[-2:])
        except RuntimeError:
            raise ValueError(f"inplace_backward needs leading dimensions that merge into one, got strides {logits.stride()}") from None


def _stats(logits, targets, mask, temperature, ignore_index, min_p, min_prob, with_sum_sq, with_entropy, inplace_backward) -> TokenStats:
    check_logits(logits)
    targets = None if targets is None else check_targets(targets, logits)
    mask = check_mask(mask, logits)
    ignore_index = check_ignore_index(ignore_index)
    row_temperature, temperature = check_temperature(temperature, logits, targets, mask, ignore_index)
    kept_kind, log_kept = _check_kept(min_p, min_prob)
    for name, flag in (("with_sum_sq", with_sum_sq), ("with_entropy", with_entropy), ("inplace_backward", inplace_backward)):
        check_flag(name, flag)
    if inplace_backward:
        _check_inplace(logits)
    options = (temperature, ignore_index, kept_kind, log_kept, bool(with_sum_sq), bool(with_entropy))
    return _as_stats(_TokenStats.apply(logits, targets, mask, row_temperature, options, bool(inplace_backward)), targets, options)


def _as_stats(outputs, targets: Tensor | None, options) -> TokenStats:
    logp, entropy, lse, sum_sq, kept, state = outputs
    _, _, kept_kind, _, with_sum_sq, with_entropy = options
    target_kept = None
    if kept_kind and targets is not None:
        target_kept = (state[..., STATE_SIZE:] >= state[..., STATE_SIZE - 1 : STATE_SIZE]).reshape(targets.shape)
    return TokenStats(logp, entropy if with_entropy else None, lse, sum_sq if with_sum_sq else None, kept if kept_kind else None, target_kept)


def token_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    min_p: float | None = None,
    min_prob: float | None = None,
    with_sum_sq: bool = False,
    with_entropy: bool = True,
    inplace_backward: bool = False,
    group=None,
) -> TokenStats:
    """Log-probability, entropy and more of each row of logits in one read, differentiable in one read and one write.

    With u = logits / temperature and p = softmax(u):

        logp = log p[target]     entropy = -sum p log p     logsumexp = log sum e^u     sum_sq_prob = sum p^2
        kept_logmass = log of the mass of the kept set, {p >= min_p * max p} or {p >= min_prob}; KL(kept, renormalised || p) = -kept_logmass

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64, any leading strides (`logits[:, :-1]` is not copied). -inf entries are legal
            (probability 0, gradient 0).
        targets: [...] integer token ids, or [..., K] for K log-probabilities a row.
        mask: [...] bool or number; rows where it is 0 are not read: zeros out, zero gradient.
        temperature: a positive float, or a tensor [...] with one entry a row, anything where the row is not read. It carries no gradient.
        ignore_index: a target that marks its row as masked (with [..., K]: its entry; the row only when all K are ignored).
        min_p: keep the tokens with p >= min_p * max p, inclusive (Lp-Reg, arXiv 2510.03222, eq. 5). The set is detached.
        min_prob: keep the tokens with p >= min_prob, inclusive. An empty set has kept_logmass -inf and no gradient.
        with_sum_sq: also compute sum_sq_prob.
        with_entropy: False leaves the entropy out: its field is None, and a CPU saves a tenth of the forward.
        inplace_backward: write the gradient over the logits: no memory for a gradient, and the logits are gone after the backward.
            Another operation that saved the logits raises in its own backward. Under torch.compile the gradient is a new tensor.
        group: reserved for vocabulary-parallel logits; must be None.

    Returns:
        TokenStats(logp, entropy | None, logsumexp, sum_sq_prob | None, kept_logmass | None) in float32 (float64 for float64 logits), shaped like the
        rows (logp like targets), freshly allocated; all carry gradients. `.proxy_logp` is logp - kept_logmass, -inf outside the kept set.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices or options other than the above.
        IndexError: on a CPU for a target outside [0, V) that is not ignore_index. On a GPU that row's logp is NaN (RLKERN_DEBUG=1 checks there too).
    """
    if group is not None:
        raise ValueError("group: vocabulary-parallel logits are not supported in this version, expected None")
    if targets is None:
        raise TypeError("targets must be an integer tensor; entropy_from_logits works without targets")
    return _stats(logits, targets, mask, temperature, ignore_index, min_p, min_prob, with_sum_sq, with_entropy, inplace_backward)


def token_logprobs(logits: Tensor, targets: Tensor, **options) -> Tensor:
    """log softmax(logits / temperature) at the targets: drop-in for `selective_log_softmax` and `logprobs_from_logits`.

    Takes the arguments of `token_stats`; returns its `logp`, float32, shaped like targets ([...] or [..., K]).
    """
    return token_stats(logits, targets, **{"with_entropy": False, **options}).logp


def entropy_from_logits(logits: Tensor, *, temperature: float | Tensor = 1.0, mask: Tensor | None = None) -> Tensor:
    """Entropy, in nats, of softmax(logits / temperature) over the last dimension: [..., V] -> [...], float32 (float64 for float64 logits).

    Differentiable; `temperature` and `mask` as in `token_stats`. Entries at -inf count as probability 0.
    """
    return _stats(logits, None, mask, temperature, -100, None, None, False, True, False).entropy
