"""What every kernel that writes a gradient by rows of logits does: a program has TILES tiles of a row.

Columns count from the 16-byte boundary before the row's gradient. The body lies between boundaries: even its
masked tiles move 16 bytes at a time. What lies outside are the edges.
"""

import triton
import triton.language as tl


@triton.jit
def columns(out_start, first, vocab, ALIGN: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """(column of the row's first entry, the body's first column and end, the row's end, the end of the
    program's tiles)"""
    lead = tl.zeros((), tl.int32) if ALIGNED else (out_start % ALIGN).to(tl.int32)
    end = vocab + lead
    body = 0 if ALIGNED else ALIGN
    body_end = tl.multiple_of(end // ALIGN * ALIGN, ALIGN)
    return lead, body, body_end, end, tl.minimum(first + TILES * BLOCK, body_end)


@triton.jit
def edges(lead, body, body_end, end, ALIGN: tl.constexpr):
    """Columns outside the body, before and after it, and which of them are the row's."""
    e = tl.arange(0, 2 * ALIGN)
    col = tl.where(e < ALIGN, e, body_end + e - ALIGN)
    return col, (e < 2 * ALIGN) & (col >= lead) & (col < end) & ((e < ALIGN) == (col < body))


@triton.jit
def write_zeros(z_ptr, first, last, edge, in_row, body, body_end, EDGES: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    zero = tl.zeros((BLOCK,), z_ptr.dtype.element_ty)
    for tile in range(first, last, BLOCK):
        tl.store(z_ptr + tile + cols, zero, mask=(tile + cols >= body) & (tile + cols < body_end))
    if EDGES:
        if first == 0:
            tl.store(z_ptr + edge, tl.zeros_like(edge).to(z_ptr.dtype.element_ty), mask=in_row)


@triton.jit
def load_upstream(ptr, row, HAS: tl.constexpr, ACC: tl.constexpr):
    if HAS:
        return tl.load(ptr + row)
    return tl.zeros((), ACC)
