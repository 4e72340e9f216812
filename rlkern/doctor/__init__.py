"""`python -m rlkern doctor`: whether rlkern works on this machine, and what to do where it does not."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator

import torch

from .. import backends
from . import speed
from .findings import Finding, findings
from .machine import facts
from .self_test import Verdict, instruction_set, self_test

REPORT = "export RLKERN_BACKEND=reference    # computes in plain PyTorch; report this, with all of this output"


def _verdicts() -> Iterator[tuple[str, Verdict | str]]:
    """(backend, its self-test, or why it does not run)"""
    native = backends.load("native")
    if isinstance(native, Exception):
        yield "native", "not here"
    else:
        for isa in native.isas():
            with instruction_set(isa):
                yield f"native {isa}", self_test("native")
    if isinstance(backends.load("triton"), Exception):
        yield "triton", "not here"
    elif torch.cuda.is_available():
        yield "triton", self_test("triton", "cuda")
    else:
        yield "triton", "not run: there is no GPU"
    yield "reference", self_test("reference")


def _line(name: str, text: str) -> None:
    print(f"  {name:<19} {text}", flush=True)


def _self_tests() -> Iterator[Finding]:
    print("\nself-test against float64, results and gradients")
    for name, verdict in _verdicts():
        if isinstance(verdict, str):
            _line(name, verdict)
            continue
        result = f"{len(verdict.wrong)} of {verdict.checks} checks are WRONG" if verdict.wrong else f"{verdict.checks} checks passed"
        _line(name, f"{result}, {verdict.seconds:.1f} s")
        for line in verdict.wrong:
            yield Finding(True, f"{name}: {line}", REPORT)


def _speed(seconds: float) -> Iterator[Finding]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("\nlog-probability and entropy, forward and backward, beside eager PyTorch")
    for dtype in (torch.float32, torch.bfloat16):
        try:
            with backends.use_backend("auto"):
                found = speed.compare(dtype, device, seconds / 2)
        except torch.OutOfMemoryError:
            _line(str(dtype).removeprefix("torch."), "not measured: the card has no room")
            continue
        ratio = found.eager_ms / found.rlkern_ms
        rows, vocab = found.shape
        _line(
            f"{str(dtype).removeprefix('torch.')} {rows} x {vocab}",
            f"{found.eager_ms:.1f} ms, rlkern {found.rlkern_ms:.1f} ms: {ratio:.1f} times as fast",
        )
        if not found.agree:
            yield Finding(True, f"rlkern and eager PyTorch compute different numbers in {dtype}, {rows} x {vocab}", REPORT)
        if ratio < 1:
            yield Finding(False, f"rlkern is slower than eager PyTorch in {dtype}", "run this alone on the machine, then report it")


def doctor(seconds: float = speed.SECONDS) -> int:
    """Prints the report, whole: a bug report should hold it. Returns 1 if something is wrong, else 0.

    seconds: for the comparison of speed; 0 leaves it out.
    """
    start = time.perf_counter()
    for name, value in facts():
        print(f"{name:<10} {value}", flush=True)
    found = list(findings())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they would say is among the findings
        found += _self_tests()
        if seconds:
            found += _speed(seconds)
    print()
    for finding in sorted(found, key=lambda finding: not finding.wrong):
        print(f"{'WRONG' if finding.wrong else 'note'}: {finding.what}\n    {finding.mend}")
    wrong = sum(finding.wrong for finding in found)
    total = f"{wrong} {'thing is' if wrong == 1 else 'things are'} wrong" if wrong else "rlkern works on this machine"
    print(f"{total} ({time.perf_counter() - start:.0f} s)")
    return 1 if wrong else 0
