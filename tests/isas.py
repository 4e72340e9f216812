"""Tests that run on every backend, the C++ kernels on each instruction set that this processor has."""

import pytest

from rlkern import backends

_native = backends.load("native")
_names = [] if isinstance(_native, Exception) else _native.isas()
# avx512_bf16 is avx512 but for how it rounds to bfloat16
ISAS = [f"native {isa}" for isa in _names if isa != "avx512" or "avx512_bf16" not in _names] or ["native"]
every_isa = pytest.mark.parametrize("backend", ["reference", *ISAS, "triton"], indirect=True)
