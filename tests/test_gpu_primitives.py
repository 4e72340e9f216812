"""The primitives on a real GPU at the sizes of training, against float64, and twice with the same bits.

test_gpu.py has one target a row; here are many, kept sets of split rows, and everything around token_stats.
"""

import math

import pair_oracle
import pytest
import torch
from test_diffusion_masks import SAMPLERS
from test_gpu import captured, check_entries, check_gradient, no_wait, random_logits, random_targets, upstream
from test_sampler_threshold import RULES, check

import rlkern
from rlkern import advantages, reference
from rlkern.primitives.moments import row_moments

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

VOCAB = 151_936
SPLIT = 262_144  # rows so long that several programs share them, whatever their dtype
SMALL_VOCAB, HIDDEN = 50_257, 512  # of the output matrix
RESPONSES = 100_000
TOLERANCE = {torch.bfloat16: 1e-5, torch.float32: 1e-5, torch.float64: 1e-11}


def drawn(*shape, seed):
    return torch.rand(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")


def twice(function, *args):
    """The tensors that it returns, after a look whether a second run has the same bits."""
    first, second = function(*args), function(*args)
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(a.nan_to_num(nan=0.5), b.nan_to_num(nan=0.5)), f"result {i} has other bits in a second run"
    return first


def differentiated(function, x, grads):
    """The tensors that it returns for x, and the gradient; `grads` are cast to their dtypes."""
    leaf = x.detach().requires_grad_()
    fields = function(leaf)
    gradient = torch.autograd.grad(fields, leaf, [g.to(t) for g, t in zip(grads, fields, strict=True)])
    return [*(t.detach() for t in fields), *gradient]


def assert_close(got, want, rtol=1e-5, atol=1e-5):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=atol)


def at_the_bound(scaled, *, min_p=None, min_prob=None):
    """Entries of float64 logits / temperature so near the kept set's bound that either side is right."""
    relative = scaled.log_softmax(-1) if min_p is None else scaled - scaled.amax(-1, keepdim=True)
    return (relative - math.log(min_prob if min_p is None else min_p)).abs() < 1e-4


def clear_rows(scaled, **kept):
    """[N] bool, mostly True: rows with no entry at the bound, whose kept_logmass can be compared."""
    clear = ~at_the_bound(scaled, **kept).any(-1)
    assert 2 * clear.sum() >= len(clear)
    return clear


def check_statistics(x, y, *, temperature=1.0, **kept):
    """All fields for logits [N, V] and targets [N, K], -100 among them, and the gradient of all together."""
    ignored, tolerance = y == -100, TOLERANCE[x.dtype]
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32

    weights = [upstream(*y.shape, seed=0, dtype=acc), *(upstream(len(y), seed=i, dtype=acc) for i in range(1, 5 if kept else 4))]
    t = temperature.double() if isinstance(temperature, torch.Tensor) else temperature
    per_row = t.unsqueeze(-1) if isinstance(t, torch.Tensor) else t
    clear = clear_rows(x.double() / per_row, **kept) if kept else torch.ones_like(y[:, 0], dtype=torch.bool)
    columns = y.masked_fill(ignored, 0)

    def fused(x):
        stats = rlkern.token_stats(x, y, temperature=temperature, with_sum_sq=True, **kept)
        return [*stats[:4], *([torch.where(clear, stats.kept_logmass, 0)] if kept else [])]

    def written_out(x):
        stats = reference.token_stats(x, columns, t, **kept)
        return [stats.logp.masked_fill(ignored, 0), *stats[1:4], *([torch.where(clear, stats.kept_logmass, 0)] if kept else [])]

    *fields, d_x = twice(differentiated, fused, x, weights)
    *wanted, gradient = differentiated(written_out, x.double(), weights)
    weights = [w.double() for w in weights]
    assert_close(fields, wanted, tolerance, tolerance)

    # the sizes of the terms that an entry is the sum of, where they cancel
    log_p = (x.double() / per_row).log_softmax(-1)
    p, at_targets = log_p.exp(), weights[0].abs().masked_fill(ignored, 0)
    entropy, sum_sq = wanted[1].unsqueeze(-1), wanted[3].unsqueeze(-1)
    g = [w.abs().unsqueeze(-1) for w in weights[1:]]
    terms = at_targets.sum(-1, keepdim=True) + g[0] * (log_p.clamp_min(-1e4).abs() + entropy) + g[1] + 2 * g[2] * (p + sum_sq)
    if kept:
        terms = terms + g[3] * (1 + 1 / wanted[4].exp().unsqueeze(-1))
    terms = (p * terms).scatter_add_(-1, columns, at_targets)
    check_entries(d_x, gradient, tolerance * terms / per_row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_targets", [9, 64, 1000, 8192])
def test_many_targets_a_row(n_targets, dtype):
    """One thread must add up equal ones, in one order."""
    x, y = random_logits(8, VOCAB, dtype=dtype), random_targets(VOCAB, 8, n_targets)
    y[0] = 77
    y[1] = torch.where(y[1] % 2 == 0, 0, VOCAB - 1)
    y[2] %= 5
    y[3, 1:] = -100
    y[4, ::3] = -100
    y[5] = torch.arange(n_targets, device="cuda") * (VOCAB // n_targets)
    y[6, n_targets // 2 :] = y[6, : (n_targets + 1) // 2].clone()
    check_statistics(x, y)


def test_several_targets_kept_set_and_sum_of_squares():
    x, y = random_logits(6, SMALL_VOCAB), random_targets(SMALL_VOCAB, 6, 5)
    for options in ({"min_p": 0.2}, {"min_prob": 1e-4}):
        check_statistics(x, y, temperature=1.3, **options)


@pytest.mark.parametrize("kept", [{"min_p": 0.05}, {"min_prob": 1e-3}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("vocab", [SPLIT, SPLIT + 1])  # aligned, and not
def test_split_rows_with_a_kept_set_and_a_temperature_each(vocab, dtype, kept):
    x, y = random_logits(6, vocab, dtype=dtype), random_targets(vocab, 6, 2)
    temperature = torch.tensor([0.3, 0.7, 1.0, 1.5, 2.0, 10.0], device="cuda")
    x = torch.where(at_the_bound(x.double() / temperature.unsqueeze(-1), **kept), x - 0.01 * temperature.unsqueeze(-1), x).to(dtype)
    check_statistics(x, y, temperature=temperature.double() if dtype == torch.float64 else temperature, **kept)


@pytest.mark.parametrize("n_targets", [1, 8, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("vocab", [SMALL_VOCAB, SPLIT, SPLIT + 1])  # whole rows, split ones, those off a boundary
def test_the_tail_of_the_targets(vocab, dtype, n_targets):
    x, y = random_logits(6, vocab, dtype=dtype), random_targets(vocab, 6, n_targets)
    y[1] = y[1, :1]
    y[2] = vocab // 2 + torch.arange(n_targets, device="cuda")  # in one tile
    top = x[3].topk(n_targets).indices
    y[3], x[3, top] = top, x[3, top] + 25  # little is left for the tail
    grads = [upstream(6, n_targets, seed=0), upstream(6, seed=1)]

    def both(token_stats, x):
        stats = token_stats(x, y, temperature=0.8, with_tail=True)
        return stats.logp, stats.tail_logmass

    logp, tail, d_x = twice(differentiated, lambda x: both(rlkern.token_stats, x), x, grads)
    *wanted, gradient = differentiated(lambda x: both(reference.token_stats, x), x.double(), grads)
    tolerance = TOLERANCE[dtype]
    assert_close((logp, tail), wanted, tolerance, tolerance)
    p, sizes = (x.double() / 0.8).softmax(-1), [g.double().abs() for g in grads]
    listed = torch.zeros_like(p, dtype=torch.bool).scatter_(-1, y, True)
    elsewhere = (-wanted[1].unsqueeze(-1)).exp().masked_fill(listed, 1)
    terms = p * (sizes[0].sum(-1, keepdim=True) + sizes[1].unsqueeze(-1) * elsewhere)
    check_entries(d_x, gradient, tolerance * terms.scatter_add_(-1, y, sizes[0]) / 0.8)


@pytest.mark.parametrize(("first", "then"), [("triton", "reference"), ("reference", "triton")])
def test_a_backward_continues_another_backends_forward(first, then):
    """The row state is one format, on the device too."""
    x, y = random_logits(16, SMALL_VOCAB, dtype=torch.float32), random_targets(SMALL_VOCAB, 16, 3)
    y[3] = -100

    def gradient(first, then):
        leaf = x.detach().requires_grad_()
        with rlkern.use_backend(first):
            stats = rlkern.token_stats(leaf, y, temperature=0.8, min_p=0.1, with_sum_sq=True)
        with rlkern.use_backend(then):
            grads = [upstream(*field.shape, seed=i) for i, field in enumerate(stats[:5])]
            return torch.autograd.grad(stats[:5], leaf, grads)[0]

    want = gradient(first, first)
    assert want.any() and not want[3].any()
    torch.testing.assert_close(gradient(first, then), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_masked_elbo(dtype, packed, inplace):
    batch, length = 4, 48
    x, y = random_logits(batch, length, VOCAB, dtype=dtype), random_targets(VOCAB, batch, length)
    mask = drawn(batch, length, seed=5) < 0.6
    mask[2] = False  # a sequence of which nothing is masked
    weight, g = 1 / (0.1 + drawn(batch, length, seed=6)), upstream(batch)
    sequence = mask.nonzero()[:, 0]
    if packed:
        rows, arguments = x[mask], (y[mask], weight[mask])
        options = {"seq_idx": sequence, "num_seqs": batch}
    else:
        rows, arguments, options = x.masked_fill(~mask.unsqueeze(-1), math.nan), (y, weight), {"mask": mask}
    elbo, d_x = twice(differentiated, lambda x: [rlkern.masked_elbo(x * 1, *arguments, inplace_backward=inplace, **options)], rows, [g])
    if not packed:
        assert not d_x[~mask].any()
        d_x = d_x[mask]
    x, y, weight = x[mask], y[mask], weight[mask].double()
    terms = weight * x.double().log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)
    expected = torch.stack([terms[sequence == b].sum() for b in range(batch)])
    torch.testing.assert_close(elbo.double(), expected, rtol=1e-5, atol=1e-5)
    g_logp = weight * g[sequence]
    check_gradient(x, y, d_x, (g_logp, torch.zeros_like(g_logp)))


@pytest.mark.parametrize("n_targets", [1, 20])
@pytest.mark.parametrize(("vocab", "dtype"), [(VOCAB, torch.bfloat16), (SMALL_VOCAB, torch.float32), (SMALL_VOCAB, torch.float64)], ids=str)
def test_softcap(vocab, dtype, n_targets):
    """Statistics and gradient of raw logits far in saturation, also in place; a mask stays one."""
    n, options = 64, {"logit_scale": 1.3, "softcap": 30.0}
    x = random_logits(n, vocab, dtype=dtype, scale=18.0)
    x[:, 3::7] = -math.inf
    y = random_targets(vocab - 7, n * n_targets).view(n, n_targets) // 7 * 7
    grads = [upstream(n, n_targets, seed=1, dtype=torch.float64), *(upstream(n, seed=s, dtype=torch.float64) for s in (2, 3))]
    clear = clear_rows((30 * (x.double() * 1.3 / 30).tanh()).masked_fill(x == -math.inf, -math.inf), min_p=0.01)

    def fused(x, **more):
        stats = rlkern.token_stats(x, y, min_p=0.01, **options, **more)
        return stats.logp, stats.entropy, torch.where(clear, stats.kept_logmass, 0)

    def written_out(x):
        stats = reference.token_stats(x, y, min_p=0.01, **options)
        return stats.logp, stats.entropy, torch.where(clear, stats.kept_logmass, 0)

    *got, d_x = twice(lambda: differentiated(fused, x, grads))
    *want, d_want = differentiated(written_out, x.double(), grads)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    assert_close(got, want, tolerance, tolerance)
    rounding = {torch.bfloat16: 2**-8, torch.float32: 1e-4, torch.float64: 1e-10}[dtype]
    torch.testing.assert_close(d_x.double(), d_want, rtol=rounding, atol=tolerance * d_want.abs().max().item())
    assert torch.equal(differentiated(lambda leaf: fused(leaf, inplace_backward=True), x.clone(), grads)[-1], d_x)


@pytest.mark.parametrize(("vocab", "dtype"), [(VOCAB, torch.bfloat16), (SMALL_VOCAB, torch.float32)], ids=str)
@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
def test_softcaps_of_pairs(kind, vocab, dtype):
    n, options = 64, {"logit_scale": 1.3, "softcap": 30.0, "other_softcap": 20.0}
    x = random_logits(n, vocab, dtype=dtype, scale=12.0)
    other, y, g = x + random_logits(n, vocab, dtype=dtype, seed=9), random_targets(vocab, n), upstream(n, seed=1, dtype=torch.float64)

    def fused(x):
        stats = rlkern.pair_stats(x, other, y, kind=kind, **options)
        return stats.divergence, stats.logp

    def written_out(x):
        own = reference.token_stats(x, y.unsqueeze(-1), logit_scale=1.3, softcap=30.0)
        return reference.token_divergence(x, other.double(), kind, **options), own.logp.squeeze(-1)

    *got, d_x = twice(lambda: differentiated(fused, x, [g, g]))
    *want, d_want = differentiated(written_out, x.double(), [g, g])
    assert_close(got, want)
    torch.testing.assert_close(d_x.double(), d_want, rtol=2**-8 if dtype == torch.bfloat16 else 1e-4, atol=5e-5 * d_want.abs().max().item())


@pytest.mark.parametrize(
    "options",
    [
        {"chunk_rows": 64},
        {},
        {"workspace": 1},
        {"workspace": 100 * SMALL_VOCAB * 4},
        {"workspace": 1, "logits_dtype": torch.float32},
        {"num_valid": ...},
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])  # the matrix is the embedding too
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_linear_token_stats(dtype, tied, options):
    n = 300
    weight = (upstream(SMALL_VOCAB, HIDDEN, seed=1) * 0.1).to(dtype)
    bias, hidden = upstream(SMALL_VOCAB, seed=2).to(dtype), upstream(n, HIDDEN, seed=3).to(dtype)
    ids, y = random_targets(SMALL_VOCAB, n, seed=4), random_targets(SMALL_VOCAB, n)
    y[7], mask = -100, drawn(n, seed=5) < 0.8
    live = mask & (y != -100)
    grads = [torch.where(live, upstream(n, seed=seed), 0) for seed in (6, 7)]

    def run(statistics, dtype=dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight, bias)]
        h = leaves[0] + leaves[1][ids] if tied else leaves[0]
        fields = statistics(h, *leaves[1:])
        return [field.detach() for field in fields] + list(torch.autograd.grad(fields, leaves, [g.to(fields[0]) for g in grads]))

    options = {name: int(live.sum()) if value is ... else value for name, value in options.items()}

    def chunked(h, w, b):
        with no_wait():
            stats = rlkern.linear_token_stats(h, w, y, bias=b, mask=mask, **options)
        return stats.logp, stats.entropy

    def written_out(h, w, b):
        stats = reference.token_stats(torch.nn.functional.linear(h, w, b), y.clamp_min(0).unsqueeze(-1))
        return torch.where(live, stats.logp.squeeze(-1), 0), torch.where(live, stats.entropy, 0)

    # Logits are rounded to bfloat16, their gradients too, before the sums that the results are.
    tolerance = {torch.bfloat16: 2e-2, torch.float32: 1e-5}[dtype]
    for name, got, want in zip(
        ("logp", "entropy", "hidden", "weight", "bias"), twice(lambda: run(chunked)), run(written_out, torch.float64), strict=True
    ):
        error = ((got.double() - want).norm() / want.norm()).item()
        assert error < tolerance, f"{name}: a relative error of {error:.1e}"


def large_head(n, hidden, vocab, dtype=torch.bfloat16):
    weight = (upstream(vocab, hidden, seed=1) * 0.1).to(dtype).requires_grad_()
    return upstream(n, hidden, seed=2).to(dtype).requires_grad_(), weight, random_targets(vocab, n)


@pytest.mark.parametrize("workspace", [1, 1 << 28, 1 << 30], ids=str)
def test_linear_token_stats_takes_the_memory_of_its_plan(workspace):
    n, hidden_size, vocab = 8192, 1024, 32768
    hidden, weight, y = large_head(n, hidden_size, vocab)
    plan = rlkern.linear_plan(n, hidden_size, vocab, workspace=workspace)
    rlkern.linear_token_stats(hidden[:8], weight, y[:8]).logp.sum().backward()  # what libraries allocate once
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    rlkern.linear_token_stats(hidden, weight, y, workspace=workspace).logp.sum().backward()
    gradients = hidden.nbytes + weight.nbytes
    assert torch.cuda.max_memory_allocated() - before < 1.05 * plan.bytes + gradients + (16 << 20)


def test_linear_token_stats_keeps_the_bits_of_token_stats():
    hidden, weight, y = large_head(256, 512, VOCAB)
    stats = rlkern.linear_token_stats(hidden, weight, y)
    expected = rlkern.token_stats(torch.nn.functional.linear(hidden, weight), y)
    assert torch.equal(stats.logp, expected.logp) and torch.equal(stats.entropy, expected.entropy)
    tiles = rlkern.linear_token_stats(hidden, weight, y, workspace=1)
    torch.testing.assert_close(tiles.logp, expected.logp, rtol=2e-6, atol=2**-5)  # another product may round otherwise


def test_float32_logits_of_16_bit_operands():
    hidden, weight, y = large_head(256, 512, SMALL_VOCAB)
    logits = hidden.double() @ weight.double().t()
    want = logits.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)
    for workspace in (1, 1 << 30):
        got = rlkern.linear_token_stats(hidden, weight, y, workspace=workspace, logits_dtype=torch.float32).logp
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-5)


def test_gradients_of_tiles_are_those_of_one_product():
    hidden, weight, y = large_head(1024, 512, SMALL_VOCAB)
    logits = torch.nn.functional.linear(hidden, weight).detach()
    exact, rounded = (x.requires_grad_() for x in (logits.double(), logits.clone()))
    for x in (exact, rounded):
        rlkern.token_stats(x, y).logp.sum().backward()
    h, w = hidden.detach().double(), weight.detach().double()
    rlkern.linear_token_stats(hidden, weight, y, workspace=1).logp.sum().backward()
    for got, product in ((weight.grad, lambda d: d.t() @ h), (hidden.grad, lambda d: d @ w)):
        want = product(exact.grad)
        limit = (product(rounded.grad.double()).bfloat16() - want).norm()
        assert (got - want).norm() <= 1.02 * limit


def test_fixed_blocks_give_a_row_the_same_bits_in_any_batch():
    hidden, weight, y = large_head(1300, 512, SMALL_VOCAB)

    def run(rows):
        h = hidden[rows].detach().requires_grad_()
        stats = rlkern.linear_token_stats(h, weight, y[rows], fixed_blocks=True, workspace=700 * SMALL_VOCAB * 2)
        (stats.logp.sum() + stats.entropy.sum()).backward()
        return stats.logp.detach(), stats.entropy.detach(), h.grad

    whole = run(slice(0, 1300))
    for rows in (slice(0, 1), slice(800, 801), slice(517, 1300)):
        assert all(torch.equal(a, b[rows]) for a, b in zip(run(rows), whole, strict=True)), rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_linear_token_stats_of_kept_ids(dtype):
    """Lists of 0 to 500 ids, one id in all of them, targets outside, an empty list, one of two rows."""
    n, most = 1024, 500
    weight, bias = (upstream(SMALL_VOCAB, HIDDEN, seed=1) * 0.1).to(dtype), upstream(SMALL_VOCAB, seed=2).to(dtype)
    hidden, y = upstream(n, HIDDEN, seed=3).to(dtype), random_targets(SMALL_VOCAB, n)
    lengths = (1 + most ** drawn(n, seed=4)).long().clamp(max=most)
    lengths[3] = 0
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    row = torch.repeat_interleave(torch.arange(n, device="cuda"), lengths)
    at = torch.arange(len(row), device="cuda") - offsets[row]
    ids = torch.where(at == 0, 77, (row * 131 + at * 97) % SMALL_VOCAB)
    ids = torch.where((ids == 77) & (at > 0), 78, ids).int()
    spare = torch.cat([ids, ids.new_full((100,), SMALL_VOCAB)])
    keep = rlkern.Kept.csr(spare, offsets, rows=torch.arange(n, device="cuda").index_fill(0, torch.tensor([9], device="cuda"), 8))
    kept = torch.zeros(n, SMALL_VOCAB, dtype=torch.bool, device="cuda").index_put((row, ids.long()), torch.tensor(True, device="cuda"))
    kept[torch.arange(n, device="cuda"), y] = True
    kept[3] = True
    grads = [torch.where(torch.arange(n, device="cuda") == 9, 0, upstream(n, seed=seed)) for seed in (6, 7, 8, 9)]

    def run(statistics, dtype=dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight, bias)]
        fields = statistics(*leaves)
        return [field.detach() for field in fields] + list(torch.autograd.grad(fields, leaves, [g.to(fields[0]) for g in grads]))

    def listed(h, w, b):
        with no_wait():
            return rlkern.linear_token_stats(h, w, y, bias=b, keep=keep, max_dense_rows=2, with_sum_sq=True)[:4]

    def written_out(h, w, b):
        stats = reference.token_stats(torch.nn.functional.linear(h, w, b).masked_fill(~kept, -math.inf), y.unsqueeze(-1))
        return stats.logp.squeeze(-1), *stats[1:4]

    got, want = twice(lambda: run(listed)), run(written_out, torch.float64)
    names = ("logp", "entropy", "logsumexp", "sum_sq_prob", "hidden", "weight", "bias")
    for name, a, b in zip(names, got, want, strict=True):
        if name in names[:4]:
            assert a.isnan().nonzero().flatten().tolist() == [9]  # shares a list
            a, b = (x.masked_fill(torch.arange(n, device="cuda") == 9, 0) for x in (a, b))
        rows = torch.arange(len(a), device="cuda") != 3  # the row over everything has logits of hidden's dtype
        rounded = dtype == torch.bfloat16 and name not in names[:4]
        error = ((a.double() - b)[rows].norm() / b[rows].norm()).item()
        assert error < (1e-2 if rounded else 1e-11 if dtype == torch.float64 else 1e-5), f"{name}: a relative error of {error:.1e}"


@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("plan", [{"chunk_rows": 64}, {}, {"workspace": 100 * 2 * SMALL_VOCAB * 4}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_linear_token_divergence(dtype, plan, kind):
    """Of policies that are close, where rounded logits would be off by more than the divergence."""
    n = 300
    head, hidden = (upstream(SMALL_VOCAB, HIDDEN, seed=1) * 0.1).to(dtype), upstream(n, HIDDEN, seed=2).to(dtype)
    other = (hidden + 0.05 * upstream(n, HIDDEN, seed=3)).to(dtype)
    mask, g = drawn(n, seed=4) < 0.8, upstream(n, seed=5)

    def run(function, dtype=dtype):
        leaves = [t.to(dtype).clone().requires_grad_() for t in (hidden, head, other, head)]
        value = function(*leaves)
        return [value.detach(), *torch.autograd.grad(value, leaves, g.to(value))]

    def written_out(h, w, h2, w2):
        value = reference.token_divergence(h @ w.T, h2 @ w2.T, kind=kind)
        return torch.where(mask, value, 0)

    options = {"kind": kind, "mask": mask, "other_grad": True, **plan}
    got = twice(lambda: run(lambda *leaves: rlkern.linear_token_divergence(*leaves, **options)))
    rounding = {torch.bfloat16: 1e-2, torch.float32: 1e-4}[dtype]  # of gradients
    for name, a, b in zip(("value", "hidden", "weight", "other_hidden", "other_weight"), got, run(written_out, torch.float64), strict=True):
        error = ((a.double() - b).norm() / b.norm()).item()
        assert error < (1e-4 if name == "value" else rounding), f"{name}: a relative error of {error:.1e}"


KINDS = ("reverse_kl", "forward_kl", "mixed_kl", "cross_entropy", "jsd", "skew_forward_kl", "skew_reverse_kl")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float32)], ids=str)
@pytest.mark.parametrize("vocab", [VOCAB, SMALL_VOCAB])  # split rows, and rows off the boundaries
def test_token_divergence(vocab, dtypes, kind):
    n = 200
    x, other = random_logits(n, vocab, dtype=dtypes[0]), random_logits(n, vocab, dtype=dtypes[1], seed=1)
    forbidden, mask, g = drawn(vocab, seed=2) < 0.3, drawn(n, seed=3) < 0.9, upstream(n)
    for t in (x, other):
        t.masked_fill_(forbidden, -math.inf).masked_fill_(~mask.unsqueeze(-1), math.nan)
    options = {"kind": kind, "temperature": 0.7, "beta": 0.3}
    value, d_x = twice(differentiated, lambda x: [rlkern.token_divergence(x, other, mask=mask, **options)], x, [g])
    assert not value[~mask].any() and not d_x[~mask].any() and not d_x[:, forbidden].any()
    rows = mask.nonzero()[::8, 0]
    wide, q = (t[rows][:, ~forbidden].double() for t in (x, other))
    expected, gradient = differentiated(lambda x: [reference.token_divergence(x, q, **options)], wide, [g[rows]])
    torch.testing.assert_close(value[rows].double(), expected, rtol=2e-5, atol=0)
    log_p, log_q = ((t / 0.7).log_softmax(-1) for t in (wide, q))
    far = (log_p.exp() * (log_p - log_q)).sum(-1, keepdim=True)
    terms = g[rows].double().abs().unsqueeze(-1) / 0.7 * (log_p.exp() * (1 + log_p.abs() + log_q.abs() + far) + log_q.exp())
    check_entries(d_x[rows][:, ~forbidden], gradient, 2e-5 * terms)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "cross_entropy"])
@pytest.mark.parametrize("vocab", [VOCAB, SMALL_VOCAB])
def test_divergences_of_rows_that_are_all_but_equal(vocab, kind):
    x, g = random_logits(16, vocab, dtype=torch.float32), upstream(16)
    for scale in (1e-2, 1e-4):
        other = x + scale * random_logits(16, vocab, dtype=torch.float32, scale=1.0, seed=1)
        value, d_x = differentiated(lambda x, other=other: [rlkern.token_divergence(x, other, kind=kind)], x, [g])
        # The textbook's formula counts an error of the normaliser itself, and this one its square: float64's
        # 1e-12 is a thousandth of a divergence of 1e-9.
        want, gradient, _ = pair_oracle.precise(x, other, kind)
        torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=0)
        gradient = g.double().unsqueeze(-1) * gradient
        assert (d_x.double() - gradient).abs().max() <= 1e-4 * gradient.abs().max()
    value, d_x = differentiated(lambda x: [rlkern.token_divergence(x, x.detach().clone(), kind=kind)], x, [upstream(16)])
    assert not value.any() and not d_x.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("vocab", [VOCAB, SMALL_VOCAB])
def test_pair_stats(vocab, dtype):
    n = 64
    x, other, y = random_logits(n, vocab, dtype=dtype), random_logits(n, vocab, dtype=dtype, seed=1), random_targets(vocab, n)
    y[3] = -100
    stats = rlkern.primitives.pair_stats(x, other, y, temperature=0.7, other_temperature=1.3)
    for prefix, logits, t in (("", x, 0.7), ("other_", other, 1.3)):
        own = rlkern.token_stats(logits, y, temperature=t)
        for name in ("logp", "entropy", "logsumexp"):
            torch.testing.assert_close(getattr(stats, prefix + name), getattr(own, name), rtol=1e-5, atol=1e-6)
    grads = [upstream(n, seed=seed) for seed in (2, 3)]

    def fields(x):
        stats = rlkern.primitives.pair_stats(x, other, y)
        return [stats.logp, stats.entropy]

    *_, d_x = twice(differentiated, fields, x, grads)
    live = y != -100
    assert not d_x[3].any()
    check_gradient(x[live], y[live], d_x[live], [g[live] for g in grads])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_row_moments(dtype):
    n = 200
    x, y = random_logits(n, VOCAB, dtype=dtype) + 20, random_targets(VOCAB, n)
    mask = drawn(n, seed=3) < 0.9
    x[~mask] = math.nan
    grads = [upstream(n, seed=seed) for seed in (4, 5)]
    *values, d_x = twice(differentiated, lambda x: row_moments(x, y, mask=mask), x, grads)
    assert not d_x[~mask].any() and not any(t[~mask].any() for t in values)
    rows = mask.nonzero()[::8, 0]
    wide, grads = x[rows].double(), [g[rows].double() for g in grads]
    *expected, gradient = differentiated(lambda x: reference.row_moments(x, y[rows]), wide, grads)
    assert_close([t[rows] for t in values], expected)
    g_target, g_variance = (g.abs().unsqueeze(-1) for g in grads)
    terms = (2 * wide.abs() * g_variance + g_target) / VOCAB
    check_entries(d_x[rows], gradient, 1e-5 * terms.scatter_add_(-1, y[rows, None], g_target))


def test_row_moments_far_from_zero():
    """Sixteen steps of float32 wide, in rows that one program reads and in rows that several share."""
    for vocab in (SMALL_VOCAB, SPLIT + 1):
        x, y = 1000 + 1e-3 * random_logits(40, vocab, dtype=torch.float32), random_targets(vocab, 40)
        grads = [upstream(40, seed=seed) for seed in (4, 5)]
        *values, d_x = twice(differentiated, lambda x, y=y: row_moments(x, y), x, grads)
        *expected, gradient = differentiated(lambda x, y=y: reference.row_moments(x, y), x.double(), [g.double() for g in grads])
        torch.testing.assert_close(values[1].double(), expected[1], rtol=1e-5, atol=0)
        torch.testing.assert_close(values[0].double(), expected[0], rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(d_x.double(), gradient, rtol=1e-4, atol=1e-5 * gradient.abs().median().item())


@pytest.mark.parametrize("vocab", [VOCAB, SPLIT + 1])  # aligned; not, so long that several programs share a row
@pytest.mark.parametrize(
    ("dtype", "of_reference"), [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_token_did_entropy(dtype, of_reference, vocab):
    n = 40
    x, r = random_logits(n, vocab, dtype=dtype), random_logits(n, vocab, dtype=of_reference, seed=1)
    forbidden, mask, g = drawn(vocab, seed=2) < 0.3, drawn(n, seed=3) < 0.9, upstream(n)
    x[:, forbidden] = -math.inf
    r[:, forbidden] = torch.where(drawn(int(forbidden.sum()), seed=4) < 0.5, -math.inf, math.nan).to(of_reference)
    for t in (x, r):
        t[~mask] = math.nan
    temperature = (0.5 + drawn(n, seed=5)).masked_fill(~mask, 0)

    def function(x, r):
        leaves = [t.detach().requires_grad_() for t in (x, r)]
        entropy = rlkern.token_did_entropy(*leaves, temperature=temperature, mask=mask)
        return [entropy.detach(), *torch.autograd.grad(entropy, leaves, g.to(entropy))]

    value, d_x, d_r = twice(function, x, r)
    for t in (value[~mask], d_x[~mask], d_r[~mask], d_x[:, forbidden], d_r[:, forbidden]):
        assert not t.any()
    wide = (x[mask][:, ~forbidden].double() - r[mask][:, ~forbidden].double()) / temperature[mask].double().unsqueeze(-1)
    expected, gradient = differentiated(lambda u: [reference.token_stats(u, None).entropy], wide, [g[mask]])
    torch.testing.assert_close(value[mask].double(), expected, rtol=1e-5, atol=1e-5)
    gradient = gradient / temperature[mask].double().unsqueeze(-1)
    log_p = wide.log_softmax(-1)
    terms = (g[mask].double().abs() / temperature[mask]).unsqueeze(-1) * log_p.exp() * (1 + log_p.abs() + expected.unsqueeze(-1))
    # The exponent of e^-50 is rounded fifty times as coarsely as that of e^-1.
    check_entries(d_x[mask][:, ~forbidden], gradient, 2e-5 * terms)
    check_entries(d_r[mask][:, ~forbidden], -gradient, 2e-5 * terms)


@pytest.mark.parametrize("name", ["all", "all joint", "top_p"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_sampler_threshold(dtype, name):
    x = random_logits(16, VOCAB, dtype=dtype)
    x[:4] *= 4
    x[4, ::3] = 5.0
    (threshold,) = twice(lambda x: (rlkern.sampler_threshold(x, **RULES[name]),), x)
    check(x.cpu(), "cuda", **RULES[name])
    with no_wait():
        alone = rlkern.sampler_threshold(x[2:3], **RULES[name])
    assert torch.equal(alone, threshold[2:3])


def test_nlpo_keep_sets():
    """An id that there is not has no effect, and stops no kernel."""
    n, far = 40, torch.tensor([5, VOCAB, -1, VOCAB + 10**6, 2**40], device="cuda")
    x = random_logits(n, VOCAB, dtype=torch.float32)
    x[:, 9] = -math.inf
    top_k, top_p = (rlkern.nlpo_keep_set(x, always_keep=far, **options) for options in ({"top_k": 50}, {"top_p": 0.9}))
    torch.cuda.synchronize()
    assert top_k[:, 5].all() and top_p[:, 5].all() and not (top_k | top_p)[:, 9].any()
    assert torch.equal(top_k.cpu(), rlkern.nlpo_keep_set(x.cpu(), top_k=50, always_keep=torch.tensor([5])))
    assert torch.equal(top_p, rlkern.nlpo_keep_set(x, top_p=0.9, always_keep=far[:1].cpu()))
    plain = rlkern.nlpo_keep_set(x, top_p=0.9)
    ordered, order = x.double().softmax(-1).sort(-1, descending=True)
    kept, before = plain.gather(-1, order), ordered.cumsum(-1) - ordered
    assert kept[before < 0.9 - 1e-4].all() and not kept[before > 0.9 + 1e-4].any()


@pytest.mark.parametrize("renorm", [True, False])
def test_nlpo_stats(renorm):
    n = 40
    x = random_logits(n, VOCAB, dtype=torch.float32)
    keep = rlkern.nlpo_keep_set(x + random_logits(n, VOCAB, dtype=torch.float32, seed=1), top_p=0.9)
    y = torch.where(keep, drawn(n, VOCAB, seed=2), -1).argmax(-1)  # any that is kept
    grads = [upstream(n, seed=seed) for seed in (3, 4, 5)]

    def written_out(x):
        plain, kept = (reference.token_stats(t, y.unsqueeze(-1)) for t in (x, x.masked_fill(~keep, -math.inf)))
        mass = kept.logsumexp - plain.logsumexp
        logp, entropy = (kept.logp, kept.entropy) if renorm else (plain.logp, kept.entropy - mass)
        return logp.squeeze(-1), entropy, mass

    *values, d_x = twice(differentiated, lambda x: rlkern.nlpo_stats(x, y, keep, renorm=renorm), x, grads)
    *expected, gradient = differentiated(written_out, x.double(), grads)
    assert_close(values, expected)
    log_p, (_, entropy, mass) = x.double().log_softmax(-1), (t.unsqueeze(-1) for t in expected)
    sizes = sum(g.abs() for g in grads).double().unsqueeze(-1)
    terms = (log_p - mass).exp() * sizes * (1 + log_p.abs() + entropy)  # the probabilities are those on the set
    check_entries(d_x, gradient, 1e-5 * terms.scatter_add_(-1, y.unsqueeze(-1), sizes))


def _sum_of_squares(logp):
    """Of a distribution with one other token of half the rest: impossible sums make weights that cancel."""
    p = logp.exp()
    return p.square() + 0.5 * (1 - p).square()


ESTIMATORS = {
    "grpo": lambda x: advantages.grpo(x["rewards"], x["groups"]),
    "grpo of neighbours": lambda x: advantages.grpo(x["rewards"], 8, scale="batch"),
    "rloo": lambda x: advantages.rloo(x["rewards"], x["groups"]),
    "opo": lambda x: advantages.opo(x["rewards"], x["lengths"], x["groups"]),
    "gpg": lambda x: advantages.gpg(x["rewards"], x["groups"]),
    "pass_at_k": lambda x: advantages.pass_at_k(x["rewards"], x["groups"]),
    "gdpo": lambda x: advantages.gdpo(x["tokens"][:, :3], x["groups"]),
    "whiten": lambda x: advantages.whiten(x["tokens"], x["mask"]),
    "reinforce_plus_plus": lambda x: advantages.reinforce_plus_plus(x["tokens"], x["mask"], gamma=0.9),
    "reinforce_plus_plus_baseline": lambda x: advantages.reinforce_plus_plus_baseline(x["rewards"], x["groups"], x["mask"]),
    "remax": lambda x: advantages.remax(x["tokens"], x["rewards"], x["mask"]),
    "gae": lambda x: advantages.gae(x["tokens"], x["values"], x["mask"], gamma=0.9, lam=0.8),
    "otb": lambda x: advantages.otb(x["tokens"], x["logp"], _sum_of_squares(x["logp"]), x["groups"], x["mask"]),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_advantages(name):
    g = torch.Generator().manual_seed(0)
    inputs = {
        "rewards": torch.randint(5, (RESPONSES,), generator=g) / 4,
        "groups": torch.randint(RESPONSES // 8, (RESPONSES,), generator=g),
        "lengths": torch.randint(1, 9, (RESPONSES,), generator=g),
        "tokens": torch.randn(RESPONSES, 8, generator=g),
        "values": torch.randn(RESPONSES, 8, generator=g),
        "logp": -0.5 - torch.rand(RESPONSES, 8, generator=g),  # near 0 the weights of otb cancel
        "mask": torch.rand(RESPONSES, 8, generator=g) < 0.8,
    }
    inputs["rewards"][::1000] = math.nan  # not scored
    if name == "remax":
        inputs["rewards"].nan_to_num_()
    there = {key: t.cuda() for key, t in inputs.items()}

    def run(x):
        result = ESTIMATORS[name](x)
        return list(result) if isinstance(result, tuple) else [result]

    for got, want in zip(twice(lambda: run(there)), run(inputs), strict=True):
        assert want.isfinite().all() and want.any()
        torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5)


def check_masks(sampler, response, num_mc, **options):
    want = sampler(response, num_mc, **options)
    there = {key: x.cuda() if isinstance(x, torch.Tensor) else x for key, x in options.items()}
    mask, weight = sampler(response.cuda(), num_mc, **there)
    assert torch.equal(mask.cpu(), want.mask) and torch.equal(weight.cpu(), want.weight), f"{num_mc} draws, {options}"
    return want


@pytest.mark.parametrize("name", SAMPLERS)
def test_masks_have_the_bits_of_the_cpu(name):
    sampler, pairs = SAMPLERS[name], "pairs" in name
    g = torch.Generator().manual_seed(0)
    response = torch.arange(130) < torch.randint(131, (16, 1), generator=g)
    rollouts = torch.randint(2**62, (16,), generator=g)
    for seed in (0, 1, -1, 7**20, 2**63 - 1, -(2**63)):
        want = check_masks(sampler, response, 256, seed=seed, rollouts=rollouts)
        for draw in (0, 1, 100, 255):
            alone = check_masks(sampler, response, 256, seed=torch.tensor(seed), rollouts=rollouts, draw=draw)
            assert torch.equal(alone.mask, want.mask[:, draw]) and torch.equal(alone.weight, want.weight[:, draw])
    for num_mc in range(2, 257, 2 if pairs else 1):  # a share that is rounded otherwise is another mask
        check_masks(sampler, response[:4, :50], num_mc, seed=num_mc)
    if name.startswith("bernoulli"):
        for p in (0.3, 1 / 3, torch.rand(16, 2 if pairs else 4, generator=g).clamp_min(1e-3)):
            check_masks(sampler, response, 4, seed=3, p=p)


def drawn_sets(rows, vocab, most, seed=3):
    """(lists [rows, most] padded with -1 anywhere, the same sets as bool [rows, V]). Half of the rows keep
    one id, one has no list."""
    ids = (drawn(rows, most, seed=seed) * (vocab // most)).long() + torch.arange(most, device="cuda") * (vocab // most)
    counts = torch.where(drawn(rows, 1, seed=seed + 1) < 0.5, 1, (drawn(rows, 1, seed=seed + 2) * most).long() + 1)
    ids = ids.masked_fill(drawn(rows, most, seed=seed + 4).argsort(-1).argsort(-1) >= counts, -1)
    ids[5] = -1
    sets = torch.zeros(rows, vocab + 1, dtype=torch.bool, device="cuda").scatter_(-1, ids % (vocab + 1), True)[:, :vocab]
    sets[5] = True
    return ids, sets


def kept_formats(ids, sets):
    """name -> the same sets"""
    bits = torch.nn.functional.pad(sets, (0, -sets.shape[-1] % 32)).view(len(sets), -1, 32).long()
    words = (bits << torch.arange(32, device="cuda")).sum(-1).to(torch.int32)
    flat = torch.cat([ids[ids >= 0], torch.tensor([7, 10**6], device="cuda")]).int()
    lists = {"ids": rlkern.Kept.ids(ids.int()), "csr": rlkern.Kept.counts(flat, (ids >= 0).sum(-1))}
    return lists | {"bits": rlkern.Kept.bits(words), "mask": rlkern.Kept.mask(sets)}


def check_sets(x, y, keep, sets, outside, with_full):
    """Values and the gradient of all of them against float64 logits at -inf outside; returns them."""
    found = sets.gather(-1, y.unsqueeze(-1))
    inside = {"include": sets.scatter(-1, y.unsqueeze(-1), True), "everything": sets | ~found, "minus_inf": sets}[outside]
    grads = [upstream(len(y), seed=i) for i in range(5 if with_full else 3)]
    grads[0] = torch.where(found[:, 0] | (outside != "minus_inf"), grads[0], 0)

    def fused(x, **options):
        stats = rlkern.token_stats(x, y, temperature=0.7, keep=keep, outside=outside, with_full=with_full, **options)
        return (stats.logp, stats.entropy, stats.logsumexp, stats.full_entropy, stats.full_logsumexp)[: len(grads)]

    def written_out(x):
        stats, full = (reference.token_stats(z, y.unsqueeze(-1), 0.7) for z in (x.masked_fill(~inside, -math.inf), x))
        return (stats.logp.squeeze(-1), stats.entropy, stats.logsumexp, full.entropy, full.logsumexp)[: len(grads)]

    *fields, d_x = results = twice(differentiated, fused, x, grads)
    *wanted, gradient = differentiated(written_out, x.double(), grads)
    assert_close(fields, wanted)
    assert_close([d_x], [gradient], rtol=2**-7 if x.dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    assert with_full or (d_x[~inside] == 0).all()
    leaf = x.detach().clone().requires_grad_()
    in_place = leaf * 1
    with no_wait():
        torch.autograd.backward(fused(in_place, inplace_backward=True), grads)
    assert torch.equal(leaf.grad, d_x)
    return results


@pytest.mark.parametrize("outside", ["include", "everything", "minus_inf"])
@pytest.mark.parametrize(("vocab", "dtype"), [(VOCAB, torch.bfloat16), (SMALL_VOCAB, torch.bfloat16), (VOCAB, torch.float32)], ids=str)
def test_kept_sets(vocab, dtype, outside):
    rows = 64
    x, y = random_logits(rows, vocab, dtype=dtype), random_targets(vocab, rows)
    ids, sets = drawn_sets(rows, vocab, 300)
    y = torch.where(torch.arange(rows, device="cuda") % 3 == 0, y, sets.int().argmax(-1))
    for with_full in (False, True):
        of = {name: check_sets(x, y, keep, sets, outside, with_full) for name, keep in kept_formats(ids, sets).items()}
        for a, b in (("ids", "csr"), ("bits", "mask")):
            assert all(torch.equal(u, v) for u, v in zip(of[a], of[b], strict=True)), f"{a} and {b} differ"
        threshold = x.float().topk(50, -1).values[:, -1]
        check_sets(x, y, rlkern.Kept.at_least(threshold), x.float() >= threshold.unsqueeze(-1), outside, with_full)


def test_kept_lists_are_refilled_in_a_graph():
    """With fewer ids than they have room for."""
    rows, room = 256, 4096
    x, y = random_logits(rows, VOCAB), random_targets(VOCAB, rows)
    ids, offsets = torch.zeros(room, dtype=torch.int32, device="cuda"), torch.zeros(rows + 1, dtype=torch.int64, device="cuda")

    def step():
        leaf = x.detach().requires_grad_()
        stats = rlkern.token_stats(leaf, y, keep=rlkern.Kept.csr(ids, offsets))
        return stats.logp, stats.entropy, *torch.autograd.grad(stats.logp.sum() + stats.entropy.sum(), leaf)

    graph, results = captured(step)
    for seed, most in ((1, 15), (2, 3)):
        counts = (drawn(rows, seed=seed) * most).long()
        offsets[1:] = counts.cumsum(0)
        ids.copy_((drawn(room, seed=seed + 5) * VOCAB).int())
        graph.replay()
        for got, want in zip(results, step(), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize(
    "options", [{"with_sum_sq": True}, {"min_p": 0.05}, {"min_prob": 1e-3, "vocab_size": VOCAB - 100}, {"with_tail": True}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_rows_in_segments(dtype, options):
    """The kernels of shards: parts of rows, their merge, the masses of what is kept. Captured too."""
    x, y = random_logits(64, VOCAB, dtype=dtype), random_targets(VOCAB - 100, 64, 3)
    if "vocab_size" in options:
        x[:, VOCAB - 100 :] = math.nan

    def step(segments=8):
        leaf = x.detach().requires_grad_()
        stats = rlkern.token_stats(leaf, y, segments=segments, **options)
        fields = [value for value in stats if value is not None and value.is_floating_point()]
        return [*fields, *torch.autograd.grad([f.sin().sum() for f in fields], leaf)]

    got = [t.detach() for t in step()]
    tolerance = max(TOLERANCE[dtype], 2**-7 if dtype == torch.bfloat16 else 0)
    assert_close(got, [t.detach().double() for t in step(segments=None)], rtol=tolerance, atol=TOLERANCE[dtype])
    with no_wait():
        step()
    graph, replayed = captured(step)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, replayed, strict=True))
