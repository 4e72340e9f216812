"""Cases of the loss battery: NFT, KDRL, EPO, Nash, NLPO, the Z-losses, reward models, the differential entropy."""

import torch
from loss_battery import register

VOCAB = 7


def draw_answers(g, batch, length):
    """NFT: ratios on both sides of 1, answers right, wrong and in between."""
    logp = g.logp(batch, length)
    correct = torch.tensor([1.0, 0.0, 0.3, 0.0], dtype=torch.float64).repeat(batch)[:batch]
    inputs = {"logp": logp, "old_logp": logp + g.normal(batch, length, std=0.3), "success_rate": g.uniform(batch), "correct": correct}
    return inputs | {"mask": g.mask(batch, length)}, ("logp",)


def naive_nft(logp, old_logp, success_rate, correct, mask, sequence=False):
    """Gradient only: the clamped logarithm is replaced by something that has its slope."""
    c, k = success_rate.clamp(0.02, 0.98).unsqueeze(-1), correct.unsqueeze(-1)
    d = torch.where(mask, logp - old_logp, 0)
    d = d.sum(-1, keepdim=True) if sequence else d
    prox = (1 - c * d.exp()) / (1 - c)
    losses = (1 - c) * (-k * d - (1 - k) * prox / prox.detach().clamp(min=1))
    return losses.sum() if sequence else torch.where(mask, losses, 0).sum() / 1000


register("nft_loss", mask="mask", naive=naive_nft)(draw_answers)
register("nft_loss", label="mean", options={"aggregation": "token-mean", "normalize": 2, "clamp_neg": 1e-9}, mask="mask")(draw_answers)
register("nft_loss", label="sequence", options={"ratio_type": "sequence"}, mask="mask", naive=lambda **x: naive_nft(**x, sequence=True))(draw_answers)


def draw_tokens(g, batch, length):
    logp = g.logp(batch, length)
    inputs = {"logp": logp, "old_logp": logp + g.normal(batch, length, std=0.3), "advantages": g.normal(batch), "mask": g.mask(batch, length)}
    return inputs, ("logp",)


def draw_teacher(g, batch, length):
    inputs, wrt = draw_tokens(g, batch, length)
    return inputs | {"teacher_logp": g.logp(batch, length), "kd_mask": g.uniform(batch) < 0.6}, wrt


def draw_exact_teacher(g, batch, length):
    inputs, wrt = draw_tokens(g, batch, length)
    return inputs | {"teacher_kl": g.uniform(batch, length)}, (*wrt, "teacher_kl")


for kind in ("k1", "k2", "k3"):
    register("kdrl_loss", label=kind, options={"kd": kind, "kd_coef": 0.3}, mask="mask")(draw_teacher)
register("kdrl_loss", label="kept", options={"kd_norm": "kept", "kd_coef": 0.3, "aggregation": "seq-mean-token-mean"}, mask="mask")(draw_teacher)
register("kdrl_loss", label="exact", options={"kd": "exact", "kd_coef": 0.3, "teacher_logp": None}, mask="mask")(draw_exact_teacher)


def draw_entropy(g, batch, length):
    inputs, wrt = draw_tokens(g, batch, length)
    return inputs | {"entropy": g.uniform(batch, length, high=2), "mean_entropy": g.uniform(batch, low=0.8, high=1.2)}, (*wrt, "entropy")


register("epo_loss", options={"coef": 0.5, "alpha": 0.7, "beta": 1.6}, mask="mask")(draw_entropy)
register("epo_loss", label="indicator", options={"coef": 0.5, "smoothing": "indicator"}, mask="mask")(draw_entropy)
register("epo_loss", label="first", options={"coef": 0.5, "mean_entropy": None}, mask="mask")(
    lambda g, batch, length: (lambda inputs, wrt: ({k: v for k, v in inputs.items() if k != "mean_entropy"}, wrt))(*draw_entropy(g, batch, length))
)


def draw_masked_policy(g, batch, length):
    inputs, wrt = draw_tokens(g, batch, length)
    return inputs | {"entropy": g.uniform(batch, length, high=2)}, (*wrt, "entropy")


WHITENED = ("clip_fraction_low", "clip_fraction_high")  # of advantages that are whitened over the batch
register("nlpo_loss", options={"entropy_coef": 0.1}, mask="mask", of_whole=WHITENED)(draw_masked_policy)
register("nlpo_loss", label="plain", options={"entropy_coef": 0.1, "normalize_advantages": False}, mask="mask")(draw_masked_policy)


def draw_duel(g, batch, length):
    inputs = {"logp": g.logp(batch, length), "ref_logp": g.logp(batch, length), "win_prob": g.uniform(batch), "mask": g.mask(batch, length)}
    return inputs, ("logp",)


def draw_proximal_duel(g, batch, length):
    inputs, wrt = draw_duel(g, batch, length)
    return inputs | {"target_logp": g.logp(batch, length)}, wrt


def naive_nash(logp, ref_logp, win_prob, mask, target_logp=None):
    pull = 0.1 * (logp - ref_logp) + (0 if target_logp is None else 0.1 / 0.5 * (logp - target_logp))
    return torch.where(mask, (pull.detach() - win_prob.unsqueeze(-1) + 0.5) * logp, 0).sum() / len(logp)


register("nash_md_loss", mask="mask", naive=naive_nash)(draw_duel)
register("nash_mp_loss", options={"eta": 0.5}, mask="mask", naive=naive_nash)(draw_proximal_duel)


def draw_rewards(g, batch, length):
    names = ("chosen_rewards", "rejected_rewards")
    return {name: g.normal(batch) for name in names} | {"margin": g.uniform(batch)}, names


def draw_polar(names):
    return lambda g, batch, length: ({name: g.normal(batch) for name in names}, names)


register("bradley_terry_loss")(draw_rewards)
register("bradley_terry_loss", label="all", options={"focal_gamma": 2.0, "penalty": "log_barrier", "centering": 0.1})(draw_rewards)
register("bradley_terry_loss", label="l2", options={"penalty": "l2"})(draw_rewards)
register("polar_pretrain_loss", options={"penalty": "log_barrier"})(draw_polar(("same_policy_rewards", "other_policy_rewards")))
register("polar_finetune_loss")(draw_polar(("middle_rewards", "worst_rewards")))


def draw_logits(g, batch, length):
    targets = g.integers(0, VOCAB, batch, length)
    return {"logits": g.normal(batch, length, VOCAB, std=2), "targets": targets, "mask": g.mask(batch, length)}, ("logits",)


for reduction in ("sum", "mean", "none"):
    register("spherical_z_loss", label=reduction, options={"reduction": reduction, "scale": 1.5, "offset": 0.2}, mask="mask")(draw_logits)
register("lse_penalty", options={"coef": 0.1}, mask="mask")(
    lambda g, batch, length: ({"logsumexp": g.normal(batch, length, mean=5), "mask": g.mask(batch, length)}, ("logsumexp",))
)
register("token_did_entropy", mask="mask")(
    lambda g, batch, length: (
        {"logits": g.normal(batch, length, VOCAB), "reference_logits": g.normal(batch, length, VOCAB), "mask": g.mask(batch, length)},
        ("logits", "reference_logits"),
    )
)
register("topk_reverse_kl")(lambda g, batch, length: ({"logp": g.logp(batch, length, 3), "teacher_logp": g.logp(batch, length, 3)}, ("logp",)))
