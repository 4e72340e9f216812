"""Covariance, Clip-Cov and KL-Cov against naive float64 versions with Python's sort; edges; presets."""

import importlib
import math

import pytest
import torch
from derivatives import agree, tokens_of
from loss_battery import NoSyncingMethods, NoSyncingOperators
from thread_ranks import thread_ranks

import rlkern
from rlkern.primitives.selection import fraction_count, select_top

F64 = torch.float64


def draw(seed=0, batch=6, length=12, spread=0.3):
    """A heavy tail of rare tokens: covariances reach beyond 5. Ratios beyond the clip, ragged sequences."""
    g = torch.Generator().manual_seed(seed)
    logp = -4 * torch.rand(batch, length, generator=g, dtype=F64) ** 3 - 0.01
    logp = torch.where(torch.rand(batch, length, generator=g) < 0.2, logp - 7, logp)
    old = logp + spread * torch.randn(batch, length, generator=g, dtype=F64)
    advantages = 1.5 * torch.randn(batch, length, generator=g, dtype=F64)
    mask = torch.arange(length) < torch.randint(length // 2, length + 1, (batch,), generator=g).unsqueeze(-1)
    mask[0] = True
    return logp.requires_grad_(), old, advantages, mask


def naive_covariance(logp, advantages, mask):
    tokens = tokens_of(mask)
    x, a = [logp[i].item() for i in tokens], [advantages[i].item() for i in tokens]
    mean_x, mean_a = sum(x) / len(x), sum(a) / len(a)
    return {i: (q - mean_a) * (p - mean_x) for i, p, q in zip(tokens, x, a, strict=True)}


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
def test_covariance(backend, device, mask_dtype):
    logp, _, advantages, mask = (t.detach().to(device) for t in draw())
    covariance = rlkern.token_covariance(logp.requires_grad_(), advantages, mask.to(mask_dtype))
    expected = naive_covariance(logp, advantages, mask)
    for i in tokens_of(torch.ones_like(mask)):
        torch.testing.assert_close(covariance[i].item(), expected.get(i, 0.0))
    assert not covariance.requires_grad and covariance.dtype == F64
    poisoned = torch.where(mask, logp, math.nan), torch.where(mask, advantages, math.inf)
    assert torch.equal(rlkern.token_covariance(*poisoned, mask), covariance)
    assert rlkern.token_covariance(logp.float(), advantages, mask).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [1, 16, 33, 50])
def test_lengths_strides_and_dtypes(backend, device, monkeypatch, n, dtype):
    """Against float64 on the rounded inputs. Programs take several small blocks, and a part of the last."""
    if backend == "triton":
        for name in ("BLOCK", "MOST_PROGRAMS"):
            monkeypatch.setattr(importlib.import_module("rlkern.triton_kernels.covariance"), name, 4)
    g = torch.Generator().manual_seed(n)
    x, a = (torch.randn(2 * n, 3, generator=g).to(device, dtype)[::2].t() for _ in range(2))
    mask = torch.rand(n, 3, generator=g).to(device).t() < 0.7
    x[0, n // 2], mask[0, n // 2] = (-math.inf if n > 1 else -1), True
    counted = mask & x.isfinite()
    wide = [torch.where(counted, t.double(), 0) for t in (x, a)]
    means = [t.sum() / counted.sum() for t in wide]
    expected = torch.where(counted, (wide[0] - means[0]) * (wide[1] - means[1]), 0)
    covariance = rlkern.token_covariance(x, a, mask)
    tolerance = 1e-12 if dtype == F64 else 2e-6
    torch.testing.assert_close(covariance.double(), expected, rtol=tolerance, atol=tolerance)
    assert covariance.dtype == (F64 if dtype == F64 else torch.float32) and (covariance[~counted] == 0).all()
    assert torch.equal(rlkern.token_covariance(x, a, mask), covariance)


def test_a_million_tokens_keep_their_accuracy(backend, device):
    """Few values, far from zero: a long float32 sum rounds each addition the same way, by 1e-3 in all."""
    n = 1 << (20 if backend != "triton" or device == "cuda" else 15)
    i = torch.arange(n)
    x, a = (-20.1 + 0.01 * (i % 2)).float().view(8, -1), (3.3 + 0.01 * (i % 3 == 0)).float().view(8, -1)
    expected = (x.double() - x.double().mean()) * (a.double() - a.double().mean())
    covariance = rlkern.token_covariance(x.to(device), a.to(device), torch.ones_like(x).to(device)).cpu()
    # A mean is rounded to float32, by 1e-6 at 20, before it is taken from values that stand 0.01 apart.
    torch.testing.assert_close(covariance.double(), expected, rtol=0, atol=3e-8)


def test_covariance_edges():
    logp, _, advantages, mask = draw()
    assert (rlkern.token_covariance(logp, advantages, torch.zeros_like(mask)) == 0).all()
    assert rlkern.token_covariance(logp[:0], advantages[:0], mask[:0]).shape == (0, 12)
    assert (rlkern.token_covariance(logp, torch.ones(6, dtype=F64), mask) == 0).all()
    # A forbidden token is left out of the means, as if it were masked.
    forbidden, without = logp.detach().clone(), mask.clone()
    forbidden[0, 3], without[0, 3] = -math.inf, False
    assert torch.equal(rlkern.token_covariance(forbidden, advantages, mask), rlkern.token_covariance(logp, advantages, without))
    with pytest.raises(ValueError, match="advantages must be"):
        rlkern.token_covariance(logp, advantages[:, :5], mask)
    with pytest.raises(TypeError, match="mask must be"):
        rlkern.token_covariance(logp, advantages, [True])


def test_covariance_quantiles():
    covariance, mask = torch.tensor([[3.0, 1.0, math.nan], [2.0, 5.0, 4.0]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    quantiles = rlkern.metrics.covariance_quantiles
    assert quantiles(covariance, mask, (0.0, 0.5, 0.74, 1.0)).tolist() == [1, 3, 3, 5]
    assert quantiles(covariance, mask * 0).tolist() == [0, 0, 0, 0]
    assert quantiles(covariance[:0], mask[:0], (0.5,)).tolist() == [0]
    for error, words, arguments in (
        (ValueError, "quantiles", (covariance, mask, (50.0,))),
        (ValueError, "mask must have the shape", (covariance, mask[:1])),
        (ValueError, "mask must be on the device of covariance cpu, got meta", (covariance, mask.to("meta"))),
        (TypeError, "covariance must be a float tensor", (mask, mask)),
    ):
        with pytest.raises(error, match=words):
            quantiles(*arguments)


def test_group():
    """Two ranks with unequal shares get the covariances of the whole batch. Each selects among its tokens."""
    tokens = draw()
    shares = (slice(0, 2), slice(2, 6))

    def on_rank(group):
        logp, old, advantages, mask = x = [t[shares[group.place]] for t in tokens]
        covariance = rlkern.token_covariance(logp, advantages, mask, group=group)
        return covariance, rlkern.kl_cov_loss(*x, select_ratio=0.1, group=group).loss.detach()

    with thread_ranks(2) as run:
        parts = run(on_rank)
    logp, _, advantages, mask = tokens
    whole = rlkern.token_covariance(logp, advantages, mask)
    torch.testing.assert_close(torch.cat([covariance for covariance, _ in parts]), whole)
    for (_, loss), share in zip(parts, shares, strict=True):
        x = [t[share] for t in tokens]
        chosen = select_top(whole[share], x[3], fraction_count(x[3].sum(), 0.1, 1))
        torch.testing.assert_close(loss, rlkern.kl_cov_loss(*x, selected=chosen).loss.detach())


def test_operators():
    logp, _, advantages, mask = draw()
    tokens = logp.detach().float(), advantages.float(), mask
    sums = torch.stack([mask.sum().double(), *(torch.where(mask, x, 0).sum().double() for x in tokens[:2])])
    for given in (None, sums):
        torch.library.opcheck(torch.ops.rlkern.token_covariance.default, (*tokens, given))
        torch.testing.assert_close(torch.ops.rlkern.token_covariance.default(*tokens, given), rlkern.token_covariance(*tokens))


def test_compiled_and_transformed():
    logp, old, advantages, mask = draw()
    compiled = torch.compile(rlkern.token_covariance, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (6, 4):
        tokens = logp[:rows], advantages[:rows], mask[:rows]
        torch.testing.assert_close(compiled(*tokens), rlkern.token_covariance(*tokens))

    def loss(x):
        return rlkern.kl_cov_loss(x, old, advantages, mask, select_ratio=0.1).loss

    expected = torch.autograd.grad(loss(logp), logp)[0]
    torch.testing.assert_close(torch.func.grad(loss)(logp.detach()), expected)


def test_no_host_sync():
    logp, old, advantages, mask = draw()
    with NoSyncingMethods(), NoSyncingOperators():
        covariance = rlkern.token_covariance(logp, advantages, mask)
        rlkern.metrics.covariance_quantiles(covariance, mask)
        rlkern.clip_cov_loss(logp, old, advantages, mask, generator=torch.Generator()).loss.backward()


def naive_clip_cov(logp, old, advantages, mask, low, high, removed):
    def term(i):
        a, r = advantages[i], (logp[i] - old[i]).exp()
        return 0 * logp[i] if i in removed else torch.maximum(-a * r, -a * r.clamp(1 - low, 1 + high))

    return sum(term(i) for i in tokens_of(mask)) / len(tokens_of(mask))


@pytest.mark.parametrize("seed", range(5))
def test_clip_cov_removes_the_band(seed):
    """With select_ratio=1 every candidate leaves, and nothing else does."""
    x = draw(seed)
    logp, old, advantages, mask = x
    covariance, r = naive_covariance(logp, advantages, mask), (logp - old).exp()
    band = [i for i, c in covariance.items() if 1 < c < 5]
    removed = {i for i in band if not (r[i] > 1.2 if advantages[i] > 0 else r[i] < 0.8)}
    assert 0 < len(removed) < len(band) and any(c > 5 for c in covariance.values())  # the draw tests clipping and the upper bound
    ours = rlkern.clip_cov_loss(*x, select_ratio=1.0, clip_low=0.2, clip_high=0.2)
    agree(ours.loss, naive_clip_cov(*x, 0.2, 0.2, removed), logp)
    torch.testing.assert_close(ours.metrics["selected_fraction"].item(), len(removed) / len(covariance))
    torch.testing.assert_close(ours.metrics["covariance_selected"].item(), sum(covariance[i] for i in removed) / len(removed))
    torch.testing.assert_close(ours.metrics["covariance_mean"].item(), sum(covariance.values()) / len(covariance))
    agree(ours.loss, rlkern.clip_cov_loss(*x, select_ratio=1.0, preset="verl").loss, logp)


@pytest.mark.parametrize("select_ratio, expected", [(2e-4, 1), (0.0, 1), (0.05, None), (0.08, None)])
def test_clip_cov_count(select_ratio, expected):
    """max(floor(ratio N), 1) candidates leave. Their gradient, and no other, is 0 here."""
    x = draw(3, spread=0.05)
    logp, old, advantages, mask = x
    count = expected or int(select_ratio * int(mask.sum()))
    covariance = naive_covariance(logp, advantages, mask)
    candidates = {i for i, c in covariance.items() if 1 < c < 5}
    assert len(candidates) > count >= 1
    seen = set()
    for seed in range(12):
        output = rlkern.clip_cov_loss(*x, select_ratio=select_ratio, generator=torch.Generator().manual_seed(seed))
        gradient = torch.autograd.grad(output.loss, logp)[0]
        removed = {i for i in covariance if gradient[i] == 0}
        assert len(removed) == count and removed <= candidates
        torch.testing.assert_close(output.loss, naive_clip_cov(*x, 1.0, 1.0, removed))
        seen.add(frozenset(removed))
    assert len(seen) > 1  # a draw, not a fixed choice


def test_clip_cov_presets():
    # Mean advantage 0, mean logp -3: covariances 1, 1, 5, 5 on the band's very bounds, and 3, 3 inside.
    logp = torch.tensor([[-2.0, -4.0, 2.0, -8.0, 0.0, -6.0]], dtype=F64, requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0, -1.0]], dtype=F64)
    mask = torch.ones(1, 6)
    assert rlkern.token_covariance(logp, advantages, mask).tolist() == [[1, 1, 5, 5, 3, 3]]

    def removed(**options):
        gradient = torch.autograd.grad(rlkern.clip_cov_loss(logp, logp.detach(), advantages, mask, select_ratio=1.0, **options).loss, logp)[0]
        return (gradient == 0).flatten().tolist()

    inside = [False] * 4 + [True] * 2
    assert removed() == removed(preset="prime") == removed(preset="verl") == inside
    assert removed(preset="paper") == [True] * 6
    assert removed(preset="paper", closed_band=False) == removed(preset="verl", closed_band=False) == inside
    assert removed(preset="prime", closed_band=True) == [True] * 6

    def taken(**options):
        return rlkern.clip_cov_loss(logp, logp.detach(), advantages, mask, **options).metrics["selected_fraction"].item()

    assert taken(preset="paper", select_ratio=0.1) == 0  # floor(0.6)
    torch.testing.assert_close(taken(preset="verl", select_ratio=0.1), 1 / 6)
    torch.testing.assert_close(taken(preset="paper", select_ratio=0.1, min_count=2), 2 / 6)
    assert taken(select_ratio=1.0, cov_low=5.0, cov_high=math.inf) == 0


def test_clip_cov_clip_of_presets():
    """prime's ratio in [0, 2], verl's in [0.8, 1.2], the paper's free; an option given as well wins."""
    old = torch.full((1, 4), -3.0, dtype=F64)
    logp = (old + torch.tensor([2.5, 1.5, 0.5, 0.9], dtype=F64).log()).requires_grad_()
    advantages, none = torch.tensor([[1.0, 1.0, -1.0, 1.0]], dtype=F64), torch.zeros(1, 4)

    def gradient(**options):
        return torch.autograd.grad(rlkern.clip_cov_loss(logp, old, advantages, torch.ones(1, 4), selected=none, **options).loss, logp)[0][0].tolist()

    r = [-2.5 / 4, -1.5 / 4, 0.5 / 4, -0.9 / 4]
    assert gradient(preset="paper") == pytest.approx(r)
    assert gradient() == gradient(preset="prime") == pytest.approx([0, *r[1:]])
    assert gradient(preset="verl") == pytest.approx([0, 0, 0, r[3]])
    assert gradient(preset="verl", clip_low=0.6, clip_high=9.0) == pytest.approx(r)


def test_clip_cov_without_candidates_is_ppo():
    logp, old, _, mask = draw()
    x = (logp, old, torch.full((6,), -1.0, dtype=F64), mask)  # equal advantages: every covariance is 0
    agree(rlkern.clip_cov_loss(*x, preset="verl").loss, rlkern.ppo_loss(*x, log_ratio_clamp=None).loss, logp)


def test_external_selection():
    x = draw()
    mask = x[3]
    picked = torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    removed = {i for i in tokens_of(mask) if picked[i]}
    for given in (picked, picked.int(), picked.double()):
        ours = rlkern.clip_cov_loss(*x, selected=given)
        agree(ours.loss, naive_clip_cov(*x, 1.0, 1.0, removed), x[0])
    torch.testing.assert_close(ours.metrics["selected_fraction"].item(), len(removed) / int(mask.sum()))
    kept = rlkern.clip_cov_loss(*x, selected=picked, keep_value=True).loss
    torch.testing.assert_close(kept, naive_clip_cov(*x, 1.0, 1.0, set()))
    torch.testing.assert_close(torch.autograd.grad(kept, x[0]), torch.autograd.grad(ours.loss, x[0]), rtol=0, atol=0)


def naive_kl_cov(logp, old, advantages, mask, chosen, coef):
    total = 0
    for i in tokens_of(mask):
        d = logp[i] - old[i]
        total = total - advantages[i] * d.exp() + (coef * d.abs() if i in chosen else 0)
    return total / len(tokens_of(mask))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("select_ratio, coef", [(0.002, 1.0), (0.1, 0.5), (0.33, 1.0)])
def test_kl_cov(seed, select_ratio, coef):
    x = draw(seed, spread=1.0)
    covariance = naive_covariance(x[0], x[2], x[3])
    k = max(1, int(len(covariance) * select_ratio))
    top = set(sorted(covariance, key=covariance.get)[-k:])
    ours = rlkern.kl_cov_loss(*x, select_ratio=select_ratio, kl_coef=coef)
    agree(ours.loss, naive_kl_cov(*x, top, coef), x[0])
    torch.testing.assert_close(ours.metrics["selected_fraction"].item(), k / len(covariance))
    d = [abs((x[0][i] - x[1][i]).item()) for i in covariance]
    torch.testing.assert_close(ours.metrics["abs_log_ratio"].item(), sum(d) / len(d))


def test_kl_cov_presets():
    x = draw(batch=30, length=60)
    n = int(x[3].sum())
    assert 1000 < n < 1800
    for preset, options in {None: (2e-3, 1.0), "paper": (2e-3, 1.0), "prime": (2e-3, 1.0), "verl": (2e-4, 0.1)}.items():
        output = rlkern.kl_cov_loss(*x, preset=preset)
        agree(output.loss, rlkern.kl_cov_loss(*x, select_ratio=options[0], kl_coef=options[1]).loss, x[0])
        torch.testing.assert_close(output.metrics["selected_fraction"].item(), max(1, int(n * options[0])) / n)
    small = draw()
    assert rlkern.kl_cov_loss(*small, preset="paper").metrics["selected_fraction"] == 0
    assert rlkern.kl_cov_loss(*small, preset="verl").metrics["selected_fraction"] > 0
    agree(rlkern.kl_cov_loss(*small, preset="verl", kl_coef=2.0).loss, rlkern.kl_cov_loss(*small, select_ratio=2e-4, kl_coef=2.0).loss, small[0])


def test_kl_cov_on_policy_has_no_penalty():
    logp, _, advantages, mask = draw()
    for old in (None, logp.detach()):
        ours = rlkern.kl_cov_loss(logp, old, advantages, mask, select_ratio=1.0)
        plain = rlkern.reinforce_loss(logp, old, advantages, mask)
        torch.testing.assert_close(torch.autograd.grad(ours.loss, logp), torch.autograd.grad(plain.loss, logp))


def test_kl_cov_ties_go_to_the_first():
    logp = torch.full((2, 3), -1.0, dtype=F64, requires_grad=True)
    loss = rlkern.kl_cov_loss(logp, logp.detach() - 0.5, torch.zeros(2, dtype=F64), torch.tensor([[0, 1, 1], [1, 1, 1]]), select_ratio=0.4).loss
    assert torch.autograd.grad(loss, logp)[0].tolist() == [[0, 0.2, 0.2], [0, 0, 0]]


def test_kl_cov_external_selection():
    x = draw(spread=1.0)
    picked = torch.rand(x[3].shape, generator=torch.Generator().manual_seed(0)) < 0.3
    agree(rlkern.kl_cov_loss(*x, selected=picked).loss, naive_kl_cov(*x, {i for i in tokens_of(x[3]) if picked[i]}, 1.0), x[0])


both_losses = pytest.mark.parametrize("loss", [rlkern.clip_cov_loss, rlkern.kl_cov_loss])


@both_losses
def test_weights_multiply_after_the_selection(loss):
    """One number for all: the whole loss doubles and the selection stays."""
    x, results = draw(), []
    for options in ({}, {"weights": torch.full((6,), 2.0)}):
        if loss is rlkern.clip_cov_loss:
            options["generator"] = torch.Generator().manual_seed(0)
        results.append(loss(*x, **options))
    plain, doubled = results
    torch.testing.assert_close(doubled.loss, 2 * plain.loss)
    torch.testing.assert_close(doubled.metrics, plain.metrics)


@both_losses
@pytest.mark.parametrize(
    "options, words",
    [({"select_ratio": 0.2 * 100}, "select_ratio is a fraction in .0, 1., not a percentage, got 20"), ({"select_ratio": -0.1}, "select_ratio"),
     ({"preset": "trl"}, "unknown preset 'trl', expected one of None, 'paper', 'prime', 'verl'"), ({"min_count": -1}, "min_count"),
     ({"selected": torch.ones(3, 3)}, "selected must have the shape of logp")],
)  # fmt: skip
def test_errors(loss, options, words):
    with pytest.raises(ValueError, match=words):
        loss(*draw(), **options)


@pytest.mark.parametrize(
    "loss, options, error, words",
    [
        (rlkern.clip_cov_loss, {"cov_low": 5.0, "cov_high": 1.0}, ValueError, "cov_low must not be above cov_high, got 5.0 and 1.0"),
        (rlkern.clip_cov_loss, {"preset": "paper", "clip_low": 0.2}, ValueError, "clip_low and clip_high belong together, got 0.2 and None"),
        (rlkern.kl_cov_loss, {"kl_coef": -1.0}, ValueError, "kl_coef"),
        *((loss, {"min_count": math.inf}, TypeError, "min_count must be an integer, got inf") for loss in (rlkern.clip_cov_loss, rlkern.kl_cov_loss)),
    ],
)
def test_own_errors(loss, options, error, words):
    with pytest.raises(error, match=words):
        loss(*draw(), **options)
