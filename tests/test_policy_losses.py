"""The PPO family against naive float64 versions of the papers' formulas, token by token; errors."""

import math

import pytest
import torch
from derivatives import agree, tokens_of, value_and_gradient
from torch._dynamo.testing import CompileCounterWithBackend

import rlkern
from rlkern import kl_estimate
from rlkern.losses.arguments import policy_tokens
from rlkern.primitives.ratio import ratio_metrics

F64 = torch.float64


def draw(seed=0, batch=6, length=9, spread=0.5):
    """Ragged sequences, ratios far on both sides of 1, advantages of both signs and some zero."""
    g = torch.Generator().manual_seed(seed)
    logp = -0.05 - 3 * torch.rand(batch, length, generator=g, dtype=F64)
    old = logp + spread * torch.randn(batch, length, generator=g, dtype=F64)
    advantages = torch.randn(batch, length, generator=g, dtype=F64)
    advantages[:, 2] = 0
    mask = torch.arange(length) < torch.randint(1, length + 1, (batch,), generator=g).unsqueeze(-1)
    mask[0] = True
    return logp.requires_grad_(), old, advantages, mask


def mean_of(f, mask):
    """The mean of f(token) over the tokens, by a loop."""
    values = [f(i) for i in tokens_of(mask)]
    return sum(values) / len(values)


def token_mean(f, logp, old, advantages, mask):
    """The mean of f(logp, old, A)."""
    return mean_of(lambda i: f(logp[i], old[i], advantages[i].item()), mask)


def sequences(f, logp, old, advantages, mask):
    """The mean over the sequences of f(log ratios, logps, A), tokens of a sequence as 1-d tensors."""
    return sum(f(logp[i, m] - old[i, m], logp[i, m], advantages[i, m]) for i, m in enumerate(mask)) / len(mask)


def clip(x, low, high):
    return min(max(x, low), high)


def ppo(low, high, dual=math.inf):
    def f(lp, old, a):
        r = (lp - old).exp()
        value = max(-a * r, -a * clip(r, 1 - low, 1 + high))
        return min(value, -a * dual * torch.ones_like(r)) if a < 0 else value

    return f


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("low, high, dual", [(0.2, 0.2, None), (0.2, 0.28, None), (0.1, 0.4, 1.3), (1.0, 9.0, None)])
def test_ppo(seed, low, high, dual):
    x = draw(seed)
    ours = rlkern.ppo_loss(*x, clip_low=low, clip_high=high, dual_clip=dual)
    agree(ours.loss, token_mean(ppo(low, high, dual or math.inf), *x), x[0])


def test_ppo_metrics():
    logp, old, advantages, mask = x = draw()
    metrics = rlkern.ppo_loss(*x, clip_low=0.1, clip_high=0.3, dual_clip=1.5).metrics
    d = (logp - old)[mask].detach()
    r, a = d.exp(), advantages[mask]
    expected = {
        "clip_fraction_low": ((a < 0) & (r < 0.9)).double().mean(),
        "clip_fraction_high": ((a > 0) & (r > 1.3)).double().mean(),
        "clip_fraction_dual": ((a < 0) & (r > 1.5)).double().mean(),
        "approx_kl_k1": -d.mean(),
        "approx_kl_k3": (r - 1 - d).mean(),
        "ratio_max": r.max(),
        "ratio_min": r.min(),
        "effective_sample_size": r.sum() ** 2 / (len(r) * (r**2).sum()),
        "tokens": mask.sum().double(),
        "log_mean_ratio": r.mean().log(),
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert value != 0 and not metrics[name].requires_grad, name
        rtol = 2e-7 if "fraction" in name else 1e-11
        torch.testing.assert_close(metrics[name].double(), value, rtol=rtol, atol=0, msg=lambda m, name=name: f"{name}: {m}")


KL = {"k1": lambda d: d, "abs": abs, "k2": lambda d: d * d / 2, "k3": lambda d: (-d).exp() - 1 + d}
KL |= {"mse": KL["k2"], "low_var_kl": KL["k3"]}


@pytest.mark.parametrize("kind", KL)
def test_grpo(kind):
    logp, old, advantages, mask = x = draw()
    reference = old - 0.3
    scale = torch.tensor([0.5, 1, 1, 0.5, 1, 0], dtype=F64)

    def f(i):
        return ppo(0.2, 0.2)(logp[i], old[i], advantages[i].item()) + 0.7 * scale[i[0]] * KL[kind](logp[i] - reference[i])

    ours = rlkern.grpo_loss(*x, reference_logp=reference, kl_coef=0.7, kl_kind=kind, kl_scale=scale)
    agree(ours.loss, mean_of(f, mask), logp)
    torch.testing.assert_close(ours.metrics["kl"], mean_of(lambda i: KL[kind](logp[i] - reference[i]), mask).detach())


def test_grpo_paper():
    """Eq. 3 of arXiv 2402.03300: the mean over responses of the mean over tokens, with k3."""
    logp, old, _, mask = draw()
    reference, group_advantages = old - 0.3, torch.tensor([1.0, -0.5, 0.3, -2, 0.8, 1.2], dtype=F64)

    def f(i):
        return ppo(0.2, 0.2)(logp[i], old[i], group_advantages[i[0]].item()) + 0.04 * KL["k3"](logp[i] - reference[i])

    ours = rlkern.grpo_loss(logp, old, group_advantages, mask, reference_logp=reference, kl_coef=0.04, aggregation="grpo")
    rows = torch.eye(6, dtype=torch.bool).unsqueeze(-1) & mask
    agree(ours.loss, sum(mean_of(f, row) for row in rows) / 6, logp)


def test_kl_straight_through_and_clamp():
    d = torch.tensor([-3.0, -0.5, 0.0, 0.4, 12.0], dtype=F64, requires_grad=True)
    zero = torch.zeros_like(d)
    for kind in ("k1", "abs", "k2", "k3"):
        plain, plus = kl_estimate(d, zero, kind), kl_estimate(d, zero, kind + "+")
        torch.testing.assert_close(plus, plain, rtol=0, atol=0)
        torch.testing.assert_close(torch.autograd.grad(plus.sum(), d)[0], d.detach(), rtol=0, atol=0)
    value, gradient = value_and_gradient(kl_estimate(d, zero, "k3", clamp=10).sum(), d)
    torch.testing.assert_close(gradient, torch.tensor([0, 1 - math.exp(0.5), 0, 1 - math.exp(-0.4), 0], dtype=F64))
    d = torch.tensor([-2.61, -2.62], dtype=F64, requires_grad=True)  # e^x - x - 1 = 10 at 2.6109
    gradient = torch.autograd.grad(kl_estimate(d, torch.zeros_like(d), clamp=10).sum(), d)[0]
    assert gradient[0] < -12 and gradient[1] == 0
    far = torch.tensor([-1e4, -100.0, 1e4], requires_grad=True)
    value, gradient = value_and_gradient(kl_estimate(far, torch.zeros(3)).sum(), far)
    assert value.isfinite() and gradient.isfinite().all()
    small = kl_estimate(torch.tensor([1e-4]), torch.zeros(1), "k3")  # exp(-d) - 1 + d is 0 or 1.2e-7 in float32
    torch.testing.assert_close(small, torch.tensor([5e-9]), rtol=1e-2, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_gspo(seed):
    logp, old, advantages, mask = draw(seed, spread=0.02)
    advantages = advantages[:, :1] + 0.1

    def f(d, lp, a):
        s, a = d.mean().exp(), a[0].item()
        return max(-a * s, -a * clip(s, 1 - 3e-3, 1 + 4e-3))

    ours = rlkern.gspo_loss(logp, old, advantages, mask, clip_low=3e-3, clip_high=4e-3).loss
    agree(ours, sequences(f, logp, old, advantages.expand(6, 9), mask), logp)


def test_gspo_token_advantages():
    """GSPO-token, Eq. 14: the sequence's ratio, detached, times pi / sg(pi)."""
    x = draw(spread=0.1)

    def f(d, lp, a):
        s = d.mean().exp().detach() * (lp - lp.detach()).exp()
        return torch.maximum(-a * s, -a * s.clamp(0.97, 1.03)).mean()

    agree(rlkern.gspo_loss(*x, clip_low=0.03, clip_high=0.03).loss, sequences(f, *x), x[0])


@pytest.mark.parametrize("options, bounds", [({"clip_low": 0.1, "clip_high": 0.3}, (0.9, 1.3)), ({"cap": 1.2}, (0, 1.2)), ({"cap": 0.5}, (0, 0.5))])
def test_cispo(options, bounds):
    x = draw()
    ours = rlkern.cispo_loss(*x, **options)
    agree(ours.loss, token_mean(lambda lp, old, a: -clip((lp - old).exp().item(), *bounds) * a * lp, *x), x[0])
    assert ours.metrics["clip_fraction_high"] > 0


def test_sapo():
    x = draw()

    def f(d, lp, a):
        tau = torch.tensor([1.3 if v > 0 else 1.7 for v in a], dtype=F64)
        return (-a * 4 / tau / (1 + (-tau * (d.exp() - 1)).exp())).mean()

    agree(rlkern.sapo_loss(*x, tau_positive=1.3, tau_negative=1.7).loss, sequences(f, *x), x[0])


def test_gmpo():
    logp, old, advantages, mask = draw()
    advantages = advantages[:, :1]

    def f(d, lp, a):
        a = a[0].item()
        clipped = d.clamp(max=0.3) if a > 0 else d.clamp(min=-0.2)
        return -a * clipped.mean().exp()

    ours = rlkern.gmpo_loss(logp, old, advantages, mask, clip_low=0.2, clip_high=0.3).loss
    agree(ours, sequences(f, logp, old, advantages.expand(6, 9), mask), logp)


def test_reinforce_family():
    x = draw()
    agree(rlkern.reinforce_loss(*x).loss, token_mean(lambda lp, old, a: -a * lp, *x), x[0])
    agree(rlkern.reinforce_loss(*x, square_coef=0.4).loss, token_mean(lambda lp, old, a: -a * lp + 0.2 * (lp - old) ** 2, *x), x[0])
    agree(rlkern.tis_loss(*x, cap=1.1).loss, token_mean(lambda lp, old, a: -min((lp - old).exp().item(), 1.1) * a * lp, *x), x[0])

    def topr(lp, old, a):
        return -(1 if a >= 0 else min((lp - old).exp().item(), 1.0)) * a * lp

    agree(rlkern.topr_loss(*x).loss, token_mean(topr, *x), x[0])


def test_vespo():
    logp, old, advantages, mask = x = draw(spread=0.2)

    def f(i):
        row = i[0], mask[i[0]]
        w, a = (logp[row] - old[row]).sum().exp().item(), advantages[i].item()
        k, rate = (1.5, 2.5) if a >= 0 else (3.5, 0.5)
        return -(math.exp(rate) * w**k * math.exp(-rate * w)) * a * logp[i]

    ours = rlkern.vespo_loss(*x, k_positive=1.5, lambda_positive=2.5, k_negative=3.5, lambda_negative=0.5)
    agree(ours.loss, mean_of(f, mask), logp)


def test_vespo_rollout_weights_are_part_of_the_sequences_ratio():
    """log w of tokens or sequences, and its sum with the log ratios, is in [log 1e-8, 20]. `weights` stay
    outside."""
    logp, old, advantages, mask = x = draw(spread=0.2)
    tokens = 0.5 + torch.rand(logp.shape, dtype=logp.dtype)
    tokens[0, 0], tokens[1, 0], tokens[2, 0] = 0, 1e30, math.inf
    outside = 0.5 + torch.rand(logp.shape, dtype=logp.dtype)
    low = math.log(1e-8)
    for weights in (tokens, tokens[:, :1], tokens[:, 0]):
        total = 0
        for i, t in mask.nonzero().tolist():
            own = [weights[i, s].item() for s in range(9) if mask[i, s]] if weights.shape == logp.shape else [weights.view(6)[i].item()]
            logs = sum(low if w == 0 else min(max(math.log(w), low), 20.0) for w in own)
            w = math.exp(min(max((logp[i, mask[i]] - old[i, mask[i]]).sum().item() + logs, low), 20.0))
            k, rate = (2.0, 3.0) if advantages[i, t] >= 0 else (3.0, 2.0)
            total = total - outside[i, t] * math.exp(rate - rate * w) * w**k * advantages[i, t].item() * logp[i, t]
        agree(rlkern.vespo_loss(*x, rollout_weights=weights, weights=outside).loss, total / mask.sum(), logp)
    single = logp.detach().float().requires_grad_()
    huge = rlkern.vespo_loss(single, old.float(), advantages, mask, rollout_weights=tokens, k_positive=30.0, lambda_positive=0.0).loss
    assert huge.isfinite() and torch.autograd.grad(huge, single)[0].isfinite().all()


@pytest.mark.parametrize(
    "weights, error, message",
    [
        (torch.ones(3), ValueError, r"rollout_weights must be \[B, T\], \[B, 1\] or \[B\]"),
        (torch.ones(2, dtype=torch.int64), TypeError, "rollout_weights must be a float tensor"),
        (torch.ones(2, requires_grad=True), ValueError, "rollout_weights must not require grad"),
        (2.0, TypeError, "rollout_weights must be a float tensor"),
    ],
)
def test_vespo_rollout_weights_errors(weights, error, message):
    with pytest.raises(error, match=message):
        rlkern.vespo_loss(torch.zeros(2, 3), None, torch.zeros(2), torch.ones(2, 3), rollout_weights=weights)


TOKEN_LOSSES = ["ppo", "grpo", "cispo", "reinforce", "tis", "topr", "vespo", "clip_cov", "kl_cov"]
every_loss = pytest.mark.parametrize("name", [*TOKEN_LOSSES, "gspo", "sapo", "gmpo"])


def loss_of(name):
    return getattr(rlkern, f"{name}_loss")


@pytest.mark.parametrize("old_given", [True, False])
@every_loss
def test_on_policy_gradient_is_minus_the_advantage(name, old_given):
    logp, _, advantages, mask = draw()
    advantages = advantages[:, 1:2]
    options = {"selected": torch.zeros_like(mask)} if name == "clip_cov" else {}
    old = logp.detach().clone() if old_given else None
    loss = loss_of(name)(logp, old, advantages, mask, aggregation="seq-mean-token-mean", **options).loss
    expected = -advantages * mask / mask.sum(-1, keepdim=True) / len(mask)
    torch.testing.assert_close(torch.autograd.grad(loss, logp)[0], expected, rtol=1e-12, atol=1e-14)


@every_loss
def test_overflowing_ratio(name):
    """A ratio beyond float32: nothing at A = 0, nothing where the clip cuts it off, and no NaN anywhere."""
    logp = torch.tensor([[-1.0, -1.0, -1.0, -1.0]], requires_grad=True)
    old = torch.tensor([[-200.0, -200.0, -1.1, -1.2]])
    advantages = torch.tensor([[0.0, 1.0, -0.5, 1.0]])
    options = {"log_ratio_clamp": None} if name == "ppo" else {}
    loss = loss_of(name)(logp, old, advantages, torch.ones(1, 4), aggregation="token-mean", **options).loss
    value, gradient = value_and_gradient(loss, logp)
    assert value.isfinite() and gradient.isfinite().all(), (value, gradient)
    assert gradient[0, 1] == 0 or name not in ("ppo", "grpo", "clip_cov")
    # GSPO and GMPO couple the tokens of a sequence. KL-Cov has a penalty whatever A is.
    assert gradient[0, 0] == 0 or name in ("gspo", "gmpo", "kl_cov")


@every_loss
def test_forbidden_token(name):
    """logp = -inf, what the policy cannot draw: no NaN in a gradient, no change without an advantage."""
    logp = torch.tensor([[-math.inf, -1.0, -2.0]], requires_grad=True)
    old = torch.tensor([[-3.0, -1.1, -2.3]])
    loss = loss_of(name)(logp, old, torch.tensor([[0.0, 1.0, -0.5]]), torch.ones(1, 3)).loss
    if name not in ("gspo", "kl_cov"):  # whose ratio or penalty is that of -inf
        assert loss.isfinite()
        assert torch.autograd.grad(loss, logp)[0].isfinite().all()


def test_log_ratio_clamp():
    logp = torch.tensor([[0.0, 0.0]], requires_grad=True)
    old, advantages = torch.tensor([[-3.0, -1.0]]), torch.tensor([-1.0])
    value, gradient = value_and_gradient(rlkern.ppo_loss(logp, old, advantages, torch.ones(1, 2), log_ratio_clamp=2.0).loss, logp)
    torch.testing.assert_close(value, torch.tensor((math.exp(2) + math.exp(1)) / 2))
    torch.testing.assert_close(gradient, torch.tensor([[0.0, math.exp(1) / 2]]))


def test_advantage_shapes_and_weights():
    logp, old, advantages, mask = draw()
    per_sequence = advantages[:, 0]
    expected = rlkern.ppo_loss(logp, old, per_sequence.unsqueeze(-1).expand(6, 9).contiguous(), mask).loss
    for given in (per_sequence, per_sequence.unsqueeze(-1)):
        torch.testing.assert_close(rlkern.ppo_loss(logp, old, given, mask).loss, expected, rtol=0, atol=0)
    weights = torch.rand(6, 9, dtype=F64)
    for name in TOKEN_LOSSES[:-2]:
        loss = loss_of(name)(logp, old, advantages, mask, weights=weights, aggregation="dr_grpo").loss
        plain = loss_of(name)(logp, old, advantages * weights, mask, aggregation="dr_grpo").loss
        torch.testing.assert_close(loss, plain, msg=name)
    doubled = rlkern.gspo_loss(logp, old, per_sequence, mask, weights=torch.full((6,), 2.0)).loss
    torch.testing.assert_close(doubled, 2 * rlkern.gspo_loss(logp, old, per_sequence, mask).loss)


def test_weights_leave_the_kl_alone():
    logp, old, advantages, mask = draw()
    loss = rlkern.grpo_loss(logp, old, advantages, mask, weights=torch.zeros(6), reference_logp=old, kl_coef=0.5).loss
    torch.testing.assert_close(loss, 0.5 * (torch.expm1(old - logp) + logp - old)[mask].mean())


def test_metrics_of_nothing():
    x = draw()
    p = policy_tokens(*x[:3], torch.zeros_like(x[3]))
    assert [v.item() for v in ratio_metrics(p).values()] == [0, 0, 1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"logp": [1.0]}, TypeError, "logp must be a float tensor"),
        ({"logp": torch.zeros(4, dtype=torch.int64)}, TypeError, "logp must be a float tensor"),
        ({"logp": torch.zeros(4)}, ValueError, r"logp must be \[B, T\]"),
        ({"old_logp": torch.zeros(2, 4)}, ValueError, r"old_logp must have the shape of logp \(2, 3\), got \(2, 4\)"),
        ({"old_logp": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "old_logp must be a float tensor"),
        ({"advantages": torch.zeros(3)}, ValueError, r"advantages must be \[B, T\], \[B, 1\] or \[B\]"),
        ({"advantages": torch.zeros(2, dtype=torch.int64)}, TypeError, "advantages must be a float tensor"),
        ({"mask": torch.ones(2)}, ValueError, r"mask must have the shape of logp \(2, 3\)"),
        ({"mask": None}, TypeError, "mask must be a bool or number tensor"),
        ({"mask": torch.ones(2, 3, dtype=torch.complex64)}, TypeError, "mask must be a bool or number tensor"),
        ({"mask": torch.ones(2, 3, device="meta")}, ValueError, "mask must be on the device of logp cpu"),
        ({"aggregation": "mean"}, ValueError, "unknown aggregation mode 'mean'"),
        ({"normalizer": "3"}, TypeError, "normalizer"),
        ({"clip_low": 1.5}, ValueError, "clip_low must be in"),
        ({"clip_high": "0.2"}, TypeError, "clip_high must be a number, got str"),
        ({"clip_high": -0.1}, ValueError, "clip_high"),
        ({"dual_clip": 0.5}, ValueError, "dual_clip"),
        ({"log_ratio_clamp": 1000.0}, ValueError, "log_ratio_clamp"),
        ({"weights": torch.ones(5)}, ValueError, "weights must be"),
        ({"kl_coef": 0.1}, ValueError, "needs reference_logp"),
        ({"kl_kind": "k4"}, ValueError, "unknown kl_kind 'k4'"),
        ({"reference_logp": torch.zeros(3, 2)}, ValueError, "reference_logp must have the shape"),
    ],
)
def test_errors(change, error, words):
    arguments = {"logp": torch.zeros(2, 3), "old_logp": torch.zeros(2, 3), "advantages": torch.zeros(2), "mask": torch.ones(2, 3)} | change
    with pytest.raises(error, match=words):
        rlkern.grpo_loss(**arguments)


@pytest.mark.parametrize(
    "name, option, value",
    [("cispo", "cap", -1.0), ("sapo", "tau_positive", 0), ("gmpo", "clip_low", -0.1), ("reinforce", "square_coef", -1), ("tis", "cap", -1),
     ("topr", "cap", -1), ("vespo", "k_negative", -1), ("gspo", "log_ratio_clamp", 100)],
)  # fmt: skip
def test_option_errors(name, option, value):
    with pytest.raises(ValueError, match=option):
        loss_of(name)(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2), torch.ones(2, 3), **{option: value})


COMPILED = {
    "grpo": lambda x, c: rlkern.grpo_loss(*x, reference_logp=x[1], kl_coef=c, clip_low=c, clip_high=2 * c, dual_clip=1 + c, kl_clamp=10 * c),
    "clip_cov": lambda x, c: rlkern.clip_cov_loss(*x, select_ratio=1.0, cov_low=c, cov_high=10 * c, clip_low=c, clip_high=c),
    "lp_reg": lambda x, c: rlkern.lp_reg_loss(x[0], x[1], x[1], x[2], x[3], rho=c, kl_coef=c, clip_high=10 * c, kl_clamp=20 * c),
}


@pytest.mark.parametrize("name", COMPILED)
def test_new_numbers_and_lengths_do_not_compile_again(name):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(COMPILED[name], fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for step, c in enumerate((0.2, 0.27, 0.31)):
        logp, *others = (t.float() if t.is_floating_point() else t for t in draw(step, 6 + step, 9 + step))
        x = (logp.detach().requires_grad_(), *others)
        torch.testing.assert_close(value_and_gradient(compiled(x, c).loss, x[0]), value_and_gradient(COMPILED[name](x, c).loss, x[0]))
        counts.append(counter.frame_count)
    # Dynamo of torch 2.6 makes a number symbolic when it meets a second value.
    allowed = {0, 1} if torch.__version__.startswith("2.6.") else {0}
    assert counts[0] > 0 and {count - counts[0] for count in counts} <= allowed and counts[1] == counts[2], f"compiled again: {counts}"


def test_gspo_counts_the_tokens_of_clipped_sequences():
    logp = torch.log(torch.tensor([[1.0005, 1.0005], [1.0002, 1.0002], [0.9996, 0.9996], [0.9998, 0.9998]], dtype=F64)).requires_grad_()
    mask = torch.tensor([[True, True], [True, True], [True, False], [True, True]])
    for sign, fractions in ((1, (0, 2 / 7)), (-1, (1 / 7, 0))):
        out = rlkern.gspo_loss(logp, torch.zeros(4, 2, dtype=F64), torch.full((4,), sign, dtype=F64), mask)  # bounds 1 - 3e-4, 1 + 4e-4
        assert [out.metrics[f"clip_fraction_{side}"].item() for side in ("low", "high")] == pytest.approx(fractions)
        assert (torch.autograd.grad(out.loss, logp)[0] == 0).all(-1).tolist() == [sign > 0, False, sign < 0, False]


def test_metrics_of_a_single_token():
    mask = torch.zeros(2, 3, dtype=torch.bool)
    mask[1, 2] = True
    with rlkern.use_backend("reference"):  # the plain form
        metrics = rlkern.ppo_loss(torch.full((2, 3), -1.0, dtype=F64), torch.full((2, 3), -1.5, dtype=F64), torch.ones(2, dtype=F64), mask).metrics
    expected = {"approx_kl_k1": -0.5, "approx_kl_k3": math.expm1(0.5) - 0.5, "ratio_max": math.exp(0.5), "ratio_min": math.exp(0.5)}
    expected |= {"effective_sample_size": 1, "clip_fraction_high": 1, "clip_fraction_low": 0}
    assert {name: metrics[name].item() for name in expected} == pytest.approx(expected, rel=1e-12)
