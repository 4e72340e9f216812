"""Row statistics of logits on a GPU: the launchers. Calling convention: rlkern/backends/contract.py.

token_stats_forward.py     one program a row
token_stats_split.py       several programs a row, for long rows
token_stats_parts.py       whole rows from their parts
token_stats_backward.py    several programs a row, and one more for many targets
keep.py                    sets of kept columns that the kernels above read beside the logits
kept_lists.py              kept sets that are lists: their logits are gathered
"""

from typing import NamedTuple

import torch
import triton

from .constants import ELSEWHERE, KEPT_NONE, KEPT_UNLISTED, OUTSIDE_EVERYTHING, SET_AT_LEAST, SET_LISTS, STATE_KEPT, STATE_TARGETS
from .keep import set_arguments
from .kept_lists import listed_backward, listed_forward
from .launch import (
    FEW_TARGETS,
    ForwardShape,
    backward_shape,
    device_of,
    forward_shape,
    gpu,
    row_options,
    starts_aligned,
    stats_options,
    strides,
    target_warps,
)
from .token_stats_backward import token_stats_backward_kernel, token_stats_backward_targets_kernel
from .token_stats_forward import CAN_SHIFT, token_stats_forward_kernel
from .token_stats_parts import token_stats_merge_kernel
from .token_stats_split import token_stats_kept_part_kernel, token_stats_part_kernel, token_stats_split_merge_kernel


def token_stats_forward(logits, targets, mask, temperature, ignore_index, kept_kind, log_kept, out, softcap=0.0, keep=None, keep_out=None) -> None:
    rows, of_row = (logits, targets), (temperature, ignore_index, kept_kind, log_kept)
    if keep is None:
        _forward(*rows, mask, *of_row, out, softcap)
        return
    target_kept, full_state = keep_out[0], keep_out[3]
    lists = keep.kind == SET_LISTS.value
    if full_state is not None:
        # Beside lists these are also the results of rows over all ids.
        of_whole = out if lists else (torch.empty_like(out[0]), None, torch.empty_like(out[2]), None, None, torch.empty_like(out[5]))
        of_whole = (of_whole[0], keep_out[1] if of_whole[1] is None else of_whole[1], *of_whole[2:])
        _forward(*rows, mask, temperature, ignore_index, kept_kind if lists else KEPT_NONE.value, log_kept, of_whole, softcap)
        for to, value in zip(keep_out[1:], (*of_whole[1:3], of_whole[5][..., :3]), strict=True):
            if to is not value:
                to.copy_(value.view(to.shape))
    if not lists:
        _forward(*rows, mask, *of_row, out, softcap, keep, target_kept)
        return
    whole_rows = listed_forward(*rows, mask, *of_row, out, softcap, keep, target_kept)
    if full_state is None and (keep.rows is not None or keep.open_empty or keep.outside == OUTSIDE_EVERYTHING.value):
        _forward(*rows, whole_rows, *of_row, out, softcap, zeros=False)


class _Sweep(NamedTuple):
    """How the forward kernels read rows."""

    pointers: tuple  # of the logits, targets, mask and temperatures
    sets: torch.Tensor
    row_args: tuple
    options: dict  # compile-time constants of all kernels
    tile: dict  # and of those that read logits
    shape: ForwardShape


def _sweep(logits, targets, mask, temperature, ignore_index, state, softcap, keep=None) -> _Sweep:
    pointers, temperature, inverse_cap, options = stats_options(logits, targets, mask, temperature, state, softcap)
    sets, set_strides, set_options = set_arguments(keep, logits)
    vocab, inner = logits.shape[2], logits.shape[1]
    align = 16 // logits.element_size()
    aligned = starts_aligned(logits, align)
    card = gpu(logits.device)
    shape = forward_shape(card, vocab, logits.element_size(), aligned, set_options["KEEP"] is not None)
    # Blackwell pairs the arithmetic of two loads side by side; older cards only spend registers on it.
    side_by_side = 2 if card.capability >= (10, 0) else 1
    lanes = min(shape.block, side_by_side * shape.warps * card.warp_size * align)
    tile = dict(ALIGN=align, ALIGNED=aligned, SHIFTED=CAN_SHIFT and not aligned, BLOCK=shape.block, LANES=lanes, num_warps=shape.warps)
    row_args = (inner, *strides(logits), *set_strides, vocab, temperature, ignore_index, inverse_cap)
    return _Sweep(pointers, sets, row_args, options | set_options, tile, shape)


def _in_order(targets, ignore_index, kept_kind, logits):
    """The listed ids of each row, for KEPT_UNLISTED; the logits stand for none."""
    if kept_kind != KEPT_UNLISTED.value:
        return logits
    return targets.masked_fill(targets == ignore_index, torch.iinfo(torch.int64).max).sort(dim=-1).values


def _forward(logits, targets, mask, temperature, ignore_index, kept_kind, log_kept, out, softcap, keep=None, target_kept=None, zeros=True) -> None:
    """zeros: rows that do not count become zeros; else they stay as they are"""
    *outputs, state = out
    if outputs[1] is None:  # the kernels wait for memory and always compute the entropy
        outputs[1] = torch.empty_like(outputs[2])
    with_sum_sq, outputs = outputs[3] is not None, tuple(logits if t is None else t for t in outputs)
    pointers, sets, row_args, options, tile, shape = _sweep(logits, targets, mask, temperature, ignore_index, state, softcap, keep)
    rows, kept = logits.shape[0] * logits.shape[1], (sets, logits if target_kept is None else target_kept)
    sums = dict(SUM_SQ=with_sum_sq, STAGES=shape.stages)
    with device_of(logits):
        listed = _in_order(targets, ignore_index, kept_kind, logits)
        if shape.splits == 1:
            one = dict(ZEROS=zeros, KEPT=kept_kind, **options, **sums, **tile)
            token_stats_forward_kernel[(rows,)](*pointers, listed, *kept, *outputs, state, *row_args, log_kept, **one)
            return
        parts, masses = (state.new_empty((rows, shape.splits, width)) for width in (STATE_KEPT.value, 2))
        split = dict(SPLITS=shape.splits, **options)
        token_stats_part_kernel[(rows * shape.splits,)](*pointers, sets, parts, *row_args, **split, **sums, **tile)
        if kept_kind:
            kept_args = (*pointers, sets, parts, masses, listed, *row_args, log_kept)
            token_stats_kept_part_kernel[(rows * shape.splits,)](*kept_args, FROM_STATE=False, KEPT=kept_kind, **split, **tile)
        split |= dict(ZEROS=zeros, SUM_SQ=with_sum_sq, KEPT=kept_kind, num_warps=target_warps(options["K_BLOCK"]))
        token_stats_split_merge_kernel[(rows,)](*pointers, *kept, parts, masses, *outputs, state, *row_args, log_kept, **split)


def token_stats_merge(parts, targets, mask, temperature, ignore_index, kept_kind, log_kept, out) -> None:
    logp, entropy, logsumexp, sum_sq, _, state = out
    n_parts, rows, width = parts.shape
    pointers, temperature, options = row_options(parts[:1], mask, temperature, parts.dtype)
    n_targets, block = width - STATE_TARGETS.value, triton.next_power_of_2(n_parts)
    options |= dict(K=n_targets, K_BLOCK=triton.next_power_of_2(max(1, n_targets)), P_BLOCK=block, SUM_SQ=sum_sq is not None, KEPT=kept_kind)
    options["num_warps"] = target_warps(max(options["K_BLOCK"], block))
    entropy = torch.empty_like(logsumexp) if entropy is None else entropy
    outputs = (entropy if t is None else t for t in (logp, entropy, logsumexp, sum_sq))
    with device_of(parts):
        token_stats_merge_kernel[(rows,)](
            parts, parts if targets is None else targets, *pointers, *outputs, state,
            n_parts, *strides(parts), temperature, ignore_index, log_kept, **options,
        )  # fmt: skip


def token_stats_kept_masses(logits, targets, mask, temperature, ignore_index, kept_kind, state, out, softcap=0.0) -> None:
    pointers, sets, row_args, options, tile, shape = _sweep(logits, targets, mask, temperature, ignore_index, state, softcap)
    rows = len(out)
    masses = out if shape.splits == 1 else out.new_empty((rows, shape.splits, 2))
    with device_of(logits):
        kept_args = (*pointers, sets, state, masses, _in_order(targets, ignore_index, kept_kind, logits), *row_args, 0.0)
        split = dict(FROM_STATE=True, KEPT=kept_kind, SPLITS=shape.splits)
        token_stats_kept_part_kernel[(rows * shape.splits,)](*kept_args, **split, **options, **tile)
        if masses is not out:
            out.copy_(masses[:, 0])
            for i in range(1, shape.splits):  # one after another: the same bits in any batch
                out.add_(masses[:, i])


def token_stats_backward(logits, targets, mask, temperature, ignore_index, kept_kind, state, grads, out, softcap=0.0, keep=None, full=None) -> None:
    if full is not None and all(g is None for g in full[1:]):
        full = None
    if full is not None:
        full = tuple(full[0].new_zeros(full[0].shape[:-1]) if g is None else g for g in full)
    if keep is None or keep.kind != SET_LISTS.value:
        _backward(logits, targets, mask, temperature, ignore_index, kept_kind, state, grads, out, softcap, keep, full)
        return
    of_row = (temperature, ignore_index, kept_kind)
    listed = listed_backward(logits, targets, mask, *of_row, state, grads, softcap, keep, full)
    if full is None:
        _backward(logits, targets, listed.whole, *of_row, state, grads, out, softcap)
    else:  # of the whole row, and of rows over all ids both
        whole = listed.whole.unsqueeze(-1)
        g_logp, *others = (None if g is None else torch.where(whole, g.view(-1, g.numel() // len(whole)), 0) for g in grads)
        g_entropy, g_lse = (b.view(-1, 1) if a is None else a + b.view(-1, 1) for a, b in zip(others[:2], full[1:], strict=True))
        of_whole = torch.where(whole, state.view(len(whole), -1), 0)
        of_whole[:, :3] = full[0].view(-1, 3)
        targets = torch.where(whole | (targets == ignore_index), targets, ELSEWHERE.value)
        _backward(logits, targets, mask, *of_row, of_whole, (g_logp, g_entropy, g_lse, *others[2:]), out, softcap)
    listed.write(out)


def _backward(logits, targets, mask, temperature, ignore_index, kept_kind, state, grads, out, softcap, keep=None, full=None) -> None:
    pointers, temperature, inverse_cap, options = stats_options(logits, targets, mask, temperature, state, softcap)
    sets, set_strides, set_options = set_arguments(keep, logits)
    outer, inner, vocab = logits.shape
    align = 16 // logits.element_size()
    aligned = all(s % align == 0 for s in strides(logits) + strides(out))
    shape = backward_shape(gpu(logits.device), vocab, logits.element_size(), aligned)
    groups = triton.cdiv(vocab + (0 if aligned else align - 1), shape.tiles * shape.block)
    upstream = (state, *(logits if g is None else g for g in grads), out, inner, *set_strides)
    options |= {f"HAS_{name}": g is not None for name, g in zip(("LOGP", "ENTROPY", "LSE", "SUM_SQ", "KEPT"), grads, strict=True)}
    options["HAS_TAIL"] = kept_kind == KEPT_UNLISTED.value and options["HAS_KEPT"]
    options["HAS_KEPT"] = options["HAS_KEPT"] and not options["HAS_TAIL"]
    options |= set_options
    options["HAS_FULL"], full = full is not None, (logits,) * 3 if full is None else full
    writes_targets = options["HAS_LOGP"] or options["HAS_TAIL"]
    # A look at the targets holds the tile once more: with two softmaxes that would be too many registers.
    at_targets = writes_targets and options["K"] <= FEW_TARGETS and not options["HAS_FULL"]
    tile = dict(
        AT_TARGETS=at_targets,
        ALIGN=align,
        ALIGNED=aligned,
        EDGES=not aligned or vocab % align != 0,
        SAME_LEAD=all((a - b) % align == 0 for a, b in zip(strides(logits), strides(out), strict=True)),
        **dict(BLOCK=shape.block, TILES=shape.tiles, STAGES=shape.stages, num_warps=shape.warps),
    )
    with device_of(logits):
        raw, late = logits, writes_targets and not at_targets
        if options["KEEP"] == SET_AT_LEAST.value or (late and (softcap > 0 or options["HAS_FULL"])):  # read before the gradient is written over them
            raw = logits.gather(-1, targets.clamp(0, vocab - 1).view(outer, inner, -1))
        row_args = (sets, raw, *full, *upstream, *strides(logits), *strides(out), vocab, groups, temperature, ignore_index, inverse_cap)
        token_stats_backward_kernel[(outer * inner * groups,)](*pointers, *row_args, **options, **tile)
        if late:
            in_order, order = targets.sort(dim=-1, stable=True)
            row_args = (sets, *full, *upstream, *strides(out), vocab, temperature, ignore_index, inverse_cap)
            options["num_warps"] = target_warps(options["K_BLOCK"])
            token_stats_backward_targets_kernel[(outer * inner,)](in_order, order, raw, *pointers[1:], *row_args, **options)
