"""How rows of logits lie in memory, and how plain PyTorch walks over them a chunk at a time."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """[..., V] as [A, B, V] with last stride 1: a view where possible, as for slices of three dimensions."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    if x.dim() == 3:
        return x
    if x.dim() < 3:
        return x.unsqueeze(0) if x.dim() == 2 else x.view(1, 1, -1)
    try:
        return x.view(x.shape[:-2].numel(), x.shape[-2], x.shape[-1])
    except RuntimeError:  # leading strides that do not merge
        return x.contiguous().view(x.shape[:-2].numel(), x.shape[-2], x.shape[-1])


def chunk_elements(x: Tensor) -> int:
    """Elements to upcast at once: what a CPU's cache holds; more on a GPU, where launches cost more."""
    return 1 << 18 if x.device.type == "cpu" else 1 << 24


def row_chunks(rows: Tensor, elements: int | None = None) -> Iterator[tuple[int, slice, slice]]:
    """Yields (a, b, flat): a chunk `rows[a, b]` of [A, B, V], and `flat`, the slice of its row numbers."""
    outer, inner, vocab = rows.shape
    step = max(1, (chunk_elements(rows) if elements is None else elements) // vocab)
    for a in range(outer):
        for start in range(0, inner, step):
            stop = min(inner, start + step)
            yield a, slice(start, stop), slice(a * inner + start, a * inner + stop)


def counted_rows(targets: Tensor | None, mask: Tensor | None, ignore_index: int, dims: int) -> Tensor | None:
    """Which rows are read, bool with `dims` dimensions; None for all. Targets may have one dimension more."""
    if targets is None:
        return mask
    counted = targets != ignore_index
    counted = counted.any(-1) if counted.dim() > dims else counted
    return counted if mask is None else counted & mask
