"""What the gradient of every KL penalty is in expectation, by enumeration. A policy over six tokens has free
logits. The sum over all tokens of pi_old(token) times the gradient of its loss is compared with autograd of
the divergence."""

import itertools
import math

import pytest
import torch

import rlkern
from rlkern import kl_estimate
from rlkern.primitives.kl import KINDS

F64 = torch.float64
V = 6
VALUES = {"k1": lambda d: d, "abs": torch.abs, "k2": lambda d: d * d / 2, "k3": lambda d: (-d).exp() - 1 + d}
SLOPES = {"k1": torch.ones_like, "abs": torch.sign, "k2": lambda d: d, "k3": lambda d: 1 - (-d).exp()}


@pytest.fixture(params=["one pass", "plain"])
def form(request):
    """Either form of the terms; that the backends agree on them is for test_ratio.py."""
    with rlkern.use_backend("auto" if request.param == "one pass" else "reference"):
        yield


class World:
    """pi has free logits, the others are fixed; every token counts once, in a row of its own."""

    def __init__(self):
        g = torch.Generator().manual_seed(1)
        self.z, reference, old = torch.randn(3, V, generator=g, dtype=F64)
        self.z.requires_grad_()
        self.lp = self.z.log_softmax(-1)
        self.reference, self.old = reference.log_softmax(-1), old.log_softmax(-1)
        p, ref = self.lp.exp(), self.reference.exp()
        self.reverse = self.gradient((p * (self.lp - self.reference)).sum())
        self.forward = self.gradient((ref * (self.reference - self.lp)).sum())
        self.distance = self.gradient((p - ref).abs().sum())
        self.nothing = torch.zeros(V, dtype=F64)

    def gradient(self, scalar):
        return torch.autograd.grad(scalar, self.z, retain_graph=True)[0]

    def expected(self, weights, slopes):
        """The sum over tokens of weight * slope * gradient of log pi."""
        return self.gradient((weights.detach() * slopes.detach() * self.lp).sum())

    def of_divergence(self, kind, with_ratio):
        """The table of rlkern.primitives.kl."""
        name = {"mse": "k2", "kl": "k1", "low_var_kl": "k3"}.get(kind.removesuffix("+"), kind.removesuffix("+"))
        if name == "k2" or kind.endswith("+"):
            return self.reverse
        return {"abs": self.distance, "k1": self.reverse if with_ratio else self.nothing, "k3": self.reverse if with_ratio else self.forward}[name]


def penalty_gradient(w, old, **options):
    """That of `grpo_loss` without advantages: the KL alone. old None: the samples are the policy's own."""
    column = w.lp.unsqueeze(-1)
    weights = (w.lp.detach() if old is None else old).exp()
    loss = rlkern.grpo_loss(
        column, None if old is None else old.unsqueeze(-1), torch.zeros(V, dtype=F64), torch.ones(V, 1), reference_logp=w.reference.unsqueeze(-1),
        kl_coef=0.5, kl_scale=2 * weights, aggregation="token-mean", normalizer=1, **options,
    ).loss  # fmt: skip
    return w.gradient(loss)


every_kind = pytest.mark.parametrize("kind", [*VALUES, *(f"{kind}+" for kind in VALUES)])


@every_kind
def test_penalties_of_grpo(form, kind):
    """kl_kind x kl_times_ratio x old policy, unclamped: the table's divergence, or on stale samples without
    the ratio something else."""
    w = World()
    for with_ratio, old in itertools.product((False, True), (None, w.lp.detach(), w.old)):
        got = penalty_gradient(w, old, kl_kind=kind, kl_times_ratio=with_ratio)
        if old is not w.old or with_ratio:
            torch.testing.assert_close(got, w.of_divergence(kind, with_ratio), rtol=1e-11, atol=1e-13)
        else:
            assert (got - w.of_divergence(kind, False)).norm() > 0.1 * w.reverse.norm()
    if kind == "k1":  # what the docstring says of stale samples
        torch.testing.assert_close(penalty_gradient(w, w.old, kl_kind=kind), w.gradient((w.old.exp() * w.lp).sum()))


@every_kind
def test_clamps(form, kind):
    """Tokens beyond kl_clamp or log_ratio_clamp lose their part, and nothing else changes. A + keeps the
    right gradient under kl_clamp."""
    w = World()
    name = kind.removesuffix("+")
    d, log_ratio = (w.lp - w.reference).detach(), (w.lp - w.old).detach()
    for with_ratio, clamp, bound in itertools.product((False, True), (None, 0.7), (None, 0.6)):
        value = VALUES[name](d)
        beyond = torch.zeros(V, dtype=torch.bool) if clamp is None else value.abs() > clamp
        slope = d if kind.endswith("+") else torch.where(beyond, 0, SLOPES[name](d))
        if with_ratio:
            r = (log_ratio if bound is None else log_ratio.clamp(-bound, bound)).exp()
            product_rule = kind in ("k1", "k3")
            held = torch.zeros(V, dtype=torch.bool) if bound is None else log_ratio.abs() > bound
            value = value if clamp is None else value.clamp(-clamp, clamp)
            slope = r * slope + (torch.where(held, 0, r * value) if product_rule else 0)
            assert bound is None or 0 < held.sum() < V
        assert clamp is None or 0 < beyond.sum() < V
        got = penalty_gradient(w, w.old, kl_kind=kind, kl_times_ratio=with_ratio, kl_clamp=clamp, log_ratio_clamp=bound)
        torch.testing.assert_close(got, w.expected(w.old.exp(), slope), rtol=1e-11, atol=1e-13)
        if kind.endswith("+") and with_ratio and bound is None:
            torch.testing.assert_close(got, w.reverse, rtol=1e-11, atol=1e-13)
        if with_ratio and bound is None and kind in ("k1", "k3"):  # of the clamped estimate's own mean
            mean = (w.lp.exp() * VALUES[name](w.lp - w.reference).clamp(-(clamp or math.inf), clamp or math.inf)).sum()
            torch.testing.assert_close(got, w.gradient(mean), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_estimates(form, kind):
    w = World()
    got = w.gradient((w.lp.detach().exp() * kl_estimate(w.lp, w.reference, kind)).sum())
    torch.testing.assert_close(got, w.of_divergence(kind, with_ratio=False))


def test_other_losses(form):
    """The KL terms of losses that have their own, on samples of the policy."""
    w = World()
    p, d = w.lp.detach().exp(), (w.lp - w.reference).detach()
    column, ones, zeros = w.lp.unsqueeze(-1), torch.ones(V, 1), torch.zeros(V, dtype=F64)

    def each(function):
        """The expected gradient of a loss of one token."""
        return sum(p[v] * w.gradient(function(slice(v, v + 1))) for v in range(V))

    reference = w.reference.unsqueeze(-1)
    for kd, divergence in {"k1": w.nothing, "k2": w.reverse, "k3": w.forward}.items():
        got = each(lambda v, kd=kd: rlkern.kdrl_loss(column[v], None, reference[v], zeros[v], ones[v], kd=kd, kd_coef=1.0).loss)
        torch.testing.assert_close(got, divergence)
    exact = (w.lp.exp() * (w.lp - w.reference)).sum().expand(V, 1)
    got = rlkern.kdrl_loss(column, w.old.unsqueeze(-1), None, zeros, ones, kd="exact", teacher_kl=exact, kd_coef=1.0).loss
    torch.testing.assert_close(w.gradient(got), w.reverse)
    for function in (rlkern.nash_md_loss, lambda *a, **k: rlkern.nash_mp_loss(*a[:2], a[1], *a[2:], eta=math.inf, **k)):
        got = each(lambda v, f=function: f(column[v], reference[v], 0.5 + zeros[v], ones[v], beta=1.0).loss)
        torch.testing.assert_close(got, w.reverse)
    got = each(lambda v: rlkern.reinforce_loss(column[v], reference[v], zeros[v], ones[v], square_coef=1.0).loss)
    torch.testing.assert_close(got, w.reverse)
    for name in ("diffu_grpo_loss", "unigrpo_loss"):
        function = getattr(rlkern, name)
        got = each(lambda v, f=function: f(column[v], None, zeros[v], ones[v], reference_logp=reference[v], kl_coef=1.0).loss)
        torch.testing.assert_close(got, w.forward)
    got = each(lambda v: rlkern.espo_loss(w.lp[v], None, zeros[v], ones[v, 0], ref_elbo=w.reference[v], kl_coef=1.0).loss)
    torch.testing.assert_close(got, w.reverse)
    for kl, divergence in {"k1": w.nothing, "k2": w.reverse, "k3": w.forward}.items():
        q = rlkern.elbo_coeff(w.lp, None, zeros, ratio_scale=1.0, ref_elbo=w.reference, kl_coef=1.0, kl=kl)
        torch.testing.assert_close(w.expected(p, -q), divergence)

    # Lp-Reg and KL-Cov regularise a selection: its part of the sum. A = -1 makes tokens eligible, and adds
    # nothing to an expected gradient.
    selected = d < 0
    slopes = {"k3": 1 - (-d).exp(), "k2": d, "abs": d.sign(), "k3+": d, "k1+": d}
    for kind, slope in slopes.items():
        options = {"rho": 1.0, "kl_kind": kind, "kl_clamp": None, "weights": p, "normalizer": 1}
        got = rlkern.lp_reg_loss(column, None, reference, zeros - 1, ones, **options).loss
        torch.testing.assert_close(w.gradient(got), w.expected(p, torch.where(selected, slope, 0)), msg=kind)
    for kind in ("k1", "kl"):
        with pytest.raises(ValueError, match="lowers every selected token"):
            rlkern.lp_reg_loss(column, None, reference, zeros - 1, ones, kl_kind=kind)
    options = {"selected": ones, "kl_coef": 1.0, "weights": w.old.exp(), "normalizer": 1}
    everything = rlkern.kl_cov_loss(column, w.old.unsqueeze(-1), zeros, ones, **options).loss
    torch.testing.assert_close(w.gradient(everything), w.expected(w.old.exp(), (w.lp - w.old).sign()))
