"""The masks of diffusion losses: their weights are the ELBO's, and a mask is a function of its numbers."""

import itertools
import math
from functools import partial

import pytest
import torch
from loss_battery import NoSyncingMethods, NoSyncingOperators

import rlkern
from rlkern import masked_elbo, next_tokens
from rlkern.diffusion import bernoulli_masks, count_masks, quadrature_levels
from rlkern.diffusion import masks as diffusion_masks

LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0, 0], [0] * 8, [0, 0, 0, 0, 0, 0, 0, 1]])  # L = 5, 3, 0, 1
SAMPLERS = {
    "count": count_masks,
    "count, alone": partial(count_masks, stratified=False),
    "count, pairs": partial(count_masks, complementary=True),
    "bernoulli": bernoulli_masks,
    "bernoulli, alone": partial(bernoulli_masks, stratified=False),
    "bernoulli, pairs": partial(bernoulli_masks, complementary=True, low=0.2, high=0.8),
}
OF_ALL_LEVELS = {name: SAMPLERS[name] for name in ("count", "count, alone", "count, pairs")}
OF_ALL_LEVELS["bernoulli"] = partial(bernoulli_masks, low=0)
OF_ALL_LEVELS["bernoulli, pairs"] = partial(bernoulli_masks, low=0, high=1 - 1e-9, complementary=True)
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)


def elbo_weight(m, length):
    """What a pattern of m masked tokens weighs in the ELBO: the integral of t^(m-1) (1-t)^(L-m) on (0, 1)."""
    return 1 / (m * math.comb(length, m))


def patterns(mask):
    """bool [..., L] -> the number whose bits these are."""
    return (mask * 2 ** torch.arange(mask.shape[-1])).sum(-1)


def bits_of(u):
    """int64 whose first 53 bits are the fraction u in [0, 1)."""
    whole = int(u * 2**53) << 11
    return whole - 2**64 if whole >= 2**63 else whole


def identical(got, mask, weight):
    return torch.equal(got.mask, mask) and torch.equal(got.weight, weight)


def enumerate_stream(monkeypatch, shared, tokens):
    """Replaces the random bits: `shared` numbers in [0, 1) a row, `tokens` [rows, L] int64 bits."""
    own = torch.tensor([[bits_of(u)] for u in shared])

    def stream(response, rollouts, draws, seed):
        return diffusion_masks._Stream(own, own, tokens.unsqueeze(1).expand(-1, len(draws), -1))

    monkeypatch.setattr(diffusion_masks, "_stream", stream)


@pytest.mark.parametrize("complementary", [False, True])
@pytest.mark.parametrize("length", [1, 3, 4])
def test_count_scheme_enumerated(monkeypatch, length, complementary):
    """Every order of the tokens times every level: each draw gives each pattern the ELBO's weight."""
    num_mc = 4
    grid = 8 * length * (length + 1)  # whole multiples of the number of levels, so that the grid's mean is the integral
    orders = torch.tensor(list(itertools.permutations(range(length))))
    shared = [(i + 0.5) / grid for i in range(grid) for _ in orders]
    enumerate_stream(monkeypatch, shared, orders.repeat(grid, 1))
    draws = count_masks(torch.ones(len(shared), length), num_mc, seed=0, complementary=complementary)
    which = patterns(draws.mask)
    for j in range(num_mc):
        got = torch.zeros(2**length, dtype=torch.float64).index_add(0, which[:, j], draws.weight[:, j].double()) / len(shared)
        for pattern in range(1, 2**length):
            assert got[pattern].item() == pytest.approx(elbo_weight(bin(pattern).count("1"), length), rel=1e-6)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_bernoulli_scheme_enumerated(monkeypatch, length):
    """Levels from a quadrature rule that is exact here, every pattern with its probability."""
    p, mc_weight = quadrature_levels(3)
    assert mc_weight.sum().item() == pytest.approx(1, abs=1e-15)
    hidden = torch.tensor(list(itertools.product([False, True], repeat=length)))
    enumerate_stream(monkeypatch, [0.0] * len(hidden), torch.where(hidden, bits_of(0.0), bits_of(1 - 2**-53)))
    draws = bernoulli_masks(torch.ones(len(hidden), length), 3, seed=0, p=p)
    assert torch.equal(draws.mask, hidden.unsqueeze(1).expand(-1, 3, -1))
    m = hidden.sum(-1, keepdim=True)
    probability = p**m * (1 - p) ** (length - m)
    total = (probability * mc_weight * draws.weight).sum(-1)
    for row, count in enumerate(m.flatten().tolist()):
        assert total[row].item() == pytest.approx(elbo_weight(count, length) if count else 0, rel=1e-6)


@pytest.mark.parametrize("sampler", OF_ALL_LEVELS.values(), ids=OF_ALL_LEVELS)
def test_expectation_of_what_is_really_drawn(sampler):
    length, rows = 4, 40_000
    draws = sampler(torch.ones(rows, length), 2, seed=11)
    which = patterns(draws.mask)
    for j, pattern in itertools.product(range(2), range(1, 16)):
        m = bin(pattern).count("1")
        values = torch.where(which[:, j] == pattern, draws.weight[:, j].double(), 0)
        assert abs(values.mean().item() - elbo_weight(m, length)) < 5 * values.std().item() / math.sqrt(rows), pattern


@pytest.mark.parametrize(("length", "num_mc"), [(5, 2), (7, 4), (8, 4), (12, 8), (51, 16)])
def test_stratified_counts_are_exactly_uniform(monkeypatch, length, num_mc):
    grid = 2 * length * num_mc
    shared = [(i + 0.5) / grid for i in range(grid)]
    enumerate_stream(monkeypatch, shared, torch.arange(length).expand(grid, length))
    counts = count_masks(torch.ones(grid, length), num_mc, seed=0).mask.sum(-1)
    for j in range(num_mc):
        assert (counts[:, j].bincount(minlength=length + 1)[1:] == grid // length).all()
    # The formula with torch.round, one k for all: half to even favours even counts.
    k = torch.arange(1, length + 1).unsqueeze(-1)
    rounded = (torch.round(k + torch.arange(num_mc) * length / num_mc) - 1) % length + 1
    pooled = rounded.long().flatten().bincount(minlength=length + 1)[1:]
    assert (pooled != num_mc).any() == ((num_mc // math.gcd(length, num_mc)) % 2 == 0)


def test_stratified_counts_spread():
    response = torch.ones(50, 12)
    for num_mc in (12, 24):
        counts = count_masks(response, num_mc, seed=1).mask.sum(-1)
        for m in range(1, 13):
            assert ((counts == m).sum(-1) == num_mc // 12).all()
    counts = count_masks(response, 4, seed=1).mask.sum(-1).sort(-1).values
    assert (counts.diff(dim=-1) == 3).all()
    alone = count_masks(response, 4, seed=1, stratified=False).mask.sum(-1).sort(-1).values
    assert (alone.diff(dim=-1) == 0).any()


def test_bernoulli_levels():
    response = torch.ones(2000, 100)
    draws = bernoulli_masks(response, 4, seed=5, low=0.2, high=0.8)
    assert draws.mask.any(-1).all()
    p = 1 / draws.weight.double()
    assert p.min() >= 0.2 - 1e-6 and p.max() < 0.8 and abs(p.mean() - 0.5) < 5 * 0.15 / math.sqrt(12 * 2000)
    gaps = (p.sort(-1).values - 0.2).diff(dim=-1)
    assert torch.allclose(gaps, torch.full_like(gaps, 0.15), atol=1e-6)
    assert abs((draws.mask.double().mean(-1) - p).mean()) < 5 * 0.5 / math.sqrt(2000 * 4 * 100)
    alone = 1 / bernoulli_masks(response, 4, seed=5, low=0.2, high=0.8, stratified=False).weight.double()
    assert (alone.sort(-1).values.diff(dim=-1) < 0.01).any() and abs(alone.mean() - 0.5) < 5 * 0.6 / math.sqrt(12 * 8000)


def test_given_levels():
    response = torch.ones(3, 5)
    one = bernoulli_masks(response, 4, seed=2, p=0.25)
    assert torch.equal(one.weight[one.mask.any(-1)], torch.full_like(one.weight, 4.0)[one.mask.any(-1)])
    levels = torch.tensor([[0.1, 0.9], [0.5, 0.5], [1.0, 0.3]])
    both = bernoulli_masks(response, 2, seed=2, p=levels)
    assert both.mask[2, 0].all() and both.weight[2, 0] == 1
    seen = both.mask.any(-1)
    torch.testing.assert_close(both.weight[seen], (1 / levels)[seen])
    assert identical(bernoulli_masks(response, 2, seed=2, p=levels, draw=1), both.mask[:, 1], both.weight[:, 1])
    pairs = bernoulli_masks(response, 4, seed=2, p=levels.clamp(max=0.9), complementary=True)
    assert torch.equal(pairs.mask[:, 1], ~pairs.mask[:, 0]) and pairs.weight[0, 1] == pytest.approx(1 / 0.9) and pairs.weight[0, 2] == 1 / 0.9


@every_sampler
def test_only_the_response(sampler):
    draws = sampler(LEFT, 8, seed=4)
    assert draws.mask.shape == (4, 8, 8) and draws.mask.dtype == torch.bool
    assert draws.weight.shape == (4, 8) and draws.weight.dtype == torch.float32
    assert not (draws.mask & (LEFT == 0).unsqueeze(1)).any()
    assert ((draws.weight == 0) == ~draws.mask.any(-1)).all() and draws.weight.isfinite().all()
    assert not draws.mask[2].any()
    masked = draws.mask[0].any(0)
    assert masked.sum() == 5, "some token of the response is never masked"


def test_weights_of_counts():
    lengths = LEFT.sum(-1, keepdim=True)
    draws = count_masks(LEFT, 6, seed=4)
    assert (draws.mask.any(-1) == (lengths > 0)).all(), "a draw of a response is never empty"
    torch.testing.assert_close(draws.weight * draws.mask.sum(-1), lengths.float().expand(4, 6))
    pairs = count_masks(LEFT, 6, seed=4, complementary=True)
    expected = torch.where(pairs.mask.any(-1), lengths + 1.0, 0)
    torch.testing.assert_close(pairs.weight * pairs.mask.sum(-1), expected)


@pytest.mark.parametrize("name", ["count, pairs", "bernoulli, pairs"])
def test_pairs_share_out_the_response(name):
    draws = SAMPLERS[name](LEFT, 6, seed=4)
    first, second = draws.mask[:, 0::2], draws.mask[:, 1::2]
    assert not (first & second).any() and torch.equal(first | second, (LEFT != 0).unsqueeze(1).expand_as(first))
    assert len({tuple(row.flatten().tolist()) for row in first[0]}) > 1, "pairs differ from each other"
    if name == "bernoulli, pairs":
        w, both = draws.weight.double(), first.any(-1) & second.any(-1)
        assert both.any()
        torch.testing.assert_close((1 / w[:, 0::2] + 1 / w[:, 1::2])[both], torch.ones(both.sum(), dtype=torch.float64), rtol=1e-6, atol=0)


@every_sampler
def test_draw_alone(sampler):
    everything = sampler(LEFT, 6, seed=9)
    for j in range(6):
        assert identical(sampler(LEFT, 6, seed=9, draw=j), everything.mask[:, j], everything.weight[:, j])


@every_sampler
def test_neither_batch_nor_padding_matters(sampler):
    everything = sampler(LEFT, 6, seed=9)
    rows = torch.tensor([3, 0])
    assert identical(sampler(LEFT[rows], 6, seed=9, rollouts=rows), everything.mask[rows], everything.weight[rows])
    padded = sampler(torch.nn.functional.pad(LEFT, (3, 2)), 6, seed=9)
    assert torch.equal(padded.mask[..., 3:-2], everything.mask) and torch.equal(padded.weight, everything.weight)


@every_sampler
def test_every_number_matters(sampler):
    response = torch.ones(2, 40)
    masks = sampler(response, 4, seed=9).mask
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[:, 0], masks[:, 2])
    assert not torch.equal(sampler(response, 4, seed=10).mask, masks)
    assert not torch.equal(sampler(response, 4, seed=9, rollouts=torch.tensor([7, 8])).mask, masks)
    assert torch.equal(sampler(response, 4, seed=torch.tensor(9)).mask, masks)
    assert torch.equal(sampler(response.bool(), 4, seed=9, rollouts=torch.tensor([0, 1], dtype=torch.int32)).mask, masks)


def test_random_bits():
    """SplitMix64's published first outputs for seed 0. Neighbours do not correlate in any direction."""
    state = torch.arange(1, 4) * diffusion_masks._GOLDEN
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [x % 2**64 for x in diffusion_masks._mix(state).tolist()] == expected
    signs = bernoulli_masks(torch.ones(64, 64), 64, seed=0, p=0.5).mask * 2.0 - 1
    assert abs(signs.mean()) < 5 / 512
    for dim in range(3):
        assert abs((signs * signs.roll(1, dim)).mean()) < 5 / 512
        assert abs((signs * signs.roll((1, 1), (dim, (dim + 1) % 3))).mean()) < 5 / 512


def test_a_known_mask():
    """What an earlier version stored must be drawn again."""
    draw = count_masks(torch.ones(1, 8), 4, seed=2026, draw=2, rollouts=torch.tensor([5]))
    assert (draw.mask.int().tolist(), draw.weight.tolist()) == ([[1, 0, 0, 0, 1, 0, 1, 1]], [2.0])


@every_sampler
def test_no_host_sync(sampler):
    response, rollouts = LEFT.clone(), torch.arange(4)
    with NoSyncingOperators(), NoSyncingMethods():
        sampler(response, 4, seed=1)
        sampler(response, 4, seed=rollouts[1], draw=2, rollouts=rollouts)


@pytest.mark.slow
def test_compiles():
    torch._dynamo.reset()
    compiled = torch.compile(lambda response, seed: count_masks(response, 4, seed=seed), fullgraph=True, dynamic=True, backend="aot_eager")
    for response in (LEFT, LEFT[:3, 1:]):
        assert identical(compiled(response, torch.tensor(3)), *count_masks(response, 4, seed=3))


@every_sampler
def test_empty_inputs(sampler):
    assert sampler(torch.ones(0, 5), 2, seed=0).mask.shape == (0, 2, 5)
    draws = sampler(torch.ones(3, 0), 2, seed=0)
    assert draws.mask.shape == (3, 2, 0) and (draws.weight == 0).all()


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, "response_mask", lambda: count_masks([[1]], 1, seed=0)),
        (ValueError, r"\[B, S\]", lambda: count_masks(torch.ones(3), 1, seed=0)),
        (TypeError, "num_mc", lambda: count_masks(LEFT, 2.0, seed=0)),
        (ValueError, "at least 1", lambda: count_masks(LEFT, 0, seed=0)),
        (ValueError, "even", lambda: count_masks(LEFT, 3, seed=0, complementary=True)),
        (IndexError, "draw", lambda: count_masks(LEFT, 2, seed=0, draw=2)),
        (TypeError, "draw", lambda: count_masks(LEFT, 2, seed=0, draw=torch.tensor(1))),
        (TypeError, "seed", lambda: count_masks(LEFT, 2, seed=0.5)),
        (TypeError, "seed", lambda: count_masks(LEFT, 2, seed=torch.tensor([1, 2]))),
        (ValueError, "seed", lambda: count_masks(LEFT, 2, seed=2**63)),
        (TypeError, "rollouts", lambda: count_masks(LEFT, 2, seed=0, rollouts=torch.ones(4))),
        (ValueError, "rollouts", lambda: count_masks(LEFT, 2, seed=0, rollouts=torch.arange(3))),
        (ValueError, "below high", lambda: bernoulli_masks(LEFT, 2, seed=0, low=0.5, high=0.5)),
        (ValueError, "high below 1", lambda: bernoulli_masks(LEFT, 2, seed=0, complementary=True)),
        (ValueError, "above 0", lambda: bernoulli_masks(LEFT, 2, seed=0, p=0)),
        (ValueError, "p must be", lambda: bernoulli_masks(LEFT, 2, seed=0, p=1.5)),
        (TypeError, "float tensor", lambda: bernoulli_masks(LEFT, 2, seed=0, p=torch.ones(2, dtype=torch.int64))),
        (ValueError, r"\(4, 2\)", lambda: bernoulli_masks(LEFT, 2, seed=0, p=torch.ones(3))),
        (ValueError, "at least 1", lambda: quadrature_levels(0)),
    ],
)
def test_errors(error, match, call):
    with pytest.raises(error, match=match):
        call()


def test_all_draws_of_a_small_response_average_to_its_elbo():
    """Guesses depend on what the model sees. The mean over draws meets the sum over all patterns."""
    g = torch.Generator().manual_seed(0)
    length, vocab, rows = 3, 5, 20_000
    ids = torch.randint(vocab, (1, length), generator=g)
    table = torch.randn(2**length, length, vocab, generator=g, dtype=torch.float64)  # logits for each pattern
    exact = 0.0
    for pattern in range(1, 2**length):
        masked = [k for k in range(length) if pattern >> k & 1]
        logp = table[pattern].log_softmax(-1)
        exact += elbo_weight(len(masked), length) * sum(logp[k, ids[0, k]].item() for k in masked)
    every = (torch.arange(2**length).unsqueeze(-1) >> torch.arange(length)) % 2 == 1
    guesses = masked_elbo(table, ids.expand(len(every), -1), torch.ones(len(every)), mask=every)
    for name in ("count", "count, pairs", "bernoulli"):
        draws = OF_ALL_LEVELS[name](torch.ones(rows, length), 2, seed=3)
        elbo = (guesses[patterns(draws.mask)] * draws.weight).mean(-1)
        assert abs(elbo.mean().item() - exact) < 5 * elbo.std().item() / math.sqrt(rows)


def test_dream_rows_without_copying_the_logits():
    """Dream's row k - 1 predicts token k. Shifting ids and mask does what shifting the logits does."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, 9, generator=g, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(9, (2, 6), generator=g)
    response = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]])
    mask, weight = count_masks(response, 1, seed=0, draw=0)
    shifted = torch.cat([logits[:, :1], logits[:, :-1]], 1)  # as Dream's code does
    logp = shifted.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    expected = (torch.where(mask, logp, 0) * weight.unsqueeze(-1)).sum(-1)
    (d_expected,) = torch.autograd.grad(expected.sum(), logits)
    whole = masked_elbo(logits, next_tokens(ids), weight, mask=next_tokens(mask, False))
    sliced = masked_elbo(logits[:, :-1], ids[:, 1:], weight, mask=mask[:, 1:])
    for elbo in (whole, sliced):
        torch.testing.assert_close(elbo, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.autograd.grad(elbo.sum(), logits)[0], d_expected, rtol=1e-12, atol=1e-15)


def test_exports():
    assert rlkern.diffusion.MaskDraws._fields == ("mask", "weight")
