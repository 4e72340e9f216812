"""BGPOAccumulator: both modes against the objective with all graphs kept, metrics, order of calls, memory."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import loss_battery as battery
import pytest
import torch
from bgpo_batch import F64, KL, B, Batch, N, agree, bound, elbo, naive_objective, of_draws
from derivatives import differentiate

import rlkern

EXACT = {
    "plain": {},
    "clip": {"clip": (0.1, 0.1)},
    "dual": {"clip": (0.2, 0.2), "dual_clip": 1.1},
    "k1": {"kl_coef": 0.3, "kl": "k1"},
    "k2": {"kl_coef": 0.3, "kl": "k2", "clip": (0.1, 0.2)},
    "k3": {"kl_coef": 0.3, "kl": "k3"},
}


@pytest.mark.parametrize("name", EXACT)
def test_two_passes_are_the_naive_objective(name):
    batch = Batch(spread=0.6)
    options = EXACT[name]
    kl = KL[options["kl"]] if "kl" in options else None
    want = differentiate(lambda z: naive_objective(z, batch, **options | {"kl": kl}), batch.logits)

    ref = {"ref_elbo": (batch.omega * batch.ref).sum(-1)} if kl else {}
    total = (batch.omega * batch.elbos()).sum(-1)
    q = rlkern.elbo_coeff(total, (batch.omega * batch.old).sum(-1), batch.advantages, ratio_scale=batch.scale, **ref, **options)
    c = (batch.seq_weight * q * batch.scale)[:, None] * batch.omega
    agree(of_draws(lambda j, z: -(c[:, j] * elbo(z, batch, j)).sum(), batch.logits)[1], want[1], 1e-10)
    assert (name not in ("clip", "dual")) or 0 < (q == 0).sum() - 1 < B - 1  # bounds stop some sequences beyond the one with A = 0

    acc = rlkern.BGPOAccumulator(
        batch.advantages, batch.old, batch.seq_weight, mode="exact", mc_weights=batch.omega, ratio_scale=batch.scale,
        ref_elbo=batch.ref if kl else None, **options,
    )  # fmt: skip
    observe(acc, batch)
    agree(accumulate(acc, batch), want, 1e-10)
    agree(acc.metrics()["loss"], want[0], 1e-10)
    before = acc.loss(1, batch.logits[1], **batch.draw(1))
    acc.observe(0, batch.logits[1], **batch.draw(0))  # a first pass anew
    assert abs(acc.loss(1, batch.logits[1], **batch.draw(1)) - before) > 1e-6


def observe(acc, batch):
    for j in range(N):
        acc.observe(j, batch.logits[j], **batch.draw(j))


def accumulate(acc, batch):
    """(sum of the losses, gradients [n, ...])."""
    return of_draws(lambda j, z: acc.loss(j, z, **batch.draw(j)), batch.logits)


def test_accumulator_of_the_bound():
    batch = Batch(spread=0.8)
    options = {"ratio_scale": batch.scale, "clip": (0.2, 0.2), "dual_clip": 1.5}
    acc = rlkern.BGPOAccumulator(batch.advantages, batch.old, batch.seq_weight, mc_weights=batch.omega, **options)
    assert acc.num_mc == N and not acc.two_pass
    value, gradient = accumulate(acc, batch)
    agree((value, gradient), bound(batch.logits, batch, **options))
    ells = batch.elbos()
    agree(acc.elbo, ells)
    d = batch.scale[:, None] * (ells - batch.old)
    w = batch.omega * d.exp()
    a = batch.advantages[:, None]
    outside = torch.where(a > 0, d > 0.2, (a < 0) & ((d < math.log(0.8)) | (d > math.log(1.5))))
    want = {
        "loss": value,
        "elbo": (batch.omega * ells).sum(-1).mean(),
        "d_mean": d.mean(),
        "d_max": d.max(),
        "clip_fraction": outside.double().mean(),
        "ess": (w.sum(-1) ** 2 / (w**2).sum(-1)).mean(),
        "sequences": torch.tensor(float(len(d)), dtype=F64),
        "draws": torch.tensor(float(d.numel()), dtype=F64),
    }
    metrics = acc.metrics()
    assert metrics.keys() == want.keys()
    for name in want:
        agree(metrics[name], want[name])
        assert metrics[name].dim() == 0 and not metrics[name].requires_grad


@pytest.mark.parametrize("mode", ["bound", "exact"])
def test_accumulator_on_policy(mode):
    batch = Batch()
    acc = rlkern.BGPOAccumulator(batch.advantages, None, batch.seq_weight, N, mode=mode, ratio_scale=batch.scale)
    assert not acc.two_pass
    batch.omega = torch.full((B, N), 1 / N, dtype=F64)
    agree(accumulate(acc, batch), differentiate(lambda z: naive_objective(z, batch, on_policy=True), batch.logits))
    agree(acc.metrics()["ess"], torch.tensor(float(N), dtype=F64))
    later = rlkern.BGPOAccumulator(batch.advantages, acc.elbo, batch.seq_weight, mode=mode, ratio_scale=batch.scale)
    assert later.two_pass == (mode == "exact") and later.num_mc == N


def test_accumulator_with_stored_log_probabilities():
    batch = Batch()
    old_logits = batch.logits + 0.3 * torch.randn(batch.logits.shape, generator=torch.Generator().manual_seed(4), dtype=F64)
    stored = [rlkern.masked_elbo(old_logits[j], *batch.rows(j), mask=batch.mask[j], return_token_logp=True) for j in range(N)]
    batch.old = torch.stack([ell for ell, _ in stored], -1)
    batch.omega = torch.full((B, N), 1 / N, dtype=F64)
    options = {"seq_weight": batch.seq_weight, "ratio_scale": batch.scale, "num_mc": N}
    rows = [batch.draw(j) | {"old_token_logp": stored[j][1]} for j in range(N)]
    exact = differentiate(lambda z: naive_objective(z, batch), batch.logits)
    for mode, want in (("bound", bound(batch.logits, batch)), ("exact", exact)):
        acc = rlkern.BGPOAccumulator(batch.advantages, mode=mode, **options)
        if mode == "exact":
            with pytest.raises(RuntimeError, match="needs observe"):
                acc.loss(0, batch.logits[0], **rows[0])
            for j in range(N):
                acc.observe(j, batch.logits[j], **rows[j])
        agree(of_draws(lambda j, z, acc=acc: acc.loss(j, z, **rows[j]), batch.logits), want, 1e-10)


def test_accumulator_packed_and_without_a_sync():
    batch = Batch(spread=0.8)
    options = {"ratio_scale": batch.scale, "clip": (0.2, 0.2), "kl_coef": 0.1, "ref_elbo": batch.ref, "mc_weights": batch.omega}
    for mode in ("bound", "exact"):
        dense, packed = (rlkern.BGPOAccumulator(batch.advantages, batch.old, batch.seq_weight, mode=mode, **options) for _ in range(2))
        rows = []
        for z, m, w in zip(batch.logits, batch.mask, batch.weight, strict=True):
            sequence = m.nonzero()[:, 0]
            rows.append({"logits": z[m], "targets": batch.targets[m], "weight": w[sequence], "seq_idx": sequence})
        if mode == "exact":
            for j, row in enumerate(rows):
                packed.observe(j, **row)
        with battery.NoSyncingOperators(), battery.NoSyncingMethods():
            if mode == "exact":
                observe(dense, batch)
            got = sum(dense.loss(j, batch.logits[j], **batch.draw(j)) for j in range(N))
            metrics = dense.metrics()
        agree(sum(packed.loss(j, **row) for j, row in enumerate(rows)), got)
        agree(packed.metrics(), metrics)


def test_metrics_before_the_last_draw():
    batch = Batch()
    acc = rlkern.BGPOAccumulator(batch.advantages, None, 1.0, mc_weights=batch.omega, ratio_scale=1.0)
    for j in (2, 0):
        loss = acc.loss(j, batch.logits[j], **batch.draw(j))
        assert loss.item() == pytest.approx(-(batch.omega[:, j] * batch.advantages).sum().item())
    some = batch.omega[:, [0, 2]] / batch.omega[:, [0, 2]].sum(-1, keepdim=True)
    agree(acc.metrics()["elbo"], sum(some[:, i] * elbo(batch.logits[j], batch, j) for i, j in enumerate((0, 2))).mean())


def test_on_policy_with_a_reference_takes_two_passes():
    batch = Batch(spread=0.6)
    options = {"mc_weights": batch.omega, "ratio_scale": batch.scale, "ref_elbo": batch.ref, "kl_coef": 0.3, "kl": "k3"}
    acc = rlkern.BGPOAccumulator(batch.advantages, None, batch.seq_weight, mode="exact", **options)
    assert acc.two_pass
    observe(acc, batch)
    want = differentiate(lambda z: naive_objective(z, batch, on_policy=True, kl_coef=0.3, kl=KL["k3"]), batch.logits)
    agree(accumulate(acc, batch), want, 1e-10)


def test_calls_out_of_order():
    batch = Batch()
    draw = {"logits": batch.logits[0], **batch.draw(0)}
    acc = rlkern.BGPOAccumulator(batch.advantages, batch.old, 1.0, mode="exact", ratio_scale=1.0)
    for call, words in (
        (lambda: acc.metrics(), "metrics needs at least one loss"),
        (lambda: acc.elbo, r"elbo needs loss\(j, ...\) of all 4 draws before it; missing \[0, 1, 2, 3\]"),
        (lambda: acc.loss(0, **draw), r"needs observe\(j, ...\) of all 4 draws before it; missing \[0, 1, 2, 3\]"),
    ):
        with pytest.raises(RuntimeError, match=words):
            call()
    acc.observe(2, **draw)
    with pytest.raises(RuntimeError, match=r"missing \[0, 1, 3\]"):
        acc.loss(2, **draw)
    with pytest.raises(RuntimeError, match="observe is the first pass of mode='exact'"):
        rlkern.BGPOAccumulator(batch.advantages, batch.old, 1.0, ratio_scale=1.0).observe(0, **draw)
    for j, error in ((4, IndexError), (-1, IndexError), (1.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="draw"):
            acc.loss(j, **draw)
    with pytest.raises(ValueError, match="must hold the 5 sequences that the advantages are of"):
        acc.observe(0, batch.logits[0][:2], batch.targets[:2], weight=torch.ones(2, dtype=F64))


@pytest.mark.parametrize(
    "changes, error, words",
    [({"mode": "naive"}, ValueError, "unknown mode 'naive'"), ({"num_mc": 0}, ValueError, "num_mc must be at least 1"),
     ({"num_mc": 2.0}, TypeError, "num_mc must be an int"), ({"mc_weights": (0.5, 0.4)}, ValueError, "sum to 1 over the draws, got .* sum 0.9"),
     ({"mc_weights": (1.5, -0.5)}, ValueError, "must not be negative"), ({"mc_weights": torch.ones(2, 2)}, ValueError, "got sums 2.0 to 2.0"),
     ({"mc_weights": torch.ones(3, 2)}, ValueError,
      r"mc_weights must be \[n\] or \[B, n\], here \(2,\) or \(2, 2\) for advantages \(2,\), got \(3, 2\)"),
     ({"old_elbo": torch.ones(2, 4), "num_mc": 2}, ValueError, "2 from num_mc, 4 from old_elbo"),
     ({"old_elbo": torch.ones(2)}, ValueError, r"old_elbo must be \[B, n\] \(one column a draw\), got shape \(2,\)"),
     ({"ref_elbo": [0.0]}, TypeError, "ref_elbo must be a float tensor"), ({"advantages": torch.ones(2, 1)}, ValueError, "advantages must be"),
     ({"advantages": [1.0]}, TypeError, "advantages must be a float tensor"), ({"kl_coef": 1.0}, ValueError, "needs ref_elbo="),
     ({"seq_weight": None}, TypeError, "seq_weight= must be given"), ({"clip": (2.0, 0.2)}, ValueError, "clip_low must be in")],
)  # fmt: skip
def test_accumulator_errors(changes, error, words):
    with pytest.raises(error, match=words):
        rlkern.BGPOAccumulator(**{"advantages": torch.ones(2), "seq_weight": 1.0, "ratio_scale": 1.0} | changes)


class Retained:
    """Bytes that autograd holds, and the most it held. Saved tensors are wrapped, to tell when they go."""

    def __init__(self):
        self.now = self.peak = 0

    def pack(self, tensor):
        return _Held(self, tensor)


class _Held:
    def __init__(self, owner, tensor):
        self.owner, self.tensor, self.size = owner, tensor, tensor.numel() * tensor.element_size()
        owner.now += self.size
        owner.peak = max(owner.peak, owner.now)

    def __del__(self):
        self.owner.now -= self.size


def retained(n, step):
    held = Retained()
    head = torch.randn(64, 16, requires_grad=True)
    hidden = torch.randn(n, 3, 8, 16)
    with torch.autograd.graph.saved_tensors_hooks(held.pack, lambda x: x.tensor):
        step(head, hidden)
    assert held.now == 0
    return held.peak


def test_retained_memory_does_not_grow_with_the_draws():
    targets, weight, a = torch.randint(0, 64, (3, 8)), torch.ones(3), torch.tensor([1.0, -1.0, 0.5])

    def draws(head, hidden):
        acc = rlkern.BGPOAccumulator(a, None, 1.0, len(hidden), ratio_scale=0.1)
        for j, h in enumerate(hidden):
            acc.loss(j, h @ head.T, targets, weight=weight).backward()

    def two_passes(head, hidden):
        acc = rlkern.BGPOAccumulator(a, torch.full((3, len(hidden)), -30.0), 1.0, mode="exact", ratio_scale=0.1)
        with torch.no_grad():
            for j, h in enumerate(hidden):
                acc.observe(j, h @ head.T, targets, weight=weight)
        for j, h in enumerate(hidden):
            acc.loss(j, h @ head.T, targets, weight=weight).backward()

    def naive(head, hidden):
        ells = [((h @ head.T).log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)).sum(-1) for h in hidden]
        total = torch.stack(ells).mean(0)
        (-(a * (0.1 * (total - total.detach())).exp()).sum()).backward()

    for step in (draws, two_passes):
        assert retained(64, step) <= 1.02 * retained(1, step)
    assert retained(64, naive) > 20 * retained(1, naive)


PEAK = """
import sys, torch, rlkern
sys.path.insert(0, sys.argv[1])
from measure import peak_memory

torch.manual_seed(0)
hidden, head = torch.randn(2, 64, 32), torch.randn(28000, 32, requires_grad=True)
targets, weight, a = torch.randint(0, 28000, (2, 64)), torch.ones(2), torch.tensor([1.0, -1.0])

def bgpo(n):
    acc = rlkern.BGPOAccumulator(a, None, 1.0, n, ratio_scale=0.01)
    for j in range(n):
        acc.loss(j, hidden @ head.T, targets, weight=weight, mask=torch.rand(2, 64) < 0.5, inplace_backward=True).backward()

def naive(n):
    ells = [(hidden @ head.T).log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1).sum(-1) for _ in range(n)]
    total = torch.stack(ells).mean(0)
    (-(a * (0.01 * (total - total.detach())).exp()).sum()).backward()

bgpo(1)  # what is allocated once
print([peak_memory("cpu", (lambda _: step(n),)) for step, n in ((bgpo, 1), (bgpo, 64), (naive, 1), (naive, 8))])
"""


@pytest.mark.slow
def test_peak_memory_of_64_draws():
    """Resident memory where malloc returns blocks above 64 KB at once. Logits of a draw are 14 MB."""
    command = [sys.executable, "-c", PEAK, str(Path(__file__).resolve().parent.parent / "benchmarks")]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    if "None" in done.stdout:
        pytest.skip("this system does not report a process's peak memory")
    one, many, naive_one, naive_many = json.loads(done.stdout)
    assert many <= 1.02 * one, done.stdout
    assert naive_many > 3 * naive_one, done.stdout
