"""Seconds and peak memory of a piece of code, whatever library runs in it."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

from rlkern.backends import gradient_memory


def _status_bytes(key: str) -> int:
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def _reset_peak() -> int | None:
    """Resident bytes now, with the kernel's high-water mark set back to that; None off Linux."""
    gradient_memory.release()  # the memory of the last gradient, kept for the next, counts as that gradient's
    try:
        with open("/proc/self/clear_refs", "w") as control:
            control.write("5")
        return _status_bytes("VmRSS")
    except OSError:
        return None


@dataclass
class Meter:
    """What `with meter.measured():` blocks cost: time and memory of the first, then time or memory in turns.

    In turns, because a block whose memory is measured must start without memory kept from before.
    Memory is the highest rise of the process's resident set in a block (Linux: VmHWM, reset before each).
    The kernel counts pages, so it sees the temporaries of any library.
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
