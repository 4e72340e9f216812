"""verl's actor loss on packed responses: no padding, no loop over sequences, no wait for the device.

verl's own `ppo_loss` (verl.workers.utils.losses) pads the responses of a remove-padding batch one by one,
with a look at the host for each. Here their tokens are gathered once, and a `Packed` says whose they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..losses.aggregate import aggregate
from ..primitives.kl import kl_estimate
from ..primitives.packing import Packed, packed
from .verl import PREFIX, batch_aggregation

_KL_KINDS: dict[str, tuple[str, float | None]] = {
    "kl": ("k1", None),
    "k1": ("k1", None),
    "abs": ("abs", None),
    "mse": ("k2", None),
    "k2": ("k2", None),
}
_KL_KINDS |= {"low_var_kl": ("k3", 10.0), "k3": ("k3", 10.0)}


def packed_responses(output: Tensor, data: Any) -> tuple[Tensor, Packed]:
    """The response tokens of a model output over prompts and responses, one behind the other.

    Args:
        output: nested, or its values [sum(prompt + response)]: as verl has it, the number at t is of token
            t + 1.
        data: with nested prompts, responses and response_mask.

    Returns:
        [N], with gradient, N the tokens of all responses, and where they are.
    """
    values = output.values() if output.is_nested else output
    starts, prompt_lengths = data["responses"].offsets(), data["prompts"].offsets().diff()
    tokens = data["responses"].values()
    pack = packed(starts, data["response_mask"].values())
    lengths = starts.diff()
    behind = (prompt_lengths + lengths).cumsum(0)  # the last token of each sequence is one before
    own = pack.seq_idx
    places = torch.arange(tokens.shape[0], device=tokens.device)
    return values[(behind - lengths - 1)[own] + places - starts[own]], pack


def packed_ppo_loss(config: Any, model_output: Any, data: Any, dp_group: Any = None) -> tuple[Tensor, dict[str, Any]]:
    """In place of verl.workers.utils.losses.ppo_loss: the same loss and metrics, for rlkern's loss modes.

    Entropy and KL terms as verl adds them. Needs `rlkern.integrations.verl.register()`, and a batch whose
    fields are nested (use_remove_padding). ValueError for another loss_mode, and for kl_loss_type "full".
    """
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.utils.metric import AggregationType, Metric

    name = config.policy_loss.get("loss_mode", "vanilla")
    if not name.startswith(PREFIX):
        raise ValueError(f"loss_mode must be one of rlkern's, {PREFIX}<name>, to take packed tokens, got {name!r}")
    logp, pack = packed_responses(model_output["log_probs"], data)
    info = config.global_batch_info
    info |= {name: data[name] for name in ("dp_size", "batch_num_tokens", "global_batch_size")}
    info["loss_scale_factor"] = config.loss_scale_factor
    over_batch = data["dp_size"] > 1 or any(info[key] is not None for key in ("batch_num_tokens", "global_batch_size", "loss_scale_factor"))
    how = AggregationType.SUM if over_batch else AggregationType.MEAN
    weights = data["rollout_is_weights"].values() if "rollout_is_weights" in data else None
    loss, metrics = get_policy_loss_fn(name)(
        old_log_prob=data["old_log_probs"].values(),
        log_prob=logp,
        advantages=data["advantages"].values(),
        response_mask=pack,
        loss_agg_mode=config.loss_agg_mode,
        config=config,
        rollout_is_weights=weights,
    )
    metrics = Metric.from_dict(metrics, aggregation=AggregationType.MEAN)
    metrics["actor/pg_loss"] = Metric(value=loss.detach(), aggregation=how)
    aggregation, normalizer, divisor = batch_aggregation(config.loss_agg_mode, info)

    def mean(values: Tensor) -> Tensor:
        return aggregate(values, pack, aggregation, normalizer) / divisor

    if model_output.get("entropy") is not None:
        entropy = mean(packed_responses(model_output["entropy"], data)[0])
        loss = loss - config.entropy_coeff * entropy
        metrics["actor/entropy_loss"] = Metric(value=entropy.detach(), aggregation=how)
    if config.use_kl_loss:
        kind, plus = config.kl_loss_type.removesuffix("+"), "+" if config.kl_loss_type.endswith("+") else ""
        if kind not in _KL_KINDS:
            raise ValueError(f"kl_loss_type must be one of {', '.join(_KL_KINDS)}, or one with a +, got {config.kl_loss_type!r}")
        estimate, clamp = _KL_KINDS[kind]
        kl = mean(kl_estimate(logp, data["ref_log_prob"].values(), estimate + plus, clamp=clamp))
        loss = loss + config.kl_loss_coef * kl
        metrics |= {"kl_loss": Metric(value=kl.detach(), aggregation=how), "kl_coef": config.kl_loss_coef}
    return loss, metrics
