"""The evidence lower bound of a masked-diffusion language model from the logits of one noisy input."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_flags, check_ignore_index, check_logits, check_mask, check_targets, computing_dtype, expect, shown
from ..operator import values_readable
from .packing import Packed, Rows, pack_of, per_token
from .token_stats import token_logprobs

__all__ = ["ELBORows", "elbo_rows", "masked_elbo"]


class ELBORows(NamedTuple):
    """The rows of one draw, checked and cleaned: all of `masked_elbo` but the logits. [B, S] or [N] each."""

    targets: Tensor
    counted: Tensor  # bool
    weight: Tensor  # accumulation dtype, 0 where not counted
    sequences: Rows | Packed
    num_seqs: int

    def token_logp(self, logits: Tensor, **options) -> Tensor:
        """`token_logprobs` of the counted rows, 0 elsewhere."""
        return token_logprobs(logits, self.targets, mask=self.counted, **options)

    def sums(self, values: Tensor) -> Tensor:
        """The weighted sum of each sequence, always in the same order: [B, S] or [N] -> [B]."""
        return self.sequences.sum(self.weight * values)

    def old(self, old_token_logp: Tensor) -> Tensor:
        """Stored log-probabilities detached, 0 where not counted. Raises TypeError, ValueError."""
        expect("old_token_logp", old_token_logp, "float", "like targets", like=("targets", self.targets))
        return torch.where(self.counted, old_token_logp.detach().to(self.weight.dtype), 0)


def _check_packing(pack: Packed | None, seq_idx: Tensor | None, num_seqs: int | None, logits: Tensor) -> None:
    if pack is not None:
        if seq_idx is not None or num_seqs is not None:
            raise ValueError("a Packed as mask says which sequence a row belongs to: seq_idx and num_seqs must be None")
        if not pack.whole:
            raise ValueError("an ELBO is a sum over the whole sequence: it takes no parts of sequences (full_lengths=)")
        if isinstance(pack.num_seqs, Tensor):
            raise ValueError("ELBOs are one a sequence: packed(...) needs num_seqs=, so that the host knows their number")
        if logits.shape[:-1].numel() != pack.mask.numel():
            raise ValueError(f"logits must have the {pack.mask.numel()} tokens of the pack, [N, V] or [1, N, V], got shape {tuple(logits.shape)}")
        return
    if seq_idx is None:
        if num_seqs is not None:
            raise ValueError(f"num_seqs belongs to packed rows [N, V] with seq_idx=, got {num_seqs} without one")
        if logits.dim() != 3:
            raise ValueError(
                f"logits must be [B, S, V], or [N, V] with seq_idx= and num_seqs=, or with a Packed as mask, got shape {tuple(logits.shape)}"
            )
        return
    if logits.dim() != 2:
        raise ValueError(f"packed logits, with seq_idx [N], must be [N, V], got shape {tuple(logits.shape)}")
    expect("seq_idx", seq_idx, "integer", "[N]", shape=logits.shape[:1], like=("logits", logits))
    if num_seqs is None:
        raise TypeError("packed rows need num_seqs=, the number of sequences: the largest index cannot be read without waiting for the device")
    if not isinstance(num_seqs, (int, torch.SymInt)) or isinstance(num_seqs, bool):
        raise TypeError(f"num_seqs must be an int, got {shown(num_seqs)}")
    if not torch.compiler.is_compiling() and num_seqs >= 1 << 31:
        raise ValueError(f"num_seqs must be below 2^31, got {num_seqs}")
    if num_seqs < 0 or (num_seqs == 0 and seq_idx.shape[0] > 0):
        raise ValueError(f"num_seqs must count the sequences of {seq_idx.shape[0]} packed rows, got {num_seqs}")
    if values_readable(seq_idx) and seq_idx.numel():
        if (seq_idx[1:] < seq_idx[:-1]).any():
            raise ValueError("seq_idx must be sorted: the rows of a sequence stand together, sequences in order")
        if seq_idx[0] < 0 or seq_idx[-1] >= num_seqs:
            raise ValueError(f"seq_idx must be in [0, {num_seqs}), got {seq_idx[0].item()} to {seq_idx[-1].item()} with num_seqs={num_seqs}")


def _row_weights(weight: Tensor, logits: Tensor, pack: Packed | None, packed_rows: bool) -> Tensor:
    """The weights, one a row: [B, S] or [N]. Raises TypeError, ValueError."""
    if pack is not None:
        return per_token("weight", weight, logits[..., 0].detach(), pack, of="logits[..., 0]")
    rows = tuple(logits.shape[:-1])
    shapes, layout = ((rows,), "[N]") if packed_rows else ((rows, rows[:1], (rows[0], 1)), "[B, S], [B] or [B, 1]")
    expect("weight", weight, "float", layout, shape=shapes, like=("logits", logits), detached=True)
    weight = weight.to(computing_dtype(logits))
    return (weight.unsqueeze(-1) if weight.dim() < len(rows) else weight).expand(rows)


def elbo_rows(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    mask: Tensor | Packed | None = None,
    seq_idx: Tensor | None = None,
    num_seqs: int | None = None,
    ignore_index: int = -100,
) -> ELBORows:
    """Checks the arguments of `masked_elbo`, with its errors, and reads nothing of the logits."""
    check_logits(logits)
    pack = mask if isinstance(mask, Packed) else None
    _check_packing(pack, seq_idx, num_seqs, logits)
    pack = None if pack is None else pack.like(logits[..., 0])
    targets = check_targets(targets, logits, several=False)
    mask = check_mask(mask, logits)
    weight = _row_weights(weight, logits, pack, seq_idx is not None)
    # A row of weight 0 adds nothing, so it is not read.
    counted = (targets != check_ignore_index(ignore_index)) & (weight != 0)
    if mask is not None:
        counted = counted & mask
    weight = torch.where(counted, weight, 0)
    if values_readable(weight):
        bad = ~((weight >= 0) & weight.isfinite())
        if bad.any():
            got = weight[bad][0].item()
            raise ValueError(f"weight must be finite and not negative wherever mask counts, got {got} (1/t needs t > 0: draw t from (0, 1])")
    if pack is not None:
        return ELBORows(targets, counted, weight, pack.adding(counted), pack.cu_seqlens.shape[0] - 1)
    if seq_idx is None or num_seqs is None:
        return ELBORows(targets, counted, weight, Rows(counted), logits.shape[0])
    seq_idx = seq_idx.long()
    firsts = torch.arange(num_seqs + 1, device=seq_idx.device)
    offsets = torch.searchsorted(seq_idx.contiguous(), firsts)
    # On a GPU nobody has checked seq_idx: one out of range must not be used as an index.
    seq_idx = torch.where((seq_idx >= 0) & (seq_idx < num_seqs), seq_idx, num_seqs)
    return ELBORows(targets, counted, weight, pack_of(offsets, seq_idx, counted, num_seqs), num_seqs)


def masked_elbo(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor,
    *,
    mask: Tensor | Packed | None = None,
    seq_idx: Tensor | None = None,
    num_seqs: int | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    return_token_logp: bool = False,
    old_token_logp: Tensor | None = None,
) -> Any:
    """One Monte-Carlo draw of a masked-diffusion ELBO (LLaDA, Dream), per sequence: the sum over masked k of

        w_k log softmax(logits_k / temperature)[target_k]                            arXiv 2510.11683, Eq. 4

    w = 1/t if every response token was masked with probability t; w = L/m if m of the L tokens were masked.
    Row k is for masked position k: LLaDA's row k predicts token k. Dream's row k - 1 does: move targets, mask
    and weights per token by one, not the logits (`rlkern.next_tokens(targets)`, `next_tokens(mask, False)`).
    Only counted rows are read; others get gradient 0. Sums run in one order, without atomics.

    Logits are dense [B, S, V], or packed: the counted rows of all sequences in one [N, V]. For these, hidden
    states are gathered before the lm_head, so no logits exist for prompt, padding and visible tokens.

    Args:
        logits: [B, S, V], or [N, V] with `seq_idx`; float32, bfloat16, float16 or float64.
        targets: [B, S] or [N] integer, the clean tokens. `ignore_index` does not count, masked or not.
        weight: [B, S], [B] (one t a sequence) or packed [N] (with a `Packed` also [S]);
            float that does not require grad. Where counted it is finite and not negative, elsewhere anything.
            A row of weight 0 does not count.
        mask: shaped like targets, bool or number: the positions that this draw masked, never prompt or
            padding. None counts every row. Or a `Packed` whose mask these are: logits are [N, V] or [1, N,
            V], weight one a row or [S], seq_idx and num_seqs None.
        seq_idx: [N] integer in [0, num_seqs), ascending: the sequence of each packed row.
        num_seqs: the number of sequences, with `seq_idx`. A sequence without rows has ELBO 0.
        temperature, inplace_backward: as in `rlkern.token_stats`. The papers always use temperature 1.
        return_token_logp: also return the log-probabilities of the targets, shaped like targets, detached, 0
            where not counted: for a later `old_token_logp`. (`rlkern.token_logprobs` has gradients.)
        old_token_logp: shaped like targets, float, detached, from the same draw. The result is then the sum
            of w (log p - old), the log ratio of the ELBOs. It keeps the digits that the difference of two
            ELBOs loses (up to 512 tokens in float32: 2e-7 against 4e-4 at worst).

    Returns:
        [B] or [num_seqs], float32 (float64 for float64 logits), differentiable; with `return_token_logp` a
        pair. It is 0 for a sequence without counted rows, and -inf where a counted target has logit -inf (the
        mask token under MDLM's parametrisation: keep such positions out of the mask).

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices and options other than the above. On a CPU (on a
            GPU with RLKERN_DEBUG=1) also for counted weights that are negative or not finite, and for seq_idx
            unsorted or out of range.
        IndexError: as `rlkern.token_stats`.
    """
    check_flags(return_token_logp=return_token_logp)
    rows = elbo_rows(logits, targets, weight, mask=mask, seq_idx=seq_idx, num_seqs=num_seqs, ignore_index=ignore_index)
    old = None if old_token_logp is None else rows.old(old_token_logp)
    token_logp = rows.token_logp(logits, temperature=temperature, inplace_backward=inplace_backward)
    elbo = rows.sums(token_logp if old is None else token_logp - old)
    return (elbo, token_logp.detach()) if return_token_logp else elbo
