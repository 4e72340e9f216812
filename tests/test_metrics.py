"""Metrics of parts of a batch merged into those of the whole, against formulas over all tokens in float64."""

import math

import loss_battery as battery
import pytest
import torch
from bgpo_batch import Batch
from ranks import on_ranks
from thread_ranks import thread_ranks

import rlkern
from rlkern import parallel
from rlkern.metrics.merge import RULES

F64 = torch.float64


def draw(lengths, seed=0, spread=0.5):
    """One sequence a length: (logp, old_logp, advantages, mask)."""
    g = torch.Generator().manual_seed(seed)
    shape = len(lengths), max([*lengths, 1])
    d = spread * torch.randn(shape, generator=g, dtype=F64)
    old = -1 - torch.rand(shape, generator=g, dtype=F64)
    return old + d, old, torch.randn(shape, generator=g, dtype=F64), torch.arange(shape[1]) < torch.tensor(lengths, dtype=torch.int64).view(-1, 1)


# Micro-batches of two processes, empty ones among them.
BATCHES = {0: [draw([5, 0, 3], 1), draw([0, 0], 2)], 1: [draw([1], 3, spread=2.0), draw([7, 2], 4), draw([2], 5)]}


def parts_of(rank):
    return [rlkern.ppo_loss(*batch).metrics for batch in BATCHES[rank]]


def expected(batches):
    """ppo_loss's metrics over the tokens of all batches together."""
    d, a = (torch.cat(parts) for parts in zip(*(((x - old)[mask], a[mask]) for x, old, a, mask in batches), strict=True))
    r = d.exp()
    return {
        "clip_fraction_low": ((a < 0) & (r < 0.8)).double().mean(),
        "clip_fraction_high": ((a > 0) & (r > 1.2)).double().mean(),
        "approx_kl_k1": -d.mean(),
        "approx_kl_k3": (torch.expm1(d) - d).mean(),
        "ratio_max": r.max(),
        "ratio_min": r.min(),
        "effective_sample_size": r.sum() ** 2 / (len(r) * (r**2).sum()),
        "tokens": torch.tensor(float(len(r)), dtype=F64),
        "log_mean_ratio": r.mean().log(),
    }


def clipped(count, tokens, largest):
    """A micro-batch with `count` of its tokens clipped and the largest log ratio `largest`."""
    d = torch.zeros(1, tokens)
    d[:, :count] = largest
    return rlkern.ppo_loss(d - 2, torch.full_like(d, -2.0), torch.ones(1), torch.ones_like(d)).metrics


def test_two_ranks_of_different_length():
    """3 of 12 tokens clipped and 3 of 4: 6 of 16, where the mean of the means is 1/2."""
    merged = rlkern.reduce_metrics([clipped(3, 12, 0.5), clipped(3, 4, 1.0)])
    assert merged["clip_fraction_high"].item() == pytest.approx(0.375, rel=1e-7)
    assert merged["ratio_max"].item() == pytest.approx(math.e, rel=1e-7) and merged["ratio_min"] == 1 and merged["tokens"] == 16


@pytest.mark.parametrize("form", ["auto", "reference"])
def test_against_the_formulas(form):
    with rlkern.use_backend(form):
        parts = parts_of(0) + parts_of(1)
    merged = rlkern.reduce_metrics(parts)
    torch.testing.assert_close(merged, expected(BATCHES[0] + BATCHES[1]), rtol=1e-12, atol=1e-14)
    assert list(merged) == list(parts[0]) and all(value.dtype == F64 and value.dim() == 0 for value in merged.values())
    merge = rlkern.reduce_metrics
    in_steps = merge([merge(parts[:2]), merge([merge(parts[2:4]), parts[4]])])
    torch.testing.assert_close(in_steps, merged, rtol=1e-12, atol=1e-14)


def test_float32_metrics_keep_their_accuracy():
    def cast(batches, dtype):
        return [tuple(t.to(dtype) if t.is_floating_point() else t for t in batch) for batch in batches]

    batches = cast(BATCHES[0] + BATCHES[1], torch.float32)
    merged = rlkern.reduce_metrics([rlkern.ppo_loss(*batch).metrics for batch in batches])
    torch.testing.assert_close(merged, expected(cast(batches, F64)), rtol=1e-5, atol=1e-6)


def test_empty_parts_do_not_count():
    """Their ratio_max and ratio_min of 1 would be the largest and smallest of these."""
    nothing = rlkern.ppo_loss(*draw([0, 0])).metrics
    for shift in (-3.0, 3.0):
        logp, old, a, mask = draw([4])
        batch = logp + shift, old, a, mask
        merged = rlkern.reduce_metrics([nothing, rlkern.ppo_loss(*batch).metrics, nothing])
        torch.testing.assert_close(merged, expected([batch]), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(rlkern.reduce_metrics([nothing, nothing]), nothing)


def test_ratios_that_overflow():
    """exp(800) overflows float64: reported as infinite, it does not hinder the effective sample size."""
    d = torch.tensor([[800.0, 799.0], [797.0, 800.5], [-0.5, 0.3]], dtype=F64)
    parts = [rlkern.ppo_loss(x, torch.zeros_like(x), torch.ones(1), torch.ones_like(x)).metrics for x in d.split(1)]
    merged = rlkern.reduce_metrics([*parts, rlkern.ppo_loss(*draw([0])).metrics])
    assert merged["ratio_max"] == math.inf and merged["approx_kl_k3"] == math.inf and merged["clip_fraction_high"].item() == pytest.approx(5 / 6)
    w = (d - 800).exp()
    torch.testing.assert_close(merged["effective_sample_size"], w.sum() ** 2 / (6 * (w**2).sum()), rtol=1e-12, atol=0)
    torch.testing.assert_close(merged["log_mean_ratio"], 800 + w.mean().log(), rtol=1e-14, atol=0)
    assert merged["ratio_min"].item() == pytest.approx(math.exp(-0.5))


def test_tokens_that_the_policy_forbids(backend, device):
    """Ratios of 0: a part of nothing else has no effective sample size, and no part in that of the whole."""
    forbidden, old = torch.full((1, 3), -math.inf, device=device), torch.full((1, 3), -1.0, device=device)
    parts = [rlkern.ppo_loss(x, old, torch.ones(1, device=device), torch.ones_like(x)).metrics for x in (forbidden, old - 0.5)]
    assert parts[0]["log_mean_ratio"] == -math.inf
    merged = rlkern.reduce_metrics(parts)
    assert merged["effective_sample_size"].item() == pytest.approx(0.5, rel=1e-6) and merged["ratio_min"] == 0 and merged["approx_kl_k1"] == math.inf
    assert merged["log_mean_ratio"].item() == pytest.approx(math.log(math.exp(-0.5) / 2), rel=1e-6)
    above = rlkern.ppo_loss(old, forbidden, torch.ones(1, device=device), torch.ones_like(old)).metrics
    assert above["log_mean_ratio"] == math.inf


def test_what_a_selection_reports():
    """Means over the selected tokens weigh by these."""
    parts = [
        {"tokens": 8.0, "selected_fraction": 0.25, "covariance_selected": 3.0, "covariance_mean": 1.0},
        {"tokens": 2.0, "selected_fraction": 0.5, "covariance_selected": -6.0, "covariance_mean": 2.0},
        {"tokens": 5.0, "selected_fraction": 0.0, "covariance_selected": 0.0, "covariance_mean": 0.0},
    ]
    merged = rlkern.reduce_metrics([{name: torch.tensor(value) for name, value in part.items()} for part in parts])
    assert {name: value.item() for name, value in merged.items()} == pytest.approx(
        {"tokens": 15, "selected_fraction": 3 / 15, "covariance_selected": 0.0, "covariance_mean": 12 / 15}
    )


def test_pairs():
    g = torch.Generator().manual_seed(0)
    logps = torch.randn(4, 7, generator=g, dtype=F64)
    merged = rlkern.reduce_metrics([rlkern.metrics.displacement_metrics(*logps[:, rows]) for rows in (slice(0, 2), slice(2, 2), slice(2, 7))])
    chosen, rejected = logps[0] - logps[2], logps[1] - logps[3]
    want = (chosen.mean(), rejected.mean(), (chosen - rejected).mean(), ((chosen < 0) & (rejected < 0)).double().mean(), (chosen < 0).double().mean())
    torch.testing.assert_close(list(merged.values()), [*want, torch.tensor(7.0, dtype=F64)])


def bgpo_metrics(rows, batch):
    acc = rlkern.BGPOAccumulator(batch.advantages[rows], batch.old[rows], batch.seq_weight[rows], ratio_scale=batch.scale[rows], clip=(0.2, 0.2))
    for j in range(acc.num_mc):
        acc.loss(j, batch.logits[j][rows], batch.targets[rows], weight=batch.weight[j][rows], mask=batch.mask[j][rows])
    return acc.metrics()


def test_bgpo_accumulators():
    batch = Batch(spread=0.8)
    merged = rlkern.reduce_metrics([bgpo_metrics(rows, batch) for rows in (slice(0, 1), slice(1, 1), slice(1, None))])
    whole = bgpo_metrics(slice(None), batch)
    torch.testing.assert_close(merged, whole, rtol=1e-10, atol=1e-12)
    assert whole["clip_fraction"] > 0 and set(whole) <= set(RULES)


def test_every_rule_is_a_metric_of_some_loss():
    batch = Batch()
    names = set().union(*(battery.metrics_of(case(case.inputs()[0])) for case in battery.CASES))
    names |= set(bgpo_metrics(slice(None), batch)) | set(rlkern.metrics.displacement_metrics(*torch.zeros(4, 1)))
    x = torch.zeros(1, 2)
    names |= rlkern.rollout_weights(x, x, x == 0, gates={"token_k2": 1.0}).metrics.keys() - {"rollout/gate/token_k2"}
    assert names == set(RULES)


def test_numbers():
    """3 of 12 and 3 of 4 tokens clipped; ratios e^.5 and e; a part without tokens."""
    parts = [
        rlkern.ppo_loss(torch.full((1, n), d), torch.zeros(1, n), torch.where(torch.arange(n) < 3, 1.0, -1.0).unsqueeze(0), torch.ones(1, n)).metrics
        for n, d in ((12, 0.5), (4, 1.0))
    ]
    merged = rlkern.reduce_metrics(parts)
    expected = {"clip_fraction_high": 0.375, "ratio_max": math.e, "ratio_min": math.exp(0.5), "effective_sample_size": 0.944803, "tokens": 16}
    for name, value in expected.items():
        assert merged[name].item() == pytest.approx(value, rel=1e-6), name
    few = [rlkern.ppo_loss(torch.full((1, 2), -1.0), torch.zeros(1, 2), torch.ones(1), torch.full((1, 2), float(count))).metrics for count in (1, 0)]
    assert rlkern.reduce_metrics(few)["ratio_max"].item() == pytest.approx(math.exp(-1))
    again = rlkern.reduce_metrics([rlkern.reduce_metrics(parts[:1]), parts[1]])
    torch.testing.assert_close(again, merged)


def test_kinds():
    """Metrics of a caller's own, by tokens: a part without any has no say."""
    own = {"mean": (1.0, 3.0), "max": (1.0, 3.0), "min": (1.0, 3.0), "sum": (1.0, 3.0), "log_mean": (0.0, 1.0)}
    parts = [{"tokens": torch.tensor(n), **{f"my {kind}": torch.tensor(v[i]) for kind, v in own.items()}} for i, n in enumerate((3.0, 1.0))]
    parts.append({"tokens": torch.tensor(0.0), **{f"my {kind}": torch.tensor(9.0) for kind in own}})
    merged = rlkern.reduce_metrics(parts, kinds={f"my {kind}": kind for kind in own})
    expected = {"my mean": 1.5, "my max": 3, "my min": 1, "my sum": 13, "my log_mean": math.log((3 + math.e) / 4), "tokens": 4}
    assert {name: value.item() for name, value in merged.items()} == pytest.approx(expected)
    for kinds, error, message in (({"my mean": "average"}, ValueError, "unknown kinds 'average'"), (["mean"], TypeError, "kinds must be a dict"),
                                  (None, ValueError, "unknown metric 'my log_mean': it has no rule .* kinds=")):  # fmt: skip
        with pytest.raises(error, match=message):
            rlkern.reduce_metrics(parts, kinds=kinds)


def test_of_rollout_weights():
    """Two parts merge into the whole, one of them rejected to the last token."""
    g = torch.Generator().manual_seed(0)
    x, y = (-torch.rand(6, 5, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(6, 5, generator=g) < 0.8
    for preset in ("tis", "icepop", "seq-tis", "seq-mask-tis"):
        whole = rlkern.rollout_weights(x, y, mask, preset=preset).metrics
        parts = [rlkern.rollout_weights(x[rows], y[rows], mask[rows], preset=preset).metrics for rows in (slice(0, 2), slice(2, 2), slice(2, 6))]
        torch.testing.assert_close(rlkern.reduce_metrics(parts), whole, rtol=1e-9, atol=1e-12)


def test_a_rank_that_refuses():
    def report(group):
        return rlkern.reduce_metrics([{"tokens": torch.ones(()), f"m{group.place}": torch.ones(())}], group=group, kinds={"m1": "sum"})

    with thread_ranks(2) as run, pytest.raises(ValueError, match="unknown metric 'm0'"):
        run(report)


@pytest.mark.parametrize(
    ("parts", "kinds"),
    [
        ([{"tokens": 3.0, "kl": 1.0}], None),
        ([{"tokens": 3.0}], None),  # as many numbers must travel
        ([{"tokens": 3.0, "entropy": 1.0, "mine": 1.0}], {"mine": "sum"}),
        ([{"tokens": 3.0, "entropy": 1.0}], {"entropy": "sum"}),
        ([{"tokens": 3.0, "entropy": 1.0}], {"entropy": "average"}),
        ([{"tokens": 3.0, "surprise": 1.0}], None),
        ([{"tokens": 3.0, "entropy": 1.0}, {"tokens": 3.0}], None),
    ],
)
def test_ranks_that_differ_without_a_header(monkeypatch, parts, kinds):
    """As on GPUs, where the host may not read: NaN, or an error of its own; nobody waits."""
    monkeypatch.setattr(parallel.Meeting, "exchanges", False)
    parts = [{name: torch.tensor(value) for name, value in part.items()} for part in parts]

    def report(group):
        try:
            if group.place:
                return rlkern.reduce_metrics(parts, group=group, kinds=kinds)
            return rlkern.reduce_metrics([{"tokens": torch.tensor(2.0), "entropy": torch.tensor(1.0)}], group=group)
        except ValueError as error:
            return error

    with thread_ranks(2) as run:
        first, second = run(report)
    assert all(value.isnan() for value in first.values())
    assert isinstance(second, ValueError) or all(value.isnan() for value in second.values())


def test_parts_without_tokens_may_hold_anything():
    nan = {name: torch.tensor(math.nan) for name in clipped(1, 2, 0.5)} | {"tokens": torch.tensor(0.0)}
    part = clipped(1, 2, 0.5)
    torch.testing.assert_close(rlkern.reduce_metrics([nan, part, nan]), rlkern.reduce_metrics([part]))


def test_nothing_waits_for_the_device():
    parts = parts_of(1)
    with battery.NoSyncingOperators(), battery.NoSyncingMethods():
        rlkern.reduce_metrics(parts)


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ([], ValueError, "at least one"),
        ([torch.zeros(())], TypeError, "dicts of metrics, got Tensor"),
        ([{3: torch.ones(()), "tokens": torch.ones(())}], TypeError, "names of metrics must be strings, got 3"),
        ([{"tokens": torch.ones(())}, {3: torch.ones(())}], ValueError, "the same metrics, got 3, tokens in some of them only"),
        ([{"tokens": 1.0}], TypeError, "'tokens' must be a 0-d tensor, got float"),
        ([{"tokens": torch.ones(2)}], ValueError, r"'tokens' must be one real number, .* of shape \(2,\)"),
        ([{"surprise": torch.ones(())}], ValueError, "unknown metric 'surprise'"),
        ([{"kl": torch.ones(())}], ValueError, "'kl' is merged by 'tokens', .* got 'kl'"),
        ([{"effective_sample_size": torch.ones(())}], ValueError, "by 'tokens' and 'log_mean_ratio' or 'groups'"),
        ([{"tokens": torch.ones(())}, {"pairs": torch.ones(())}], ValueError, "the same metrics, got pairs, tokens in some"),
    ],
)
def test_errors(parts, error, message):
    with pytest.raises(error, match=message):
        rlkern.reduce_metrics(parts)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes():
    for merged in on_ranks(2, merged_over):
        torch.testing.assert_close(merged, expected(BATCHES[0] + BATCHES[1]), rtol=1e-12, atol=1e-14)


def merged_over(group, rank):
    parts = parts_of(rank)
    if rank == 1:
        parts = [dict(reversed(part.items())) for part in parts]
    return rlkern.reduce_metrics(parts, group=group)
