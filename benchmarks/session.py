"""A stage of `make gpu`: steps with time limits, whose results are kept whatever becomes of the others."""

import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from table import overview

ROOT = Path(__file__).resolve().parent.parent
TOTALS = {"first": 330, "second": 400}  # seconds
# What a stage leaves beside its results, which are two files more.
FILES = {
    "first": {"bench": "bench-first.json", "variants": "variants.json", "log": "log-first.txt"},
    "second": {"bench": "bench-second.json", "keep": "keep.json", "ncu": "ncu.txt", "log": "log-second.txt"},
}
CAUSE = re.compile(r"error|exception|invalid|race reported", re.IGNORECASE)
CLOSING = 5  # seconds at the end of a stage, to write what it found


class Step(NamedTuple):
    name: str
    limit: float  # seconds; what is not over by then is stopped
    command: Callable[[float], list]  # of the seconds that the step is given
    env: dict = {}
    tests: bool = False  # pytest: its results are counted, and none passed is a failure
    elastic: bool = False  # may also use what earlier steps left of their time
    least: float = 5  # seconds; with less it is not begun
    required: bool = False  # without it everything else is pointless
    otherwise: Callable[[], None] | None = None  # what to do where it fails


Group = list[list[Step]]  # chains of steps that run beside each other


def group_limit(group: Group) -> float:
    return max(sum(step.limit for step in chain) for chain in group)


def run_process(command: list[str], env: dict, limit: float, on_line: Callable[[str], None], cancelled: threading.Event) -> int | None:
    """Its exit code; None if it was stopped, at its limit or by `cancelled`. Lines of output to `on_line`."""
    # A process group, to stop what the command has started too; where possible no session, so that the end
    # of this one's is theirs as well.
    group = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    try:
        process = subprocess.Popen(command, cwd=ROOT, env=env, **streams, **group)
    except OSError as error:
        on_line(f"{command[0]}: {error}")
        return 127
    reader = threading.Thread(target=lambda: [on_line(line.rstrip("\n")) for line in process.stdout], daemon=True)
    reader.start()
    deadline = time.monotonic() + limit
    try:
        while process.poll() is None and time.monotonic() < deadline and not cancelled.is_set():
            cancelled.wait(0.05)
        return process.poll()
    finally:
        with suppress(ProcessLookupError):  # what it has started too, also where it has ended by itself
            os.killpg(process.pid, signal.SIGKILL)
        if process.poll() is None:
            with suppress(subprocess.TimeoutExpired):  # a process that hangs in the driver outlives its end for a while
                process.wait(10)
        reader.join(5)


class PytestLines:
    """Reads `pytest -v`, with or without xdist, by lines: a stopped run has told what passed until then."""

    _RESULT = re.compile(
        r"^\[gw\d+\] \[ *\d+%\] (?P<after>[A-Z]+) (?P<name>.+?) *$"
        r"|^(?P<alone>\S+::.*?) (?P<before>PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)(?: \(.*)?(?: +\[ *\d+%\])?$"
    )
    _SUMMARY = re.compile(r"^(FAILED|ERROR) (.+?)(?: - (.*))?$")

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.failures: dict[str, str] = {}

    def read(self, line: str) -> bool:
        """Takes a line in; says whether it is worth showing."""
        if result := self._RESULT.match(line):
            outcome, name = result["after"] or result["before"], result["name"] or result["alone"]
            self.counts[outcome.lower()] += 1
            if bad := outcome in ("FAILED", "ERROR"):
                self.failures.setdefault(name, "")
            return bad
        if summary := self._SUMMARY.match(line):
            # The second time where a worker ended after the failure.
            self.failures[summary[2]] = "; ".join(filter(None, [self.failures.get(summary[2]), summary[3]]))
            return True
        return line.startswith("=") and " in " in line

    def tally(self) -> str:
        shown = ["passed", *(name for name in ("failed", "error") if self.counts[name])]
        return ", ".join(f"{self.counts[name]} {name}" for name in shown)


class Session:
    """Runs the steps of a stage, writes as it comes what they print, measure, and how they end."""

    def __init__(self, stage: str, out: Path, results: Path, runner=run_process, clock=time.monotonic, started: float | None = None):
        self.stage, self.out, self.results, self.runner, self.clock = stage, out, results, runner, clock
        self.started = clock() if started is None else started
        self.total = TOTALS[stage]
        self.steps: list[dict] = []
        self.gpu: str | None = None
        self.cancelled = threading.Event()
        self.env = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "200"}
        self.lock = threading.RLock()
        for folder in (out, results):
            folder.mkdir(parents=True, exist_ok=True)
        self.begun: set[str] = set()
        self.log = open(out / FILES[stage]["log"], "w", buffering=1)

    def elapsed(self) -> float:
        return self.clock() - self.started

    def say(self, text: str, show: bool = True) -> None:
        with self.lock:
            self.log.write(text + "\n")
            if show:
                print(text, flush=True)

    def run(self, groups: list[Group]) -> None:
        for i, group in enumerate(groups):
            later = sum(group_limit(g) for g in groups[i + 1 :])
            if len(group) == 1:
                self._run_chain(group[0], later)
            else:
                # Not Thread.join: up to Python 3.12 one that is interrupted takes its thread for ended.
                ends = [self._start_chain(chain, later) for chain in group]
                try:
                    for end in ends:
                        end.wait()
                except BaseException:  # whoever stops this process means all that it has started
                    self.cancelled.set()
                    for end in ends:
                        end.wait()
                    raise

    def _start_chain(self, chain: list[Step], later: float) -> threading.Event:
        """Runs it in a thread; set when it has ended."""
        end = threading.Event()

        def run() -> None:
            try:
                self._run_chain(chain, later, beside=True)
            finally:
                end.set()

        threading.Thread(target=run).start()
        return end

    def _run_chain(self, chain: list[Step], later: float, beside: bool = False) -> None:
        for i, step in enumerate(chain):
            ok = self._run_step(step, later + sum(s.limit for s in chain[i + 1 :]), f"[{step.name}] " if beside else "")
            if not ok and step.otherwise:
                step.otherwise()
            if not ok and step.required:
                self.cancelled.set()

    def _run_step(self, step: Step, later: float, prefix: str) -> bool:
        if self.cancelled.is_set():
            return False
        left = self.total - CLOSING - self.elapsed()
        limit = min(left, max(step.limit, left - later) if step.elastic else step.limit)
        if limit < step.least:
            return self.record(step.name, "left out: the time for everything is spent")
        self.begun.add(step.name)
        if (name := FILES[self.stage].get(step.name)) is not None:  # what an earlier run left of it
            (self.out / name).unlink(missing_ok=True)
        command = [str(part) for part in step.command(limit)]
        self.say(f"\n=== {step.name} (limit {limit:.0f} s): {' '.join(command)}")
        results, causes, tail = PytestLines() if step.tests else None, [], deque(maxlen=6)

        def on_line(line: str) -> None:
            with self.lock:
                tail.append(line)
                if len(causes) < 6 and CAUSE.search(line):
                    causes.append(line)
                if line.startswith("GPU: "):
                    self.gpu = self.gpu or line.removeprefix("GPU: ")
                self.say(prefix + line, show=results.read(line) if results else True)

        begun = self.clock()
        code = self.runner(command, self.env | step.env, limit, on_line, self.cancelled)
        seconds = self.clock() - begun
        with self.lock:  # a reader that is late may still add lines
            if self.cancelled.is_set() and code is None:
                outcome = "skipped: a step that it needs failed"
            elif code is None:
                outcome = f"stopped after {limit:.0f} s"
            elif code == 0 and (results is None or results.counts["passed"]):
                outcome = "ok"
            else:
                outcome = f"failed, exit code {code}"
            failures = []
            if results:
                outcome += f", {results.tally()}"
                failures = [f"{name}: {why}" if why else name for name, why in results.failures.items()]
                failures = failures or ([f"last: {tail[-1]}"] if results.counts else [])
            return self.record(step.name, outcome, seconds, failures or list(dict.fromkeys([*causes, *tail])))

    def record(self, name: str, outcome: str, seconds: float = 0.0, evidence: list[str] | None = None) -> bool:
        ok = outcome.startswith(("ok", "skipped"))
        with self.lock:
            entry = {"step": name, "outcome": outcome, "seconds": round(seconds, 1)}
            self.steps.append(entry if ok else entry | {"evidence": evidence or []})
            self.say(f"=== {name}: {outcome}, {seconds:.0f} s")
            self.save()
        return ok

    def failed(self) -> list[dict]:
        return [step for step in self.steps if not step["outcome"].startswith(("ok", "skipped"))]

    def path(self) -> Path:
        slug = "-".join("".join(c if c.isalnum() else " " for c in self.gpu.lower()).split())
        return self.results / f"{slug}-{datetime.date.today()}.json"

    def written(self, step: str):
        """What a step of this run has written so far."""
        return read(self.out / FILES[self.stage][step]) if step in self.begun & FILES[self.stage].keys() else None

    def save(self) -> dict:
        """Puts its steps, cases and variants into the results of this card and day, for earlier ones."""
        if self.gpu is None:
            return {}
        with self.lock:
            bench, variants = self.written("bench") or {}, self.written("variants")
            document = read(self.path()) or {}
            machine = bench.get("machine") or document.get("machine") or {"gpu": self.gpu}
            stages, cases = document.get("stages", {}), document.get("cases", [])
            earlier = stages.get(self.stage, {}).get("steps", [])
            steps = list(({step["step"]: step for step in earlier} | {step["step"]: step for step in self.steps}).values())
            stages |= {self.stage: {"steps": steps, "seconds": round(self.elapsed(), 1)}}
            if bench.get("cases"):
                cases = [case for case in cases if case.get("stage") != self.stage] + [case | {"stage": self.stage} for case in bench["cases"]]
            document |= {"machine": machine, "stages": stages, "cases": cases}
            if variants:
                document["variants"] = variants
            for folder in {self.results, self.out}:
                write(folder / self.path().name, document)
            return document

    def close(self) -> int:
        """Prints figures, failures, ends of steps, briefly: long output loses its start. 1 if one failed."""
        document = self.save()
        cases = [case for case in document.get("cases", []) if case["stage"] == self.stage]
        if cases:
            self.say(f"\n{overview(cases)}")
        variants = document.get("variants") if "variants" in FILES[self.stage] else None
        if isinstance(variants, dict) and isinstance(variants.get("summary"), str):
            self.say("\n" + variants["summary"][-5000:])
        for step in self.failed():
            self.say(f"\n{step['step']}: {step['outcome']}")
            lines = step["evidence"]
            self.say("\n".join(f"  {line[:180]}" for line in [*lines[:10], *([f"and {len(lines) - 10} more"] if len(lines) > 10 else [])]))
        self.say(f"\n{self.stage}: {self.gpu or 'no GPU'}, {self.elapsed():.0f} s of {self.total}")
        self.say("\n".join(f"  {s['step']:10} {s['seconds']:6.1f} s  {s['outcome']}" for s in self.steps))
        if document:
            self.draw(document)
            self.say(f"wrote {self.path()} and what is in {self.out}")
        failed = [f"{step['step']} ({', '.join([step['outcome'], *step['evidence'][-1:]])[:200]})" for step in self.failed()]
        names = ", ".join(step["step"] for step in self.steps)
        self.say(f"{self.stage} FAILED: {'; '.join(failed)}" if failed else f"{self.stage}: {names}: none failed")
        self.log.close()
        return 1 if failed else 0

    def draw(self, document: dict) -> None:
        """An extra: what goes wrong here costs no result."""
        try:
            from plot import plot

            plot(document, str(self.path().with_suffix(".png")))
            if self.out != self.results:
                shutil.copy(self.path().with_suffix(".png"), self.out)
        except Exception as error:
            self.say(f"no figure: {type(error).__name__}: {error}")


def read(path: Path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def write(path: Path, document: dict) -> None:
    """As JSON. A reader, or whoever comes after a kill, finds the old file or the new one, whole."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(part, path)
