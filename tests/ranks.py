"""Runs a function on the ranks of a gloo group: processes that are started once and used by every test.

    results = on_ranks(4, function, *args)      # function(group, rank, *args) on each; what each returned

The function must be one of a module, and its results must pickle. An exception on a rank is its result.
"""

import atexit
import multiprocessing
import os
import tempfile
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map

WORLDS = (1, 2, 3, 4, 8)
COMPILES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)  # what a group is part of; see docs/versions.md
compiles = pytest.mark.skipif(not COMPILES, reason="Dynamo before torch 2.9 does not follow a group")
LARGEST = max(WORLDS)
SQUARE = ((0, 1), (2, 3), (0, 2), (1, 3))  # rows and columns of four ranks
subgroups = {}  # in a rank's process: its groups of SQUARE, by their ranks


def _serve(rank, world, worlds, folder, seconds, pipe):
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), world)
    timeout = timedelta(seconds=seconds)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    groups = {w: dist.new_group(range(w), timeout=timeout) for w in worlds}
    for ranks in SQUARE if world >= 4 else ():
        group = dist.new_group(ranks, timeout=timeout)
        if rank in ranks:
            subgroups[ranks] = group
    pipe.send("ready")
    while True:
        try:
            w, function, args = pipe.recv()
        except EOFError:
            os._exit(0)  # gloo's own threads may abort an orderly end
        try:
            result = tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, function(groups[w], rank, *args))
        except Exception as error:
            result = error
        try:
            pipe.send(result)
        except Exception as error:  # a result that does not pickle
            pipe.send(RuntimeError(f"{type(result).__name__}: {result} ({error})"))


class Processes:
    """`world` ranks, for groups of the sizes `worlds`; seconds: until gloo gives up."""

    def __init__(self, world, worlds, seconds=30):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed.tensor", "torch._dynamo", "torch._functorch.aot_autograd", "rlkern"])
        self.folder, self.pipes, self.processes = tempfile.TemporaryDirectory(), [], []
        for rank in range(world):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, worlds, self.folder.name, seconds, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)
        for pipe in self.pipes:
            assert pipe.poll(60) and pipe.recv() == "ready"

    def start(self, world, function, *args):
        for pipe in self.pipes[:world]:
            pipe.send((world, function, args))

    def result(self, rank, seconds=60):
        """What the rank's function returned or raised. EOFError if the process died."""
        if not self.pipes[rank].poll(seconds):
            self.stop()
            pytest.fail(f"rank {rank} gave no answer in {seconds} s")
        return self.pipes[rank].recv()

    def run(self, world, function, *args):
        self.start(world, function, *args)
        return [self.result(rank) for rank in range(world)]

    def stop(self):
        for process in self.processes:
            process.kill()
        self.processes.clear()


_pool = None


def on_ranks(world, function, *args):
    """What function(group, rank, *args) returned on each rank; raises what a rank raised."""
    results = try_on_ranks(world, function, *args)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def try_on_ranks(world, function, *args):
    """What function(group, rank, *args) returned or raised on each rank."""
    global _pool
    if _pool is None or not _pool.processes:
        _pool = Processes(LARGEST, WORLDS)
        atexit.register(_pool.stop)
    return _pool.run(world, function, *args)
