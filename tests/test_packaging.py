"""What a user installs (sdist, wheel, editable tree), used outside of the source tree; failed builds."""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from test_types import MISTAKES, script_errors

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "release"))
import wheels  # noqa: E402

pytestmark = pytest.mark.slow
pytest.importorskip("setuptools")

BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_{}(sys.argv[1]))"
USE = """
import pathlib, torch, rlkern, rlkern.triton_kernels
from rlkern import token_stats, backend_info
import sys
print(pathlib.Path(rlkern.__file__).parent, pathlib.Path(rlkern.triton_kernels.__file__).parent)
logits = torch.randn(4, 50, dtype=torch.bfloat16, requires_grad=True)
token_stats(logits, torch.arange(4)).logp.sum().backward()
assert logits.grad.abs().sum() > 0
assert "triton_kernels" not in sys.modules  # the Triton project's name
print(backend_info()["native"])
"""


def run(*command, cwd, env=(), ok=True):
    done = subprocess.run([str(c) for c in command], cwd=cwd, env={**os.environ, **dict(env)}, capture_output=True, text=True)
    if ok:
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module", autouse=True)
def sources_compiled_once(tmp_path_factory):
    """The CPU kernels are built four times here, in different ways, from the same sources."""
    objects = tmp_path_factory.mktemp("objects")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMAKE_CXX_COMPILER_LAUNCHER", f"{sys.executable};{ROOT / 'release' / 'compile_once.py'};--unoptimised;{objects}")
        patch.setenv("CMAKE_ARGS", "-DRLKERN_BASELINE_ONLY=ON")
        patch.setenv("PATH", sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"])  # this environment's CMake, in `python` too
        yield


@pytest.fixture
def tree(tmp_path):
    """A copy of the source tree without anything built or ignored."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("no source tree")
    keep = ("rlkern", "triton_kernels", "csrc", "setup.py", "CMakeLists.txt", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
    copy = tmp_path / "source"
    copy.mkdir()
    for name in keep:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture
def python(tmp_path):
    """The interpreter of a new environment that sees this one's packages, but no installation of rlkern."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    interpreter = tmp_path / "venv" / "bin" / "python"
    site = run(interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).stdout.strip()
    Path(site, "outer.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    return interpreter


def use(python, cwd, env=()):
    """Runs rlkern: ([where it was found, and its Triton kernels], backend_info of the CPU kernels)."""
    places, native = run(python, "-c", USE, cwd=cwd, env=env).stdout.strip().splitlines()
    return [Path(p) for p in places.split()], native


def test_sdist_to_wheel_to_import(tree, python, tmp_path):
    sdist = tmp_path / run(sys.executable, "-c", BUILD.format("sdist"), tmp_path, cwd=tree).stdout.splitlines()[-1]
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    portable = {"CMAKE_ARGS": f"{os.environ['CMAKE_ARGS']} -DRLKERN_PORTABLE=ON"}
    built = tmp_path / run(sys.executable, "-c", BUILD.format("wheel"), tmp_path, cwd=unpacked, env=portable).stdout.splitlines()[-1]
    wheel = wheels.audited(built)
    assert "manylinux_2_28" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert "rlkern/py.typed" in names and "rlkern/triton_kernels/__init__.py" in names
    assert not [n for n in names if n.split("/")[0] not in ("rlkern", wheel.name.split("-py")[0].split("-cp")[0] + ".dist-info")]

    run(python, "-m", "pip", "install", "--no-deps", "--no-index", "--force-reinstall", wheel, cwd=tmp_path)
    (package, kernels), native = use(python, tmp_path)
    assert package.is_relative_to(tmp_path / "venv") and kernels == package / "triton_kernels"
    assert native.startswith("available")


def test_builds_in_one_tree_do_not_stumble_over_each_other(tree, python, tmp_path):
    def check(cwd, env=()):
        (package, kernels), native = use(python, cwd, env)
        assert package.resolve() == tree / "rlkern" and kernels.resolve() == tree / "triton_kernels"
        assert native.startswith("available")

    run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=tree)  # no network, no isolation: what a bare GPU machine can do
    check(tree, {"PYTHONPATH": "."})
    run(python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--force-reinstall", tree, cwd=tmp_path)
    assert use(python, tmp_path)[0][0].is_relative_to(tmp_path / "venv")
    run(python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "-e", tree, cwd=tmp_path)
    check(tree, {"PYTHONPATH": "."})
    check(tmp_path)
    assert script_errors(tmp_path, python) == MISTAKES


def test_without_the_cpu_kernels(tree, python, tmp_path):
    env = {"RLKERN_NATIVE": "0", "CXX": "/nowhere/c++"}
    wheel = run(sys.executable, "-c", BUILD.format("wheel"), tmp_path, cwd=tree, env=env).stdout.splitlines()[-1]
    assert wheel.endswith("-py3-none-any.whl")
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", "--force-reinstall", tmp_path / wheel, cwd=tmp_path)
    (package, _), native = use(python, tmp_path)
    assert package.is_relative_to(tmp_path / "venv") and native.startswith("missing")


SUM = """
template <class T> __attribute__((noinline)) T sum(const T* x) {
  T total = 0;
  for (int i = 0; i < 64; ++i) total += x[i] * x[63 - i];
  return total;
}
template float sum(const float*);
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="AVX2 is x86-64's")
def test_the_audit_finds_code_that_older_processors_lack(tmp_path):
    (tmp_path / "sum.cpp").write_text(SUM)
    for option, found in (("-mavx2", ["_Z3sumIfET_PKS0_"]), ("-mavx", ["_Z3sumIfET_PKS0_"]), ("-msse2", [])):
        run("g++", "-O3", "-fvisibility=hidden", option, "-shared", "-fPIC", "sum.cpp", "-o", "sum.so", cwd=tmp_path)
        assert list(wheels.beyond_baseline(tmp_path / "sum.so")) == found


def test_a_missing_compiler_says_what_to_do(tree, tmp_path):
    done = run(sys.executable, "-c", BUILD.format("wheel"), tmp_path, cwd=tree, env={"CXX": "/nowhere/c++"}, ok=False)
    assert done.returncode != 0 and "RLKERN_NATIVE=0 pip install ." in done.stdout + done.stderr
