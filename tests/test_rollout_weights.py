"""rollout_weights against numbers written out, and how each loss takes them.

The trainers' own functions: integrations/test_rollout_presets.py.
"""

import math
import types

import pytest
import torch
from loss_battery import NoSyncingMethods, NoSyncingOperators, Packing
from thread_ranks import thread_ranks

import rlkern
from rlkern import rollout_weights
from rlkern.losses.rollout_weights import GATES, PRESETS

F64 = torch.float64
NAN = math.nan
TRAIN = torch.tensor([[-1, -2, -0.5, -1.5], [-0.7, NAN, -0.9, -2.5]], dtype=F64)
ROLLOUT = torch.tensor([[-1.3, -1, -0.6, -2.9], [-0.7, NAN, -1, -2.4]], dtype=F64)
MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]])


def run(**options):
    return rollout_weights(TRAIN, ROLLOUT, MASK, **options)


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({"preset": "tis"}, [[1.349859, 0.367879, 1.105171, 2], [1, 0, 1.105171, 0.904837]]),
        ({}, [[1.349859, 0.367879, 1.105171, 2], [1, 0, 1.105171, 0.904837]]),
        ({"preset": "icepop"}, [[1.349859, 0, 1.105171, 4.055200], [1, 0, 1.105171, 0.904837]]),
        ({"preset": "icepop", "high": 4.0}, [[1.349859, 0, 1.105171, 0], [1, 0, 1.105171, 0.904837]]),
        ({"preset": "icepop", "high": 2.0}, [[1.349859, 0, 1.105171, 0], [1, 0, 1.105171, 0.904837]]),  # given, so not the preset's 5
        ({"preset": "icepop", "low": None}, [[1.349859, 0.367879, 1.105171, 4.055200], [1, 0, 1.105171, 0.904837]]),
        ({"preset": "icepop", "mode": "truncate"}, [[1.349859, 0.5, 1.105171, 4.055200], [1, 0, 1.105171, 0.904837]]),
        ({"preset": "seq-mask", "level": "token"}, [[1.349859, 0.367879, 1.105171, 0], [1, 0, 1.105171, 0.904837]]),
        ({"preset": "seq-tis"}, [2, 1]),
        ({"preset": "seq-mask"}, [2.225541, 1]),
        ({"level": "geometric"}, [1.221403, 1]),
        ({"preset": "veto", "gates": {"seq_all_ratio": (0.5, None)}}, [[0, 0, 0, 0], [1, 0, 1, 1]]),
        ({"preset": "geo-rs"}, [[0, 0, 0, 0], [1, 0, 1, 1]]),
        ({"preset": "seq-mis"}, [0, 1]),
        ({"preset": "seq-mask-tis"}, [[0, 0, 0, 0], [1, 0, 1.105171, 0.904837]]),
        ({"mode": "none", "gates": {"token_k1": (0.5, 1.2)}}, [[0, 0, 1, 0], [1, 0, 1, 1]]),
        ({"mode": "none", "gates": {"token_k2": 0.1, "seq_max_k3": 3.0}}, [[1, 0, 1, 0], [1, 0, 1, 1]]),
        ({"preset": "geo-rs", "groups": 2, "whole_groups": True}, [[0, 0, 0, 0], [0, 0, 0, 0]]),
    ],
)
def test_numbers(options, weights):
    r = run(**options)
    torch.testing.assert_close(r.weights, torch.tensor(weights, dtype=F64), atol=1e-6, rtol=0)
    assert r.source is ROLLOUT and not r.weights.requires_grad
    if r.level == "token":
        assert torch.equal(r.keep, (r.weights != 0) & MASK.bool())
    else:
        assert torch.equal(r.sequences_kept, r.weights != 0)
        assert torch.equal(r.keep, MASK.bool() & r.sequences_kept[:, None])


def test_normalize():
    tis, r = run(preset="tis").weights, run(preset="tis", normalize=True).weights
    assert r[0, 0].item() == pytest.approx(1.206321, abs=1e-6)
    torch.testing.assert_close(r, tis / (tis.sum() / 7))
    rejecting = run(preset="seq-mis", normalize=True)  # before the gates
    assert rejecting.weights.tolist() == pytest.approx([0, 1 / 1.5])
    assert (run(mode="mask", low=10.0, high=None, normalize=True).weights == 0).all()


def test_metrics():
    r = run(preset="tis").metrics
    expected = {"kl_k1": -0.114286, "kl_k3": 0.298302, "chi2_sequence": 1.976516, "ess": 0.857711, "ratio_max": 4.0552, "ratio_min": 0.367879}
    expected |= {"fraction_high": 1 / 7, "fraction_low": 0, "masked_fraction": 0, "abs_difference_max": 1.4, "tokens": 7, "sequences": 2, "units": 7}
    expected |= {"log_ppl_difference": -0.1, "unscored_fraction": 0}
    for name, value in expected.items():
        assert r[f"rollout/{name}"].item() == pytest.approx(value, abs=1e-6), name
    assert run(preset="icepop").metrics["rollout/ess"].item() == pytest.approx(0.574737, abs=1e-6)
    assert run(preset="icepop").metrics["rollout/masked_fraction"].item() == pytest.approx(1 / 7)
    assert run(preset="seq-tis").metrics["rollout/ess"].item() == pytest.approx(0.9)
    geo = run(preset="geo-rs").metrics
    assert geo["rollout/gate/seq_mean_k1"].item() == pytest.approx(4 / 7) and geo["rollout/sequences_masked_fraction"] == 0.5
    everything = run(mode="mask", low=10.0, high=None)
    assert everything.metrics["rollout/ess"] == 0 and (everything.weights == 0).all()  # and no ZeroDivisionError


def test_bounds_are_inclusive_and_the_engine_may_not_score():
    x = torch.tensor([2.0, 0.5, 4.0]).log().unsqueeze(0)
    r = rollout_weights(x, torch.zeros(1, 3), torch.ones(1, 3), mode="mask", low=0.5, high=2.0)
    assert r.keep.tolist() == [[True, True, False]]
    r = rollout_weights(torch.tensor([[-1.0, -1, -50]]), torch.tensor([[NAN, -1, -1]]), torch.ones(1, 3), high=None)
    assert r.weights[0, :2].tolist() == [1, 1] and r.weights[0, 2].item() == pytest.approx(math.exp(-20))
    assert r.metrics["rollout/unscored_fraction"].item() == pytest.approx(1 / 3)
    impossible = torch.tensor([[-math.inf, 0.0, -math.inf]]), torch.tensor([[-1.0, -math.inf, -math.inf]]), torch.ones(1, 3)
    r = rollout_weights(*impossible, high=None)
    assert r.weights[0].tolist() == pytest.approx([math.exp(-20), math.exp(20), 1])
    for level in ("sequence", "geometric"):  # infinite both ways: their sum is a number
        r = rollout_weights(*impossible, level=level, gates={"token_k2": 1.0, "seq_sum_k3": 1.0, "seq_mean_binary_kl": 1.0, "token_k1": (0.5, 2.0)})
        assert r.weights.isfinite().all() and all(value.isfinite() for value in r.metrics.values())
    assert rollout_weights(torch.full((1, 1), NAN), torch.zeros(1, 1), torch.ones(1, 1)).weights.isnan()  # the trainer's own is not hidden


@pytest.mark.parametrize("name", GATES)
def test_gates(name):
    """Each against a loop over tokens."""
    g = torch.Generator().manual_seed(0)
    train, rollout = (-torch.rand(12, 6, generator=g, dtype=F64) * 2 for _ in range(2))
    mask = torch.rand(12, 6, generator=g) < 0.8
    mask[3] = False
    how, _, what = name.removeprefix("seq_").partition("_")

    def statistic(a, b):
        x, p, q = a - b, math.exp(a), math.exp(b)
        kl = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
        return {"k1": x, "ratio": x, "k2": x * x / 2, "k3": math.exp(x) - 1 - x, "tv": abs(p - q), "binary_kl": kl}[what]

    values = [[statistic(train[i, t].item(), rollout[i, t].item()) for t in range(6) if mask[i, t]] for i in range(12)]
    by_row = {"sum": sum, "mean": lambda v: sum(v) / len(v), "max": max, "token": None, "all": None}[how]
    found = sorted([v for row in values for v in row] if by_row is None else [by_row(row) for row in values if row])
    wide = how == "all"  # one token of six decides
    logs = found[0 if wide else len(found) // 4] + 0.1, found[-1 if wide else 3 * len(found) // 4] - 0.1
    bound = tuple(map(math.exp, logs)) if what in ("k1", "ratio") else found[len(found) // 2] + 1e-9

    def rejects(value):
        return not logs[0] <= value <= logs[1] if isinstance(bound, tuple) else value > bound

    expected = mask.clone()
    for i, row in enumerate(values):
        out = [rejects(v) for v in row] if how in ("token", "all") else [rejects(by_row(row))] * len(row) if row else []
        expected[i, mask[i]] = ~torch.tensor([any(out)] * len(row) if how == "all" else out, dtype=torch.bool)
    r = rollout_weights(train, rollout, mask, mode="none", gates={name: bound})
    assert torch.equal(r.keep, expected) and 0 < expected.sum() < mask.sum()
    assert r.sequences_kept[3]


def test_packed_as_padded_without_a_look_at_the_host():
    g = torch.Generator().manual_seed(1)
    train, rollout = (-torch.rand(4, 6, generator=g) for _ in range(2))
    mask = torch.arange(6) < torch.tensor([[6], [0], [1], [4]])
    p = Packing(mask, 3)
    for options in ({"preset": name} for name in PRESETS):
        padded = rollout_weights(train, rollout, mask, **options, normalize=True)
        with NoSyncingOperators(), NoSyncingMethods():
            r = rollout_weights(p.input(train), p.input(rollout), p.pack, **options, normalize=True)
        torch.testing.assert_close(r.weights, p.output(padded.weights), rtol=1e-6, atol=1e-7)
        assert torch.equal(r.sequences_kept, padded.sequences_kept) and torch.equal(r.keep, p.tokens(padded.keep, False))
        torch.testing.assert_close(r.metrics, padded.metrics, rtol=1e-5, atol=1e-6)


def test_normalize_over_ranks():
    whole = run(normalize=True).weights
    with thread_ranks(2) as ranks:
        parts = ranks(lambda group: rollout_weights(*(x[group.place :][:1] for x in (TRAIN, ROLLOUT, MASK)), normalize=True, group=group).weights)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=0)


def test_normalize_over_context_parallel_parts():
    """A pack in two parts, with and without its ranks in `group`: the mean is that of all tokens."""
    whole = {level: run(level=level, normalize=True).weights for level in ("token", "sequence")}

    def part(group, level, with_group):
        columns = slice(0, 2) if group.place == 0 else slice(2, 4)
        train, rollout, mask = (x[:, columns].reshape(-1) for x in (TRAIN, ROLLOUT, MASK))
        pack = rlkern.packed(lengths=[2, 2], mask=mask, group=group)
        return rollout_weights(train, rollout, pack, level=level, normalize=True, group=group if with_group else None).weights

    for level, expected in whole.items():
        for with_group in (False, True):
            with thread_ranks(2) as ranks:
                parts = ranks(lambda group, level=level, with_group=with_group: part(group, level, with_group))
            parts = torch.cat([x.view(2, 2) for x in parts], 1) if level == "token" else parts[1]
            torch.testing.assert_close(parts, expected, rtol=1e-12, atol=0)


def test_compiled():
    """In one graph with the losses that take the result, whatever the sizes."""
    graphs = []

    def step(logp, old, rollout, advantages, mask):
        token = rollout_weights(old, rollout, mask, preset="icepop", gates={"seq_max_k2": 0.1}, normalize=True, groups=2, whole_groups=True)
        sequence = rollout_weights(old, rollout, mask, preset="seq-mis")
        losses = ((rlkern.grpo_loss, token), (rlkern.gspo_loss, sequence), (rlkern.vespo_loss, token))
        return sum(loss(logp, old, advantages, mask, weights=r).loss for loss, r in losses), token.metrics

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=lambda graph, _: graphs.append(graph) or graph)
    for seed, rows in enumerate((slice(16), slice(2, 12))):
        train, rollout, mask = (x[rows, seed:].clone() for x in drawn(seed, spread=0.2))  # views would be another graph
        a, results = torch.linspace(-1, 1, len(train)), []
        for function in (compiled, step):
            logp = (train + 0.05).requires_grad_()
            with torch._dynamo.config.patch(specialize_float=True):  # symbolic floats are traced twice
                loss, metrics = function(logp, train, rollout, a, mask)
            loss.backward()
            results.append((loss, metrics, logp.grad))
        torch.testing.assert_close(*results)
        assert 0 < results[0][1]["rollout/masked_fraction"] < 1
    assert len(graphs) == 1


# --- how losses take them -----------------------------------------------------------------------------------


def drawn(seed=0, spread=0.5):
    g = torch.Generator().manual_seed(seed)
    train = -torch.rand(16, 12, generator=g) * 2
    rollout = (train + spread * torch.randn(16, 12, generator=g)).clamp(max=-1e-3)
    return train, rollout, torch.arange(12) < torch.randint(1, 13, (16, 1), generator=g)


BY_TOKEN = {
    "ppo": rlkern.ppo_loss,
    "grpo": rlkern.grpo_loss,
    "cispo": rlkern.cispo_loss,
    "sapo": rlkern.sapo_loss,
    "reinforce": rlkern.reinforce_loss,
    "clip_cov": lambda *x, **o: rlkern.clip_cov_loss(*x, selected=torch.zeros_like(x[3]), **o),
    "kl_cov": lambda *x, **o: rlkern.kl_cov_loss(*x, selected=torch.zeros_like(x[3]), **o),
    "epo": lambda logp, *x, **o: rlkern.epo_loss(logp, x[0], torch.zeros_like(logp), *x[1:], mean_entropy=None, **o),
    "kdrl": lambda logp, *x, **o: rlkern.kdrl_loss(logp, x[0], logp.detach(), *x[1:], **o),
    "nlpo": lambda *x, **o: rlkern.nlpo_loss(*x, normalize_advantages=False, **o),
    "lp_reg": lambda logp, *x, **o: rlkern.lp_reg_loss(logp, x[0], logp.detach() - 1, *x[1:], **o),
}


@pytest.mark.parametrize("name", BY_TOKEN)
def test_a_factor_on_the_policy_term(name):
    train, rollout, mask = drawn()
    r, a, loss = rollout_weights(train, rollout, mask, preset="icepop"), torch.linspace(-1, 1, 16), BY_TOKEN[name]
    with_object = loss(train + 0.01, train, a, mask, weights=r).loss
    torch.testing.assert_close(with_object, loss(train + 0.01, train, a, mask, weights=r.weights).loss)
    by_sequence = rollout_weights(train, rollout, mask, preset="seq-tis")
    torch.testing.assert_close(
        loss(train + 0.01, train, a, mask, weights=by_sequence).loss, loss(train + 0.01, train, a, mask, weights=by_sequence.weights).loss
    )
    with pytest.raises(ValueError, match="both correct: pass the trainer's as old_logp"):
        loss(train, rollout, a, mask, weights=r)


@pytest.mark.parametrize("shape", [(3,), (1, 3)])
def test_as_many_tokens_as_sequences(shape):
    """The level says what the weights are of, where plain tensors would be ambiguous."""
    x, a, rows = torch.tensor([-1.0, -2, -0.5]), torch.tensor([[1.0], [2], [-1]]), torch.ones(3, 1)
    pack = rlkern.packed(lengths=[1, 1, 1], num_tokens=3)
    for level, loss in (("token", rlkern.ppo_loss), ("sequence", rlkern.ppo_loss), ("geometric", rlkern.gspo_loss), ("token", rlkern.vespo_loss)):
        padded, flat = (loss(y, y - 0.1, a, mask, weights=rollout_weights(y, y - 0.2 * y.abs(), mask, level=level)).loss
                        for y, mask in ((x[:, None], rows), (x.view(shape), pack)))  # fmt: skip
        torch.testing.assert_close(flat, padded)
    with pytest.raises(ValueError, match=r"weights must have the shape of logp \(2,\), got \(3,\)"):
        rlkern.ppo_loss(x[:2], x[:2] - 0.1, a[:1], rlkern.packed(lengths=[2], num_tokens=2), weights=rollout_weights(x, x, pack))


def test_penalties_stay():
    train, rollout, mask = drawn()
    r, a = rollout_weights(train, rollout, mask), torch.zeros(16)
    for weights in (r, None):
        kl = rlkern.kl_cov_loss(train + 0.1, train, a, mask, selected=mask, weights=weights).loss
        assert kl.item() == pytest.approx(0.1, rel=1e-4)
        grpo = rlkern.grpo_loss(train, train, a, mask, reference_logp=train - 0.1, kl_coef=1.0, kl_kind="k1", weights=weights).loss
        assert grpo.item() == pytest.approx(0.1, rel=1e-4)
    assert rlkern.kl_cov_loss(train + 0.1, train, a, mask, selected=mask, weights=r.weights).loss.item() != pytest.approx(0.1, rel=1e-2)


def test_sequence_losses():
    train, rollout, mask = drawn()
    a = torch.linspace(-1, 1, 16)
    token, sequence, geometric = (rollout_weights(train, rollout, mask, level=level) for level in ("token", "sequence", "geometric"))
    for loss in (rlkern.gspo_loss, rlkern.gmpo_loss):
        for r in (sequence, geometric):
            torch.testing.assert_close(loss(train, train, a, mask, weights=r).loss, loss(train, train, a, mask, weights=r.weights).loss)
        with pytest.raises(ValueError, match="weights are of level 'token', and this loss takes those of level 'sequence' or 'geometric'"):
            loss(train, train, a, mask, weights=token)
    inside = rlkern.vespo_loss(train, train, a, mask, weights=token).loss
    torch.testing.assert_close(inside, rlkern.vespo_loss(train, train, a, mask, rollout_weights=token.weights).loss)
    assert not torch.isclose(inside, rlkern.vespo_loss(train, train, a, mask, weights=token.weights).loss)
    for r in (sequence, geometric):
        with pytest.raises(ValueError, match="takes those of level 'token'"):
            rlkern.vespo_loss(train, train, a, mask, weights=r)
    for loss in (rlkern.tis_loss, rlkern.topr_loss):
        with pytest.raises(ValueError, match="this loss takes none"):
            loss(train, train, a, mask, weights=token)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"preset": "mis"}, ValueError, "unknown preset 'mis'"),
        ({"level": "batch"}, ValueError, "unknown level"),
        ({"low": 3.0}, ValueError, "low must not be above high, got 3.0 and 2.0"),
        ({"gates": {"seq_max_k1": 2.0}}, ValueError, "unknown gates 'seq_max_k1'"),
        ({"gates": {"token_k1": 2.0}}, TypeError, r"gates\['token_k1'\] must be a pair"),
        ({"gates": {"token_k2": (0.0, 2.0)}}, TypeError, r"gates\['token_k2'\] must be a number"),
        ({"gates": [1]}, TypeError, "gates must be a dict"),
        ({"whole_groups": True}, ValueError, "whole_groups=True needs groups="),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        run(**options)


def test_a_callable_of_no_kind():
    with pytest.raises(TypeError, match="weights must be a float tensor"):
        rlkern.ppo_loss(TRAIN, TRAIN, torch.ones(2), MASK, weights=types.SimpleNamespace(level="token"))


def test_weights_of_another_batch_are_refused():
    """As many tokens in another shape are other tokens, unless a pack says where its sequences are."""
    x = -torch.ones(2, 3)
    r = rollout_weights(x, x - 0.1, torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"weights must have the shape of logp \(3, 2\)"):
        rlkern.ppo_loss(x.view(3, 2), x.view(3, 2), torch.ones(3), torch.ones(3, 2), weights=r)


def test_rows_of_the_weights_for_a_micro_batch():
    train, rollout, mask = drawn()
    a = torch.linspace(-1, 1, len(train))
    r = rollout_weights(train, rollout, mask, normalize=True)
    of = torch.full((len(train), 1), 0.1)
    whole = rlkern.vespo_loss(train, train, a, mask, weights=r, aggregation=of).loss
    parts = [
        rlkern.vespo_loss(train[i], train[i], a[i], mask[i], weights=r._replace(weights=r.weights[i]), aggregation=of[i]).loss
        for i in (slice(0, 5), slice(5, None))
    ]
    torch.testing.assert_close(sum(parts), whole)
