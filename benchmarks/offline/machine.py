"""Reads what the assemblers wrote, NVIDIA's SASS and AMD's GCN, into a Program and the kernel's resources."""

import re
from dataclasses import dataclass, replace

from .build import disassemble, resource_usage
from .program import Instruction, Program


@dataclass(frozen=True)
class Resources:
    """What one thread, or for shared memory one program, occupies."""

    registers: int
    spilled_bytes: int  # local (NVIDIA) or scratch (AMD) memory per thread
    shared_bytes: int
    scalar_registers: int | None = None


def read(compiled) -> tuple[Program, Resources]:
    if "amdgcn" in compiled.asm:
        program, resources = _read_gcn(compiled.asm["amdgcn"])
        return program, replace(resources, shared_bytes=compiled.metadata.shared)  # allotted at launch, so not in the assembly
    return _read_sass(disassemble(compiled.asm["cubin"])), read_resources(compiled)


def read_resources(compiled) -> Resources:
    """As read(), without the program: NVIDIA's disassembler takes a third of a second to start."""
    if "amdgcn" in compiled.asm:
        return read(compiled)[1]
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", resource_usage(compiled.asm["cubin"]))}
    return Resources(found["REG"], found["STACK"] + found["LOCAL"], compiled.metadata.shared)


_PTX_SHUFFLE = re.compile(r"shfl\.sync\.\S+\s+(%\w+)")
_PTX_FMA = re.compile(r"\bfma\.\S+\s+.*,\s*(%\w+);")


def uneven_sums(ptx: str) -> int:
    """How often a thread adds another's number to a product of its own by one FMA. The other thread rounded
    that number, and not its own product: what should be one sum has other bits in each thread."""
    shuffled = set(_PTX_SHUFFLE.findall(ptx))
    return sum(addend in shuffled for addend in _PTX_FMA.findall(ptx))


_SASS_LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?(\S+)\s*(.*?)\s*;")
_SASS_TARGET = re.compile(r"`\(([^)]+)\)")
_SASS_WIDTH = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


def _sass_instruction(predicate: str | None, op: str, rest: str) -> Instruction:
    parts = op.split(".")
    kind = {"LDG": "load", "LDGSTS": "load", "STG": "store"}.get(parts[0], "exp2" if op.startswith("MUFU.EX2") else "")
    width = next((_SASS_WIDTH[part] for part in parts if part in _SASS_WIDTH), 4) if kind in ("load", "store") else 0
    jumps = parts[0] in ("BRA", "CALL")
    found = _SASS_TARGET.search(rest) if jumps else None
    # A branch may carry its condition as an operand instead of a guard: BRA.DIV ~URZ, `(L); BRA.U !UP0, `(L)
    conditional = predicate not in (None, "PT") or (jumps and bool(re.match(r"!?U?P\d|~?URZ|~?UR\d|~?R\d", rest)))
    leaves = parts[0] in ("BRA", "EXIT", "RET")
    return Instruction(op, kind, width, found.group(1) if found else None, conditional or not leaves, predicate is not None)


def _read_sass(listing: str) -> Program:
    program, inside = Program(), False
    for line in listing.splitlines():
        if line.startswith(".text."):
            inside = True
        elif inside and (label := re.match(r"(\.L\w+|\$\w+):", line)):
            program.labels[label.group(1)] = len(program.instructions)
        elif inside and (match := _SASS_LINE.match(line)):
            program.instructions.append(_sass_instruction(*match.groups()))
    return program


_GCN_WIDTH = {"ubyte": 1, "sbyte": 1, "u8": 1, "i8": 1, "byte": 1, "ushort": 2, "sshort": 2, "u16": 2, "short": 2, "d16": 2}
_GCN_WIDTH |= {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


def _gcn_instruction(op: str, rest: str) -> Instruction:
    memory = re.match(r"(?:global|buffer|flat)_(load|store)_(?:lds_)?(\w+)", op)
    kind, width = "", 0
    if memory:
        kind = memory.group(1)
        width = next((_GCN_WIDTH[part] for part in memory.group(2).split("_") if part in _GCN_WIDTH), 4)
    elif op.startswith("v_exp_f32"):
        kind = "exp2"
    jumps = op.startswith(("s_branch", "s_cbranch"))
    leaves = op in ("s_branch", "s_endpgm", "s_setpc_b64")
    return Instruction(op, kind, width, rest.split()[0] if jumps else None, not leaves, issues=not op.startswith("s_"))


def _accesses(program: Program, span: range) -> bool:
    return any(program.instructions[j].kind in ("load", "store") for j in span)


def _block(program: Program, first: int) -> range:
    """From there to the next jump."""
    jumps = (j for j in range(first, len(program.instructions)) if program.instructions[j].jump)
    return range(first, next(jumps, len(program.instructions)))


def _without_predication(program: Program, i: int) -> Instruction:
    """A branch round loads or stores that no lane wants is a masked access, and no way that a row takes."""
    instruction = program.instructions[i]
    target = program.labels.get(instruction.jump, 0)
    # Code that was moved out of line stands further down.
    if instruction.op == "s_cbranch_execz" and (_accesses(program, range(i + 1, target)) or _accesses(program, _block(program, i + 1))):
        return replace(instruction, jump=None)
    if instruction.op == "s_cbranch_execnz" and target > i and _accesses(program, _block(program, target)):
        return replace(instruction, falls_through=False)
    return instruction


def _read_gcn(text: str) -> tuple[Program, Resources]:
    program = Program()
    for line in text.splitlines():
        line = line.split(";")[0].rstrip()
        if label := re.match(r"(\.LBB\w+):", line):
            program.labels[label.group(1)] = len(program.instructions)
        elif match := re.match(r"\t([a-z]\w+)\s*(.*)", line):
            program.instructions.append(_gcn_instruction(*match.groups()))
        elif line.startswith(".Lfunc_end"):
            break

    program.instructions = [_without_predication(program, i) for i in range(len(program.instructions))]

    def metadata(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))

    spilled = metadata("private_segment_fixed_size") + 4 * (metadata("vgpr_spill_count") + metadata("sgpr_spill_count"))
    return program, Resources(metadata("vgpr_count"), spilled, metadata("group_segment_fixed_size"), metadata("sgpr_count"))
