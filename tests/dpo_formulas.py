"""The DPO family in float64, as the papers print it, and the pairs and logits that tests draw."""

import torch

from rlkern import dpo_loss
from rlkern.losses.preference.dpo_types import PAIR_LOSSES

BETA, EPS, TAU, ALPHA, GAMMA = 0.3, 0.1, 0.05, 0.5, 0.7
WITHOUT_REFERENCE = [name for name, loss in PAIR_LOSSES.items() if loss.reward]


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
    if kind == "sft_norm":
        return -pc / lc
    if kind == "simpo":
        v = BETA * (pc / lc - pr / lr) - GAMMA
        return -(1 - EPS) * log(s(v)) - EPS * log(s(-v))
    if kind == "cpo":
        return -(1 - EPS) * log(s(BETA * (pc - pr))) - EPS * log(s(-BETA * (pc - pr)))
    if kind == "orpo":
        odds = [torch.exp(p / n) / (1 - torch.exp(p / n)) for p, n in ((pc, lc), (pr, lr))]
        return -BETA * log(s(log(odds[0] / odds[1])))
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
    if kind in WITHOUT_REFERENCE:
        rc = rr = None
    if "gamma" in PAIR_LOSSES[kind].uses:
        options = {"gamma": GAMMA} | options
    return dpo_loss(pc, pr, rc, rr, BETA, loss_type=kind, chosen_lengths=lc, rejected_lengths=lr, discopop_tau=TAU, f_alpha=ALPHA, **options).losses


def grads(losses, *inputs):
    weights = torch.linspace(0.5, 1.5, len(losses), dtype=losses.dtype)  # entries must not be exchangeable
    return torch.autograd.grad((losses * weights).sum(), inputs, allow_unused=True, materialize_grads=True, retain_graph=True)


def draw_logits(pairs=3, length=7, vocab=11, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    logits, other = (2 * torch.randn(2 * pairs, length, vocab, generator=g, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(0, vocab, (2 * pairs, length), generator=g)
    starts, ends = torch.randint(1, 3, (2 * pairs, 1), generator=g), torch.randint(3, length + 1, (2 * pairs, 1), generator=g)
    t = torch.arange(length)
    labels = labels.masked_fill((t < starts) | (t >= ends), -100)
    labels[1] = -100  # a response that was truncated away
    return logits.to(dtype).requires_grad_(), other.to(dtype), labels
