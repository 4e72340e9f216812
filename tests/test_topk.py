"""topk_divergence against the naive formulas in float64, and the way from logits through the tail."""

import math

import pytest
import torch
from loss_battery import NoSyncingOperators
from oracle import INF, draw

import rlkern
from rlkern.primitives.topk import TAILS, TOPK_KINDS, topk_divergence, topk_reverse_kl

every_kind = pytest.mark.parametrize("kind", TOPK_KINDS)
every_tail = pytest.mark.parametrize("tail", TAILS)


def naive(p, q, kind, beta=0.5):
    """Of probabilities [..., K], all positive, by the textbook."""

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    mix = beta * q + (1 - beta) * p
    return {
        "forward_kl": lambda: kl(q, p),
        "reverse_kl": lambda: kl(p, q),
        "mixed_kl": lambda: beta * kl(q, p) + (1 - beta) * kl(p, q),
        "jsd": lambda: beta * kl(q, mix) + (1 - beta) * kl(p, mix),
    }[kind]()


def classes(logits, chosen, tail):
    """Probabilities of the chosen ids [..., K] of whole rows, and of the rest for "bucket"."""
    p = logits.softmax(-1)
    at = p.gather(-1, chosen)
    if tail == "bucket":
        rest = p.masked_fill(torch.zeros_like(p, dtype=torch.bool).scatter(-1, chosen, True), 0).sum(-1, keepdim=True)
        return torch.cat([at, rest], -1)
    return at / at.sum(-1, keepdim=True) if tail == "renormalize" else at


def scored(logits, chosen):
    """(logp, tail_logmass)"""
    stats = rlkern.token_stats(logits, chosen, with_tail=True, with_entropy=False)
    return stats.logp, stats.tail_logmass


def of_logits(logits, other, chosen, tail, **options):
    """topk_divergence, from logits."""
    (logp, mass), (other_logp, other_mass) = scored(logits, chosen), scored(other, chosen)
    if tail == "bucket":
        options = {**options, "tail_logmass": mass, "other_tail_logmass": other_mass}
    return topk_divergence(logp, other_logp, tail=tail, **options)


def pair(rows, vocab, distance=1.0, dtype=torch.float64, seed=0):
    x = draw(rows, vocab, dtype=torch.float64, seed=seed)
    return x.to(dtype), (x + distance * draw(rows, vocab, dtype=torch.float64, seed=seed + 1, scale=1.0)).to(dtype)


def gradient(function, x):
    leaf = x.detach().clone().requires_grad_()
    value = function(leaf)
    (d,) = torch.autograd.grad((value * torch.linspace(0.5, 1.5, len(value), dtype=value.dtype)).sum(), leaf)
    return value.detach(), d


@every_kind
@every_tail
@pytest.mark.parametrize("k", [1, 8, 128, 256])
def test_equals_the_formula(kind, tail, k):
    z, w = pair(5, 700)
    chosen = w.topk(k).indices
    if tail == "renormalize" and k == 1:
        assert not topk_divergence(scored(z, chosen)[0], scored(w, chosen)[0], kind=kind, tail=tail).any()
        return
    for beta in (0.1, 0.5, 0.9):
        ours = gradient(lambda x, beta=beta: of_logits(x, w, chosen, tail, kind=kind, beta=beta), z)
        want = gradient(lambda x, beta=beta: naive(classes(x, chosen, tail), classes(w, chosen, tail), kind, beta), z)
        torch.testing.assert_close(ours, want, rtol=1e-9, atol=1e-13)


@every_kind
@every_tail
def test_second_derivatives(kind, tail):
    """Equal probabilities too: at x = 0 two branches meet."""
    z, w = pair(3, 6)
    w[0] = z[0]
    p, q = (classes(x, torch.arange(3).expand(3, 3), tail) for x in (z, w))
    logp, other = p.log(), q.log()
    mass = {"tail_logmass": logp[:, 3], "other_tail_logmass": other[:, 3]} if tail == "bucket" else {}

    def ours(l, *rest):  # noqa: E741
        own = {"tail_logmass": rest[0]} if rest else {}
        return topk_divergence(l, other[:, :3], kind=kind, tail=tail, beta=0.3, **(mass | own))

    inputs = [logp[:, :3].clone().requires_grad_(), *([logp[:, 3].clone().requires_grad_()] if mass else [])]
    assert torch.autograd.gradcheck(ours, inputs) and torch.autograd.gradgradcheck(ours, inputs)


@every_kind
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("distance", [1e-1, 1e-3, 1e-5])
def test_near_equal_distributions_keep_relative_accuracy(kind, tail, distance):
    """Of the log-probabilities as given: the error is topk_divergence's own. The formula's exceeds 1."""
    l = draw(20, 33, scale=1.0).log_softmax(-1)  # noqa: E741
    m = l + distance * draw(20, 33, seed=1, scale=1.0)
    options = {"kind": kind, "beta": 0.3, "tail": tail}
    if tail == "bucket":
        options |= {"tail_logmass": l[:, -1], "other_tail_logmass": m[:, -1]}
        got = topk_divergence(l[:, :-1], m[:, :-1], **options)
        p, x = l.double().exp(), m.double() - l.double()
    else:
        got = topk_divergence(l.double(), m.double(), **options)
        l, m = l.double().log_softmax(-1), m.double().log_softmax(-1)  # noqa: E741
        p, x = l.exp(), m - l
    t = torch.expm1(x)
    series = sum(x**n / math.factorial(n) for n in range(2, 14))  # e^x - 1 - x
    backward = sum((-x) ** n / math.factorial(n) for n in range(2, 14))
    if kind == "jsd":  # beta Hf(t) - Hf(beta t), Hf(t) = t^2 / 2 - t^3 / 6 + t^4 / 12 - ...
        hf = lambda t: sum((-t) ** n / (n * (n - 1)) for n in range(2, 60))  # noqa: E731
        want = (p * (0.3 * hf(t) - hf(0.3 * t))).sum(-1)
        near = (t.abs() < 0.6).all(-1)
        got, want = got[near], want[near]
    else:
        forward, reverse = (p * x.exp() * backward).sum(-1), (p * series).sum(-1)
        want = {"forward_kl": forward, "reverse_kl": reverse, "mixed_kl": 0.3 * forward + 0.7 * reverse}[kind]
    assert len(want) >= 10 and (got > 0).all()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)
    same = {"tail_logmass": l[:, -1], "other_tail_logmass": l[:, -1]} if tail == "bucket" else {}
    assert (topk_divergence(l, l, **(options | same)) == 0).all()


@every_kind
def test_bucket_is_between_zero_and_the_whole_divergence(kind):
    z, w = pair(50, 40, dtype=torch.float32)
    everything = torch.arange(40).expand(50, 40)
    last = torch.zeros(50)
    for k in (1, 5, 20, 39, 40):
        value = of_logits(z, w, w.topk(k).indices, "bucket", kind=kind, beta=0.4)
        assert (value >= last * (1 - 1e-5)).all()  # more classes, more divergence
        last = value
    want = naive(z.double().softmax(-1), w.double().softmax(-1), kind, 0.4)
    torch.testing.assert_close(last.double(), want, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(of_logits(z, w, everything, "none", kind=kind, beta=0.4).double(), want, rtol=1e-4, atol=1e-6)


def test_the_teachers_tail_from_its_log_probabilities():
    z, w = pair(4, 30, dtype=torch.float32)
    chosen = w.topk(5).indices
    (logp, mass), (other, other_mass) = scored(z, chosen), scored(w, chosen)
    given = topk_divergence(logp, other, tail="bucket", tail_logmass=mass, other_tail_logmass=other_mass)
    torch.testing.assert_close(topk_divergence(logp, other, tail="bucket", tail_logmass=mass), given, rtol=1e-5, atol=1e-6)


def test_a_tail_without_mass():
    """Of the teacher: nothing forward, infinite reverse, unless the student has none either."""
    logp, other = torch.tensor([[0.5, 0.3]]).log().requires_grad_(), torch.tensor([[0.5, 0.5]]).log()
    mass = torch.tensor([0.2]).log().requires_grad_()
    forward = topk_divergence(logp, other, tail="bucket", tail_logmass=mass)
    assert forward.item() == pytest.approx(0.5 * math.log(0.5 / 0.3), rel=1e-6)
    d = torch.autograd.grad(forward, (logp, mass))
    assert torch.allclose(d[0], torch.tensor([[0.0, 0.3 - 0.5]])) and torch.allclose(d[1], torch.tensor([0.2]))  # p - q
    reverse = topk_divergence(logp, other, kind="reverse_kl", tail="bucket", tail_logmass=mass)
    assert reverse.item() == INF
    none = torch.full((1,), -INF)
    full = torch.tensor([[0.6, 0.4]]).log()
    for kind in ("forward_kl", "reverse_kl"):
        assert topk_divergence(full, other, kind=kind, tail="bucket", tail_logmass=none).item() == pytest.approx(
            naive(*torch.tensor([[0.6, 0.4], [0.5, 0.5]], dtype=torch.float64), kind).item(), rel=1e-6
        )
    assert topk_divergence(other, logp.detach(), tail="bucket", tail_logmass=none, other_tail_logmass=mass).item() == INF
    assert topk_divergence(logp, other + 1e-3, tail="bucket", tail_logmass=mass).isfinite().all()  # masses rounded above 1


@every_kind
@every_tail
def test_minus_infinity(kind, tail):
    """On both sides nothing; on one side the limit. Never a NaN in a gradient."""
    l, m = (torch.tensor([row]).log() for row in ([0.3, 0.5, 0.0, 0.2], [0.6, 0.3, 0.0, 0.1]))  # noqa: E741

    def run(l, m):  # noqa: E741
        leaf = l.clone().requires_grad_()
        mass = {"tail_logmass": leaf[:, 3], "other_tail_logmass": m[:, 3]} if tail == "bucket" else {}
        value = topk_divergence(leaf[:, :3] if mass else leaf, m[:, :3] if mass else m, kind=kind, tail=tail, **mass)
        value.backward()
        return value.item(), leaf.grad

    value, d = run(l, m)
    assert value == pytest.approx(naive(l.exp()[:, [0, 1, 3]], m.exp()[:, [0, 1, 3]], kind).item(), rel=1e-5)
    assert d.isfinite().all() and d[0, 2] == 0
    limits = {"forward_kl": (INF, 0.0), "reverse_kl": (0.0, INF), "mixed_kl": (INF, INF), "jsd": (0.5 * math.log(2), 0.5 * math.log(2))}
    left, right = torch.tensor([[0.0, 0.5, 0.0, 0.5]]).log(), torch.tensor([[0.5, 0.0, 0.0, 0.5]]).log()
    for a, b, limit in (
        (left, torch.tensor([[0.4, 0.3, 0.0, 0.3]]).log(), limits[kind][0]),
        (torch.tensor([[0.4, 0.3, 0.0, 0.3]]).log(), right, limits[kind][1]),
    ):
        value, d = run(a, b)
        assert d.isfinite().all() and (d[a == -INF] == 0).all()
        assert value == INF if limit == INF else math.isfinite(value)
    if kind == "jsd":  # disjoint: log 2 in all
        value, d = run(torch.tensor([[1.0, 0.0, 0.0, 0.0]]).log(), torch.tensor([[0.0, 0.0, 1.0, 0.0]]).log())
        assert value == pytest.approx(math.log(2), rel=1e-6) and d.isfinite().all()
    nothing = torch.full((1, 4), -INF)
    value, d = run(nothing, nothing)
    assert value == 0 and (d == 0).all()


def test_far_apart_in_float32():
    """p underflows, q does not: mass all the same, and no overflow."""
    l, m = torch.tensor([[-120.0, 0.0]]), torch.tensor([[-0.5, math.log(-math.expm1(-0.5))]])  # noqa: E741
    for kind in TOPK_KINDS:
        leaf = l.clone().requires_grad_()
        value = topk_divergence(leaf, m, kind=kind, tail="renormalize")
        value.backward()
        want = naive(l.double().log_softmax(-1).exp(), m.double().log_softmax(-1).exp(), kind).item()
        assert value.item() == pytest.approx(want, rel=1e-5) and leaf.grad.isfinite().all(), kind
    assert topk_divergence(torch.tensor([[0.0, -300.0]]), torch.tensor([[0.0, -INF]]), kind="reverse_kl") == INF


@every_kind
@every_tail
def test_ids_that_do_not_count(kind, tail):
    """As if they were not there, whatever stands there. ignore_index leaves their mass to the bucket."""
    z, w = pair(4, 50)
    chosen, valid = w.topk(6).indices, torch.tensor([1, 1, 0, 1, 1, 0]).expand(4, 6).clone()
    valid[1] = torch.tensor([1, 1, 1, 1, 0, 0])
    listed = torch.where(valid != 0, chosen, -100)

    def ours(x):
        (logp, mass), (other, _) = scored(x, listed), scored(w, listed)
        logp, other = (t.masked_fill(valid == 0, math.nan) for t in (logp, other))
        return topk_divergence(logp, other, kind=kind, tail=tail, tail_logmass=mass if tail == "bucket" else None, valid=valid)

    def want(x):
        return torch.cat([naive(*(classes(t[i : i + 1], chosen[i : i + 1, valid[i] != 0], tail) for t in (x, w)), kind) for i in range(4)])

    torch.testing.assert_close(gradient(ours, z), gradient(want, z), rtol=1e-9, atol=1e-13)
    value, d = gradient(lambda x: topk_divergence(x, w, kind=kind, tail="renormalize", valid=torch.zeros_like(w)), z)
    assert (value == 0).all() and (d == 0).all()


def test_repeated_ids():
    """token_stats lists an id once; topk_divergence is told which of its entries counts."""
    z, w = pair(3, 50)
    chosen = w.topk(4).indices
    twice = torch.cat([chosen, chosen[:, :2]], -1)
    valid = torch.tensor([True] * 4 + [False] * 2).expand(3, 6)
    (logp, mass), (other, _) = scored(z, twice), scored(w, twice)
    got = topk_divergence(logp, other, tail="bucket", tail_logmass=mass, valid=valid)
    torch.testing.assert_close(got, of_logits(z, w, chosen, "bucket"))


def test_verls_clamp():
    """compute_forward_kl_topk of verl 0.9.1: both clamped, then a plain sum. The bound has a gradient."""
    l = torch.tensor([[-1.0, -12.0, -10.0, -INF]], requires_grad=True)  # noqa: E741
    m = torch.tensor([[-0.5, -3.0, -11.0, -9.0]])
    value = topk_divergence(l, m, min_logp=-10.0)
    a, b = l.detach().clamp_min(-10), m.clamp_min(-10)
    torch.testing.assert_close(value, (b.exp() * (b - a)).sum(-1))
    value.backward()
    torch.testing.assert_close(l.grad, torch.tensor([[-math.exp(-0.5), 0.0, -math.exp(-10.0), 0.0]]))
    unclamped = topk_divergence(
        torch.tensor([[-0.3, -20.0]]), torch.tensor([[-0.1, -30.0]]), tail="bucket", tail_logmass=torch.tensor([-1.4]), min_logp=-10.0
    )
    rest = torch.tensor([[0.3, 10.0, 1.4]]).neg(), torch.tensor([[-0.1, -10.0, math.log(-math.expm1(-0.1))]])
    p, q = (x.exp() for x in rest)
    torch.testing.assert_close(unclamped, (q * (q / p).log() - q + p).sum(-1))


@every_tail
def test_mixed_at_its_ends_is_one_of_the_two(tail):
    z, w = pair(4, 30)
    w[0, w[0].argmax()] = -INF
    chosen = w.topk(5).indices
    for beta, kind in ((1, "forward_kl"), (0.0, "reverse_kl")):
        assert torch.equal(of_logits(z, w, chosen, tail, kind="mixed_kl", beta=beta), of_logits(z, w, chosen, tail, kind=kind))


def test_reverse_kl_is_another_name():
    z, w = pair(4, 30)
    chosen = w.topk(5).indices
    logp, other = scored(z, chosen)[0], scored(w, chosen)[0]
    assert torch.equal(topk_reverse_kl(logp, other), topk_divergence(logp, other, kind="reverse_kl"))
    want = topk_divergence(logp, other, kind="reverse_kl", tail="renormalize")
    assert torch.equal(topk_reverse_kl(logp, other, renormalize=True), want)


@every_kind
@every_tail
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_dtypes_and_shapes(kind, tail, dtype):
    l, m = (draw(2, 3, 5, dtype=torch.float64, seed=i).log_softmax(-1)[..., :4].to(dtype) for i in range(2))  # noqa: E741
    masses = [x.double().exp().sum(-1).neg().log1p().to(dtype) for x in (l, m)] if tail == "bucket" else []

    def run(*tensors):
        own = dict(zip(("tail_logmass", "other_tail_logmass"), tensors[2:], strict=False))
        return topk_divergence(*tensors[:2], kind=kind, tail=tail, **own)

    value = run(l, m, *masses)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and value.shape == (2, 3)
    torch.testing.assert_close(value.double(), run(*(x.double() for x in (l, m, *masses))), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(run(*(x[0, 0] for x in (l, m, *masses))), value[0, 0])


@every_tail
def test_compiles_as_one_graph(tail):
    z, w = pair(4, 30, dtype=torch.float32)
    chosen = w.topk(5).indices

    def loss(x, kind):
        return of_logits(x, w, chosen, tail, kind=kind, beta=0.3)

    for kind in TOPK_KINDS:
        compiled = torch.compile(lambda x, kind=kind: loss(x, kind), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(gradient(compiled, z), gradient(lambda x, kind=kind: loss(x, kind), z))
        torch._dynamo.reset()


def test_nothing_is_read_on_the_host():
    z, w = pair(4, 30, dtype=torch.float32)
    logp, other = z.log_softmax(-1).requires_grad_(), w.log_softmax(-1)
    with NoSyncingOperators():
        for kind in TOPK_KINDS:
            topk_divergence(
                logp[:, :5], other[:, :5], kind=kind, tail="bucket", tail_logmass=logp[:, 5], valid=other[:, :5] > -3, min_logp=-10.0
            ).sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kind": "kl"}, ValueError, "unknown kind 'kl', expected one of 'forward_kl'"),
        ({"tail": "rest"}, ValueError, "unknown tail 'rest', expected one of 'none'"),
        ({"beta": 1.5}, ValueError, "beta is a fraction"),
        ({"kind": "jsd", "beta": 0}, ValueError, "0 < beta < 1 for kind='jsd', got 0"),
        ({"kind": "jsd", "beta": 1.0}, ValueError, "0 < beta < 1 for kind='jsd', got 1.0"),
        ({"tail": "bucket"}, TypeError, "tail='bucket' needs tail_logmass="),
        ({"tail_logmass": torch.zeros(2)}, ValueError, "tail_logmass belongs to tail='bucket', got tail='none'"),
        ({"other_tail_logmass": torch.zeros(2), "tail": "renormalize"}, ValueError, "other_tail_logmass belongs to tail='bucket'"),
        ({"tail": "bucket", "tail_logmass": torch.zeros(3)}, ValueError, r"tail_logmass must be \(2,\)"),
        (
            {"tail": "bucket", "tail_logmass": torch.zeros(2), "other_tail_logmass": [0.0, 0.0]},
            TypeError,
            "other_tail_logmass must be a float tensor",
        ),
        ({"other_logp": torch.zeros(2, 4)}, ValueError, "other_logp must have the shape of logp"),
        ({"valid": torch.ones(2)}, ValueError, "valid must have the shape of logp"),
        ({"min_logp": "low"}, TypeError, "min_logp must be a number"),
        ({"logp": torch.zeros(2, 3).long()}, TypeError, "logp must be a float tensor"),
    ],
)
def test_refuses(change, error, message):
    with pytest.raises(error, match=message):
        topk_divergence(**{"logp": torch.zeros(2, 3), "other_logp": torch.zeros(2, 3)} | change)
