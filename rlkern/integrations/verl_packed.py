"""verl's actor loss on packed responses: no padding, no loop over sequences, no wait for the device.

    patch = rlkern.integrations.verl_packed.patch()     # in every worker, or RLKERN_VERL_PACKED=1

verl's own `ppo_loss` (verl.workers.utils.losses) pads the responses of a remove-padding batch one by one,
with a look at the host for each. Here their tokens are gathered once, and a `Packed` says whose they are.
"""

from __future__ import annotations

from functools import wraps
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..losses.aggregate import aggregate
from ..primitives.kl import kl_estimate
from ..primitives.packing import Packed, packed, sequences_of
from .patching import Patch
from .verl import PREFIX, batch_aggregation
from .versions import Releases

__all__ = ["packed_ppo_loss", "packed_responses", "patch"]

_RELEASES = Releases("verl", lambda: import_module("verl").__version__, "rlkern.integrations.verl_packed.patch", ("0.9.1",), "verl==0.9.1")
_KL_KINDS: dict[str, tuple[str, float | None]] = {
    "kl": ("k1", None),
    "k1": ("k1", None),
    "abs": ("abs", None),
    "mse": ("k2", None),
    "k2": ("k2", None),
}
_KL_KINDS |= {"low_var_kl": ("k3", 10.0), "k3": ("k3", 10.0)}


def packed_responses(output: Tensor, data: Any) -> tuple[Tensor, Packed | Tensor]:
    """The response tokens of a model output over prompts and responses.

    Args:
        output: nested, or its values [sum(prompt + response)]: as verl has it, the number at t is of token
            t + 1.
        data: with prompts, responses and response_mask: nested (verl's v1 trainer), or padded [B, P] and [B,
            T], and attention_mask [B, P + T] beside them (its RayPPOTrainer).

    Returns:
        Where `data` is nested: [1, N], the tokens of all responses one behind the other, and where they are.
        Where it is padded: [B, T] and the mask [B, T]; what the mask leaves out may be another response's.
        Both with gradient.
    """
    values = output.values() if output.is_nested else output
    responses, prompts = data["responses"], data["prompts"]
    if not responses.is_nested:
        given, length = data["attention_mask"], responses.shape[1]
        lengths = given[:, prompts.shape[1] :].sum(1)
        first = given.sum(1).cumsum(0) - lengths - 1
        places = first.unsqueeze(1) + torch.arange(length, device=first.device)
        return values[places.clamp(max=values.shape[0] - 1)], data["response_mask"].bool()
    starts, tokens = responses.offsets(), responses.values()
    pack = packed(starts, data["response_mask"].values())
    lengths = starts.diff()
    behind = (prompts.offsets().diff() + lengths).cumsum(0)  # the last token of each sequence is one before
    places = torch.arange(tokens.shape[0], device=tokens.device)
    return values[(behind - lengths - 1 - starts[:-1])[pack.seq_idx] + places].unsqueeze(0), pack


def _tokens(x: Tensor) -> Tensor:
    """[1, N] of a nested tensor: [N] might be taken for one a sequence where there are as many."""
    return x.values().unsqueeze(0) if x.is_nested else x


def packed_ppo_loss(config: Any, model_output: Any, data: Any, dp_group: Any = None) -> tuple[Tensor, dict[str, Any]]:
    """In place of verl.workers.utils.losses.ppo_loss: the same loss and metrics, for rlkern's loss modes.

    Entropy and KL terms as verl adds them. Needs `rlkern.integrations.verl.register()`. Where the batch is
    nested (verl's v1 trainer), so are its fields, and nothing is padded. Where it is padded, the responses
    are gathered at once. ValueError for another loss_mode, and for kl_loss_type "full".
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
    weights = _tokens(data["rollout_is_weights"]) if "rollout_is_weights" in data else None
    loss, metrics = get_policy_loss_fn(name)(
        old_log_prob=_tokens(data["old_log_probs"]),
        log_prob=logp,
        advantages=_tokens(data["advantages"]),
        response_mask=pack,
        loss_agg_mode=config.loss_agg_mode,
        config=config,
        rollout_is_weights=weights,
    )
    metrics = Metric.from_dict(metrics, aggregation=AggregationType.MEAN)
    metrics["actor/pg_loss"] = Metric(value=loss.detach(), aggregation=how)
    length = None if isinstance(pack, Packed) else logp.shape[1]
    aggregation, normalizer, divisor = batch_aggregation(config.loss_agg_mode, info, length)

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
        counted = sequences_of(pack, logp).mask  # elsewhere the reference may be NaN, and so would be the slope of a square
        kl = mean(kl_estimate(torch.where(counted, logp, 0), _tokens(data["ref_log_prob"]), estimate + plus, clamp=clamp))
        loss = loss + config.kl_loss_coef * kl
        metrics |= {"kl_loss": Metric(value=kl.detach(), aggregation=how), "kl_coef": config.kl_loss_coef}
    return loss, metrics


def patch() -> Patch:
    """Puts `packed_ppo_loss` in place of verl's ppo_loss, for rlkern's loss modes; others keep verl's.

    A worker that was built meanwhile keeps the loss that it took then.

    Raises:
        ImportError: verl is not there, or not 0.9.1.
    """
    _RELEASES.check()
    from verl.workers.utils import losses

    own = losses.ppo_loss

    @wraps(own)
    def ppo_loss(config: Any, model_output: Any, data: Any, dp_group: Any = None) -> tuple[Tensor, dict[str, Any]]:
        ours = config.policy_loss.get("loss_mode", "vanilla").startswith(PREFIX)
        return (packed_ppo_loss if ours else own)(config, model_output, data, dp_group)

    return Patch.everywhere("verl", [(losses, "ppo_loss", ppo_loss)])
