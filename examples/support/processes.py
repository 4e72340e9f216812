"""Jobs in processes of their own, several at a time, with one progress line."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from multiprocessing import get_context

import numpy
import torch
from torch import nn

from .progress import Progress

_counter = None  # in a job's process: shared with the one that started it


def _share(counter) -> None:
    global _counter
    _counter = counter


def parameters(model: nn.Module) -> dict[str, numpy.ndarray]:
    """As arrays, which travel to a job by value. Tensors would share memory with a process that ends."""
    return {name: value.numpy() for name, value in model.state_dict().items()}


def load(model: nn.Module, arrays: dict[str, numpy.ndarray]) -> None:
    model.load_state_dict({name: torch.from_numpy(value) for name, value in arrays.items()})


def advance(amount: int) -> None:
    """Called in a job: so much of its work is done."""
    if _counter is not None:
        with _counter.get_lock():
            _counter.value += amount


def run_all(title: str, function: Callable, jobs: Iterable[tuple], workers: int, total: int) -> dict[tuple, object]:
    """{job: function(*job)}, every call in a fresh process, `workers` at a time, begun in the order given.

    `total` is what the calls of `advance` sum up to, over all jobs. An exception in a job is raised here.
    """
    context = get_context("forkserver")  # a process that has imported the below and done nothing else is copied for every job
    # torch._dynamo: an optimizer's first step imports it, seconds for every job.
    context.set_forkserver_preload(["rlkern", "torch._dynamo", "matplotlib.pyplot"])
    counter, progress = context.Value("q", 0), Progress(title, total)

    def run(job: tuple):
        with ProcessPoolExecutor(1, mp_context=context, initializer=_share, initargs=(counter,)) as process:
            return process.submit(function, *job).result()

    with ThreadPoolExecutor(workers) as threads:
        futures = {threads.submit(run, job): job for job in jobs}
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
            if waiting:
                progress.update(counter.value)
    progress.update(total)
    return {job: future.result() for future, job in futures.items()}
