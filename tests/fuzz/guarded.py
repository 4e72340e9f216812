"""Memory between pages that nobody may read or write, and copies of a kernel's arguments in it."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

SLOT = 1 << 20
MARGIN = 256  # bytes beside a tensor that are looked at


class Slot:
    """Room for one tensor."""

    def __init__(self):
        page = mmap.PAGESIZE
        self._map = mmap.mmap(-1, SLOT + 2 * page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for address in (start, start + page + SLOT):
            if protect(address, page, 0):
                raise OSError(ctypes.get_errno(), "mprotect")
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8, count=SLOT, offset=page)

    def place(self, shape, strides, dtype: torch.dtype, at_end: bool, filler: int) -> Tensor:
        """A tensor that ends at the end of the slot, or starts at its start. All its bytes are `filler`."""
        size = dtype.itemsize * (1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)))
        if size + MARGIN > SLOT:
            raise ValueError(f"a slot has {SLOT} bytes, got a tensor of {size}")
        self._looked_at = self._bytes[SLOT - size - MARGIN :] if at_end else self._bytes[: size + MARGIN]
        self._looked_at.fill_(filler)
        own = self._looked_at[MARGIN:] if at_end else self._looked_at[:size]
        self.tensor = own.view(dtype).as_strided(shape, strides)
        return self.tensor

    def remember(self) -> None:
        self._before = self._looked_at.clone()

    def changed(self, result: bool) -> bool:
        """Whether bytes have changed that may not: in the tensor, unless it is a result, or beside it."""
        after = self._looked_at.clone()
        if result:
            start = self.tensor.data_ptr() - self._looked_at.data_ptr()
            for of in (after, self._before):
                of[start:].view(self.tensor.dtype).as_strided(self.tensor.shape, self.tensor.stride()).zero_()
        return not torch.equal(after, self._before)


_slots: list[Slot] = []  # as many as the largest call had tensors


class Copies:
    """Copies of the tensors of one call, each in a slot of its own. Valid until the next call's are made."""

    def __init__(self, *, at_end: bool, filler: int, gap: int):
        self._how, self._gap, self._used = (at_end, filler), gap, {}

    def copy(self, x: Tensor, *, strided: bool = False, filled: bool = True) -> Tensor:
        """x, with `gap` places behind each row if it is `strided`; without its numbers if it is not `filled`.
        Of the same x twice there is one copy."""
        if x.numel() == 0:
            return x
        key = (x.data_ptr(), x.dtype, x.shape)
        if key not in self._used:
            if len(self._used) == len(_slots):
                _slots.append(Slot())
            strides, step = [], 1
            for n in reversed(x.shape):
                strides.insert(0, step)
                step = step * n + (self._gap if strided else 0)
            self._used[key] = slot = _slots[len(self._used)]
            slot.place(x.shape, strides, x.dtype, *self._how)
            if filled:
                slot.tensor.copy_(x)
        return self._used[key].tensor

    def remember(self) -> None:
        for slot in self._used.values():
            slot.remember()

    def changed(self, results: list[Tensor]) -> Tensor | None:
        """A tensor that was written into or beside where it may not have been."""
        addresses = {t.data_ptr() for t in results}
        return next((s.tensor for s in self._used.values() if s.changed(s.tensor.data_ptr() in addresses)), None)
