"""Divergences of two rows of logits on a GPU: the launchers. Calling convention: rlkern/backends/contract.py.

pair_terms.py      functions of an entry of both rows
pair_forward.py    one program a pair of rows
pair_split.py      several programs a pair, for long rows; sums over a shard
pair_parts.py      whole rows from their parts
pair_backward.py   several programs a pair
"""

import torch
import triton

from .constants import PAIR_KIND_JSD, PAIR_KIND_SKEW_FORWARD_KL, PAIR_KIND_SKEW_REVERSE_KL
from .launch import device_of, gpu, pair_backward_shape, pair_forward_shape, row_options, starts_aligned, strides
from .pair_backward import pair_backward_kernel
from .pair_forward import pair_forward_kernel
from .pair_parts import pair_parts_merge_kernel
from .pair_split import PARTS, pair_merge_kernel, pair_mixture_part_kernel, pair_mixture_sums_kernel, pair_part_kernel

MIXTURES = tuple(kind.value for kind in (PAIR_KIND_JSD, PAIR_KIND_SKEW_FORWARD_KL, PAIR_KIND_SKEW_REVERSE_KL))


def _same(a, b) -> bool:
    """Whether two temperatures are one, as far as the host can see."""
    tensors = [isinstance(t, torch.Tensor) for t in (a, b)]
    return a.data_ptr() == b.data_ptr() if all(tensors) else a == b if not any(tensors) else False


def _common(logits, other, targets, mask, temperature, other_temperature, state, *caps):
    """(pointers, temperatures, 1 / caps, specialisations). The logits stand for an absent tensor."""
    same, acc = _same(temperature, other_temperature), state.dtype
    (mask_pointer, temperatures), temperature, options = row_options(logits, mask, temperature, acc)
    (_, other_temperatures), other_temperature, _ = row_options(other, None, other_temperature, acc)
    pointers = (logits, other, logits if targets is None else targets, mask_pointer, temperatures, other_temperatures)
    options |= dict(K=0 if targets is None else 1, K_BLOCK=1, SAME_TEMPERATURE=same, SOFTCAP=caps[0] > 0, OTHER_SOFTCAP=caps[1] > 0)
    options |= dict(ALIGN=16 // logits.element_size(), OTHER_ALIGN=16 // other.element_size())
    return pointers, (temperature, other_temperature), [1.0 / cap if cap > 0 else 0.0 for cap in caps], options


def _outputs(out, has_targets):
    """(what a kernel writes, though nobody may have asked for it, before the state; the specialisations)"""
    divergence, logp, entropy, logsumexp, *others, _state = out
    stats, with_other = any(t is not None for t in (logp, entropy, logsumexp)), any(t is not None for t in others)
    wanted = (True, has_targets, stats, stats, has_targets and with_other, with_other, with_other)
    outputs = [
        divergence if not computed else torch.empty_like(divergence) if t is None else t
        for t, computed in zip((divergence, logp, entropy, logsumexp, *others), wanted, strict=True)
    ]
    return outputs, dict(STATS=stats, OTHER=with_other)


def _tiles(logits, other, options):
    """(launch shape, specialisations) of a forward"""
    align = options["ALIGN"]
    aligned = starts_aligned(logits, align) and starts_aligned(other, options["OTHER_ALIGN"])
    capped = options["SOFTCAP"] or options["OTHER_SOFTCAP"]
    shape = pair_forward_shape(gpu(logits.device), logits.shape[-1], logits.element_size(), aligned, capped)
    return shape, dict(ALIGNED=aligned, BLOCK=shape.block, LANES=shape.block // align, STAGES=shape.stages, num_warps=shape.warps)


def pair_forward(logits, other, targets, mask, temperature, other_temperature, ignore_index, kind, beta, out, softcap=0.0, other_softcap=0.0) -> None:
    state = out[-1]
    pointers, temperatures, caps, options = _common(logits, other, targets, mask, temperature, other_temperature, state, softcap, other_softcap)
    outer, inner, vocab = logits.shape
    rows = outer * inner
    outputs, asked = _outputs(out, targets is not None)
    options |= dict(KIND=kind, **asked)
    mixture = kind in MIXTURES
    shape, tile = _tiles(logits, other, options)
    row_args = (inner, *strides(logits), *strides(other), vocab, *temperatures, ignore_index, *caps)
    with device_of(logits):
        if shape.splits == 1:
            pair_forward_kernel[(rows,)](*pointers, *outputs, state, *row_args, beta, **options, MIXTURE=mixture, **tile)
            return
        parts = logits.new_empty((rows, PARTS.value, shape.splits), dtype=state.dtype)
        options["SPLITS"] = shape.splits
        pair_part_kernel[(rows * shape.splits,)](*pointers, parts, *row_args, **options, **tile)
        if mixture:
            of_parts = {name: value for name, value in options.items() if name not in ("STATS", "OTHER")}
            pair_mixture_part_kernel[(rows * shape.splits,)](*pointers, parts, *row_args, beta, **of_parts, **tile)
        of_rows = {name: value for name, value in options.items() if name not in ("ALIGN", "OTHER_ALIGN")}
        pair_merge_kernel[(rows,)](*pointers, parts, *outputs, state, *row_args, beta, **of_rows, MIXTURE=mixture, num_warps=1)


def pair_mixture_sums(logits, other, mask, temperature, other_temperature, kind, beta, state, out, softcap=0.0, other_softcap=0.0) -> None:
    pointers, temperatures, caps, options = _common(logits, other, None, mask, temperature, other_temperature, state, softcap, other_softcap)
    outer, inner, vocab = logits.shape
    _shape, tile = _tiles(logits, other, options)
    row_args = (inner, *strides(logits), *strides(other), vocab, *temperatures, 0, *caps, beta)
    with device_of(logits):
        pair_mixture_sums_kernel[(outer * inner,)](*pointers, state, out, *row_args, KIND=kind, **options, **tile)


def pair_merge(parts, mask, temperature, other_temperature, kind, beta, out) -> None:
    n_parts, rows, _width = parts.shape
    (mask_pointer, temperatures), first, options = row_options(parts[:1], mask, temperature, parts.dtype)
    (_, other_temperatures), second, _ = row_options(parts[:1], None, other_temperature, parts.dtype)
    has_targets = out[1] is not None
    outputs, asked = _outputs(out, has_targets)
    options |= dict(KIND=kind, K=int(has_targets), P_BLOCK=triton.next_power_of_2(n_parts), **asked)
    pointers = parts, mask_pointer, temperatures, other_temperatures, *outputs, out[-1]
    with device_of(parts):
        pair_parts_merge_kernel[(rows,)](
            *pointers, n_parts, *strides(parts), first, second, beta, SAME_TEMPERATURE=_same(temperature, other_temperature), num_warps=1, **options
        )


def pair_backward(
    logits, other, targets, mask, temperature, other_temperature, ignore_index, kind, beta, state, grads, out, softcap=0.0, other_softcap=0.0
) -> None:
    pointers, temperatures, caps, options = _common(logits, other, targets, mask, temperature, other_temperature, state, softcap, other_softcap)
    outer, inner, vocab = logits.shape
    align = options["ALIGN"]
    aligned = all(s % (16 // x.element_size()) == 0 for x in (logits, other, out) for s in strides(x))
    options["OTHER_ALIGN"] = min(align, options["OTHER_ALIGN"])  # columns count from the gradient's boundaries
    shape = pair_backward_shape(gpu(logits.device), vocab, logits.element_size(), aligned, kind in MIXTURES)
    groups = triton.cdiv(vocab + (0 if aligned else align - 1), shape.tiles * shape.block)
    upstream = (state, *(logits if g is None else g for g in grads), out)
    options |= {f"HAS_{name}": g is not None for name, g in zip(("DIVERGENCE", "LOGP", "ENTROPY", "LSE"), grads, strict=True)}

    def same_lead(x, align):
        return all((a - b) % align == 0 for a, b in zip(strides(x), strides(out), strict=True))

    tile = dict(
        ALIGNED=aligned,
        EDGES=not aligned or vocab % align != 0,
        SAME_LEAD=same_lead(logits, align),
        OTHER_SAME_LEAD=same_lead(other, options["OTHER_ALIGN"]),
        **dict(BLOCK=shape.block, TILES=shape.tiles, STAGES=shape.stages, num_warps=shape.warps),
    )
    row_args = (inner, *strides(logits), *strides(other), *strides(out), vocab, groups, *temperatures, ignore_index, *caps, beta)
    with device_of(logits):
        pair_backward_kernel[(outer * inner * groups,)](*pointers, *upstream, *row_args, KIND=kind, **options, **tile)
