"""The kernels on a real GPU, at the sizes of training. Skipped where there is none; `make gpu` runs it."""

import math
from contextlib import contextmanager

import pytest
import torch
from oracle import check_confident

import rlkern
from rlkern import reference
from rlkern.primitives import group_selection
from rlkern.primitives.batch_ranks import Batch, batch_totals
from rlkern.primitives.group_selection import random_values, share_with_means
from rlkern.primitives.selection import select_bottom

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

ROWS, VOCAB = 8192, 151_936
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 0.0, torch.float64: 0.0}  # of a gradient, to its dtype


def random_logits(*shape, dtype=torch.bfloat16, scale=3.0, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.empty(shape, dtype=dtype, device="cuda")
    for part in x.view(-1, shape[-1]).split(max(1, (1 << 28) // shape[-1])):
        part.copy_(torch.randn(part.shape, generator=generator, device="cuda") * scale)
    return x


def random_targets(vocab, *shape, seed=1):
    return torch.randint(vocab, shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")


def upstream(*shape, seed=2, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda", dtype=dtype)


def example(*rows, vocab, dtype=torch.bfloat16):
    """(logits [*rows, V], targets, upstream gradients of logp and entropy)"""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    grads = [upstream(*rows, seed=seed, dtype=acc) for seed in (2, 3)]
    return random_logits(*rows, vocab, dtype=dtype), random_targets(vocab, *rows), grads


def exact(x, y, g_logp, g_entropy, temperature=1.0):
    """(logp, entropy, d_x) of rows [R, V] in float64, from the reference through autograd."""
    x = x.detach().double().requires_grad_()
    stats = reference.token_stats(x, y.unsqueeze(-1), temperature)
    logp = stats.logp.squeeze(-1)
    (d_x,) = torch.autograd.grad((logp * g_logp.double()).sum() + (stats.entropy * g_entropy.double()).sum(), x)
    return logp.detach(), stats.entropy.detach(), d_x


def gradient_terms(log_p, entropy, y, g_logp, g_entropy):
    """Sizes of the terms of entries of d_x [R, V]: an error in proportion remains where they cancel."""
    p = log_p.exp()
    terms = p * (g_logp.abs().unsqueeze(-1) + g_entropy.abs().unsqueeze(-1) * (log_p.clamp_min(-1e4).abs() + entropy.unsqueeze(-1)))
    return terms.scatter_add_(-1, y.unsqueeze(-1), g_logp.abs().unsqueeze(-1))


def check_gradient(x, y, d_x, grads, temperature=1.0):
    """Compares d_x [R, V] with float64: to an entry's own rounding, and to the sizes of its terms."""
    g_logp, g_entropy = (g.double() for g in grads)
    _, entropy, gradient = exact(x, y, g_logp, g_entropy, temperature)
    tolerance = 1e-11 if x.dtype == torch.float64 else 1e-5
    t = temperature.unsqueeze(-1) if isinstance(temperature, torch.Tensor) else temperature
    terms = gradient_terms(torch.log_softmax(x.double() / t, -1), entropy, y, g_logp, g_entropy) / t
    check_entries(d_x, gradient, tolerance * terms)


def check_entries(d_x, gradient, tolerance):
    # Below 6e-5 float16 is rounded to a multiple of 6e-8. What is below float32's smallest is 0.
    smallest = {torch.float16: 6e-8, torch.float64: 0}.get(d_x.dtype, 1e-35)
    allowed = ROUNDING[d_x.dtype] * gradient.abs() + tolerance + smallest
    excess = (d_x.double() - gradient).abs() - allowed
    assert (excess <= 0).all(), f"gradient off by {excess.max().item():.1e} more than allowed"


def forward_backward(x, y, grads, **options):
    """(logp, entropy, d_x)"""
    x = x.detach().requires_grad_()
    stats = rlkern.token_stats(x, y, **options)
    return stats.logp.detach(), stats.entropy.detach(), torch.autograd.grad((stats.logp, stats.entropy), x, grads)[0]


def check(x, y, grads, rows=slice(None), **options):
    """Compares rows of a result with float64, and returns it."""
    n, vocab = y.numel(), x.shape[-1]
    results = forward_backward(x, y, grads, **options)
    assert results[2].shape == x.shape and results[2].dtype == x.dtype and results[0].dtype == grads[0].dtype
    x, d_x = (t.reshape(n, vocab)[rows] for t in (x, results[2]))
    y, *grads = (t.reshape(n)[rows] for t in (y, *grads))
    temperature = options.get("temperature", 1.0)
    temperature = temperature.double() if isinstance(temperature, torch.Tensor) else temperature
    tolerance = 1e-11 if x.dtype == torch.float64 else 1e-5
    for got, want in zip(results[:2], exact(x, y, *grads, temperature)[:2], strict=True):
        torch.testing.assert_close(got.reshape(n)[rows].double(), want, rtol=tolerance, atol=tolerance)
    check_gradient(x, y, d_x, grads, temperature)
    return results


def assert_equal(got, want):
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def spread_rows(n, count=24):
    return torch.linspace(0, n - 1, count, device="cuda").long()


@contextmanager
def no_new_memory(allowed=1 << 20):
    """Nothing beyond `allowed` bytes is allocated in the block."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield
    assert torch.cuda.max_memory_allocated() - before < allowed


@contextmanager
def no_wait():
    """An operation that waits for the device raises in the block."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def side_stream():
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def captured(step):
    """(a CUDA graph of the step, what it returned), after a run on a side stream."""
    with side_stream():
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


@pytest.mark.parametrize(("vocab", "dtype"), [(VOCAB, torch.bfloat16), (VOCAB, torch.float32), (50_257, torch.bfloat16), (32_000, torch.float16)])
def test_full_size(vocab, dtype):
    x, y, grads = example(ROWS, vocab=vocab, dtype=dtype)
    logp, entropy, d_x = check(x, y, grads, spread_rows(ROWS))
    for chunk in torch.arange(ROWS, device="cuda").split(256):  # the whole, in float32
        log_p = torch.log_softmax(x[chunk].float(), -1)
        p = log_p.exp()
        h = -(p * log_p).sum(-1)
        torch.testing.assert_close(logp[chunk], log_p.gather(-1, y[chunk, None]).squeeze(-1), rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(entropy[chunk], h, rtol=5e-5, atol=5e-5)
        expected = -p * (grads[0][chunk, None] + grads[1][chunk, None] * (log_p + h[:, None]))
        expected.scatter_add_(-1, y[chunk, None], grads[0][chunk, None])
        terms = gradient_terms(log_p, h, y[chunk], grads[0][chunk], grads[1][chunk])
        excess = (d_x[chunk].float() - expected).abs() - 1.1 * ROUNDING[dtype] * expected.abs() - 5e-5 * terms - 1e-7
        assert (excess <= 0).all(), f"gradient off by {excess.max().item():.1e} more than allowed in rows {chunk[0].item()} .. {chunk[-1].item()}"


def test_more_than_2_to_the_31_logits():
    vocab = 262_144
    n = 2**31 // vocab + 40
    rows = torch.tensor([0, 1, n // 2, 2**31 // vocab - 1, 2**31 // vocab, n - 2, n - 1], device="cuda")
    check(*example(n, vocab=vocab), rows)


def test_more_rows_than_a_grid_has_in_y():
    check(*example(140_000, vocab=1000), spread_rows(140_000, 200))


def test_memory_is_one_gradient():
    x, y = random_logits(1024, VOCAB).requires_grad_(), random_targets(VOCAB, 1024)
    with no_new_memory(x.numel() * x.element_size() + (1 << 20)):
        with no_new_memory():
            stats = rlkern.token_stats(x, y)
        (stats.logp + stats.entropy).sum().backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 2, 7, 33, 255, 1024, 4095, 4096, 4097, 12_289, 32_000, 50_257, 151_937])
def test_dtypes_and_vocabularies(dtype, vocab):
    check(*example(5, vocab=vocab, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("vocab", [4096, 50_257])
@pytest.mark.parametrize("layout", ["shifted", "odd stride", "offset", "column slice", "permuted", "four dims"])
def test_layouts(dtype, vocab, layout):
    batch, length = 2, 5
    storage = random_logits(batch, length + 1, vocab + 3, dtype=dtype)
    x = {
        "shifted": lambda: storage[..., :vocab].contiguous()[:, :-1],
        "odd stride": lambda: storage[:, :length, :vocab],
        "offset": lambda: storage.view(-1)[1 : 1 + batch * length * vocab].view(batch, length, vocab),
        "column slice": lambda: storage[:, :length, 2 : 2 + vocab],
        "permuted": lambda: storage[..., :vocab].transpose(0, 1)[:length],
        "four dims": lambda: storage[:, :length, :vocab].unsqueeze(1),
    }[layout]()
    check(x, *example(*x.shape[:-1], vocab=vocab)[1:])


def test_one_temperature_per_row():
    x, y, grads = example(6, vocab=9001)
    temperature = torch.tensor([0.3, 0.7, 1.0, 1.5, 2.0, 10.0], device="cuda")
    logp, _, d_x = check(x, y, grads, temperature=temperature)
    for i, t in enumerate(temperature.tolist()):
        alone, _, d_alone = forward_backward(x[i : i + 1], y[i : i + 1], [g[i : i + 1] for g in grads], temperature=t)
        torch.testing.assert_close(alone[0], logp[i])
        torch.testing.assert_close(d_alone[0], d_x[i])


def test_masked_rows_are_not_read():
    x, y, grads = example(64, vocab=9000)
    mask = torch.arange(64, device="cuda") % 3 != 0
    y[5] = -100
    live = mask & (y != -100)
    x[~live] = math.nan
    results = check(x, y, grads, live.nonzero().squeeze(-1), mask=mask)
    assert not any(t[~live].any() for t in results)


@pytest.mark.parametrize("where", ["first tiles", "last tiles", "one entry", "all but two"])
@pytest.mark.parametrize("vocab", [40_000, 50_257])
def test_minus_infinity(where, vocab):
    x, y = random_logits(4, vocab), torch.full((4,), vocab // 2, device="cuda")
    finite = {"first tiles": slice(vocab // 3, vocab), "last tiles": slice(0, vocab * 2 // 3), "one entry": slice(1, vocab)}
    kept = torch.zeros(vocab, dtype=torch.bool, device="cuda")
    kept[finite.get(where, slice(vocab // 2, vocab // 2 + 2))] = True
    x[:, ~kept] = -math.inf
    *_, d_x = check(x, y, [upstream(4), upstream(4, seed=3)])
    assert not d_x[:, ~kept].any()


@pytest.mark.parametrize("vocab", [40_000, 50_257, 262_144])
def test_masking_with_the_lowest_number(vocab):
    x, y = random_logits(4, vocab), torch.full((4,), vocab // 2, device="cuda")
    x[:, : vocab // 3] = torch.finfo(x.dtype).min
    check(x, y, [upstream(4), upstream(4, seed=3)])


def test_confident_rows_keep_their_relative_accuracy():
    for gap in (28.0, 32.0, 40.0, 60.0):
        check_confident(VOCAB, [77], gap, device="cuda")


def test_large_common_offset():
    x, y = random_logits(4, 20_000, dtype=torch.float32), random_targets(20_000, 4)
    x = (x * 64).round() / 64  # exact in float32 with the offset too
    stats, moved = rlkern.token_stats(x, y), rlkern.token_stats(x + 4096.0, y)
    torch.testing.assert_close(moved.logp, stats.logp, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moved.entropy, stats.entropy, rtol=1e-6, atol=1e-6)


def test_targets_out_of_range_give_nan_and_no_wild_read():
    x, y = random_logits(4, 5000), torch.tensor([3, 5000, -1, 2**40], device="cuda")
    logp = rlkern.token_logprobs(x, y)
    assert logp.isnan().tolist() == [False, True, True, True]


def test_in_place_gradient_has_the_same_bits_and_no_memory():
    x, y, grads = example(512, vocab=VOCAB)
    *_, expected = forward_backward(x, y, grads)
    with no_new_memory():
        *_, d_x = forward_backward(x, y, grads, inplace_backward=True)
    assert d_x.data_ptr() == x.data_ptr()
    assert torch.equal(d_x, expected)


@pytest.mark.parametrize("vocab", [VOCAB, 262_145, 50_257, 9001])
def test_a_row_has_the_same_bits_in_any_batch(vocab):
    x, y, grads = example(300, vocab=vocab)
    results = forward_backward(x, y, grads)
    assert_equal(forward_backward(x, y, grads), results)
    for i in (0, 1, 150, 299):
        # rows of odd length start at any address modulo 16, a copy of one on a 16-byte boundary
        for row in (x[i : i + 1], x[i : i + 1].clone()):
            alone = forward_backward(row, y[i : i + 1], [g[i : i + 1] for g in grads])
            assert_equal(alone, [t[i : i + 1] for t in results])


def test_forward_and_backward_do_not_wait_for_the_gpu():
    x, y = random_logits(2, 33, 9001).requires_grad_(), random_targets(9001, 2, 33)
    mask, temperature = upstream(2, 33) > 0, 0.5 + torch.rand(2, 33, device="cuda")

    def step():
        stats = rlkern.token_stats(x, y, mask=mask, temperature=temperature, with_sum_sq=True, min_p=0.1)
        loss = stats.logp.sum() + stats.entropy.sum() + stats.sum_sq_prob.sum() + stats.kept_logmass.sum()
        loss.backward()

    step()  # compiles
    with no_wait():
        step()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("vocab", [32_000, 262_144])  # the second is split over several programs, with scratch memory between them
def test_cuda_graph_of_forward_and_backward(vocab, inplace):
    x, y, grads = example(16, vocab=vocab)
    fresh = random_logits(16, vocab, seed=9)
    graph, results = captured(lambda: forward_backward(x, y, grads, inplace_backward=inplace))
    x.copy_(fresh)
    graph.replay()
    torch.cuda.synchronize()
    assert_equal(results, forward_backward(fresh, y, grads))


def test_on_a_side_stream():
    x, y, grads = example(256, vocab=VOCAB)
    expected = forward_backward(x, y, grads)
    with side_stream():
        results = forward_backward(x, y, grads)
    assert_equal(results, expected)


def test_under_torch_compile():
    x, y = random_logits(8, 9001).requires_grad_(), random_targets(9001, 8)

    def loss(x, y):
        stats = rlkern.token_stats(x, y, temperature=0.9)
        return (stats.logp.exp() - 0.01 * stats.entropy).mean()

    eager, compiled = loss(x, y), torch.compile(loss, fullgraph=True)(x, y)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, x)[0], torch.autograd.grad(eager, x)[0])


def test_autocast_keeps_float32_results():
    x, y = random_logits(4, 9001), random_targets(9001, 4)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        stats = rlkern.token_stats(x, y)
    assert stats.logp.dtype == torch.float32
    assert torch.equal(stats.logp, rlkern.token_logprobs(x, y))


def on_reference(function, *args):
    with rlkern.use_backend("reference"):
        return function(*args)


@pytest.mark.parametrize("n", [1, 2048, 2049, 65_537, 1_000_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_selection_equals_the_sort(n, dtype):
    generator = torch.Generator("cuda").manual_seed(n)
    valid = torch.rand(n, generator=generator, device="cuda") < 0.9
    for spread in (1.0, 1e-3):  # the second leaves few values, with thousands of ties
        values = (torch.randn(n, generator=generator, device="cuda") * 1000 * spread).round().div(1000).to(dtype)
        values[::97], values[5::101], values[7::103] = math.nan, -math.inf, -0.0
        for count in (0, 1, n // 100, n // 2, n):
            got = select_bottom(values, valid, count)
            assert torch.equal(got, on_reference(select_bottom, values, valid, count))
            assert got.sum() == torch.minimum(valid.sum(), torch.tensor(count, device="cuda"))
            assert torch.equal(select_bottom(values, valid, count), got)


@pytest.mark.parametrize("n", [1, 1000, 65_537, 3_000_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_covariance_of_many_tokens(n, dtype):
    i = torch.arange(n, device="cuda")
    x, a = (-20.1 + 0.01 * (i % 2)).to(dtype)[None], (3.3 + 0.01 * (i % 3 == 0)).to(dtype)[None]
    x[0, ::50] = -math.inf
    counted = x.isfinite()
    wide = [torch.where(counted, t.double(), 0) for t in (x, a)]
    means = [t.sum() / counted.sum().clamp(min=1) for t in wide]
    expected = torch.where(counted, (wide[0] - means[0]) * (wide[1] - means[1]), 0)
    covariance = rlkern.token_covariance(x, a, torch.ones_like(x))
    torch.testing.assert_close(covariance.double(), expected, rtol=0, atol=3e-8 if dtype == torch.float32 else 1e-15)
    assert torch.equal(rlkern.token_covariance(x, a, torch.ones_like(x)), covariance)


@pytest.mark.parametrize("sizes", [[1] * 5000, [131_072, 0, 7, 20_000], [0, 0]], ids=["many", "long", "empty"])
def test_sequence_sums_of_a_pack(sizes):
    generator = torch.Generator("cuda").manual_seed(0)
    cu = torch.tensor([0, *sizes], device="cuda").cumsum(0)
    x = torch.randn(sum(sizes) + 100, generator=generator, device="cuda")
    mask = torch.rand(len(x), generator=generator, device="cuda") < 0.8
    x[~mask] = math.nan
    pack = rlkern.packed(cu, mask)
    expected = torch.zeros(len(sizes) + 1, dtype=torch.float64).index_add(0, pack.seq_idx.cpu(), torch.where(mask, x, 0).double().cpu())[:-1]
    sums = pack.sum(x)
    torch.testing.assert_close(sums.cpu(), expected.float(), rtol=1e-6, atol=0)
    assert torch.equal(pack.sum(x), sums)
    leaf = x.requires_grad_()
    (gradient,) = torch.autograd.grad(pack.sum(leaf), leaf, sums)
    assert torch.equal(gradient, torch.where(mask, pack.spread(sums), 0))


@pytest.mark.parametrize("most_listed", [1 << 22, 0], ids=["lists", "histograms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_selection_over_ranks_as_on_cpus(monkeypatch, dtype, most_listed):
    """What a rank computes between the collectives has the bits of a CPU. Nothing waits for the device."""
    monkeypatch.setattr(group_selection, "MOST_LISTED", most_listed)
    generator = torch.Generator().manual_seed(0)
    logp, advantages, noise = (torch.randn(40, 1001, generator=generator, dtype=dtype) for _ in range(3))
    mask, values = torch.rand(40, 1001, generator=generator) < 0.9, (noise * 100).round()
    logp[0, ::50], values[1, ::50], values[2] = -math.inf, math.nan, -0.0

    def of_a_rank(logp, advantages, mask, values, seed, count):
        batch = Batch("", 1, 0, (mask.numel(),))
        totals = batch_totals(logp, advantages, mask, batch, seed)
        draw = random_values(mask, totals.seed, 3)
        shares = [share_with_means(x.flatten(), mask.flatten(), count, batch, 5000, values.flatten(), totals.sums[1]) for x in (values, draw)]
        exact = [totals.tokens, totals.sums, draw, *(x for own, means in shares for x in (own, means.chosen, means.added))]
        return exact, [means.mean for _, means in shares]

    given = [logp, advantages, mask, values, torch.tensor(1 << 61), torch.tensor(5000)]
    expected, on_device = of_a_rank(*given), [x.cuda() for x in given]
    of_a_rank(*on_device)
    with no_wait():
        got = of_a_rank(*on_device)
    for ours, theirs in zip(got[0], expected[0], strict=True):
        assert torch.equal(ours.cpu(), theirs)
    torch.testing.assert_close([mean.cpu() for mean in got[1]], expected[1], rtol=1e-12, atol=0)


def test_cuda_graph_of_a_selecting_loss():
    """One capture serves every mask and every count that follows from it."""
    logp, old = -3 * torch.rand(16, 1000, device="cuda"), -3 * torch.rand(16, 1000, device="cuda")
    advantages, mask = torch.randn(16, 1000, device="cuda"), torch.rand(16, 1000, device="cuda") < 0.9

    def step():
        x = logp.detach().requires_grad_()
        clip = rlkern.clip_cov_loss(x, old, advantages, mask, select_ratio=1.0)  # every candidate: the draw makes no difference
        loss = clip.loss + rlkern.kl_cov_loss(x, old, advantages, mask).loss + rlkern.lp_reg_loss(x, old, old, advantages, mask).loss
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    graph, results = captured(step)
    logp.copy_(-5 * torch.rand_like(logp))
    mask.copy_(torch.rand(16, 1000, device="cuda") < 0.3)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(results, step())


@pytest.mark.parametrize("n", [1, 1024, 65_537, 2_000_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_losses_of_many_tokens(n, dtype):
    """In one pass as in plain PyTorch, metrics included, and the same bits again."""
    generator = torch.Generator("cuda").manual_seed(n)
    logp, noise, advantages = (torch.randn(1, n, generator=generator, device="cuda", dtype=dtype) for _ in range(3))
    old, mask = logp + 0.3 * noise, torch.rand(1, n, generator=generator, device="cuda") < 0.9

    def losses():
        leaf = logp.clone().requires_grad_()
        ppo = rlkern.ppo_loss(leaf, old, advantages, mask, dual_clip=1.5)
        kl_cov = rlkern.kl_cov_loss(leaf, old, advantages, mask)
        lp_reg = rlkern.lp_reg_loss(leaf, old, old, advantages, mask, clip_high=0.2)
        gradients = [torch.autograd.grad(output.loss, leaf)[0] * n for output in (ppo, kl_cov, lp_reg)]
        return [ppo.loss.detach(), *gradients, ppo.metrics, kl_cov.metrics, lp_reg.metrics]

    got = losses()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-6
    torch.testing.assert_close(got, on_reference(losses), rtol=10 * tolerance, atol=tolerance, check_dtype=False)
    torch.testing.assert_close(losses(), got, rtol=0, atol=0)
