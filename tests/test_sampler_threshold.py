"""sampler_threshold on every backend, against sorting in float64."""

import functools
import math

import pytest
import torch
from isas import every_isa
from sampler_oracle import check

import rlkern
from rlkern import Kept, checks, sampler_threshold

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


def interpreted(backend, device):
    """A row costs a hundredth of a second there."""
    return backend == "triton" and device == "cpu"


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_rule(backend, device, dtype):
    x = draw(2, 9, 33, dtype=dtype)
    x[0, 1, 5:] = -math.inf
    x[0, 2, :] = torch.arange(33) // 4  # ties
    x[0, 3] += 60_000 if dtype == torch.float16 else 1e30
    x[0, 4] *= 1e-4
    x[0, 5] = -x[0, 5].abs() - 3
    x[0, 6, ::2] = -0.0
    x[0, 7, 3] = 40.0
    x[0, 8, 1:] = torch.finfo(dtype).min / 8
    temperatures = 0.2 + torch.rand(2, 9, generator=torch.Generator().manual_seed(1))
    if interpreted(backend, device):
        check(x[:1], device, temperature=temperatures[:1], **RULES["all joint"])
        return check(x[1:, 2:4, 2:-1], device, temperature=0.3, **RULES["top_p"])
    check(x, device, temperature=temperatures, **RULES["all joint"])
    check(x.transpose(0, 1)[1:, :, 2:-1], device, temperature=0.3, **RULES["all"])
    for rules in RULES.values():
        check(x, device, **rules)
    for vocab in (1, 2, 31, 32):
        check(draw(2, vocab, dtype=dtype), device, top_p=0.5, min_p=0.01)


@every_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_of_several_tiles(backend, device, dtype):
    x = draw(3, 2600, dtype=dtype)
    x[1] = draw(2600, dtype=dtype, std=0.01)
    x[2, 2300:2305] = 15.0
    check(x, device, top_k=1500, top_p=0.5)
    if not interpreted(backend, device):
        check(x, device, top_k=50)
        check(x, device, top_p=0.95)


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
@pytest.mark.parametrize("rules", [{"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}, {}, {"top_k": 9, "top_p": 1.0}], ids=str)
def test_rows_that_are_undefined_masked_or_unrestricted(backend, device, rules):
    x = draw(6, 9).to(device)
    x[0, 3], x[1, 8], x[2], x[3] = math.nan, math.inf, -math.inf, math.nan
    t = sampler_threshold(x, mask=torch.tensor([1, 1, 1, 0, 1, 0], device=device), **rules)
    unrestricted = not rules or rules.get("top_k") == 9
    assert t.isnan().tolist() == [True, True, True, False, False, False]
    assert (t == -math.inf).tolist() == [False, False, False, True, unrestricted, True]


@every_isa
def test_rows_without_a_valid_temperature(backend, device):
    x, t = torch.ones(2, 3, device=device), torch.tensor([1.0, math.nan], device=device)
    assert sampler_threshold(x, top_k=1, temperature=t, mask=torch.tensor([1, 0], device=device)).tolist() == [1.0, -math.inf]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "values_readable", lambda x: False)  # as on a GPU
        assert sampler_threshold(x, top_k=1, temperature=t).isnan().tolist() == [False, True]
    assert sampler_threshold(x[:0], top_k=1).shape == (0,)


@every_isa
def test_a_row_has_one_set_in_any_batch(backend, device):
    n = 300 if interpreted(backend, device) else 3000
    x, rules = draw(3, n, dtype=torch.bfloat16).to(device), {"top_p": 0.9, "top_k": n // 4}
    together = sampler_threshold(x, **rules)
    assert torch.equal(sampler_threshold(x.flip(0), **rules), together.flip(0))
    assert torch.equal(torch.stack([sampler_threshold(row, **rules) for row in x]), together)
    shuffled = x[:, torch.randperm(n, generator=torch.Generator().manual_seed(0)).to(device)]
    assert torch.equal(sampler_threshold(shuffled, **rules), together)


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


def test_opaque_to_compile():
    x = draw(4, 50).requires_grad_()
    torch._dynamo.reset()
    function = functools.partial(sampler_threshold, top_p=0.8, min_p=0.05, temperature=0.7)
    assert torch.equal(torch.compile(function, fullgraph=True, backend="eager")(x), function(x))


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
