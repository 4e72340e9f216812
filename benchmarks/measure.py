"""Timing and memory, on a GPU and on a CPU, in interleaved rounds: every contender runs once per round, so that a drifting clock hits all alike."""

from __future__ import annotations

import ctypes
import datetime
import gc
import os
import platform
import statistics
import subprocess
import time
from typing import NamedTuple

import torch

import rlkern
from rlkern import reference, spare

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_FLUSH_BYTES = 512 << 20


class Case(NamedTuple):
    device: str  # "cpu" or "cuda"
    dtype: str  # a key of DTYPES
    rows: int
    vocab: int
    computes: str  # which contenders: contenders.LOGP or contenders.BOTH

    def __str__(self) -> str:
        return f"{self.computes}, {self.dtype}, N = {self.rows:,}, V = {self.vocab:,}, {self.device}"


class _GpuClock:
    """Times phases with events. A read of half a gigabyte goes first: it leaves no input and no unwritten line in the cache, and gives the host
    time to queue the launches, so that launch latency is not mistaken for kernel time."""

    def __init__(self):
        self.flush = torch.zeros(_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")

    def __call__(self, *phases) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(phases) + 1)]
        self.flush.max()
        events[0].record()
        value = None
        for phase, event in zip(phases, events[1:], strict=True):
            value = phase(value)
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]


class _CpuClock:
    def __call__(self, *phases) -> list[float]:
        times, value = [], None
        for phase in phases:
            start = time.perf_counter()
            value = phase(value)
            times.append((time.perf_counter() - start) * 1e3)
        return times


def clock(device: str):
    return _GpuClock() if device == "cuda" else _CpuClock()


def median(values):
    return statistics.median(values)


def spread(values) -> float:
    """Half the distance between the quartiles, as a fraction of the median."""
    if len(values) < 4:
        return (max(values) - min(values)) / 2 / median(values)
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2 / median(values)


def inputs(case: Case):
    """Logits, targets and upstream gradients for logp and entropy. Random, never zeros: kernels can be faster on those."""
    generator = torch.Generator(case.device).manual_seed(0)
    x = torch.empty(case.rows, case.vocab, dtype=DTYPES[case.dtype], device=case.device)
    for rows in x.split(max(1, (1 << 28) // case.vocab)):
        rows.copy_(torch.randn(rows.shape, generator=generator, device=case.device).mul_(2))
    y = torch.randint(case.vocab, (case.rows,), generator=generator, device=case.device)
    g_logp, g_entropy = (torch.randn(case.rows, generator=generator, device=case.device) for _ in range(2))
    return x, y, (g_logp, g_entropy)


def _gradient(outputs, x, grads):
    """One backward pass; the upstream gradients are cut to what the contender returned (one peer drops a row)."""
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
        """Compiles, and measures on the way what needs measuring once: the error of logp and the peak memory."""
        logp = self.phases()[0](None)[0].detach()
        self.restore()
        self.error = _logp_error(logp, self.x, self.y)
        self.once(timer)
        self.peak = peak_memory(self.case.device, self.phases())
        self.restore()


def _logp_error(logp, x, y, sample=16) -> float | None:
    """Largest error of |logp| against float64 over a few rows; None for a contender that returns something else (a GRPO loss)."""
    if logp.shape[0] != x.shape[0]:
        return None
    rows = torch.linspace(0, x.shape[0] - 1, min(sample, x.shape[0])).long().to(x.device)
    exact = reference.token_stats(x[rows].double(), y[rows].unsqueeze(-1)).logp.squeeze(-1)
    return (logp[rows].double().abs() - exact.abs()).abs().max().item()


def peak_memory(device: str, phases) -> int | None:
    """Bytes allocated at the highest point of a run, above what was there before (the logits)."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _chain(phases)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return _cpu_peak_memory(phases)


def _chain(phases):
    value = None
    for phase in phases:
        value = phase(value)
    return value


def _cpu_peak_memory(phases) -> int | None:
    """PyTorch keeps no statistics of CPU memory; Linux keeps a process's largest resident size, and resets it on request."""
    try:
        spare.release()  # what earlier runs freed would otherwise be used again, unseen
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = _resident("VmRSS")
        _chain(phases)
        return max(0, _resident("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def _resident(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field))


def design_bytes(case: Case, phase: str) -> int:
    """Bytes that have to move: one read of the logits forward; one read and one write backward."""
    size = case.rows * case.vocab * DTYPES[case.dtype].itemsize
    return {"forward": 1, "backward": 2, "total": 3}[phase] * size


def run_case(case: Case, contenders, rounds: int, log=print, skip_slow: bool = False, min_seconds: float = 0.0) -> dict:
    """Measures `contenders` on `case`: a JSON-ready dict with one entry per contender, and the machine's own copy in the same rounds."""
    timer = clock(case.device)
    x, y, grads = inputs(case)
    pristine = x.clone()
    runs, skipped = [], {}
    torch._dynamo.reset()
    for contender in contenders:
        if contender.computes != case.computes:
            continue
        if contender.slow and skip_slow:
            skipped[contender.name] = "left out: takes long to compile"
            continue
        run = _Run(contender, case, x, y, grads, pristine)
        try:
            run.warm_up(timer)
            runs.append(run)
        except Exception as error:  # an out-of-memory or a peer's refusal is a result, not a reason to stop
            skipped[contender.name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error).strip() else ''}"
            log(f"  {contender.name}: {skipped[contender.name]}")
            x.copy_(pristine)
        gc.collect()
        if case.device == "cuda":
            torch.cuda.empty_cache()
    copies = []
    started, done = time.perf_counter(), 0
    while done < rounds or time.perf_counter() - started < min_seconds:
        copies.append(timer(lambda _: pristine.copy_(x))[0])
        for run in list(runs):
            try:
                run.times.append(run.once(timer))
            except torch.OutOfMemoryError as error:  # fragmented by the others
                runs.remove(run)
                skipped[run.contender.name] = f"OutOfMemoryError: {str(error).splitlines()[0][:160]}"
                x.copy_(pristine)
        done += 1
    copy_gb_s = 2 * x.numel() * x.element_size() / median(copies) / 1e6
    results = [_summary(run, case, copy_gb_s) for run in runs]
    return {**case._asdict(), "rounds": done, "copy_ms": median(copies), "copy_gb_s": copy_gb_s, "results": results, "skipped": skipped}


def _summary(run: _Run, case: Case, copy_gb_s: float) -> dict:
    entry = {
        "name": run.contender.name,
        "kind": run.contender.kind,
        "in_place": run.contender.in_place,
        "logp_error": run.error,
        "peak_bytes": run.peak,
    }
    phases = {"forward": [t[0] for t in run.times]}
    if run.contender.backward:
        phases["backward"] = [t[1] for t in run.times]
        phases["total"] = [sum(t) for t in run.times]
    for phase, times in phases.items():
        ms = median(times)
        entry[phase] = {"ms": ms, "spread": spread(times), "min_ms": min(times), "of_copy": design_bytes(case, phase) / ms / 1e6 / copy_gb_s}
    return entry


def machine() -> dict:
    """What a figure depends on, without what identifies a computer."""
    info = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
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


def results_folder() -> str:
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), "results")
