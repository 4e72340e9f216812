"""Cases of the loss battery: losses for masked diffusion language models, beside BGPO."""

from cases_policy import draw_tokens, draw_with_reference
from loss_battery import Draw, a_sequence, drawing, register

DRAWS = 3
ELBOS = ("chosen_elbo", "rejected_elbo", "ref_chosen_elbo", "ref_rejected_elbo")
draw_pairs = drawing(*ELBOS[:2], **dict.fromkeys(ELBOS, lambda g, batch, length: g.normal(batch, DRAWS, mean=-8, std=3)))
draw_weighted_pairs = drawing(base=draw_pairs, mc_weight=lambda g, batch, length: g.uniform(DRAWS))
draw_responses = drawing("logp", logp=Draw.logp, advantages=a_sequence(Draw.normal), mask=Draw.mask)


def draw_penalised(g, batch, length):
    inputs, wrt = draw_with_reference(g, batch, length)
    return {name: x for name, x in inputs.items() if name not in ("kl_scale", "weights")}, wrt


def draw_guesses(g, batch, length):
    """Draws that mask half of the tokens each, weights as if by chance, advantages of both signs and 0."""
    advantages = g.normal(batch)
    advantages[:1] = 0
    inputs = {"logp": g.logp(batch, DRAWS, length), "advantages": advantages, "draw_mask": g.uniform(batch, DRAWS, length) < 0.5}
    return inputs | {"weight": g.uniform(batch, DRAWS, low=1, high=5), "mask": g.mask(batch, length)}, ("logp",)


def draw_elbos(g, batch, length):
    elbo, lengths = g.normal(batch, DRAWS, mean=-8, std=2), g.integers(1, length + 1, batch)
    old = elbo + g.normal(batch, DRAWS, std=1)
    return {"elbo": elbo, "old_elbo": old, "advantages": g.normal(batch), "lengths": lengths}, ("elbo",)


def draw_penalised_elbos(g, batch, length):
    inputs, wrt = draw_elbos(g, batch, length)
    return inputs | {"ref_elbo": inputs["elbo"].flip(0) + 0.5, "mc_weight": g.uniform(batch, DRAWS)}, wrt


draw_coupled = drawing(
    "full_logp", "pair_logp",
    full_logp=Draw.logp,
    pair_logp=lambda g, batch, length: g.logp(batch, 2, length),
    pair_mask=lambda g, batch, length: g.uniform(batch, 2, length) < 0.5,
    weight=lambda g, batch, length: g.uniform(batch, 2, low=1, high=5),
)  # fmt: skip


def no_length(inputs):
    return inputs | {"lengths": inputs["lengths"] * 0}


register("vrpo_loss")(draw_pairs)
register("vrpo_loss", label="weighted", options={"beta": 0.3})(draw_weighted_pairs)
register("diffu_grpo_loss", mask="mask", options={"clip_low": 0.2, "clip_high": 0.2})(draw_tokens)
register("unigrpo_loss", mask="mask", options={"kl_coef": 0.3})(draw_penalised)
register("coupled_logp")(draw_coupled)
register("wd1_loss", mask="mask", options={"psi": 0.7, "group_size": 2})(draw_responses)
register("spg_loss", mask="mask", counted=lambda inputs: inputs["draw_mask"] & inputs["mask"].unsqueeze(1))(draw_guesses)
register("espo_loss", empty=no_length)(draw_elbos)
register("espo_loss", label="kl", options={"kl_coef": 0.2}, empty=no_length)(draw_penalised_elbos)
