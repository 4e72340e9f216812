"""`make soak` sees what grows, what differs and what fails; and nothing where nothing is wrong."""

import pytest
import soak
import torch
from calls import Call
from fuzz.random_calls import Drawn

import rlkern

X = torch.linspace(-3, 3, 24).view(2, 3, 4)


def samples(**changes):
    """Twenty, an hour apart, of a process whose memory comes and goes."""
    flat = [soak.Sample(3600.0 * i, 300 + 5 * (i % 3), 50_000 + 100 * (i % 2), 7, 12) for i in range(20)]
    return [s._replace(**{name: change(i, getattr(s, name)) for name, change in changes.items()}) for i, s in enumerate(flat)]


@pytest.mark.parametrize(
    ("name", "grows", "found"),
    [
        ("megabytes", lambda i, x: x + 0.3 * i, None),
        ("megabytes", lambda i, x: x + 90 * (i == 11), None),  # one large sample is no trend
        ("megabytes", lambda i, x: x + i, "megabytes grow by"),
        ("objects", lambda i, x: x + 200 * i, "objects grow by"),
        ("files", lambda i, x: x + i // 2, "files grow by"),
        ("threads", lambda i, x: x + i % 4, None),
        ("threads", lambda i, x: x + i, "threads grow by"),
    ],
)
def test_growth(name, grows, found):
    assert soak.growth(samples()) == []
    what = soak.growth(samples(**{name: grows}))
    assert len(what) == (found is not None) and (found is None or what[0].startswith(found))


def fixed(function):
    return Call("fixed", function, {"x": X}, ("x",))


def run(monkeypatch, function, seconds):
    """A short run in which all calls are of this function."""
    monkeypatch.setattr(soak, "REPEATED", 0.5)
    monkeypatch.setattr(soak, "legal_calls", lambda r: iter(lambda: Drawn(call, call.arguments, True), None))
    call = fixed(function)
    found = soak.Soak([call])
    found.run(seconds, threads=2)
    assert found.calls > 50 and 0 < found.repeats < found.calls and "repeats compared" in found.summary(2)
    return found


def test_a_run(monkeypatch):
    assert run(monkeypatch, lambda x: rlkern.entropy_from_logits(x), 1.0).findings() == []


def test_it_finds_a_leak(monkeypatch):
    kept = []

    def leaks(x):
        if len(kept) < 2000:  # at most 200 MB
            kept.append(torch.ones(25_000))
        return x.square()

    assert any(what.startswith("megabytes grow by") for what in run(monkeypatch, leaks, 1.0).findings())


def test_it_finds_a_difference_and_a_failure(monkeypatch):
    calls = iter(range(10**9))

    def differs(x):
        n = next(calls)
        if n == 20:
            raise RuntimeError("no more")
        return x * (1 + 2**-23 * (n == 30 or n > 40))

    found = run(monkeypatch, differs, 0.5)
    assert found.failures == ["fixed: RuntimeError: no more"]
    assert set(found.differences) <= {f"fixed: tensor {i} of the results and gradients is not what it was first" for i in (0, 1)} != set()
    assert len(found.findings()) >= 2
