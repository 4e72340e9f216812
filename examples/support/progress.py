"""A progress line: redrawn in place on a terminal, a line every tenth of the way elsewhere (logs, CI)."""

from __future__ import annotations

import sys
import time


class Progress:
    def __init__(self, title: str, total: int):
        self.title, self.total, self.start, self.printed = title, total, time.perf_counter(), -1
        self.terminal = sys.stdout.isatty()

    def update(self, done: int, note: str = "") -> None:
        """`done` of `total` steps are finished; `note` is shown behind the bar."""
        seconds = time.perf_counter() - self.start
        left = seconds / max(done, 1) * (self.total - done)
        bar = ("#" * (24 * done // self.total)).ljust(24, ".")
        line = f"{self.title:<26} [{bar}] {done:>3}/{self.total} {seconds:5.1f} s, {left:4.1f} s left  {note}"
        if self.terminal:
            print(f"\r{line:<110}", end="\n" if done == self.total else "", flush=True)
        elif 10 * done // self.total > self.printed:
            self.printed = 10 * done // self.total
            print(line, flush=True)
