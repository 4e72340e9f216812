"""Which one-sided derivative a loss takes where two of its branches meet: every clamp, clip and hinge exactly
at its bound, on every backend, against the number that docs/losses.md promises. PyTorch's own answer for
clamp has changed between versions.

A gradient below is by log-probability, of the sum over the tokens."""

import math

import pytest
import torch

import rlkern
from rlkern.primitives.kinks import bounded, excess

F64 = torch.float64
SUM = {"aggregation": "token-mean", "normalizer": 1.0}


def of_logp(loss):
    """The gradient by one token's log-probability, of loss(logp, its detached value, ones [1, 1])."""

    def run(device):
        logp = torch.full((1, 1), -1.0, dtype=F64, device=device, requires_grad=True)
        return torch.autograd.grad(loss(logp, logp.detach(), torch.ones_like(logp)), logp)[0]

    return run


def of_token(function, d=0.0, advantage=1.0, **options):
    """The gradient of a policy loss at one token whose log ratio to the old policy is d."""
    options = {**SUM, **options}
    return of_logp(lambda logp, x, ones: getattr(rlkern, function)(logp, x - d, advantage * ones, ones, **options).loss)


def of_numbers(function, *numbers):
    """The gradient by the numbers of a function of float64 vectors of one entry each."""

    def run(device):
        leaves = [torch.tensor([x], dtype=F64, device=device, requires_grad=True) for x in numbers]
        return torch.cat(torch.autograd.grad(function(*leaves).sum(), leaves))

    return run


def dpo(policy_chosen, **options):
    """Only the policy's chosen response is not 0: its log-probability is the margin over beta."""

    def run(chosen):
        zero = torch.zeros_like(chosen)
        return rlkern.dpo_loss(chosen, zero, zero, zero, **options).losses

    return of_numbers(run, policy_chosen)


def aot(loss_type):
    """Two pairs with equal margins, against 0 and 2 of the reference, or of the rejected ("aot_unpaired")."""

    def run(device):
        chosen = torch.ones(2, dtype=F64, device=device, requires_grad=True)
        zero, others = torch.zeros_like(chosen), torch.arange(2, dtype=F64, device=device) * 2
        rejected, reference = (zero, others) if loss_type == "aot" else (others, zero)
        return torch.autograd.grad(rlkern.dpo_loss(chosen, rejected, reference, zero, 1.0, loss_type=loss_type).losses.sum(), chosen)[0]

    return run


def kl(d, kind, clamp=None, **options):
    """The KL penalty of `grpo_loss` alone, for a token that is d above the reference."""
    options = {"kl_coef": 1.0, "kl_kind": kind, "kl_clamp": clamp, **SUM, **options}
    return of_logp(lambda logp, x, ones: rlkern.grpo_loss(logp, None, 0 * ones, ones, reference_logp=x - d, **options).loss)


def nft(d, correct, **options):
    options = {"normalize": 0, "normalizer": 1.0, **options}
    return of_logp(lambda logp, x, ones: rlkern.nft_loss(logp, x - d, ones[0] / 2, correct * ones[0], ones, **options).loss)


def epo(entropy):
    def loss(h):
        zero, ones = torch.zeros_like(h).unsqueeze(0), torch.ones_like(h).unsqueeze(0)
        options = {"mean_entropy": 1.0, "coef": 1.0, "alpha": 1.0, "kappa_low": 0.5, "kappa_high": 1.5, **SUM}
        return rlkern.epo_loss(zero.requires_grad_(), None, h.unsqueeze(0), zero.detach(), ones, **options).loss

    return of_numbers(loss, entropy)


def lp_reg(d, **options):
    options = {"kl_term": "full", **SUM, **options}
    return of_logp(lambda logp, x, ones: rlkern.lp_reg_loss(logp, x - d, x, ones, ones, kept_logmass=0 * logp, **options).loss)


def bgpo(advantage, d=0.0, coeff=False, **options):
    """By the ELBO of a response of one token. `coeff`: of `elbo_coeff`, which has the objective's sign."""

    def run(device):
        logits = torch.zeros(1, 1, 2, dtype=F64, device=device, requires_grad=True)
        one, targets = torch.ones(1, dtype=F64, device=device), torch.zeros(1, 1, dtype=torch.long, device=device)
        elbo = torch.full_like(one, -math.log(2))
        old = None if d == 0 else elbo - d
        if coeff:
            return -rlkern.elbo_coeff(elbo, old, advantage * one, ratio_scale=1.0, **options)
        options_ = {"mc_weight": 1.0, "seq_weight": 1.0, "ratio_scale": 1.0, "mask": torch.ones_like(targets), **options}
        if old is not None:
            options_["old_elbo"] = old
        loss = rlkern.bgpo_loss(logits, targets, one.unsqueeze(-1), advantage * one, **options_).loss
        return torch.autograd.grad(loss, logits)[0][0, 0, :1] * 2  # d logp / d logit is 1 - 1/2

    return run


def bradley_terry(chosen, rejected, **options):
    return of_numbers(lambda a, b: rlkern.bradley_terry_loss(a, b, **options).loss, chosen, rejected)


NO_CLIP = {"clip_low": 0.0, "clip_high": 0.0}
E = math.exp(0.5)
BARRIER = {"penalty": "log_barrier", "penalty_weight": 1.0, "reward_bound": 5.0}
EDGE = 5.0 - 1e-3  # of the barrier
LOSES = 1 / (1 + math.exp(EDGE))  # the probability that a reward of 0 beats it
CASES = {
    # the ratio is its clip: the token learns
    **{f"{name}, A {a}": (of_token(f"{name}_loss", advantage=a, **NO_CLIP), -a) for name in ("ppo", "grpo", "gspo", "gmpo") for a in (1, -2)},
    **{f"nlpo, A {a}": (of_token("nlpo_loss", advantage=a, normalize_advantages=False, **NO_CLIP), -a) for a in (1, -2)},
    **{f"clip_cov, A {a}": (of_token("clip_cov_loss", advantage=a, select_ratio=0.0, min_count=0, **NO_CLIP), -a) for a in (1, -2)},
    "ppo, dual": (of_token("ppo_loss", advantage=-1.0, dual_clip=1.0), 1),
    "gmpo, upper": (of_token("gmpo_loss", d=0.5, clip_high=0.5), -E),
    "gmpo, lower": (of_token("gmpo_loss", d=-0.5, advantage=-1.0, clip_low=0.5), 1 / E),
    "gmpo, exponent": (of_token("gmpo_loss", d=80.0, clip_high=80.0), -math.exp(80)),
    "espo": (of_logp(lambda elbo, x, ones: rlkern.espo_loss(elbo[0], None, ones[0], ones[0], **NO_CLIP).loss), -1),
    "lp_reg, full": (lp_reg(0.0, **NO_CLIP), -1),
    # a weight at its cap has no gradient, the token has that of log pi
    "cispo, clip": (of_token("cispo_loss", **NO_CLIP), -1),
    "cispo, cap": (of_token("cispo_loss", cap=1.0), -1),
    "tis": (of_token("tis_loss", cap=1.0), -1),
    "topr": (of_token("topr_loss", advantage=-1.0, cap=1.0), 1),
    # the log ratio is its bound
    **{f"ppo, exponent {d}": (of_token("ppo_loss", d=d, advantage=a, clip_low=1.0, clip_high=9.0, log_ratio_clamp=0.5), -a * math.exp(d))
       for d, a in ((0.5, 1), (-0.5, 1), (0.5, -1))},
    "sapo, exponent": (of_token("sapo_loss", d=0.0, log_ratio_clamp=0.0), -1),
    "kl_cov, exponent": (of_token("kl_cov_loss", d=0.5, select_ratio=0.0, min_count=0, log_ratio_clamp=0.5), -E),
    "gspo, exponent": (of_token("gspo_loss", d=0.5, clip_high=9.0, log_ratio_clamp=0.5), -E),
    "ppo, 80": (of_token("ppo_loss", d=80.0, clip_high=math.inf, log_ratio_clamp=None), -math.exp(80)),
    # KL estimates
    "abs at 0": (kl(0.0, "abs"), 0),
    "kl_cov, distance 0": (of_token("kl_cov_loss", select_ratio=1.0, kl_coef=7.0), -1),
    "k1, clamp": (kl(0.5, "k1", 0.5), 1),
    "k1, clamp below": (kl(-0.5, "k1", 0.5), 1),
    "abs, clamp": (kl(-0.5, "abs", 0.5), -1),
    "k2, clamp": (kl(-1.0, "k2", 0.5), -1),
    "k2+, clamp": (kl(-1.0, "k2+", 0.5), -1),
    "k3, exponent": (kl(-80.0, "k3"), 1 - math.exp(80)),
    "k1 times ratio, clamp": (kl(0.5, "k1", 0.5, kl_times_ratio=True, log_ratio_clamp=0.0), 1.5),
    # NFT: straight through at the thresholds of R and prox, the exponent's bound as the others
    "nft, prox": (nft(0.0, 0.0), 1),  # c R / (1 - c)
    "nft, R": (nft(0.0, 1.0, clamp_pos=1.0), -1),
    "nft, exponent": (nft(0.5, 1.0, log_ratio_clamp=0.5), -1),
    "nft, sequence": (nft(0.5, 1.0, log_ratio_clamp=0.5, ratio_type="sequence"), -1),
    # EPO: the bonus alone at either edge of the band
    "epo, low": (epo(0.5), -1),
    "epo, high": (epo(1.5), -1),
    # BGPO and its exact objective
    **{f"bgpo, A {a}": (bgpo(a, clip=(0.0, 0.0)), -a) for a in (1, -2)},
    **{f"elbo_coeff, A {a}": (bgpo(a, coeff=True, clip=(0.0, 0.0)), -a) for a in (1, -2)},
    "bgpo, dual": (bgpo(-1, dual_clip=1.0), 1),
    "elbo_coeff, dual": (bgpo(-1, coeff=True, dual_clip=1.0), 1),
    "bgpo, exponent": (bgpo(-1, max_log_ratio=0.0), 1),
    "elbo_coeff, exponent": (bgpo(-1, coeff=True, max_log_ratio=0.0), 1),
    # preferences
    "hinge": (dpo(2.0, beta=0.5, loss_type="hinge"), 0),
    "alpha divergence": (dpo(-80.0, beta=1.0, f_divergence="alpha_divergence", f_alpha=0.0), -math.exp(80)),
    "exo_pair": (dpo(1e4, beta=1.0, loss_type="exo_pair", label_smoothing=0.1), 0),
    "discopop": (dpo(-1e4, beta=1.0, loss_type="discopop"), -1),  # of the part that is not bounded
    "aot": (aot("aot"), [-1 / (1 + math.e), -1 / (1 + 1 / math.e)]),  # the first of two equal ones has the smaller rank
    "aot_unpaired": (aot("aot_unpaired"), [-1 / (1 + math.e), -1 / (1 + 1 / math.e)]),
    "barrier": (bradley_terry(EDGE, 0.0, **BARRIER), [1 / (5 - EDGE) - 1 / (5 + EDGE) - LOSES, LOSES]),
    "barrier below": (bradley_terry(0.0, -EDGE, **BARRIER), [-LOSES, 1 / (5 + EDGE) - 1 / (5 - EDGE) + LOSES]),
    "focal": (bradley_terry(0.0, 0.0, focal_gamma=2.0), [-0.5, 0.5]),
    # a row of equal logits has no standardised logit
    "spherical": (of_numbers(lambda x: rlkern.spherical_z_loss(x.expand(3).unsqueeze(0), torch.zeros(1, dtype=torch.long, device=x.device)), 1.0), 0),
}  # fmt: skip
IN_KERNELS = ("ppo", "grpo", "nlpo", "clip_cov", "kl_cov", "espo", "lp_reg", "abs", "k1", "k2", "k3")


def test_losses_at_their_kinks(backend, device):
    wrong = {}
    for name, (gradient, expected) in CASES.items():
        if backend == "triton" and not name.startswith(IN_KERNELS):
            continue  # plain PyTorch on any backend, and a launch of the metrics' kernels is slow where they are interpreted
        got = gradient(device).flatten().tolist()
        if got != pytest.approx(expected if isinstance(expected, list) else [expected], rel=1e-12, abs=1e-12):
            wrong[name] = (got, expected)
    assert not wrong, wrong


@pytest.mark.parametrize("compiled", [False, True])
def test_helpers(compiled):
    """Values as clamp and relu have them, gradients where they should flow; bounds may change, compiled."""
    if compiled:
        torch._dynamo.reset()

    def both(x, low, high):
        return bounded(x, low, high), bounded(x, low=low), bounded(x, high=high), excess(x - high)

    function = torch.compile(both, fullgraph=True, backend="eager") if compiled else both
    for low, high in ((-1.0, 2.0), (-0.5, 0.5), (0.0, 0.0)):
        points = [-math.inf, low - 1, low, (low + high) / 2, high, high + 1, math.inf]
        x = torch.tensor(points, dtype=F64, requires_grad=True)
        at_most, at_least = [min(p, high) for p in points], [max(p, low) for p in points]
        values = [[max(p, low) for p in at_most], at_least, at_most, [max(p - high, 0.0) for p in points]]
        flows = (lambda p: low <= p <= high), (lambda p: p >= low), (lambda p: p <= high), (lambda p: p > high)  # noqa: B023
        slopes = [[float(flow(p)) for p in points] for flow in flows]
        for result, value, slope in zip(function(x, low, high), values, slopes, strict=True):
            assert result.tolist() == value
            assert torch.autograd.grad(result.sum(), x, retain_graph=True)[0].tolist() == slope
    x = torch.tensor([math.nan], requires_grad=True)
    assert all(result.isnan().all() for result in function(x, -1.0, 1.0))


def test_helpers_under_functional_transforms():
    x = torch.tensor([-2.0, -1.0, 0.5, 1.0, 2.0], dtype=F64)
    cube = lambda x: bounded(x**3, -1.0, 1.0).sum() + excess(x - 1).sum()  # noqa: E731
    slope = torch.where(x.abs() <= 1, 3 * x**2, 0) + (x > 1)
    torch.testing.assert_close(torch.func.grad(cube)(x), slope)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(cube))(x.unsqueeze(-1)).squeeze(-1), slope)
    torch.testing.assert_close(torch.func.hessian(cube)(x), torch.where(x.abs() <= 1, 6 * x, 0).diag())
