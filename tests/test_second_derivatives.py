"""A gradient that cannot be differentiated again says what can. Each such remedy has the second derivatives
of the formula in float64."""

import loss_battery as battery
import pytest
import torch
from calls import CALLS
from torch.nn.functional import linear, log_softmax, softplus

import rlkern
from rlkern import reference
from rlkern.primitives import moments

B, V = 4, 7
G = torch.Generator().manual_seed(0)
X, OTHER = (torch.randn(B, V, generator=G, dtype=torch.float64) for _ in range(2))
WEIGHT, BIAS = torch.randn(5, V, generator=G, dtype=torch.float64), torch.randn(5, generator=G, dtype=torch.float64)
Y, DIRECTION = torch.randint(0, 5, (B,), generator=G), torch.randn(B, V, generator=G, dtype=torch.float64)


def at(log_p, y):
    return log_p[torch.arange(len(y)), y]


def kl(p, q):
    return (p * (p / q).log()).sum(-1)


def mixture(x, beta=0.3):
    p, q = x.softmax(-1), OTHER.softmax(-1)
    m = beta * q + (1 - beta) * p
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


def divergence(formula, kind="reverse_kl", beta=0.5):
    return (
        lambda x: rlkern.token_divergence(x, OTHER, kind=kind, beta=beta),
        r"use rlkern\.reference\.token_divergence",
        lambda x: reference.token_divergence(x, OTHER, kind, beta),
        formula,
    )


# name -> (rlkern's, what its error says, the same by the remedy, and by the formula), functions of X [B, V]
REMEDIES = {
    "token_stats": (
        lambda x: rlkern.token_logprobs(x, Y),
        r"use rlkern\.reference\.token_stats, with targets \[\.\.\., K\], and the loss on what it returns",
        lambda x: reference.token_stats(x, Y.unsqueeze(-1)).logp.squeeze(-1),
        lambda x: at(log_softmax(x, -1), Y),
    ),
    "entropy": (
        rlkern.entropy_from_logits,
        r"use rlkern\.reference\.token_stats",
        lambda x: reference.token_stats(x, None).entropy,
        lambda x: -(x.softmax(-1) * log_softmax(x, -1)).sum(-1),
    ),
    "linear": (
        lambda x: rlkern.linear_token_stats(x, WEIGHT, Y, bias=BIAS).logp,
        r"use rlkern\.reference\.token_stats of torch\.nn\.functional\.linear\(hidden, weight, bias\), with targets \[\.\.\., K\]",
        lambda x: reference.token_stats(linear(x, WEIGHT, BIAS), Y.unsqueeze(-1)).logp.squeeze(-1),
        lambda x: at(log_softmax(x @ WEIGHT.T + BIAS, -1), Y),
    ),
    "reverse_kl": divergence(lambda x: kl(x.softmax(-1), OTHER.softmax(-1))),
    "forward_kl": divergence(lambda x: kl(OTHER.softmax(-1), x.softmax(-1)), "forward_kl"),
    "jsd": divergence(mixture, "jsd", 0.3),
    "skew_forward_kl": divergence(lambda x: kl(OTHER.softmax(-1), 0.3 * OTHER.softmax(-1) + 0.7 * x.softmax(-1)), "skew_forward_kl", 0.3),
    "pair_stats": (
        lambda x: (lambda s: s.divergence + s.entropy)(rlkern.pair_stats(x, OTHER)),
        r"use rlkern\.reference\.token_divergence",
        lambda x: reference.token_divergence(x, OTHER) + reference.token_stats(x, None).entropy,
        lambda x: -(x.softmax(-1) * log_softmax(OTHER, -1)).sum(-1),
    ),
    "did": (
        lambda x: rlkern.token_did_entropy(x, OTHER, temperature=0.7),
        r"use rlkern\.reference\.token_did_entropy",
        lambda x: reference.token_did_entropy(x, OTHER, 0.7),
        lambda x: (lambda u: -(u.softmax(-1) * log_softmax(u, -1)).sum(-1))((x - OTHER) / 0.7),
    ),
    "moments": (
        lambda x: (lambda m: m.centred_target + m.variance)(moments.row_moments(x, Y)),
        r"use rlkern\.reference\.row_moments",
        lambda x: sum(reference.row_moments(x, Y)),
        lambda x: at(x, Y) - x.mean(-1) + x.var(-1, correction=0),
    ),
    "spherical_z_loss": (
        lambda x: rlkern.spherical_z_loss(x, Y, reduction="none"),
        r"use rlkern\.reference\.row_moments",
        lambda x: (lambda target, variance: softplus(-target / variance.sqrt()))(*reference.row_moments(x, Y)),
        lambda x: softplus(-(at(x, Y) - x.mean(-1)) / x.std(-1, correction=0)),
    ),
}  # fmt: skip


def second(function, direction=DIRECTION):
    """d/dx of (gradient . direction)"""
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    return torch.autograd.grad((gradient * direction).sum(), x)[0]


@pytest.mark.parametrize("name", REMEDIES)
def test_remedy(name):
    ours, message, remedy, formula = REMEDIES[name]
    with pytest.raises(RuntimeError, match=f"^rlkern's gradients cannot be differentiated a second time; where you need that, {message}"):
        second(ours)
    x = X.clone().requires_grad_()
    torch.testing.assert_close(ours(x), formula(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(remedy(x), formula(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(second(remedy), second(formula), rtol=1e-9, atol=1e-10)


PLAIN = {"ppo_loss", "grpo_loss", "clip_cov_loss", "kl_cov_loss", "lp_reg_loss", "kdrl_loss", "epo_loss", "nlpo_loss"}
PLAIN |= {"diffu_grpo_loss", "unigrpo_loss", "espo_loss"}
ONE_PASS = {case.name: case for case in reversed(battery.CASES) if case.name in PLAIN and case.naive is None}


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_remedy_of_losses(name):
    """The first derivative is right (test_loss_battery.py), so its own numerical derivative is the second."""
    case = ONE_PASS[name]
    inputs, wrt = case.inputs()

    def loss(*args):
        return battery.total(case(inputs | dict(zip(wrt, args, strict=True))))

    leaves = [inputs[name].clone().requires_grad_() for name in wrt]
    gradient = torch.autograd.grad(loss(*leaves), leaves[0], create_graph=True)[0]
    remedies = r'compute the loss under rlkern.use_backend\("reference"\), or differentiate it with torch.func'
    with pytest.raises(RuntimeError, match=f"where you need that, {remedies}"):
        gradient.square().sum().backward()
    with rlkern.use_backend("reference"):
        assert torch.autograd.gradgradcheck(loss, leaves, fast_mode=True)
        gradient = torch.autograd.grad(loss(*leaves), leaves[0], create_graph=True)[0]
        expected = torch.autograd.grad(gradient.square().sum(), leaves[0], materialize_grads=True)[0]
    first = torch.func.grad(loss)
    torch.testing.assert_close(torch.func.grad(lambda *args: first(*args).square().sum())(*[x.detach() for x in leaves]), expected)


def test_every_loss_of_one_pass_is_here():
    found = set()
    for call in CALLS:
        if call.function.__module__.startswith(("rlkern.losses", "rlkern.diffusion")) and call.wrt:
            leaves = {name: call.arguments[name].clone().requires_grad_() for name in call.wrt}
            gradients = torch.autograd.grad(battery.total(call(**leaves)), list(leaves.values()), create_graph=True, allow_unused=True)
            try:
                sum(g.square().sum() for g in gradients if g is not None and g.requires_grad).backward()
            except (RuntimeError, AttributeError) as error:
                if "use_backend" in str(error):
                    found.add(call.function.__name__)
    # The sequence's ratio is a constant in gspo's gradient, so no formula has its second derivative.
    assert found == PLAIN | {"gspo_loss"}
