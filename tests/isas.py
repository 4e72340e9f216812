"""Tests that run on every backend, the C++ kernels on each instruction set that this processor has."""

import pytest

from rlkern import backends

_native = backends._load("native")
ISAS = ["native"] if isinstance(_native, Exception) else [f"native {isa}" for isa in _native.isas()]
every_isa = pytest.mark.parametrize("backend", ["reference", *ISAS, "triton"], indirect=True)
