"""Cases of the loss battery: diffusion BGPO and the ELBO below it."""

import torch
from loss_battery import drawing, register

import rlkern

VOCAB = 7


ROWS = {  # weights from 1 to 4
    "logits": lambda g, *shape: g.normal(*shape, VOCAB, std=2),
    "targets": lambda g, *shape: g.integers(0, VOCAB, *shape),
    "weight": lambda g, *shape: 1 + 3 * g.uniform(*shape),
}
draw_rows = drawing("logits", **ROWS, mask=lambda g, *shape: g.mask(*shape) & (g.uniform(*shape) < 0.7))


def elbo(logits, targets, weight, mask):
    logp = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return torch.where(mask, weight * logp, 0).sum(-1)


def draw_off_policy(g, batch, length):
    """Ratios on both sides of every bound, advantages of both signs and 0."""
    inputs, wrt = draw_rows(g, batch, length)
    near = elbo(**inputs)
    advantages = g.normal(batch)
    advantages[2:3] = 0
    return inputs | {"advantages": advantages, "old_elbo": near + g.normal(batch, std=2), "seq_weight": g.uniform(batch)}, wrt


def draw_everything(g, batch, length):
    inputs, wrt = draw_off_policy(g, batch, length)
    inputs |= {"ref_elbo": inputs["old_elbo"] + g.normal(batch), "ratio_scale": g.uniform(batch, low=0.1, high=0.3), "mc_weight": g.uniform(batch)}
    inputs["old_token_logp"] = g.logp(batch, length)
    inputs.pop("old_elbo")
    return inputs, wrt


def draw_on_policy(g, batch, length):
    inputs, wrt = draw_off_policy(g, batch, length)
    return {name: x for name, x in inputs.items() if name not in ("old_elbo", "seq_weight")}, wrt


def naive_on_policy(advantages, **rows):
    return -(advantages * elbo(**rows)).mean() / 4


def draw_packed(g, batch, length):
    """As many rows as a dense batch has positions, spread over three sequences; a fourth has none."""
    packed = {"mask": lambda g, n: g.uniform(n) < 0.7, "seq_idx": lambda g, n: g.integers(0, 3, n).sort().values}
    return {name: field(g, batch * length) for name, field in (ROWS | packed).items()}, ("logits",)


def packed_elbo(logits, targets, weight, mask, seq_idx):
    return rlkern.masked_elbo(logits, targets, weight, mask=mask, seq_idx=seq_idx, num_seqs=4, return_token_logp=True)


off_policy = {"mc_weight": 0.25, "ratio_scale": 0.2, "clip": (0.2, 0.3), "dual_clip": 3.0}
register("bgpo_loss", mask="mask", zero_when_empty=False, options=off_policy)(draw_off_policy)
register("bgpo_loss", label="k3", mask="mask", zero_when_empty=False, options={"clip": (0.2, 0.2), "kl": "k3", "kl_coef": 0.1})(draw_everything)
paper = {"mc_weight": 0.25, "preset": "paper"}
register("bgpo_loss", label="on-policy", mask="mask", zero_when_empty=False, options=paper, naive=naive_on_policy)(draw_on_policy)
register("masked_elbo", mask="mask", function=rlkern.masked_elbo, options={"temperature": 0.7, "return_token_logp": True})(draw_rows)
register("masked_elbo", label="packed", mask="mask", function=packed_elbo)(draw_packed)
