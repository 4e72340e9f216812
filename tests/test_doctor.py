"""`python -m rlkern doctor`, and what broken installations say."""

import ctypes
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import rlkern
from rlkern import backends
from rlkern.__main__ import main
from rlkern.backends import native_library
from rlkern.doctor import doctor, machine, speed
from rlkern.doctor.findings import findings
from rlkern.requires import check_torch

ROOT = Path(__file__).resolve().parent.parent


def test_it_finds_nothing_here(capsys):
    code = doctor(seconds=0)
    said = capsys.readouterr().out
    assert code == 0, said
    assert "WRONG" not in said and "rlkern works on this machine" in said
    assert re.search(rf"^rlkern +{re.escape(rlkern.__version__)}.*\n(.*\n)*torch +{re.escape(torch.__version__)}", said)
    for isa in backends.load("native").isas():
        assert re.search(rf"native {isa} +\d\d checks passed", said)
    assert re.search(r"reference +\d\d checks passed", said)


def doctored(capsys) -> tuple[int, str]:
    code = doctor(seconds=0)
    return code, capsys.readouterr().out


def test_it_finds_wrong_numbers(monkeypatch, capsys):
    native = backends.load("native")
    right = native.token_stats_backward

    def wrong(*args, **kwargs):
        right(*args, **kwargs)
        args[8].view(-1)[5] += 1e-2  # one entry of a gradient

    monkeypatch.setattr(native, "token_stats_backward", wrong)
    code, said = doctored(capsys)
    assert code == 1 and re.search(r"WRONG: native \w+: token_stats of float32: off by \d", said)
    assert "things are wrong" in said


def test_it_goes_on_after_an_error(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("illegal instruction\nmore")

    monkeypatch.setattr(backends.load("native"), "pair_forward", broken)
    code, said = doctored(capsys)
    assert code == 1 and "token_divergence, jsd of float32: RuntimeError: illegal instruction\n" in said
    assert re.search(r"reference +\d\d checks passed", said)


def test_a_missing_backend_and_what_mends_it(monkeypatch):
    monkeypatch.setattr(machine, "elsewhere", lambda: None)
    monkeypatch.setitem(backends._loaded, "native", ImportError("rlkern was installed without its CPU kernels"))
    (found,) = (f for f in findings() if "CPU kernels" in f.what)
    assert found.wrong != torch.cuda.is_available()
    assert found.what == "no CPU kernels: rlkern was installed without its CPU kernels" and "pip install" in found.mend

    monkeypatch.setitem(backends._loaded, "triton", ImportError("No module named 'triton'"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not next(f for f in findings() if "CPU kernels" in f.what).wrong  # tensors are on the GPU
    found = next(f for f in findings() if "GPU" in f.what)
    assert found == (True, "no GPU kernels: No module named 'triton'", "pip install 'triton>=3.2'")


def test_a_source_tree_that_hides_an_installation(monkeypatch, tmp_path):
    other = tmp_path / "rlkern"
    other.mkdir()
    (other / "__init__.py").touch()
    (other / "_cpu.so").touch()
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setitem(backends._loaded, "native", ImportError("rlkern was installed without its CPU kernels"))
    assert any(f.wrong and f"{other} has them" in f.what for f in findings())


def test_the_comparison_of_speed():
    found = speed.compare(torch.bfloat16, "cpu", seconds=0)
    assert found.eager_ms > 0 and found.rlkern_ms > 0


def test_the_two_sides_compute_the_same():
    logits, ids = torch.randn(5, 33, requires_grad=True), torch.arange(5)
    ours, eager = (function(logits, ids) for function in speed.SIDES)
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)


def test_a_bad_option_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rlkern", "doctor", "--seconds", "-1"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err.strip().splitlines()[-1].endswith("--seconds must be at least 0, got -1.0")


# --- broken installations -----------------------------------------------------------------------------------


def test_without_pytorch_one_line_says_so():
    """-S leaves out all that is installed."""
    done = subprocess.run([sys.executable, "-S", "-m", "rlkern", "doctor"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    assert "rlkern needs PyTorch 2.6 or newer, found none: pip install 'torch>=2.6'" in done.stderr


@pytest.mark.parametrize("version", ["2.5.1+cu124", "1.13.0"])
def test_old_pytorch(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ImportError, match=re.escape(f"rlkern needs PyTorch 2.6 or newer, found {version}: pip install")):
        check_torch()


@pytest.mark.parametrize("version", ["2.6.0", "2.10.0a0+git1", "3.0"])
def test_newer_pytorch(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    check_torch()


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """An empty folder in place of the package, for the compiled library."""
    monkeypatch.setattr(rlkern, "__path__", [str(tmp_path)])
    monkeypatch.setattr(native_library, "FOLDER", tmp_path)
    monkeypatch.delitem(sys.modules, "rlkern._cpu", raising=False)
    monkeypatch.delattr(rlkern, "_cpu", raising=False)
    return tmp_path


def load_error() -> str:
    with pytest.raises(ImportError) as error:
        native_library.load()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_library_that_is_not_there(folder):
    assert load_error() == "rlkern was installed without its CPU kernels"


def test_a_library_for_another_platform(folder):
    (folder / "_cpu.cpython-39-aarch64-linux-gnu.so").touch()
    assert re.fullmatch(
        r"the CPU kernels here are for another Python or platform \(_cpu.cpython-39-aarch64-linux-gnu.so\), this is cpython 3\.\d+ on linux.*",
        load_error(),
    )


def test_a_damaged_library(folder):
    name = f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    (folder / name).write_bytes(b"\x7fELF, and then nothing")
    assert load_error().startswith(f"{name} does not load here (")


@pytest.mark.parametrize("system_has_one", [True, False])
def test_a_pytorch_that_keeps_its_openmp_to_itself(monkeypatch, folder, system_has_one):
    asked, loaded = [], object()

    def import_module(name):
        asked.append(name)
        if len(asked) == 1:
            raise ImportError("_cpu.so: undefined symbol: GOMP_parallel")
        return loaded

    def library(name, mode):
        assert mode == ctypes.RTLD_GLOBAL
        asked.append(name)
        if not system_has_one:
            raise OSError("libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr(native_library.importlib, "import_module", import_module)
    monkeypatch.setattr(native_library.ctypes, "CDLL", library)
    if system_has_one:
        assert native_library.load() is loaded and asked == ["rlkern._cpu", "libgomp.so.1", "rlkern._cpu"]
    else:
        assert load_error().startswith("no OpenMP library for the CPU kernels, neither torch's nor the system's (libgomp.so.1: cannot")


def test_the_library_takes_openmp_from_pytorch():
    """No OpenMP of its own: two would have a set of threads each."""
    native = pytest.importorskip("rlkern.backends.native")
    if not shutil.which("readelf"):
        pytest.skip("no readelf")
    needed = subprocess.run(["readelf", "-d", native._cpu.__file__], capture_output=True, text=True, check=True).stdout
    assert "libstdc++" in needed and "omp" not in needed


def test_auto_says_once_that_it_computes_in_plain_pytorch(monkeypatch, recwarn):
    monkeypatch.setattr(backends, "_told", set())
    monkeypatch.setitem(backends._loaded, "native", ImportError("no compiler at build time"))
    with rlkern.use_backend("auto"):
        for _ in range(3):
            assert backends.select(torch.device("cpu")) is backends.reference
    (warning,) = recwarn
    assert re.search(r"plain PyTorch.*'native' is missing \(no compiler at build time\).*python -m rlkern doctor", str(warning.message))
    with rlkern.use_backend("reference"):
        backends.select(torch.device("cpu"))
    assert len(recwarn) == 1
