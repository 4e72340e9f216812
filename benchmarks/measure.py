"""Timing and memory on GPU and CPU. Each contender runs once a round: a drifting clock hits all alike."""

import argparse
import copy
import ctypes
import datetime
import functools
import gc
import itertools
import os
import platform
import subprocess
import time
from statistics import median, quantiles
from typing import NamedTuple

import torch

import rlkern
from rlkern import reference
from rlkern.backends import gradient_memory

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PAIRS = ("reverse_kl", "forward_kl", "jsd", "reverse_kl+logp+entropy")  # of two rows: a kind of token_divergence, and what else
RESULTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results")
FEW_ROWS_BYTES = 64 << 20  # logits below this take a GPU less time than the host takes to queue the launches
_FLUSH_BYTES = 512 << 20
_HEAD_START = 10_000_000  # cycles, 5 ms at 2 GHz: after another contender's long step the host takes over 1 ms to queue a forward and a backward


OPTIONS = {
    "device": {"choices": ("cpu", "cuda"), "default": "cuda" if torch.cuda.is_available() else "cpu"},
    "dtype": {"choices": tuple(DTYPES), "default": "bf16"},
    "rounds": {"type": int, "default": 11},
    "threads": {"type": int, "help": "CPU threads"},
}


def argument_parser(doc: str, *options: str, **defaults) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in options:
        parser.add_argument(f"--{name}", **OPTIONS[name])
    parser.set_defaults(**defaults)
    return parser


def arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command's; ends the process, with 0, where it asks for a GPU that is not there."""
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing measured (--device cpu measures this processor)")
        parser.exit()
    if getattr(args, "threads", None):
        torch.set_num_threads(args.threads)
    return args


class Case(NamedTuple):
    device: str  # "cpu" or "cuda"
    dtype: str  # a key of DTYPES
    rows: int
    vocab: int
    computes: str  # which contenders: contenders.LOGP, contenders.BOTH or one of PAIRS

    def __str__(self) -> str:
        return f"{self.computes}, {self.dtype}, N = {self.rows:,}, V = {self.vocab:,}, {self.device}"


def few_rows(case: Case) -> bool:
    return logits_bytes(case) < FEW_ROWS_BYTES


class _GpuClock:
    """Times phases with events. A read of half a gigabyte first leaves no input and no unwritten line in the
    cache. Then the card sleeps while the host queues the launches, whose cost is no kernel time."""

    def __init__(self):
        self.flush = torch.zeros(_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")

    def __call__(self, *phases) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(phases) + 1)]
        self.flush.max()
        torch.cuda._sleep(_HEAD_START)
        events[0].record()
        value = None
        for phase, event in zip(phases, events[1:], strict=True):
            value = phase(value)
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]


def _cpu_clock(*phases) -> list[float]:
    times, value = [], None
    for phase in phases:
        start = time.perf_counter()
        value = phase(value)
        times.append((time.perf_counter() - start) * 1e3)
    return times


@functools.cache
def clock(device: str):
    return _GpuClock() if device == "cuda" else _cpu_clock


class Replay:
    """Zero-argument calls, captured in turn into one CUDA graph: `ms()` is the time of one call, hostless.
    Each needs its own tensors, or finds an earlier one's in the cache. On a CPU the calls just run."""

    def __init__(self, calls, device: str = "cuda"):
        self.device, self.calls, self.kept = device, list(calls), []
        if device != "cuda":
            self.run = self._run_all
            self.run()
            return
        # Compiles first. Then whatever waits for the card raises: a capture that fails halfway would leave
        # PyTorch's allocator unusable.
        side, mode = torch.cuda.Stream(), torch.cuda.get_sync_debug_mode()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._run_all()
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                self._run_all()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.kept = self._run_all()  # results that live share no memory, so each call writes to its own
        self.run = graph.replay

    def _run_all(self) -> list:
        return [call() for call in self.calls]

    def ms(self) -> float:
        return clock(self.device)(lambda _: self.run())[0] / len(self.calls)


def rotation(case: Case) -> int:
    """How many tensors of the logits' size a replay takes: over four times the cache, within reason."""
    if case.device != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return min(64, 4 * cache // logits_bytes(case) + 1)


def spread(values) -> float:
    """Half the distance between the quartiles, as a fraction of the median."""
    if len(values) < 4:
        return (max(values) - min(values)) / 2 / median(values)
    low, _, high = quantiles(values, n=4)
    return (high - low) / 2 / median(values)


def inputs(case: Case):
    """Logits, the targets or for PAIRS (other logits, targets), upstream gradients of all that is computed.

    Random: kernels can be faster on zeros. The other rows are independent: for close ones kernels have a
    faster path.
    """
    generator = torch.Generator(case.device).manual_seed(0)

    def logits():
        x = torch.empty(case.rows, case.vocab, dtype=DTYPES[case.dtype], device=case.device)
        for rows in x.split(max(1, (1 << 28) // case.vocab)):
            rows.copy_(torch.randn(rows.shape, generator=generator, device=case.device).mul_(2))
        return x

    x, pair = logits(), case.computes in PAIRS
    y = torch.randint(case.vocab, (case.rows,), generator=generator, device=case.device)
    grads = tuple(torch.randn(case.rows, generator=generator, device=case.device) for _ in range(3 if pair else 2))
    return x, (logits(), y) if pair else y, grads


def _gradient(outputs, x, grads):
    """One backward pass, the upstream gradients cut to what the contender returned (one peer drops a row)."""
    grads = [g[: out.shape[0]].to(out.dtype) for out, g in zip(outputs, grads, strict=False)]
    return torch.autograd.grad(outputs, x, grads)[0]


class _Run:
    """One contender on one case: `run(clock)` gives the milliseconds of the forward and of the backward."""

    def __init__(self, contender, case, x, y, grads, pristine):
        self.contender, self.case, self.x, self.y, self.grads, self.pristine = contender, case, x, y, grads, pristine
        self.times: list[tuple[float, ...]] = []
        self.peak = None
        self.error = None

    def phases(self):
        contender = self.contender
        x = self.x.detach().requires_grad_(contender.backward)

        def forward(_):
            return contender.forward(x, self.y)

        def backward(outputs):
            return _gradient(outputs, x, self.grads)

        return (forward, backward) if contender.backward else (forward,)

    def restore(self):
        if self.contender.in_place:
            self.x.copy_(self.pristine)

    def once(self, timer) -> tuple[float, ...]:
        times = tuple(timer(*self.phases()))
        self.restore()
        return times

    def warm_up(self, timer):
        """Compiles, and measures what needs measuring once: the first result's error, the peak memory."""
        first = self.phases()[0](None)[0].detach()
        self.restore()
        self.error = _error(first, self.case.computes, self.x, self.y)
        self.once(timer)
        self.peak = peak_memory(self.case.device, self.phases())
        self.restore()


class _ReplayedRun(_Run):
    """For few rows: replays forwards, then forwards with backwards; the backward is the difference."""

    forwards = both = None

    def replay_over(self, buffers) -> None:
        leaves = [(x.detach().requires_grad_(self.contender.backward), y) for x, y in buffers]
        self.forwards = Replay([functools.partial(self.contender.forward, *leaf) for leaf in leaves], self.case.device)
        if self.contender.backward:
            self.both = Replay([functools.partial(self._gradient_of, *leaf) for leaf in leaves], self.case.device)

    def _gradient_of(self, leaf, y):
        return _gradient(self.contender.forward(leaf, y), leaf, self.grads)

    def once(self, timer) -> tuple[float, ...]:
        if self.forwards is None:  # while warming up
            return super().once(timer)
        forward = self.forwards.ms()
        return (forward, max(self.both.ms() - forward, 1e-6)) if self.both else (forward,)


def _error(first, computes, x, y, sample=16) -> float | None:
    """Largest error of |logp| or the divergence against float64 over a few rows; None for a loss of all."""
    if first.shape[0] != x.shape[0]:
        return None
    rows = torch.linspace(0, x.shape[0] - 1, min(sample, x.shape[0])).long().to(x.device)
    if computes in PAIRS:
        exact = reference.token_divergence(x[rows].double(), y[0][rows].double(), computes.split("+")[0])
    else:
        exact = reference.token_stats(x[rows].double(), y[rows].unsqueeze(-1)).logp.squeeze(-1)
    return (first[rows].double().abs() - exact.abs()).abs().max().item()


def interleaved(contenders: dict, logits: torch.Tensor, rounds: int) -> tuple[dict[str, list], dict[str, int | None]]:
    """(milliseconds of each phase in each round, peak bytes) by name. A contender is called for its phases,
    which may overwrite the logits; its first run compiles, its second is for the memory."""
    device, pristine = logits.device.type, logits.clone()
    timer, times, peaks = clock(device), {name: [] for name in contenders}, {}

    def run(measured, phases):
        result = measured(*phases())
        logits.copy_(pristine)
        gc.collect()
        return result

    for name, phases in contenders.items():
        run(timer, phases)
        peaks[name] = run(lambda *phases: peak_memory(device, phases), phases)
    for _ in range(rounds):
        for name, phases in contenders.items():
            times[name].append(run(timer, phases))
    return times, peaks


def peak_memory(device: str, phases) -> int | None:
    """Bytes allocated at the highest point of a run, above what was there before (the logits)."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        functools.reduce(lambda value, phase: phase(value), phases, None)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return _cpu_peak_memory(phases)


def _cpu_peak_memory(phases) -> int | None:
    """By Linux, which keeps a process's largest resident size and resets it; PyTorch counts no CPU memory."""
    try:
        gradient_memory.release()  # what earlier runs freed would otherwise be used again, unseen
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = _resident("VmRSS")
        functools.reduce(lambda value, phase: phase(value), phases, None)
        return max(0, _resident("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def _resident(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field))


def logits_bytes(case: Case) -> int:
    return case.rows * case.vocab * DTYPES[case.dtype].itemsize


def passes(case: Case) -> dict[str, int]:
    """How often logits have to cross the bus. Forward they are read, backward read and a gradient written."""
    reads = 2 if case.computes in PAIRS else 1
    forward = 2 * reads if case.computes == "jsd" else reads  # the mixture needs both sums first
    return {"forward": forward, "backward": reads + 1, "total": forward + reads + 1}


def design_bytes(case: Case, phase: str) -> int:
    """Bytes that have to move."""
    return passes(case)[phase] * logits_bytes(case)


def run_case(case: Case, contenders, rounds: int, log=print, skip_slow=False, replayed: bool | None = None) -> dict:
    """JSON-ready: an entry for each contender on `case`, and the machine's own copy in the same rounds.
    `replayed`: times replays of CUDA graphs; by default few rows on a GPU."""
    timer = clock(case.device)
    replayed = case.device == "cuda" and few_rows(case) if replayed is None else replayed
    x, y, grads = inputs(case)
    pristine = x.clone()
    buffers = [(x.clone(), copy.deepcopy(y)) for _ in range(rotation(case))] if replayed else []
    runs, skipped = [], {}
    torch._dynamo.reset()
    for contender in contenders:
        if contender.computes != case.computes:
            continue
        if contender.slow and skip_slow:
            skipped[contender.name] = "left out: takes long to compile"
            continue
        if contender.in_place and replayed:
            skipped[contender.name] = "left out: replayed in place it would take its gradients for logits"
            continue
        run = (_ReplayedRun if replayed else _Run)(contender, case, x, y, grads, pristine)
        try:
            run.warm_up(timer)
            if replayed:
                run.replay_over(buffers)
            runs.append(run)
        except Exception as error:  # an out-of-memory or a peer's refusal is a result, not a reason to stop
            skipped[contender.name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error).strip() else ''}"
            log(f"  {contender.name}: {skipped[contender.name]}")
            x.copy_(pristine)
        gc.collect()
        if case.device == "cuda":
            torch.cuda.empty_cache()
    copies = []
    for _ in range(rounds):
        copies.append(timer(lambda _: pristine.copy_(x))[0])
        for run in list(runs):
            try:
                run.times.append(run.once(timer))
            except torch.OutOfMemoryError as error:  # fragmented by the others
                runs.remove(run)
                skipped[run.contender.name] = f"OutOfMemoryError: {str(error).splitlines()[0][:160]}"
                x.copy_(pristine)
    copy_gb_s = 2 * x.numel() * x.element_size() / median(copies) / 1e6
    measured = {**case._asdict(), "rounds": rounds, "replayed": replayed, "copy_ms": median(copies), "copy_gb_s": copy_gb_s}
    measured["passes"] = passes(case)["total"]
    measured["copy_of"] = f"{case.rows} x {case.vocab} {case.dtype}"
    return {**measured, "results": [_summary(run, case, copy_gb_s) for run in runs], "skipped": skipped}


def share_copy(measured: list[dict]) -> None:
    """Judges replayed cases by the copy of the largest case: a copy of few rows stays in the cache."""

    def case_of(entry):
        return Case(*(entry[field] for field in Case._fields))

    largest = max(measured, key=lambda entry: logits_bytes(case_of(entry)))
    for entry in measured:
        if entry["replayed"] and entry["copy_of"] != largest["copy_of"]:
            for result, phase in itertools.product(entry["results"], ("forward", "backward", "total")):
                if phase in result:
                    result[phase]["of_copy"] *= entry["copy_gb_s"] / largest["copy_gb_s"]
            entry |= {"copy_gb_s": largest["copy_gb_s"], "copy_of": largest["copy_of"]}
            entry["copy_ms"] = 2 * logits_bytes(case_of(entry)) / largest["copy_gb_s"] / 1e6


def _summary(run: _Run, case: Case, copy_gb_s: float) -> dict:
    contender = run.contender
    entry = {"name": contender.name, "kind": contender.kind, "in_place": contender.in_place, "logp_error": run.error, "peak_bytes": run.peak}
    phases = {"forward": [t[0] for t in run.times]}
    if contender.backward:
        phases |= {"backward": [t[1] for t in run.times], "total": [sum(t) for t in run.times]}
    for phase, times in phases.items():
        ms = median(times)
        entry[phase] = {"ms": ms, "spread": spread(times), "min_ms": min(times), "of_copy": design_bytes(case, phase) / ms / 1e6 / copy_gb_s}
    return entry


def machine() -> dict:
    """What a figure depends on, without what identifies a computer."""
    info = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        **{"python": platform.python_version(), "cpu": _cpu_model(), "threads": torch.get_num_threads()},
        **rlkern.backend_info(),
    }
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        info |= {"gpu": p.name, "gpu_memory_gb": round(p.total_memory / 1e9, 1), "multiprocessors": p.multi_processor_count, "driver": _driver()}
    return info


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.splitlines()[0].strip()
    except (OSError, IndexError, subprocess.TimeoutExpired):
        return "unknown"
