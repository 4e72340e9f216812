"""Launch shapes, from a table. Autotuning would make results depend on timing, and slow a run's start."""

import contextlib
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Gpu(NamedTuple):
    """What launch shapes depend on."""

    capability: tuple[int, int] = (0, 0)  # NVIDIA's compute capability
    warp_size: int = 32  # threads that run in lockstep: on AMD's data-centre cards 64
    amd: bool = False


class ForwardShape(NamedTuple):
    block: int  # logits of a tile
    warps: int
    stages: int  # of the load pipeline
    splits: int = 1  # programs a row


class BackwardShape(NamedTuple):
    block: int
    warps: int
    stages: int
    tiles: int  # a program


@functools.cache
def gpu(device: torch.device) -> Gpu:
    """Tensors on a CPU, as in Triton's interpreter, get the shapes of an older NVIDIA card."""
    if device.type != "cuda":
        return Gpu()
    if torch.version.hip:
        return Gpu(warp_size=torch.cuda.get_device_properties(device).warp_size, amd=True)
    return Gpu(torch.cuda.get_device_capability(device))


def _fit(vocab: int, block: int, warps: int) -> tuple[int, int]:
    """Shrinks a shape for vocabularies smaller than one tile."""
    while block > 256 and block >= 2 * triton.next_power_of_2(vocab):
        block, warps = block // 2, max(1, warps // 2)
    return block, warps


# Hopper's shapes are measured on an H100: see benchmarks/variants.py, docs/performance.md.
# The others follow from `make report`: 64 bytes a thread are four 16-byte loads in
# flight, and registers for five to nine programs an SM. NVIDIA's asynchronous copies use no registers. AMD's
# pipeline stages do: they cost more programs than they are worth.


def forward_shape(card: Gpu, vocab: int, element_size: int, aligned: bool = True, sets: bool = False) -> ForwardShape:
    """aligned: every row starts on a 16-byte boundary; sets: each is over the columns of a set"""
    hopper, blackwell = card.capability[0] == 9, card.capability >= (10, 0)
    # Parts of 64 KB and more. A part meets new maxima that the row does not: Blackwell lacks issue slots.
    splits, least = (2, 62) if blackwell else (4, 31)
    splits = splits if vocab * element_size > least * 8192 else 1
    if hopper and aligned and sets:  # their registers leave room for as many bytes in flight in smaller tiles
        return ForwardShape(*_fit(vocab, 8192 // element_size, 4), 4, splits)
    if hopper and aligned:
        return ForwardShape(*_fit(vocab, 16384 // element_size, 4), 3, splits)
    if hopper and element_size == 2:  # a shifted tile takes two buffers, one nearly empty: smaller ones fit better
        return ForwardShape(*_fit(vocab, 2048, 2), 4, splits)
    stages = 1 if card.amd else 4 if hopper else 3 if aligned or blackwell else 2
    return ForwardShape(*_fit(vocab, 8192 // element_size, 4), stages, splits)


def backward_shape(card: Gpu, vocab: int, element_size: int, aligned: bool = True) -> BackwardShape:
    """aligned: every row starts on a 16-byte boundary, of the logits and of their gradient"""
    if card.capability[0] == 9:
        return BackwardShape(*_fit(vocab, 8192 // element_size, 4 if element_size == 2 else 8), 3, tiles=1 if aligned else 2)
    return BackwardShape(*_fit(vocab, 8192 // element_size, 4), 1 if card.amd else 3, tiles=4)


# A tile of a pair is two, and needs the registers of both. Hopper's shapes are measured at 8,192 x 151,936 in
# bf16, the others follow from `make report`.


def pair_forward_shape(card: Gpu, vocab: int, element_size: int, aligned: bool = True, capped: bool = False) -> ForwardShape:
    """Of two rows at once; a pair of rows has as many parts as one of twice the length. capped: by softcaps,
    whose registers spilled where elements are loaded one by one."""
    splits = forward_shape(card, 2 * vocab, element_size, aligned).splits
    if card.capability[0] == 9:  # one warp waits for no other before it knows whether a tile raises the maximum
        return ForwardShape(*_fit(vocab, max(256, 1024 // element_size), 1), 4, splits)  # aligned or not: the same sums
    block = (2048 if capped and not aligned else 4096) // element_size
    return ForwardShape(*_fit(vocab, block, 4), 1 if card.amd else 3, splits)


def pair_backward_shape(card: Gpu, vocab: int, element_size: int, aligned: bool = True, mixture: bool = False) -> BackwardShape:
    """mixture: a divergence from one. Its many instructions hide no start of a program."""
    tiles = 4
    if card.capability[0] == 9:
        tiles = 8 if mixture else 1 if aligned else 2
    return BackwardShape(*_fit(vocab, 4096 // element_size, 4), 1 if card.amd else 3, tiles)


FEW_TARGETS = 8  # a row: so many are worth a look from every tile, and more a second launch


def target_warps(block: int) -> int:
    """Warps of a program that holds `block` targets of a row at once."""
    return min(16, max(1, block // 256))


def strides(x: torch.Tensor) -> tuple[int, int]:
    """Those of the rows of [A, B, V]."""
    return x.stride(0), x.stride(1)


def starts_aligned(x: torch.Tensor, align: int) -> bool:
    """Whether every row of [A, B, V] starts on a 16-byte boundary, or a larger one, of `align` elements."""
    return x.data_ptr() % (align * x.element_size()) == 0 and all(s % align == 0 for s in strides(x))


def row_options(x: torch.Tensor, mask, temperature, acc: torch.dtype):
    """(pointers of the mask and the temperatures, temperature, what all kernels over rows specialise on).
    The logits stand for an absent tensor."""
    if acc == torch.float64 and not isinstance(temperature, torch.Tensor):
        # a Python float reaches a kernel as float32
        temperature = torch.full((x.shape[0] * x.shape[1],), temperature, dtype=acc, device=x.device)
    row_temperature = isinstance(temperature, torch.Tensor)
    pointers = (x if mask is None else mask, temperature if row_temperature else x)
    options = dict(HAS_MASK=mask is not None, ROW_TEMPERATURE=row_temperature, ACC=tl.float64 if acc == torch.float64 else tl.float32)
    return pointers, (1.0 if row_temperature else temperature), options


def stats_options(logits, targets, mask, temperature, state, softcap):
    """(pointers, temperature, 1 / softcap, specialisations) of row statistics. The logits stand for an absent
    tensor."""
    pointers, temperature, options = row_options(logits, mask, temperature, state.dtype)
    n_targets = 0 if targets is None else targets.shape[1]
    options |= dict(K=n_targets, K_BLOCK=triton.next_power_of_2(max(1, n_targets)), SOFTCAP=softcap > 0)
    return (logits, logits if targets is None else targets, *pointers), temperature, 1.0 / softcap if softcap > 0 else 0.0, options


def device_of(tensor: torch.Tensor):
    """Triton launches on the current device: make it the tensor's."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)
