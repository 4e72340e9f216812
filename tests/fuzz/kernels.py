"""The functions of rlkern/backends/native.py, watched.

    with watched(random) as called: ...

Each call that comes is made in guarded memory: there a stray access by one byte ends the process, and a stray
write between rows is seen. It is made again in other memory, with other garbage where nothing is to be read,
on another number of threads, and for some of its rows alone: all must have the same bits.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import random
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from rlkern.backends import native
from rlkern.backends.contract import Keep, SetKind

from .guarded import Copies

ROWS = ("logits", "other", "reference")  # [A, B, V]
STRIDED = {*ROWS, "hidden", "weight", "parts"}  # those of three dimensions, of any strides over the first two
RESULTS = ("out", "keep_out")
GRADIENTS = {"token_stats_backward", "pair_backward", "row_moments_backward", "did_entropy_backward"}  # `out` is [A, B, V]
ADDED_TO = {"kept_weight_gradient", "kept_rows_backward"}  # `out` is zeros
BY_TOKEN = ("logp", "old_logp", "advantages", "reference", "values")  # [N] or [K, N], not read where masked
FUNCTIONS = {
    name: value
    for name, value in vars(native).items()
    if inspect.isfunction(value) and value.__module__ == native.__name__ and not name.startswith("_")
}


class Stray(AssertionError):
    """A kernel read, wrote or depended on what it should not."""


def _tensors(value) -> list[Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def _results(arguments: dict) -> list[Tensor]:
    return _tensors([arguments.get(name) for name in RESULTS])


def _call(name: str, function: Callable, arguments: dict, threads: int, **how) -> list[Tensor]:
    """The results, of a call in guarded memory."""
    copies = Copies(**how)

    def copied(key, value):
        if isinstance(value, Keep):
            return value._replace(sets=copies.copy(value.sets, strided=value.sets.dim() == 3), **{
                field: copies.copy(x) for field, x in value._asdict().items() if field != "sets" and isinstance(x, Tensor)
            })  # fmt: skip
        strided = key in STRIDED or (key == "out" and name in GRADIENTS)
        filled = key not in RESULTS or name in ADDED_TO
        return tree_map_only(Tensor, lambda x: copies.copy(x, strided=strided and x.dim() == 3, filled=filled), value)

    own = {key: copied(key, value) for key, value in arguments.items()}
    copies.remember()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        function(**own)
    finally:
        torch.set_num_threads(before)
    results = _results(own)
    if (at := copies.changed(results)) is not None:
        raise Stray(f"{name} wrote where it may not, into or beside its {str(at.dtype).removeprefix('torch.')}{list(at.shape)}")
    return [x.clone() for x in results]


def _number_of_rows(arguments: dict) -> int | None:
    """Of a function over rows."""
    first = next(iter(arguments.values()))
    if "parts" in arguments:
        return first.shape[1]
    return first.shape[0] * first.shape[1] if "logits" in arguments and first.dim() == 3 else None


def _by_row(x: Tensor, n: int) -> Tensor:
    """[N, ...] of a tensor whose first dimensions are the rows."""
    lead = next(k for k in range(1, x.dim() + 1) if math.prod(x.shape[:k]) == n)
    return x.reshape(n, *x.shape[lead:])


def _with_garbage(arguments: dict) -> dict:
    """NaN where nothing is to be read."""
    mask = arguments["mask"] if arguments.get("mask") is not None else arguments.get("valid")
    n, targets = _number_of_rows(arguments), arguments.get("targets")
    changed = dict(arguments)
    if n is None:
        if mask is not None:
            changed |= {k: x.masked_fill(~mask, math.nan) for k, x in arguments.items() if k in BY_TOKEN and isinstance(x, Tensor)}
        return changed
    skipped = torch.zeros(n, dtype=torch.bool) if mask is None else ~mask
    if targets is not None:
        changed["targets"] = targets.masked_fill(skipped.unsqueeze(-1), 10**9)
        skipped = skipped | (targets == arguments["ignore_index"]).all(-1)

    def unread(x: Tensor) -> Tensor:
        rows = _by_row(x, n).clone()
        rows[skipped] = math.nan
        return rows.reshape(x.shape)

    for key, value in arguments.items():
        if key == "parts":
            changed[key] = value.clone()
            changed[key][:, skipped] = math.nan
        elif key not in (*RESULTS, "mask", "targets", "keep"):
            changed[key] = tree_map_only(Tensor, unread, value)
    return changed


def _of_rows(arguments: dict, rows: list[int]) -> dict:
    """The call for these rows alone."""
    n, gradient = _number_of_rows(arguments), "grads" in arguments or "grad" in arguments

    def some(key, x):
        if key in ROWS or (key == "out" and gradient):
            return x.reshape(1, n, -1)[:, rows]
        return x[:, rows] if key == "parts" else _by_row(x, n)[rows]

    changed = {key: tree_map_only(Tensor, functools.partial(some, key), x) for key, x in arguments.items() if key != "keep"}
    if (keep := arguments.get("keep")) is not None:
        if keep.rows is not None:
            keep = keep._replace(rows=keep.rows[rows])
        elif keep.begin is not None:
            keep = keep._replace(begin=keep.begin[rows], end=keep.end[rows])
        elif keep.kind == SetKind.LISTS:
            keep = keep._replace(sets=keep.sets.view(n, -1)[rows].flatten())
        else:
            sets = keep.sets
            keep = keep._replace(sets=sets[rows] if keep.kind == SetKind.AT_LEAST else sets.reshape(1, n, -1)[:, rows])
        changed["keep"] = keep
    return changed


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return bool(((a.view(integers) == b.view(integers)) | (a.isnan() & b.isnan())).all())


def _aliased(arguments: dict, changed: dict) -> dict:
    """A result that takes the place of the logits still does."""
    logits, out = arguments.get("logits"), arguments.get("out")
    same = isinstance(out, Tensor) and logits is not None and out.data_ptr() == logits.data_ptr()
    return changed | {"out": changed["logits"]} if same else changed


def watch(name: str, function: Callable, r: random.Random, *args, **kwargs) -> None:
    """Calls it several times; the first results go to the caller."""
    arguments = inspect.signature(function).bind(*args, **kwargs).arguments
    at_end, gap = r.random() < 0.5, r.choice((0, 1, 3, 16))
    first = _call(name, function, arguments, 1, at_end=at_end, filler=0xA5, gap=gap)
    again = _aliased(arguments, _with_garbage(arguments))
    second = _call(name, function, again, 3, at_end=not at_end, filler=0xFF, gap=r.choice((0, 1, 5)))
    if not all(map(_same_bits, first, second)):
        raise Stray(f"{name} depends on what it is not to read, on memory or on threads")
    n = _number_of_rows(arguments)
    if n:
        rows = r.sample(range(n), r.randint(1, n))
        some = _aliased(arguments, _of_rows(arguments, rows))
        third = _call(name, function, some, 1, at_end=at_end, filler=0x5A, gap=gap)
        if not all(_same_bits(_by_row(a, n)[rows].reshape(b.shape), b) for a, b in zip(first, third, strict=True)):
            raise Stray(f"{name}: the bits of a row depend on other rows: {rows} of {n}")
    for to, x in zip(_results(arguments), first, strict=True):
        to.copy_(x)


@contextlib.contextmanager
def watched(r: random.Random) -> Iterator[set[str]]:
    """Calls of the kernels are watched; the names of those that were."""
    called = set()

    def watching(name: str) -> Callable:
        function = getattr(native, name)

        @torch.no_grad()
        def call(*args, **kwargs):
            called.add(name)
            watch(name, function, r, *args, **kwargs)

        return call

    with mock.patch.multiple(native, **{name: watching(name) for name in FUNCTIONS}):
        yield called
