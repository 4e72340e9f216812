"""Losses: plain [B, T] arithmetic on what the primitives of `rlkern.ops` return."""

from .aggregate import aggregate
from .bgpo import BGPOOutput, BGPOStats, bgpo_loss, elbo_coeff
from .bgpo_accumulator import BGPOAccumulator
from .cispo import cispo_loss
from .clip_cov import clip_cov_loss
from .differential import did_entropy, displacement_metrics, log_ratio_rewards, token_did_entropy
from .diffusion import coupled_logp, diffu_grpo_loss, espo_loss, spg_loss, unigrpo_loss, vrpo_loss, wd1_loss
from .dpo import DPOOutput, dpo_loss, dpo_loss_from_logits
from .epo import EntropyHistory, epo_beta, epo_loss
from .gmpo import gmpo_loss
from .grpo import grpo_loss
from .gspo import gspo_loss
from .kdrl import kd_coefficient, kdrl_loss, reward_guided_mask, topk_reverse_kl
from .kl import kl_estimate
from .kl_cov import kl_cov_loss
from .lp_reg import lp_reg_loss
from .nash import nash_md_loss, nash_mp_loss
from .nft import nft_loss
from .nlpo import nlpo_keep_set, nlpo_loss, nlpo_stats
from .polar import bradley_terry_loss, polar_finetune_loss, polar_pretrain_loss
from .policy import LossOutput
from .ppo import ppo_loss
from .reinforce import reinforce_loss, tis_loss, topr_loss
from .sapo import sapo_loss
from .sequence import next_tokens, sequence_logps
from .vespo import vespo_loss
from .z_loss import lse_penalty, spherical_z_loss

__all__ = [
    "BGPOAccumulator",
    "BGPOOutput",
    "BGPOStats",
    "DPOOutput",
    "EntropyHistory",
    "LossOutput",
    "aggregate",
    "bgpo_loss",
    "bradley_terry_loss",
    "cispo_loss",
    "clip_cov_loss",
    "coupled_logp",
    "did_entropy",
    "diffu_grpo_loss",
    "displacement_metrics",
    "dpo_loss",
    "dpo_loss_from_logits",
    "elbo_coeff",
    "epo_beta",
    "epo_loss",
    "espo_loss",
    "gmpo_loss",
    "grpo_loss",
    "gspo_loss",
    "kd_coefficient",
    "kdrl_loss",
    "kl_cov_loss",
    "kl_estimate",
    "log_ratio_rewards",
    "lp_reg_loss",
    "lse_penalty",
    "nash_md_loss",
    "nash_mp_loss",
    "next_tokens",
    "nft_loss",
    "nlpo_keep_set",
    "nlpo_loss",
    "nlpo_stats",
    "polar_finetune_loss",
    "polar_pretrain_loss",
    "ppo_loss",
    "reinforce_loss",
    "reward_guided_mask",
    "sapo_loss",
    "sequence_logps",
    "spg_loss",
    "spherical_z_loss",
    "tis_loss",
    "token_did_entropy",
    "topk_reverse_kl",
    "topr_loss",
    "unigrpo_loss",
    "vespo_loss",
    "vrpo_loss",
    "wd1_loss",
]
