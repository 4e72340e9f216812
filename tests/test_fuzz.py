"""A fixed slice of what `make fuzz` runs, on each backend; and the fuzz finds what it is for."""

import fuzz
import pytest
import torch
from calls import CALLS, Call

import rlkern


@pytest.mark.parametrize(("backend", "start", "stop"), [("auto", 0, 400), ("reference", 400, 600), ("triton", 600, 640)])
@pytest.mark.filterwarnings("ignore")
def test_random_calls(backend, start, stop):
    with rlkern.use_backend(backend):
        for index, wrong in fuzz.findings(0, start, stop):
            raise AssertionError(f"{wrong} in {fuzz.describe(0, index)}: python tests/fuzz.py --seed 0 --only {index}")


def found(monkeypatch, function):
    x = torch.ones(2, 3)
    monkeypatch.setattr(fuzz, "draw", lambda seed, index: (Call("broken", function, {"x": x}, ("x",)), {"x": x}, True))
    return fuzz.run(0, 0)


def test_it_finds(monkeypatch):
    assert found(monkeypatch, lambda x: x.square()) is None
    assert found(monkeypatch, lambda x: (x - 1).log().relu() - (x - 1).log().relu() * torch.inf) == "NaN among the results"
    assert found(monkeypatch, lambda x: (x - 1).sqrt() * 0) == "NaN in a gradient"
    assert found(monkeypatch, lambda x: x @ x).startswith("RuntimeError: mat1 and mat2")
    assert found(monkeypatch, lambda x: x / "3").startswith("TypeError: unsupported operand")
    assert found(monkeypatch, lambda x: {}[x]).startswith("KeyError")


def test_changes_reach_every_function():
    drawn = {fuzz.draw(0, index)[0].function for index in range(1500)}
    assert {call.function for call in CALLS} <= drawn
