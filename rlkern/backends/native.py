"""The C++ kernels on CPU tensors: the calling convention of `backends.py`, spelled as addresses and sizes for `rlkern._cpu`."""

from __future__ import annotations

import torch  # before _cpu: both then share one OpenMP runtime
from torch import Tensor

from .. import _cpu

CHECKS_TARGETS = True  # token_stats_forward raises IndexError itself, before any row is computed

isa = _cpu.isa  # the instruction set in use, RLKERN_CPU_ISA where that is set
isas = _cpu.isas  # those that were built and that this processor runs, best first
use_isa = _cpu.use_isa  # switches the whole process to another of them (for tests); ValueError for one that cannot run here

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _rows(logits, targets, mask, temperature, ignore_index, state) -> tuple:
    outer, inner, vocab = logits.shape
    stride_outer, stride_inner, _ = logits.stride()
    per_row = isinstance(temperature, Tensor)
    return (
        _DTYPES[logits.dtype],
        logits.data_ptr(),
        stride_outer,
        stride_inner,
        outer * inner,
        inner,
        vocab,
        _address(targets),
        0 if targets is None else targets.shape[-1],
        _address(mask),
        1.0 if per_row else temperature,
        temperature.data_ptr() if per_row else 0,
        ignore_index,
        state.data_ptr(),
    )


def token_stats_forward(logits, targets, mask, temperature, ignore_index, kept_kind, log_kept, out) -> None:
    """See `backends.py`. Raises IndexError for a target outside [0, V) that counts (its row is not skipped and it is not ignore_index)."""
    logp, entropy, lse, sum_sq, kept, state = out
    _cpu.token_stats_forward(
        *_rows(logits, targets, mask, temperature, ignore_index, state),
        kept_kind,
        log_kept,
        _address(logp),
        _address(entropy),
        lse.data_ptr(),
        _address(sum_sq),
        _address(kept),
        torch.get_num_threads(),
    )


def token_stats_backward(logits, targets, mask, temperature, ignore_index, state, grads, out) -> None:
    """See `backends.py`. `out` may be `logits`: the gradient then replaces them."""
    stride_outer, stride_inner, _ = out.stride()
    _cpu.token_stats_backward(
        *_rows(logits, targets, mask, temperature, ignore_index, state),
        *map(_address, grads),
        out.data_ptr(),
        stride_outer,
        stride_inner,
        torch.get_num_threads(),
    )


_SUMS = {torch.float32: _cpu.covariance_sums_float32, torch.float64: _cpu.covariance_sums_float64}
_COVARIANCE = {torch.float32: _cpu.covariance_float32, torch.float64: _cpu.covariance_float64}
_SELECT = {torch.float32: _cpu.select_bottom_float32, torch.float64: _cpu.select_bottom_float64}


def covariance_sums(logp, advantages, mask) -> Tensor:
    """See `backends.py`."""
    sums = logp.new_empty((1, 3), dtype=torch.float64)
    _SUMS[logp.dtype](logp.data_ptr(), advantages.data_ptr(), mask.data_ptr(), logp.numel(), sums.data_ptr())
    return sums


def token_covariance(logp, advantages, mask, sums, out) -> None:
    """See `backends.py`."""
    _COVARIANCE[logp.dtype](logp.data_ptr(), advantages.data_ptr(), mask.data_ptr(), logp.numel(), _address(sums), out.data_ptr())


def select_bottom(values, valid, count, out) -> None:
    """See `backends.py`."""
    _SELECT[values.dtype](values.data_ptr(), valid.data_ptr(), values.numel(), count.data_ptr(), out.data_ptr())


_SELECT_FRACTION = {torch.float32: _cpu.select_fraction_float32, torch.float64: _cpu.select_fraction_float64}
_MEANS = {torch.float32: _cpu.selected_means_float32, torch.float64: _cpu.selected_means_float64}
_RATIO = {torch.float32: _cpu.ratio_terms_float32, torch.float64: _cpu.ratio_terms_float64}
_KL = {torch.float32: _cpu.kl_terms_float32, torch.float64: _cpu.kl_terms_float64}


def select_fraction(values, valid, group, fraction, minimum, least, out) -> None:
    """See `backends.py`."""
    _SELECT_FRACTION[values.dtype](values.data_ptr(), valid.data_ptr(), group.data_ptr(), values.numel(), fraction, minimum, least, out.data_ptr())


def selected_means(values, selected, mask, out) -> None:
    """See `backends.py`."""
    _MEANS[values.dtype](values.data_ptr(), selected.data_ptr(), mask.data_ptr(), values.numel(), out.data_ptr())


def ratio_terms(logp, old_logp, advantages, mask, unclipped, bounds, out) -> None:
    """See `backends.py`."""
    terms, free, summary = out
    _RATIO[logp.dtype](
        *(logp.data_ptr(), _address(old_logp), advantages.data_ptr(), mask.data_ptr(), _address(unclipped), logp.numel()),
        *(*bounds, terms.data_ptr(), free.data_ptr(), summary.data_ptr()),
    )


def kl_terms(logp, reference, mask, kind, straight_through, clamp, out) -> None:
    """See `backends.py`."""
    _KL[logp.dtype](logp.data_ptr(), reference.data_ptr(), mask.data_ptr(), logp.numel(), kind, straight_through, clamp, out.data_ptr())
