"""TRL's GRPOTrainer with the policy losses of rlkern."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from trl import GRPOConfig
from trl import GRPOTrainer as _GRPOTrainer

from ...losses import LossOutput
from ...metrics.merge import reduce_metrics
from ...primitives.packing import Rows
from ...primitives.row_stats import check_kept_mass
from ...primitives.token_stats import token_stats
from ..patching import Patch
from ..registry import REGISTRY, TOKENS, check_effect, check_offered, check_options, dry_run
from .versions import known_replacements

_COMPUTED = ("proxy_logp", "success_rate", "correct")  # what the trainer has beside TOKENS, where a loss needs it
POLICY_LOSSES = {name: loss.function for name, loss in REGISTRY.items() if set(loss.needs) <= set(_COMPUTED)}
_AGGREGATIONS = ("grpo", "bnpo", "dr_grpo", "dapo")  # of `aggregate`, under TRL's loss_type
# Arguments that the trainer gives, and so not options
_GIVEN = (*TOKENS, *_COMPUTED, "group", "capacity", "row_offset", "weights", "rollout_weights", "aggregation", "normalizer", "kept_logmass")
_MIN_P = 0.02  # Lp-Reg's paper
_FRACTIONS = {"clip_cov": {"select_ratio": 2e-4}, "kl_cov": {"select_ratio": 2e-3}, "lp_reg": {"rho": 0.01, "rho_positive": 0.0}}  # by default


class GRPOTrainer(_GRPOTrainer):
    """TRL's GRPOTrainer whose policy loss is one of rlkern's.

    All else is TRL's: the KL term, entropy bonus, auxiliary loss and metrics.

    Args:
        policy_loss: a name of `POLICY_LOSSES`. `args.loss_type` says how its token losses are averaged:
            "grpo", "bnpo", "dr_grpo" or "dapo".
        policy_loss_options: the loss's own keyword options; for "lp_reg" also min_p (0.02); for "gspo",
            "gmpo" and "sapo" also aggregation, one of the four names, which wins over `args.loss_type`.
        *args, **kwargs: TRL's.

    "gspo", "gmpo" and "sapo" are means over sequences by definition. They, and TRL's KL term with them, take
    "grpo" for the default "dapo". "lp_reg" needs each token's kept set, so it reads whole rows of logits,
    [batch, completion, V], once more than TRL's fused head does. Its proxy is the old policy's, or the
    current one's where TRL is on-policy. "nft" takes the rewards, in [0, 1], for the chance of being correct,
    and a group's mean for its success rate. The advantages go unused.

    vLLM's importance weights multiply the loss of each token, as in TRL. "gspo" multiplies a sequence's loss
    by the mean of its weights, as at TRL's sequence level. "vespo" takes them into the sequence's ratio, as
    TRL's. "gmpo" and "nft" refuse them.

    Metrics of the loss are logged as `"rlkern/<name>"`: those of all tokens of all micro-batches and
    processes since the last log (`reduce_metrics`).

    clip_cov, kl_cov and lp_reg select among the tokens of a process's micro-batch. With select_over="group"
    among their options they select among those of all processes' micro-batches that come at the same time,
    as one process would.

    Raises:
        UnknownTRLError: for a release of TRL that has not been tested.
        TypeError, ValueError: for an unknown loss, options that it does not take, or a GRPOConfig with an
            option that would have no effect on it.
        ValueError: in training with "nft", for a reward outside [0, 1].
    """

    def __init__(self, *args: Any, policy_loss: str, policy_loss_options: dict[str, Any] | None = None, **kwargs: Any) -> None:
        known_replacements()
        options = dict(policy_loss_options or {})
        self._rlkern_min_p = options.pop("min_p", _MIN_P) if policy_loss == "lp_reg" else None
        check_offered("policy_loss", policy_loss, POLICY_LOSSES, "TRL")
        aggregation = _own_aggregation(policy_loss, options)
        _check_loss(policy_loss, options, self._rlkern_min_p)
        config = inspect.signature(_GRPOTrainer.__init__).bind_partial(self, *args, **kwargs).arguments.get("args")
        if config is not None:
            _check_config(policy_loss, config, aggregation)
        self._rlkern_loss, self._rlkern_options = policy_loss, options
        self._rlkern_scored: list[dict[str, Tensor]] = []
        self._rlkern_rewards = torch.empty(0)  # of the last generation
        # since the last log, merged already
        self._rlkern_metrics: dict[str, list[dict[str, Tensor]]] = {"train": [], "eval": []}
        super().__init__(*args, **kwargs)
        if config is None:
            _check_config(policy_loss, self.args, aggregation)
        if aggregation is not None:
            self.loss_type = aggregation  # by which TRL averages what it adds to the policy loss
        self._rlkern_check_trainer()

    def _rlkern_check_trainer(self) -> None:
        if self._rlkern_loss != "lp_reg":
            return
        if self._is_vlm or self.aux_loss_enabled:
            what = "a vision-language model" if self._is_vlm else "a mixture of experts with an auxiliary loss"
            raise ValueError(f"policy_loss 'lp_reg' does not support {what}; use a text model, or router_aux_loss_coef=0 in GRPOConfig")
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        self._rlkern_keeps_logits = "logits_to_keep" in inspect.signature(base.forward).parameters
        if self._rlkern_options.get("kl_term") == "full" and self._rlkern_off_policy():
            raise ValueError(
                "policy_loss 'lp_reg' with kl_term='full' needs the kept set of the current policy, so steps_per_generation "
                "* num_iterations must divide gradient_accumulation_steps and vLLM's importance sampling correction must "
                "be off; or use kl_term='sampled'"
            )

    def _rlkern_off_policy(self) -> bool:
        """Whether TRL scores the completions with the old policy before it trains on them."""
        steps = self.args.steps_per_generation * self.num_iterations
        corrects = self.use_vllm and self.vllm_importance_sampling_correction
        return self.args.gradient_accumulation_steps % steps != 0 or corrects

    # --- what the losses need besides log-probabilities -----------------------------------------------------

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if self._rlkern_min_p is None or model is self.ref_model:
            result = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
            self._rlkern_scored.append({"logp": result[0]})
            return result
        stats = self._rlkern_full_rows(model, *args, **kwargs)
        self._rlkern_scored.append(stats)
        return stats["logp"], stats["entropy"], None

    def _rlkern_full_rows(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, batch_size: int | None = None, **_: Any
    ) -> dict[str, Tensor]:
        """logp, entropy, kept_logmass and proxy_logp [B, T] of the completion tokens."""
        parts, size = [], batch_size or len(input_ids)
        for ids, mask in zip(input_ids.split(size), attention_mask.split(size), strict=True):
            # one more than the completion's: the last row predicts what comes after it
            keep = {"logits_to_keep": logits_to_keep + 1} if self._rlkern_keeps_logits else {}
            with self.accelerator.autocast():
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **keep).logits
            rows, n = logits[:, -logits_to_keep - 1 : -1], logits_to_keep
            options = {"temperature": self.temperature, "min_p": self._rlkern_min_p}
            stats = token_stats(rows, ids[:, -n:], mask=mask[:, -n:], **options)
            parts.append((stats.logp, stats.entropy, stats.kept_logmass, stats.proxy_logp.detach()))
        names = ("logp", "entropy", "kept_logmass", "proxy_logp")
        return dict(zip(names, map(torch.cat, zip(*parts, strict=True)), strict=True))

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self._rlkern_rewards = super()._calculate_rewards(*args, **kwargs)
        return self._rlkern_rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._rlkern_scored.clear()
        output = super()._generate_and_score_completions(inputs)
        if self._rlkern_loss == "lp_reg" and "old_per_token_logps" in output:
            (old,) = (s for s in self._rlkern_scored if s["logp"] is output["old_per_token_logps"])
            output["rlkern_old_proxy_logp"] = old["proxy_logp"]
        if self._rlkern_loss == "nft":
            correct = self._rlkern_correctness()
            size = self.num_generations if self.model.training else self.num_generations_eval
            success_rate = correct.view(-1, size).nanmean(1).repeat_interleave(size)
            start = self.accelerator.process_index * len(inputs)
            mine = slice(start, start + len(inputs))
            output["rlkern_correct"], output["rlkern_success_rate"] = correct[mine], success_rate[mine]
        self._rlkern_scored.clear()
        return output

    def _rlkern_correctness(self) -> Tensor:
        """The weighted sum of the rewards of all processes' completions; NaN where there is none."""
        rewards = self._rlkern_rewards
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        if ((total < 0) | (total > 1)).any():
            raise ValueError(
                "policy_loss 'nft' takes the reward for the chance of being correct, in [0, 1], got "
                f"{total.min().item():g} to {total.max().item():g}: let the reward functions return 0 or 1, or set "
                "reward_weights in GRPOConfig"
            )
        return total.masked_fill(rewards.isnan().all(1), torch.nan)

    # --- the loss -------------------------------------------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        mode = "train" if self.model.training else "eval"
        metrics = self._metrics[mode]
        before = {key: len(values) for key, values in metrics.items()}
        # With no advantage TRL's own policy loss is 0 and has no gradient. What remains is what it adds.
        stock = inputs | {"advantages": torch.zeros_like(inputs["advantages"])}
        if self.beta == 0 or not self.args.use_bias_correction_kl:
            stock.pop("old_per_token_logps", None)  # a ratio that overflows times 0 would be NaN
        if "importance_sampling_ratio" in stock:
            stock["importance_sampling_ratio"] = torch.ones_like(stock["importance_sampling_ratio"])  # for the same reason
        self._rlkern_scored.clear()
        # TRL's KL term is then times the ratio of the sequence
        level = [(self, "importance_sampling_level", "sequence")] if self._rlkern_loss == "gspo" else []
        with Patch(level):
            loss = super()._compute_loss(model, stock)
        (scored,) = self._rlkern_scored
        self._rlkern_scored.clear()

        policy_loss, extra = self._rlkern_policy_loss(scored, inputs, mode)
        for key in [key for key in metrics if key.startswith("clip_ratio/")]:
            del metrics[key][before.get(key, 0) :]  # those of the loss that was not used
            if not metrics[key]:
                del metrics[key]
        self._rlkern_metrics[mode] = [reduce_metrics([*self._rlkern_metrics[mode], extra])]
        if self._entropy_bonus_enabled:  # then TRL logs it
            metrics["policy_loss"][-1] += self.accelerator.gather(policy_loss.detach()).nanmean().item()
        accumulates = self.loss_type != "dapo" and mode == "train"
        return loss + (policy_loss / self.current_gradient_accumulation_steps if accumulates else policy_loss)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """TRL's, which averages what was appended to a metric: one number, of all processes."""
        mode = "train" if self.model.training else "eval"
        parts, self._rlkern_metrics[mode] = self._rlkern_metrics[mode], []
        if parts:
            group = torch.distributed.group.WORLD if self.accelerator.num_processes > 1 else None
            merged = reduce_metrics(parts, group=group)
            values = dict(zip(merged, torch.stack(list(merged.values())).tolist(), strict=True))
            for name, value in values.items():
                self._metrics[mode][f"rlkern/{name}"].append(value)
            if "clip_fraction_low" in values:
                low, high = values["clip_fraction_low"], values["clip_fraction_high"]
                for name, value in (("low", low), ("high", high), ("region", low + high)):
                    self._metrics[mode][f"clip_ratio/{name}_mean"].append(value)
        super().log(logs, *args, **kwargs)

    def _rlkern_policy_loss(self, scored: dict[str, Tensor], inputs: dict[str, Any], mode: str) -> LossOutput:
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        given = scored | {"old_logp": inputs.get("old_per_token_logps"), "advantages": inputs["advantages"]}
        if self._rlkern_loss == "nft":
            mask = mask * ~inputs["rlkern_correct"].isnan()[:, None]
            given |= {key: inputs[f"rlkern_{key}"].nan_to_num(0.0) for key in ("success_rate", "correct")}
        if "rlkern_old_proxy_logp" in inputs:
            given["proxy_logp"] = inputs["rlkern_old_proxy_logp"]
        given["mask"] = mask
        options = self._rlkern_options | {"aggregation": self.loss_type, "normalizer": self._rlkern_normalizer(inputs, mode)}
        options |= _weights(self._rlkern_loss, inputs.get("importance_sampling_ratio"), mask)
        if options.get("kl_term") == "full":
            options["kept_logmass"] = scored["kept_logmass"]
        options |= self._rlkern_ranks(mask)
        arguments = REGISTRY[self._rlkern_loss].arguments
        return POLICY_LOSSES[self._rlkern_loss](*(given[name] for name in arguments), **options)

    def _rlkern_ranks(self, mask: Tensor) -> dict[str, Any]:
        """The processes, for a loss that selects over all of them."""
        if self._rlkern_options.get("select_over") != "group" or self.accelerator.num_processes == 1:
            return {}
        # Completions are padded to a length that differs by process.
        capacity = selection_capacity(self._rlkern_loss, self._rlkern_options, len(mask) * self.max_completion_length, self.accelerator.num_processes)
        return {"group": torch.distributed.group.WORLD, "capacity": capacity}

    def _rlkern_normalizer(self, inputs: dict[str, Any], mode: str) -> float | Tensor | None:
        if self.loss_type == "dr_grpo":
            return self.max_completion_length
        if self.loss_type != "dapo":
            return None
        tokens = inputs["num_items_in_batch"].float() / self.accelerator.num_processes  # of the generation batch
        if mode != "train":
            return tokens
        return tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation


def selection_capacity(name: str, options: dict[str, Any], entries: int, processes: int) -> int:
    """How many tokens a process may have to give, where each has up to so many entries; the same on all."""
    fractions = [default if options.get(option) is None else options[option] for option, default in _FRACTIONS[name].items()]
    least = 1 if name == "lp_reg" or options.get("min_count") is None else options["min_count"]
    return max(1, min(entries, max(int(entries * processes * max(fractions)), least)))


def _weights(name: str, weights: Tensor | None, mask: Tensor) -> dict[str, Tensor]:
    """TRL's importance weights, [B, T] or of sequences [B, 1], as the argument that has TRL's effect."""
    if weights is None:
        return {}
    _check_weights(name)
    if name == "vespo":
        return {"rollout_weights": weights}
    if name == "gspo":
        # TRL's loss of a sequence is one number: all tokens share its gradient, whatever weights they have
        rows = Rows(mask != 0)
        return {"weights": rows.spread(rows.mean(weights.expand_as(mask)))}
    return {"weights": weights}


def _check_weights(name: str) -> None:
    """Raises ValueError for a loss that takes no importance weights."""
    if name == "gmpo" or not REGISTRY[name].takes_weights:
        why = "as TRL's own GMPO leaves them out" if name == "gmpo" else "for it has no advantages that they could correct"
        raise ValueError(f"policy_loss={name!r} takes no importance weights, {why}: set vllm_importance_sampling_correction=False in GRPOConfig")


def _own_aggregation(name: str, options: dict[str, Any]) -> str | None:
    """Takes from the options how a mean over sequences is averaged; None for other losses."""
    if not REGISTRY[name].averages_sequences:
        return None
    aggregation = options.pop("aggregation", "grpo")  # as TRL does it for its sapo and experimental GMPO
    if aggregation not in _AGGREGATIONS:
        expected = ", ".join(map(repr, _AGGREGATIONS))
        raise ValueError(f"unknown aggregation {aggregation!r} for policy_loss {name!r}, expected one of {expected}")
    return aggregation


def _check_loss(name: str, options: dict[str, Any], min_p: float | None) -> None:
    """Refuses options that the loss does not take, before a model is loaded."""
    loss = REGISTRY[name]
    more = ("min_p",) * (name == "lp_reg") + ("aggregation",) * loss.averages_sequences
    check_options(f"policy_loss {name!r}", loss.function, options, _GIVEN, *more)
    check_kept_mass(min_p, None)
    if name == "nft" and options.get("ratio_type") == "sequence":
        raise ValueError("policy_loss 'nft' averages over tokens here, as loss_type in GRPOConfig says: ratio_type must be 'token', got 'sequence'")
    kept = {"kept_logmass": torch.zeros(2, 2)} if options.get("kl_term") == "full" else {}
    dry_run(loss.function, loss.arguments, **options, **kept, aggregation="grpo")


def _check_config(name: str, config: Any, aggregation: str | None) -> None:
    """Refuses options of GRPOConfig that act on TRL's policy loss. aggregation: the loss's own, if any."""
    if config.loss_type not in _AGGREGATIONS:
        raise ValueError(
            f"policy_loss={name!r} takes the place of a loss, and loss_type then only says how its tokens are averaged: "
            f"expected one of {', '.join(map(repr, _AGGREGATIONS))} in GRPOConfig, got {config.loss_type!r}"
        )
    if aggregation is not None and config.loss_type not in (GRPOConfig.loss_type, aggregation):
        raise ValueError(
            f"loss_type={config.loss_type!r} in GRPOConfig has no effect on policy_loss={name!r}, whose own average is "
            f"{aggregation!r}: give policy_loss_options={{'aggregation': {config.loss_type!r}}} if you mean it"
        )
    elsewhere = "it is not supported here: use TRL's own trainer"
    sequences = "policy_loss='gspo' or 'gmpo' have ratios of sequences"
    advice = {
        "epsilon": (config.epsilon == 0.2, "give clip_low in policy_loss_options"),
        "epsilon_high": (config.epsilon_high in (None, config.epsilon), "give clip_high in policy_loss_options"),
        "delta": (config.delta is None, "give dual_clip in policy_loss_options, for the losses that have one"),
        "importance_sampling_level": (config.importance_sampling_level == "token", sequences),
        "top_entropy_quantile": (config.top_entropy_quantile == 1.0, elsewhere),
        "off_policy_mask_threshold": (config.off_policy_mask_threshold is None, elsewhere),
    }
    check_effect(config, f"policy_loss={name!r}", advice)
    if config.use_vllm and config.vllm_importance_sampling_correction:
        _check_weights(name)
