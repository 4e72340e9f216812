"""How draws of diffusion BGPO are grouped, its options and statistics, the backends, and torch.compile."""

import math
from pathlib import Path

import torch
from bgpo_batch import F64, INF, KL, B, Batch, N, S, V, agree, bound, elbo
from derivatives import differentiate
from loss_battery import assert_compiles_once

import rlkern


def test_draws_are_sequences():
    """All draws of all sequences in one batch of B n; and in one packed row list, split anywhere."""
    batch = Batch(spread=0.8)
    options = {"clip": (0.2, 0.2), "dual_clip": 2.0}
    want = bound(batch.logits, batch, **options)
    flat = {
        "advantages": batch.advantages.repeat(N),
        "old_elbo": batch.old.T.reshape(-1),
        "mc_weight": batch.omega.T.reshape(-1),
        "seq_weight": batch.seq_weight.repeat(N),
        "ratio_scale": batch.scale.repeat(N),
    }
    targets, mask, weight = batch.targets.repeat(N, 1), batch.mask.view(-1, S), batch.weight.view(-1)

    def stacked(z):
        return rlkern.bgpo_loss(z.view(-1, S, V), targets, weight, mask=mask, **flat, **options).loss

    agree(differentiate(stacked, batch.logits), want)

    def packed(z):
        rows, sequence = z.view(-1, S, V)[mask], mask.nonzero()[:, 0]
        total = 0
        for part in (slice(0, 7), slice(7, 8), slice(8, B * N)):
            own = (sequence >= part.start) & (sequence < part.stop)
            total = total + rlkern.bgpo_loss(
                rows[own], targets[mask][own], weight[sequence][own], seq_idx=sequence[own] - part.start, num_seqs=part.stop - part.start,
                **{name: x[part] for name, x in flat.items()}, **options,
            ).loss  # fmt: skip
        return total

    agree(differentiate(packed, batch.logits), want)


def test_backends_packed_and_in_place(backend, device):
    batch = Batch(n=1, spread=0.8)
    few = slice(0, 3)  # the interpreter is slow
    batch.targets, batch.mask = batch.targets[:, few], batch.mask[:, :, few]
    logits = batch.logits[0, :, few].bfloat16()
    batch.logits = logits.double()[None]
    batch.omega = torch.ones(B, 1, dtype=F64)
    options = {"clip": (0.2, 0.3), "dual_clip": 2.0}
    with rlkern.use_backend("reference"):  # on the CPU, where Triton has none of a card's machine to run on
        value, gradient = bound(batch.logits, batch, **options)
    mask, targets = batch.mask[0].to(device), batch.targets.to(device)
    vectors = (batch.weight[0], batch.advantages, batch.old[:, 0], batch.seq_weight, batch.scale)
    weight, advantages, old, seq_weight, scale = (x.float().to(device) for x in vectors)
    options |= {"mc_weight": 1.0, "seq_weight": seq_weight, "ratio_scale": scale}
    interpreted = backend == "triton" and device == "cpu"  # the interpreter truncates where hardware rounds
    rounding = 2**-7 if interpreted else 2**-8

    def check(loss, d):
        torch.testing.assert_close(loss.double().cpu(), value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(d.double().cpu(), gradient[0], rtol=rounding, atol=3e-8)

    def dense(z):
        return rlkern.bgpo_loss(z * 1, targets, weight, advantages, old, mask=mask, inplace_backward=True, **options).loss

    def packed(z):
        sequence = mask.nonzero()[:, 0]
        rows = (z[mask], targets[mask], weight[sequence], advantages, old)
        return rlkern.bgpo_loss(*rows, seq_idx=sequence, num_seqs=B, **options).loss

    check(*differentiate(dense, logits.to(device)))
    check(*differentiate(packed, logits.to(device)))


def test_elbo_coeff_on_policy_and_at_the_bounds():
    a = torch.tensor([2.0, -3.0, 0.0], dtype=F64)
    assert torch.equal(rlkern.elbo_coeff(torch.randn(3, dtype=F64), None, a, ratio_scale=1.0), a)
    far = torch.tensor([100.0, 100.0, INF], dtype=F64)
    zero = torch.zeros(3, dtype=F64)
    assert torch.equal(rlkern.elbo_coeff(far, zero, a, ratio_scale=1.0), zero)  # beyond max_log_ratio of either sign, and A = 0 at infinity
    agree(rlkern.elbo_coeff(-far, zero, a, ratio_scale=1.0, max_log_ratio=1.0), a * torch.tensor([-100.0, -100, 0], dtype=F64).exp() * (a != 0))
    assert rlkern.elbo_coeff(far.float(), zero, a, ratio_scale=1.0).dtype == torch.float32


def test_temperature_and_kl_and_token_logp():
    batch = Batch(spread=0.8)
    scale, c = batch.scale, batch.seq_weight
    common = {"mc_weight": 0.25, "seq_weight": c, "ratio_scale": scale, "kl_coef": 0.3, "temperature": 0.7}
    for name, f in KL.items():

        def naive(j, z, f=f):
            ell = elbo(z, batch, j, 0.7)
            d, a = scale * (ell - batch.old[:, j]), batch.advantages
            g = torch.where(a > 0, a * (1 + d), a * d.exp())
            return -(c * 0.25 * (g - 0.3 * f(scale * (ell - batch.ref[:, j])))).sum()

        def ours(j, z, name=name):
            options = {"mask": batch.mask[j], "ref_elbo": batch.ref[:, j], "kl": name, **common}
            return rlkern.bgpo_loss(z, *batch.rows(j), batch.advantages, batch.old[:, j], **options).loss

        for j, z in enumerate(batch.logits):
            agree(*(differentiate(lambda x, f=f, j=j: f(j, x), z) for f in (ours, naive)))


def test_stats_and_old_token_logp():
    batch = Batch(n=1)
    common = {"mask": batch.mask[0], "mc_weight": 1.0, "seq_weight": 1.0, "ratio_scale": batch.scale, "clip": (0.2, 0.2)}
    arguments = (*batch.rows(0), batch.advantages)
    first = rlkern.bgpo_loss(batch.logits[0], *arguments, **common).stats
    agree(first.ell, elbo(batch.logits[0], batch, 0))
    assert (first.d == 0).all() and (first.ratio == 1).all() and (first.clipped == 0).all()

    moved = batch.logits[0] + 1.5 * torch.randn(B, S, V, generator=torch.Generator().manual_seed(2), dtype=F64)

    def by(**old):
        return differentiate(lambda z: rlkern.bgpo_loss(z, *arguments, **old, **common).loss, moved)

    agree(by(old_token_logp=first.token_logp), by(old_elbo=first.ell))
    agree(by(old_elbo=first.ell.clone().requires_grad_()), by(old_elbo=first.ell))  # detached, not refused
    stats = rlkern.bgpo_loss(moved, *arguments, first.ell, **common).stats
    d = batch.scale * (elbo(moved, batch, 0) - first.ell)
    agree((stats.d, stats.ratio), (d, torch.where(batch.advantages > 0, 1 + d, torch.where(batch.advantages == 0, 1, d.exp()))))
    outside = torch.where(batch.advantages > 0, d > 0.2, (batch.advantages < 0) & (d < math.log(0.8)))
    assert torch.equal(stats.clipped, outside.double()) and 0 < outside.sum() < B


def test_coefficients_do_not_compile_again():
    batch = Batch(spread=0.8)
    vectors = (batch.logits[0], batch.weight[0], batch.advantages, batch.old[:, 0], batch.ref[:, 0])
    logits, weight, advantages, old, ref = (x.float() for x in vectors)
    coefficients = {"low": 0.2, "high": 0.3, "dual_clip": 3.0, "max_log_ratio": 10.0, "kl_coef": 0.1}
    coefficients |= {"mc_weight": 0.2, "seq_weight": 0.5, "ratio_scale": 0.2}

    def loss(c):
        options = {name: c[name] for name in coefficients if name not in ("low", "high")}
        options.update({"clip": (c["low"], c["high"]), "mask": batch.mask[0], "ref_elbo": ref})
        return rlkern.bgpo_loss(logits, batch.targets, weight, advantages, old, **options).loss

    assert_compiles_once(loss, coefficients)


def test_benchmark_contenders_compute_the_same(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    import bgpo as benchmark

    draw = benchmark.make_draw((2, 6, 50), 0.5, torch.float32, "cpu")
    assert (draw.mask.sum(-1) == 3).all()
    results = {contender.name: benchmark.gradient(contender, draw._replace(logits=draw.logits.clone())) for contender in benchmark.CONTENDERS}
    loss, gradient = results[benchmark.EAGER]
    for name, (value, d) in results.items():
        torch.testing.assert_close((value, d), (loss, gradient[draw.mask] if "packed" in name else gradient), rtol=1e-5, atol=1e-6)
    figures = benchmark.measure(draw, rounds=2)
    assert figures.keys() == results.keys() and all(entry["ms"] > 0 for entry in figures.values())


def test_a_ratio_at_its_bound_is_not_beyond_it():
    a = torch.tensor([1.5, -0.5, 0.0], dtype=F64)
    elbo = torch.tensor([-3.0, -1.0, -2.0], dtype=F64)
    for dual_clip in (None, 1.0):
        assert torch.equal(rlkern.elbo_coeff(elbo, elbo, a, ratio_scale=1.0, clip=(0.0, 0.0), dual_clip=dual_clip), a)
