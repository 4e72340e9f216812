"""The DPO family against the formulas of the papers, written naively in float64; its limits; its edges; the path from logits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

import rlkern
from rlkern import dpo_loss, dpo_loss_from_logits, sequence_logps, token_logprobs
from rlkern.losses import next_tokens
from rlkern.losses.dpo_types import F_DIVERGENCES, PAIR_LOSSES

BETA, EPS, TAU, ALPHA = 0.3, 0.1, 0.05, 0.5


def logistic(x):
    return 1 / (1 + torch.exp(-x))


def naive_score(a, f):
    if f == "reverse_kl":
        return a
    if f == "forward_kl":
        return -1 / torch.exp(a)
    if f == "js_divergence":
        return torch.log(torch.exp(a) / (1 + torch.exp(a)))
    return torch.exp(a) ** (ALPHA - 1) / (ALPHA - 1)


def naive(kind, pc, pr, rc, rr, lc, lr, f="reverse_kl"):
    """As the papers print them; no care for overflow."""
    log, s = torch.log, logistic
    a, b = pc - rc, pr - rr
    sc, sr = naive_score(a, f), naive_score(b, f)
    u = BETA * (sc - sr)
    if kind == "sigmoid":
        return -(1 - EPS) * log(s(u)) - EPS * log(s(-u))
    if kind == "robust":
        return (-(1 - EPS) * log(s(u)) + EPS * log(s(-u))) / (1 - 2 * EPS)
    if kind == "sigmoid_norm":
        return -log(s(BETA * (sc / lc - sr / lr)))
    if kind == "hinge":
        return torch.stack([torch.relu(1 - x) for x in u])
    if kind == "ipo":
        return (sc - sr - 1 / (2 * BETA)) ** 2
    if kind == "ipo_norm":
        return (sc / lc - sr / lr - 1 / (2 * BETA)) ** 2
    if kind == "exo_pair":
        return s(u) * log(s(u) / (1 - EPS)) + s(-u) * log(s(-u) / EPS)
    if kind == "nca_pair":
        return -log(s(BETA * sc)) - 0.5 * log(s(-BETA * sc)) - 0.5 * log(s(-BETA * sr))
    if kind == "bco_pair":
        return -log(s(BETA * sc)) - log(s(-BETA * sr))
    if kind == "sppo_hard":
        return (sc - 1 / (2 * BETA)) ** 2 + (sr + 1 / (2 * BETA)) ** 2
    if kind in ("aot", "aot_unpaired"):
        left, right = (pc - pr, rc - rr) if kind == "aot" else (a, b)
        d = BETA * torch.stack([left[i] - right[j] for i, j in zip(left.argsort(), right.argsort(), strict=True)])
        return -(1 - EPS) * log(s(d)) - EPS * log(s(-d))
    if kind == "apo_zero":
        return 1 - s(BETA * a) + s(BETA * b)
    if kind == "apo_down":
        return s(BETA * a) + 1 - s(u)
    if kind == "discopop":
        k = s(u / TAU)
        return -log(s(u)) * (1 - k) + torch.exp(-u) * k
    assert kind == "sft"
    return (-pc.sum() / lc.sum()).repeat(len(pc))


def draw(batch=16, seed=0, std=2.0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    pc, pr, rc, rr = (-10 + std * torch.randn(batch, generator=g, dtype=dtype) for _ in range(4))
    lc, lr = (torch.randint(1, 20, (batch,), generator=g) for _ in range(2))
    return pc.requires_grad_(), pr.requires_grad_(), rc, rr, lc, lr


def run(kind, pc, pr, rc, rr, lc=None, lr=None, **options):
    if "label_smoothing" in PAIR_LOSSES[kind].uses:
        options = {"label_smoothing": EPS} | options
    return dpo_loss(pc, pr, rc, rr, BETA, loss_type=kind, chosen_lengths=lc, rejected_lengths=lr, discopop_tau=TAU, f_alpha=ALPHA, **options).losses


def grads(losses, *inputs):
    weights = torch.linspace(0.5, 1.5, len(losses), dtype=losses.dtype)  # entries must not be exchangeable
    return torch.autograd.grad((losses * weights).sum(), inputs, allow_unused=True, materialize_grads=True, retain_graph=True)


@pytest.mark.parametrize("f", F_DIVERGENCES)
@pytest.mark.parametrize("kind", PAIR_LOSSES)
def test_matches_the_formula(kind, f):
    if f != "reverse_kl" and "f_divergence" not in PAIR_LOSSES[kind].uses:
        with pytest.raises(ValueError, match="takes no f_divergence"):
            run(kind, *draw(), f_divergence=f)
        return
    inputs = draw()
    losses, expected = run(kind, *inputs, f_divergence=f), naive(kind, *inputs, f=f)
    assert losses.dtype == torch.float64
    assert_close(losses, expected, rtol=1e-11, atol=1e-12)
    assert_close(grads(losses, *inputs[:2]), grads(expected, *inputs[:2]), rtol=1e-9, atol=1e-11)


def test_rewards_are_beta_times_the_log_ratio_and_detached():
    pc, pr, rc, rr, *_ = draw()
    out = dpo_loss(pc, pr, rc, rr, 0.7, loss_type="sigmoid", f_divergence="forward_kl")
    assert_close(out.chosen_rewards, (0.7 * (pc - rc)).detach())
    assert_close(out.rejected_rewards, (0.7 * (pr - rr)).detach())
    assert not out.chosen_rewards.requires_grad and not out.rejected_rewards.requires_grad
    assert isinstance(out, rlkern.DPOOutput)


def test_called_like_the_original_code():
    pc, pr, rc, rr, *_ = draw()
    plain = dpo_loss(pc, pr, rc, rr, 0.2, 0.1, False, False)
    u = 0.2 * ((pc - pr) - (rc - rr))
    assert_close(plain.losses, -torch.nn.functional.logsigmoid(u) * 0.9 - torch.nn.functional.logsigmoid(-u) * 0.1)
    assert_close(dpo_loss(pc, pr, rc, rr, 0.2, ipo=True).losses, ((pc - pr) - (rc - rr) - 2.5) ** 2)
    free = dpo_loss(pc, pr, rc, rr, 0.2, reference_free=True)
    assert_close(free.losses, -torch.nn.functional.logsigmoid(0.2 * (pc - pr)))
    assert_close(free.chosen_rewards, (0.2 * (pc - rc)).detach())  # the original code's rewards keep the reference
    none = dpo_loss(pc, pr, None, None, 0.2, reference_free=True)
    assert_close(none.losses, free.losses)
    assert_close(none.chosen_rewards, (0.2 * pc).detach())


def test_reference_free_reaches_every_type():
    pc, pr, rc, rr, lc, lr = draw()
    zero = torch.zeros_like(rc)
    for kind in PAIR_LOSSES:
        assert_close(run(kind, pc, pr, rc, rr, lc, lr, reference_free=True), run(kind, pc, pr, zero, zero, lc, lr), msg=kind)


def test_several_types_are_a_weighted_sum():
    inputs = draw()
    pc, pr, rc, rr, lc, lr = inputs
    both = dpo_loss(pc, pr, rc, rr, BETA, loss_type=["bco_pair", "sft", "hinge"], loss_weights=[0.2, 1.0, -3], chosen_lengths=lc)
    assert_close(both.losses, 0.2 * run("bco_pair", *inputs) + run("sft", *inputs) - 3 * run("hinge", *inputs))
    assert_close(dpo_loss(pc, pr, rc, rr, BETA, loss_type=("bco_pair", "hinge")).losses, run("bco_pair", *inputs) + run("hinge", *inputs))


def test_weights_multiply_and_are_detached():
    pc, pr, rc, rr, *_ = draw()
    w = torch.rand(16, dtype=torch.float64, requires_grad=True)
    losses = dpo_loss(pc, pr, rc, rr, weights=w).losses
    assert_close(losses, dpo_loss(pc, pr, rc, rr).losses * w.detach())
    assert torch.autograd.grad(losses.sum(), w, allow_unused=True)[0] is None


# --- what the losses are for ----------------------------------------------------------------------------------------------------------------


def test_robust_is_unbiased_under_flipped_labels():
    """2403.00409: the average over labels flipped at rate eps is plain DPO; conservative DPO's is not."""
    pc, pr, rc, rr, *_ = draw()
    plain = dpo_loss(pc, pr, rc, rr, BETA).losses
    for eps in (0.05, 0.3, 0.49):
        kept = dpo_loss(pc, pr, rc, rr, BETA, eps, loss_type="robust").losses
        flipped = dpo_loss(pr, pc, rr, rc, BETA, eps, loss_type="robust").losses
        assert_close((1 - eps) * kept + eps * flipped, plain, rtol=1e-10, atol=1e-11)
        conservative = (1 - eps) * dpo_loss(pc, pr, rc, rr, BETA, eps).losses + eps * dpo_loss(pr, pc, rr, rc, BETA, eps).losses
        assert (conservative - plain).abs().max() > 1e-2


def test_slopes_of_conservative_and_robust():
    """cDPO has its minimum at u = log((1-eps)/eps); rDPO pushes with at least eps/(1-2 eps) for ever."""
    u = torch.linspace(-50, 50, 10001, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros_like(u)
    slope = torch.autograd.grad(dpo_loss(u, zero, zero, zero, 1.0, EPS).losses.sum(), u)[0]
    best = math.log((1 - EPS) / EPS)
    assert (slope[u < best - 0.01] < 0).all() and (slope[u > best + 0.01] > 0).all()
    slope = torch.autograd.grad(dpo_loss(u, zero, zero, zero, 1.0, EPS, loss_type="robust").losses.sum(), u)[0]
    assert (slope <= -EPS / (1 - 2 * EPS)).all() and slope[-1] == pytest.approx(-EPS / (1 - 2 * EPS))


def test_minima():
    """Where each loss wants to go: IPO to 1/(2 beta), EXO to log((1-eps)/eps)/beta, SPPO to +-1/(2 beta)."""
    zero = torch.zeros(1, dtype=torch.float64)

    def slope(kind, a, b=0.0):
        pc, pr = (torch.full((1,), v, dtype=torch.float64, requires_grad=True) for v in (a, b))
        g = torch.autograd.grad(run(kind, pc, pr, zero, zero).sum(), (pc, pr))
        return torch.stack(g).abs().max().item()

    assert slope("ipo", 1 / (2 * BETA)) < 1e-12 < slope("ipo", 1.0)
    assert slope("exo_pair", math.log((1 - EPS) / EPS) / BETA) < 1e-12 < slope("exo_pair", 1.0)
    assert slope("sppo_hard", 1 / (2 * BETA), -1 / (2 * BETA)) < 1e-12 < slope("sppo_hard", 1.0, -1.0)


def test_pairs_stay_pairs_except_where_sorted():
    pc, pr, rc, rr, lc, lr = draw()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    for kind in PAIR_LOSSES:
        losses, permuted = run(kind, pc, pr, rc, rr, lc, lr), run(kind, *(x[order] for x in (pc, pr, rc, rr, lc, lr)))
        assert_close(permuted, losses if PAIR_LOSSES[kind].sorts_batch else losses[order], msg=kind)


def test_alpha_divergence_reaches_its_neighbours():
    inputs = draw()
    near = dpo_loss(*inputs[:4], BETA, f_divergence="alpha_divergence", f_alpha=1 - 1e-5).losses
    assert_close(near, dpo_loss(*inputs[:4], BETA).losses, rtol=1e-3, atol=1e-3)
    assert_close(dpo_loss(*inputs[:4], BETA, f_divergence="alpha_divergence", f_alpha=1.0).losses, dpo_loss(*inputs[:4], BETA).losses)
    zero = dpo_loss(*inputs[:4], BETA, f_divergence="alpha_divergence", f_alpha=0.0).losses
    assert_close(zero, dpo_loss(*inputs[:4], BETA, f_divergence="forward_kl").losses)


@settings(max_examples=40, deadline=None)
@given(st.floats(-30, 30), st.floats(0.01, 5.0), st.floats(0.0, 0.49))
def test_one_liner_equals_the_two_term_forms(x, beta, eps):
    pc, zero = torch.tensor([x], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    ls, u = torch.nn.functional.logsigmoid, beta * pc
    assert_close(dpo_loss(pc, zero, zero, zero, beta, eps).losses, -(1 - eps) * ls(u) - eps * ls(-u), rtol=1e-9, atol=1e-9)
    expected = (-(1 - eps) * ls(u) + eps * ls(-u)) / (1 - 2 * eps)
    assert_close(dpo_loss(pc, zero, zero, zero, beta, eps, loss_type="robust").losses, expected, rtol=1e-9, atol=1e-9)


# --- numbers --------------------------------------------------------------------------------------------------------------------------------

LIMITS = {  # loss at u = +1e4 and u = -1e4 (beta 1, chosen moves, the rest 0), eps = 0.1
    "sigmoid": (1e3, 1e4 - 1e3),
    "robust": (-0.125e4, 1e4 + 0.125e4),
    "hinge": (0.0, 10001.0),
    "exo_pair": (-math.log(0.9), -math.log(0.1)),
    "nca_pair": (0.5e4 + 0.5 * math.log(2), 1e4 + 0.5 * math.log(2)),
    "bco_pair": (math.log(2), 1e4 + math.log(2)),
    "apo_zero": (0.5, 1.5),
    "apo_down": (1.0, 1.0),
    "discopop": (0.0, 1e4),
    "ipo": (9999.5**2, 10000.5**2),
    "sppo_hard": (9999.5**2 + 0.25, 10000.5**2 + 0.25),
}


@pytest.mark.parametrize("kind", LIMITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_far_out_values_and_gradients_are_finite(kind, dtype):
    pc = torch.tensor([1e4, -1e4], dtype=dtype, requires_grad=True)
    zero = torch.zeros_like(pc)
    options = {"label_smoothing": EPS} if "label_smoothing" in PAIR_LOSSES[kind].uses else {}
    losses = dpo_loss(pc, zero, zero, zero, 1.0, loss_type=kind, **options).losses
    assert_close(losses, torch.tensor(LIMITS[kind], dtype=dtype))
    assert torch.autograd.grad(losses.sum(), pc)[0].isfinite().all()


def test_hinge_lets_go_at_its_kink():
    """relu's convention, and TRL's: no gradient where the margin is 1 exactly, as bfloat16 log-probabilities can have it."""
    pc, zero = torch.tensor([2.0, 1.5, 2.5], requires_grad=True), torch.zeros(3)
    losses = dpo_loss(pc, zero, zero, zero, 0.5, loss_type="hinge").losses
    assert torch.equal(losses, torch.tensor([0.0, 0.25, 0.0]))
    assert torch.equal(torch.autograd.grad(losses.sum(), pc)[0], torch.tensor([0.0, -0.5, 0.0]))


@pytest.mark.parametrize("f", F_DIVERGENCES)
def test_f_divergences_far_out(f):
    pc = torch.tensor([1e4, -1e4], requires_grad=True)
    pr = torch.tensor([-1e4, 1e4], requires_grad=True)
    losses = dpo_loss(pc, pr, torch.zeros(2), torch.zeros(2), f_divergence=f).losses
    assert losses.isfinite().all() and losses[0] < 1e-6 and losses[1] > 1
    assert all(g.isfinite().all() for g in torch.autograd.grad(losses.sum(), (pc, pr)))


def test_impossible_rejected_response():
    """log pi(rejected) = -inf: the loss takes its limit at u = inf, and gradients stay finite."""
    inf = torch.tensor([-math.inf], requires_grad=True)
    pc = torch.zeros(1, requires_grad=True)
    zero = torch.zeros(1)
    expected = {"sigmoid": 0.0, "hinge": 0.0, "exo_pair": -math.log(0.9), "bco_pair": math.log(2), "apo_zero": 0.5, "discopop": 0.0}
    for kind, value in expected.items():
        options = {"label_smoothing": 0.1} if kind == "exo_pair" else {}
        losses = dpo_loss(pc, inf, zero, zero, 1.0, loss_type=kind, **options).losses
        assert losses.item() == pytest.approx(value), kind
        assert all(g.isfinite().all() for g in torch.autograd.grad(losses.sum(), (pc, inf))), kind


def test_impossible_chosen_response():
    """log pi(chosen) = -inf: infinite losses are infinite and not NaN, bounded ones take their limit."""
    inf = torch.tensor([-math.inf], requires_grad=True)
    zero = torch.zeros(1)
    expected = {"sigmoid": (math.inf, -1), "hinge": (math.inf, -1), "discopop": (math.inf, -1), "apo_zero": (1.5, 0), "exo_pair": (-math.log(0.1), 0)}
    for kind, (value, slope) in expected.items():
        options = {"label_smoothing": 0.1} if kind == "exo_pair" else {}
        losses = dpo_loss(inf, zero, zero, zero, 1.0, loss_type=kind, **options).losses
        assert losses.item() == pytest.approx(value), kind
        assert torch.autograd.grad(losses.sum(), inf)[0].item() == slope, kind


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_half_precision_inputs_are_computed_in_float32(dtype):
    pc, pr, rc, rr, lc, lr = (x.detach().to(dtype) if x.dtype.is_floating_point else x for x in draw())
    for kind in PAIR_LOSSES:
        losses = run(kind, pc, pr, rc, rr, lc, lr)
        assert losses.dtype == torch.float32
        assert_close(losses.double(), run(kind, *(x.double() for x in (pc, pr, rc, rr)), lc, lr), rtol=1e-5, atol=1e-5, msg=kind)


def test_mixed_dtypes_take_the_widest():
    pc, pr, rc, rr, *_ = draw()
    assert dpo_loss(pc.float(), pr.bfloat16(), rc.half(), rr.float()).losses.dtype == torch.float32
    assert dpo_loss(pc.float(), pr.float(), rc, rr).losses.dtype == torch.float64


def test_empty_responses_have_length_one():
    one, zero = torch.ones(1), torch.zeros(1)
    empty = torch.zeros(1, dtype=torch.long)
    lengths = {"chosen_lengths": empty, "rejected_lengths": empty}
    assert dpo_loss(one, zero, zero, zero, 1.0, loss_type="ipo_norm", **lengths).losses.item() == 0.25
    assert dpo_loss(zero, zero, zero, zero, loss_type="sft", **lengths).losses.item() == 0


def test_sft_divides_by_the_tokens_there_are():
    lengths = torch.tensor([0, 3])
    losses = dpo_loss(torch.tensor([0.0, -6.0]), *[torch.zeros(2)] * 3, loss_type="sft", chosen_lengths=lengths).losses
    assert losses.tolist() == [2.0, 2.0]


# --- from logits ----------------------------------------------------------------------------------------------------------------------------


def draw_logits(pairs=3, length=7, vocab=11, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    logits, other = (2 * torch.randn(2 * pairs, length, vocab, generator=g, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, vocab, (2 * pairs, length), generator=g)
    starts, ends = torch.randint(1, 3, (2 * pairs, 1), generator=g), torch.randint(3, length + 1, (2 * pairs, 1), generator=g)
    t = torch.arange(length)
    labels = labels.masked_fill((t < starts) | (t >= ends), -100)
    labels[1] = -100  # a response that was truncated away
    return logits.to(dtype).requires_grad_(), other.to(dtype), labels


def naive_token_logps(logits, labels, temperature=1.0):
    """[2B, T - 1] log-probabilities and mask, sliced and softmaxed as the papers' code does."""
    log_p = (logits.double() / temperature)[:, :-1].log_softmax(-1)
    labels = labels[:, 1:]
    kept = labels != -100
    return log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) * kept, kept, log_p


@pytest.mark.parametrize("kind", PAIR_LOSSES)
def test_from_logits_matches_the_formula(kind):
    logits, other, labels = draw_logits()
    options = {"label_smoothing": EPS} if "label_smoothing" in PAIR_LOSSES[kind].uses else {}
    reference = sequence_logps(other, labels)
    out = dpo_loss_from_logits(logits, labels, reference, beta=BETA, loss_type=kind, discopop_tau=TAU, temperature=0.7, **options)
    logps, kept, _ = naive_token_logps(logits, labels, 0.7)
    ref = naive_token_logps(other, labels)[0].sum(-1)
    sums, lengths = logps.sum(-1), kept.sum(-1)
    lengths = lengths if kind == "sft" else lengths.clamp(min=1)
    expected = naive(kind, *sums.chunk(2), *ref.chunk(2), *lengths.chunk(2))
    assert_close(out.losses, expected, rtol=1e-9, atol=1e-10)
    assert_close(grads(out.losses, logits), grads(expected, logits), rtol=1e-8, atol=1e-10)
    assert_close(out.chosen_rewards, (BETA * (sums - ref).chunk(2)[0]).detach())
    assert_close(out.rejected_rewards, (BETA * (sums - ref).chunk(2)[1]).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_from_logits_precision(dtype):
    logits, other, labels = draw_logits(vocab=300, dtype=dtype)
    reference = sequence_logps(other, labels)
    out = dpo_loss_from_logits(logits, labels, reference)
    exact = logits.detach().double().requires_grad_()
    expected = dpo_loss_from_logits(exact, labels, reference.double())
    assert out.losses.dtype == torch.float32
    assert_close(out.losses.double(), expected.losses, rtol=1e-5, atol=1e-5)
    g, e = grads(out.losses, logits)[0], grads(expected.losses, exact)[0]
    assert g.dtype == dtype
    assert_close(g.double(), e, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-6)


def test_from_logits_with_aligned_labels_and_references_per_token():
    logits, other, labels = draw_logits()
    targets = next_tokens(labels)
    expected = dpo_loss_from_logits(logits, labels, sequence_logps(other, labels))
    garbage = torch.where(targets == -100, math.nan, token_logprobs(other, targets))
    for reference in (token_logprobs(other, targets), garbage):
        assert_close(dpo_loss_from_logits(logits, labels, reference).losses, expected.losses)
        assert_close(dpo_loss_from_logits(logits, targets, reference, shift=False).losses, expected.losses)
    free = dpo_loss_from_logits(logits, labels, None, reference_free=True)
    assert_close(free.losses, dpo_loss_from_logits(logits, labels, torch.zeros(6)).losses)


def test_weighted_preference_optimisation():
    """2406.11827, eq. 2: weights exp(mean(log pi(y) - log sum pi^2)), detached."""
    logits, other, labels = draw_logits()
    reference = sequence_logps(other, labels)
    logps, kept, log_p = naive_token_logps(logits, labels)
    per_token = (logps - log_p.exp().square().sum(-1).log()) * kept
    chosen, rejected = (per_token.sum(-1) / kept.sum(-1).clamp(min=1)).exp().chunk(2)
    weights = (chosen * rejected).detach()
    plain = dpo_loss_from_logits(logits, labels, reference).losses
    weighted = dpo_loss_from_logits(logits, labels, reference, use_weighting=True).losses
    assert_close(weighted, plain * weights)
    assert_close(grads(weighted, logits), grads(plain * weights, logits))
    bound = weights.median().item()
    assert (weights > bound).any() and (weights < bound).any()
    assert_close(dpo_loss_from_logits(logits, labels, reference, use_weighting=True, max_weight=bound).losses, plain * weights.clamp(max=bound))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_length_desensitised(alpha):
    """2409.06411: tokens behind the length of the shorter response count alpha times, in policy and reference."""
    logits, other, labels = draw_logits()
    (logps, kept, _), ref = naive_token_logps(logits, labels), naive_token_logps(other, labels)[0]
    lengths = kept.sum(-1)
    weights = torch.zeros_like(logps)
    for row in range(6):
        shared = min(lengths[row], lengths[(row + 3) % 6])
        for rank, t in enumerate(kept[row].nonzero().flatten()):
            weights[row, t] = 1 if rank < shared else alpha
    assert alpha == 1 or (weights == alpha).sum() > (weights[~kept] == alpha).sum(), "no token is behind the shared length"
    reference = token_logprobs(other, next_tokens(labels))
    sums, ref_sums = (weights * logps).sum(-1), (weights * ref).sum(-1)
    for kind in ("sigmoid", "ipo_norm"):
        out = dpo_loss_from_logits(logits, labels, reference, beta=BETA, ld_alpha=alpha, loss_type=kind, label_smoothing=EPS * (kind == "sigmoid"))
        expected = naive(kind, *sums.chunk(2), *ref_sums.chunk(2), *lengths.clamp(min=1).chunk(2))
        assert_close(out.losses, expected)
        assert_close(grads(out.losses, logits), grads(expected, logits))
    sft = dpo_loss_from_logits(logits, labels, reference, ld_alpha=alpha, loss_type="sft").losses
    assert_close(sft, (-logps[:3].sum() / lengths[:3].sum()).repeat(3))


def test_forbidden_tokens_do_not_poison_length_desensitised_sums():
    logits, other, labels = draw_logits()
    logits = logits.detach()
    last = (labels[3] >= 0).nonzero()[-1].item()
    labels[0] = labels[3].clone()
    labels[0, last:] = -100  # the chosen response is one token shorter
    logits[3, last - 1, labels[3, last]] = -math.inf
    out = dpo_loss_from_logits(logits, labels, token_logprobs(other, next_tokens(labels)), ld_alpha=0.0)
    assert out.losses.isfinite().all()


def test_inplace_backward_gives_the_same_gradient():
    logits, other, labels = draw_logits(dtype=torch.float32)
    reference = sequence_logps(other, labels)
    expected = grads(dpo_loss_from_logits(logits, labels, reference).losses, logits)[0]
    scratch = logits.detach().clone().requires_grad_()
    copy = scratch * 1
    losses = dpo_loss_from_logits(copy, labels, reference, inplace_backward=True).losses
    assert_close(grads(losses, scratch)[0], expected)
    assert_close(copy.detach(), expected)  # the gradient stands where the logits stood


def test_prompt_and_padding_rows_are_not_read():
    logits, other, labels = draw_logits(dtype=torch.float32)
    reference = sequence_logps(other, labels)
    expected = dpo_loss_from_logits(logits, labels, reference).losses
    poisoned = logits.detach().clone()
    poisoned[next_tokens(labels) == -100] = math.nan
    poisoned.requires_grad_()
    losses = dpo_loss_from_logits(poisoned, labels, reference, loss_type="sigmoid").losses
    assert torch.equal(losses, expected)
    assert_close(grads(losses, poisoned), grads(expected, logits))


def test_options_may_change_without_recompiling():
    """A new beta in every step must not cost a compilation each."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda pc, pr, rc, rr, beta: dpo_loss(pc, pr, rc, rr, beta).losses, fullgraph=True, backend=counter, dynamic=True)
    inputs = [x.detach() for x in draw()[:4]]
    counts = []
    for beta in (0.1, 0.2, 0.35, 0.5):
        assert_close(step(*inputs, beta), dpo_loss(*inputs, beta).losses)
        counts.append(counter.frame_count)
    assert counts[1] == counts[-1]


# --- sequence_logps ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("shift", [False, True])
def test_sequence_logps(average, shift):
    logits, _, labels = draw_logits()
    if not shift:
        labels = labels.clone()
        labels[2, -1] = 5  # counts without the shift
    result = sequence_logps(logits, labels, average=average, shift=shift)
    log_p = logits.log_softmax(-1)
    for row in range(6):
        moved = labels[row].tolist()[1:] if shift else labels[row].tolist()
        picked = [log_p[row, t, y] for t, y in enumerate(moved) if y != -100]
        expected = sum(picked) / (len(picked) if average else 1) if picked else torch.zeros((), dtype=torch.float64)
        assert_close(result[row], expected)
    assert result[1] == 0  # no tokens: 0 and not NaN


def test_sequence_logps_writes_no_second_gradient():
    """The gradient comes straight from the kernel: whole logits go in, so there is no slice to undo."""
    logits, _, labels = draw_logits()
    node = sequence_logps(logits, labels).grad_fn
    names = []
    while node is not None:
        names.append(node.name())
        node = next((f for f, _ in node.next_functions if f is not None), None)
    assert not any("Slice" in name or "Pad" in name for name in names), names


def test_ignore_index_and_empty_time():
    logits, _, labels = draw_logits()
    assert_close(
        sequence_logps(logits, labels.masked_fill(labels == -100, 7), ignore_index=7), sequence_logps(logits, labels.masked_fill(labels == 7, -100))
    )
    assert sequence_logps(torch.zeros(2, 0, 5), torch.zeros(2, 0, dtype=torch.long)).tolist() == [0, 0]
    assert next_tokens(torch.tensor([[1, 2, 3]]), -7).tolist() == [[2, 3, -7]]
    with pytest.raises(ValueError, match=r"labels must be \[\.\.\., T\]"):
        next_tokens(torch.tensor(1))


# --- errors ---------------------------------------------------------------------------------------------------------------------------------

v = torch.zeros


@pytest.mark.parametrize(
    ("error", "message", "args", "options"),
    [
        (TypeError, "policy_rejected_logps must be a float tensor", (v(3), v(3, dtype=torch.long), v(3), v(3)), {}),
        (TypeError, "got list", ([1.0], v(1), v(1), v(1)), {}),
        (TypeError, "reference_chosen_logps.*None", (v(3), v(3), None, v(3)), {"reference_free": True}),
        (TypeError, "reference_chosen_logps.*None", (v(3), v(3), None, None), {}),
        (TypeError, "policy_chosen_logps.*None", (None, v(3), None, None), {"reference_free": True}),
        (ValueError, r"policy_rejected_logps must have the shape of policy_chosen_logps \(3,\), got \(4,\)", (v(3), v(4), v(3), v(3)), {}),
        (ValueError, r"must be \[B\].*\(3, 2\)", (v(3, 2), v(3, 2), v(3, 2), v(3, 2)), {}),
        (ValueError, "on the device of", (v(3), v(3), v(3), v(3, device="meta")), {}),
        (ValueError, "beta must be positive", (v(3),) * 4, {"beta": 0.0}),
        (ValueError, "beta must be positive", (v(3),) * 4, {"beta": -1.0}),
        (ValueError, "beta must be positive", (v(3),) * 4, {"beta": math.nan}),
        (TypeError, "beta must be a number", (v(3),) * 4, {"beta": "0.1"}),
        (ValueError, "label_smoothing", (v(3),) * 4, {"label_smoothing": 0.5}),
        (ValueError, "label_smoothing", (v(3),) * 4, {"label_smoothing": -0.1, "loss_type": "robust"}),
        (ValueError, "takes no label_smoothing", (v(3),) * 4, {"label_smoothing": 0.1, "loss_type": "hinge"}),
        (ValueError, "takes no label_smoothing", (v(3),) * 4, {"label_smoothing": 0.1, "ipo": True}),
        (ValueError, "exo_pair.*needs label_smoothing", (v(3),) * 4, {"loss_type": "exo_pair"}),
        (ValueError, "unknown loss_type 'kto'.*'sigmoid'.*'sft'", (v(3),) * 4, {"loss_type": "kto"}),
        (ValueError, "empty", (v(3),) * 4, {"loss_type": ()}),
        (ValueError, "ipo=True", (v(3),) * 4, {"ipo": True, "loss_type": "hinge"}),
        (ValueError, "one entry for each of the 1", (v(3),) * 4, {"loss_weights": [1.0, 2.0]}),
        (ValueError, "finite", (v(3),) * 4, {"loss_weights": [math.inf]}),
        (TypeError, "loss_weights must be a number", (v(3),) * 4, {"loss_weights": ["1"]}),
        (ValueError, "unknown f_divergence 'kl'.*'reverse_kl'", (v(3),) * 4, {"f_divergence": "kl"}),
        (ValueError, "f_alpha must be finite", (v(3),) * 4, {"f_divergence": "alpha_divergence", "f_alpha": math.inf}),
        (ValueError, "discopop_tau", (v(3),) * 4, {"loss_type": "discopop", "discopop_tau": 0.0}),
        (ValueError, "'sigmoid_norm' needs chosen_lengths=", (v(3),) * 4, {"loss_type": ["hinge", "sigmoid_norm"]}),
        (ValueError, "'ipo_norm' needs rejected_lengths=", (v(3),) * 4, {"loss_type": "ipo_norm", "chosen_lengths": v(3)}),
        (ValueError, "'sft' needs chosen_lengths=", (v(3),) * 4, {"loss_type": "sft"}),
        (ValueError, "chosen_lengths must have the shape", (v(3),) * 4, {"loss_type": "sft", "chosen_lengths": v(4)}),
        (TypeError, "chosen_lengths", (v(3),) * 4, {"loss_type": "sft", "chosen_lengths": [1, 2, 3]}),
        (ValueError, "weights must have the shape", (v(3),) * 4, {"weights": v(2)}),
        (ValueError, "'aot' sorts the batch", (v(3),) * 4, {"weights": v(3), "loss_type": "aot"}),
        (ValueError, "'aot_unpaired' sorts the batch", (v(3),) * 4, {"weights": v(3), "loss_type": ["sigmoid", "aot_unpaired"]}),
    ],
)
def test_dpo_loss_errors(error, message, args, options):
    with pytest.raises(error, match=message):
        dpo_loss(*args, **options)


ids = torch.zeros(4, 5, dtype=torch.long)


@pytest.mark.parametrize(
    ("error", "message", "args", "options"),
    [
        (ValueError, r"\[2B, T, V\].*\(3, 5, 7\)", (v(3, 5, 7), ids[:3], v(3)), {}),
        (ValueError, r"\[2B, T, V\]", (v(4, 7), ids[:, 0], v(4)), {}),
        (ValueError, r"labels must be .*\(4, 5\), got \(4, 4\)", (v(4, 5, 7), ids[:, :4], v(4)), {}),
        (TypeError, "labels must be integer", (v(4, 5, 7), v(4, 5), v(4)), {}),
        (TypeError, "logits must be a tensor", (None, ids, v(4)), {}),
        (TypeError, "logits must be float32", (ids.unsqueeze(-1), ids, v(4)), {}),
        (ValueError, r"reference_logps must be \(4,\) or \(4, 5\).*got \(2,\)", (v(4, 5, 7), ids, v(2)), {}),
        (ValueError, r"reference_logps must be \(4, 5\).*got \(4,\)", (v(4, 5, 7), ids, v(4)), {"ld_alpha": 0.5}),
        (ValueError, "reference_logps must be on the device", (v(4, 5, 7), ids, v(4, device="meta")), {}),
        (TypeError, "reference_logps must be a float tensor.*int64", (v(4, 5, 7), ids, ids[:, 0]), {}),
        (TypeError, "reference_logps must be a float tensor.*None", (v(4, 5, 7), ids, None), {}),
        (ValueError, r"ld_alpha must be in \[0, 1\]", (v(4, 5, 7), ids, v(4, 5)), {"ld_alpha": 1.5}),
        (TypeError, "ld_alpha must be a number", (v(4, 5, 7), ids, v(4, 5)), {"ld_alpha": "1"}),
        (ValueError, "'aot' sorts the batch.*use_weighting", (v(4, 5, 7), ids, v(4)), {"use_weighting": True, "loss_type": "aot"}),
        (ValueError, "max_weight", (v(4, 5, 7), ids, v(4)), {"max_weight": 1.0}),
        (ValueError, "max_weight", (v(4, 5, 7), ids, v(4)), {"max_weight": 0.0, "use_weighting": True}),
        (ValueError, "beta must be positive", (v(4, 5, 7), ids, v(4)), {"beta": -0.1}),
        (ValueError, "unknown loss_type", (v(4, 5, 7), ids, v(4)), {"loss_type": "nope"}),
        (IndexError, "9", (v(4, 5, 7), ids + 9, v(4)), {}),
    ],
)
def test_from_logits_errors(error, message, args, options):
    with pytest.raises(error, match=message):
        dpo_loss_from_logits(*args, **options)


def test_sequence_logps_errors():
    with pytest.raises(ValueError, match="labels must be"):
        sequence_logps(v(4, 5, 7), ids[:, :4])
    with pytest.raises(TypeError, match="labels must be integer"):
        sequence_logps(v(4, 5, 7), v(4, 5))
    with pytest.raises(ValueError, match="temperature"):
        sequence_logps(v(4, 5, 7), ids, temperature=0.0)
