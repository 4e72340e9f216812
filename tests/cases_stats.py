"""Cases of the loss battery: estimates, metrics, and what a trainer prepares for a loss."""

import torch
from loss_battery import Draw, a_sequence, drawing, register

import rlkern

VOCAB, SAMPLES = 7, 5


def draw_two(g, batch, length):
    logp = g.logp(batch, length)
    return {"logp": logp, "reference_logp": logp + g.normal(batch, length, std=0.3)}, ("logp",)


def naive_straight_through(logp, reference_logp):
    return (0.5 * (logp - reference_logp) ** 2).sum()


register("kl_estimate")(draw_two)
register("kl_estimate", label="k3+", options={"kind": "k3+", "clamp": 0.05}, naive=naive_straight_through)(draw_two)


def draw_samples(*names):
    return drawing(**dict.fromkeys(names, lambda g, batch, length: g.normal(batch, SAMPLES, mean=-8)))


PAIRS = ("policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps", "reference_rejected_logps")
register("log_ratio_rewards", options={"beta": 0.3})(draw_samples("logps", "reference_logps"))
register("did_entropy")(draw_samples("logps", "reference_logps", "proposal_logps"))
register("displacement_metrics")(drawing(**dict.fromkeys(PAIRS, a_sequence(Draw.normal, mean=-8))))


def draw_elbos(g, batch, length):
    """Ratios on both sides of every bound, advantages of both signs and 0."""
    elbo, advantages = g.normal(batch, mean=-8, std=3), g.normal(batch)
    advantages[2:3] = 0
    inputs = {"elbo": elbo, "old_elbo": elbo + g.normal(batch, std=2), "advantages": advantages, "ref_elbo": elbo + g.normal(batch)}
    return inputs | {"ratio_scale": g.uniform(batch, low=0.1, high=0.3)}, ()


register("elbo_coeff", options={"clip": (0.2, 0.3), "dual_clip": 3.0, "kl_coef": 0.1, "kl": "k3"})(draw_elbos)


def draw_kept(g, batch, length):
    targets = g.integers(0, VOCAB, batch, length)
    keep = (g.uniform(batch, length, VOCAB) < 0.5) | torch.nn.functional.one_hot(targets, VOCAB).bool()
    return {"logits": g.normal(batch, length, VOCAB, std=2), "targets": targets, "keep": keep, "mask": g.mask(batch, length)}, ("logits",)


def one_of_stats(field, **options):
    """All three carry gradients: each is the loss of a case of its own."""
    return lambda **inputs: getattr(rlkern.nlpo_stats(**inputs, **options), field)


register("nlpo_stats", function=one_of_stats("logp", temperature=0.7), mask="mask")(draw_kept)
register("nlpo_stats", label="kept_logmass", function=one_of_stats("kept_logmass"), adds_gradients=True, mask="mask")(draw_kept)
register("nlpo_stats", label="released", function=one_of_stats("entropy", renorm=False), adds_gradients=True, mask="mask")(draw_kept)


draw_correct = drawing(correct=lambda g, batch, length: (g.uniform(batch) < 0.5).double())
register("reward_guided_mask")(draw_correct)
register("reward_guided_mask", label="group", options={"groups": 2, "level": "group"})(draw_correct)
register("next_tokens")(drawing(labels=lambda g, *shape: g.integers(0, VOCAB, *shape)))
