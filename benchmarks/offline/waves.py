"""What splitting a row over several programs is worth, by the number of rows: a simulated forward.

Programs start in order while there is room for them. Each waits for its first tile, then takes its tiles no
faster than a lone program does them, and all together no faster than memory; starts and speeds vary, or all
would end at once. Figures of no data sheet are guesses: they decide how small a batch gains, not whether
a large one loses.
"""

import heapq
import math

from .model import DEVICES
from .report import Row

LAUNCH = 3e-6  # seconds, of a kernel
MERGE = 2.5e-6  # of the second kernel
LATENCY = 1e-6  # until a program has its first tile
ISSUE = 2.3  # clocks between two instructions of a warp that has a scheduler to itself
REDUCTION = 150  # clocks a tile, for the maximum of all warps
ATTAINED = 0.94  # share of the sheet's bandwidth
RISE = 0.6  # instructions that a new maximum adds to a tile, relative to the others

VOCABULARIES = (32_000, 151_936, 262_144)
ROWS = (1, 16, 64, 128, 512, 1024, 8192)
SPLITS = (1, 2, 4, 8)


def forward_time(row: Row, rows: int, vocab: int, splits: int) -> float:
    """Predicted seconds for `rows` rows, `splits` programs each; `row`: a forward kernel's in the report."""
    device = next(d for d in DEVICES.values() if d.arch == row.arch)
    tile_bytes = row.block * row.case.element_size
    tiles = math.ceil(vocab / row.block)
    share = math.ceil(tiles / splits)
    parts = [min(share, tiles - first) for first in range(0, tiles, share)]
    # In a row without order the n-th tile holds a new maximum once in n times.
    extra = [1 + RISE * sum(1 / n for n in range(1, part + 1)) / part for part in parts]
    instructions = row.instructions_per_logit * row.block / device.warp  # a tile, of all warps
    lone = (instructions / row.warps * ISSUE + REDUCTION) / device.clock
    issue = instructions * device.warp / device.issue / device.clock / device.processors
    work = sum(parts) * max(tile_bytes / device.bandwidth / ATTAINED, issue * sum(p * e for p, e in zip(parts, extra, strict=True)) / sum(parts))
    together = work / sum(parts)  # seconds a tile when the device is full

    slots = device.processors * row.devices[device.name]["programs"]
    total, started = rows * len(parts), 0
    now, done = 0.0, 0.0  # done: tiles that a program which has run from the beginning would have taken
    waiting: list[tuple[float, float]] = []
    running: list[float] = []
    while started < total or waiting or running:
        while started < total and len(waiting) + len(running) < slots:
            vary = 0.618034 * started % 1
            heapq.heappush(waiting, (now + LATENCY * (0.5 + vary), parts[started % len(parts)] * (0.85 + 0.3 * (7 * vary % 1))))
            started += 1
        speed = min(1 / lone, 1 / together / len(running)) if running else 0.0
        first_done = now + (running[0] - done) / speed if running else math.inf
        if waiting and waiting[0][0] <= first_done:
            start, length = heapq.heappop(waiting)
            done += speed * (start - now)
            now = start
            heapq.heappush(running, done + length)
        else:
            now, done = first_done, heapq.heappop(running)
    return LAUNCH + now + (0 if splits == 1 else MERGE)


def text(rows: list[Row]) -> str:
    """A table for each architecture that `rows` has a bf16 forward of."""
    lines = []
    for row in {r.arch: r for r in rows if r.case.variant == "forward" and r.case.dtype == "bf16" and r.block and r.wide_share == 1}.values():
        device = next(d.name for d in DEVICES.values() if d.arch == row.arch)
        lines += ["", f"{device}, forward bf16, predicted microseconds with {', '.join(map(str, SPLITS))} programs a row"]
        for vocab in VOCABULARIES:
            for n in ROWS:
                times = "".join(f"{1e6 * forward_time(row, n, vocab, splits):9.1f}" for splits in SPLITS)
                lines.append(f"V = {vocab:7,}  N = {n:5,}{times}")
    return "\n".join(lines[1:])
