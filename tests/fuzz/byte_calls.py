"""Calls whose every choice is made by bytes, for atheris to vary: of the argument checks, and of the kernels.

wrong = run("kernels", data)  # what is wrong with it, or None
"""

import functools
import random
from collections.abc import Callable

import torch
from calls import Call, valid_calls
from torch import Tensor
from torch.nn import functional as F

from rlkern.backends import native

from . import changes, kernels, random_calls
from .byte_random import ByteRandom

WHOLE = {"keep", "packed", "hidden", "outside"}  # options of rows that are not cut
SEGMENTED = 32  # columns of two parts are a multiple
VOCABS = (*random_calls.VOCABS, 8, 15, 64, 130, 257)
LONGEST = {"arguments": 256, "kernels": 512}


@functools.cache
def _calls(vocab: int, **size) -> list[Call]:
    calls = valid_calls(vocab=vocab, **size)
    return calls + [in_segments(call, vocab) for call in calls if "segments" in call.parameters and not WHOLE & call.arguments.keys()]


def in_segments(call: Call, vocab: int) -> Call:
    """The same, of rows that are put together of two parts."""
    added = -vocab % SEGMENTED
    rows = {name: F.pad(x, (0, added)) for name, x in call.arguments.items() if name in changes.ROWS}
    options = {"segments": 2, "vocab_size": vocab} | {name: vocab for name in ("vocab",) if name in call.arguments}
    return Call(f"{call.name} in segments", call.function, call.arguments | rows | options, call.wrt)


def raw_bits(r: random.Random, arguments: dict) -> dict:
    """Bytes as numbers in rows of logits: NaN of all kinds, infinities, numbers too small to be normal."""
    changed = dict(arguments)
    for name in changes.ROWS & arguments.keys():
        x = arguments[name]
        if not isinstance(x, Tensor) or not x.dtype.is_floating_point or x.numel() == 0:
            continue
        some = torch.frombuffer(bytearray(r.randbytes(r.randint(1, 16) * x.element_size())), dtype=x.dtype)
        g = torch.Generator().manual_seed(r.getrandbits(16))
        picked = some[torch.randint(0, len(some), x.shape, generator=g)]
        changed[name] = torch.where(torch.rand(x.shape, generator=g) < r.choice((0.01, 0.3, 1.0)), picked, x)
    return changed


CHANGES = {
    "arguments": changes.CHANGES,
    "kernels": {
        changes.dtypes: 0.5,
        changes.values: 0.3,
        changes.options: 0.3,
        changes.strides: 0.3,
        changes.garbage: 0.3,
        changes.packs: 0.1,
        raw_bits: 0.5,
    },
}


def draw(part: str, data: bytes) -> tuple[random_calls.Drawn, random.Random]:
    r = ByteRandom(data)
    vocabs = VOCABS if part == "kernels" else random_calls.VOCABS
    size = dict(batch=r.choice(random_calls.BATCHES), length=r.choice(random_calls.LENGTHS), vocab=r.choice(vocabs))
    call = r.choice(_calls(**size))
    return random_calls.vary(r, call, CHANGES[part]), r


def run(part: str, data: bytes, covers: Callable[[str], None] = lambda name: None, loud: bool = False) -> str | None:
    """What is wrong with the call of these bytes, or None. `covers` hears of what it reached."""
    if part == "arguments":
        drawn, _ = draw(part, data)
        covers(drawn.call.name)
        return random_calls.run(drawn, loud)
    drawn, r = draw(part, data)
    before = native.isa()
    native.use_isa(r.choice(native.isas()))
    try:
        with kernels.watched(r) as called:
            return random_calls.run(drawn._replace(legal=False), loud)
    finally:
        for name in called:
            covers(f"{name} {native.isa()}")
        native.use_isa(before)


def everything(part: str) -> int:
    """How much there is to cover."""
    return len({call.name for call in _calls(1, batch=1, length=1)}) if part == "arguments" else len(kernels.FUNCTIONS) * len(native.isas())
