"""Sums of floats without rounding: the same bits in any order, however the terms are cut into parts.

A float32 is an integer times 2^-149, a float64 one times 2^-1074. In digits of 32 bits, each in an int64, up
to 2^30 such integers add up without a carry. Only their total is rounded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

_BITS = 32  # of a digit
_MASK = (1 << _BITS) - 1
_LANES = 256  # counters for each bin, so that few threads of a GPU wait for the same one


class _Format(NamedTuple):
    integer: torch.dtype
    fraction: int  # bits of the fraction
    exponents: int  # the largest exponent field, that of infinities
    unit: int  # the smallest number is 2^-unit
    digits: int  # of a sum


_FORMATS = {torch.float32: _Format(torch.int32, 23, 0xFF, 149, 9), torch.float64: _Format(torch.int64, 52, 0x7FF, 1074, 67)}


def digit_count(dtype: torch.dtype) -> int:
    """How many digits a sum of float32 or float64 has."""
    return _FORMATS[dtype].digits


def binned(bins: Tensor, values: Tensor, count: int) -> Tensor:
    """The sum of the values of each bin, [count] int64. bins, in [0, count), and values are int64 [N]."""
    lane = torch.arange(len(bins), device=bins.device) % _LANES
    return values.new_zeros(_LANES * count).scatter_add_(0, lane * count + bins, values).view(_LANES, count).sum(0)


def exact_digits(x: Tensor) -> Tensor:
    """The sum of x in digits, lowest first: int64 [9] of float32, [67] of float64. They may be added up.

    x: [N] of finite numbers, N at most 2^30; the sums that are added up have as many terms between them.
    """
    f = _FORMATS[x.dtype]
    bits = x.view(f.integer).long()
    exponent = (bits >> f.fraction) & f.exponents
    integer = (bits & ((1 << f.fraction) - 1)) | ((exponent > 0).long() << f.fraction)
    places = (exponent - 1).clamp(min=0)  # x is integer * 2^places units
    sign = torch.where(bits < 0, -1, 1)
    digits = x.new_zeros(f.digits, dtype=torch.int64)
    for part in range(0, f.fraction, _BITS):  # 32 bits of the integer at a time
        shifted = ((integer >> part) & _MASK) << (places & (_BITS - 1))
        digit = (places + part) >> 5
        for i, value in enumerate((shifted & _MASK, shifted >> _BITS)):
            digits = digits + binned(digit + i, sign * value, f.digits)
    return digits


def rounded(digits: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that digits [..., D] of `exact_digits` stand for, rounded once: [...] float64.

    dtype: that of the terms.
    """
    at = torch.arange(digits.shape[-1] + 4, device=digits.device)
    d = pad(digits, (3, 1))  # so that there are three below each, and one for the last carry
    for _ in range(2):  # to digits of at most 2^31 + 1 in size, so the first that is not 0 has the sign of all
        carry = (d + (1 << (_BITS - 1))) >> _BITS
        d = d - (carry << _BITS) + pad(carry[..., :-1], (1, 0))
    top = torch.where(d != 0, at, 3).amax(-1, keepdim=True)
    sign = d.gather(-1, top).sign()
    high, middle, low = (sign * d.gather(-1, top - i) for i in range(3))
    rest = torch.where((at < top - 2) & (d != 0), at, 0).amax(-1, keepdim=True)
    rest = sign * d.gather(-1, rest).sign()  # of what is below the three, where only the sign matters
    low = low - (rest < 0).long()
    middle = middle + (low >> _BITS)
    high, middle, low = high + (middle >> _BITS), middle & _MASK, low & _MASK
    # The first 62 bits, and whether there are others: float64 rounds these as it would round all.
    length = torch.where(high > 0, (high.double().view(torch.int64) >> 52) - 1022, 0)
    below = (middle << 30) | (low >> 2)
    kept = (high << (62 - length)) | (below >> length)
    lost = (below - ((below >> length) << length)) | (low & 3) | rest
    kept = kept | (lost != 0).long()
    exponent = length - 62 + _BITS * (top - 3) - _FORMATS[dtype].unit
    half = exponent >> 1  # 2^exponent itself may be out of range
    return ((sign * kept).double() * _power_of_2(half) * _power_of_2(exponent - half)).squeeze(-1)


def _power_of_2(exponent: Tensor) -> Tensor:
    """float64, for exponents in [-1022, 1023]."""
    return ((exponent + 1023) << 52).view(torch.float64)
