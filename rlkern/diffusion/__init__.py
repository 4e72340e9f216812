"""Masked diffusion language models: masks to draw, and losses on their estimates of the likelihood."""

from .accumulator import BGPOAccumulator
from .bgpo import BGPOOutput, BGPOStats, bgpo_loss, elbo_coeff
from .losses import coupled_logp, diffu_grpo_loss, espo_loss, spg_loss, unigrpo_loss, vrpo_loss, wd1_loss
from .masks import MaskDraws, bernoulli_masks, count_masks, quadrature_levels

__all__ = [
    "BGPOAccumulator",
    "BGPOOutput",
    "BGPOStats",
    "MaskDraws",
    "bernoulli_masks",
    "bgpo_loss",
    "count_masks",
    "coupled_logp",
    "diffu_grpo_loss",
    "elbo_coeff",
    "espo_loss",
    "quadrature_levels",
    "spg_loss",
    "unigrpo_loss",
    "vrpo_loss",
    "wd1_loss",
]
