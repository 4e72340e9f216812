"""Micro-batches of two processes, and as a script one of these processes, which merges its metrics with the other's."""

import sys
from datetime import timedelta
from pathlib import Path

import torch

import rlkern

WORLD = 2
F64 = torch.float64


def draw(lengths, seed=0, spread=0.5):
    """One sequence a length: (logp, old_logp, advantages, mask)."""
    g = torch.Generator().manual_seed(seed)
    shape = len(lengths), max([*lengths, 1])
    d = spread * torch.randn(shape, generator=g, dtype=F64)
    old = -1 - torch.rand(shape, generator=g, dtype=F64)
    return old + d, old, torch.randn(shape, generator=g, dtype=F64), torch.arange(shape[1]) < torch.tensor(lengths, dtype=torch.int64).view(-1, 1)


BATCHES = {0: [draw([5, 0, 3], 1), draw([0, 0], 2)], 1: [draw([1], 3, spread=2.0), draw([7, 2], 4), draw([2], 5)]}


def parts_of(rank):
    return [rlkern.ppo_loss(*batch).metrics for batch in BATCHES[rank]]


def main(rank, folder):
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), WORLD)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    parts = parts_of(rank)
    if rank == 1:
        parts = [dict(reversed(part.items())) for part in parts]
    torch.save(rlkern.metrics.merge_metrics(parts, group=torch.distributed.group.WORLD), folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
