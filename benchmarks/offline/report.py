"""One row of the report: a case compiled for an architecture, and what its hot path costs per logit."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context

from .build import build, target
from .cases import Case, record
from .machine import Resources, read
from .model import DEVICES, bound, occupancy


@dataclass
class Row:
    case: Case
    kernel: str
    arch: str
    block: int
    warps: int
    resources: Resources
    sweeps: int
    instructions_per_logit: float  # on the hot path, all sweeps together
    exp2_per_logit: float
    load_widths: dict[int, int]  # bytes -> loads of logits on the hot path that are that wide
    wide_share: float  # share of the logits that arrive in 16-byte loads
    operations: dict[str, int] = field(default_factory=dict)  # mnemonic -> times on the hot path

    @property
    def devices(self) -> dict[str, dict]:
        """Product -> occupancy and predicted bound."""
        found = {}
        for device in DEVICES.values():
            if device.arch == self.arch:
                programs, limit = occupancy(self.resources, self.warps, device)
                cap = bound(self.case.bytes_per_logit, self.instructions_per_logit, self.exp2_per_logit, device)
                found[device.name] = {
                    "programs": programs,
                    "warps": programs * self.warps,
                    "occupancy_limit": limit,
                    "bound": cap.limit,
                    "bandwidth_share": cap.bandwidth_share,
                    "loads": cap.loads,
                }
        return found


def analyse(case: Case, arch: str) -> Row:
    """Compiles `case` for `arch` and reads its assembly. Raises ValueError for an unknown architecture."""
    gpu = target(arch)
    launch = record(case, gpu)
    compiled = build(launch, arch)
    program, resources = read(compiled)
    block, warps = launch.kwargs["BLOCK"], compiled.metadata.num_warps
    tile = max(1, block // (warps * gpu.warp_size))
    instructions = exps = wide = covered = 0.0
    widths: Counter[int] = Counter()
    operations: Counter[str] = Counter()
    paths = program.hot_paths(tile)
    if not paths:
        raise RuntimeError(f"{launch.kernel.__name__} for {arch}: no path with an exponential was found in its assembly")
    for path in paths:
        steps = [program.instructions[i] for i in path]
        loads = Counter(step.width for step in steps if step.kind == "load")
        # A row's few scalars are narrower than a vector of logits: of a path's loads those that are as wide as the widest are logits.
        widest = max(loads, default=0)
        tiles = max(1, widest * loads[widest] // (tile * case.element_size))
        logits = tiles * tile
        instructions += sum(step.issues for step in steps) / logits
        exps += sum(step.kind == "exp2" for step in steps) / logits
        wide += 16 * loads[16]
        covered += logits * case.element_size
        widths += loads
        operations += Counter(step.op for step in steps)
    return Row(
        case=case,
        kernel=launch.kernel.__name__,
        arch=arch,
        block=block,
        warps=warps,
        resources=resources,
        sweeps=len(paths),
        instructions_per_logit=instructions,
        exp2_per_logit=exps,
        load_widths=dict(sorted(widths.items())),
        wide_share=min(1.0, wide / covered),
        operations=dict(operations.most_common()),
    )


def _analyse(job: tuple[Case, str]) -> Row:
    return analyse(*job)


def analyse_all(cases: list[Case], archs: list[str], workers: int) -> list[Row]:
    """Rows in the order of `archs`, then of `cases`."""
    jobs = [(case, arch) for arch in archs for case in cases]
    for arch in archs:
        target(arch)
    if workers < 2:
        return [analyse(*job) for job in jobs]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_analyse, jobs))
