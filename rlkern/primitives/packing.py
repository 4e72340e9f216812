"""Sequences of tokens: padded, one a row, or packed, one behind the other. Losses see no difference.

`Rows` and `Packed` have the same methods, from tokens to one number a sequence and back. Sums run in float64
and are rounded once, so neither the padding nor the neighbours of a sequence change its bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import as_bool, check_tokens, computing_dtype, expect, shown
from ..operator import values_readable
from ..parallel import Meeting, add_up, gather, world
from .sequence_sums import sequence_sums, spread, wide

__all__ = ["Packed", "Rows", "check_packed", "packed", "pack_of", "per_sequence", "per_token", "sequences_of"]


class Rows:
    """Padded sequences, one a row: mask [B, T] bool says which tokens count."""

    __slots__ = ("mask",)

    def __init__(self, mask: Tensor):
        self.mask = mask

    @property
    def lengths(self) -> Tensor:
        """[B] int64: counted tokens."""
        return self.mask.sum(-1)

    @property
    def num_seqs(self) -> int:
        return self.mask.shape[0]

    @property
    def whole(self) -> bool:
        return True

    def is_split(self) -> bool:
        """Whether other tokens of the sequences are elsewhere."""
        return False

    @property
    def group_name(self) -> str:
        return ""

    def adding(self, mask: Tensor) -> Rows:
        """The same sequences, with other tokens to add up."""
        return Rows(mask)

    def among(self, mask: Tensor) -> Rows:
        """The same sequences with other tokens that count."""
        return Rows(mask)

    def sums(self, *values: Tensor) -> list[Tensor]:
        """`sum` of each."""
        return [self._sum(x).to(computing_dtype(x)) for x in values]

    def _sum(self, values: Tensor) -> Tensor:
        return torch.where(self.mask, values, 0).sum(-1, dtype=wide(values))

    def sum(self, values: Tensor) -> Tensor:
        """[B, T] float -> [B]: the sum of each sequence's counted tokens, with gradient; 0 of none."""
        return self._sum(values).to(computing_dtype(values))

    def mean(self, values: Tensor) -> Tensor:
        """[B, T] float -> [B], with gradient; 0 of none."""
        return (self._sum(values) / self.lengths.clamp(min=1)).to(computing_dtype(values))

    def max(self, values: Tensor) -> Tensor:
        """[B, T] float -> [B], without gradient; -inf of none."""
        return _largest(torch.where(self.mask, values.detach(), -torch.inf))

    def min(self, values: Tensor) -> Tensor:
        """[B, T] float -> [B], without gradient; inf of none."""
        return -self.max(-values)

    def spread(self, x: Tensor) -> Tensor:
        """[B] -> [B, 1], which broadcasts to the tokens, with gradient."""
        return x.unsqueeze(-1)

    def rank(self) -> Tensor:
        """[B, T] int64: how many counted tokens of the sequence stand before this one."""
        return self.mask.cumsum(-1) - self.mask.long()

    def share(self, dtype: torch.dtype) -> Tensor | None:
        """None: all tokens are here."""
        return None


def _largest(x: Tensor) -> Tensor:
    return x.amax(-1) if x.shape[-1] > 0 else x.new_full(x.shape[:-1], -torch.inf)


class Packed(NamedTuple):
    """Sequences one behind the other, as `packed` returns them. It goes wherever a mask goes.

    cu_seqlens: int64 [S + 1], sequence i is [cu_seqlens[i], cu_seqlens[i + 1]).
    seq_idx: int64 [N], the sequence of each token, S for none.
    mask: bool [N], the tokens that count.
    lengths: int64 [S], how many count, of the whole sequences where these are in parts.
    num_seqs: S, or a 0-d tensor where only the device knows how many sequences there are.
    group: the ranks that hold other tokens of the same sequences, or None.
    own_lengths: int64 [S], how many count here, where `lengths` are of whole sequences; or None.
    whole: False if other parts of the sequences are in other micro-batches.
    group_name: of the group, empty if it has no other rank.
    """

    cu_seqlens: Tensor
    seq_idx: Tensor
    mask: Tensor
    lengths: Tensor
    num_seqs: int | Tensor
    group: Any = None
    own_lengths: Tensor | None = None
    whole: bool = True
    group_name: str = ""

    # Methods, not properties: Dynamo of torch 2.6 does not follow those of a named tuple.

    def is_split(self) -> bool:
        """Whether other tokens of the sequences are elsewhere: on other ranks, in other micro-batches."""
        return self.own_lengths is not None

    def like(self, x: Tensor) -> Packed:
        """The same with tokens in the shape of x."""
        return self._changed(self.seq_idx.reshape(x.shape), self.mask.reshape(x.shape), self.lengths, self.own_lengths)

    def _changed(self, seq_idx: Tensor, mask: Tensor, lengths: Tensor, own_lengths: Tensor | None) -> Packed:
        # Not _replace, which Dynamo of torch 2.6 does not follow.
        return Packed(self.cu_seqlens, seq_idx, mask, lengths, self.num_seqs, self.group, own_lengths, self.whole, self.group_name)

    def adding(self, mask: Tensor) -> Packed:
        """The same sequences and lengths, with other tokens to add up."""
        return self._changed(self.seq_idx, mask, self.lengths, self.own_lengths)

    def among(self, mask: Tensor) -> Packed:
        """The same sequences with other tokens that count, bool of N elements in any shape."""
        if not self.whole:
            raise ValueError("this leaves tokens out, and a pack with full_lengths= does not know how many of the other parts: give whole sequences")
        if mask.numel() != self.mask.numel():
            raise ValueError(f"mask must have the {self.mask.numel()} tokens of the pack, got shape {tuple(mask.shape)}")
        mask = mask.reshape(self.mask.shape) & (self.seq_idx < self.cu_seqlens.shape[0] - 1)
        own = _counts(mask, self.cu_seqlens)
        if self.group_name == "":
            return self._changed(self.seq_idx, mask, own, None)
        return self._changed(self.seq_idx, mask, add_up(own.clone(), self.group_name), own)

    def _tokens(self, values: Tensor) -> Tensor:
        refuse_nested("values", values)
        expect("values", values, "float", "[...]")
        if values.numel() != self.mask.numel():
            raise ValueError(f"values must have the {self.mask.numel()} tokens of the pack, got shape {tuple(values.shape)}")
        return values.to(computing_dtype(values)).reshape(-1)

    def _sums(self, values: Sequence[Tensor], rounded: bool) -> tuple[Tensor, ...]:
        """[S] of each, in the wide dtype or rounded. One exchange if tokens are on several ranks."""
        tokens = [self._tokens(x) for x in values]
        return sequence_sums(tokens, self.mask.reshape(-1), self.seq_idx.reshape(-1), self.cu_seqlens, self.group_name, rounded)

    def sums(self, *values: Tensor) -> list[Tensor]:
        """`sum` of each, with one exchange for all."""
        return list(self._sums(values, True))

    def sum(self, values: Tensor) -> Tensor:
        """Float tokens -> [S]: the sum of each sequence's counted tokens, with gradient; 0 of none.

        With a group these are the sums over all ranks. The gradient goes to the tokens of this one.
        """
        return self.sums(values)[0]

    def mean(self, values: Tensor) -> Tensor:
        """Float tokens -> [S], with gradient; 0 of none."""
        return (self._sums([values], False)[0] / self.lengths.clamp(min=1)).to(computing_dtype(values))

    def max(self, values: Tensor) -> Tensor:
        """Float tokens -> [S], without gradient; -inf of none."""
        counted = torch.where(self.mask.reshape(-1), self._tokens(values.detach()), -torch.inf)
        if counted.shape[0] == 0:
            largest = counted.new_full((self.cu_seqlens.shape[0] - 1,), -torch.inf)
        else:
            largest = torch.segment_reduce(counted, "max", offsets=self.cu_seqlens, unsafe=True, initial=-torch.inf)
        if self.group_name == "":
            return largest
        return gather(largest.contiguous(), self.group_name, world(self.group)).amax(0)

    def min(self, values: Tensor) -> Tensor:
        """Float tokens -> [S], without gradient; inf of none."""
        return -self.max(-values)

    def spread(self, x: Tensor) -> Tensor:
        """[S] -> tokens: each gets the number of its sequence, with gradient; 0 where it belongs to none."""
        n = self.cu_seqlens.shape[0] - 1
        expect("x", x, "real", "[S]", shape=(n,), like=("the pack", self.mask))
        return spread(x, self.seq_idx.reshape(-1), self.cu_seqlens).view(self.mask.shape)

    def rank(self) -> Tensor:
        """int64 tokens: how many counted tokens of the sequence stand before this one, here."""
        before = _running(self.mask)
        first = torch.nn.functional.pad(before[self.cu_seqlens[:-1]], (0, 1))
        return (before[:-1] - first[self.seq_idx.reshape(-1)]).view(self.mask.shape)

    def share(self, dtype: torch.dtype) -> Tensor | None:
        """[S]: the fraction of each sequence's counted tokens that is here; None: all."""
        if self.own_lengths is None:
            return None
        return self.own_lengths.to(dtype) / self.lengths.clamp(min=1)


def _running(mask: Tensor) -> Tensor:
    """[N + 1]: how many count before each place."""
    return torch.nn.functional.pad(mask.reshape(-1).cumsum(0), (1, 0))


def _counts(mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[S] int64: a difference of integer sums, exact."""
    return _running(mask)[cu_seqlens].diff()


# --- construction -------------------------------------------------------------------------------------------


def packed(
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    position_ids: Tensor | None = None,
    segment_ids: Tensor | None = None,
    padding_id: int | None = None,
    seq_lens: Tensor | None = None,
    num_seqs: int | None = None,
    num_tokens: int | None = None,
    full_lengths: Tensor | None = None,
    group: Any = None,
) -> Packed:
    """Where the sequences of packed (padding-free) tokens are, to go wherever a mask goes.

        pack = rlkern.packed(batch["cu_seq_lens_q"], response_mask)
        loss, metrics = rlkern.gspo_loss(logp, old_logp, advantages, pack)      # advantages [S]

    There are N tokens, [N] or [1, N] or in any other shape, row by row. The sequences are given in exactly
    one of four forms. Tokens behind the last sequence are padding.

    Args:
        cu_seqlens: [S + 1] integer, from 0: sequence i is [cu_seqlens[i], cu_seqlens[i + 1]).
        mask: N elements, bool or number; nonzero counts. None: all tokens of sequences count. Where
            log-probabilities stand at the token before, it must be 0 at a sequence's last place:
            `next_tokens(mask, False, packed=pack)`.
        lengths: [S] integer tensor or list of integers, the sizes of neighbouring sequences.
        position_ids: [..., T] integer: a sequence starts where the id is not the previous one plus 1, and
            with each row.
        segment_ids: [..., T] integer: a sequence starts where the id changes, and with each row.
        padding_id: with segment_ids: tokens of that id do not count. A run of them is an empty sequence.
        seq_lens: [S] integer, with cu_seqlens of padded slots: only the first seq_lens[i] tokens of slot i
            belong to its sequence (Megatron's cu_seqlens_q_padded).
        num_seqs: with position_ids or segment_ids, the number of sequences. Those from it on do not exist, so
            their tokens are padding. Without it S is N, the number is on the device alone, and losses take no
            argument [S].
        num_tokens: N, needed without mask or ids: cu_seqlens[-1] is on the device.
        full_lengths: [S] integer, the counted tokens of whole sequences, if other parts of these are in other
            micro-batches. Losses then need weights or a normalizer, and those on whole sequences also
            `log_ratio_sums=`.
        group: processes that hold other tokens of the same S sequences (context parallelism). Counts are
            added up here, and sums where a loss needs them. Losses on tokens then return parts, which add up
            over the ranks. Losses of pairs and per-sequence results are the same on all ranks.

    Returns:
        Packed. Nothing is read on the host.

    Raises:
        ValueError: no form or several, sizes that do not match, no way to know N. On CPUs (on a GPU with
            RLKERN_DEBUG=1) also cu_seqlens that do not start at 0, descend or end beyond N. With a group on
            CPUs every rank raises if one does, or if the numbers of sequences differ.
        TypeError: tensors of another kind, nested ones among them.
    """
    forms = {"cu_seqlens": cu_seqlens, "lengths": lengths, "position_ids": position_ids, "segment_ids": segment_ids}
    tensors = [x for x in (*forms.values(), mask) if isinstance(x, Tensor)]
    first = tensors[0] if tensors else None
    with Meeting("packed", group, first) as meeting:
        where = _checked(forms, mask, padding_id, seq_lens, num_seqs, num_tokens)
        size = where.cu_seqlens.shape[0] - 1
        meeting.would_add(lambda: [where.cu_seqlens.new_empty(size)])
        if full_lengths is not None:
            expect(f"full_lengths (one a sequence of {_form(forms)})", full_lengths, "integer", "[S]", shape=(size,), like=("the tokens", where.mask))
            if values_readable(full_lengths) and (full_lengths < where.lengths).any():
                raise ValueError("full_lengths must be at least the tokens that count here, got fewer for some sequence")
        if meeting.exchanges:
            asked = None if full_lengths is None or not values_readable(full_lengths) else tuple(full_lengths.tolist())
            meeting.about(rows=size, options={"full_lengths": full_lengths is not None if asked is None else asked})
    if full_lengths is not None:
        lengths, own = full_lengths.long(), where.lengths
    elif meeting.ranks > 1:
        lengths, own = add_up(where.lengths.clone(), meeting.group_name), where.lengths
    else:
        lengths, own = where.lengths, None
    whole = full_lengths is None
    return Packed(where.cu_seqlens, where.seq_idx, where.mask, lengths, where.num_seqs, group, own, whole, meeting.group_name)


def _form(forms: dict[str, Any]) -> str:
    given = [name for name, x in forms.items() if x is not None]
    if len(given) != 1:
        raise ValueError(f"packed needs exactly one of {', '.join(forms)}, got {' and '.join(given) if given else 'none'}")
    return given[0]


def _checked(forms: dict[str, Any], mask, padding_id, seq_lens, num_seqs, num_tokens) -> Packed:
    form = _form(forms)
    x = forms[form]
    for name, tensor in {form: x, "mask": mask, "seq_lens": seq_lens}.items():
        refuse_nested(name, tensor)
    if mask is not None:
        expect("mask", mask, "real", "[...]")
    if padding_id is not None and (form != "segment_ids" or not isinstance(padding_id, int)):
        raise ValueError(f"padding_id is an integer for segment_ids, got {shown(padding_id)} with {form}")
    if padding_id is not None and not -(1 << 63) <= padding_id < 1 << 63:
        raise ValueError(f"padding_id must fit int64, got {padding_id}")
    if seq_lens is not None and form != "cu_seqlens":
        raise ValueError(f"seq_lens is for the slots of cu_seqlens, got it with {form}")
    for name, number in {"num_seqs": num_seqs, "num_tokens": num_tokens}.items():
        if number is not None and (not isinstance(number, (int, torch.SymInt)) or isinstance(number, bool) or not 0 <= number < 1 << 62):
            raise ValueError(f"{name} must be an integer of at least 0, got {shown(number)}")
    if form in ("cu_seqlens", "lengths"):
        return _from_offsets(form, x, mask, seq_lens, num_seqs, num_tokens)
    return _from_ids(form, x, mask, padding_id, num_seqs, num_tokens)


def _from_offsets(form: str, x: Any, mask: Tensor | None, seq_lens, num_seqs, num_tokens) -> Packed:
    if form == "lengths":
        if isinstance(x, (list, tuple)):
            if not all(isinstance(n, int) and not isinstance(n, bool) for n in x):
                raise TypeError("lengths must be integers, one a sequence")
            if num_tokens is None and mask is None:
                num_tokens = sum(x)
            x = torch.tensor(x, dtype=torch.int64, device="cpu" if mask is None else mask.device)
        expect("lengths", x, "integer", "[S]")
        if values_readable(x) and ((x < 0) | (x >= 1 << 48)).any():
            raise ValueError(f"lengths must not be negative, nor more than there is memory for, got {x.min().item()} to {x.max().item()}")
        cu_seqlens = torch.nn.functional.pad(x.long().cumsum(0), (1, 0))
    else:
        expect("cu_seqlens", x, "integer", "[S + 1]", shape=None)
        if x.shape[0] == 0:
            raise ValueError("cu_seqlens must be [S + 1], with a 0 first, got shape (0,)")
        cu_seqlens = x.long()
    size = cu_seqlens.shape[0] - 1
    if num_seqs is not None and num_seqs != size:
        raise ValueError(f"num_seqs must be the number of sequences, {size} by {form}, got {num_seqs}")
    if mask is None and num_tokens is None:
        raise ValueError(f"packed needs mask= or num_tokens= beside {form}: the number of tokens cannot be read without waiting for the device")
    tokens = _tokens(mask, num_tokens)
    if mask is not None and mask.device != cu_seqlens.device:
        raise ValueError(f"mask must be on the device of {form} {cu_seqlens.device}, got {mask.device}")
    if values_readable(cu_seqlens):
        if cu_seqlens[0] != 0:
            raise ValueError(f"cu_seqlens must start at 0, got {cu_seqlens[0].item()}")
        if (cu_seqlens.diff() < 0).any():
            raise ValueError("cu_seqlens must not descend")
        if cu_seqlens[-1] > tokens:
            raise ValueError(f"{form} must end within the {tokens} tokens of mask or num_tokens, got {cu_seqlens[-1].item()}")
    else:  # on a GPU nobody has checked them, and they become indices
        cu_seqlens = cu_seqlens.clamp(0, tokens)
    places = torch.arange(tokens, device=cu_seqlens.device)
    seq_idx = torch.searchsorted(cu_seqlens[1:].contiguous(), places, right=True)
    if seq_lens is not None:
        expect("seq_lens", seq_lens, "integer", "[S]", shape=(size,), like=(form, cu_seqlens))
        if values_readable(seq_lens) and ((seq_lens < 0) | (seq_lens > cu_seqlens.diff())).any():
            raise ValueError("seq_lens must be from 0 to the sizes of the slots of cu_seqlens, got others")
        ends = torch.nn.functional.pad(cu_seqlens[:-1] + seq_lens, (0, 1))
        seq_idx = torch.where(places < ends[seq_idx], seq_idx, size)
    return pack_of(cu_seqlens, seq_idx, mask, size)


def _from_ids(form: str, ids: Tensor, mask: Tensor | None, padding_id, num_seqs, num_tokens) -> Packed:
    expect(form, ids, "integer", "[..., T]")
    if mask is not None and mask.numel() != ids.numel():
        raise ValueError(f"mask must have the {ids.numel()} tokens of {form}, got shape {tuple(mask.shape)}")
    tokens = _tokens(ids, num_tokens, form)
    if mask is not None and mask.device != ids.device:
        raise ValueError(f"mask must be on the device of {form} {ids.device}, got {mask.device}")
    previous = ids[..., :-1] + 1 if form == "position_ids" else ids[..., :-1]
    starts = torch.nn.functional.pad(ids[..., 1:] != previous, (1, 0), value=True) if ids.shape[-1] > 0 else ids.bool()
    if padding_id is not None:
        counted = ids != padding_id
        mask = counted if mask is None else counted.reshape(-1) & as_bool(mask).reshape(-1)
    order = starts.reshape(-1).cumsum(0) - 1
    size = tokens if num_seqs is None else num_seqs
    cu_seqlens = torch.searchsorted(order, torch.arange(size + 1, device=ids.device))
    return pack_of(cu_seqlens, order.clamp(max=size), mask, starts.sum() if num_seqs is None else size)


def _tokens(x: Tensor | None, num_tokens: int | None, of: str = "mask") -> int:
    if x is None:
        return num_tokens  # type: ignore[return-value]  # one of both is there
    if num_tokens is not None and num_tokens != x.numel():
        raise ValueError(f"num_tokens must be the number of elements of {of}, {x.numel()}, got {num_tokens}")
    return x.numel()


def pack_of(cu_seqlens: Tensor, seq_idx: Tensor, mask: Tensor | None, num_seqs: int | Tensor) -> Packed:
    """The pack of int64 indices that agree; mask of N elements, None for all."""
    inside = seq_idx < cu_seqlens.shape[0] - 1
    mask = inside if mask is None else inside & as_bool(mask).reshape(-1)
    return Packed(cu_seqlens, seq_idx, mask, _counts(mask, cu_seqlens), num_seqs)


# --- for losses ---------------------------------------------------------------------------------------------


def refuse_nested(name: str, x: Any) -> None:
    """Raises TypeError for a nested tensor."""
    if isinstance(x, Tensor) and x.is_nested:
        raise TypeError(f"{name} must not be a nested tensor: pass .values(), and packed(x.offsets())")


def check_packed(packed: Any) -> None:
    """Raises TypeError for anything but a `Packed`."""
    if not isinstance(packed, Packed):
        raise TypeError(f"packed must be a Packed, as rlkern.packed returns it, or None, got {shown(packed)}")


def sequences_of(mask: Any, logp: Tensor, of: str = "logp") -> Rows | Packed:
    """A caller's mask or pack, checked to go with logp, in its shape.

    Raises:
        TypeError, ValueError: logp that is no float [B, T], or with a pack no float of N elements in any
            shape; a mask of another shape or device.
    """
    refuse_nested("mask", mask)
    refuse_nested(of, logp)
    expect(of, logp, "float", "[...]")
    if not isinstance(mask, Packed):
        if logp.dim() != 2:
            raise ValueError(f"{of} must be [B, T] beside a mask of that shape (any shape beside a Packed as mask), got shape {tuple(logp.shape)}")
        check_tokens("mask", mask, logp, "real", of)
        return Rows(as_bool(mask))
    if logp.numel() != mask.mask.numel():
        raise ValueError(f"{of} must have the {mask.mask.numel()} tokens of the pack, got shape {tuple(logp.shape)}")
    if logp.device != mask.mask.device:
        raise ValueError(f"{of} must be on the device of the pack {mask.mask.device}, got {logp.device}")
    return mask.like(logp)


def _check_known(name: str, sequences: Packed) -> None:
    if isinstance(sequences.num_seqs, Tensor):
        raise ValueError(f"{name} has one entry a sequence: packed(...) needs num_seqs=, so that the host knows their number")


def per_token(name: str, x: Any, logp: Tensor, sequences: Rows | Packed, kind: str = "float", of: str = "logp") -> Tensor:
    """x, one a token or one a sequence, detached, in the shape of logp and its computing dtype.

    Padded: [B, T], [B, 1] or [B]. Packed: logp's shape, [S] or [S, 1].
    """
    dtype = computing_dtype(logp)
    if isinstance(sequences, Rows):
        n, length = logp.shape
        expect(name, x, kind, "[B, T], [B, 1] or [B]", shape=((n, length), (n, 1), (n,)), like=(of, logp), detached=True)
        x = x.to(dtype)
        if x.shape == logp.shape:
            return x
        return (x.unsqueeze(-1) if x.dim() == 1 else x).expand(n, length)
    n = sequences.cu_seqlens.shape[0] - 1
    known = not isinstance(sequences.num_seqs, Tensor)
    shapes = (tuple(logp.shape), (n,), (n, 1)) if known else (tuple(logp.shape),)
    if not known and isinstance(x, Tensor) and x.shape != logp.shape:
        _check_known(name, sequences)
    expect(name, x, kind, "like logp, [S] or [S, 1]", shape=shapes, like=(of, logp), detached=True)
    if known and x.shape == logp.shape and x.shape in ((n,), (n, 1)) and n > 1:
        wanted = "give it as [S, 1], or the tokens as [1, N]"
        raise ValueError(f"{name} {list(x.shape)} may be one a token or one a sequence, as there are {n} of both: {wanted}")
    x = x.to(dtype)
    return x if x.shape == logp.shape else sequences.spread(x.reshape(-1))


def per_sequence(name: str, x: Any, logp: Tensor, sequences: Rows | Packed, of: str = "logp") -> Tensor:
    """x [B] or [B, 1] (packed [S] or [S, 1]), bool or real, detached, as [B] in logp's computing dtype; 0 for
    sequences without tokens."""
    if isinstance(sequences, Packed):
        _check_known(name, sequences)
        n, letter = sequences.cu_seqlens.shape[0] - 1, "S"
    else:
        n, letter = logp.shape[0], "B"
    expect(name, x, "real", f"[{letter}] or [{letter}, 1]", shape=((n,), (n, 1)), like=(of, logp))
    return torch.where(sequences.lengths > 0, x.detach().to(computing_dtype(logp)).reshape(n), 0)
