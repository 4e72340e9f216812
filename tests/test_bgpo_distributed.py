"""BGPO split over micro-batches, draws and processes has the gradient of one process that sees everything.

As a script this file is one of two gloo processes. The test starts both once, for all ways of training.
"""

import contextlib

import pytest
import torch
from torch import nn
from two_processes import WORLD, one_of_them, results_of

import rlkern

NUM_MC, VOCAB, MASK_ID, SEED = 4, 11, 10, 7
# Rows 0-2 are rank 0's, 3-5 rank 1's, in two micro-batches each. The second of rank 1 has nothing to guess.
LENGTHS = torch.tensor([5, 0, 3, 6, 1, 0])
ADVANTAGES = torch.tensor([1.5, -0.5, -2.0, 0.7, 0.0, -1.0], dtype=torch.float64)
MICRO_BATCHES = {0: [[0, 1], [2]], 1: [[3, 4], [5]]}
CLIP = (0.2, 0.2)


class Model(nn.Module):
    """A few layers in float64 that see the whole sequence."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCAB, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(8, VOCAB)
        self.double()

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x + x.mean(1, keepdim=True))
        return self.head(x)


class Batch:
    """The rows `rows` of the step's rollouts."""

    def __init__(self, rows):
        ids = torch.randint(MASK_ID, (len(LENGTHS), 9), generator=torch.Generator().manual_seed(1))
        self.rows = torch.tensor(rows)
        self.ids, self.lengths, self.advantages = ids[self.rows], LENGTHS[self.rows], ADVANTAGES[self.rows]
        place = torch.arange(9) - 2  # two tokens of prompt
        self.response = (place >= 0) & (place < self.lengths.unsqueeze(-1))
        self.scale = 1 / self.lengths.clamp(min=1).double()

    def draw(self, j):
        """(noisy ids, mask, weight)"""
        mask, weight = rlkern.diffusion.count_masks(self.response, NUM_MC, seed=SEED, rollouts=self.rows, draw=j)
        return torch.where(mask, MASK_ID, self.ids), mask, weight.double()

    @torch.no_grad()
    def elbo(self, model, j):
        noisy, mask, weight = self.draw(j)
        return rlkern.masked_elbo(model(noisy), self.ids, weight, mask=mask)


def micro_batches(rank):
    return [Batch(rows) for rows in MICRO_BATCHES[rank]]


def bound(model, old, batches, context, average_over=1):
    """The loop of docs/diffusion.md: every draw of every micro-batch by itself, c over the whole step."""
    for k, batch in enumerate(batches):
        for j in range(NUM_MC):
            noisy, mask, weight = batch.draw(j)
            with context(k == len(batches) - 1 and j == NUM_MC - 1):
                rows = model(noisy), batch.ids, weight, batch.advantages, batch.elbo(old, j)
                options = {"mask": mask, "mc_weight": 1 / NUM_MC, "seq_weight": 1 / len(LENGTHS), "ratio_scale": batch.scale}
                loss, _ = rlkern.bgpo_loss(*rows, clip=CLIP, inplace_backward=True, **options)
                (loss * average_over).backward()


def exact(model, old, batches, context, average_over=1):
    """The objective itself, in two passes."""
    for k, batch in enumerate(batches):
        with torch.no_grad():
            elbo, old_elbo = (sum(batch.elbo(m, j) for j in range(NUM_MC)) / NUM_MC for m in (model, old))
        q = rlkern.elbo_coeff(elbo, old_elbo, batch.advantages, ratio_scale=batch.scale, clip=CLIP)
        for j in range(NUM_MC):
            noisy, mask, weight = batch.draw(j)
            with context(k == len(batches) - 1 and j == NUM_MC - 1):
                ell = rlkern.masked_elbo(model(noisy), batch.ids, weight, mask=mask, inplace_backward=True)
                (-(q * batch.scale * ell).sum() / NUM_MC / len(LENGTHS) * average_over).backward()


# --- one of two processes ---


def with_ddp(step):
    ddp = nn.parallel.DistributedDataParallel(Model(0))
    step(ddp, lambda last: contextlib.nullcontext() if last else ddp.no_sync())
    return [p.grad for p in ddp.module.parameters()]


def with_fsdp(step, only_last):
    from torch.distributed.fsdp import fully_shard

    model = Model(0)
    mesh = torch.distributed.init_device_mesh("cpu", (WORLD,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)

    def context(last):
        if only_last:
            model.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    step(model, context)
    return [p.grad.full_tensor() for p in model.parameters()]


def gradients(rank):
    old = Model(1)

    def step_of(objective):
        return lambda model, context: objective(model, old, micro_batches(rank), context, average_over=WORLD)

    return {
        "DDP, no_sync": with_ddp(step_of(bound)),
        "DDP, no_sync, exact": with_ddp(step_of(exact)),
        "FSDP2, every backward": with_fsdp(step_of(bound), only_last=False),
        "FSDP2, last backward": with_fsdp(step_of(bound), only_last=True),
    }


# --- the parent ---


def naive_gradient(exact_objective):
    """All draws of all rows in one graph, from log_softmax and the formulas of the paper."""
    model, old, everything = Model(0), Model(1), Batch(list(range(len(LENGTHS))))

    def elbos(m):
        columns = []
        for j in range(NUM_MC):
            noisy, mask, weight = everything.draw(j)
            logp = m(noisy).log_softmax(-1).gather(-1, everything.ids.unsqueeze(-1)).squeeze(-1)
            columns.append((logp * mask).sum(-1) * weight)
        return torch.stack(columns, -1)

    d = everything.scale.unsqueeze(-1) * (elbos(model) - elbos(old).detach())
    assert d.max() > 0.3 and d.min() < -0.3, "nothing to clip"
    up, a = ADVANTAGES > 0, ADVANTAGES
    if exact_objective:
        r = d.mean(-1).exp()
        g = a * torch.where(up, r.clamp(max=1.2), r.clamp(min=0.8))
    else:
        g = a * torch.where(up.unsqueeze(-1), (1 + d).clamp(max=1.2), d.exp().clamp(min=0.8)).mean(-1)
    (-g.sum() / len(a)).backward()
    return [p.grad for p in model.parameters()]


def check(grads, expected):
    for got, want in zip(grads, expected, strict=True):
        assert want.abs().max() > 1e-4
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("objective", [bound, exact])
def test_micro_batches_and_draws(objective):
    """Any grouping: each row by itself, several at a time, all at once."""
    expected, old, alone = naive_gradient(objective is exact), Model(1), lambda last: contextlib.nullcontext()
    for batches in ([Batch([i]) for i in range(6)], micro_batches(0) + micro_batches(1), [Batch(list(range(6)))]):
        model = Model(0)
        objective(model, old, batches, alone)
        check([p.grad for p in model.parameters()], expected)


def test_draws_stacked_in_the_batch():
    model, old, batch = Model(0), Model(1), Batch(list(range(6)))
    noisy, mask, weight = (torch.cat(parts) for parts in zip(*(batch.draw(j) for j in range(NUM_MC)), strict=True))
    old_elbo = torch.cat([batch.elbo(old, j) for j in range(NUM_MC)])
    ids, advantages, scale = (x.repeat(NUM_MC, *[1] * (x.dim() - 1)) for x in (batch.ids, batch.advantages, batch.scale))
    options = {"mask": mask, "mc_weight": 1 / NUM_MC, "seq_weight": 1 / 6, "ratio_scale": scale}
    rlkern.bgpo_loss(model(noisy), ids, weight, advantages, old_elbo, clip=CLIP, **options).loss.backward()
    check([p.grad for p in model.parameters()], naive_gradient(False))


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes(tmp_path):
    for grads in results_of(__file__, tmp_path):
        for name, got in grads.items():
            check(got, naive_gradient("exact" in name))


if __name__ == "__main__":
    with one_of_them() as (rank, results):
        results.update(gradients(rank))
