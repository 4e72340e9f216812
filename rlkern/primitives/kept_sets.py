"""The token ids that a sampler drew each token from, in the formats that rollouts and engines send."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx._pytree import register_pytree_flatten_spec
from torch.utils import _pytree

from ..checks import check_choice, expect, shown
from ..operator import values_readable

EMPTY = ("everything", "nothing")
OUTSIDE = ("include", "everything", "minus_inf")


def _check_ids(name: str, x: Any, layout: str, like: tuple[str, Tensor] | None = None, shape: Any = None) -> None:
    if isinstance(x, Tensor) and not x.is_floating_point() and x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64 {layout}, got {x.dtype}")
    expect(name, x, "integer", layout, like=like, shape=shape)


def _check_lists(name: str, begin: Tensor, end: Tensor, size: int) -> None:
    """Lists [begin, end) follow one another in `size` ids. Where a host may not look, nothing trusts them."""
    if begin.numel() > 0 and values_readable(begin):
        edges = torch.stack([begin, end], -1).flatten()
        if edges[0] < 0 or edges[-1] > size or (edges[1:] < edges[:-1]).any():
            raise ValueError(f"{name} must lead from 0 to at most the {size} ids and never decrease")


@dataclass(frozen=True, eq=False)
class Kept:
    """The token ids that the softmax of each row is over: what a sampler's top-p, top-k or grammar left.

    Made by `Kept.ids`, `Kept.csr`, `Kept.counts` or `Kept.samples` from lists of ids, int32 or int64; by
    `Kept.bits` or `Kept.mask` from one bit or bool an id; by `Kept.at_least` from a threshold a row. All are
    on the rows' device. The tensors are not copied: a CUDA graph may refill them, lists also with fewer ids
    than they have room for.

    The order of a list changes a result in its last bits alone. No list may hold an id twice: it may count
    twice, and its gradient is then wrong. Samplers never send that, and `outside="include"` adds a missing
    target itself. RLKERN_DEBUG=1 checks it for rows of logits.

    empty: what an empty list means, and a row without a list. "everything": the row's softmax is over the
        whole vocabulary. "nothing": no token is kept.

    Its fields are the form that all constructors share. A pytree.
    """

    entries: Tensor  # [M] ids, or [..., K] of which negative ones are padding; words, a mask, thresholds
    begin: Tensor | None = None  # [R]: list j is entries[begin[j] : end[j]]; None: the rows of entries are the lists
    end: Tensor | None = None
    rows: Tensor | None = None  # [...]: which list belongs to a row, -1 none; None: each its own, in order
    empty: str = "nothing"
    kind: str = "ids"  # or "bits", "mask", "at_least"

    @staticmethod
    def ids(ids: Tensor, *, empty: str = "everything") -> Kept:
        """Padded lists.

        Args:
            ids: [..., K] int32 or int64, of the rows' shape [...]. Negative entries are padding, anywhere.
            empty: see `Kept`.

        Raises:
            TypeError, ValueError: for another dtype, shape or word.
        """
        _check_ids("ids", ids, "[..., K]")
        if ids.dim() == 0:
            raise ValueError("ids must be [..., K], got shape ()")
        check_choice("empty", empty, EMPTY)
        return Kept(ids, None, None, None, empty)

    @staticmethod
    def csr(ids: Tensor, offsets: Tensor, *, rows: Tensor | None = None, empty: str = "everything") -> Kept:
        """Lists one after the other: list j is ids[offsets[j] : offsets[j + 1]] (vLLM's SamplingMask, miles).

        Args:
            ids: [M]; more than offsets[-1] is spare room. offsets: [R + 1], never decreasing.
            rows: [...] of the rows' shape, the list of each row, -1 for none. Two rows may not share a list:
                on a GPU their gradients may be NaN, and `linear_token_stats` raises. None: R rows, in order.
            empty: see `Kept`.

        Raises:
            TypeError, ValueError, IndexError: for dtypes, shapes and devices other than these; on a CPU also
                for offsets that decrease or pass M, and for a row's list outside [-1, R).
        """
        _check_ids("ids", ids, "[M]")
        _check_ids("offsets", offsets, "[R + 1]")
        if offsets.numel() == 0 or offsets.device != ids.device:
            raise ValueError(f"offsets must be [R + 1] on the device of ids {ids.device}, got {tuple(offsets.shape)} on {offsets.device}")
        return _listed(ids, offsets[:-1], offsets[1:], rows, empty, "offsets")

    @staticmethod
    def counts(ids: Tensor, counts: Tensor, *, rows: Tensor | None = None, empty: str = "everything") -> Kept:
        """As `csr`, from the length of each list (prime-rl's wire format).

        Args:
            ids: [M]. counts: [R] or, without rows, of the rows' shape.
            rows, empty: as in `csr`.

        Raises:
            TypeError, ValueError, IndexError: as `csr`.
        """
        _check_ids("ids", ids, "[M]")
        _check_ids("counts", counts, "[...]")
        if counts.device != ids.device:
            raise ValueError(f"counts must be on the device of ids {ids.device}, got {counts.device}")
        if rows is None and counts.dim() > 1:  # the shape of the rows
            rows = torch.arange(counts.numel(), device=counts.device).view(counts.shape)
        end = counts.flatten().cumsum(0)
        return _listed(ids, end - counts.flatten(), end, rows, empty, "counts")

    @staticmethod
    def samples(ids: Sequence[Tensor], offsets: Sequence[Tensor], rows: Tensor, *, empty: str = "everything") -> Kept:
        """As `csr`, from one pair of ids and offsets for every sample (slime, miles, SkyRL).

        Args:
            ids: tensors [M_i]. offsets: as many tensors [R_i + 1], each from 0 on.
            rows: [...], the list of each row, counted through all samples; -1 for none.
            empty: as in `csr`.

        Raises:
            TypeError, ValueError, IndexError: as `csr`; for lists of different lengths or without a sample.
        """
        for name, x in (("ids", ids), ("offsets", offsets)):
            if not isinstance(x, (list, tuple)) or len(x) == 0:
                given = shown(x) if not isinstance(x, (list, tuple)) else "no sample"
                raise TypeError(f"{name} must be a list of tensors, one a sample, got {given}")
        if len(ids) != len(offsets):
            raise ValueError(f"ids and offsets must have one tensor a sample, got {len(ids)} and {len(offsets)}")
        begin, end, shift = [], [], 0
        for of_sample, edges in zip(ids, offsets, strict=True):
            Kept.csr(of_sample, edges)  # checks them
            begin.append(edges[:-1] + shift)
            end.append(edges[1:] + shift)
            shift += of_sample.numel()
        return _listed(torch.cat(list(ids)), torch.cat(begin), torch.cat(end), rows, empty, "offsets")

    @staticmethod
    def bits(words: Tensor) -> Kept:
        """One bit an id, 1 where it is kept: xgrammar's bitmask, vLLM's packed_mask.

        Args:
            words: [..., ceil(V / 32)] int32, bit v % 32 of word v // 32; or [..., ceil(V / 8)] uint8, bit
                v % 8 of byte v // 8. Bits beyond V mean nothing.

        Raises:
            TypeError, ValueError: for another dtype or shape.
        """
        if not isinstance(words, Tensor) or words.dtype not in (torch.int32, torch.uint8) or words.dim() == 0:
            given = f"{words.dtype} {tuple(words.shape)}" if isinstance(words, Tensor) else shown(words)
            raise TypeError(f"words must be int32 [..., ceil(V / 32)] or uint8 [..., ceil(V / 8)], got {given}")
        return Kept(words, kind="bits")

    @staticmethod
    def mask(mask: Tensor) -> Kept:
        """A bool [..., V] of the logits' shape, True where an id is kept. As keep=, a bool tensor means this.

        Raises:
            TypeError, ValueError: for another dtype or shape.
        """
        expect("mask", mask, "bool", "[..., V]")
        return Kept(mask, kind="mask")

    @staticmethod
    def at_least(threshold: Tensor) -> Kept:
        """The ids whose logit is at least the row's threshold, as `rlkern.sampler_threshold` finds it.

        Args:
            threshold: [...] float, of the rows' shape, in units of the raw logits: before temperature,
                logit_scale and softcap. No gradient. NaN keeps all ids of its row.

        Raises:
            TypeError, ValueError: for another dtype or shape, or one that requires grad.
        """
        expect("threshold", threshold, "float", "[...]", detached=True)
        return Kept(threshold, kind="at_least")

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Kept:
        """The sets on another device."""
        tensors = (self.entries, self.begin, self.end, self.rows)
        entries, begin, end, rows = (None if x is None else x.to(device=device, non_blocking=non_blocking) for x in tensors)
        return Kept(entries, begin, end, rows, self.empty, self.kind)  # type: ignore[arg-type]

    def next_tokens(self) -> Kept:
        """The sets moved one to the left along the rows' last dimension, as `rlkern.next_tokens` moves
        labels.

        A sampler's sets stand beside the tokens that were drawn from them. The row of logits that predicts a
        token is one before. The last row gets no list, or one of everything.

        Raises:
            ValueError: for lists whose rows have no shape: `Kept.csr` and its like need rows=. For a single
                row.
        """
        of_rows = self.entries if self.kind == "at_least" else self.rows
        if of_rows is not None and of_rows.dim() == 0:
            raise ValueError("the sets of a single row have no dimension to move along: expected rows [..., T], got shape ()")
        if self.kind == "at_least":
            return Kept(F.pad(self.entries, (0, 1), value=-math.inf)[..., 1:], kind=self.kind)
        if self.rows is not None:
            return Kept(self.entries, self.begin, self.end, F.pad(self.rows, (0, 1), value=-1)[..., 1:], self.empty)
        if self.begin is not None or self.entries.dim() < 2:
            raise ValueError("the rows of these lists have no dimension to move along: give rows=[..., T] to Kept.csr, counts or samples")
        full = {torch.bool: 1, torch.uint8: 255}.get(self.entries.dtype, -1)
        return Kept(F.pad(self.entries, (0, 0, 0, 1), value=full)[..., 1:, :], empty=self.empty, kind=self.kind)


def _listed(ids: Tensor, begin: Tensor, end: Tensor, rows: Tensor | None, empty: str, name: str) -> Kept:
    check_choice("empty", empty, EMPTY)
    _check_lists(name, begin, end, ids.numel())
    if rows is not None:
        _check_ids("rows", rows, "[...]")
        if rows.device != ids.device:
            raise ValueError(f"rows must be on the device of ids {ids.device}, got {rows.device}")
        if values_readable(rows):
            bad = (rows < -1) | (rows >= len(begin))
            if bad.any():
                raise IndexError(f"rows must name one of {len(begin)} lists or be -1, got {rows[bad][0].item()}")
    return Kept(ids, begin, end, rows, empty)


def list_of_entry(begin: Tensor, end: Tensor, size: int) -> Tensor:
    """[size] the list that each entry is in, as many as there are lists for none."""
    lists, at = len(begin), torch.arange(size, device=begin.device)
    if lists == 0:
        return torch.zeros_like(at)
    of_entry = torch.searchsorted(begin.contiguous().long(), at, right=True) - 1
    before = of_entry.clamp(min=0)
    return torch.where((of_entry >= 0) & (at < end[before]), before, lists)


def check_kept(keep: Any, x: Tensor, of: str, vocab: int, *, lists_only: bool = False) -> Kept:
    """keep is a `Kept`, or a bool tensor, for rows x [..., anything], called `of`, over `vocab` ids."""
    if isinstance(keep, Tensor) and keep.dtype == torch.bool and not lists_only:
        keep = Kept(keep, kind="mask")
    constructors = "Kept.ids, Kept.csr, Kept.counts or Kept.samples"
    if not isinstance(keep, Kept):
        if isinstance(keep, Tensor) and keep.dtype in (torch.int32, torch.int64, torch.uint8) and not lists_only:
            raise TypeError(f"keep: a tensor of {keep.dtype} may be ids or bits, say which by Kept.ids(keep) or Kept.bits(keep)")
        given = f"a tensor of {keep.dtype}" if isinstance(keep, Tensor) else shown(keep)
        raise TypeError(f"keep must be made by {constructors if lists_only else 'a constructor of Kept, or be a bool tensor'}, got {given}")
    if lists_only and keep.kind != "ids":
        raise TypeError(f"keep must be made by {constructors}, got Kept.{keep.kind}")
    lead = tuple(x.shape[:-1])
    entries = keep.entries
    if entries.device != x.device:
        raise ValueError(f"keep must be on the device of {of} {x.device}, got {entries.device}")
    if keep.kind != "ids":
        width = {torch.int32: -(-vocab // 32), torch.uint8: -(-vocab // 8)}.get(entries.dtype, vocab)
        shape = lead if keep.kind == "at_least" else (*lead, width)
        if tuple(entries.shape) != shape:
            padded = "" if vocab == x.shape[-1] else f" and vocab_size={vocab}"
            raise ValueError(f"keep: Kept.{keep.kind} must be {shape} for {of} {tuple(x.shape)}{padded}, got {tuple(entries.shape)}")
    elif keep.rows is not None and tuple(keep.rows.shape) != lead:
        raise ValueError(f"keep: its rows must be {lead} for {of} {tuple(x.shape)}, got {tuple(keep.rows.shape)}")
    elif keep.begin is None and tuple(entries.shape[:-1]) != lead:
        raise ValueError(f"keep: its ids must be [*{lead}, K] for {of} {tuple(x.shape)}, got {tuple(entries.shape)}")
    elif keep.begin is not None and keep.rows is None and len(keep.begin) != x.shape[:-1].numel():
        raise ValueError(f"keep must have a list for each of the {x.shape[:-1].numel()} rows of {of}, got {len(keep.begin)}")
    return keep


def check_outside(outside: str, several: bool = False) -> None:
    """A word of `OUTSIDE`; several: whether a row may have many targets."""
    check_choice("outside", outside, OUTSIDE)
    if several and outside != "minus_inf":
        raise ValueError(f"outside must be 'minus_inf' for several targets a row, which ask about the set, got {outside!r}")


_TENSORS = ("entries", "begin", "end", "rows")


def _words(kept: Kept) -> str:
    return f"{kept.empty} {kept.kind}"  # one string: torch.export writes it as JSON


register_pytree_flatten_spec(Kept, lambda kept, spec: [getattr(kept, name) for name in _TENSORS])  # torch.export of torch 2.6
_pytree.register_pytree_node(
    Kept,
    lambda kept: ([getattr(kept, name) for name in _TENSORS], _words(kept)),
    lambda leaves, words: Kept(*leaves, *words.split()),  # type: ignore[misc]
    flatten_with_keys_fn=lambda kept: ([(_pytree.GetAttrKey(name), getattr(kept, name)) for name in _TENSORS], _words(kept)),
    serialized_type_name="rlkern.Kept",
)
torch.serialization.add_safe_globals([Kept])  # torch.load of a rollout
