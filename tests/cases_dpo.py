"""Cases of the loss battery: the DPO family, KTO, sequence log-probabilities, aggregation."""

import torch
import torch.nn.functional as F
from loss_battery import Draw, a_sequence, drawing, register

import rlkern
from rlkern.losses.aggregate import MODES
from rlkern.losses.preference.dpo_types import F_DIVERGENCES, PAIR_LOSSES
from rlkern.primitives.sequence import next_tokens

VOCAB = 7
POLICY = ("policy_chosen_logps", "policy_rejected_logps")
REFERENCE = ("reference_chosen_logps", "reference_rejected_logps")


draw_pairs = drawing(
    *POLICY,
    **dict.fromkeys(POLICY + REFERENCE, a_sequence(Draw.normal, mean=-8, std=3)),
    chosen_lengths=lambda g, batch, length: g.integers(0, 9, batch),
    rejected_lengths=lambda g, batch, length: g.integers(1, 9, batch),
)


def without(draw, *names):
    """Draws the same without these inputs."""

    def fewer(*shape):
        inputs, wrt = draw(*shape)
        return {name: x for name, x in inputs.items() if name not in names}, wrt

    return fewer


draw_weighted_pairs = drawing(base=draw_pairs, weights=a_sequence(Draw.uniform))
for name, loss in PAIR_LOSSES.items():
    smoothing = {"label_smoothing": 0.1} if "label_smoothing" in loss.uses else {}
    options = {"loss_type": name, **smoothing, **(dict.fromkeys(REFERENCE) if loss.reward else {})}
    register("dpo_loss", label=name, options=options)(without(draw_pairs, *REFERENCE) if loss.reward else draw_pairs)
for f in F_DIVERGENCES:
    register("dpo_loss", label=f, options={"f_divergence": f})(draw_pairs)
register("dpo_loss", label="mixed", options={"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.0)})(draw_weighted_pairs)
register("dpo_loss", label="reference_free", options={"reference_free": True})(draw_pairs)
lengths = {name: lambda g, batch, length: g.integers(0, 9, batch) for name in ("chosen_lengths", "rejected_lengths")}
draw_free_pairs = drawing(*POLICY, **dict.fromkeys(POLICY, a_sequence(Draw.uniform, low=-12, high=-1)), **lengths, weights=a_sequence(Draw.uniform))
register("simpo_loss", options={"gamma": 0.7, "label_smoothing": 0.1, "nll_coef": 0.3})(draw_free_pairs)
register("orpo_loss")(draw_free_pairs)
register("cpo_loss", options={"nll": "sequence"})(without(draw_free_pairs, "rejected_lengths"))
draw_responses = drawing(
    "policy_logps",
    **dict.fromkeys(("policy_logps", "reference_logps"), a_sequence(Draw.normal, mean=-8, std=3)),
    desirable=lambda g, batch, length: g.integers(0, 2, batch),
    weights=a_sequence(Draw.uniform),
)


def draw_kl(g, batch, length):
    return g.uniform(1).squeeze(0)


register("kto_loss", options={"desirable_weight": 1.3})(drawing(base=draw_responses, kl=draw_kl))
register("kto_loss", label="apo", options={"loss_type": "apo_zero_unpaired"})(draw_responses)


def draw_labels(g, batch, length):
    labels = g.integers(0, VOCAB, batch, length)
    labels[:, :1] = -100  # the prompt
    return labels.masked_fill(~g.mask(batch, length), -100)


draw_logits = drawing("logits", logits=lambda g, *shape: g.normal(*shape, VOCAB, std=2), labels=draw_labels)


def pairs(draw):
    return lambda g, batch, length: draw(g, 2 * batch, length)


draw_logit_pairs = pairs(drawing(base=draw_logits, reference_logps=a_sequence(Draw.logp)))


def naive_wpo(logits, labels, reference_logps):
    log_p = logits[:, :-1].log_softmax(-1)
    labels = labels[:, 1:]
    logp = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    n = len(labels) // 2
    ratio = torch.stack([row[keep].sum() for row, keep in zip(logp, labels >= 0, strict=True)]) - reference_logps
    surplus = (logp - log_p.exp().square().sum(-1).log()).detach()
    means = torch.stack([row[keep].mean() if keep.any() else row.sum() * 0 for row, keep in zip(surplus, labels >= 0, strict=True)])
    weights = (means[:n] + means[n:]).exp().clamp(max=1)
    return (-(0.1 * (ratio[:n] - ratio[n:])).sigmoid().log() * weights).sum()


fields = {
    "empty": lambda inputs: inputs | {"labels": inputs["labels"].clone().fill_(-100)},
    "counted": lambda inputs: next_tokens(inputs["labels"]) != -100,
}
register("sequence_logps", **fields)(draw_logits)
register("sequence_logps", label="average", options={"average": True}, **fields)(draw_logits)
fields["zero_when_empty"] = False  # -log sigmoid(0) a pair
register("dpo_loss_from_logits", **fields)(draw_logit_pairs)
mixed = {"loss_type": ("sigmoid_norm", "sft"), "label_smoothing": 0.0, "temperature": 0.7}
register("dpo_loss_from_logits", label="mixed", options=mixed, **fields)(draw_logit_pairs)
register("dpo_loss_from_logits", label="wpo", options={"use_weighting": True, "max_weight": 1.0}, naive=naive_wpo, **fields)(draw_logit_pairs)
ld = {"ld_alpha": 0.3, "loss_type": ("sigmoid", "ipo_norm")}
register("dpo_loss_from_logits", label="ld", options=ld, **fields)(pairs(drawing(base=draw_logits, reference_logps=Draw.logp)))
with_sft = {"loss_type": ("orpo", "sft"), "reference_logps": None}
draw_with_sft = drawing(base=without(draw_logit_pairs, "reference_logps"), sft_labels=lambda g, *shape: torch.full((2 * shape[0], shape[1]), -100))
register("dpo_loss_from_logits", label="orpo", options=with_sft, **fields)(draw_with_sft)
draw_kto = drawing(base=draw_logits, reference_logps=Draw.logp, desirable=lambda g, batch, length: g.integers(0, 2, batch), kl=draw_kl)
register("kto_loss_from_logits", **fields)(draw_kto)


def packed_rows(function):
    """A function of packed rows, from the lengths of their sequences."""
    return lambda lengths, logits, **inputs: function(
        logits, packed=rlkern.packed(F.pad(lengths.cumsum(0), (1, 0)), num_tokens=len(logits)), **inputs
    )


def draw_packed_pairs(g, batch, length):
    """2 batch sequences of up to `length` tokens, and two tokens of padding."""
    lengths = g.integers(0, length + 1, 2 * batch)
    count = int(lengths.sum()) + 2
    labels = g.integers(0, VOCAB, count).masked_fill(g.uniform(count) < 0.3, -100)
    return {"lengths": lengths, "logits": g.normal(count, VOCAB, std=2), "labels": labels, "reference_logps": g.logp(2 * batch)}, ("logits",)


register("dpo_loss_from_logits", label="packed", function=packed_rows(rlkern.dpo_loss_from_logits))(draw_packed_pairs)
register("sequence_logps", label="packed", function=packed_rows(rlkern.sequence_logps))(without(draw_packed_pairs, "reference_logps"))

draw_values = drawing("values", values=Draw.normal, mask=Draw.mask)
for mode in MODES:
    register("aggregate", label=mode, options={"mode": mode}, mask="mask")(draw_values)
register("aggregate", label="normalizer", options={"mode": "token-mean", "normalizer": 17.5}, mask="mask")(draw_values)
