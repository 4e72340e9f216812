"""Builds the CPU kernels with CMake, unless RLKERN_NATIVE=0. Everything else is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

NO_BUILD = """
rlkern: the CPU kernels could not be built ({reason}).
They need a C++17 compiler (GCC or Clang), CMake, Ninja or Make, and pybind11. To install without them, on GPUs or with the slower PyTorch
fallback on CPUs:

    RLKERN_NATIVE=0 pip install .
"""


def _tool(name: str) -> "str | None":
    """A program from this Python's scripts folder, activated or not, else from PATH."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def _pybind11_dir() -> "list[str]":
    try:
        import pybind11
    except ImportError:
        return []  # perhaps a system package, which CMake finds by itself
    return [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        cmake, ninja = _tool("cmake"), _tool("ninja")
        if cmake is None:
            raise SystemExit(NO_BUILD.format(reason="cmake was not found"))
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        # Start afresh: pip builds in a new environment, and an old cache names tools of the last one.
        shutil.rmtree(build, ignore_errors=True)
        configure = [
            cmake,
            f"-S{ROOT}",
            f"-B{build}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build}",
            "-DCMAKE_BUILD_TYPE=Release",
            *_pybind11_dir(),
            *(["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []),
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        try:
            subprocess.run(configure, check=True)
            subprocess.run([cmake, "--build", str(build), "--parallel"], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(NO_BUILD.format(reason=error)) from None
        # Replaced at once: a linker that writes over a library crashes the processes that run it.
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(build / target.name, target)


native = os.environ.get("RLKERN_NATIVE", "1") != "0"
packages = find_packages(include=["rlkern", "rlkern.*"], exclude=["rlkern.triton_kernels"])
# Installed inside rlkern: a top-level triton_kernels would shadow the Triton project's package of that name.
package_dir = {"rlkern": "rlkern", "rlkern.triton_kernels": "triton_kernels"}
if "editable_wheel" in sys.argv:
    # A path that holds only a link to the package: type checkers follow paths, not import hooks.
    link = ROOT / ".editable" / "rlkern"
    link.parent.mkdir(exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(Path("..", "rlkern"), target_is_directory=True)
    package_dir = {"": ".editable"}
setup(
    packages=[*packages, "rlkern.triton_kernels"],
    package_dir=package_dir,
    ext_modules=[Extension("rlkern._cpu", sources=[])] if native else [],
    cmdclass={"build_ext": CMakeBuild},
)
