"""Runs a test file as two gloo processes, `python FILE RANK FOLDER`. Results are left in FOLDER/rankN.pt."""

import contextlib
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import torch

import rlkern

WORLD = 2


@contextlib.contextmanager
def one_of_them():
    """(rank, dict to fill with results) in a process that was started so."""
    rank, folder, results = int(sys.argv[1]), Path(sys.argv[2]), {}
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), WORLD)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    yield rank, results
    torch.save(results, folder / f"rank{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # in an orderly end gloo's threads may abort the process


def results_of(script, folder):
    """What each of the two processes computed."""
    logs = [folder / f"rank{rank}.txt" for rank in range(WORLD)]
    processes, environment = [], os.environ | {"PYTHONPATH": str(Path(rlkern.__file__).parents[1])}  # the rlkern that is tested here
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, script, str(rank), str(folder)]
            processes.append(subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT, env=environment))
        for process, log in zip(processes, logs, strict=True):
            assert process.wait(timeout=180) == 0, log.read_text()
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD)]
