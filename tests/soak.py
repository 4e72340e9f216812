"""`make soak`: legal calls of the public functions from several threads, for half an hour. Results stay the
same bit by bit, and memory stays flat.

    make soak                       # thirty minutes
    make soak ARGS="--minutes 2"

Threads draw calls of tests/fuzz, from no element to rows of 100 MB, forward and backward, in place too, and
choose a number of PyTorch's threads for each. Among them stand repeats: fixed calls whose results and
gradients are compared with their first ones.

From time to time the threads wait, and memory is sampled: garbage collected, the kept gradient block given
back, and the allocator's free pages. What is left belongs to somebody. malloc has one arena, and returns
blocks of 128 KB as they are freed: otherwise free pages between used ones come and go by the hundred MB. The
first fifth of the time is for warming up. Of the samples behind it the median slope (Theil-Sen: a few large
samples are no trend) times the time they span may be that of LIMITS at most. That is more than a run without
a leak shows by chance. At 200 calls a second half an hour shows a leak of 30 bytes a call, or of an object in
a hundred calls. Exit status 1 if anything grows, a result differs or a call fails. That rlkern refuses one is
no failure.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import random
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")  # it keeps a program for each shape, up to 1,024

import torch  # noqa: E402
from calls import CALLS, Call, valid_calls  # noqa: E402
from fuzz import changes, random_calls  # noqa: E402
from loss_battery import tensors_of  # noqa: E402
from torch import Tensor  # noqa: E402

import rlkern  # noqa: E402
from rlkern.backends import gradient_memory  # noqa: E402

LIMITS = {"megabytes": 8, "objects": 2000, "files": 2, "threads": 4}
SAMPLES = 10  # at least, however slow the machine is
LARGEST = 100 << 20  # bytes of the largest logits
REPEATED = 0.2  # of all calls
LARGE = 0.02
LEGAL = dict.fromkeys((changes.dtypes, changes.values, changes.strides, changes.garbage, changes.packs), 0.3)


# --- calls --------------------------------------------------------------------------------------------------


def results(function: Callable, arguments: dict, wrt: Sequence[str]) -> list[Tensor | None]:
    """Outputs, and gradients of their sum."""
    leaves = {name: x.detach().requires_grad_() if name in wrt else x for name, x in arguments.items()}
    outputs = tensors_of(function(**leaves))
    differentiable = [t.sum() for t in outputs if t.requires_grad]
    inputs = [leaves[name] for name in wrt if isinstance(leaves[name], Tensor)]
    gradients = torch.autograd.grad(differentiable, inputs, allow_unused=True) if differentiable else ()
    return [*(t.detach() for t in outputs), *gradients]


def bits(x: Tensor) -> Tensor:
    return x.reshape(-1).contiguous().view(torch.uint8)


def of_rows(function: Callable, shape: tuple[int, ...], dtype: torch.dtype, seed: int, second: bool = False, **options) -> Call:
    """A call with logits of this size."""
    g = torch.Generator().manual_seed(seed)
    x = {"logits": torch.randn(shape, generator=g).to(dtype)}
    if second:
        x["other"] = torch.randn(shape, generator=g).to(dtype)
    elif function is not rlkern.sampler_threshold:
        x["targets"] = torch.randint(0, shape[-1], shape[:-1], generator=g)
    return Call(function.__name__, function, x | options, () if function is rlkern.sampler_threshold else ("logits",))


def in_place(logits: Tensor, targets: Tensor) -> Tensor:
    """The gradient takes the place of the logits, here of a copy."""
    return rlkern.token_stats(logits * 1, targets, inplace_backward=True).logp


def large(r: random.Random) -> Call:
    """Of a size whose logarithm is even."""
    function, options = r.choice((
        (rlkern.token_stats, {"with_sum_sq": True, "min_p": 0.1}), (in_place, {}), (rlkern.sampler_threshold, {"top_p": 0.9, "top_k": 50}),
        (rlkern.token_divergence, {"second": True, "kind": "jsd"}), (rlkern.token_divergence, {"second": True}),
    ))  # fmt: skip
    dtype, vocab = r.choice((torch.bfloat16, torch.float32)), r.choice((1000, 32003, 151936))
    size = int(LARGEST ** r.uniform(0.6, 1.0)) // (2 if "second" in options else 1)
    return of_rows(function, (1, max(1, size // (vocab * dtype.itemsize)), vocab), dtype, r.getrandbits(30), **options)


def fixed_calls() -> list[Call]:
    """All of tests/calls.py, and some of rows that several threads share."""
    rows = [((3, 700, 101), torch.float32), ((1, 33, 32003), torch.bfloat16), ((4, 9, 2053), torch.float16), ((2, 5, 5001), torch.float64)]
    calls = [of_rows(rlkern.token_stats, *row, seed=i, with_sum_sq=True) for i, row in enumerate(rows)]
    calls += [of_rows(in_place, *row, seed=i) for i, row in enumerate(rows)]
    calls += [of_rows(rlkern.token_divergence, *row, seed=i, second=True, kind="jsd") for i, row in enumerate(rows)]
    return CALLS + calls + [of_rows(rlkern.sampler_threshold, *row, seed=i, top_p=0.7) for i, row in enumerate(rows)]


def legal_calls(r: random.Random) -> Iterator[random_calls.Drawn]:
    """Without an end. None is held here: a thread that waits has nothing."""
    while True:
        size = dict(batch=r.choice(random_calls.BATCHES), length=r.choice(random_calls.LENGTHS), vocab=r.choice(random_calls.VOCABS))
        calls = valid_calls(**size, seed=r.getrandbits(30))
        for _ in range(random_calls.BLOCK):
            yield random_calls.vary(r, large(r), {}) if r.random() < LARGE else random_calls.vary(r, r.choice(calls), LEGAL)


# --- memory -------------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    seconds: float
    megabytes: float  # resident
    objects: int
    files: int
    threads: int


def sample(start: float) -> Sample:
    gradient_memory.release()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return Sample(time.monotonic() - start, resident, len(gc.get_objects()), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")))


def slope(samples: Sequence[Sample], name: str) -> float:
    """A second: the median of the slopes of all pairs of samples."""
    return statistics.median((getattr(b, name) - getattr(a, name)) / (b.seconds - a.seconds) for a, b in combinations(samples, 2))


def growth(samples: Sequence[Sample]) -> list[str]:
    """What grows in the samples behind the warm-up."""
    span = samples[-1].seconds - samples[0].seconds
    grown = {name: slope(samples, name) * span for name in LIMITS}
    return [f"{name} grow by {grown[name]:.1f} in {span:.0f} seconds, {limit} are allowed" for name, limit in LIMITS.items() if grown[name] > limit]


# --- the run ------------------------------------------------------------------------------------------------


@dataclass
class Soak:
    """What the threads share, and what came of it."""

    fixed: list[Call]
    seed: int = 0
    calls: int = 0
    refused: int = 0  # calls that rlkern does not take: what was changed does not fit together
    repeats: int = 0
    differences: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    peak: float = 0.0

    def __post_init__(self):
        self._first = [self._results(call) for call in self.fixed]
        self._lock, self._go, self._over = threading.Lock(), threading.Event(), False

    @staticmethod
    def _results(call: Call) -> list[Tensor | None]:
        return results(call.function, call.arguments, call.wrt)

    def _repeat(self, index: int) -> None:
        call = self.fixed[index]
        for i, (got, first) in enumerate(zip(self._results(call), self._first[index], strict=True)):
            if got is not None and not torch.equal(bits(got), bits(first)):
                with self._lock:
                    self.differences.append(f"{call.name}: tensor {i} of the results and gradients is not what it was first")

    def _work(self, number: int) -> None:
        r = random.Random(f"{self.seed} {number}")
        calls = legal_calls(r)
        while not self._over:
            self._go.wait()
            with self._idle[number]:
                torch.set_num_threads(r.choice((1, 2, 3, 4)))
                again = r.random() < REPEATED
                i, drawn = r.randrange(len(self.fixed)), None if again else next(calls)
                call = self.fixed[i] if drawn is None else drawn.call
                try:
                    if drawn is None:
                        self._repeat(i)
                    else:
                        results(call.function, drawn.arguments, call.wrt)
                except Exception as error:
                    with self._lock:
                        refused = not random_calls.bare(error)
                        self.refused += refused
                        self.failures += [] if refused else [f"{call.name}: {type(error).__name__}: {str(error)[:200]}"]
                del call, drawn
                with self._lock:
                    self.calls, self.repeats = self.calls + 1, self.repeats + again

    def run(self, seconds: float, threads: int) -> None:
        self._idle = [threading.Lock() for _ in range(threads)]
        workers = [threading.Thread(target=self._work, args=(i,), daemon=True) for i in range(threads)]
        start = time.monotonic()
        self._go.set()
        for worker in workers:
            worker.start()
        pause = min(max(seconds / 60, 0.1), 20)
        while time.monotonic() < start + seconds or len(self.samples) < SAMPLES:
            time.sleep(pause)
            self._go.clear()
            for lock in self._idle:
                lock.acquire()
            self.samples.append(sample(start))
            for lock in self._idle:
                lock.release()
            self._go.set()
        self._over = True
        for worker in workers:
            worker.join()
        status = Path("/proc/self/status").read_text()
        self.peak = int(status.split("VmHWM:")[1].split()[0]) / 1024

    @property
    def settled(self) -> list[Sample]:
        """The samples behind the warm-up."""
        return [s for s in self.samples if s.seconds > self.samples[-1].seconds / 5]

    def findings(self) -> list[str]:
        return [*dict.fromkeys(self.failures), *dict.fromkeys(self.differences), *growth(self.settled)]

    def summary(self, threads: int) -> str:
        first, last = self.settled[0], self.settled[-1]
        rows = [
            ("calls", f"{self.calls:,}, {self.refused:,} refused, {len(self.failures)} failed"),
            ("threads", f"{threads}, of 1 to 4 of PyTorch's each"),
            ("seconds", f"{self.samples[-1].seconds:.0f}"),
            ("repeats compared", f"{self.repeats:,} of {len(self.fixed)} calls, {len(self.differences)} differences"),
            ("resident MB", f"{first.megabytes:.0f} after the warm-up, {last.megabytes:.0f} at the end, peak {self.peak:.0f}"),
            ("slope", f"{3600 * slope(self.settled, 'megabytes'):+.1f} MB an hour over {len(self.settled)} samples"),
            *((name, f"{getattr(first, name):,} after the warm-up, {getattr(last, name):,} at the end") for name in ("objects", "files")),
            ("all threads", f"{first.threads} after the warm-up, {last.threads} at the end"),
        ]
        return "\n".join(f"{name:<17} {value}" for name, value in rows)


def settle_malloc() -> None:
    """One arena, and a fixed size from which on a block is a mapping of its own."""
    mallopt, arena_max, mmap_threshold = ctypes.CDLL(None).mallopt, -8, -3
    mallopt(arena_max, 1)
    mallopt(mmap_threshold, 128 << 10)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--threads", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in ("minutes", "threads"):
        if not 0 < getattr(options, name) < float("inf"):
            parser.error(f"--{name} must be positive, got {getattr(options, name)}")
    warnings.filterwarnings("ignore")
    settle_malloc()
    soak = Soak(fixed_calls(), options.seed)
    soak.run(60 * options.minutes, options.threads)
    findings = soak.findings()
    print(soak.summary(options.threads))
    print("\n".join(findings) if findings else "nothing wrong")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
