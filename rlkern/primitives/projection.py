"""Hidden states times an output matrix, some rows or columns at a time, and the gradients back through it.

The library computes the products. Logits of 16-bit operands are rounded to those, or float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from copy import copy
from typing import Any

import torch
from torch import Tensor

from ..checks import check_count, check_logits, computing_dtype, expect, shown
from ..layout import counted_rows
from ..operator import values_readable

# torch 2.8: on CUDA, bf16 @ bf16 without rounding the product to bf16
MM_INTO_FLOAT32 = hasattr(torch.ops.aten.addmm, "dtype_out")


def default_chunk_rows(hidden: Tensor, bytes_a_row: int) -> int:
    """Enough rows to keep the product busy: a GPU must read the whole matrix for each chunk."""
    return max(1, (64 << 20 if hidden.device.type == "cpu" else 512 << 20) // bytes_a_row)


def blocks(start: int, stop: int, step: int) -> Iterator[slice]:
    """[start, stop) in pieces of at most `step`; 0: in one piece."""
    step = step or max(1, stop - start)
    for i in range(start, stop, step):
        yield slice(i, min(i + step, stop))


# --- products -----------------------------------------------------------------------------------------------


def _multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of that dtype are fast. A CPU without the instructions emulates them."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    supported = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    return getattr(torch.ops.mkldnn, supported)()


def _widens(x: Tensor) -> bool:
    """Whether products of x's dtype can have a float32 result that was never rounded to that dtype."""
    return x.is_cuda and MM_INTO_FLOAT32


def multiply(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, rounded once to out's dtype where the library can."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif out.dtype == torch.float32 and _widens(a):
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.mm(a, b))


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, accumulated in total's dtype where the library can."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.dtype == torch.float32 and _widens(a):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += torch.mm(a, b)


def fill_rows(x: Tensor, rows: int) -> Tensor:
    """x [n, ...] with rows of 0 behind it, if it has fewer."""
    return x if x.shape[0] >= rows else torch.cat([x, x.new_zeros(rows - x.shape[0], *x.shape[1:])])


class Head:
    """Hidden states [n, H] and the matrix [V, H], with bias [V] or None, that makes logits of them.

    dtype: of the logits; float32 beside 16-bit operands does not round them to 16 bits, and adds the bias in
        float32. Where the library has no such product, or is slow at products of 16 bits, the operands are
        cast: hidden here, the matrix in `columns`.
    least_rows: products of fewer rows are filled up with rows of 0 to so many. A product of another shape may
        be another kernel, with other bits.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None, least_rows: int = 0):
        self.dtype, self.least_rows = hidden.dtype if dtype is None else dtype, least_rows
        operands = hidden.dtype if _multiplies(hidden.dtype, hidden.device) else torch.float32
        if self.dtype != hidden.dtype and not _widens(hidden):
            operands = self.dtype
        self.hidden, self.weight, self.bias = hidden.to(operands), weight, bias

    def columns(self, part: slice) -> Head:
        """What makes these columns of the logits."""
        tile = copy(self)
        tile.weight = self.weight[part].to(self.hidden.dtype)
        tile.bias = None if self.bias is None else self.bias[part].to(torch.promote_types(self.dtype, self.hidden.dtype))
        return tile

    def whole(self) -> Head:
        return self.columns(slice(0, len(self.weight)))

    def new_logits(self, rows: int, columns: int) -> Tensor:
        return self.hidden.new_empty(rows, columns, dtype=self.dtype)

    def logits(self, rows: slice, buffer: Tensor) -> Tensor:
        """Of these rows, all columns of what `columns` or `whole` returned; in the memory of the buffer."""
        hidden = self.hidden[rows]
        n, v = hidden.shape[0], self.weight.shape[0]
        out = buffer.view(-1)[: n * v].view(n, v)
        if n >= self.least_rows:
            self._write(out, hidden)
            return out
        filled = self.new_logits(self.least_rows, v)
        self._write(filled, fill_rows(hidden, self.least_rows))
        return out.copy_(filled[:n])

    def _write(self, out: Tensor, hidden: Tensor) -> None:
        matrix, bias = self.weight.t(), self.bias
        if bias is None:
            multiply(out, hidden, matrix)
        elif out.dtype == hidden.dtype:
            torch.addmm(bias, hidden, matrix, out=out)
        elif bias.dtype == hidden.dtype:  # operands that were cast
            out.copy_(torch.addmm(bias, hidden, matrix))
        else:
            multiply(out, hidden, matrix)
            out += bias


class Chunks:
    """The rows in pieces. Their logits are always in the same memory."""

    def __init__(self, head: Head, chunk_rows: int, *by_row: Tensor | None):
        self.head, self.by_row = head.whole(), by_row
        self.rows = head.hidden.shape[0]
        self.step = max(1, min(chunk_rows, self.rows))
        self.buffer = head.new_logits(min(self.step, self.rows), len(head.weight))

    def __len__(self) -> int:
        return -(-self.rows // self.step)

    def __iter__(self) -> Iterator[tuple]:
        """Yields (rows, logits of these rows, *these rows of every other tensor)."""
        for rows in blocks(0, self.rows, self.step):
            yield rows, self.head.logits(rows, self.buffer), *(None if x is None else x[rows] for x in self.by_row)


# --- rows ---------------------------------------------------------------------------------------------------


def _indices(counted: Tensor | None, num_valid: int | None) -> Tensor | None:
    """The rows that products need; None: all, as on a GPU, where the host would wait to learn how many."""
    if counted is not None and values_readable(counted):
        count = int(counted.sum())
        if num_valid is not None and count != num_valid:
            raise ValueError(f"num_valid must be the number of rows that count, here {count}, got {num_valid}")
        return None if count == len(counted) else counted.nonzero().squeeze(-1)
    if counted is None or num_valid is None:
        return None
    return counted.logical_not().to(torch.uint8).sort(stable=True).indices[:num_valid]


class Rows:
    """Tensors by row, leading dimensions merged. Rows that do not count are left out, for smaller products,
    on a CPU and where num_valid says how many count, unless leaves_out says not to.
    """

    def __init__(
        self,
        hidden: Tensor,
        targets: Tensor | None,
        mask: Tensor | None,
        ignore_index: int,
        *others: Tensor | None,
        num_valid: int | None = None,
        leaves_out: bool = True,
    ):
        self.lead = hidden.shape[:-1]
        hidden, targets, mask, *others = (self.flat(x) for x in (hidden, targets, mask, *others))  # type: ignore[assignment]
        counts = counted_rows(targets, mask, ignore_index, 1)
        self.counted = _indices(counts, num_valid) if leaves_out else None
        self.all_count = self.counted is not None and num_valid is None
        picked = (hidden, targets, mask, *others, counts)
        self.hidden: Any
        self.hidden, *self.others, self.counts = (x if x is None or self.counted is None else x[self.counted] for x in picked)

    def flat(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x.reshape(self.lead.numel(), *x.shape[len(self.lead) :])

    def index(self, part: slice) -> slice | Tensor:
        """Which of all rows these are."""
        return part if self.counted is None else self.counted[part]

    def clean(self, hidden: Tensor) -> Tensor:
        """0 in the rows that do not count: they meet a gradient of 0, but may hold NaN."""
        if self.counts is None or self.all_count:
            return hidden
        return hidden.masked_fill(~self.counts.unsqueeze(-1), 0)

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


# --- gradients ----------------------------------------------------------------------------------------------


class GradientSums:
    """The gradients by hidden, weight and bias, from those by the logits of one piece after the other.

        sums.begin(head.whole(), columns, pieces)  # what makes these columns, and in how many pieces
        sums.add(rows, d_logits)                   # each piece: all of these columns of some rows
        sums.finish()                              # after the last columns; any that never came get 0

    The gradient by weight is one product, rounded once, where its columns are one piece. Where they are
    several it is a float32 sum, rounded at the end, and so is that by hidden where the columns come in tiles.
    That by bias is summed in float32.

    weight_sum: float32 [V, H], to which the gradient by weight is added, instead of out's.
    """

    def __init__(self, rows: Rows, head: Head, out: Sequence[Tensor | None], *, tiled: bool = False, weight_sum: Tensor | None = None):
        self.rows, self.hidden, (self.d_hidden, self.d_weight, self.d_bias) = rows, head.hidden, out
        self.weight_sum, self.wanted = weight_sum, weight_sum is not None or any(x is not None for x in out)
        self.acc = computing_dtype(head.hidden)
        self.d_rows = self.of_rows = rows.room(self.d_hidden)
        self.tiled, self.columns = tiled, slice(0, 0)
        if tiled and self.d_rows is not None:
            self.of_rows = self.d_rows.zero_() if self.d_rows.dtype == self.acc else torch.zeros_like(self.d_rows, dtype=self.acc)

    def begin(self, head: Head, columns: slice, pieces: int) -> None:
        self._end()
        self.head, self.columns, self.added = head, columns, self.weight_sum is not None
        self.of_weight = self.of_bias = None
        if self.weight_sum is not None:
            self.of_weight = self.weight_sum[columns]
        elif self.d_weight is not None:
            part = self.d_weight[columns]
            self.of_weight = part if pieces == 1 or part.dtype == self.acc else torch.empty_like(part, dtype=self.acc)
        if self.d_bias is not None:
            self.of_bias = self.d_bias.new_zeros(columns.stop - columns.start, dtype=self.acc)

    def add(self, part: slice, d_logits: Tensor) -> None:
        if self.of_bias is not None:
            self.of_bias += d_logits.sum(0, dtype=self.acc)
        d_logits = d_logits.to(self.hidden.dtype)
        if self.of_rows is not None:
            self._add_rows(self.of_rows[part], d_logits)
        if self.of_weight is not None:
            (add_product if self.added else multiply)(self.of_weight, d_logits.t(), self.hidden[part])
        self.added = True

    def _add_rows(self, out: Tensor, d_logits: Tensor) -> None:
        if self.tiled:
            add_product(out, d_logits, self.head.weight)
        elif len(out) >= self.head.least_rows:
            multiply(out, d_logits, self.head.weight)
        else:
            filled = fill_rows(d_logits, self.head.least_rows)
            product = out.new_empty(len(filled), out.shape[1])
            multiply(product, filled, self.head.weight)
            out.copy_(product[: len(out)])

    def _end(self) -> None:
        """Rounds the sums of these columns."""
        if self.columns.stop == 0:
            return
        if self.d_weight is not None:
            part = self.d_weight[self.columns]
            if not self.added:
                part.zero_()
            elif self.of_weight is not None and self.of_weight.dtype != part.dtype:
                part.copy_(self.of_weight)
        if self.d_bias is not None:
            self.d_bias[self.columns].copy_(self.of_bias)  # type: ignore[arg-type]

    def finish(self) -> None:
        self._end()
        for x in (self.d_weight, self.d_bias):
            if x is not None:
                x[self.columns.stop :].zero_()
        if self.d_rows is not None and self.of_rows is not None and self.of_rows.dtype != self.d_rows.dtype:
            self.d_rows.copy_(self.of_rows)
        self.rows.place(self.d_hidden, self.d_rows)


def check_matrix(hidden: Any, weight: Any, bias: Any, prefix: str = "", also: torch.dtype | None = None, least: int = 1) -> None:
    """hidden [..., H], weight [V, H] with V >= least, bias [V] or None, of one dtype and device.

    prefix: of their names. also: another dtype that weight and bias may have.
    """
    check_logits(hidden, f"{prefix}hidden")
    for name, x in (("weight", weight), ("bias", bias)):
        if name == "bias" and x is None:
            continue
        name = prefix + name
        if isinstance(x, Tensor) and x.dtype not in (hidden.dtype, also):
            raise TypeError(f"{name} must have the dtype of {prefix}hidden {hidden.dtype} (or run under torch.autocast), got {x.dtype}")
        expect(name, x, "float", "[...]")
        if x.device != hidden.device:
            raise ValueError(f"{name} must be on the device of {prefix}hidden {hidden.device}, got {x.device}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] < least:
        wanted = f"[V, {hidden.shape[-1]}] with V >= {least} for {prefix}hidden {tuple(hidden.shape)}"
        raise ValueError(f"{prefix}weight must be {wanted}, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{prefix}bias must be [{weight.shape[0]}] for {prefix}weight {tuple(weight.shape)}, got {tuple(bias.shape)}")


def _autocast_dtype(x: Any) -> torch.dtype | None:
    """What torch.autocast casts x to, where that is enabled."""
    if not isinstance(x, Tensor) or x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)


def autocast(hidden: Any, *others: Any) -> tuple:
    """All, in the dtype of torch.autocast where that is enabled."""
    dtype = _autocast_dtype(hidden)
    if dtype is None:
        return hidden, *others

    def castable(x: Any) -> bool:
        return isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64

    return tuple(x.to(dtype) if castable(x) else x for x in (hidden, *others))


def whole_parameter(x: Any) -> Any:
    """A DTensor as a tensor of all of it, as FSDP2 shards parameters; anything else as it is.

    The gradient that each process computes from its own rows is averaged over the mesh, as FSDP2 does.
    """
    if not hasattr(x, "full_tensor"):
        return x
    from torch.distributed.tensor import Partial

    # Asked for an average, the DTensor of torch 2.6 sums.
    whole = x.full_tensor(grad_placements=[Partial()] * x.device_mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda g: g / x.device_mesh.size())
    return whole


def whole_head(hidden: Any, weight: Any, bias: Any, least: int = 1) -> tuple[Tensor, Tensor, Tensor | None]:
    """(hidden, weight, bias), checked: parameters that are sharded whole, all in autocast's dtype.

    But where that has 16 bits, float32 parameters stay so. `Head` casts them, so no copy of them is kept for
    the backward, and their gradient is float32 as the library's product gives it.
    """
    dtype = _autocast_dtype(hidden)
    master = torch.float32 if dtype is not None and dtype.itemsize == 2 else None
    (hidden,) = autocast(hidden)
    parameters = (whole_parameter(weight), whole_parameter(bias))
    weight, bias = (x if getattr(x, "dtype", None) == master else autocast(x)[0] for x in parameters)
    check_matrix(hidden, weight, bias, also=master, least=least)
    return hidden, weight, bias


def check_num_valid(num_valid: int | None, hidden: Tensor) -> None:
    if num_valid is None:
        return
    check_count("num_valid", num_valid)
    if num_valid > hidden.shape[:-1].numel():
        raise ValueError(f"num_valid must be at most the number of rows {hidden.shape[:-1].numel()}, got {num_valid}")


def gathering(gathered: Callable[[], Any] | None) -> Any:
    """The context in which the parameters have their values."""
    if gathered is None:
        return nullcontext()
    if torch.compiler.is_compiling():
        raise ValueError("gathered is not supported under torch.compile: expected None")
    wanted = "gathered must be a function without arguments that returns a context manager, or None"
    if not callable(gathered):
        raise TypeError(f"{wanted}, got {shown(gathered)}")
    try:
        context = gathered()
    except TypeError as error:
        raise TypeError(f"{wanted}, got one that raises {error}") from error
    if not hasattr(context, "__enter__"):
        raise TypeError(f"{wanted}, got one that returns {shown(context)}")
    return context
