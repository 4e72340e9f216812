"""Seconds and peak memory of a piece of code, whatever library runs in it."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

from rlkern.backends import gradient_memory as spare


def _status_bytes(key: str) -> int:
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def _reset_peak() -> int | None:
    """Resident bytes now, with the kernel's high-water mark set back to that; None where the system has no such thing (it takes Linux)."""
    spare.release()  # the memory of the last gradient, kept for the next, counts as that gradient's
    try:
        with open("/proc/self/clear_refs", "w") as control:
            control.write("5")
        return _status_bytes("VmRSS")
    except OSError:
        return None


@dataclass
class Meter:
    """Collects what `with meter.measured():` blocks cost: the first one's time and memory, then in turns the time of one and the memory of the next.

    In turns, because a block whose memory is measured has to start without the memory that a training step finds kept from the step before.
    Memory is the rise of the process's resident set above what it was when the block began, at its highest (Linux: VmHWM, reset before
    each block). The kernel counts pages, so it sees the temporaries of any library: PyTorch's, C++'s and Python's alike.
    """

    seconds: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)
    _blocks: int = 0

    @contextmanager
    def measured(self):
        counts_memory = self._blocks % 2 == 0
        before = _reset_peak() if counts_memory else None
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        if not counts_memory or self._blocks == 0:
            self.seconds.append(seconds)
        self._blocks += 1
        if before is not None:
            self.peak_bytes.append(max(0, _status_bytes("VmHWM") - before))

    @property
    def median_seconds(self) -> float:
        return median(self.seconds)

    @property
    def median_peak_mb(self) -> float | None:
        return median(self.peak_bytes) / 1e6 if self.peak_bytes else None
