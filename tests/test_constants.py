"""The numbers of rlkern/backends/contract.py, in C++ and in Triton."""

import importlib

import pytest

from rlkern.backends import contract

CODES = {name: {k: v for k, v in vars(getattr(contract, name)).items() if k.isupper()} for name in ("State", "KeptKind", "KLKind")}
CODES["SUMMARY"] = {name: column for column, name in enumerate(contract.SUMMARY)}
TRITON = {"State": "STATE_", "KeptKind": "KEPT_", "KLKind": "KL_", "SUMMARY": "SUMMARY_"}
PAIRS = {"PairState": "PAIR_", "PairKind": "PAIR_KIND_"}


@pytest.fixture
def cpp():
    return pytest.importorskip("rlkern._cpu", reason="built without the CPU kernels").constants


@pytest.fixture
def triton():
    pytest.importorskip("triton")
    found = vars(importlib.import_module("rlkern.triton_kernels.constants"))
    return {name: value.value for name, value in found.items() if name.isupper()}


@pytest.mark.parametrize("name", CODES)
def test_codes_in_cpp(cpp, name):
    assert {key: code for code, key in enumerate(cpp[name])} == CODES[name]


def with_prefix(constants, prefix):
    """Without those of a longer prefix."""
    longer = tuple(p for p in (*TRITON.values(), *PAIRS.values()) if p.startswith(prefix) and p != prefix)
    return {key.removeprefix(prefix): code for key, code in constants.items() if key.startswith(prefix) and not key.startswith(longer)}


@pytest.mark.parametrize("name", PAIRS)
def test_codes_of_pairs_in_triton(triton, name):
    assert with_prefix(triton, PAIRS[name]) == {k: v for k, v in vars(getattr(contract, name)).items() if k.isupper()}


@pytest.mark.parametrize("name", CODES)
def test_codes_in_triton(triton, name):
    found = with_prefix(triton, TRITON[name])
    assert found == {key.upper(): code for key, code in CODES[name].items()}


def test_the_largest_exponent(cpp, triton):
    assert cpp["LARGEST_EXPONENT"] == triton["LARGEST_EXPONENT"] == contract.LARGEST_EXPONENT
