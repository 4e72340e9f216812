"""The parts of the fuzz in child processes: a crash is one more finding and not the end.

A child says on its standard output, one line each: `call` for every call that it begins, with what repeats
it if that is known beforehand; `covers NAME`; `found WHERE WHAT`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

CRASHES = 10  # of one part, then it ends
OVERDUE = 180  # seconds behind its time a child is killed: a call hangs


def say(*words: object) -> None:
    print(*words, flush=True)


@dataclass
class Outcome:
    """What came of a part."""

    name: str
    calls: int = 0
    covered: set[str] = field(default_factory=set)
    findings: list[str] = field(default_factory=list)
    seconds: float = 0.0


def watch(
    name: str,
    command: Callable[[int, float], Sequence[str]],
    seconds: float,
    told: Callable[[str, str], None],
    crashed: Callable[[str], str] = lambda last: last,
    log: Path | None = None,
) -> Outcome:
    """Runs `command(calls so far, when to end)` until a child ends by itself or the time is over.

    Args:
        told: hears of a finding: where it is, and what.
        crashed: from what the last `call` said to where the crash is.
        log: what children write to their standard error.
    """
    outcome, start, last, crashes = Outcome(name), time.monotonic(), "", 0

    def found(where: str, what: str) -> None:
        if where not in outcome.findings:
            outcome.findings.append(where)
            told(where, what)

    with open(log or os.devnull, "w") as errors:
        while time.monotonic() < start + seconds and crashes < CRASHES:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            child = subprocess.Popen(command(outcome.calls, start + seconds), stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
            overdue = threading.Timer(start + seconds + OVERDUE - time.monotonic(), child.kill)
            overdue.start()
            for line in child.stdout:
                word, _, rest = line.rstrip("\n").partition(" ")
                if word == "call":
                    outcome.calls, last = outcome.calls + 1, rest
                elif word == "covers":
                    outcome.covered.add(rest)
                elif word == "found":
                    found(*rest.split(" ", 1))
            status = child.wait()
            overdue.cancel()
            if status == 0:
                break
            crashes += 1
            found(crashed(last), f"the process died with {status}")
    outcome.seconds = time.monotonic() - start
    return outcome


def python(*arguments: object) -> list[str]:
    return [sys.executable, str(Path(__file__).parent), *map(str, arguments)]
