"""Rows of the report as text, and as plain data for a JSON file."""

from dataclasses import asdict

from table import columns

from .model import DEVICES
from .report import Row

_HEADER = "case|type|rows|kernel|tile|regs|spill|smem|warps|flight|loads|instr|exp2|bytes|bound|of peak|issue|exp2 load".split("|")

LEGEND = """\
kernel       what the case launches
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


def _cells(row: Row) -> list[str]:
    device = next(iter(row.devices.values()))
    loads = "+".join(f"{n}x{width}" for width, n in sorted(row.load_widths.items(), reverse=True) if width == 16 or row.wide_share < 1)
    name = f"{row.case.variant}: {row.case.label}" if row.case.label else row.case.variant
    kernel = row.kernel.removeprefix("token_stats_").removesuffix("_kernel")
    used = [str(n) for n in (row.resources.registers, row.resources.spilled_bytes, row.resources.shared_bytes)]
    cells = [name, row.case.dtype, row.case.layout, kernel, f"{row.block or '-'}/{row.warps}", *used]
    cells += [f"{device['warps']} {device['occupancy_limit'][0]}"]
    costs = [f"{row.instructions_per_logit:.2f}", f"{row.exp2_per_logit:.2f}"]
    if not row.block:
        return [*cells, "-", "-", *costs, *5 * "-"]
    shares = [f"{share:.0%}" for share in (device["bandwidth_share"], device["loads"]["issue"], device["loads"]["exp2"])]
    return [*cells, f"{device['bytes_in_flight'] >> 10}", loads, *costs, str(row.bytes_per_logit), device["bound"], *shares]


def text(rows: list[Row]) -> str:
    parts = []
    for arch in dict.fromkeys(row.arch for row in rows):
        device = next(device for device in DEVICES.values() if device.arch == arch)
        rates = f"{device.bandwidth / 1e12:.2f} TB/s, {device.processors} x {device.clock / 1e9:.2f} GHz"
        width = f"{device.issue} lanes issued and {device.exp2} exp2 a clock"
        header, *body = columns([_HEADER, *(_cells(row) for row in rows if row.arch == arch)], words=4).split("\n")
        parts.append("\n".join([f"{arch}, predicted for {device.name} ({rates}, {width}; data sheet)", header, "-" * len(header), *body]))
    return "\n\n".join([*parts, LEGEND.rstrip()])


def data(rows: list[Row]) -> list[dict]:
    """Everything known of each row, for json.dump."""
    return [asdict(row) | {"bytes_per_logit": row.bytes_per_logit, "devices": row.devices} for row in rows]
