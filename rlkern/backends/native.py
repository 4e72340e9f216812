"""The C++ kernels on CPU tensors: the convention of `contract.py`, as `rlkern._cpu` takes it.

`_cpu` takes dicts whose keys are the fields of its structures, so that no two arguments can change places.
It asks a tensor for its address itself, and takes None for an absent one."""

from __future__ import annotations

import torch
from torch import Tensor

from . import native_library
from .contract import Keep, SetKind, mass_bits
from .reference_pair_parts import pair_merge as pair_merge

_cpu = native_library.load()

CHECKS_TARGETS = True  # forwards raise IndexError themselves, before any row is computed

isa = _cpu.isa  # the instruction set in use, RLKERN_CPU_ISA where that is set
isas = _cpu.isas  # those that were built and that this processor runs, best first
use_isa = _cpu.use_isa  # switches the process to another of them, for tests; ValueError if it cannot run here

_DTYPES = {getattr(torch, name): code for code, name in enumerate(_cpu.constants["DType"])}
_TOKEN_DTYPES = {dtype: _DTYPES[dtype] for dtype in (torch.float32, torch.float64)}  # of numbers one a token


def _temperature(temperature) -> dict:
    per_row = isinstance(temperature, Tensor)
    return {"temperature": 1.0 if per_row else temperature, "temperatures": temperature if per_row else None}


def _rows(logits, targets, mask, temperature, ignore_index, state) -> dict:
    outer, inner, vocab = logits.shape
    return {
        "dtype": _DTYPES[logits.dtype],
        "logits": logits,
        "rows": outer * inner,
        "inner": inner,
        "vocab": vocab,
        "targets": targets,
        "n_targets": 0 if targets is None else targets.shape[-1],
        "mask": mask,
        **_temperature(temperature),
        "ignore_index": ignore_index,
        "state": state,
        "threads": torch.get_num_threads(),
    }


def _sets(keep: Keep, n: int) -> dict:
    of_lists, of_entries = keep.kind == SetKind.LISTS, keep.kind in (SetKind.BITS, SetKind.MASK)
    return {
        "kind": keep.kind,
        "outside": keep.outside,
        "open_empty": keep.open_empty,
        "ids": keep.sets if of_lists else None,
        "wide": keep.sets.dtype == torch.int64,
        "n_ids": keep.sets.numel() if of_lists else 0,
        "lists": n if keep.begin is None else keep.begin.numel(),
        "begin": keep.begin,
        "end": keep.end,
        "list": keep.rows,
        "entries": keep.sets if of_entries else None,
        "least": keep.sets if keep.kind == SetKind.AT_LEAST else None,
    }


def _forward(kept_kind, log_kept, results, softcap) -> dict:
    names = ("logp", "entropy", "logsumexp", "sum_sq_prob", "kept_logmass")
    return {"softcap": softcap, "kept_kind": kept_kind, "log_kept": log_kept, **dict(zip(names, results, strict=True))}


def token_stats_forward(logits, targets, mask, temperature, ignore_index, kept_kind, log_kept, out, softcap=0.0, keep=None, keep_out=None) -> None:
    """Raises IndexError for a target outside [0, V) that counts: its row is not skipped and it is not
    ignore_index. Also for a listed id or a list out of range, in a row that is not skipped."""
    *results, state = out
    rows = _rows(logits, targets, mask, temperature, ignore_index, state)
    own = _forward(kept_kind, log_kept, results, softcap)
    if keep is None:
        return _cpu.token_stats_forward(rows, own)
    names = ("target_kept", "full_entropy", "full_logsumexp", "full_state")
    _cpu.token_stats_in_sets_forward(rows, own, _sets(keep, rows["rows"]), dict(zip(names, keep_out, strict=True)))


def token_stats_merge(parts, targets, mask, temperature, ignore_index, kept_kind, log_kept, out) -> None:
    *results, state = out
    rows = {**_rows(parts, targets, mask, temperature, ignore_index, state), "rows": parts.shape[1]}
    _cpu.token_stats_merge(rows, _forward(kept_kind, log_kept, results, 0.0), {"parts": len(parts)})


def token_stats_kept_masses(logits, targets, mask, temperature, ignore_index, kept_kind, state, out, softcap=0.0) -> None:
    rows = _rows(logits, targets, mask, temperature, ignore_index, state)
    _cpu.token_stats_kept_masses(rows, {"softcap": softcap, "kept_kind": kept_kind, "masses": out})


def token_stats_backward(logits, targets, mask, temperature, ignore_index, kept_kind, state, grads, out, softcap=0.0, keep=None, full=None) -> None:
    g_logp, g_entropy, g_logsumexp, g_sum_sq_prob, g_kept_logmass = grads
    rows = _rows(logits, targets, mask, temperature, ignore_index, state)
    own = {
        "softcap": softcap,
        "kept_kind": kept_kind,
        "g_logp": g_logp,
        "g_entropy": g_entropy,
        "g_logsumexp": g_logsumexp,
        "g_sum_sq_prob": g_sum_sq_prob,
        "g_kept_logmass": g_kept_logmass,
        "out": out,
    }
    if keep is None:
        return _cpu.token_stats_backward(rows, own)
    of_full = dict(zip(("full_state", "g_full_entropy", "g_full_logsumexp"), full or (None, None, None), strict=True))
    _cpu.token_stats_in_sets_backward(rows, own, _sets(keep, rows["rows"]), of_full)


def _pair(other, other_temperature, kind, beta, softcap, other_softcap) -> dict:
    per_row = isinstance(other_temperature, Tensor)
    return {
        "other_dtype": _DTYPES[other.dtype],
        "other": other,
        "other_temperature": 1.0 if per_row else other_temperature,
        "other_temperatures": other_temperature if per_row else None,
        "softcap": softcap,
        "other_softcap": other_softcap,
        "kind": kind,
        "beta": beta,
    }


def pair_forward(logits, other, targets, mask, temperature, other_temperature, ignore_index, kind, beta, out, softcap=0.0, other_softcap=0.0) -> None:
    """Raises IndexError as token_stats_forward does."""
    names = ("divergence", "logp", "entropy", "logsumexp", "other_logp", "other_entropy", "other_logsumexp")
    *results, state = out
    rows = _rows(logits, targets, mask, temperature, ignore_index, state)
    pair = _pair(other, other_temperature, kind, beta, softcap, other_softcap)
    _cpu.pair_forward(rows, pair, dict(zip(names, results, strict=True)))


def pair_mixture_sums(logits, other, mask, temperature, other_temperature, kind, beta, state, out, softcap=0.0, other_softcap=0.0) -> None:
    rows = _rows(logits, None, mask, temperature, 0, state)
    _cpu.pair_mixture_sums(rows, _pair(other, other_temperature, kind, beta, softcap, other_softcap), {"sums": out})


def pair_backward(
    logits, other, targets, mask, temperature, other_temperature, ignore_index, kind, beta, state, grads, out, softcap=0.0, other_softcap=0.0
) -> None:
    names = ("g_divergence", "g_logp", "g_entropy", "g_logsumexp")
    rows = _rows(logits, targets, mask, temperature, ignore_index, state)
    own = {**dict(zip(names, grads, strict=True)), "out": out}
    _cpu.pair_backward(rows, _pair(other, other_temperature, kind, beta, softcap, other_softcap), own)


def row_moments_forward(logits, targets, mask, ignore_index, out) -> None:
    """Raises IndexError as token_stats_forward."""
    centred_target, variance, mean = out
    own = {"centred_target": centred_target, "variance": variance}
    _cpu.row_moments_forward(_rows(logits, targets, mask, 1.0, ignore_index, mean), own)


def row_moments_backward(logits, targets, mask, ignore_index, mean, grads, out) -> None:
    g_target, g_variance = grads
    own = {"g_target": g_target, "g_variance": g_variance, "out": out}
    _cpu.row_moments_backward(_rows(logits, targets, mask, 1.0, ignore_index, mean), own)


def did_entropy_forward(logits, reference, mask, temperature, out) -> None:
    entropy, state = out
    own = {"reference_dtype": _DTYPES[reference.dtype], "reference": reference, "entropy": entropy}
    _cpu.did_entropy_forward(_rows(logits, None, mask, temperature, 0, state), own)


def did_entropy_backward(logits, reference, mask, temperature, state, grad, out) -> None:
    d_logits, d_reference = out
    own = {"reference_dtype": _DTYPES[reference.dtype], "reference": reference}
    own |= {"g_entropy": grad, "out": d_logits, "reference_out": d_reference}
    _cpu.did_entropy_backward(_rows(logits, None, mask, temperature, 0, state), own)


def sampler_threshold(logits, mask, temperature, top_k, top_p, log_min_p, joint, out) -> None:
    own = {"top_k": top_k, "top_p": top_p, "log_min_p": log_min_p, "joint": joint, "mass_bits": mass_bits(logits.shape[-1])}
    _cpu.sampler_threshold(_rows(logits, None, mask, temperature, 0, out), own)


def _kept(dtype, rows, width, vocab, ids, row) -> dict:
    pairs = {"dtype": _DTYPES[dtype], "rows": rows, "width": width, "vocab": vocab, "ids": ids, "row": row}
    return {**pairs, "threads": torch.get_num_threads()}


def kept_logits(hidden, weight, bias, ids, row, out) -> None:
    outer, inner, width = hidden.shape
    own = {"hidden": hidden, "weight": weight, "inner": inner, "pairs": len(ids), "bias": bias, "out": out}
    _cpu.kept_logits(_kept(hidden.dtype, outer * inner, width, weight.shape[1], ids, row), own)


def kept_hidden_gradient(weight, ids, offsets, grad, out) -> None:
    n, width = out.shape
    own = {"weight": weight, "offsets": offsets, "grad": grad, "out": out}
    _cpu.kept_hidden_gradient(_kept(weight.dtype, n, width, weight.shape[1], ids, None), own)


def kept_weight_gradient(hidden, ids, row, grad, out) -> None:
    outer, inner, width = hidden.shape
    own = {"hidden": hidden, "inner": inner, "pairs": len(ids), "grad": grad, "out": out}
    _cpu.kept_weight_gradient(_kept(hidden.dtype, outer * inner, width, len(out), ids, row), own)


def kept_rows_forward(logits, ids, row, offsets, targets, counted, temperature, out) -> None:
    logp, entropy, logsumexp, sum_sq, state, place = out
    call = {"n": len(targets), "n_targets": targets.shape[1], "logits": logits, "ids": ids, "offsets": offsets, "targets": targets}
    call |= {"counted": counted, **_temperature(temperature), "logp": logp, "entropy": entropy, "logsumexp": logsumexp}
    call |= {"sum_sq": sum_sq, "state": state, "place": place}
    _cpu.kept_rows_forward(_TOKEN_DTYPES[logits.dtype], call)


def kept_rows_backward(logits, row, offsets, place, temperature, state, grads, out) -> None:
    names = ("g_logp", "g_entropy", "g_logsumexp", "g_sum_sq")
    call = {"n": len(place), "n_targets": place.shape[1], "logits": logits, "offsets": offsets, "place": place}
    call |= {**_temperature(temperature), "state": state, **dict(zip(names, grads, strict=True)), "out": out}
    _cpu.kept_rows_backward(_TOKEN_DTYPES[logits.dtype], call)


def token_covariance(logp, advantages, mask, sums, out) -> None:
    call = {"n": logp.numel(), "logp": logp, "advantages": advantages, "mask": mask, "sums": sums, "out": out}
    _cpu.token_covariance(_TOKEN_DTYPES[logp.dtype], call)


def sequence_sums(values, mask, cu_seqlens, out) -> None:
    call = {"n": values.shape[1], "rows": values.shape[0], "sequences": out.shape[1]}
    call |= {"values": values, "mask": mask, "cu_seqlens": cu_seqlens, "out": out}
    _cpu.sequence_sums(_TOKEN_DTYPES[values.dtype], call)


def sequence_spread(x, mask, seq_idx, out) -> None:
    call = {"n": out.numel(), "sequences": x.numel(), "values": x, "seq_idx": seq_idx, "mask": mask, "out": out}
    _cpu.sequence_spread(_TOKEN_DTYPES[x.dtype], call)


def select_bottom(values, valid, count, out) -> None:
    call = {"n": values.numel(), "values": values, "valid": valid, "count": count, "out": out}
    _cpu.select_bottom(_TOKEN_DTYPES[values.dtype], call)


def select_fraction(values, valid, group, fraction, minimum, least, out) -> None:
    call = {"n": values.numel(), "values": values, "valid": valid, "group": group}
    call |= {"fraction": fraction, "minimum": minimum, "least": least, "out": out}
    _cpu.select_fraction(_TOKEN_DTYPES[values.dtype], call)


def selected_means(values, selected, mask, out) -> None:
    call = {"n": values.numel(), "values": values, "selected": selected, "mask": mask, "out": out}
    _cpu.selected_means(_TOKEN_DTYPES[values.dtype], call)


def ratio_terms(logp, old_logp, advantages, mask, unclipped, bounds, out) -> None:
    low, high, dual, least, most = bounds
    terms, free, summary = out
    call = {"n": logp.numel(), "logp": logp, "old_logp": old_logp, "advantages": advantages, "mask": mask}
    call |= {"unclipped": unclipped, "low": low, "high": high, "dual": dual, "least": least, "most": most}
    call |= {"terms": terms, "free": free, "summary": summary}
    _cpu.ratio_terms(_TOKEN_DTYPES[logp.dtype], call)


def kl_terms(logp, reference, mask, kind, straight_through, clamp, out) -> None:
    call = {"n": logp.numel(), "logp": logp, "reference": reference, "mask": mask, "terms": out}
    call |= {"kind": kind, "straight_through": straight_through, "clamp": clamp}
    _cpu.kl_terms(_TOKEN_DTYPES[logp.dtype], call)
