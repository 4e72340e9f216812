"""A fixed slice of what `make fuzz` runs, on each backend; and each part of the fuzz finds what it is for."""

import contextlib
import ctypes
import faulthandler
import os
import random
import signal
import sys

import pytest
import torch
from calls import Call

pytest.importorskip("rlkern.backends.native", reason="built without the CPU kernels")
from fuzz import byte_calls, kernels, properties, random_calls
from fuzz.byte_random import ByteRandom
from fuzz.parts import watch

import rlkern
from rlkern.backends import native

ON_THE_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels take no tensors of the CPU")


@pytest.mark.parametrize(
    ("backend", "start", "stop"), [("auto", 0, 400), ("reference", 400, 600), pytest.param("triton", 600, 640, marks=ON_THE_CPU)]
)
@pytest.mark.filterwarnings("ignore")
def test_random_calls(backend, start, stop):
    with rlkern.use_backend(backend):
        for index in range(start, stop):
            drawn = random_calls.draw(0, index)
            wrong = random_calls.run(drawn)
            assert wrong is None, f"{wrong} in {random_calls.describe(drawn)}: python tests/fuzz --seed 0 --only {index}"


def found(function):
    x = torch.ones(2, 3)
    return random_calls.run(random_calls.Drawn(Call("broken", function, {"x": x}, ("x",)), {"x": x}, True))


def test_it_finds():
    assert found(lambda x: x.square()) is None
    assert found(lambda x: (x - 1).log().relu() - (x - 1).log().relu() * torch.inf) == "NaN among the results"
    assert found(lambda x: (x - 1).sqrt() * 0) == "NaN in a gradient"
    assert found(lambda x: x @ x).startswith("RuntimeError: mat1 and mat2")


def test_bytes_choose():
    """In their order; behind their end the choices are still theirs."""
    r = ByteRandom(bytes([7, 255, 255, 3, 2]))
    assert [r.getrandbits(8), r.random(), r.choice("abcdefg"), r.choice("abcdefg")] == [7, 65535 / 65536, "d", "c"]
    behind = [ByteRandom(data).random() for data in (b"", b"", b"1")]
    assert behind[0] == behind[1] != behind[2]


def test_bytes_find_a_bare_error(monkeypatch):
    inputs = [bytes([1, 1, 1, i]) for i in range(20)]
    for part in ("arguments", "kernels"):
        assert [byte_calls.run(part, data) for data in inputs] == [None] * len(inputs)
    monkeypatch.setattr(native, "token_stats_forward", lambda *args, **kwargs: [][0])
    monkeypatch.setattr(native, "ratio_terms", lambda *args, **kwargs: [][0])
    for part in ("arguments", "kernels"):
        assert "IndexError: list index out of range" in [byte_calls.run(part, data) for data in inputs]


def wrong_sums(values, mask, cu_seqlens, out):
    native_sums(values, mask, cu_seqlens, out)
    out += 1e-3


native_sums = native.sequence_sums


def test_properties_find_a_wrong_sum(monkeypatch):
    monkeypatch.setattr(properties, "EXAMPLES", 20)
    monkeypatch.setattr(properties, "SHRINKING", 0.3)
    assert properties.examine("packed_sums", 0, 0) is None
    monkeypatch.setattr(native, "sequence_sums", wrong_sums)
    wrong = properties.examine("packed_sums", 0, 0)
    assert "values: Tensor-likes are not close" in wrong and "packed_sums(mask=None, lengths=[" in wrong and "reproduce_failure" in wrong
    line = next(line.strip() for line in wrong.splitlines() if line.strip().startswith("packed_sums("))
    with pytest.raises(AssertionError, match="not close"):
        eval(line, vars(properties))


def row_sums(logits, mask, out):
    """A kernel of rows [A, B, V] -> [N]."""
    sums = logits.sum(-1).flatten()
    out.copy_(torch.where(mask, sums, 0))


def reads_a_skipped_row(logits, mask, out):
    row_sums(logits, mask, out)
    out += 0 * logits.sum()


def mixes_rows(logits, mask, out):
    row_sums(logits, mask, out)
    out += 1e-3 * len(out)


def leaves_a_place(logits, mask, out):
    kept = out[0].clone()
    row_sums(logits, mask, out)
    out[0] = kept


def writes_an_argument(logits, mask, out):
    row_sums(logits, mask, out)
    logits[0, 0, 0] = 3


def writes_between_rows(logits, mask, out):
    row_sums(logits, mask, out)
    logits.as_strided((1,), (1,), logits.storage_offset() + logits.shape[-1])[0] = 3


def watch_kernel(function, seed=0):
    """Raises what a watched call of it shows."""
    x, mask = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1)), torch.tensor([1, 1, 0, 1, 1, 1]).bool()
    out = torch.empty(6)
    kernels.watch("row_sums", function, random.Random(seed), x, mask, out)
    return out


def test_watched_kernels():
    assert torch.equal(watch_kernel(row_sums) == 0, torch.tensor([0, 0, 1, 0, 0, 0]).bool())
    for function in (reads_a_skipped_row, leaves_a_place):
        with pytest.raises(kernels.Stray, match="depends on what it is not to read"):
            watch_kernel(function)
    with pytest.raises(kernels.Stray, match="the bits of a row depend on other rows"):
        watch_kernel(mixes_rows)
    for function in (writes_an_argument, writes_between_rows):
        with pytest.raises(kernels.Stray, match=r"wrote where it may not, into or beside its float32\[2, 3, 5\]"):
            watch_kernel(function, seed=3)


def reads_behind(logits, mask, out):
    row_sums(logits, mask, out)
    ctypes.string_at(out.data_ptr() + out.nbytes, 1)


def reads_before(logits, mask, out):
    row_sums(logits, mask, out)
    ctypes.string_at(logits.data_ptr() - 1, 1)


@pytest.mark.parametrize("function", [row_sums, reads_behind, reads_before])
def test_a_stray_read_ends_the_process(function):
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        with contextlib.suppress(BaseException):
            watch_kernel(function)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status == (0 if function is row_sums else signal.SIGSEGV)


def test_a_crash_is_one_more_finding():
    """The part goes on after it."""
    script = "import os, sys; n = int(sys.argv[1]); print('call', n); print('covers', f'f{n}'); print('found here what it is') if n else os.abort()"
    told = []
    outcome = watch("random", lambda calls, end: [sys.executable, "-uc", script, str(calls)], 30, lambda *what: told.append(what))
    assert told == [("0", "the process died with -6"), ("here", "what it is")]
    assert (outcome.calls, outcome.covered, outcome.findings) == (2, {"f0", "f1"}, ["0", "here"])
