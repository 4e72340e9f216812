"""Hidden states times an output matrix, a chunk of rows at a time, and the gradients back through it.

The library computes the products. Nothing of size [N, V] stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_logits, computing_dtype, expect
from ..layout import counted_rows
from ..operator import values_readable

# torch 2.8: on CUDA, bf16 @ bf16 without rounding the product to bf16
MM_INTO_FLOAT32 = hasattr(torch.ops.aten.addmm, "dtype_out")


def default_chunk_rows(hidden: Tensor, bytes_a_row: int) -> int:
    """Enough rows to keep the product busy: a GPU must read the whole matrix for each chunk."""
    return max(1, (64 << 20 if hidden.device.type == "cpu" else 512 << 20) // bytes_a_row)


class Chunks:
    """The rows in pieces. Their logits are always in the same memory.

    wide: the logits are float32 also of 16-bit operands, not rounded to those. Where the library has no such
        product, the operands are cast.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk_rows: int, *by_row: Tensor | None, wide: bool = False):
        dtype = computing_dtype(hidden) if wide else hidden.dtype
        if dtype != hidden.dtype and not (hidden.is_cuda and MM_INTO_FLOAT32):
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        self.hidden, self.weight, self.by_row = hidden, weight, by_row
        self.bias = None if bias is None else bias.to(dtype)
        self.step = min(chunk_rows, max(1, hidden.shape[0]))
        self.buffer = hidden.new_empty(self.step, weight.shape[0], dtype=dtype)

    def __iter__(self) -> Iterator[tuple]:
        """Yields (rows, logits of these rows, *these rows of every other tensor)."""
        for start in range(0, self.hidden.shape[0], self.step):
            rows = slice(start, start + self.step)
            hidden = self.hidden[rows]
            logits = self.buffer[: hidden.shape[0]]
            if self.buffer.dtype != hidden.dtype:
                torch.mm(hidden, self.weight.t(), out_dtype=self.buffer.dtype, out=logits)
                if self.bias is not None:
                    logits += self.bias
            elif self.bias is None:
                torch.mm(hidden, self.weight.t(), out=logits)
            else:
                torch.addmm(self.bias, hidden, self.weight.t(), out=logits)
            yield rows, logits, *(None if x is None else x[rows] for x in self.by_row)


def _indices(counted: Tensor | None) -> Tensor | None:
    """The rows that products need; None: all, as on a GPU, where the host would wait."""
    if counted is None or not values_readable(counted) or counted.all():
        return None
    return counted.nonzero().squeeze(-1)


class Rows:
    """Tensors by row, leading dimensions merged. On a CPU only counted rows, for smaller products."""

    def __init__(self, hidden: Tensor, targets: Tensor | None, mask: Tensor | None, ignore_index: int, *others: Tensor | None):
        self.lead = hidden.shape[:-1]
        hidden, targets, mask, *others = (self.flat(x) for x in (hidden, targets, mask, *others))  # type: ignore[assignment]
        self.counts = counted_rows(targets, mask, ignore_index, 1)
        self.counted = _indices(self.counts)
        picked = (hidden, targets, mask, *others)
        self.hidden: Any
        self.hidden, *self.others = (x if x is None or self.counted is None else x[self.counted] for x in picked)

    def flat(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x.reshape(self.lead.numel(), *x.shape[len(self.lead) :])

    def clean(self, hidden: Tensor) -> Tensor:
        """0 in the rows that do not count: they meet a gradient of 0, but may hold NaN."""
        return hidden if self.counts is None or self.counted is not None else hidden.masked_fill(~self.counts.unsqueeze(-1), 0)

    def room(self, to: Tensor | None) -> Tensor | None:
        """Where to write the rows of a contiguous tensor, before `place`."""
        flat = self.flat(to)
        return flat if flat is None or self.counted is None else flat.new_empty((len(self.counted), *flat.shape[1:]))

    def place(self, to: Tensor | None, value: Tensor | None) -> None:
        """Puts what was written where it belongs, and 0 into the rows that do not count."""
        flat = self.flat(to)
        if flat is not None and value is not None and self.counted is not None:
            flat.zero_()[self.counted] = value


def new_gradients(parameters: Sequence[Tensor | None], wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Contiguous tensors like those that want a gradient, None for the others."""
    parts = zip(parameters, wanted, strict=True)
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) if want and x is not None else None for x, want in parts)


class GradientSums:
    """The gradients by hidden, weight and bias, from those by the logits of one chunk after the other.

    Those by weight and bias are summed in float32 and written by `finish`; beyond the chunks' columns they
    are 0.
    """

    def __init__(self, rows: Rows, chunks: Chunks, out: Sequence[Tensor | None]):
        self.rows, self.chunks, (self.d_hidden, self.d_weight, self.d_bias) = rows, chunks, out
        self.wanted = any(x is not None for x in out)
        self.d_rows = rows.room(self.d_hidden)
        acc = computing_dtype(chunks.hidden)
        self.weight_sum = None if self.d_weight is None else torch.zeros_like(chunks.weight, dtype=acc)
        self.bias_sum = None if self.d_bias is None else chunks.weight.new_zeros(len(chunks.weight), dtype=acc)

    def add(self, part: slice, d_logits: Tensor) -> None:
        if self.bias_sum is not None:
            self.bias_sum += d_logits.sum(0, dtype=self.bias_sum.dtype)
        hidden, weight = self.chunks.hidden, self.chunks.weight
        d_logits = d_logits.to(hidden.dtype)
        if self.d_rows is not None and self.d_rows.dtype == hidden.dtype:
            torch.mm(d_logits, weight, out=self.d_rows[part])
        elif self.d_rows is not None:
            self.d_rows[part] = torch.mm(d_logits, weight)
        if self.weight_sum is not None:
            _add_product(self.weight_sum, d_logits.t(), hidden[part])

    def finish(self) -> None:
        self.rows.place(self.d_hidden, self.d_rows)
        for to, value in ((self.d_weight, self.weight_sum), (self.d_bias, self.bias_sum)):
            if to is not None and value is not None:
                to[: len(value)].copy_(value)
                to[len(value) :].zero_()


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and MM_INTO_FLOAT32:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += torch.mm(a, b)


def check_matrix(hidden: Any, weight: Any, bias: Any, prefix: str = "") -> None:
    """hidden [..., H], weight [V, H], bias [V] or None, of one dtype and device; prefix: of their names."""
    check_logits(hidden, f"{prefix}hidden")
    for name, x in (("weight", weight), ("bias", bias)):
        if name == "bias" and x is None:
            continue
        name = prefix + name
        if isinstance(x, Tensor) and x.dtype != hidden.dtype:
            raise TypeError(f"{name} must have the dtype of {prefix}hidden {hidden.dtype} (or run under torch.autocast), got {x.dtype}")
        expect(name, x, "float", "[...]")
        if x.device != hidden.device:
            raise ValueError(f"{name} must be on the device of {prefix}hidden {hidden.device}, got {x.device}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        wanted = f"[V, {hidden.shape[-1]}] with V >= 1 for {prefix}hidden {tuple(hidden.shape)}"
        raise ValueError(f"{prefix}weight must be {wanted}, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{prefix}bias must be [{weight.shape[0]}] for {prefix}weight {tuple(weight.shape)}, got {tuple(bias.shape)}")


def autocast(hidden: Any, *others: Any) -> tuple:
    """All, in the dtype of torch.autocast where that is enabled."""
    if not isinstance(hidden, Tensor) or hidden.is_meta or not torch.is_autocast_enabled(hidden.device.type):
        return hidden, *others
    dtype = torch.get_autocast_dtype(hidden.device.type)

    def castable(x: Any) -> bool:
        return isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64

    return tuple(x.to(dtype) if castable(x) else x for x in (hidden, *others))
