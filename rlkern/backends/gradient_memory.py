"""Memory for gradients of the size of the logits.

PyTorch has no caching allocator for CPUs. Every step it returns a large block to the system and asks for a
new one. Getting new pages costs more than filling them by the kernel. So the last block is kept, and used
again once nobody holds it.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

_SMALLEST = 16 << 20  # bytes; malloc keeps smaller blocks itself
_kept: list[torch.UntypedStorage] = []  # at most one; popped for use, so two threads never hold the same


def new_gradient(x: Tensor) -> Tensor:
    """Uninitialised memory for the gradient by x. It is contiguous, but has x's strides if x is a slice that
    leaves little out: rows that a kernel reads and writes are then aligned alike."""
    if x.is_contiguous():
        return empty(x)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    if x.dim() <= 3 and x.numel() < extent <= 1.125 * x.numel():  # else as_rows may have to copy
        return x.new_empty_strided(x.shape, x.stride())
    return empty(x)


def empty(like: Tensor) -> Tensor:
    """A new contiguous tensor of like's shape, dtype and device, in the kept memory if the size fits."""
    size = like.numel() * like.element_size()
    if size < _SMALLEST or like.device.type != "cpu" or type(like) not in (Tensor, torch.nn.Parameter):
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    storage = _take()
    if storage is None or not size <= storage.nbytes() <= 2 * size:
        storage = None  # free the old one before the new one is allocated
        storage = torch.UntypedStorage(size, device="cpu")
    _kept[:] = [storage]
    return torch.empty(0, dtype=like.dtype, device="cpu").set_(storage, 0, like.shape)  # type: ignore[call-overload]


def _take() -> torch.UntypedStorage | None:
    """The kept memory, unless a tensor, view, array, storage object or other process still uses it."""
    try:
        storage = _kept.pop()
    except IndexError:
        return None
    unknown = torch.UntypedStorage(0)  # for comparison: nobody else has this one
    if sys.getrefcount(storage) > sys.getrefcount(unknown) or torch._C._storage_Use_Count(storage._cdata) > 1 or storage.is_shared():
        return None
    return storage


def release() -> None:
    """Gives the kept memory back to the system."""
    _kept.clear()
