"""Occupancy, and the data sheet's bound: how fast a device can move, issue and exponentiate logits."""

from dataclasses import dataclass, replace

from .machine import Resources


@dataclass(frozen=True)
class Device:
    """Peaks of one product from the vendor's data sheet and architecture manual, not measurements."""

    name: str
    arch: str
    bandwidth: float  # bytes per second
    processors: int  # SMs or CUs
    clock: float  # Hz: the one at which processors x lanes x 2 give the sheet's float32 peak
    issue: int  # lanes per clock and processor that may start an instruction: schedulers x warp width (NVIDIA), SIMDs x 16 (AMD)
    exp2: int  # exponentials per clock and processor
    warp: int  # lanes of a warp or wave
    max_warps: int  # resident, per processor
    max_programs: int
    registers: int  # 32-bit, per processor
    register_unit: int  # a thread's registers are rounded up to a multiple
    max_registers: int  # per thread
    shared_bytes: int  # per processor
    shared_reserved: int  # per program, taken by the system


_NVIDIA = dict(issue=128, exp2=16, warp=32, max_warps=64, max_programs=32, registers=65536, register_unit=8, max_registers=255, shared_reserved=1024)

_H100 = Device("H100", "sm_90", 3.35e12, 132, 1.980e9, shared_bytes=228 << 10, **_NVIDIA)

# Of two products of one architecture the first is the one that tables and simulations take.
DEVICES = {
    "A100": Device("A100", "sm_80", 2.039e12, 108, 1.410e9, shared_bytes=164 << 10, **_NVIDIA),  # SXM, 80 GB
    "H100": _H100,  # SXM, 80 GB
    "H200": replace(_H100, name="H200", bandwidth=4.8e12),  # the same chip with faster memory
    "B200": Device("B200", "sm_100", 8.0e12, 148, 1.965e9, shared_bytes=228 << 10, **_NVIDIA),
    # Four SIMDs of 16 lanes, 512 vector registers a lane, at most 8 waves each; transcendentals: 4 times.
    "MI300X": Device("MI300X", "gfx942", 5.3e12, 304, 2.100e9, 64, 16, 64, 32, 32, 4 * 512 * 64, 8, 512, 64 << 10, 0),
}


def occupancy(resources: Resources, warps: int, device: Device) -> tuple[int, str]:
    """(resident programs per processor, what limits them)."""
    unit = device.register_unit
    per_thread = -(-resources.registers // unit) * unit
    limits = {
        "registers": device.registers // (per_thread * device.warp) // warps,
        "shared memory": device.shared_bytes // (resources.shared_bytes + device.shared_reserved or 1),
        "warps": device.max_warps // warps,
        "programs": device.max_programs,
    }
    limit = min(limits, key=limits.get)
    return limits[limit], limit


@dataclass(frozen=True)
class Bound:
    """What caps the rate, and the share of the memory's peak that is left. loads: busy shares at the peak."""

    limit: str
    bandwidth_share: float
    loads: dict[str, float]


def bound(bytes_per_logit: float, instructions_per_logit: float, exp2_per_logit: float, device: Device) -> Bound:
    """Which of memory, instruction issue and exponentials runs out first, if all overlap perfectly."""
    logits_per_clock = device.bandwidth / bytes_per_logit / device.processors / device.clock
    loads = {
        "memory": 1.0,
        "issue": logits_per_clock * instructions_per_logit / device.issue,
        "exp2": logits_per_clock * exp2_per_logit / device.exp2,
    }
    limit = max(loads, key=loads.get)
    return Bound(limit, 1.0 / loads[limit], loads)
