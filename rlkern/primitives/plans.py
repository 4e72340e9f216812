"""How `linear_token_stats` cuts its products: which logits are kept, and how the others are made again.

A product below is one of 2 N H V operations. A step of a head that trains takes three: the logits, and their
gradient times the matrix and times the hidden states. Logits that are not kept are a fourth.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..checks import check_choice, check_count, check_flags, shown

TILE = 8192  # columns, a multiple of 128; wide enough to keep the product busy
BLOCK = 8192  # rows of a tile
FIXED_BLOCK = 512  # rows, where a product must always have the same shape
WORKSPACE = {"cpu": 256 << 20}  # bytes
DEFAULT_WORKSPACE = 1 << 30


class Cut(NamedTuple):
    """What a plan comes to for any number of rows: the numbers that the operators take."""

    keep_rows: int  # so many rows' logits are kept for the backward, or all if there are fewer
    tile: int  # columns at a time of the other rows; 0: all
    block_rows: int  # other rows at a time
    fixed: bool = False  # fewer rows are filled up to block_rows, and kept ones come so many at a time too


class LinearPlan(NamedTuple):
    """How the products of a head with `rows` rows are cut. See `linear_plan`."""

    rows: int
    kept: int  # rows whose logits are kept from the forward to the backward
    order: str  # of the other rows: "tiles" of columns, or "chunks" of rows
    tile: int  # columns of logits at a time of the other rows
    block: int  # other rows at a time
    products: float  # of forward and backward together, in units of 2 N H V operations
    bytes: int  # at the same time, beside inputs, results and gradients

    def __str__(self) -> str:
        kept = f"{self.kept} of {self.rows} rows kept"
        cut = "" if self.kept == self.rows else f"; {self.order} of {self.block} x {self.tile} logits"
        return f"{kept}{cut}; {self.products:.4g} products, {self.bytes / 2**20:.4g} MiB"


def default_workspace(device: str) -> int:
    return WORKSPACE.get(device, DEFAULT_WORKSPACE)


def cut(
    vocab: int, itemsize: int, needs: tuple[bool, bool, bool], workspace: int, whole_rows: bool, chunk_rows: int | None, fixed_blocks: bool = False
) -> Cut:
    """itemsize: bytes of a logit. The others as in `linear_plan`."""
    in_workspace = workspace // (vocab * itemsize)
    chunk = max(1, in_workspace // 2, TILE * BLOCK // vocab)
    if chunk_rows is not None:
        return Cut(0, 0, chunk_rows, fixed_blocks)
    if fixed_blocks:  # nothing that depends on which row it is
        return Cut(in_workspace if any(needs) else 0, 0, FIXED_BLOCK, True)
    if not any(needs):
        return Cut(0, 0, chunk)
    if whole_rows or not needs[1]:
        return Cut(in_workspace, 0, chunk)
    return Cut(in_workspace, TILE if vocab > TILE else 0, BLOCK)


def rows_at_once(vocab: int, itemsize: int, workspace: int) -> int:
    """Of a chunk of logits that fills the workspace."""
    return max(1, workspace // (vocab * itemsize))


def check_workspace(workspace: int | None, device: str) -> int:
    """Bytes; the default for None."""
    if workspace is None:
        return default_workspace(device)
    if not isinstance(workspace, int) or isinstance(workspace, bool):
        raise TypeError(f"workspace must be an int, a number of bytes, or None, got {shown(workspace)}")
    if workspace < 0:
        raise ValueError(f"workspace must be at least 0 bytes, got {workspace}")
    return workspace


def linear_plan(
    rows: int,
    hidden_size: int,
    vocab: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    needs: tuple[bool, bool, bool] = (True, True, False),
    workspace: int | None = None,
    device: str = "cuda",
    logits_dtype: torch.dtype | None = None,
    whole_rows: bool = False,
    chunk_rows: int | None = None,
    known: bool = False,
) -> LinearPlan:
    """What `linear_token_stats` does for these sizes, and what it takes. Prints as one line.

    Logits of as many rows as `workspace` holds are kept from the forward to the backward, which writes their
    gradient over them: three products, and the numbers of `token_stats` of all logits. Those of the other
    rows are made again, a fourth product:

        "tiles"   a tile of 8192 columns at a time, for a weight that trains: its gradient is complete with
                  the tile, so no float32 copy of it exists
        "chunks"  whole rows, as many as half of the workspace holds, or as many logits as a tile has: for a
                  frozen weight, and for what needs a row twice (min_p, min_prob, with_tail)

    Args:
        rows, hidden_size, vocab: N, H and V.
        dtype: of hidden and weight.
        needs: whether (hidden, weight, bias) take a gradient. None of them: nothing is kept.
        workspace: bytes of logits to keep; None takes 1 GiB, on a CPU 256 MiB. Beyond it come a tile or a
            chunk, and float32 sums of what is not complete at once.
        device: "cpu" or any other type; it only chooses the default of `workspace`.
        logits_dtype: None for dtype, or torch.float32.
        whole_rows: with min_p, min_prob or with_tail.
        chunk_rows: as given to `linear_token_stats`: chunks of so many rows, and none is kept.
        known: of `linear_fused_loss`, whose gradient is complete in the forward: chunks, each used once.

    Returns:
        LinearPlan(rows, kept, order, tile, block, products, bytes).

    Raises:
        TypeError, ValueError: for numbers that are not such sizes, and other dtypes.
    """
    check_count("rows", rows)
    check_count("hidden_size", hidden_size, 1)
    check_count("vocab", vocab, 1)
    check_choice("device", device, ("cpu", "cuda", "xpu", "mps", "meta"))
    if chunk_rows is not None:
        check_count("chunk_rows", chunk_rows, 1)
    itemsize = check_logits_dtype(logits_dtype, dtype).itemsize
    if not isinstance(needs, (tuple, list)) or len(needs) != 3:
        given = len(needs) if isinstance(needs, (tuple, list)) else shown(needs)
        raise TypeError(f"needs must be three flags, for hidden, weight and bias, got {given}")
    check_flags(**{f"needs[{i}]": need for i, need in enumerate(needs)}, whole_rows=whole_rows, known=known)
    size = check_workspace(workspace, device)
    if known and chunk_rows is None:
        chunk_rows = rows_at_once(vocab, itemsize, size)
    c = cut(vocab, itemsize, needs, size, whole_rows, chunk_rows)
    kept = 0 if known else min(rows, c.keep_rows)
    others = rows - kept
    block, tile = max(1, min(others, c.block_rows)), c.tile or vocab
    pieces = -(-others // block) + (kept > 0)
    direct = 1 + needs[0] + needs[1] if any(needs) else 1
    again = direct if known or not any(needs) else direct + 1
    products = (kept * direct + others * again) / rows if rows else 0
    acc = 8 if dtype == torch.float64 else 4
    size = (kept * vocab + (block * tile if others else 0)) * itemsize
    if itemsize > dtype.itemsize and any(needs):  # the logits' gradient is cast for the products
        size += max(block if others else 0, kept if c.tile else min(kept, c.block_rows)) * tile * dtype.itemsize
    if needs[1] and pieces > 1 and dtype.itemsize != acc:
        size += tile * hidden_size * acc
    if needs[0] and c.tile and others and dtype.itemsize != acc:
        size += rows * hidden_size * acc
    return LinearPlan(rows, kept, "tiles" if c.tile else "chunks", tile, block, products, size)


def check_logits_dtype(logits_dtype: torch.dtype | None, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the logits of operands of `dtype`."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype!r}")
    if logits_dtype is None or logits_dtype == dtype:
        return dtype
    if not isinstance(logits_dtype, torch.dtype):
        raise TypeError(f"logits_dtype must be a torch.dtype or None, got {shown(logits_dtype)}")
    if logits_dtype != torch.float32 or dtype == torch.float64:
        expected = f"{dtype} or None" if dtype.itemsize > 2 else f"torch.float32, {dtype} or None"
        raise ValueError(f"logits_dtype must be {expected} for {dtype} operands, got {logits_dtype}")
    return logits_dtype
