"""Losses: plain [B, T] arithmetic on what the primitives of `rlkern.ops` return."""

from .aggregate import aggregate
from .cispo import cispo_loss
from .clip_cov import clip_cov_loss
from .differential import did_entropy, displacement_metrics, log_ratio_rewards, token_did_entropy
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
    "DPOOutput",
    "EntropyHistory",
    "LossOutput",
    "aggregate",
    "bradley_terry_loss",
    "cispo_loss",
    "clip_cov_loss",
    "did_entropy",
    "displacement_metrics",
    "dpo_loss",
    "dpo_loss_from_logits",
    "epo_beta",
    "epo_loss",
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
    "spherical_z_loss",
    "tis_loss",
    "token_did_entropy",
    "topk_reverse_kl",
    "topr_loss",
    "vespo_loss",
]
