"""A batch of draws for the tests of diffusion BGPO; objective and bound as arXiv 2510.11683 prints them."""

import math
from functools import partial

import torch
from derivatives import differentiate

import rlkern

F64 = torch.float64
INF = math.inf
B, S, V, N = 5, 9, 23, 4


class Batch:
    """n draws of B sequences: logits [n, B, S, V], masks [n, B, S], weights [n, B] L/m or 1/t, old ELBOs
    off-policy. Draw 1 of sequence 2 masks nothing."""

    def __init__(self, seed=0, spread=0.3, n=N):
        g = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=g, dtype=F64)

        self.n = n
        self.logits = 1.5 * normal(n, B, S, V)
        self.targets = torch.randint(0, V, (B, S), generator=g)
        self.lengths = torch.tensor([9, 4, 7, 9, 6])
        self.mask = (torch.rand(n, B, S, generator=g) < 0.6) & (torch.arange(S) < self.lengths[:, None])
        if n > 1:
            self.mask[1, 2] = False
        self.weight = 1 / (0.1 + 0.9 * torch.rand(n, B, generator=g, dtype=F64))
        self.advantages = torch.tensor([1.3, -0.8, -1.1, 0.0, 0.6], dtype=F64)
        self.seq_weight = torch.rand(B, generator=g, dtype=F64)
        self.omega = torch.softmax(normal(B, n), -1)
        self.old, self.ref = (self.elbos() + spread * normal(B, n) / self.scale[:, None] for _ in range(2))

    @property
    def scale(self):
        return 1 / self.lengths.double()

    def rows(self, j):
        return self.targets, self.weight[j]

    def draw(self, j):
        """What the accumulator takes of draw j, beside its logits."""
        return {"targets": self.targets, "weight": self.weight[j], "mask": self.mask[j]}

    def elbos(self, logits=None):
        """[B, n]"""
        return torch.stack([elbo(z, self, j) for j, z in enumerate(self.logits if logits is None else logits)], -1)


def elbo(logits, batch, j, temperature=1.0):
    logp = (logits / temperature).log_softmax(-1).gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1)
    return torch.where(batch.mask[j], batch.weight[j][:, None] * logp, 0).sum(-1)


def naive_objective(logits, batch, *, on_policy=False, clip=None, dual_clip=None, kl_coef=0.0, kl=None):
    """-sum_b c_b A exp(dbar_b), clipped as PPO clips, from all draws' graphs at once."""
    ells = batch.elbos(logits)
    dbar = (batch.omega * batch.scale[:, None] * (ells - (ells.detach() if on_policy else batch.old))).sum(-1)
    ratio, a = dbar.exp(), batch.advantages
    value = a * ratio
    if clip is not None:
        value = torch.minimum(value, a * ratio.clamp(1 - clip[0], 1 + clip[1]))
    if dual_clip is not None:
        value = torch.where(a < 0, torch.maximum(value, a * dual_clip), value)
    if kl is not None:
        delta = (batch.omega * batch.scale[:, None] * (ells - batch.ref)).sum(-1)
        value = value - kl_coef * kl(delta)
    return -(batch.seq_weight * value).sum()


def naive_bound(ells, batch, *, clip=None, dual_clip=None):
    """-sum_b c_b sum_j g_j from [B, n] ELBOs, number by number: Lemma 1 where A >= 0, Lemma 2 where A < 0."""
    total = 0
    for b in range(B):
        for j in range(batch.n):
            a, d = batch.advantages[b], batch.scale[b] * (ells[b, j] - batch.old[b, j])
            ratio = 1 + d if a >= 0 else d.exp()
            value = a * ratio
            if clip is not None:
                value = torch.minimum(value, a * ratio.clamp(1 - clip[0], 1 + clip[1]))
            if dual_clip is not None and a < 0:
                value = torch.maximum(value, a * dual_clip)
            total = total - batch.seq_weight[b] * batch.omega[b, j] * value
    return total


def bound(logits, batch, *, on_policy=False, **options):
    """The sum of bgpo_loss over the draws: (value, gradient)."""
    options = {"seq_weight": batch.seq_weight, "ratio_scale": batch.scale} | options

    def loss(j, z):
        old = None if on_policy else batch.old[:, j]
        return rlkern.bgpo_loss(z, *batch.rows(j), batch.advantages, old, mask=batch.mask[j], mc_weight=batch.omega[:, j], **options).loss

    return of_draws(loss, logits)


def of_draws(loss, logits):
    """(sum, gradients [n, ...]) of a loss(j, logits of draw j). Each draw by itself, as in training."""
    values, gradients = zip(*(differentiate(partial(loss, j), z) for j, z in enumerate(logits)), strict=True)
    return sum(values), torch.stack(gradients)


def agree(got, want, tolerance=1e-12):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


KL = {"k1": lambda x: x, "k2": lambda x: x * x / 2, "k3": lambda x: (-x).exp() + x - 1}
