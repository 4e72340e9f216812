"""Cases of the loss battery: NFT, KDRL, EPO, Nash, NLPO, Z-losses, reward models, differential entropy."""

import torch
from loss_battery import Draw, a_sequence, drawing, register

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


draw_teacher = drawing(base=draw_tokens, teacher_logp=Draw.logp, kd_mask=lambda g, batch, length: g.uniform(batch) < 0.6)
draw_exact_teacher = drawing("teacher_kl", base=draw_tokens, teacher_kl=Draw.uniform)
for kind in ("k1", "k2", "k3"):
    register("kdrl_loss", label=kind, options={"kd": kind, "kd_coef": 0.3}, mask="mask")(draw_teacher)
register("kdrl_loss", label="kept", options={"kd_norm": "kept", "kd_coef": 0.3, "aggregation": "seq-mean-token-mean"}, mask="mask")(draw_teacher)
register("kdrl_loss", label="exact", options={"kd": "exact", "kd_coef": 0.3, "teacher_logp": None}, mask="mask")(draw_exact_teacher)


draw_entropy = drawing("entropy", base=draw_tokens, entropy=lambda g, *shape: g.uniform(*shape, high=2))
draw_entropy_and_mean = drawing(base=draw_entropy, mean_entropy=a_sequence(Draw.uniform, low=0.8, high=1.2))
register("epo_loss", options={"coef": 0.5, "alpha": 0.7, "beta": 1.6}, mask="mask")(draw_entropy_and_mean)
register("epo_loss", label="indicator", options={"coef": 0.5, "smoothing": "indicator"}, mask="mask")(draw_entropy_and_mean)
register("epo_loss", label="first", options={"coef": 0.5, "mean_entropy": None}, mask="mask")(draw_entropy)

WHITENED = ("clip_fraction_low", "clip_fraction_high")  # of advantages that are whitened over the batch
register("nlpo_loss", options={"entropy_coef": 0.1}, mask="mask", of_whole=WHITENED)(draw_entropy)
register("nlpo_loss", label="plain", options={"entropy_coef": 0.1, "normalize_advantages": False}, mask="mask")(draw_entropy)

draw_duel = drawing("logp", logp=Draw.logp, reference_logp=Draw.logp, win_prob=a_sequence(Draw.uniform), mask=Draw.mask)


def naive_nash(logp, reference_logp, win_prob, mask, target_logp=None):
    pull = 0.1 * (logp - reference_logp) + (0 if target_logp is None else 0.1 / 0.5 * (logp - target_logp))
    return torch.where(mask, (pull.detach() - win_prob.unsqueeze(-1) + 0.5) * logp, 0).sum() / len(logp)


register("nash_md_loss", mask="mask", naive=naive_nash)(draw_duel)
register("nash_mp_loss", options={"eta": 0.5}, mask="mask", naive=naive_nash)(drawing(base=draw_duel, target_logp=Draw.logp))


def draw_of(*names):
    return drawing(*names, **dict.fromkeys(names, a_sequence(Draw.normal)))


draw_rewards = drawing(base=draw_of("chosen_rewards", "rejected_rewards"), margin=a_sequence(Draw.uniform))
register("bradley_terry_loss")(draw_rewards)
register("bradley_terry_loss", label="all", options={"focal_gamma": 2.0, "penalty": "log_barrier", "centering": 0.1})(draw_rewards)
register("bradley_terry_loss", label="l2", options={"penalty": "l2"})(draw_rewards)
register("polar_pretrain_loss", options={"penalty": "log_barrier"})(draw_of("same_policy_rewards", "other_policy_rewards"))
register("polar_finetune_loss")(draw_of("middle_rewards", "worst_rewards"))


def rows(std):
    return lambda g, batch, length: g.normal(batch, length, VOCAB, std=std)


draw_logits = drawing("logits", targets=lambda g, *shape: g.integers(0, VOCAB, *shape), logits=rows(std=2), mask=Draw.mask)
for reduction in ("sum", "mean", "none"):
    register("spherical_z_loss", label=reduction, options={"reduction": reduction, "scale": 1.5, "offset": 0.2}, mask="mask")(draw_logits)
draw_penalised = drawing("logsumexp", logsumexp=lambda g, *shape: g.normal(*shape, mean=5), mask=Draw.mask)
register("lse_penalty", options={"coef": 0.1}, mask="mask")(draw_penalised)
draw_two = drawing("logits", "reference_logits", logits=rows(std=1), reference_logits=rows(std=1), mask=Draw.mask)
register("token_did_entropy", mask="mask")(draw_two)


def of_ids(g, *shape):
    return g.logp(*shape, 3)


register("topk_reverse_kl")(drawing("logp", logp=of_ids, teacher_logp=of_ids))
draw_ids = drawing("logp", logp=of_ids, other_logp=of_ids, valid=lambda g, *shape: g.uniform(*shape, 3) < 0.8)
draw_bucket = drawing("tail_logmass", base=draw_ids, tail_logmass=Draw.logp, other_tail_logmass=Draw.logp)
for kind in ("forward_kl", "reverse_kl", "mixed_kl", "jsd"):
    register("topk_divergence", label=kind, options={"kind": kind, "tail": "bucket", "min_logp": -10.0, "beta": 0.3})(draw_bucket)
register("topk_divergence", label="renormalize", options={"tail": "renormalize"})(draw_ids)
