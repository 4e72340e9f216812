"""Valid calls of every public function, one for every way to call it. test_errors_everywhere.py makes one
argument at a time wrong, fuzz/ varies them. Those of the losses are the cases of the battery."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import loss_battery as battery
import torch
from public import OFFERED, public
from torch.utils._pytree import tree_map_only

import rlkern
from rlkern import advantages
from rlkern.integrations import openrlhf, prime_rl, verl


@dataclass(frozen=True)
class Call:
    name: str
    function: Callable
    arguments: dict[str, Any]
    wrt: tuple[str, ...] = ()  # gradients flow into these

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(signature(self.function))

    def __call__(self, **changes):
        return self.function(**{**self.arguments, **changes})

    def __str__(self) -> str:
        return self.name


def signature(function: Callable) -> dict[str, inspect.Parameter]:
    """Its parameters; for **options those of the function that takes them."""
    taken = {rlkern.token_logprobs: rlkern.token_stats, accumulator: rlkern.BGPOAccumulator, rlkern.gkd_divergence: rlkern.token_divergence}
    taken |= dict.fromkeys((rlkern.polar_pretrain_loss, rlkern.polar_finetune_loss), rlkern.bradley_terry_loss)
    parameters = dict(inspect.signature(function).parameters)
    if parameters.pop("options", None) is not None and function in taken:
        keywords = inspect.signature(taken[function]).parameters
        parameters |= {name: p for name, p in keywords.items() if function is accumulator or p.kind is p.KEYWORD_ONLY}
        if function is rlkern.gkd_divergence:
            del parameters["kind"]  # beta says it
    return parameters


def moved(value, device):
    """A copy with all tensors on `device`, those in dicts and lists too; without gradient."""
    return tree_map_only(torch.Tensor, lambda x: x.detach().clone().to(device), value)


def accumulator(logits, targets, mask, weight, old_token_logp=None, temperature=1.0, ignore_index=-100, inplace_backward=False, **options):
    """A BGPOAccumulator with one draw."""
    acc = rlkern.BGPOAccumulator(**options)
    rows = {"weight": weight, "mask": mask, "old_token_logp": old_token_logp, "temperature": temperature, "ignore_index": ignore_index}
    if acc.two_pass or (acc.mode == "exact" and old_token_logp is not None):
        for j in range(acc.num_mc):
            acc.observe(j, logits, targets, **rows)
    losses = [acc.loss(j, logits, targets, **rows, inplace_backward=inplace_backward) for j in range(acc.num_mc)]
    return sum(losses), acc.metrics(), acc.elbo


def history(entropy):
    past = rlkern.losses.EntropyHistory()
    past.update(entropy)
    return past.mean


def total_surprise(rows):
    return -rows.logp.sum()


def _others(batch: int, length: int, vocab: int, seed: int) -> list[Call]:
    g = torch.Generator().manual_seed(seed)
    B, T, V, K = batch, length, vocab, 3

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    def ids(*shape, n=V):
        return torch.randint(0, n, shape, generator=g)

    logits, targets, mask = normal(B, T, V), ids(B, T), torch.rand(B, T, generator=g) < 0.7
    keep = (logits > -1) | (torch.arange(V) == 0)
    per_row = 0.5 + torch.rand(B, T, generator=g)
    logp, entropies = -per_row, normal(B, T).abs()
    everything = {"mask": mask, "temperature": per_row, "ignore_index": -100, "with_sum_sq": True, "with_entropy": True, "inplace_backward": False}
    groups, rewards = ids(B, n=3), ids(B, n=5) / 4
    packed = {"logits": normal(B * T, V), "targets": ids(B * T), "weight": per_row.flatten(), "mask": mask.flatten()}
    packed |= {"seq_idx": ids(B * T, n=4).sort().values, "num_seqs": 5}
    pack = rlkern.packed(torch.tensor([0, 1, 1, max(B * T - 2, 1)]).clamp(max=B * T), mask)
    pairs = rlkern.packed(torch.tensor([0, 1, 1, 2, max(B * T - 2, 2)]).clamp(max=B * T), num_tokens=B * T)
    draw = {"logits": logits, "targets": targets, "mask": mask, "weight": per_row}
    sequence = {"advantages": normal(B), "seq_weight": 0.25, "num_mc": 1, "ratio_scale": torch.full((B,), 0.2), "clip": (0.2, 0.2), "dual_clip": 3.0}
    table = [
        (rlkern.token_stats, {"logits": logits, "targets": targets, "min_p": 0.1, **everything}, ("logits",)),
        (rlkern.token_stats, {"logits": logits, "targets": ids(B, T, K), "min_prob": 0.1, "mask": mask, "temperature": 0.7,
                              "logit_scale": 1.5, "softcap": 2.0}, ("logits",)),
        (rlkern.token_stats, {"logits": logits, "targets": targets, "keep": rlkern.Kept.ids(ids(B, T, K) - 1), "outside": "everything",
                              "with_full": True, "min_p": 0.1, "mask": mask, "temperature": per_row}, ("logits",)),
        (rlkern.token_stats, {"logits": logits, "targets": ids(B, T, K), "keep": keep, "outside": "minus_inf", "softcap": 2.0}, ("logits",)),
        (rlkern.token_logprobs, {"logits": logits, "targets": targets, "mask": mask}, ("logits",)),
        (rlkern.entropy_from_logits, {"logits": logits, "temperature": 0.7, "mask": mask, "softcap": 2.0}, ("logits",)),
        (rlkern.linear_token_stats, {"hidden": normal(B, T, 3), "weight": normal(V, 3), "targets": targets, "bias": normal(V),
                                     "chunk_rows": 5, "mask": mask, "logit_scale": 0.5, "softcap": 2.0}, ("hidden", "weight", "bias")),
        (rlkern.linear_token_stats, {"hidden": normal(B, T, 3), "weight": normal(V, 3), "targets": targets, "workspace": 4 * V * 4,
                                     "logits_dtype": torch.float32, "fixed_blocks": True,
                                     "lora": (normal(2, 3), normal(V, 2), 0.5)}, ("hidden", "weight")),
        (rlkern.linear_plan, {"rows": 100, "hidden_size": 64, "vocab": 1000, "dtype": torch.bfloat16, "needs": (True, True, False),
                              "workspace": 1 << 16, "device": "cuda", "logits_dtype": torch.float32}, ()),
        (rlkern.linear_token_stats, {"hidden": normal(B, T, 3), "weight": normal(V, 3), "targets": targets, "bias": normal(V), "mask": mask,
                                     "keep": rlkern.Kept.ids(ids(B, T, K) - 1), "outside": "everything", "max_dense_rows": B * T,
                                     "round_logits": False, "softcap": 2.0}, ("hidden", "weight", "bias")),
        *((function, {"hidden": normal(B, T, 3), "weight": normal(V, 3), "other_hidden": normal(B, T, 2), "other_weight": normal(V + 2, 2),
                      "other_bias": normal(V + 2), "kind": "jsd", "vocab": V, "chunk_rows": 5, "mask": mask, "other_grad": True, **more},
           ("hidden", "weight", "other_hidden", "other_weight", "other_bias"))
          for function, more in ((rlkern.linear_token_divergence, {}), (rlkern.linear_pair_stats, {"targets": targets, "temperature": per_row}))),
        (rlkern.linear_token_divergence, {"hidden": normal(B, T, 3), "weight": normal(V, 3), "other_hidden": normal(B, T, 3),
                                          "other_weight": normal(V, 3), "workspace": 5 * 2 * V * 4}, ("hidden", "weight")),
        (rlkern.linear_fused_loss, {"hidden": normal(B, T, 3), "weight": normal(V, 3), "targets": targets, "old_logp": logp,
                                    "advantages": normal(B), "mask": mask, "loss": "ppo", "bias": normal(V), "chunk_rows": 5,
                                    "reference_logp": logp, "kl_coef": 0.1}, ("hidden", "weight", "bias")),
        (rlkern.linear_fused_loss, {"hidden": normal(B, T, 3), "weight": normal(V, 3), "targets": targets, "loss": total_surprise,
                                    "workspace": 5 * V * 4, "logit_scale": 0.5, "softcap": 2.0}, ("hidden", "weight")),
        *((rlkern.token_divergence, {"logits": logits, "other": normal(B, T, V), "kind": kind, "temperature": 0.7, "mask": mask}, ("logits",))
          for kind in ("reverse_kl", "mixed_kl", "cross_entropy", "jsd", "alpha", "total_variation")),
        (rlkern.token_divergence, {"logits": logits, "other": normal(B, T, V + 2), "kind": "skew_forward_kl", "beta": 0.1, "vocab": V,
                                   "temperature": per_row, "other_temperature": 1.3, "other_grad": True}, ("logits", "other")),
        (rlkern.pair_stats, {"logits": logits, "other": normal(B, T, V), "targets": targets, "kind": "forward_kl", "mask": mask}, ("logits",)),
        (rlkern.pair_stats, {"logits": logits, "other": normal(B, T, V), "kind": "skew_reverse_kl", "temperature": 0.7}, ("logits",)),
        (rlkern.gkd_divergence, {"logits": logits, "other": normal(B, T, V), "beta": 0.5, "mask": mask}, ("logits",)),
        (rlkern.token_stats, {"logits": logits, "targets": ids(B, T, K), "with_tail": True}, ("logits",)),
        (rlkern.packed, {"cu_seqlens": torch.tensor([0, 2, 2, 5]), "mask": torch.ones(7), "seq_lens": torch.tensor([2, 0, 2]), "num_seqs": 3,
                         "num_tokens": 7}, ()),
        (rlkern.packed, {"lengths": [3, 0, 2], "num_tokens": 6, "full_lengths": torch.tensor([3, 4, 5])}, ()),
        (rlkern.packed, {"position_ids": torch.tensor([[0, 1, 0], [0, 1, 2]]), "mask": mask[:2, :3], "num_seqs": 4}, ()),
        (rlkern.packed, {"segment_ids": torch.tensor([[1, 1, 2, 0], [1, 2, 2, 2]]), "padding_id": 0}, ()),
        (rlkern.rollout_weights, {"train_logp": logp, "rollout_logp": logp - 0.1, "mask": mask, "preset": "icepop", "gates": {"seq_max_k2": 0.5},
                                  "groups": groups, "whole_groups": True, "normalize": True}, ()),
        (rlkern.off_policy_mask, {"logp": logp, "rollout_logp": logp - 0.1, "advantages": normal(B), "mask": mask, "threshold": 0.5}, ()),
        (rlkern.log_ratio_sums, {"logp": logp, "old_logp": logp + 0.1, "mask": mask, "of": "gmpo", "advantages": normal(B)}, ()),
        (rlkern.log_ratio_sums, {"logp": logp.flatten(), "old_logp": None, "mask": pack, "of": "vespo"}, ()),
        (rlkern.rollout_weights, {"train_logp": logp, "rollout_logp": logp + 0.1, "mask": mask, "preset": "icepop", "high": 4.0,
                                  "gates": {"seq_mean_k2": 1.0, "token_k1": (0.5, 2.0)}, "groups": groups, "whole_groups": True}, ()),
        (rlkern.rollout_weights, {"train_logp": logp.flatten(), "rollout_logp": logp.flatten() - 0.1, "mask": pack, "level": "sequence",
                                  "mode": "mask", "low": 0.5, "normalize": True}, ()),
        (rlkern.off_policy_mask, {"logp": logp, "rollout_logp": logp + 0.1, "advantages": normal(B), "mask": mask, "threshold": 0.05}, ()),
        (rlkern.next_tokens, {"labels": targets, "packed": pack}, ()),
        (rlkern.masked_elbo, packed, ("logits",)),
        (rlkern.masked_elbo, {"logits": packed["logits"], "targets": packed["targets"], "mask": pack, "weight": per_row[:3, 0]}, ("logits",)),
        (rlkern.masked_elbo, draw | {"weight": per_row[:, 0], "old_token_logp": logp}, ("logits",)),
        (rlkern.bgpo_loss, packed | {"advantages": normal(5), "mc_weight": 0.5, "preset": "paper"}, ("logits",)),
        (rlkern.bgpo_loss, draw | {"advantages": normal(B), "mc_weight": 0.5, "preset": "reference", "lengths": torch.full((B,), T),
                                   "response_width": T}, ("logits",)),
        (accumulator, draw | sequence | {"old_elbo": -8 + normal(B, 1), "ref_elbo": -8 + normal(B, 1), "kl_coef": 0.1}, ("logits",)),
        (accumulator, draw | sequence | {"mode": "exact", "old_elbo": -8 + normal(B, 1), "mc_weights": torch.ones(1)}, ("logits",)),
        (accumulator, draw | sequence | {"mode": "exact", "old_token_logp": logp}, ("logits",)),
        (rlkern.batch_count, {"mode": "seq-mean-token-sum", "lengths": [mask, mask[:1]]}, ()),
        (rlkern.sequence_weights, {"mode": "prompt-mean", "lengths": mask, "groups": groups, "num_groups": 3}, ()),
        (rlkern.sequence_weights, {"mode": "dr_grpo", "lengths": mask.sum(-1), "length": 6.0}, ()),
        (rlkern.token_covariance, {"logp": logp, "advantages": normal(B), "mask": mask}, ()),
        (rlkern.metrics.covariance_quantiles, {"covariance": normal(B, T), "mask": mask, "quantiles": (0.5, 1.0)}, ()),
        (rlkern.diffusion.count_masks, {"response_mask": mask, "num_mc": 4, "seed": 3, "complementary": True}, ()),
        (rlkern.diffusion.count_masks, {"response_mask": mask, "num_mc": 3, "seed": torch.tensor([3]), "draw": 1, "rollouts": torch.arange(B)}, ()),
        (rlkern.diffusion.bernoulli_masks, {"response_mask": mask, "num_mc": 4, "seed": 3, "low": 0.2, "high": 0.8, "complementary": True}, ()),
        (rlkern.diffusion.bernoulli_masks, {"response_mask": mask, "num_mc": 3, "seed": 3, "p": torch.tensor([0.2, 0.5, 1.0]), "draw": 2}, ()),
        (rlkern.diffusion.quadrature_levels, {"n": 3}, ()),
        (rlkern.use_backend, {"name": "auto"}, ()),
        (rlkern.reduce_metrics, {"parts": [{"tokens": torch.tensor(3.0), "entropy": torch.tensor(1.0)}] * 2}, ()),
        (history, {"entropy": torch.tensor(1.0)}, ()),
        (rlkern.losses.epo_beta, {"step": 3, "total_steps": 10, "gamma": 1.0, "schedule": "paper"}, ()),
        (rlkern.losses.epo_beta, {"step": 7, "total_steps": 10, "schedule": "released"}, ()),
        (rlkern.losses.kd_coefficient, {"step": 3}, ()),
        (rlkern.losses.reward_guided_mask, {"correct": rewards, "groups": groups, "level": "group"}, ()),
        (rlkern.kl_estimate, {"logp": logp, "reference_logp": logp + 0.1 * normal(B, T), "kind": "k3", "clamp": 10.0}, ("logp",)),
        (rlkern.sampler_threshold, {"logits": logits, "top_k": 3, "top_p": 0.9, "min_p": 0.05, "temperature": per_row, "order": "joint",
                                    "mask": mask}, ()),
        (rlkern.nlpo_keep_set, {"mask_logits": logits, "top_p": 0.9, "always_keep": ids(2)}, ()),
        (rlkern.nlpo_keep_set, {"mask_logits": logits, "top_k": 2, "min_tokens_to_keep": 2, "temperature": 0.7}, ()),
        *((rlkern.nlpo_stats, {"logits": logits, "targets": targets, "keep": keep, "renorm": renorm, "mask": mask}, ("logits",))
          for renorm in (True, False)),
        *((getattr(rlkern.selection, name), {"values": normal(B, T), "valid": mask, "count": 3}, ())
          for name in ("select_bottom", "select_top")),
        (rlkern.selection.select_random, {"valid": mask, "count": 10**6, "generator": None}, ()),
        (rlkern.selection.fraction_count, {"total": mask.sum(), "fraction": 0.5, "minimum": 1}, ()),
        (rlkern.sequence_logps, {"logits": logits, "labels": targets, "average": True, "temperature": per_row}, ("logits",)),
        (rlkern.sequence_logps, {"logits": logits, "labels": targets, "packed": pack}, ("logits",)),
        (rlkern.dpo_loss_from_logits, {"logits": logits, "labels": targets, "reference_logps": logp, "packed": pairs, "pairs": "interleaved",
                                       "ld_alpha": 0.3, "loss_type": ("sigmoid", "sft"), "sft_labels": targets}, ("logits",)),
        (rlkern.kto_loss_from_logits, {"logits": logits, "labels": targets, "reference_logps": logp, "desirable": torch.ones(4), "kl": 0.1,
                                       "weights": torch.ones(4), "packed": pairs}, ("logits",)),
        (rlkern.kto_baseline, {"policy_kl_logps": logp[:, 0], "reference_kl_logps": entropies[:, 0]}, ()),
        *((getattr(advantages, name), {"rewards": rewards, "groups": groups}, ())
          for name in ("grpo", "dr_grpo", "lite_ppo", "rloo", "gpg", "pass_at_k")),
        (advantages.grpo, {"rewards": rewards, "groups": 2, "scale": "batch", "singletons": "zero"}, ()),
        (advantages.opo, {"rewards": rewards, "lengths": ids(B), "groups": groups}, ()),
        (advantages.combine_rewards, {"rewards": normal(B, K), "weights": normal(K)}, ()),
        (advantages.gdpo, {"rewards": normal(B, K), "groups": groups, "weights": normal(K)}, ()),
        (advantages.overlong_penalty, {"lengths": ids(B), "max_length": 10, "buffer": 4, "factor": 1.0}, ()),
        (advantages.whiten, {"values": normal(B, T), "mask": mask}, ()),
        (advantages.reinforce_plus_plus, {"token_rewards": normal(B, T), "mask": mask, "gamma": 0.9}, ()),
        (advantages.reinforce_plus_plus_baseline, {"rewards": rewards, "groups": groups, "mask": mask}, ()),
        (advantages.remax, {"token_rewards": normal(B, T), "greedy_rewards": rewards, "mask": mask}, ()),
        (advantages.gae, {"token_rewards": normal(B, T), "values": normal(B, T), "mask": mask, "gamma": 0.9, "lam": 0.8}, ()),
        (advantages.otb, {"token_rewards": normal(B, T), "logp": logp, "sum_sq_prob": torch.rand(B, T, generator=g), "groups": groups,
                          "mask": mask, "importance_weights": entropies}, ()),
        (openrlhf.log_probs_from_logits, {"logits": logits, "labels": targets, "temperature": 0.7}, ("logits",)),
        (openrlhf.compute_entropy, {"logits": logits}, ("logits",)),
        (openrlhf.PolicyLoss, {"dual_clip": 3.0, "is_correction_level": "seq", "is_correction_threshold": (0.5, 2.0)}, ()),
        (prime_rl.selective_log_softmax, {"logits": logits, "index": targets}, ("logits",)),
        (prime_rl.selective_log_softmax_with_kept, {"logits": logits, "index": targets, "kept_tokens": ids(B, T, K)}, ("logits",)),
        (prime_rl.selective_log_softmax_with_sampling_mask, {"logits": logits, "index": targets, "sampling_mask": ids(B, T, K)}, ("logits",)),
        (prime_rl.compute_entropy, {"shifted_logits": logits}, ()),
        (prime_rl.check_loss, {"loss": "ppo"}, ()),
        (verl.logprobs_from_logits, {"logits": logits, "labels": targets}, ("logits",)),
        (verl.entropy_from_logits, {"logits": logits}, ("logits",)),
    ]  # fmt: skip
    names = {accumulator: "BGPOAccumulator", history: "EntropyHistory.update"} | {value: name for name, value in OFFERED.items()}
    return [Call(names.get(function, function.__name__), function, *rest) for function, *rest in table]


def _loss(case: battery.Case, batch: int, length: int, seed: int) -> Call:
    inputs, wrt = case.draw(battery.Draw(seed), batch, length)
    inputs = {name: x.float() if x.dtype == torch.float64 else x for name, x in inputs.items()}
    return Call(str(case), public(case.name), {**inputs, **case.options}, wrt)


def valid_calls(batch: int = 4, length: int = 6, vocab: int = 7, seed: int = 0) -> list[Call]:
    losses = [_loss(case, batch, length, seed) for case in battery.CASES if case.function is None]
    return losses + _others(batch, length, vocab, seed)


CALLS: list[Call] = valid_calls()
