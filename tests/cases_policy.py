"""Cases of the loss battery: the PPO family, the covariance family, Lp-Reg."""

import torch
from loss_battery import Draw, a_sequence, drawing, register


def draw_tokens(g, batch, length):
    """Ratios on both sides of the clip bounds of a token loss, advantages of both signs, some zero."""
    logp = g.logp(batch, length)
    advantages = g.normal(batch, length)
    advantages[:, 1:2] = 0
    inputs = {"logp": logp, "old_logp": logp + g.normal(batch, length, std=0.3), "advantages": advantages, "mask": g.mask(batch, length)}
    return inputs, ("logp",)


draw_sequences = drawing(base=draw_tokens, advantages=lambda g, batch, length: g.normal(batch, 1))
draw_with_reference = drawing(base=draw_tokens, reference_logp=Draw.logp, kl_scale=a_sequence(Draw.uniform), weights=Draw.uniform)


def draw_with_rollout_weights(width):
    return drawing(base=draw_tokens, rollout_weights=lambda g, batch, length: g.uniform(batch, width or length, low=0.5, high=1.5))


def draw_with_proxy(g, batch, length):
    inputs, wrt = draw_tokens(g, batch, length)
    proxy = inputs["logp"] + g.normal(batch, length, mean=0.3, std=0.3)
    return inputs | {"proxy_logp": proxy}, wrt


draw_with_kept_logmass = drawing("kept_logmass", base=draw_with_proxy, kept_logmass=lambda *shape: -Draw.uniform(*shape))


def draw_spread(g, batch, length):
    """Log-probabilities with a heavy tail: covariances large enough for Clip-Cov's band."""
    inputs, wrt = draw_tokens(g, batch, length)
    tail = torch.where(g.uniform(batch, length) < 0.3, -6.0, 0.0)
    return inputs | {"logp": inputs["logp"] + tail, "old_logp": inputs["old_logp"] + tail}, wrt


draw_selected = drawing(base=draw_tokens, selected=lambda *shape: Draw.uniform(*shape) < 0.3)


def mean(values, mask):
    return torch.where(mask, values, 0).sum() / mask.sum()


def sequence_mean(values, mask):
    return torch.where(mask, values, 0).sum(-1) / mask.sum(-1)


def naive_gspo(logp, old_logp, advantages, mask):
    s = sequence_mean(logp - old_logp, mask).exp()
    a = advantages.squeeze(-1)
    return torch.maximum(-a * s, -a * s.clamp(0.9, 1.1)).mean()


def weighted(weight):
    """A naive loss whose tokens have a detached weight(ratio, advantages)."""
    return lambda logp, old_logp, advantages, mask: mean(-weight((logp - old_logp).exp(), advantages).detach() * advantages * logp, mask)


def naive_vespo(logp, old_logp, advantages, mask, rollout_weights=None):
    w = torch.where(mask, logp - old_logp, 0).sum(-1, keepdim=True).exp()
    if rollout_weights is not None:
        w = w * (rollout_weights if rollout_weights.shape[1] == 1 else torch.where(mask, rollout_weights, 1).prod(-1, keepdim=True))
    kernel = torch.where(advantages >= 0, (3 * (1 - w)).exp() * w**2, (2 * (1 - w)).exp() * w**3)
    return mean(-kernel.detach() * advantages * logp, mask)


def naive_on_policy(logp, advantages, mask, **others):
    return mean(-advantages * logp, mask)


def draw_on_policy(g, batch, length):
    inputs, wrt = draw_tokens(g, batch, length)
    inputs.pop("old_logp")
    return inputs, wrt


def naive_k3_straight_through(logp, old_logp, advantages, mask, reference_logp, kl_scale, weights):
    ratio = (logp - old_logp).exp()
    policy = weights * torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    return mean(policy + 0.3 * kl_scale.unsqueeze(-1) * ratio.detach() * 0.5 * (logp - reference_logp) ** 2, mask)


def naive_keep_value(logp, old_logp, advantages, mask, selected):
    values = -advantages * (logp - old_logp).exp()
    return mean(torch.where(selected, values.detach(), values), mask)


def naive_full(logp, old_logp, proxy_logp, advantages, mask, kept_logmass):
    return mean(-advantages * (logp - old_logp).exp() - torch.where(lowest_half(logp, mask) & (advantages < 0), kept_logmass, 0), mask)


def lowest_half(logp, mask):
    ranked = sorted((logp[i, j].item(), i, j) for i in range(len(mask)) for j in range(mask.shape[1]) if mask[i, j])
    chosen = torch.zeros_like(mask)
    for _, i, j in ranked[: len(ranked) // 2]:
        chosen[i, j] = True
    return chosen


for mode in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm", "grpo", "dr_grpo"):
    register("ppo_loss", mask="mask", label=mode, options={"aggregation": mode})(draw_tokens)
register("ppo_loss", mask="mask", label="dual_clip", options={"dual_clip": 1.5, "clip_high": 0.28, "normalizer": 17.0})(draw_tokens)
register("ppo_loss", mask="mask", label="on_policy", options={"old_logp": None}, naive=naive_on_policy)(draw_on_policy)
for kind in ("k1", "abs", "k2", "k3"):
    register("grpo_loss", mask="mask", label=kind, options={"kl_kind": kind, "kl_coef": 0.3, "kl_times_ratio": kind == "k3"})(draw_with_reference)
straight_through = {"kl_kind": "k3+", "kl_coef": 0.3, "kl_times_ratio": True}
register("grpo_loss", mask="mask", label="k3+", options=straight_through, naive=naive_k3_straight_through)(draw_with_reference)
register("grpo_loss", mask="mask")(draw_tokens)
register("gspo_loss", mask="mask", options={"clip_low": 0.1, "clip_high": 0.1}, naive=naive_gspo)(draw_sequences)
register("cispo_loss", mask="mask", naive=weighted(lambda r, a: r.clamp(0.8, 1.2)))(draw_tokens)
register("cispo_loss", mask="mask", label="cap", options={"cap": 1.1}, naive=weighted(lambda r, a: r.clamp(max=1.1)))(draw_tokens)
register("sapo_loss", mask="mask")(draw_tokens)
register("gmpo_loss", mask="mask")(draw_sequences)
register("reinforce_loss", mask="mask")(draw_tokens)
register("reinforce_loss", mask="mask", label="kimi", options={"square_coef": 0.4})(draw_tokens)
register("tis_loss", mask="mask", naive=weighted(lambda r, a: r.clamp(max=1)))(draw_tokens)
register("topr_loss", mask="mask", naive=weighted(lambda r, a: torch.where(a >= 0, 1, r.clamp(max=1))))(draw_tokens)
register("vespo_loss", mask="mask", naive=naive_vespo)(draw_tokens)
register("vespo_loss", mask="mask", label="token weights", naive=naive_vespo)(draw_with_rollout_weights(None))
register("vespo_loss", mask="mask", label="sequence weights", naive=naive_vespo)(draw_with_rollout_weights(1))

# The covariances are those of the batch: its means enter into every one.
COVARIANCES = ("covariance_mean", "covariance_selected")
SELECTION = (*COVARIANCES, "selected_fraction")
# All candidates leave, so that the draw makes no difference.
register("clip_cov_loss", mask="mask", of_whole=SELECTION, options={"select_ratio": 1.0, "clip_low": 0.2, "clip_high": 0.2})(draw_spread)
register("clip_cov_loss", mask="mask", label="paper", of_whole=SELECTION, options={"select_ratio": 1.0, "preset": "paper"})(draw_spread)
register("clip_cov_loss", mask="mask", label="selected", of_whole=COVARIANCES)(draw_selected)
keep_value = {"keep_value": True, "preset": "paper"}
register("clip_cov_loss", mask="mask", label="keep_value", of_whole=COVARIANCES, options=keep_value, naive=naive_keep_value)(draw_selected)
register("kl_cov_loss", mask="mask", of_whole=SELECTION, options={"select_ratio": 0.3})(draw_tokens)
register("kl_cov_loss", mask="mask", label="verl", of_whole=SELECTION, options={"preset": "verl"})(draw_tokens)
register("kl_cov_loss", mask="mask", label="selected", of_whole=COVARIANCES)(draw_selected)
RAREST = ("selected_fraction", "proxy_kl")  # of the batch
register("lp_reg_loss", mask="mask", of_whole=RAREST, options={"rho": 0.7})(draw_with_proxy)
positive = {"rho": 0.7, "rho_positive": 0.7, "kl_clamp": None, "kl_kind": "k2"}
register("lp_reg_loss", mask="mask", label="positive", of_whole=RAREST, options=positive)(draw_with_proxy)
register("lp_reg_loss", mask="mask", label="full", of_whole=RAREST, options={"rho": 0.5, "kl_term": "full"}, naive=naive_full)(draw_with_kept_logmass)
