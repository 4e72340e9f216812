"""What hypothesis draws for properties.py: few rows of logits, of awkward sizes, and options."""

import math

import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
VOCABS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65, 129)
LEADS = ((3,), (1,), (0,), (1, 2), (2, 3), (2, 1, 2), (0, 2))
LAYOUTS = ("contiguous", "padded", "transposed", "expanded")
USUAL = st.floats(-30, 30, width=16)
ODD = st.sampled_from((-math.inf, 0.0, -0.0, 1.0, 6e4, -6e4, 1e-7, 88.0, -88.0))


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers elsewhere in memory; "expanded": the first row's everywhere."""
    if layout == "padded":
        return torch.cat([x, torch.full_like(x, math.nan)[..., :3]], -1)[..., : x.shape[-1]]
    if layout == "transposed" and x.dim() > 2:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "expanded" and x.shape[0]:
        return x[:1].expand(x.shape)
    return x


@st.composite
def rows(draw, lead, vocab, dtype, *, infinite: bool = True, odd: bool = True) -> Tensor:
    """Random numbers, and over them some that hypothesis chooses one by one. A column stays finite."""
    shape = (*lead, vocab)
    g = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    x = torch.randn(shape, generator=g, dtype=torch.float64) * draw(st.sampled_from((0.0, 0.01, 1.0, 5.0)))
    chosen = torch.from_numpy(draw(arrays.arrays("float64", shape, elements=USUAL | ODD if odd else USUAL, fill=st.just(math.nan))))
    x = torch.where(chosen.isnan(), x, chosen)
    if not infinite:
        x = x.clamp(min=-6e4)
    x[..., :1] = x[..., :1].clamp(min=-30, max=30)
    return (x + 0.0).to(dtype)


def integers(shape, low: int, high: int):
    """int64 in [low, high)."""
    return arrays.arrays("int64", shape, elements=st.integers(low, high - 1)).map(torch.from_numpy)


def masks(shape):
    return st.none() | arrays.arrays("bool", shape, elements=st.booleans(), fill=st.just(True)).map(torch.from_numpy)


def numbers(shape, low: float, high: float, dtype=torch.float32):
    drawn = arrays.arrays("float64", shape, elements=st.floats(low, high, width=16), fill=st.nothing())
    return drawn.map(lambda x: torch.from_numpy(x).to(dtype))


def temperatures(lead, dtype):
    per_row = numbers(lead, 0.25, 4.0, torch.float64 if dtype == torch.float64 else torch.float32)
    return st.sampled_from((1.0, 0.5, 1.3, 4.0)) | per_row


def _code(x) -> str:
    if isinstance(x, Tensor):
        return f"tensor({x.tolist()}, dtype={x.dtype}).view({tuple(x.shape)})"
    return repr(x)


def code(arguments: dict) -> str:
    """Keyword arguments as Python that makes them again, tensors last."""
    inputs = sorted(arguments.items(), key=lambda item: isinstance(item[1], Tensor))
    return ", ".join(f"{name}={_code(x)}" for name, x in inputs)
