"""What an update of a masked-diffusion model takes of memory: measured in a process of its own."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from .diffusion_objectives import Answers, elbos
from .diffusion_train import update
from .masked_diffusion import new_model
from .measure import Meter
from .processes import advance
from .sudoku import CELLS, VOCAB

_LIBC = ctypes.CDLL(None)
ANSWERS = 64
PADDED_VOCAB = 8192  # logits are the largest tensor of a language model; with the task's five columns they would be none


class Memory(NamedTuple):
    """Bytes. `retained`: the most that autograd held for backward at any time, parameters left out.
    `peak`: the highest rise of the process's resident set in the update; None off Linux."""

    retained: int
    peak: int | None


class Retained:
    """Counts the storages that saved tensors keep alive, each once."""

    def __init__(self, parameters):
        self.ignored = {p.untyped_storage().data_ptr() for p in parameters}
        self.users: dict[int, int] = {}
        self.bytes = self.most = 0

    def pack(self, tensor: Tensor) -> _Saved:
        return _Saved(tensor, self)

    def add(self, storage: torch.UntypedStorage) -> None:
        key = storage.data_ptr()
        self.users[key] = self.users.get(key, 0) + 1
        if self.users[key] == 1 and key not in self.ignored:
            self.bytes += storage.nbytes()
            self.most = max(self.most, self.bytes)

    def remove(self, storage: torch.UntypedStorage) -> None:
        key = storage.data_ptr()
        self.users[key] -= 1
        if self.users[key] == 0 and key not in self.ignored:
            self.bytes -= storage.nbytes()


class _Saved:
    """A tensor saved for backward; autograd lets go of it with the graph."""

    def __init__(self, tensor: Tensor, retained: Retained):
        self.tensor, self.retained = tensor, retained
        retained.add(tensor.untyped_storage())

    def __del__(self):
        self.retained.remove(self.tensor.untyped_storage())


def _allocate_from_the_system() -> None:
    """Freed blocks of 64 kB or more go back to the system: resident is what is in use (glibc)."""
    mmap_threshold = -3
    if hasattr(_LIBC, "mallopt"):
        _LIBC.mallopt(mmap_threshold, 1 << 16)


def _return_freed_memory() -> None:
    """Of the smaller blocks: what was freed before would otherwise be used again, unseen."""
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)


def measure(objective: str, n: int) -> Memory:
    """One update off-policy, on random answers, after a small one that makes gradients and optimizer state.

    It is everything from the draws of the masks to the optimizer's step.
    """
    _allocate_from_the_system()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = new_model(PADDED_VOCAB)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(1, VOCAB, (ANSWERS, CELLS))
    response = torch.rand(ANSWERS, CELLS).argsort(-1) < 12
    answers = Answers(ids, response, torch.randn(ANSWERS), torch.arange(ANSWERS), seed=0)
    meter, retained = Meter(), Retained(model.parameters())
    old_elbo = elbos(model, answers, n)
    update(model, optimizer, objective, answers, 2, None)
    _return_freed_memory()
    with meter.measured(), torch.autograd.graph.saved_tensors_hooks(retained.pack, lambda saved: saved.tensor):
        update(model, optimizer, objective, answers, n, old_elbo)
    advance(n)
    return Memory(retained.most, meter.peak_bytes[0] if meter.peak_bytes else None)
