"""sampler_threshold on every backend: each rule by its definition, every pair of logits compared in float64."""

import math

import pytest
import torch
from isas import every_isa

import rlkern
from rlkern import Kept, sampler_threshold

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
RULES = {
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.15},
    "top_p joint": {"top_p": 0.9, "order": "joint"},
    "all": {"top_k": 7, "top_p": 0.6, "min_p": 0.1},
    "all joint": {"top_k": 7, "top_p": 0.6, "min_p": 0.1, "order": "joint"},
    "small": {"top_k": 30, "top_p": 1e-4, "min_p": 1e-3},
    "nearly all": {"top_k": 30, "top_p": 0.9999, "min_p": 1e-5},
}


def draw(*shape, dtype=torch.float32, std=2.0, seed=0):
    return (std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def defined(x, top_k=None, top_p=None, min_p=None, temperature=1.0, order="top_k_first"):
    """The smallest kept of rows [R, V], straight from the definitions."""
    x = x.detach().double()
    t = temperature.double().unsqueeze(-1) if isinstance(temperature, torch.Tensor) else temperature
    u = x / t
    alive = x > -math.inf
    if min_p is not None:
        alive &= x >= x.amax(-1, keepdim=True) + math.log(min_p) * t
    greater = x.unsqueeze(-2) > x.unsqueeze(-1)  # [R, of v, than v]
    if top_k is not None:
        alive &= (greater & alive.unsqueeze(-2)).sum(-1) < top_k
    if top_p is not None:
        among = x > -math.inf if order == "joint" else alive
        p = u.masked_fill(~among, -math.inf).softmax(-1)
        alive &= (greater * p.unsqueeze(-2)).sum(-1) < top_p
    return torch.where(alive, x, math.inf).amin(-1)


def check(x, device="cpu", **rules):
    """Exactly the definition's, but for a mass within 1e-9 of top_p."""
    given = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in rules.items()}
    got = sampler_threshold(x.to(device), **given)
    assert got.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32) and got.shape == x.shape[:-1] and not got.requires_grad
    got = got.cpu().double().flatten()
    flat, rules = x.reshape(-1, x.shape[-1]), {n: v.flatten() if isinstance(v, torch.Tensor) else v for n, v in rules.items()}
    assert (flat.double() == got.unsqueeze(-1)).any(-1).all()  # one of the row's own
    few, many = (defined(flat, **rules | ({"top_p": rules["top_p"] + d} if "top_p" in rules else {})) for d in (-1e-9, 1e-9))
    assert ((many <= got) & (got <= few)).all(), (got, few, many)


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_rule(backend, device, dtype):
    x = draw(2, 12, 33, dtype=dtype)
    x[0, 0] = 1.0
    x[0, 1, 5:] = -math.inf
    x[0, 2, :] = torch.arange(33) // 4  # ties
    x[0, 3] += 60_000 if dtype != torch.bfloat16 else 1e30
    x[0, 4] *= 1e-6
    x[0, 5] = -x[0, 5].abs() - 3
    x[0, 6, ::2] = -0.0
    x[0, 7, 3] = 40.0
    x[0, 8, 1:] = torch.finfo(dtype).min
    for rules in RULES.values():
        check(x, device, **rules)
    temperatures = 0.2 + torch.rand(2, 12, generator=torch.Generator().manual_seed(1))
    check(x, device, temperature=temperatures, **RULES["all joint"])
    check(x[1:], device, temperature=0.3, **RULES["all"])
    check(x.transpose(0, 1)[1:, :, 2:-1], device, **RULES["all"])
    for vocab in (1, 2, 31, 32):
        check(draw(2, vocab, dtype=dtype), device, top_p=0.5, min_p=0.01)


@every_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_of_several_tiles(backend, device, dtype):
    x = draw(3, 4100, dtype=dtype)
    x[1] = draw(4100, dtype=dtype, std=0.01)
    x[2, 3000:3005] = 15.0
    for rules in ({"top_k": 50}, {"top_p": 0.95}, {"top_k": 3000, "top_p": 0.5}):
        check(x, device, **rules)


@pytest.mark.parametrize("name", ["top_p", "all", "all joint"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_thousand_rows(dtype, name):
    x = draw(1000, 61, dtype=dtype, seed=3)
    check(x, **RULES[name])


@every_isa
def test_the_orders_differ(backend, device):
    x = torch.tensor([0.4, 0.3, 0.2, 0.1], device=device).log()
    sets = [(x >= sampler_threshold(x, top_k=2, top_p=0.5, order=order)).tolist() for order in ("top_k_first", "joint")]
    assert sets == [[True, False, False, False], [True, True, False, False]]


@every_isa
def test_a_mass_of_top_p_is_enough(backend, device):
    """The first token has exactly half of the mass."""
    x = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64, device=device).log()
    assert sampler_threshold(x, top_p=0.5) == x[0] and sampler_threshold(x, top_p=0.5 + 1e-9) == x[1]


@every_isa
def test_rows_that_are_undefined_masked_or_unrestricted(backend, device):
    x = draw(7, 9).to(device)
    x[0, 3], x[1, 8], x[2] = math.nan, math.inf, -math.inf
    x[3] = math.nan
    mask = torch.tensor([1, 1, 1, 0, 1, 1, 0], device=device)
    for rules in ({"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}, {}, {"top_k": 9, "top_p": 1.0}):
        t = sampler_threshold(x, mask=mask, **rules)
        assert t.isnan().tolist() == [True, True, True, False, False, False, False]
        assert (t == -math.inf).tolist() == [False, False, False, True, not rules or "top_k" in rules and rules["top_k"] == 9, *[not rules or 9 in rules.values(), True]]
    y = x.new_full((2, 3), 1.0)
    assert sampler_threshold(y[:0], top_k=1).shape == (0,)
    t = sampler_threshold(y, top_k=1, temperature=torch.tensor([1.0, math.nan], device=device), mask=torch.tensor([1, 0], device=device))
    assert t.tolist() == [1.0, -math.inf]


@every_isa
def test_a_row_has_one_set_in_any_batch(backend, device):
    x = draw(6, 3000).to(device)
    together = sampler_threshold(x, top_p=0.9, top_k=700)
    order = torch.tensor([3, 1, 5, 0, 2, 4], device=device)
    assert torch.equal(sampler_threshold(x[order], top_p=0.9, top_k=700), together[order])
    assert torch.equal(torch.stack([sampler_threshold(row, top_p=0.9, top_k=700) for row in x]), together)
    shuffled = x[:, torch.randperm(3000, generator=torch.Generator().manual_seed(0))]
    assert torch.equal(sampler_threshold(shuffled, top_p=0.9, top_k=700), together)


def test_threads():
    x, before = draw(40, 4000), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(sampler_threshold(x, top_p=0.9, min_p=1e-4))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@every_isa
def test_opaque_to_compile(backend, device):
    x = draw(4, 50).to(device).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, t: sampler_threshold(x, top_p=0.8, min_p=0.05, temperature=t), fullgraph=True, backend="aot_eager")
    for t in (torch.full((4,), 0.7, device=device), 0.7):
        assert torch.equal(compiled(x, t), sampler_threshold(x, top_p=0.8, min_p=0.05, temperature=t))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_k": -1}, ValueError, "top_k must be at least 1"),
        ({"top_k": 1.5}, TypeError, "top_k must be an integer"),
        ({"top_p": 0}, ValueError, "top_p must be positive and at most 1, got 0"),
        ({"top_p": 90}, ValueError, "top_p must be positive and at most 1"),
        ({"min_p": 1.1}, ValueError, "min_p must be positive and at most 1"),
        ({"min_p": "0.1"}, TypeError, "min_p must be a number"),
        ({"order": "top_p_first"}, ValueError, "unknown order 'top_p_first', expected one of 'top_k_first', 'joint'"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"mask": torch.ones(3)}, ValueError, "mask must be"),
    ],
)
def test_refuses(options, error, message):
    with pytest.raises(error, match=message):
        sampler_threshold(torch.zeros(2, 5), **options)
    with pytest.raises(TypeError, match="logits must be float32"):
        sampler_threshold(torch.zeros(2, 5).long(), top_k=1)


def test_the_set_of_token_stats():
    x, y = draw(5, 40, dtype=torch.float64).requires_grad_(), torch.arange(5)
    threshold = sampler_threshold(x, top_p=0.8, temperature=0.7)
    with rlkern.use_backend("reference"):
        stats = rlkern.token_stats(x, y, keep=Kept.at_least(threshold), outside="minus_inf", temperature=0.7)
    kept = x.detach() >= threshold.unsqueeze(-1)
    want = (x / 0.7).masked_fill(~kept, -math.inf).log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)
    assert torch.equal(stats.target_kept, kept.gather(-1, y.unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(stats.logp, want)
