"""Rows of the report as text, and as plain data for a JSON file."""

from __future__ import annotations

from dataclasses import asdict

from .model import DEVICES
from .report import Row

_HEADER = "case|type|rows|kernel|tile|regs|spill|smem|warps|flight|loads|instr|exp2|bytes|bound|of peak|issue|exp2 load".split("|")

LEGEND = """\
kernel       of token_stats: what the case launches
tile         logits per tile / warps per program
regs, spill  registers, and bytes of spilled memory, per thread
smem         bytes of shared memory per program
warps        resident per SM or CU, and what limits them: registers, shared memory, warps or programs (first letter)
flight       KB of logits that an SM or CU has asked for while all its programs wait
loads        bytes per global load on the hot path
instr, exp2  per logit on the hot path; a kernel that has no loop over tiles counts its prologue too
bytes        per logit, by design
bound        what runs out first on the device: memory bandwidth, instruction issue or exponentials; of peak: the bandwidth it leaves
issue, exp2 load   share of the issue slots and exponential units that is busy while memory runs at its peak
"""


def _cells(row: Row) -> tuple[str, ...]:
    device = next(iter(row.devices.values()))
    loads = "+".join(f"{n}x{width}" for width, n in sorted(row.load_widths.items(), reverse=True) if width == 16 or row.wide_share < 1)
    cells = (
        f"{row.case.variant}: {row.case.label}" if row.case.label else row.case.variant,
        row.case.dtype,
        row.case.layout,
        row.kernel.removeprefix("token_stats_").removesuffix("_kernel"),
        f"{row.block or '-'}/{row.warps}",
        str(row.resources.registers),
        str(row.resources.spilled_bytes),
        str(row.resources.shared_bytes),
        f"{device['warps']} {device['occupancy_limit'][0]}",
    )
    if not row.block:
        return *cells, "-", "-", f"{row.instructions_per_logit:.2f}", f"{row.exp2_per_logit:.2f}", *5 * "-"
    return (
        *cells,
        f"{device['bytes_in_flight'] >> 10}",
        loads,
        f"{row.instructions_per_logit:.2f}",
        f"{row.exp2_per_logit:.2f}",
        str(row.bytes_per_logit),
        device["bound"],
        f"{device['bandwidth_share']:.0%}",
        f"{device['loads']['issue']:.0%}",
        f"{device['loads']['exp2']:.0%}",
    )


def _align(lines: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = 4  # the first columns are words, the others figures
    return ["  ".join(cell.ljust(w) if i < text else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))) for line in lines]


def text(rows: list[Row]) -> str:
    """One table per architecture."""
    parts = []
    for arch in dict.fromkeys(row.arch for row in rows):
        device = next(device for device in DEVICES.values() if device.arch == arch)
        rates = f"{device.bandwidth / 1e12:.2f} TB/s, {device.processors} x {device.clock / 1e9:.2f} GHz"
        width = f"{device.issue} lanes issued and {device.exp2} exp2 a clock"
        header, *body = _align([tuple(_HEADER), *(_cells(row) for row in rows if row.arch == arch)])
        parts.append("\n".join([f"{arch}, predicted for {device.name} ({rates}, {width}; data sheet)", header, "-" * len(header), *body]))
    return "\n\n".join([*parts, LEGEND.rstrip()])


def data(rows: list[Row]) -> list[dict]:
    """Everything known of each row, for json.dump."""
    return [asdict(row) | {"bytes_per_logit": row.bytes_per_logit, "devices": row.devices} for row in rows]
