"""One row of the report: a kernel of a case, compiled, and what its hot path costs per logit."""

from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context

from .build import build, target
from .cases import LAYOUTS, Case, Launch, record
from .machine import Resources, read, uneven_sums
from .model import DEVICES, bound, occupancy


@dataclass
class Row:
    case: Case
    kernel: str
    arch: str
    block: int | None  # logits of a tile; None where a kernel reads none but a few of a row
    warps: int
    resources: Resources
    sweeps: int
    bytes_in_flight: int  # of a program, while it waits for logits: the buffers of its pipeline, or else the tile that it loads at once
    instructions_per_logit: float  # on the hot path, all sweeps together
    exp2_per_logit: float
    load_widths: dict[int, int]  # bytes -> loads of logits on the hot path that are that wide
    wide_share: float  # share of the logits that arrive in 16-byte loads
    operations: dict[str, int] = field(default_factory=dict)  # mnemonic -> times on the hot path
    uneven_sums: int = 0  # sums over threads whose bits differ from thread to thread; looked for in PTX

    @property
    def bytes_per_logit(self) -> int:
        """What must move: forward a read a sweep (a second may hit a cache), backward one and a write; of
        pairs two reads."""
        return (self.sweeps * self.case.reads + self.case.writes) * self.case.element_size

    @property
    def devices(self) -> dict[str, dict]:
        """Product -> occupancy, and for a kernel that reads whole rows the predicted bound."""
        found = {}
        for device in DEVICES.values():
            if device.arch == self.arch:
                programs, limit = occupancy(self.resources, self.warps, device)
                entry = {"programs": programs, "warps": programs * self.warps, "occupancy_limit": limit}
                if self.block:
                    cap = bound(self.bytes_per_logit, self.instructions_per_logit, self.exp2_per_logit, device)
                    entry |= {"bytes_in_flight": programs * self.bytes_in_flight, "bound": cap.limit}
                    entry |= {"bandwidth_share": cap.bandwidth_share, "loads": cap.loads}
                found[device.name] = entry
        return found


def analyse(case: Case, arch: str) -> list[Row]:
    """Compiles the launches of `case` for `arch`, reads the assembly. ValueError for an unknown `arch`."""
    return [_analyse_launch(case, launch, arch) for launch in record(case, target(arch))]


def _analyse_launch(case: Case, launch: Launch, arch: str) -> Row:
    compiled = build(launch, arch)
    program, resources = read(compiled)
    block, warps = launch.kwargs.get("BLOCK"), compiled.metadata.num_warps
    tile = max(1, (block or LAYOUTS[case.layout][0]) // (warps * target(arch).warp_size))
    instructions = exps = wide = covered = 0.0
    widths: Counter[int] = Counter()
    operations: Counter[str] = Counter()
    column = case.element_size * case.reads  # bytes that a sweep reads of it
    # The work of moments has no exponentials. It shows in the loads of whole vectors.
    work = "exp2" if any(step.kind == "exp2" for step in program.instructions) else "load"
    paths = program.hot_paths(work, tile if work == "exp2" else tile * column // 16)
    if not paths:
        raise RuntimeError(f"{launch.kernel.__name__} for {arch}: no path with its work was found in its assembly")
    for path in paths:
        steps = [program.instructions[i] for i in path]
        loads = Counter(step.width for step in steps if step.kind == "load")
        # A row's few scalars are narrower than a vector of logits: a path's widest loads are logits. Some may
        # be loaded twice, so an unrolled loop shows in its exponentials too.
        widest, path_exps = max(loads, default=0), program.count(path, "exp2")
        by_loads = widest * loads[widest] // (tile * column)
        by_work = path_exps // tile if work == "exp2" else by_loads // (2 if launch.kwargs.get("SHIFTED") else 1)
        tiles = max(1, min(by_loads, by_work)) if block else 1
        logits = tiles * tile
        instructions += sum(step.issues for step in steps) / logits
        exps += path_exps / logits
        wide += 16 * loads[16]
        covered += logits * column
        widths += loads
        operations += Counter(step.op for step in steps)
    tile_bytes = (block or 0) * column
    # a shifted row's tile has two buffers, the second nearly empty
    buffers = resources.shared_bytes // (tile_bytes * (2 if launch.kwargs.get("SHIFTED") else 1)) if block else 0
    costs = {"instructions_per_logit": instructions, "exp2_per_logit": exps, "operations": dict(operations.most_common())}
    costs |= {"load_widths": dict(sorted(widths.items())), "wide_share": min(1.0, wide / covered)}
    costs |= {"sweeps": len(paths) if block else 0, "bytes_in_flight": tile_bytes * max(1, buffers)}
    costs |= {"uneven_sums": uneven_sums(compiled.asm.get("ptx", ""))}
    return Row(case, launch.kernel.__name__, arch, block, warps, resources, **costs)


def analyse_all(cases: list[Case], archs: list[str], workers: int) -> list[Row]:
    """Rows in the order of `archs`, then of `cases`."""
    jobs = [(case, arch) for arch in archs for case in cases]
    for arch in archs:
        target(arch)
    if workers < 2:
        return [row for job in jobs for row in analyse(*job)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return [row for rows in pool.map(analyse, *zip(*jobs, strict=True)) for row in rows]
