"""Launch shapes, from a table: autotuning would make results depend on timing, and stall the first steps of a run."""

import contextlib

import torch
import triton


def _fit(vocab: int, block: int, warps: int) -> tuple[int, int]:
    """Shrinks a shape for vocabularies smaller than one tile."""
    while block > 256 and block >= 2 * triton.next_power_of_2(vocab):
        block, warps = block // 2, max(1, warps // 2)
    return block, warps


# 64 bytes a thread: four 16-byte loads in flight, and registers for five to nine programs an SM (make report).
# Stages: NVIDIA's asynchronous copies pass by the registers; AMD's pipeline is made of registers, and costs more programs than it is worth.


def forward_shape(vocab: int, element_size: int, aligned: bool = True) -> tuple[int, int, int, int]:
    """(BLOCK, num_warps, stages of the load pipeline, programs a row). aligned: every row starts on a 16-byte boundary"""
    block, warps = _fit(vocab, 8192 // element_size, 4)
    blackwell = capability() >= (10, 0)
    stages = 1 if torch.version.hip else 3 if aligned or blackwell else 2
    # Parts of 64 KB and more. A part meets new maxima that the row does not, and Blackwell has few issue slots to spare for them.
    parts, least = (2, 62) if blackwell else (4, 31)
    splits = parts if vocab > least * block else 1
    return block, warps, stages, splits


def backward_shape(vocab: int, element_size: int) -> tuple[int, int, int, int]:
    """(BLOCK, num_warps, stages of the load pipeline, tiles a program)"""
    return *_fit(vocab, 8192 // element_size, 4), 1 if torch.version.hip else 3, 4


FEW_TARGETS = 8  # a row: so many are worth a look from every tile, and more a second launch


def target_warps(block: int) -> int:
    """Warps of a program that holds `block` targets of a row at once."""
    return min(16, max(1, block // 256))


def warp_size() -> int:
    """Threads that run in lockstep: 32, on AMD's data-centre cards 64."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).warp_size if torch.version.hip else 32


def capability() -> tuple[int, int]:
    """NVIDIA's compute capability; (0, 0) elsewhere."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() and not torch.version.hip else (0, 0)


def device_of(tensor: torch.Tensor):
    """Triton launches on the current device: make it the tensor's."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)
