"""`make gpu` without a GPU: its steps with a declared clock and commands, and real ones. No torch here."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
from session import CLOSING, PytestLines, Session, group_limit, run_process  # noqa: E402

CARD = "Test Card 80GB"
PASSED = ("[gw0] [ 50%] PASSED tests/test_gpu.py::test_one[a b] ", "[gw1] [100%] PASSED tests/test_gpu.py::test_two ")
SKIPPED = ("[gw0] [ 50%] SKIPPED tests/test_gpu.py::test_one ", "tests/test_gpu.py::test_two SKIPPED (needs a GPU) [100%]")


class Command(NamedTuple):
    seconds: float
    code: int = 0
    lines: tuple[str, ...] = ()
    file: str = ""
    content: object = None
    waits: bool = False  # until it is cancelled
    after: str = ""  # does not end before this one has begun


def bench(vocab, stage):
    entry = {"forward": {"ms": 1.0, "of_copy": 0.9}, "backward": {"ms": 2.0, "of_copy": 0.9}, "total": {"ms": 3.0, "of_copy": 0.9}}
    case = {"device": "cuda", "dtype": "bf16", "rows": 8192, "vocab": vocab, "computes": "logp+entropy", "copy_gb_s": 3000.0, "copy_ms": 1.0}
    case |= {"results": [{"name": "rlkern", "kind": "rlkern", "in_place": False, **entry}], "skipped": {}}
    return Command(40, file=f"bench-{stage}.json", content={"machine": {"gpu": CARD, "cpu": "C", "torch": "2"}, "cases": [case]})


FIRST = {
    "gpu": Command(40, lines=("a warning", f"GPU: {CARD}")),
    "install": Command(60),
    "tests": Command(100, lines=PASSED),
    "variants": Command(30, file="variants.json", content={"summary": "the fastest shape is 4096/4"}),
    "bench": bench(1000, "first"),
}
SECOND = {
    "gpu": Command(20, lines=(f"GPU: {CARD}",)),
    "peers": Command(1),
    "compile": Command(30),
    "bench": bench(2000, "second"),
    "suite": Command(60, lines=PASSED),
    "memcheck": Command(30),
    "racecheck": Command(30),
    "keep": Command(20),
    "ncu": Command(20, file="ncu.txt", content="a profile"),
}
COMMANDS = {"first": FIRST, "second": SECOND}


class Machine:
    """The commands, and a clock that only they move, each thread's by itself as if they ran in parallel."""

    def __init__(self, commands: dict[str, Command], out: Path):
        self.commands, self.out = commands, out
        self.main = threading.current_thread()
        self.times = {self.main: 0.0}
        self.given: dict[str, float] = {}

    def clock(self) -> float:
        if threading.current_thread() is self.main:
            self.times = {self.main: max(self.times.values())}
        return self.times.get(threading.current_thread(), self.times[self.main])

    def run(self, command, env, limit, on_line, cancelled):
        name = self.name_of(command)
        self.given[name] = limit
        declared = self.commands[name]
        for line in declared.lines:
            on_line(line)
        if declared.file:
            (self.out / declared.file).write_text(json.dumps(declared.content))
        deadline = time.monotonic() + 5
        while declared.waits and not cancelled.is_set() or declared.after and declared.after not in self.given:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        self.times[threading.current_thread()] = self.clock() + min(declared.seconds, limit)
        return declared.code if declared.seconds <= limit and not declared.waits else None

    @staticmethod
    def name_of(command: list[str]) -> str:
        text = " ".join(command)
        marks = {"is_available": "gpu", " pip install": "install", "test_gpu.py": "tests", "-k (triton": "suite", "variants.py": "variants"}
        marks |= {
            "run.py": "bench",
            "peers.py": "peers",
            "--jobs": "compile",
            "memcheck": "memcheck",
            "racecheck": "racecheck",
            "kept_sets.py": "keep",
            "ncu ": "ncu",
        }
        (name,) = (name for mark, name in marks.items() if mark in text)
        return name


def hold(stage: str, folder: Path, **changed: Command):
    """Runs a stage; returns (exit status, session, machine)."""
    out = folder / "out"
    machine = Machine(COMMANDS[stage] | changed, out)
    session = Session(stage, out, folder / "results", machine.run, machine.clock)
    session.run(gpu.Plan(session, folder / "work").groups())
    return session.close(), session, machine


def written(folder: Path) -> dict:
    (path,) = (folder / "results").glob("*.json")
    assert path.name.startswith("test-card-80gb-20")
    assert json.loads((folder / "out" / path.name).read_text()) == json.loads(path.read_text())
    return json.loads(path.read_text())


def outcomes(document: dict, stage: str) -> dict[str, str]:
    return {step["step"]: step["outcome"] for step in document["stages"][stage]["steps"]}


@pytest.mark.parametrize("stage", COMMANDS)
def test_a_stage_takes_every_step_and_says_how_it_went(stage, tmp_path, capsys):
    status, session, machine = hold(stage, tmp_path)
    assert status == 0 and set(machine.given) == set(COMMANDS[stage])
    document = written(tmp_path)
    assert outcomes(document, stage) == dict.fromkeys(COMMANDS[stage], "ok") | {"tests" if stage == "first" else "suite": "ok, 2 passed"}
    assert document["machine"]["gpu"] == CARD and document["stages"][stage]["seconds"] == session.elapsed() > 0
    assert [c["stage"] for c in document["cases"]] == [stage]
    assert stage == "second" or document["variants"] == FIRST["variants"].content
    shown = capsys.readouterr().out
    assert "8192x" in shown and ("the fastest shape" in shown) == (stage == "first") and "test_one" not in shown
    assert "test_one" in (tmp_path / "out" / f"log-{stage}.txt").read_text()


@pytest.mark.parametrize("stage", COMMANDS)
def test_the_limits_of_a_stage_fit_into_it_even_if_all_steps_hang(stage, tmp_path):
    hanging = {name: command._replace(seconds=1e6) for name, command in COMMANDS[stage].items() if name != "gpu"}
    status, session, machine = hold(stage, tmp_path, **hanging)
    groups = gpu.Plan(session, tmp_path / "work").groups()
    limits = sum(map(group_limit, groups))
    assert limits + CLOSING <= session.total == {"first": 330, "second": 400}[stage]
    assert status == 1 and set(machine.given) == set(COMMANDS[stage]) and session.elapsed() + CLOSING <= session.total
    assert all(machine.given[step.name] >= step.limit for group in groups for chain in group for step in chain)
    assert len(written(tmp_path)["cases"]) == 1  # what was measured until then


def test_what_early_steps_leave_goes_to_those_that_measure(tmp_path):
    _, _, machine = hold("first", tmp_path)
    left = 330 - CLOSING - 60 - 100
    assert machine.given["variants"] == left - 60 and machine.given["bench"] == left - 30
    assert machine.given["tests"] == 150


@pytest.mark.parametrize("how", ["dies", "hangs"])
@pytest.mark.parametrize(("stage", "step"), [(s, step) for s in COMMANDS for step in COMMANDS[s] if step != "gpu"])
def test_a_step_that_dies_or_hangs_loses_nothing_of_the_others(stage, step, how, tmp_path, capsys):
    broken = COMMANDS[stage][step]._replace(lines=("the reason",), file="", **({"code": 7} if how == "dies" else {"seconds": 1e6}))
    status, session, machine = hold(stage, tmp_path, **{step: broken})
    assert status == 1 and set(machine.given) == set(COMMANDS[stage])
    document = written(tmp_path)
    ended = outcomes(document, stage)
    assert {name for name, outcome in ended.items() if not outcome.startswith("ok")} == {step}
    assert ended[step].startswith("failed, exit code 7" if how == "dies" else "stopped after")
    assert (len(document["cases"]), "variants" in document) == (step != "bench", stage == "first" and step != "variants")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"{stage} FAILED: {step} (") and "the reason" in last
    if step == "install":
        assert (tmp_path / "work" / "site" / "rlkern" / "triton_kernels" / "launch.py").exists()


@pytest.mark.parametrize(("stage", "step"), [("first", "tests"), ("second", "suite")])
@pytest.mark.parametrize("lines", [(), SKIPPED])
def test_a_run_of_tests_in_which_none_passed_has_failed(stage, step, lines, tmp_path, capsys):
    status, _, _ = hold(stage, tmp_path, **{step: Command(10, lines=lines)})
    assert status == 1 and f"{step} (failed, exit code 0, 0 passed" in capsys.readouterr().out.splitlines()[-1]


def test_a_stopped_run_of_tests_says_what_passed_and_what_failed_until_then(tmp_path, capsys):
    lines = (*PASSED, "[gw1] [ 60%] FAILED tests/test_gpu.py::test_three[x - y] ")
    status, _, _ = hold("first", tmp_path, tests=Command(1e6, lines=lines))
    shown = capsys.readouterr().out.splitlines()
    assert status == 1 and "stopped after 150 s, 2 passed, 1 failed" in shown[-1] and "test_three[x - y]" in shown[-1]


def test_a_worker_that_ends_after_a_failure_does_not_hide_its_reason():
    read = PytestLines()
    for line in ("[gw0] [ 66%] FAILED t.py::test_x ", "FAILED t.py::test_x - CUDA error", "FAILED t.py::test_x - worker 'gw0' crashed"):
        assert read.read(line)
    assert read.failures == {"t.py::test_x": "CUDA error; worker 'gw0' crashed"}


def test_the_second_stage_adds_to_the_first(tmp_path):
    hold("first", tmp_path)
    first = written(tmp_path)
    hold("second", tmp_path)
    both = written(tmp_path)
    assert both["stages"] == {**first["stages"], "second": both["stages"]["second"]} and both["variants"] == first["variants"]
    assert [(c["stage"], c["vocab"]) for c in both["cases"]] == [("first", 1000), ("second", 2000)]
    assert sum(1 for _ in (tmp_path / "out").iterdir()) <= 8 and all(p.is_file() for p in (tmp_path / "out").iterdir())
    hold("first", tmp_path, bench=bench(3000, "first"))  # once more: in place of what it had
    assert sorted((c["stage"], c["vocab"]) for c in written(tmp_path)["cases"]) == [("first", 3000), ("second", 2000)]


@pytest.mark.parametrize("stage", COMMANDS)
def test_without_a_card_nothing_else_runs(stage, tmp_path, capsys):
    beside = "install" if stage == "first" else "peers"
    lines = ("UserWarning: The NVIDIA driver on your system is too old", "PyTorch 2 sees no GPU here")
    status, _, machine = hold(stage, tmp_path, gpu=Command(3, 1, lines, after=beside), **{beside: Command(60, waits=True)})
    assert status == 1 and set(machine.given) == {"gpu", beside} and not list((tmp_path / "results").iterdir())
    shown = capsys.readouterr().out
    assert lines[0] in shown and lines[1] in shown.splitlines()[-1]


def test_chosen_steps_come_with_what_they_need(tmp_path):
    session = Session("second", tmp_path / "out", tmp_path / "results")
    chosen = gpu.choose(gpu.Plan(session, tmp_path / "work").groups(), {"ncu", "suite"})
    assert [[[step.name for step in chain] for chain in group] for group in chosen] == [[["gpu"], ["peers"]], [["suite"]], [["ncu"]]]


def test_the_files_that_the_plan_names_exist():
    assert all((ROOT / file).exists() for file in gpu.SUITE)
    on_a_card = {f"tests/{path.name}" for path in (ROOT / "tests").glob("test_gpu*.py") if "pytest.mark.gpu" in path.read_text()}
    assert on_a_card <= set(gpu.TESTS) | {"tests/test_gpu_harness.py"}


def test_real_commands_end_fail_hang_and_are_cancelled(tmp_path):
    def run(code, limit=30.0, cancelled=None):
        lines = []
        command = [sys.executable, "-c", code]
        return run_process(command, dict(os.environ), limit, lines.append, cancelled or threading.Event()), lines

    assert run("print('hello')") == (0, ["hello"])
    assert run("import sys; sys.exit('the reason')") == (1, ["the reason"])
    begun = time.monotonic()
    assert run("import time; print('begun', flush=True); time.sleep(60)", limit=0.5) == (None, ["begun"])
    cancelled = threading.Event()
    threading.Timer(0.3, cancelled.set).start()
    assert run("import time; time.sleep(60)", cancelled=cancelled)[0] is None
    assert time.monotonic() - begun < 20
    assert run_process([str(tmp_path / "absent")], {}, 5, print, threading.Event()) == 127


def test_a_kill_of_everything_loses_nothing_that_was_measured(tmp_path):
    script = f"""
import json, os, pathlib, sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
from session import Session, Step
folder = pathlib.Path({str(tmp_path)!r})
session = Session("first", folder / "out", folder / "results")
measures = "import pathlib; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])".replace("sys", "__import__('sys')")
document = json.dumps({bench(1000, "first").content!r})
waits = "import os, time; print('waiting', flush=True)\\nwhile os.getppid() == " + str(os.getpid()) + ": time.sleep(0.05)"
commands = {{"gpu": ["print('GPU: {CARD}')"], "bench": [measures, str(folder / "out" / "bench-first.json"), document], "tests": [waits]}}
steps = [Step(name, 60, lambda _, c=command: [sys.executable, "-c", *c]) for name, command in commands.items()]
session.run([[[step]] for step in steps])
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("waiting"):
            break
    process.send_signal(signal.SIGKILL)
    assert process.wait(10) == -signal.SIGKILL
    process.stdout.close()
    document = written(tmp_path)
    assert [s["step"] for s in document["stages"]["first"]["steps"]] == ["gpu", "bench"] and document["cases"][0]["vocab"] == 1000
    assert (tmp_path / "out" / "log-first.txt").read_text().splitlines()[-1] == "waiting"


TINY = """
import pytest
@pytest.mark.parametrize("x", [1, 2], ids=["a b", "FAILED - c"])
def test_good(x): pass
def test_bad(): assert 1 == 2, "the reason"
def test_skipped(): pytest.skip("needs a GPU")
@pytest.mark.xfail
def test_expected(): assert False
@pytest.fixture
def broken(): raise ValueError("no fixture")
def test_error(broken): pass
"""


@pytest.mark.parametrize("workers", [(), ("-p", "xdist.plugin", "-n", "1")], ids=["alone", "xdist"])
def test_lines_of_pytest_are_counted(workers, tmp_path):
    if workers:
        pytest.importorskip("xdist")
    (tmp_path / "test_tiny.py").write_text(TINY)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--no-header", *workers, "test_tiny.py"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"COLUMNS": "200", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    lines = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True).stdout.splitlines()
    read = PytestLines()
    shown = [line for line in lines if read.read(line)]
    assert read.counts == {"passed": 2, "failed": 1, "skipped": 1, "xfail": 1, "error": 1} and read.tally() == "2 passed, 1 failed, 1 error"
    failures = {name.split("::")[1]: why.partition("\n")[0] for name, why in read.failures.items()}
    assert failures == {"test_bad": "AssertionError: the reason", "test_error": "ValueError: no fixture"}
    assert "2 passed" in shown[-1] and len(shown) == 5  # two as they happen, two with their reasons, the sum


def test_peers_are_unpacked_and_a_broken_one_is_a_line(tmp_path):
    def unpack():
        command = [sys.executable, str(ROOT / "benchmarks" / "peers.py"), str(tmp_path / "peers"), str(tmp_path / "target")]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stdout

    status, said = unpack()
    assert status == 0 and "holds no wheel" in said
    (tmp_path / "peers").mkdir()
    with zipfile.ZipFile(tmp_path / "peers" / "one-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("one/kernels.py", "x = 1")
    with tarfile.open(tmp_path / "peers" / "two-1.0.tar.gz", "w:gz") as archive:
        for name in ("two-1.0/two/ops.py", "two-1.0/csrc/big.cu", "two-1.0/setup.py", "two-1.0/two/../../escaped.py"):
            info = tarfile.TarInfo(name)
            info.size = 5
            archive.addfile(info, io.BytesIO(b"y = 2"))
    assert unpack()[0] == 0
    assert sorted(str(p.relative_to(tmp_path / "target")) for p in (tmp_path / "target").rglob("*.*")) == ["one/kernels.py", "two/ops.py"]
    (tmp_path / "peers" / "broken.whl").write_text("no archive")
    status, said = unpack()
    assert status == 1 and "broken.whl: BadZipFile" in said and "unpacked two-1.0.tar.gz" in said


@pytest.mark.slow
def test_the_scripts_take_what_the_plan_gives_them(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--stage", "second", "--rehearse", "--steps", "bench,ncu"]
    done = subprocess.run(command, env=os.environ | {"OUT": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0 and "none failed" in done.stdout.splitlines()[-1], done.stdout
    assert {path.name for path in tmp_path.iterdir()} >= {"bench-second.json", "log-second.txt", "ncu.txt"}


def test_some_steps_again_leave_the_other_results_alone(tmp_path):
    hold("first", tmp_path)
    before = written(tmp_path)
    machine = Machine(COMMANDS["first"] | {"tests": FIRST["tests"]._replace(code=1)}, tmp_path / "out")
    session = Session("first", tmp_path / "out", tmp_path / "results", machine.run, machine.clock)
    session.run(gpu.choose(gpu.Plan(session, tmp_path / "work").groups(), {"tests"}))
    assert session.close() == 1 and "bench" not in machine.given
    after = written(tmp_path)
    assert after["cases"] == before["cases"] and after["variants"] == before["variants"]
    steps = [outcomes(document, "first") for document in (before, after)]
    assert steps[1].keys() == steps[0].keys() and [name for name in steps[0] if steps[0][name] != steps[1][name]] == ["tests"]
    assert (tmp_path / "out" / "bench-first.json").exists()


def test_a_step_that_there_is_not_is_refused(capsys):
    steps = {step.name for stage in COMMANDS for group in plan_of(stage) for chain in group for step in chain}
    assert steps == {*gpu.CHOICE, "gpu", "install", "peers"}
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--steps", "tests,bnech"])
    assert stopped.value.code == 2 and "unknown step bnech; the steps are tests," in capsys.readouterr().err


def plan_of(stage):
    with tempfile.TemporaryDirectory() as folder:
        session = Session(stage, Path(folder) / "out", Path(folder) / "results")
        groups = gpu.Plan(session, Path(folder) / "work").groups()
        session.log.close()
    return groups


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("stops", [signal.SIGTERM, signal.SIGINT], ids=["terminated", "interrupted"])
def test_whoever_stops_it_stops_its_steps(stops, tmp_path):
    """Of steps beside each other, with children of their own."""
    mark = f"{tmp_path}/alive"
    child = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', '{mark}']); time.sleep(60)"
    script = f"""
import signal, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
from session import Session, Step
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
session = Session("second", Path({str(tmp_path)!r}) / "out", Path({str(tmp_path)!r}) / "results")
steps = [Step(name, 60, lambda limit: [sys.executable, "-c", {child!r}]) for name in ("suite", "memcheck")]
print("begun", flush=True)
session.run([[[steps[0]], [steps[1]]]])
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL)
    assert process.stdout.readline() == "begun\n"
    children = alive(mark, at_least=2)
    process.send_signal(stops)
    assert len(children) == 2 and process.wait(15) != 0
    assert alive(mark, at_least=0) == []


def alive(mark: str, at_least: int) -> list[str]:
    """Processes with this as their last argument; waits until there are so many, or none."""
    deadline = time.monotonic() + 15
    while True:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # ended in the meantime
                if path.read_bytes().endswith(mark.encode() + b"\0"):
                    found.append(path.parent.name)
        if (len(found) >= at_least if at_least else not found) or time.monotonic() > deadline:
            return found
        time.sleep(0.05)
