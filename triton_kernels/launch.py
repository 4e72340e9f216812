"""Launch shapes, from a table: autotuning would make results depend on timing, and stall the first steps of a run."""

import contextlib

import torch
import triton


def _fit(vocab: int, block: int, warps: int) -> tuple[int, int]:
    """Shrinks a shape for vocabularies smaller than one tile."""
    while block > 256 and block >= 2 * triton.next_power_of_2(vocab):
        block, warps = block // 2, max(1, warps // 2)
    return block, warps


def forward_shape(vocab: int, element_size: int) -> tuple[int, int, int]:
    """(BLOCK, num_warps, stages of the load pipeline)"""
    return *_fit(vocab, 4096, 4), 3


def backward_shape(vocab: int, element_size: int) -> tuple[int, int]:
    """(BLOCK, num_warps)"""
    return _fit(vocab, 4096, 4)


def warp_size() -> int:
    """Threads that run in lockstep: 32, on AMD's data-centre cards 64."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).warp_size if torch.version.hip else 32


def loads_per_line() -> int:
    """16-byte loads that a thread holds side by side: Blackwell pairs their arithmetic, older cards only spend registers on it."""
    return 2 if torch.cuda.is_available() and not torch.version.hip and torch.cuda.get_device_capability()[0] >= 10 else 1


def device_of(tensor: torch.Tensor):
    """Triton launches on the current device: make it the tensor's."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)
