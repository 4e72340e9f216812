"""Compiles a recorded launch, specialised as a real one, for an architecture that need not be present."""

import functools
import os
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .cases import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NVIDIA_TOOLS = ("cuobjdump", "nvdisasm")

_POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64"}
_POINTERS |= {torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1", torch.uint8: "*u8", torch.int8: "*i8"}
_DIVISIBLE = [["tt.divisibility", 16]]


def target(arch: str) -> GPUTarget:
    """Raises ValueError for an architecture that is not in TARGETS."""
    if arch not in TARGETS:
        raise ValueError(f"unknown architecture {arch!r}, known are {', '.join(TARGETS)}")
    return TARGETS[arch]


def nvidia_tool(name: str) -> Path:
    """A disassembler from Triton's own wheel. Raises FileNotFoundError where the wheel lacks it."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise FileNotFoundError(f"{name} is not in this triton {triton.__version__} ({path})")
    return path


def source(launch: Launch) -> tuple[ASTSource, dict]:
    """(what to compile, compiler options). As in a launch an integer 1 is folded, and integers and pointers
    are marked if they are multiples of 16, unless the kernel's code is not to depend on that argument."""
    names = launch.kernel.arg_names
    values = dict(zip(names, launch.args, strict=False)) | launch.kwargs
    options = {name: value for name, value in launch.kwargs.items() if name not in names}
    signature, constants, attributes = {}, {}, {}
    for param in launch.kernel.params:
        index, name, value = param.num, param.name, values[param.name]
        specialize = not param.do_not_specialize
        if param.is_constexpr or value is None or (specialize and type(value) is int and value == 1):
            signature[name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            attributes[(index,)] = _DIVISIBLE  # torch's allocators align to 256 bytes or more
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialize and value % 16 == 0:
                attributes[(index,)] = _DIVISIBLE
        else:
            signature[name] = param.annotation_type or "fp32"
    return ASTSource(launch.kernel, signature, constants, attributes), options


def build(launch: Launch, arch: str):
    """The compiled kernel; its `.asm` has "cubin" or "amdgcn". ValueError for an unknown architecture."""
    gpu = target(arch)
    src, options = source(launch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # triton announces a change of default that the launchers do not depend on
        return triton.compile(src, target=gpu, options=options)


def resource_usage(cubin: bytes) -> str:
    return _asked(cubin, "cuobjdump", "-res-usage")


@functools.cache  # launches that differ in what the code does not depend on come to the same cubin
def disassemble(cubin: bytes) -> str:
    return _asked(cubin, "nvdisasm", "-c", "-ndf")  # its analysis of data flow takes a third of its time and changes nothing here


def _asked(cubin: bytes, tool: str, *options: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(cubin)
        return subprocess.run([nvidia_tool(tool), *options, path], capture_output=True, text=True, check=True).stdout
