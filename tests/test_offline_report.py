"""Budgets of the GPU kernels, read from what the compilers make of them, without a GPU."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from every_case import EVERY_CASE

triton = pytest.importorskip("triton", reason="the offline report compiles with Triton")

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from offline import build, cases, machine, model, waves  # noqa: E402
from offline import report as report_of_a_kernel  # noqa: E402
from offline.program import Instruction, Program  # noqa: E402

ARCHS = list(build.TARGETS)
EXP2_OF_A_ROW = 1  # besides one per logit a kernel may compute one of its row's own, once a tile
# On B200 the exponentials alone take 86 % of the time that a bf16 forward has.
MEMORY_BOUND = ("forward", "backward logp", "backward logp+entropy", "moments", "moments backward")
MEMORY_BOUND += ("DID", "DID backward", "DID backward both", "pair backward reverse_kl")
EXP2 = {"pair reverse_kl": 2, "pair mixed_kl +stats": 3, "pair cross_entropy": 2, "pair jsd": 3}  # a sweep, where it is not 1
EXP2 |= {"pair backward mixed_kl +stats": 2, "pair backward jsd": 2, "pair jsd +softcap": 5, "pair backward reverse_kl +softcap": 3}
EXP2 |= dict.fromkeys(("forward +softcap", "forward +kept +softcap", "backward +softcap", "backward K=128 +softcap"), 2)
EXP2 |= {"backward +bits full": 2, "pair mixture sums": 3}

# Instructions per logit on the hot path in bf16, all kernels of a case together: the worst of the row layouts
# and a twentieth more. fp32 takes twice the memory time, in smaller tiles: half as many again are allowed.
VARIANTS = (*cases.FORWARD, *cases.BACKWARD)
CEILINGS = {  # but of pairs and softcaps: forward, with sum_sq, kept, K=8, K=128 with a tail, moments, DID;
    # backward of logp, with entropy, all, K=128, its tail, moments, DID, both
    "sm_80": (12.6, 14.1, 25.0, 12.5, 20.8, 7.2, 20.5, 9.9, 12.3, 16.4, 12.7, 10.4, 12.4, 19.3, 20.9),
    "sm_90": (12.5, 14.1, 25.2, 12.5, 21.4, 7.5, 20.3, 9.9, 12.1, 16.3, 12.7, 10.3, 13.2, 18.4, 20.5),
    "sm_100": (9.8, 10.3, 20.5, 9.8, 17.1, 5.7, 16.5, 9.2, 10.5, 13.6, 10.6, 8.9, 12.0, 15.9, 17.4),
    "gfx942": (14.1, 15.1, 26.7, 14.1, 23.6, 5.2, 21.0, 10.3, 14.1, 17.2, 13.8, 11.2, 14.3, 17.9, 24.5),
}
SOFTCAP_CEILINGS = {  # on sm_80, sm_90, sm_100, gfx942
    "forward +softcap": (31.7, 31.7, 22.7, 26.4),
    "forward +kept +softcap": (64.3, 62, 46.7, 53),
    "backward +softcap": (36.5, 35.8, 27.2, 34.1),
    "backward K=128 +softcap": (37.1, 35.9, 27.3, 34.3),
}
KEEP_CEILINGS = {  # the same
    "kept masses": (12.5, 12.7, 10.7, 12.5),
    "forward +bits": (16.6, 17.7, 15.1, 18.8),
    "forward +mask": (27.7, 30.0, 22.9, 25.0),  # a bool mask of rows that start anywhere is loaded byte by byte, twice
    "forward +at_least": (14.4, 14.6, 11.4, 16.0),
    "backward +bits": (16.0, 16.0, 13.8, 19.1),
    "backward +bits full": (27.7, 30.5, 24.4, 29.2),
}
PAIR_CEILINGS = {  # the same
    "pair reverse_kl": (43, 43, 33, 46),
    "pair mixed_kl +stats": (66, 66, 52, 77),
    "pair cross_entropy": (45, 45, 37, 48),
    "pair jsd": (143, 143, 120, 111),
    "pair mixture sums": (108, 108, 92, 69.5),
    "pair backward reverse_kl": (27, 27, 24, 19),
    "pair backward mixed_kl +stats": (47, 47, 39, 33.5),
    "pair backward jsd": (97, 97, 84, 68),
    "pair jsd +softcap": (229, 227, 182, 161),
    "pair backward reverse_kl +softcap": (69.5, 69.7, 52.7, 53.8),
}
FP32_ALLOWANCE = 1.5
IN_FLIGHT = 80 << 10  # bytes a multiprocessor: launch shapes that ask for less were slower on an H100
IN_FLIGHT_OF_A_PAIR = 64 << 10  # the sums of two rows take the registers of more programs
IN_FLIGHT_OF_A_TAIL = 72 << 10  # its second sweep takes registers, and reads from the cache
IN_FLIGHT_OF_A_MASK = 60 << 10  # in rows that start anywhere
IN_FLIGHT_OF_A_SOFTCAP = 64 << 10  # as does a tanh with its slope
# Instructions more that old Tritons (up to 3.7) may emit: the ceilings are for the kernels' own.
OLD_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
OLD_TRITON_ALLOWANCE = {"sm_80": 0.7, "sm_90": 0.7, "sm_100": 0.7, "gfx942": 1.3}
SECOND_SWEEPS = ("token_stats_kept_part_kernel", "pair_mixture_sums_kernel")  # they compute more than they wait
IN_DOUBLES = ("pair_parts_merge_kernel",)  # whatever they read; such a number takes two registers
REGISTERS_OVER_TOKENS = 128 if OLD_TRITON else 96  # a thread: four, five programs of four warps on a multiprocessor


def report(*args: str) -> subprocess.CompletedProcess:
    # Elsewhere in this process the kernels may be interpreted; a compiler needs a process of its own.
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, ROOT / "benchmarks" / "report.py", *args], capture_output=True, text=True, env=environment)


def report_on(tmp_path: Path, *args: str) -> tuple[list[dict], list[dict]]:
    """The report's rows: kernels over rows of logits, kernels over tokens."""
    for tool in build.NVIDIA_TOOLS:
        try:
            build.nvidia_tool(tool)
        except FileNotFoundError as error:
            pytest.skip(str(error))
    run = report(*args, "--json", str(tmp_path / "report.json"))
    assert run.returncode == 0, run.stderr
    document = json.loads((tmp_path / "report.json").read_text())
    return document["rows"], document["tokens"]


def kernels_in_the_package() -> set[str]:
    """A new one needs cases of its own in benchmarks/offline/cases.py or tokens.py."""
    files = (ROOT / "triton_kernels").glob("*.py")
    names = (node.name for file in files for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef))
    return {name for name in names if name.endswith("_kernel")}


def violations(rows: list[dict]) -> list[str]:
    """What the kernels of one case exceed, named."""
    case, arch = rows[0]["case"], rows[0]["arch"]
    # Two rows off the boundaries may be off by different distances: their forward loads by elements.
    by_elements = case["variant"] in cases.PAIR_FORWARD and case["layout"] in ("V=50257", "V=262144 odd stride")
    found = []
    for row in rows:
        if spilled := row["resources"]["spilled_bytes"]:
            found.append(f"{spilled} bytes spilled in {row['kernel']}")
        if row["uneven_sums"]:  # rows that are all but equal lost digits by it: threads had frames of their own
            found.append(f"{row['uneven_sums']} sums with other bits in each thread in {row['kernel']}")
    for row in filter(lambda row: row["block"], rows):
        # If the halves of a tile have branches of their own, a path shows one of them: 16-byte loads only.
        if not by_elements and row["wide_share"] < 1 and {int(width) for width in row["load_widths"]} != {16}:
            found.append(f"{row['wide_share']:.0%} of the logits in 16-byte loads: {row['load_widths']}")
        lanes = row["block"] / row["warps"] / build.TARGETS[arch].warp_size
        if row["exp2_per_logit"] > row["sweeps"] * (EXP2.get(case["variant"], 1) + EXP2_OF_A_ROW / lanes):
            found.append(f"{row['exp2_per_logit']:.2f} exp2 per logit in {row['sweeps']} sweeps")
        lower = {"tail": IN_FLIGHT_OF_A_TAIL, "mask": IN_FLIGHT_OF_A_MASK, "softcap": IN_FLIGHT_OF_A_SOFTCAP}
        least = IN_FLIGHT_OF_A_PAIR if case["variant"] in PAIR_CEILINGS else IN_FLIGHT
        least = next((value for name, value in lower.items() if name in case["variant"]), least)
        waits = arch == "sm_90" and row["kernel"] not in SECOND_SWEEPS and not by_elements
        if waits and row["devices"]["H100"]["bytes_in_flight"] < least:
            found.append(f"{row['devices']['H100']['bytes_in_flight'] >> 10} KB in flight on an H100 in {row['kernel']}")
        for name, device in row["devices"].items():
            if case["variant"] in MEMORY_BOUND and name != "B200" and device["bound"] != "memory":
                found.append(f"bound by {device['bound']} on {name}")
    instructions = sum(row["instructions_per_logit"] for row in rows)
    by_variant = PAIR_CEILINGS | SOFTCAP_CEILINGS | KEEP_CEILINGS
    ceilings = dict(zip((name for name in VARIANTS if name not in by_variant), CEILINGS[arch], strict=True))
    ceilings |= {name: of[ARCHS.index(arch)] for name, of in by_variant.items()}
    ceiling = ceilings[case["variant"]] + OLD_TRITON_ALLOWANCE[arch] * OLD_TRITON
    ceiling *= FP32_ALLOWANCE if case["dtype"] == "fp32" else 1
    if instructions > ceiling:
        found.append(f"{instructions:.2f} instructions per logit, ceiling {ceiling}")
    return [f"{arch} {case['variant']} {case['dtype']} {case['layout']}: {what}" for what in found]


def over_budget(over_tokens: list[dict]) -> list[str]:
    """The kernels over tokens that spill or take too many registers."""
    limits = {"fp32": REGISTERS_OVER_TOKENS, "fp64": 2 * REGISTERS_OVER_TOKENS}
    used = [(row["kernel"], row["resources"], limits["fp64" if row["kernel"] in IN_DOUBLES else row["dtype"]]) for row in over_tokens]
    return [kernel for kernel, of, limit in used if of["spilled_bytes"] or of["registers"] > limit]


def by_case(rows: list[dict]) -> list[list[dict]]:
    grouped = {}
    for row in rows:
        grouped.setdefault(tuple(row["case"].values()), []).append(row)
    return list(grouped.values())


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_budgets(arch, tmp_path):
    on_every_layout = arch in ("sm_90", "gfx942")  # `make report` has every layout of the others too
    some = [] if on_every_layout else ["--common"] if EVERY_CASE else ["--common", "--every", "5"]
    rows, over_tokens = report_on(tmp_path, *some, "--arch", arch, "--jobs", "1")
    assert over_budget(over_tokens) == [] and [what for case in by_case(rows) for what in violations(case)] == []
    if "--every" not in some:
        assert {row["case"]["variant"] for row in rows} == set(VARIANTS) - set(cases.RARE)
    if not on_every_layout:
        return
    assert {row["kernel"] for row in (*rows, *over_tokens)} == kernels_in_the_package()
    for variant in ("forward", "backward logp+entropy"):
        assert {row["case"]["layout"] for row in rows if row["case"]["variant"] == variant} == set(cases.LAYOUTS)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90"])  # `make report ARGS=--others` compiles all of them, for all
def test_budgets_of_some_of_the_other_variants_types_and_layouts(arch, tmp_path):
    every = 2 if EVERY_CASE else 8
    rows, over_tokens = report_on(tmp_path, "--others", "--every", str(every), "--arch", arch, "--jobs", "1")
    assert len(cases.other_cases()) == len(cases.all_cases()) - len(cases.core_cases())
    assert len(by_case(rows)) == len(cases.other_cases()[::every])
    assert {row["dtype"] for row in over_tokens} == {"fp64"} and over_budget(over_tokens) == []
    assert [what for case in by_case(rows) for what in violations(case)] == []


def test_unknown_architecture_names_the_known_ones():
    run = report("--arch", "sm_90", "sm_12")
    assert run.returncode == 2
    assert "'sm_12'" in run.stderr and all(arch in run.stderr for arch in ARCHS)
    with pytest.raises(ValueError, match="unknown architecture 'gfx1'.*sm_80, sm_90, sm_100, gfx942"):
        build.target("gfx1")


# A loop over tiles: loads, a test for a rare branch with more code and one exponential, the exponentials, the
# jump back; then a trap.
SASS = """
.text.kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   LDG.E.EF.128 R4, desc[UR4][R2.64] ;
        /*0020*/                   BRA.DIV ~URZ, `(.L_x_4) ;
.L_x_3:
        /*0030*/              @!P0 BRA `(.L_x_1) ;
        /*0040*/                   MUFU.EX2 R9, R9 ;
        /*0050*/                   LDG.E.U16 R10, desc[UR4][R2.64] ;
.L_x_1:
        /*0060*/                   MUFU.EX2 R4, R4 ;
        /*0070*/                   MUFU.EX2 R5, R5 ;
        /*0080*/               @P0 BRA `(.L_x_0) ;
        /*0090*/                   EXIT ;
.L_x_2:
        /*00a0*/                   BRA `(.L_x_2);
.L_x_4:
        /*00b0*/                   WARPSYNC R1 ;
        /*00c0*/                   BRA `(.L_x_3) ;
"""

GCN = """
kernel:
.LBB0_1:
\ts_load_dword s0, s[4:5], 0x0
\ts_and_saveexec_b64 s[0:1], vcc
\ts_cbranch_execz .LBB0_3
\tbuffer_load_dwordx4 v[2:5], v2, s[4:7], 0 offen ; a comment
.LBB0_3:
\ts_or_b64 exec, exec, s[0:1]
\tv_exp_f32_e32 v2, v2
\tv_exp_f32_e32 v3, v3
\tglobal_store_dwordx4 v[14:15], v[0:3], off
\ts_cbranch_scc1 .LBB0_1
\ts_endpgm
.Lfunc_end0:
    .group_segment_fixed_size: 128
    .private_segment_fixed_size: 8
    .sgpr_count: 20
    .sgpr_spill_count: 1
    .vgpr_count: 33
    .vgpr_spill_count: 2
"""


def test_hot_path_of_sass_is_the_loop_without_its_rare_branch():
    program = machine._read_sass(SASS)
    (loop,) = program.loops()  # neither the trap nor the return of the code that was moved out of line
    assert (loop.head, loop.back) == (1, {8})
    (path,) = program.hot_paths("exp2", tile=2)
    assert path == [1, 2, 3, 6, 7, 8]
    assert (program.count(path, "load"), program.count(path, "exp2")) == (1, 2)
    assert [program.instructions[i].width for i in (1, 5)] == [16, 2]


def test_kernel_without_a_loop_is_read_from_entry_to_exit():
    program = Program([Instruction("MOV"), Instruction("MUFU.EX2", "exp2"), Instruction("EXIT", falls_through=False)])
    assert program.loops() == []
    assert program.hot_paths("exp2", tile=1) == [[0, 1, 2]]


# A product summed over two threads by an FMA with what the other thread rounded, then as it should be.
PTX = """
\tmul.f32 \t%r56, %r10, %r8;
\tshfl.sync.bfly.b32 \t%r57, %r56, 1, 31, -1;
\tfma.rn.f32 \t%r58, %r10, %r8, %r57;
\tfma.rn.f32 \t%r60, %r12, %r55, 0f00000000;
\tshfl.sync.bfly.b32 \t%r61, %r60, 1, 31, -1;
\tadd.f32 \t%r62, %r60, %r61;
\tfma.rn.f32 \t%r63, %r61, %r62, %r58;
"""


def test_sums_that_differ_from_thread_to_thread_are_found():
    assert machine.uneven_sums(PTX) == 1
    assert machine.uneven_sums(PTX.replace("%r10, %r8, %r57", "%r10, %r8, %r9")) == 0


# Masked accesses out of line: a jump to them where any lane is active, and back.
GCN_OUT_OF_LINE = """
kernel:
.LBB0_1:
\ts_and_saveexec_b64 s[0:1], vcc
\ts_cbranch_execnz .LBB0_3
.LBB0_2:
\ts_cbranch_scc1 .LBB0_1
\ts_endpgm
.LBB0_3:
\tglobal_load_dwordx4 v[2:5], v[6:7], off
\ts_cbranch_execz .LBB0_2
\tglobal_store_dwordx4 v[14:15], v[0:3], off
\ts_branch .LBB0_2
.Lfunc_end0:
"""


def test_gcn_accesses_out_of_line_are_on_the_path():
    program, _ = machine._read_gcn(GCN_OUT_OF_LINE + GCN.partition(".Lfunc_end0:")[2])
    (path,) = program.hot_paths("load", tile=1)
    assert (program.count(path, "load"), program.count(path, "store")) == (1, 1)


def test_gcn_loads_that_no_lane_may_want_are_on_the_path():
    program, resources = machine._read_gcn(GCN)
    (path,) = program.hot_paths("exp2", tile=2)
    assert (program.count(path, "load"), program.count(path, "store"), program.count(path, "exp2")) == (1, 1, 2)
    assert sum(program.instructions[i].issues for i in path) == 4  # s_ instructions go to a unit of their own
    assert resources == machine.Resources(registers=33, spilled_bytes=8 + 4 * 3, shared_bytes=128, scalar_registers=20)


def kernel_for_signature(logits_ptr, rows, stride, vocab, temperature, flag, BLOCK: triton.language.constexpr):
    pass


def test_arguments_are_specialised_as_in_a_launch():
    import torch

    kernel = triton.runtime.jit.JITFunction(kernel_for_signature)
    logits = torch.empty(4, dtype=torch.bfloat16, device="meta")
    source, options = build.source(cases.Launch(kernel, (1,), (logits, 1, 50257, 151936, 1.0, True), {"BLOCK": 1024, "num_warps": 4}))
    types = ("*bf16", "constexpr", "i32", "i32", "fp32", "i1", "constexpr")
    assert source.signature == dict(zip(kernel.arg_names, types, strict=True))
    assert source.constants == {(1,): 1, (6,): 1024}
    assert set(source.attrs) == {(0,), (3,)}  # the odd stride is not marked as a multiple of 16
    assert options == {"num_warps": 4}


def test_large_integers_are_64_bit():
    kernel = triton.runtime.jit.JITFunction(kernel_for_signature)
    source, _ = build.source(cases.Launch(kernel, (1,), (None, 2**31, -(2**31), 3, 0.5, False), {"BLOCK": 1024}))
    assert [source.signature[name] for name in ("rows", "stride")] == ["i64", "i32"]


@pytest.mark.parametrize(
    ("device", "registers", "shared", "warps", "expected"),
    [
        ("H100", 96, 16, 4, (5, "registers")),  # 65536 / (96 * 128) = 5.3
        ("H100", 97, 16, 4, (4, "registers")),  # rounded up to 104 a thread
        ("H100", 24, 16, 4, (16, "warps")),
        ("H100", 24, 0, 1, (32, "programs")),
        ("H100", 32, 32768, 4, (6, "shared memory")),  # 228 KiB / (32 + 1)
        ("MI300X", 128, 0, 4, (4, "registers")),  # counts waves of four SIMDs
        ("MI300X", 24, 0, 4, (8, "warps")),
    ],
)
def test_occupancy(device, registers, shared, warps, expected):
    assert model.occupancy(machine.Resources(registers, 0, shared), warps, model.DEVICES[device]) == expected


def test_bound_is_what_runs_out_first():
    h100 = model.DEVICES["H100"]
    per_clock = h100.bandwidth / 2 / h100.processors / h100.clock  # bf16 logits an SM must take per clock to keep up with memory
    fast = model.bound(2, 1, 1, h100)
    assert (fast.limit, fast.bandwidth_share) == ("memory", 1)
    slow = model.bound(2, 2 * h100.issue / per_clock, 1, h100)
    assert (slow.limit, slow.bandwidth_share) == ("issue", pytest.approx(0.5))
    assert model.bound(2, 1, 4, h100).limit == "exp2"


def forward_row(arch: str) -> report_of_a_kernel.Row:
    case = cases.Case("forward", "bf16", "V=151936")
    resources = machine.Resources(registers=96, spilled_bytes=0, shared_bytes=16400)
    return report_of_a_kernel.Row(case, "kernel", arch, 4096, 4, resources, 1, 16384, 11.0, 1.0, {16: 4}, 1.0)


def test_splitting_rows_pays_in_small_batches_and_does_not_cost_large_ones():
    row = forward_row("sm_90")
    floor = 8192 * 151_936 * 2 / model.DEVICES["H100"].bandwidth
    whole, split = (waves.forward_time(row, 8192, 151_936, splits) for splits in (1, 4))
    assert floor < whole < 1.2 * floor and split == pytest.approx(whole, rel=0.01)
    assert 2 * waves.forward_time(row, 16, 151_936, 4) < waves.forward_time(row, 16, 151_936, 1)
    assert waves.forward_time(row, 16, 4000, 4) == pytest.approx(waves.forward_time(row, 16, 4000, 1) + waves.MERGE)  # one tile has one part


def test_a_device_without_issue_slots_to_spare_loses_by_splitting():
    row = forward_row("sm_100")
    assert waves.forward_time(row, 2048, 151_936, 8) > 1.05 * waves.forward_time(row, 2048, 151_936, 1)
