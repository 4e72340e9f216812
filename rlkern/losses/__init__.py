"""Losses by family, and what goes with one of them: schedules, histories, masks."""

from .aggregate import LossOutput, aggregate
from .distillation.kdrl import kd_coefficient as kd_coefficient
from .distillation.kdrl import kdrl_loss
from .distillation.kdrl import reward_guided_mask as reward_guided_mask
from .fused import FusedOutput, linear_fused_loss
from .log_ratio_sums import log_ratio_sums
from .policy.cispo import cispo_loss
from .policy.clip_cov import clip_cov_loss
from .policy.epo import EntropyHistory as EntropyHistory
from .policy.epo import epo_beta as epo_beta
from .policy.epo import epo_loss
from .policy.gmpo import gmpo_loss
from .policy.grpo import grpo_loss
from .policy.gspo import gspo_loss
from .policy.kl_cov import kl_cov_loss
from .policy.lp_reg import lp_reg_loss
from .policy.nft import nft_loss
from .policy.nlpo import nlpo_loss
from .policy.ppo import ppo_loss
from .policy.reinforce import reinforce_loss, tis_loss, topr_loss
from .policy.sapo import sapo_loss
from .policy.vespo import vespo_loss
from .preference.dpo import DPOOutput, dpo_loss
from .preference.dpo_from_logits import dpo_loss_from_logits
from .preference.kto import KTOOutput, kto_baseline, kto_loss, kto_loss_from_logits
from .preference.nash import nash_md_loss, nash_mp_loss
from .preference.reference_free import cpo_loss, orpo_loss, simpo_loss
from .reward.polar import bradley_terry_loss, polar_finetune_loss, polar_pretrain_loss
from .rollout_weights import RolloutWeights, off_policy_mask, rollout_weights
from .sequence_weights import batch_count, sequence_weights
from .z_loss import lse_penalty, spherical_z_loss

__all__ = [  # the flat names of rlkern
    "DPOOutput",
    "FusedOutput",
    "KTOOutput",
    "LossOutput",
    "RolloutWeights",
    "aggregate",
    "batch_count",
    "bradley_terry_loss",
    "cispo_loss",
    "clip_cov_loss",
    "cpo_loss",
    "dpo_loss",
    "dpo_loss_from_logits",
    "epo_loss",
    "gmpo_loss",
    "grpo_loss",
    "gspo_loss",
    "kdrl_loss",
    "kl_cov_loss",
    "kto_baseline",
    "kto_loss",
    "kto_loss_from_logits",
    "linear_fused_loss",
    "log_ratio_sums",
    "lp_reg_loss",
    "lse_penalty",
    "nash_md_loss",
    "nash_mp_loss",
    "nft_loss",
    "nlpo_loss",
    "off_policy_mask",
    "orpo_loss",
    "polar_finetune_loss",
    "polar_pretrain_loss",
    "ppo_loss",
    "reinforce_loss",
    "rollout_weights",
    "sapo_loss",
    "sequence_weights",
    "simpo_loss",
    "spherical_z_loss",
    "tis_loss",
    "topr_loss",
    "vespo_loss",
]
