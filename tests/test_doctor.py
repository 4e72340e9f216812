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
import rlkern.doctor as report
from rlkern import backends, requires
from rlkern.__main__ import main
from rlkern.backends import native_library
from rlkern.doctor import doctor, machine, speed
from rlkern.doctor.findings import Finding, findings
from rlkern.doctor.self_test import TOLERANCE, VOCAB, instruction_set, self_test
from rlkern.requires import check_packages

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


@pytest.mark.parametrize(
    ("function", "place", "value"),
    [
        ("token_stats_forward", 2, None),  # the mask
        ("token_stats_forward", 3, 1.0),  # the temperature
        ("token_stats_backward", 2, None),
        ("token_stats_backward", 4, -100),  # ignore_index
        ("pair_forward", 3, None),
        ("pair_forward", 4, 1.0),
        ("pair_forward", 5, 1.0),  # the other temperature
        ("pair_forward", 8, 0.5),  # beta
        ("pair_backward", 5, 1.0),
        ("sampler_threshold", 2, 1.0),
        ("sampler_threshold", 4, 1.0),  # top_p
        ("sampler_threshold", 3, 777),  # top_k
        ("sampler_threshold", 5, -torch.inf),  # min_p
        ("token_stats_forward", 8, 0.0),  # the softcap
        ("token_stats_backward", 9, 0.0),
        ("did_entropy_forward", 3, 2.0),
        ("row_moments_forward", 1, torch.zeros(12, 1, dtype=torch.int64)),  # the targets
    ],
)
def test_it_finds_an_argument_that_a_kernel_ignores(monkeypatch, function, place, value):
    native = backends.load("native")
    right = getattr(native, function)
    monkeypatch.setattr(native, function, lambda *args, **kw: right(*args[:place], value, *args[place + 1 :], **kw))
    assert self_test("native").wrong


@pytest.mark.parametrize("function", ["token_stats_forward", "token_stats_backward", "pair_forward", "pair_backward"])
def test_it_finds_a_last_logit_that_is_not_read(monkeypatch, function):
    native = backends.load("native")
    right = getattr(native, function)
    monkeypatch.setattr(native, function, lambda logits, *args, **kw: right(logits.clone().index_fill_(-1, torch.tensor(VOCAB - 1), -9), *args, **kw))
    assert self_test("native").wrong


@pytest.mark.parametrize(("error", "wrong"), [(0.5, False), (3.0, True), (torch.nan, True), (torch.inf, True)])
def test_a_tolerance(monkeypatch, error, wrong):
    right = backends.load("native").row_moments_forward

    def off(logits, targets, mask, ignore_index, out):
        right(logits, targets, mask, ignore_index, out)
        out[1].view(-1)[3] += error * TOLERANCE[torch.float32] * (1 + out[1].view(-1)[3])

    monkeypatch.setattr(backends.load("native"), "row_moments_forward", off)
    assert [line for line in self_test("native").wrong if line.startswith("row_moments of float32")] != [] if wrong else not self_test("native").wrong


def test_the_instruction_set_comes_back():
    native = backends.load("native")
    before = native.isa()
    with instruction_set("baseline"):
        assert native.isa() == "baseline"
    assert native.isa() == before


def test_a_note_alone_is_nothing_wrong(monkeypatch, capsys):
    notes = [Finding(False, "a note", "mend it"), Finding(True, "a fault", "mend this")]
    monkeypatch.setattr(report, "_self_tests", lambda: [])
    monkeypatch.setattr(report, "findings", lambda: notes[:1])
    code, said = doctored(capsys)
    assert code == 0 and "rlkern works on this machine" in said
    monkeypatch.setattr(report, "findings", lambda: notes)
    code, said = doctored(capsys)
    assert code == 1 and "1 thing is wrong" in said
    assert said.index("WRONG: a fault\n    mend this") < said.index("note: a note\n    mend it")


def test_sides_that_disagree(monkeypatch, capsys):
    monkeypatch.setattr(speed, "compare", lambda *_: speed.Comparison((2, 3), False, 1.0, 2.0))
    found = list(report._speed(1.0))
    assert [f.wrong for f in found] == [True, False] * 2 and "compute different numbers" in found[0].what and "slower" in found[1].what


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("usable_cores", 0, "more threads"),
        ("openmp_libraries", ["/lib/libgomp.so.1", "/lib/libiomp5.so"], "2 OpenMP libraries are loaded"),
        ("has_nvidia_device", True, "there is an NVIDIA card, and this torch"),
    ],
)
def test_facts_and_what_is_said_of_them(monkeypatch, name, value, found):
    if torch.cuda.is_available():
        pytest.skip("of a machine without a GPU")
    for fact, usual in (("usable_cores", 10**6), ("openmp_libraries", []), ("has_nvidia_device", False)):
        monkeypatch.setattr(machine, fact, lambda usual=usual: usual)
    assert not any(found in f.what for f in findings())
    monkeypatch.setattr(machine, name, lambda: value)
    (of_it,) = (f for f in findings() if found in f.what)
    assert not of_it.wrong and of_it.mend


def test_old_triton(monkeypatch):
    monkeypatch.setattr(machine, "version_of", lambda name: {"triton": "3.1.0"}.get(name))
    assert any("Triton 3.1.0 is older than 3.2" in f.what for f in findings())


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
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    assert not next(f for f in findings() if "CPU kernels" in f.what).wrong  # tensors are on the GPU
    for version, mend in ((None, "pip install 'triton>=3.2'"), ("3.9.0", "pip install --force-reinstall --no-deps 'triton>=3.2'")):
        monkeypatch.setattr(machine, "version_of", lambda name, version=version: version if name == "triton" else None)
        assert Finding(True, "no GPU kernels: No module named 'triton'", mend) in list(findings())


def test_a_source_tree_that_hides_an_installation(monkeypatch, tmp_path):
    other = tmp_path / "rlkern"
    other.mkdir()
    (other / "__init__.py").touch()
    (other / "_cpu.so").touch()
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setitem(backends._loaded, "native", ImportError("rlkern was installed without its CPU kernels"))
    assert any(f.wrong and f"hides the installation in {other}" in f.what for f in findings())


def test_what_the_environment_chooses(monkeypatch):
    def about(variable):
        return [(f.wrong, f.mend) for f in findings() if variable in f.what]

    with rlkern.use_backend("reference"):
        assert about("RLKERN_BACKEND=reference") == [(False, "unset RLKERN_BACKEND")]
    monkeypatch.setattr(backends, "select", lambda device: (_ for _ in ()).throw(RuntimeError("backend 'triton' runs on GPU tensors")))
    with rlkern.use_backend("native"):
        assert about("RLKERN_BACKEND=native: backend 'triton' runs on GPU tensors") == [(True, "unset RLKERN_BACKEND")]
    monkeypatch.setitem(backends._loaded, "native", ImportError("RLKERN_CPU_ISA: 'x' is unknown"))
    assert about("RLKERN_CPU_ISA") == [(not torch.cuda.is_available(), "unset RLKERN_CPU_ISA")]


def test_two_versions(monkeypatch):
    monkeypatch.setattr(machine, "version_of", lambda name: "0.0.9" if name == "rlkern" else None)
    (found,) = (f for f in findings() if "0.0.9" in f.what)
    assert found.wrong and found.mend.startswith("pip install -e ." if machine.from_checkout() else "leave or remove")


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
    assert capsys.readouterr().err.strip().splitlines()[-1].endswith("--seconds must be a number from 0 on, got -1.0")


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
        check_packages()


@pytest.mark.parametrize("version", ["2.6.0", "2.10.0a0+git1", "3.0", "dev"])
def test_newer_pytorch(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    check_packages()


def test_without_numpy(monkeypatch):
    monkeypatch.setattr(requires, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="rlkern needs numpy, found none: pip install numpy"):
        check_packages()


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
    (folder / name).write_bytes(b"<html>no such file</html>")
    assert load_error().startswith(f"{name} does not load here (")


@pytest.mark.parametrize("part", [20, 1000, 300_000, -1])
def test_a_library_that_is_cut_off(folder, part):
    """Loading it would end the process."""
    whole = Path(pytest.importorskip("rlkern.backends.native")._cpu.__file__)
    if whole.read_bytes()[:4] != b"\x7fELF":
        pytest.skip("no ELF file")
    (folder / whole.name).write_bytes(whole.read_bytes()[:part])
    assert load_error() == f"{whole.name} is cut off"
    (folder / whole.name).write_bytes(whole.read_bytes())
    assert native_library.load().isa()


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
