"""Lp-Reg against naive float64 versions of the official code's loss and, from logits, of Eq. 6."""

import math

import pytest
import torch
from derivatives import agree, tokens_of

import rlkern

F64 = torch.float64


def draw(seed=0, batch=8, length=16):
    """Proxies above, below, far above the policy, some -inf; ratios beyond 2; A of both signs; ragged."""
    g = torch.Generator().manual_seed(seed)

    def normal(mean, std):
        return mean + std * torch.randn(batch, length, generator=g, dtype=F64)

    logp = -0.05 - 5 * torch.rand(batch, length, generator=g, dtype=F64)
    old = logp + normal(0, 0.8)
    proxy = logp + normal(0.8, 1.6)
    proxy[torch.rand(batch, length, generator=g) < 0.15] = -math.inf
    advantages = normal(0, 1)
    advantages[torch.rand(batch, length, generator=g) < 0.1] = 0
    mask = torch.arange(length) < torch.randint(4, length + 1, (batch,), generator=g).unsqueeze(-1)
    mask[0] = True
    return logp.requires_grad_(), old, proxy, advantages, mask


def rarest(logp, group, rho, min_count=2):
    n = max(1, int(len(group) * rho))
    return set(sorted(group, key=lambda i: logp[i].item())[:n]) if n >= min_count else set()


def naive_sampled(logp, old, proxy, advantages, mask, rho, beta, low, high, clamp=10.0, min_count=2, rho_positive=0.0):
    tokens = tokens_of(mask)
    selected = rarest(logp, [i for i in tokens if advantages[i] < 0], rho, min_count)
    if rho_positive:
        selected |= rarest(logp, [i for i in tokens if advantages[i] > 0], rho_positive, min_count)
    total, regularised, above = 0, 0, 0
    for i in tokens:
        a, r = advantages[i], (logp[i] - old[i]).exp()
        if i in selected and logp[i] < proxy[i]:
            delta = proxy[i] - logp[i]
            k3 = delta.exp() - delta - 1
            above += bool(k3 > 10)
            total = total - a * r + beta * torch.clamp(k3, -clamp, clamp)
            regularised += 1
        else:
            total = total + torch.maximum(-a * r, -a * r.clamp(1 - low, 1 + high))
    return total / len(tokens), regularised, above


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "options", [{}, {"rho": 0.5}, {"rho": 0.9, "kl_coef": 0.3, "clip_low": 0.2, "clip_high": 0.2}, {"rho": 0.4, "rho_positive": 0.6}]
)
def test_sampled(seed, options):
    x = draw(seed)
    o = {"rho": 0.01, "kl_coef": 1.0, "clip_low": 1.0, "clip_high": 9.0, "rho_positive": 0.0} | options
    expected, count, above = naive_sampled(*x, o["rho"], o["kl_coef"], o["clip_low"], o["clip_high"], rho_positive=o["rho_positive"])
    output = rlkern.lp_reg_loss(*x, **options)
    agree(output.loss, expected, x[0])
    torch.testing.assert_close(output.metrics["selected_fraction"].item(), count / int(x[4].sum()))
    assert (count > 0) == bool(options)  # rho = 0.01 of some forty negatives is less than two tokens: off
    assert above > 0 or o["rho"] != 0.9  # the clamp is tested


def test_min_count():
    x = draw()
    rho = 1.5 / int(((x[3] < 0) & x[4]).sum())  # one token
    for min_count, count in ((2, 0), (1, 1)):
        expected, regularised, _ = naive_sampled(*x, rho, 1.0, 1.0, 9.0, min_count=min_count)
        output = rlkern.lp_reg_loss(*x, rho=rho, min_count=min_count)
        agree(output.loss, expected, x[0])
        assert output.metrics["selected_fraction"] <= 1 / int(x[4].sum()) * 1.001 * count
    for name in ("rho", "rho_positive"):
        assert rlkern.lp_reg_loss(*x, **({"rho": 0.0} | {name: 0.0})).metrics["selected_fraction"] == 0


def test_min_count_exact():
    """Of three negatives, rho = 2/3 takes the two rarest; with min_count=3 none."""
    logp = torch.tensor([[-4.0, -3.0, -2.0, -9.0]], dtype=F64, requires_grad=True)
    advantages, mask = torch.tensor([[-1.0, -1.0, -1.0, 1.0]], dtype=F64), torch.ones(1, 4)
    for min_count, count in ((2, 2), (3, 0)):
        output = rlkern.lp_reg_loss(logp, None, logp.detach() + 0.5, advantages, mask, rho=0.67, min_count=min_count)
        assert output.metrics["selected_fraction"] == count / 4
        pull = 1 - math.exp(0.5)
        expected = [1 + pull, 1 + pull, 1, -1] if count else [1, 1, 1, -1]
        assert torch.autograd.grad(output.loss, logp)[0].mul(4).flatten().tolist() == pytest.approx(expected)
        assert output.metrics["proxy_kl"].item() == pytest.approx(math.exp(0.5) - 1.5 if count else 0)


def test_clamp_lets_go_of_the_rarest():
    """The official clamp: no pull where proxy / policy > 13.6. Without it the pull stays, and a difference
    beyond float32 gives no NaN."""
    logp = torch.tensor([[-8.0, -8.0, -200.0]], requires_grad=True)
    proxy = torch.tensor([[-5.40, -5.38, -1.0]])

    def gradient(**options):
        loss = rlkern.lp_reg_loss(logp, None, proxy, -torch.ones(1), torch.ones(1, 3), rho=1.0, normalizer=1, **options).loss
        return torch.autograd.grad(loss, logp)[0].flatten().tolist()

    assert gradient() == pytest.approx([2 - math.exp(2.60), 1, 1], rel=1e-5)
    assert gradient(kl_clamp=None)[:2] == pytest.approx([2 - math.exp(2.60), 2 - math.exp(2.62)], rel=1e-5)
    assert math.isfinite(gradient(kl_clamp=None)[2])


@pytest.mark.parametrize("kind, value", [("abs", abs), ("mse", lambda d: d * d / 2)])
def test_other_estimates(kind, value):
    logp, old, proxy, advantages, mask = x = draw()
    plain = rlkern.lp_reg_loss(*x, rho=0.5, kl_coef=0.0)
    selected = rarest(logp, [i for i in tokens_of(mask) if advantages[i] < 0], 0.5)
    kl = sum(value(logp[i] - proxy[i]).clamp(-10, 10) for i in selected if logp[i] < proxy[i]) / int(mask.sum())
    agree(rlkern.lp_reg_loss(*x, rho=0.5, kl_kind=kind).loss, plain.loss + kl, logp)


# --- the paper's full-vocabulary term ---

KAPPA = 0.1


def rows(seed=0, batch=8, length=16, vocabulary=11):
    g = torch.Generator().manual_seed(seed)
    z = 1.5 * torch.randn(batch, length, vocabulary, generator=g, dtype=F64)
    y = torch.randint(0, vocabulary, (batch, length), generator=g)
    old_z = z + 0.8 * torch.randn(z.shape, generator=g, dtype=F64)
    advantages = torch.randn(batch, length, generator=g, dtype=F64)
    mask = torch.rand(batch, length, generator=g) < 0.8
    return z.requires_grad_(), old_z, y, advantages, mask


def eq6(z, old_z, y, advantages, mask, proxy_logits, rho, beta, low, high):
    """Eq. 6 from the definition: q by filtering and renormalising, the KL by a sum over the vocabulary."""
    p = z.softmax(-1)
    q = proxy_logits.detach().softmax(-1)
    q = torch.where(q >= KAPPA * q.amax(-1, keepdim=True), q, 0)
    q = q / q.sum(-1, keepdim=True)
    tokens = tokens_of(mask)
    chosen = rarest({i: p[i][y[i]] for i in tokens}, tokens, rho)
    total, regularised = 0, 0
    for i in tokens:
        r = p[i][y[i]] / old_z[i].softmax(-1)[y[i]]
        total = total - advantages[i] * r.clamp(1 - low, 1 + high)
        if i in chosen and advantages[i] < 0 and q[i][y[i]] > 0:
            kept = q[i] > 0
            total = total + beta * (q[i][kept] * (q[i][kept].log() - p[i][kept].log())).sum()
            regularised += 1
    assert 0 < regularised < len(chosen)
    return total / len(tokens)


def token_logp(z, y):
    return z.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1)


FULL = {"rho": 0.8, "kl_coef": 0.7, "clip_high": 0.5, "kl_term": "full"}


@pytest.mark.parametrize("seed", range(3))
def test_full_on_policy(seed):
    z, old_z, y, advantages, mask = x = rows(seed)
    stats = rlkern.token_stats(z, y, min_p=KAPPA)
    tokens = (stats.logp, token_logp(old_z, y), stats.proxy_logp, advantages, mask)
    agree(rlkern.lp_reg_loss(*tokens, kept_logmass=stats.kept_logmass, **FULL).loss, eq6(*x, z, 0.8, 0.7, 1.0, 0.5), z)


@pytest.mark.parametrize("seed", range(3))
def test_full_from_old_logits(seed):
    z, old_z, y, advantages, mask = x = rows(seed)
    old = rlkern.token_stats(old_z, y, min_p=KAPPA)
    log_q = old_z.log_softmax(-1)
    log_q = torch.where(log_q >= log_q.amax(-1, keepdim=True) + math.log(KAPPA), log_q, -math.inf).log_softmax(-1)
    q = log_q.exp()
    divergence = (torch.where(q > 0, q * log_q, 0) - q * z.log_softmax(-1)).sum(-1)
    tokens = (token_logp(z, y), old.logp, old.proxy_logp, advantages, mask)
    agree(rlkern.lp_reg_loss(*tokens, proxy_kl=divergence, **FULL).loss, eq6(*x, old_z, 0.8, 0.7, 1.0, 0.5), z)


def test_full_selects_among_all_tokens():
    """The rarest of all tokens have A > 0, so nothing is selected; among the negatives something is."""
    logp = torch.tensor([[-5.0, -4.0, -2.0, -1.0]], dtype=F64)
    advantages, mass = torch.tensor([[1.0, 1.0, -1.0, -1.0]], dtype=F64), torch.full((1, 4), -0.5, dtype=F64)

    def metrics(proxy, rho, **options):
        options |= {"rho": rho, "kl_term": "full", "kept_logmass": mass, "min_count": 1}
        return rlkern.lp_reg_loss(logp, None, proxy, advantages, torch.ones(1, 4), **options).metrics

    assert metrics(logp, 0.5)["selected_fraction"] == 0
    chosen = metrics(logp, 0.5, select_from="negative")
    assert chosen["selected_fraction"] == 0.25 and chosen["proxy_kl"] == 0.5
    proxy = torch.tensor([[0, 0, -math.inf, 0]], dtype=F64)
    assert metrics(proxy, 1.0, select_from="negative")["selected_fraction"] == 0.25


@pytest.mark.parametrize(
    "options, words",
    [({"rho": 1.5}, "rho is a fraction"), ({"rho_positive": 2}, "rho_positive is a fraction"), ({"kl_term": "exact"}, "unknown kl_term 'exact'"),
     ({"select_from": "positive"}, "unknown select_from"), ({"kl_kind": "k5"}, "unknown kl_kind"), ({"kl_clamp": -1}, "kl_clamp must be in"),
     ({"kl_kind": "kl"}, "lowers every selected token"),
     ({"kl_term": "full"}, "exactly one of kept_logmass"), ({"kept_logmass": torch.zeros(8, 16)}, "for kl_term='full'"),
     ({"kl_term": "full", "kept_logmass": torch.zeros(2, 2)}, "kept_logmass must have the shape"),
     ({"kl_term": "full", "rho_positive": 0.1}, "rho_positive is for kl_term='sampled'"), ({"kl_coef": -1}, "kl_coef")],
)  # fmt: skip
def test_errors(options, words):
    with pytest.raises(ValueError, match=words):
        rlkern.lp_reg_loss(*draw(), **options)


def test_proxy_errors():
    logp, old, proxy, *rest = draw()
    for wrong, error, words in ((proxy[:1], ValueError, "have the shape of logp"), (None, TypeError, "be a float tensor")):
        with pytest.raises(error, match=f"proxy_logp must {words}"):
            rlkern.lp_reg_loss(logp, old, wrong, *rest)
