"""The numbers of rlkern/backends/contract.py, in C++ and in Triton."""

import importlib

import pytest

from rlkern.backends import contract

NAMES = ("State", "KeptKind", "SetKind", "Outside", "PairState", "PairKind", "KLKind")
CODES = {name: {k: v for k, v in vars(getattr(contract, name)).items() if k.isupper()} for name in NAMES}
CODES["SUMMARY"] = {name: column for column, name in enumerate(contract.SUMMARY)}
TRITON = {
    "State": "STATE_",
    "KeptKind": "KEPT_",
    "SetKind": "SET_",
    "Outside": "OUTSIDE_",
    "PairState": "PAIR_",
    "PairKind": "PAIR_KIND_",
    "KLKind": "KL_",
    "SUMMARY": "SUMMARY_",
}


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


@pytest.mark.parametrize("name", CODES)
def test_codes_in_triton(triton, name):
    prefix = TRITON[name]
    prefixes = {key: max((p for p in TRITON.values() if key.startswith(p)), key=len, default="") for key in triton}
    found = {key.removeprefix(prefix): code for key, code in triton.items() if prefixes[key] == prefix}
    assert found == {key.upper(): code for key, code in CODES[name].items()}


def test_columns_of_a_part_in_triton(triton):
    found = {key.removeprefix("PART_"): column for key, column in triton.items() if key.startswith("PART_")}
    assert found == {key: column for key, column in vars(contract.PairPart).items() if key.isupper() and key != "WIDTH"}


def test_the_largest_exponent(cpp, triton):
    assert cpp["LARGEST_EXPONENT"] == triton["LARGEST_EXPONENT"] == contract.LARGEST_EXPONENT


def test_the_unit_of_masses():
    sampler = pytest.importorskip("rlkern.triton_kernels.sampler")
    sizes = [1, 2, 2048, 4096, 4097, 32_768, 32_769, 151_936, 262_144, 262_145, 10**7]
    assert [sampler.mass_bits(n) for n in sizes] == [contract.mass_bits(n) for n in sizes]
    assert all(n << contract.mass_bits(n) <= 1 << 62 for n in sizes)


def test_the_target_in_other_columns(cpp, triton):
    assert cpp["ELSEWHERE"] == triton["ELSEWHERE"] == contract.ELSEWHERE
