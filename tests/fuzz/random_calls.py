"""Random calls of the public functions, to find bare errors, crashes and silent NaN.

Each starts from a valid call (tests/calls.py) of random size, and changes dtypes, strides, devices, values,
options. What may come of it: results, or a ValueError, TypeError or IndexError that a raise statement of
rlkern's made. Where all numbers are finite and legal, no result and no gradient may be NaN.
"""

import functools
import linecache
import pathlib
import random
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

import torch
from calls import Call, valid_calls
from loss_battery import tensors_of
from torch import Tensor

import rlkern

from .changes import CHANGES, LEGAL
from .parts import say

BLOCK = 40  # calls from one set of valid ones
BATCHES, LENGTHS, VOCABS = (0, 1, 2, 4, 5), (1, 2, 3, 6, 17), (1, 2, 7, 33)

_valid_calls = functools.lru_cache(maxsize=1)(valid_calls)


class Drawn(NamedTuple):
    call: Call
    arguments: dict
    legal: bool


def vary(r: random.Random, call: Call, changes: dict[Callable, float]) -> Drawn:
    """The call with some of the changes, each made with its chance."""
    arguments, legal = call.arguments, True
    for change, chance in changes.items():
        if r.random() < chance:
            arguments = change(r, arguments)
            legal = legal and change in LEGAL
    return Drawn(call, arguments, legal)


def draw(seed: int, index: int) -> Drawn:
    block = random.Random(f"{seed} {index // BLOCK}")
    size = dict(batch=block.choice(BATCHES), length=block.choice(LENGTHS), vocab=block.choice(VOCABS))
    r = random.Random(f"{seed} {index} call")
    return vary(r, r.choice(_valid_calls(**size, seed=block.randrange(2**31))), CHANGES)


def bare(error: Exception) -> bool:
    """Whether anything but a raise statement of rlkern's made it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    inside = pathlib.Path(frame.filename).is_relative_to(pathlib.Path(rlkern.__file__).parent)
    ours = inside and linecache.getline(frame.filename, frame.lineno).strip().startswith("raise")
    from_native = isinstance(error, IndexError) and str(error).startswith("target ")
    return not (isinstance(error, (ValueError, TypeError, IndexError)) and (ours or from_native))


def _has_nan(tensors) -> bool:
    return any(t is not None and t.dtype.is_floating_point and not t.is_meta and t.isnan().any() for t in tensors)


def run(drawn: Drawn, loud: bool = False) -> str | None:
    """What is wrong with this call, or None."""
    call, arguments, legal = drawn
    leaves = dict(arguments)
    for name in call.wrt:
        if isinstance(arguments[name], Tensor) and arguments[name].dtype.is_floating_point:
            leaves[name] = arguments[name].detach().requires_grad_()
    try:
        outputs = [t for t in tensors_of(call.function(**leaves)) if not any(t is given for given in leaves.values())]
        differentiable = [t.sum() for t in outputs if t.requires_grad]
        wrt = [leaves[name] for name in call.wrt if isinstance(leaves[name], Tensor) and leaves[name].requires_grad]
        gradients = torch.autograd.grad(differentiable, wrt, allow_unused=True) if differentiable else []
    except Exception as error:
        if loud:
            traceback.print_exc()
        return f"{type(error).__name__}: {str(error)[:300]}" if bare(error) else None
    if not legal:
        return None
    if _has_nan(outputs):
        return "NaN among the results"
    infinite = any(t.isinf().any() for t in outputs if not t.is_meta)
    return "NaN in a gradient" if _has_nan(gradients) and not infinite else None


def describe(drawn: Drawn) -> str:
    call, arguments, legal = drawn

    def short(x):
        if not isinstance(x, Tensor):
            return repr(x)[:60]
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}{'' if x.is_contiguous() else ' strided'}{' meta' if x.is_meta else ''}"

    return f"{call.name}({', '.join(f'{name}={short(x)}' for name, x in arguments.items())}){'' if legal else ' changed freely'}"


def search(seed: int, first: int, calls: int, end: float) -> None:
    """Says what it finds, from call `first` on: all of `calls`, or until `end` of
    time.monotonic()."""
    covered = set()
    for index in range(first, calls):
        if time.monotonic() > end:
            break
        say("call", index)
        drawn = draw(seed, index)
        if drawn.call.name not in covered:
            covered.add(drawn.call.name)
            say("covers", drawn.call.name)
        if wrong := run(drawn):
            say("found", index, wrong.replace("\n", " "), "in", describe(drawn))
