"""verl's distillation over the teacher's top-K ids, with losses that verl lacks.

    from rlkern.integrations import verl_distillation

    verl_distillation.register()        # distillation.distillation_loss.loss_mode=rlkern_forward_kl_bucket
    verl_distillation.unregister()

verl checks the loss_mode in the driver too, so this must run there and in each worker: name a module that
does it in VERL_USE_EXTERNAL_MODULES. See docs/trainers/verl.md.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..checks import check_fraction
from ..primitives.token_stats import token_stats
from ..primitives.topk import topk_divergence
from .patching import Patch
from .registry import check_offered
from .verl import PREFIX, SUPPORTED_VERSIONS
from .versions import Releases

__all__ = ["LOSSES", "register", "unregister"]

LOSSES = {  # kind and tail of `topk_divergence`
    "forward_kl_topk": ("forward_kl", "none"),
    "forward_kl_bucket": ("forward_kl", "bucket"),
    "reverse_kl_bucket": ("reverse_kl", "bucket"),
    "mixed_kl_bucket": ("mixed_kl", "bucket"),
    "jsd_bucket": ("jsd", "bucket"),
}
_RELEASES = Releases("verl", lambda: import_module("verl").__version__, __name__, SUPPORTED_VERSIONS, "rlkern[verl]")
_standing: list[Patch] = []  # at most one


def _topk_loss(
    student_logits: Tensor, ids: Tensor, teacher_logp: Tensor, kind: str, tail: str, beta: float, min_logp: float | None
) -> dict[str, Tensor]:
    """What verl's compute_forward_kl_topk returns, of logits [B, S, V], ids and teacher_logp [B, S, K]."""
    bucket = tail == "bucket"
    stats = token_stats(student_logits, ids, with_entropy=False, with_tail=bucket)
    losses = topk_divergence(stats.logp, teacher_logp, kind=kind, beta=beta, tail=tail, tail_logmass=stats.tail_logmass, min_logp=min_logp)
    with torch.no_grad():
        l, m = ((x if min_logp is None else x.clamp_min(min_logp)).float() for x in (stats.logp, teacher_logp))  # noqa: E741
        # An id is among the student's K if its logit is no less than the K-th largest.
        least = student_logits.topk(ids.shape[-1], dim=-1).values[..., -1:]
        overlap = student_logits.gather(-1, ids) >= least
        count = overlap.sum(-1)
        advantage = torch.where(overlap, m.exp() * (l - m), 0).sum(-1) / count.clamp_min(1)
        masses = stats.logp.exp().sum(-1), teacher_logp.exp().sum(-1)
    return {
        "distillation_losses": losses,
        "student_mass": masses[0],
        "teacher_mass": masses[1],
        "overlap_count": count,
        "overlap_token_advantage": advantage,
    }


def _compute(stock: Any, beta: float) -> Any:
    """verl's function of logits, which all top-K losses go through, with ours beside verl's own."""

    def compute_forward_kl_topk(
        student_logits: Tensor, teacher_topk_log_probs: Tensor, teacher_topk_ids: Tensor, config: Any, data_format: str
    ) -> dict[str, Tensor]:
        from verl.utils.ulysses import get_ulysses_sequence_parallel_world_size, slice_input_tensor

        own = config.distillation_loss
        if not own.loss_mode.startswith(PREFIX):
            return stock(student_logits, teacher_topk_log_probs, teacher_topk_ids, config, data_format)
        logp, ids = (x.values().unsqueeze(0) for x in (teacher_topk_log_probs, teacher_topk_ids))  # packed, as verl's logits
        if get_ulysses_sequence_parallel_world_size() > 1:
            logp, ids = (slice_input_tensor(x, dim=1) for x in (logp, ids))
        kind, tail = LOSSES[own.loss_mode.removeprefix(PREFIX)]
        return _topk_loss(student_logits, ids, logp, kind, tail, beta, own.log_prob_min_clamp)

    return compute_forward_kl_topk


def register(*names: str, beta: float = 0.5) -> tuple[str, ...]:
    """Puts top-K losses into verl's registry of distillation losses, as "rlkern_" and the name.

    "forward_kl_topk" is verl's own, in float32 whatever the dtype of the logits. The others count the ids
    outside of the top K as one more class ("bucket"). Their sums are no less than 0, where verl has to clamp
    negative ones away, and with them their gradient. They read verl's topk, loss_max_clamp and
    log_prob_min_clamp, report verl's metrics, and need the FSDP engine (or VeOmni's). verl's own names do not
    change, and `unregister` takes everything back. Registering again replaces.

    Args:
        names: some of `LOSSES`; none stands for all of them.
        beta: that of "mixed_kl" (the weight of the forward KL, in [0, 1]) and "jsd" (in (0, 1)).

    Returns:
        The names that verl now knows.

    Raises:
        ImportError: verl is not there, or not one of SUPPORTED_VERSIONS.
        TypeError, ValueError: names that do not exist, or another beta. Nothing is registered then.
    """
    _RELEASES.check()
    from verl.trainer.distillation import losses
    from verl.trainer.distillation.fsdp import losses as fsdp

    for name in names:
        check_offered("distillation loss", name, LOSSES, "verl")
    check_fraction("beta", beta)
    if beta in (0, 1) and "jsd_bucket" in (names or LOSSES):
        raise ValueError(f"beta of 'jsd_bucket' must be in (0, 1), got {beta}: its ends are 'forward_kl_bucket' and 'reverse_kl_bucket'")
    unregister()
    made = tuple(f"{PREFIX}{name}" for name in names or LOSSES)
    settings = losses.DistillationLossSettings(names=list(made), use_topk=True)
    losses.register_distillation_loss(settings)(losses.compute_forward_kl_topk)  # makes metrics of what the logits gave
    _standing.append(Patch([(fsdp, "compute_forward_kl_topk", _compute(fsdp.compute_forward_kl_topk, beta))]))
    return made


def unregister() -> None:
    """Takes all of rlkern's losses out of verl's registry of distillation losses."""
    _RELEASES.check()
    from verl.trainer.distillation import losses

    for name in LOSSES:
        losses.DISTILLATION_LOSS_REGISTRY.pop(f"{PREFIX}{name}", None)
        losses.DISTILLATION_SETTINGS_REGISTRY.pop(f"{PREFIX}{name}", None)
    while _standing:
        _standing.pop().undo()
