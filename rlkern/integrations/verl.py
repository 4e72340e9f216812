"""verl: rlkern's policy losses in verl's registry, and its log-probabilities and entropy in place of verl's.

    from rlkern.integrations import verl as rlkern_verl

    rlkern_verl.register()              # actor.policy_loss.loss_mode=rlkern_clip_cov, and so on
    patch = rlkern_verl.patch()         # log-probabilities and entropy, from logits and from hidden states
    patch.undo()                        # or: with rlkern_verl.patch(): ...

verl trains in Ray workers, so both must run in each of them. Importing `verl_plugin` does so; verl imports it
when told actor_rollout_ref.model.external_lib=rlkern.integrations.verl_plugin. See docs/trainers/verl.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import losses, primitives
from ..checks import check_choice, check_flags, check_logits, computing_dtype
from ..losses import LossOutput
from ..metrics.merge import merge_rows
from ..primitives.packing import Packed, sequences_of
from .patching import Patch
from .registry import check_offered, dry_run
from .versions import Releases
from .vocab_parallel import tensor_parallel_group

__all__ = [
    *("LOSSES", "SUPPORTED_VERSIONS", "FusedLinearForPPO", "check_config", "entropy_from_logits", "linear_cross_entropy"),
    *("logprobs_from_logits", "patch", "register", "unregister", "vocab_parallel_entropy", "vocab_parallel_entropy_with_chunking"),
    *("vocab_parallel_log_probs_from_logits", "vocab_parallel_sum_pi_squared"),
]

SUPPORTED_VERSIONS = ("0.8.0", "0.9.0", "0.9.1")
PREFIX = "rlkern_"
_RELEASES = Releases("verl", lambda: import_module("verl").__version__, "rlkern.integrations.verl", SUPPORTED_VERSIONS, "rlkern[verl]")
_MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
_GSPO_OWN_AGGREGATION = ("0.8.0", "0.9.0")  # there verl's gspo ignores loss_agg_mode

# --- verl's options and metrics, as those of rlkern's losses ------------------------------------------------


class _Loss(NamedTuple):
    function: Callable[..., LossOutput]
    metrics: dict[str, tuple[str, ...]]  # verl's name, after "actor/" -> the sum of these of ours
    options: dict[str, tuple[str, Any]] = {}  # ours -> verl's, and its default or the name of one that stands in
    fixed: dict[str, Any] = {}


_LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {  # verl's for some of our options, and how to say so
    "clip_low": (lambda x: x is not None, "verl's actor config must have {} or clip_ratio, got neither"),
    "clip_high": (lambda x: x is not None, "verl's actor config must have {} or clip_ratio, got neither"),
    "dual_clip": (lambda x: x > 1, "verl's {} must be above 1, got {}"),
    "select_ratio": (lambda x: 0 < x <= 1, "verl's {} is a fraction of the tokens in (0, 1], got {}"),
    "beta": (lambda x: x is not None and x > 0, "rlkern_dro needs verl's {} above 0, got {}"),
}


def _get(config: Any, key: str, default: Any = None) -> Any:
    """The value under a key such as "policy_loss.dro_beta"; the default where that is missing or None."""
    for part in key.split("."):
        config = None if config is None else config.get(part)
    return default if config is None else config


def _options(loss: _Loss, config: Mapping) -> dict[str, Any]:
    options = dict(loss.fixed)
    for name, (key, default) in loss.options.items():
        options[name] = _get(config, key, _get(config, default) if isinstance(default, str) else default)
        fits, message = _LIMITS.get(name, (lambda x: True, ""))
        if not fits(options[name]):
            raise ValueError(message.format(key, options[name]))
    return options


def _dro_loss(logp, old_logp, advantages, mask, *, beta, weights=None, aggregation, normalizer) -> LossOutput:
    """`reinforce_loss` and a quadratic penalty, which verl puts under the importance weights as well."""
    options = {"aggregation": aggregation, "normalizer": normalizer}
    out = losses.reinforce_loss(logp, old_logp, advantages, mask, weights=weights, **options)
    kept = sequences_of(mask, logp).mask
    penalty = 0.5 * beta * torch.where(kept, logp - old_logp.detach(), 0).square()
    if weights is not None:
        penalty = penalty * torch.where(kept, weights.detach(), 0)
    return LossOutput(out.loss + losses.aggregate(penalty, mask, aggregation, normalizer), out.metrics)


def _geo_mean_loss(logp, old_logp, advantages, mask, *, weights=None, **options) -> LossOutput:
    """`gmpo_loss`, where a sequence is weighed by the geometric mean of its importance weights."""
    if weights is not None:
        sequences = sequences_of(mask, logp)
        weights = sequences.mean((weights + 1e-10).log()).exp().unsqueeze(-1)
    return losses.gmpo_loss(logp, old_logp, advantages, mask, weights=weights, **options)


def _vespo_loss(logp, old_logp, advantages, mask, *, weights=None, rollout_is=None, **options) -> LossOutput:
    """`vespo_loss` with the importance weights inside of W.

    verl hands over [B, T] whether a weight is a token's or its sequence's, so rollout_is must tell.
    """
    check_choice("rollout_is", rollout_is, (None, "token", "sequence"))
    if weights is not None and rollout_is is None:
        raise ValueError(
            f"{PREFIX}vespo takes verl's rollout_is_weights into a sequence's ratio, and has to know whether they are of "
            "tokens or of sequences: register(options={'vespo': {'rollout_is': ...}}) with what "
            "algorithm.rollout_correction.rollout_is says, 'token' or 'sequence'"
        )
    if weights is not None and rollout_is == "sequence":
        # the same in all tokens, and 0 outside of the mask
        weights = sequences_of(mask, logp).max(weights).clamp(min=0).unsqueeze(-1)
    return losses.vespo_loss(logp, old_logp, advantages, mask, rollout_weights=weights, **options)


_KL: dict[str, tuple[str, ...]] = {"ppo_kl": ("approx_kl_k1",)}
_CAPPED = _KL | {"pg_clipfrac": ("clip_fraction_high",)}
_CLIPPED = _KL | {"pg_clipfrac": ("clip_fraction_low", "clip_fraction_high"), "pg_clipfrac_lower": ()}
_DUAL = _CLIPPED | {"pg_clipfrac_lower": ("clip_fraction_dual",)}
_BAND = {"cov_low": ("policy_loss.clip_cov_lb", 1.0), "cov_high": ("policy_loss.clip_cov_ub", 5.0)}
_CLIP = {"clip_low": ("clip_ratio_low", "clip_ratio"), "clip_high": ("clip_ratio_high", "clip_ratio")}
_TABLE = {
    "vanilla": _Loss(losses.ppo_loss, _DUAL, _CLIP | {"dual_clip": ("clip_ratio_c", 3.0)}),
    "gspo": _Loss(losses.gspo_loss, _CLIPPED, _CLIP),
    "sapo": _Loss(
        losses.sapo_loss,
        _CLIPPED | {"pg_clipfrac": ()},
        {"tau_positive": ("tau_pos", 1.0), "tau_negative": ("tau_neg", 1.05)},
        {"log_ratio_clamp": 20.0},
    ),
    "gpg": _Loss(losses.reinforce_loss, _KL),
    "clip_cov": _Loss(
        losses.clip_cov_loss,
        _KL | {"pg_clipfrac": ("selected_fraction",)},
        _CLIP | _BAND | {"select_ratio": ("policy_loss.clip_cov_ratio", 2e-4)},
        {"preset": "verl"},
    ),
    "kl_cov": _Loss(
        losses.kl_cov_loss,
        {"ppo_kl": ("abs_log_ratio",)},
        {"select_ratio": ("policy_loss.kl_cov_ratio", 2e-4), "kl_coef": ("policy_loss.ppo_kl_coef", 1.0)},
        {"preset": "verl"},
    ),
    "geo_mean": _Loss(_geo_mean_loss, _CAPPED | {"pg_clipfrac_lower": ("clip_fraction_low",)}, _CLIP),
    "dro": _Loss(_dro_loss, _KL, {"beta": ("policy_loss.dro_beta", None)}),
    "cispo": _Loss(losses.cispo_loss, _CLIPPED, _CLIP, {"log_ratio_clamp": 20.0}),
    # losses that verl does not have; their own options come from register(options=...)
    "tis": _Loss(losses.tis_loss, _CAPPED),
    "topr": _Loss(losses.topr_loss, _CAPPED),
    "vespo": _Loss(_vespo_loss, _KL),
}
LOSSES = tuple(_TABLE)


def _aggregation(name: str, version: str, mode: str, length: int | None, info: Mapping) -> tuple[str, float | Tensor | None, float]:
    """`batch_aggregation` for a loss, some of which have one of their own."""
    if name == "geo_mean":
        return "grpo", None, 1  # verl's own: the mean over all rows, with no global counts
    if name == "sapo" or (name == "gspo" and version in _GSPO_OWN_AGGREGATION):
        mode = "seq-mean-token-mean"
    return batch_aggregation(mode, info, length)


def batch_aggregation(mode: str, info: Mapping, length: int | None = None) -> tuple[str, float | Tensor | None, float]:
    """verl's agg_loss: the mode and normalizer of `aggregate`, and a number to divide its result by.

    length: the padded one; None for packed tokens.
    """
    check_choice("loss_agg_mode", mode, _MODES)
    dp_size = _get(info, "dp_size", 1)
    if mode == "token-sum":
        return "token-mean", 1 / dp_size, 1
    counted = "batch_num_tokens" if mode == "token-mean" else "global_batch_size"
    count = info.get(counted)
    if count is None and dp_size > 1:
        needs = f"needs {counted} in verl's global_batch_info, got None"
        raise ValueError(f"loss_agg_mode {mode!r} with dp_size={dp_size} {needs}")
    normalizer = None if count is None else count / dp_size
    if mode == "seq-mean-token-sum-norm":  # verl >= 0.8 divides by the sequences and the scale, `aggregate` by the scale
        scale = _get(info, "loss_scale_factor", length)
        if scale is None:
            raise ValueError("loss_agg_mode 'seq-mean-token-sum-norm' of packed tokens needs verl's loss_scale_factor: there is no padded length")
        return "seq-mean-token-sum", normalizer, scale
    return mode, normalizer, 1


class _Metric(float):
    """The sum of some metrics of a batch: of those that `of` names, where `row` has all by `names`."""

    of: tuple[str, ...]
    names: tuple[str, ...]
    row: tuple[float, ...]

    def __new__(cls, of: tuple[str, ...], names: tuple[str, ...], row: tuple[float, ...]) -> _Metric:
        self = super().__new__(cls, sum(value for name, value in zip(names, row, strict=True) if name in of))
        self.of, self.names, self.row = of, names, row
        return self

    def __getnewargs__(self) -> tuple:
        return self.of, self.names, self.row


def _metrics(out: LossOutput, names: dict[str, tuple[str, ...]]) -> dict[str, float]:
    """verl's metrics, and rlkern's own as actor/rlkern/...: floats, read from the device all at once."""
    row = tuple(torch.stack([m.double() for m in out.metrics.values()]).tolist())
    names = names | {f"rlkern/{name}": (name,) for name in out.metrics}
    return {f"actor/{name}": _Metric(of, tuple(out.metrics), row) for name, of in names.items()}


def _merging(metric_class: Any) -> Patch:
    """Lets verl's Metric merge ours by their tokens, over micro-batches and processes. Others stay means."""
    aggregate_own, aggregate_dp = metric_class.aggregate, metric_class.aggregate_dp

    def merged(values: list) -> _Metric | None:
        if not values or not all(isinstance(value, _Metric) for value in values):
            return None
        first, rows = values[0], torch.tensor([value.row for value in values], dtype=torch.float64)
        return _Metric(first.of, first.names, tuple(merge_rows(first.names, rows).tolist()))

    def aggregate(self):
        result = merged(self.values) if self.aggregation.value == "mean" else None
        return aggregate_own(self) if result is None else result

    def aggregate_processes(metric_lists):
        means = all(metric.aggregation.value == "mean" for metric in metric_lists)
        result = merged([value for metric in metric_lists for value in metric.values]) if means else None
        return aggregate_dp(metric_lists) if result is None else result

    merging = {"aggregate": aggregate, "aggregate_dp": staticmethod(aggregate_processes)}
    return Patch([(metric_class, name, method) for name, method in merging.items()])


def _policy_loss(name: str, extra: Mapping[str, Any], version: str) -> Callable:
    """The loss as verl calls it."""
    spec = _TABLE[name]

    def loss_fn(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor | Packed,
        loss_agg_mode: str = "seq-mean-token-mean" if name == "gspo" else "token-mean",
        config: Mapping | None = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        if config is None or not hasattr(config, "get"):
            raise ValueError(f"{PREFIX}{name} needs verl's actor config, got {type(config).__name__}")
        info = _get(config, "global_batch_info", {})
        length = None if isinstance(response_mask, Packed) else log_prob.shape[-1]
        aggregation, normalizer, divisor = _aggregation(name, version, loss_agg_mode, length, info)
        given = {"weights": rollout_is_weights, "aggregation": aggregation, "normalizer": normalizer}
        options = {**_options(spec, config), **extra}
        out = spec.function(log_prob, old_log_prob, advantages, response_mask, **options, **given)
        return out.loss / divisor, _metrics(out, spec.metrics)

    loss_fn.__name__ = loss_fn.__qualname__ = f"{PREFIX}{name}"
    return loss_fn


# --- registration -------------------------------------------------------------------------------------------

_ANY_CONFIG = {"clip_ratio": 0.2, "policy_loss": {"dro_beta": 1.0}}  # to try out the options of `register`
_merge: list[Patch] = []  # what stands of `_merging`: at most one


def register(*names: str, options: Mapping[str, Mapping[str, Any]] | None = None) -> tuple[str, ...]:
    """Puts rlkern's losses into verl's registry, as "rlkern_" and verl's name for it, such as rlkern_vanilla.

    They read verl's config (clip_ratio*, policy_loss.*, tau_*, loss_agg_mode, global_batch_info) and
    rollout_is_weights, and return verl's metrics as floats. verl's `Metric` then merges these by their tokens
    over micro-batches and processes. Registering again replaces. verl's own names do not change, and
    `unregister` takes everything back.

    Args:
        names: some of `LOSSES`; none stands for all of them.
        options: name -> keyword options of rlkern's function, such as {"tis": {"cap": 2.0}}. They win over
            verl's config, which has no place for some of them. "vespo" also takes rollout_is, "token" or
            "sequence", and needs it where verl corrects for the rollout.

    Returns:
        The names that verl now knows.

    Raises:
        ImportError: verl is not there, or not one of SUPPORTED_VERSIONS.
        TypeError, ValueError: names or options that do not exist or do not fit. Nothing is registered then.
    """
    version = _RELEASES.check()
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
    from verl.utils.metric import Metric

    options = dict(options or {})
    for name in (*names, *options):
        check_offered("policy loss", name, LOSSES, "verl")
        if names and name not in names:
            only = ", ".join(map(repr, names))
            raise ValueError(f"options of {name!r} would have no effect, for only {only} would be registered")
    made = {f"{PREFIX}{name}": _policy_loss(name, options.get(name, {}), version) for name in names or LOSSES}
    for loss_fn in made.values():
        dry_run(loss_fn, config=_ANY_CONFIG, loss_agg_mode="token-mean")
    POLICY_LOSS_REGISTRY.update(made)
    if not _merge:
        _merge.append(_merging(Metric))
    return tuple(made)


def unregister() -> None:
    """Takes all of rlkern's losses out of verl's registry, and verl's Metric is its own again."""
    _RELEASES.check()
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    for name in LOSSES:
        POLICY_LOSS_REGISTRY.pop(f"{PREFIX}{name}", None)
    while _merge:
        _merge.pop().undo()


# --- log-probabilities and entropy --------------------------------------------------------------------------


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True, *, keep: primitives.Kept | Tensor | None = None) -> Tensor:
    """verl.utils.torch_functional.logprobs_from_logits: logits [..., V], labels [...] -> [...].

    The result is float32, whatever the dtype of the logits.

    inplace_backward: verl's argument. It is not followed, since verl's engines pass True without knowing who
        else saved the logits. See `patch`.
    keep: not verl's: the sets that the softmax is over, see docs/kept_sets.md.
    """
    check_logits(logits)
    check_flags(inplace_backward=inplace_backward)
    return primitives.token_logprobs(logits, labels, keep=keep)


def _logprobs_in_place(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    return primitives.token_logprobs(logits, labels, inplace_backward=inplace_backward and logits.is_contiguous())


def entropy_from_logits(logits: Tensor) -> Tensor:
    """verl.utils.torch_functional.entropy_from_logits: [..., V] -> [...], in nats, float32.

    Logits at -inf have probability 0.
    """
    return primitives.entropy_from_logits(logits)


def _entropy_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    return primitives.entropy_from_logits(logits)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: torch.distributed.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """verl.utils.kernel.linear_cross_entropy.linear_cross_entropy: hidden [..., H], weight [V, H], labels
    [...] -> log-probabilities and entropy in nats, float32 [N], of all leading dimensions in one.

    The logits are float32, also of 16-bit operands, as in verl's kernel. Other reductions than "none" go to
    verl's own.

    dist_process_group: whose ranks hold the vocabulary in order, weight [V / ranks, H]. The gradient of
        hidden is this rank's share: the sum over ranks is the caller's, as in verl.
    """
    if reduction.lower() != "none":
        from verl.utils.kernel.linear_cross_entropy import LinearCrossEntropy

        return LinearCrossEntropy.apply(hidden, weight, labels, temperature, reduction, dist_process_group)
    rows, logits_dtype = hidden.reshape(-1, hidden.shape[-1]), computing_dtype(hidden)
    options: dict[str, Any] = {"temperature": temperature, "logits_dtype": logits_dtype, "group": dist_process_group, "hidden_grad": "partial"}
    stats = primitives.linear_token_stats(rows, weight, labels.reshape(-1), **options)
    return stats.logp, stats.entropy


class FusedLinearForPPO(torch.nn.Module):
    """verl.utils.experimental.torch_functional.FusedLinearForPPO, whose two arguments are not needed here."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch"):
        super().__init__()

    def forward(self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """[..., H], [V, H], [...] -> log-probabilities and entropy in nats, float32 [...]."""
        stats = primitives.linear_token_stats(hidden_states, vocab_weights, input_ids, temperature=temperature)
        return stats.logp, stats.entropy


# --- the same of vocabulary-parallel logits (Megatron) ------------------------------------------------------


def vocab_parallel_log_probs_from_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """verl.utils.megatron.tensor_parallel's: [..., V / tp] and [...] -> [...], float32.

    Over Megatron's tensor-parallel group. The logits are not written to. Raises ImportError without
    megatron-core; TypeError, ValueError, IndexError as `rlkern.token_stats`.
    """
    return primitives.token_logprobs(logits, labels, group=tensor_parallel_group())


def vocab_parallel_entropy(vocab_parallel_logits: Tensor) -> Tensor:
    """verl.utils.megatron.tensor_parallel's: [..., V / tp] -> [...] in nats, over Megatron's group."""
    return primitives.entropy_from_logits(vocab_parallel_logits, group=tensor_parallel_group())


def vocab_parallel_entropy_with_chunking(vocab_parallel_logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """As `vocab_parallel_entropy`; chunks are not needed here."""
    return vocab_parallel_entropy(vocab_parallel_logits)


def vocab_parallel_sum_pi_squared(vocab_parallel_logits: Tensor) -> Tensor:
    """verl.utils.megatron.tensor_parallel's: sum p^2, [..., V / tp] -> [...], over Megatron's group."""
    unused = vocab_parallel_logits.new_zeros(vocab_parallel_logits.shape[:-1], dtype=torch.int64)
    options = {"with_entropy": False, "with_sum_sq": True, "group": tensor_parallel_group()}
    return primitives.token_stats(vocab_parallel_logits, unused, **options).sum_sq_prob


_VOCAB_PARALLEL = (
    *(vocab_parallel_log_probs_from_logits, vocab_parallel_entropy, vocab_parallel_entropy_with_chunking),
    vocab_parallel_sum_pi_squared,
)


def patch(*, inplace_backward: bool = False) -> Patch:
    """Replaces verl's functions of log-probabilities and entropy, from logits and from hidden states.

    Those are logprobs_from_logits, entropy_from_logits and entropy_from_logits_with_chunking, and what its
    fused kernels (use_fused_kernels=True) call: FusedLinearForPPO and linear_cross_entropy. Where
    megatron-core is installed, also the vocab_parallel_* functions of its Megatron engine.

    They are replaced wherever verl imports them, now or later, until the `Patch` is undone. An engine that
    was built meanwhile keeps the entropy function that it took then.

    Args:
        inplace_backward: True lets the gradient overwrite the logits wherever verl's engines pass
            inplace_backward=True, as flash-attn does. That saves the memory of one gradient. You promise that
            nothing else has saved these logits for its backward, or that backward raises "modified by an
            inplace operation". verl's engines keep the promise unless they distill with use_chunked_topk
            with a policy gradient, or train on the sum of squared probabilities. Your code may break it.

    Raises:
        ImportError: verl is not there, or not one of SUPPORTED_VERSIONS.
    """
    _RELEASES.check()
    from verl.utils import torch_functional
    from verl.utils.experimental import torch_functional as fused_linear
    from verl.utils.kernel import linear_cross_entropy as fused_kernel

    replacements = [
        (torch_functional, "logprobs_from_logits", _logprobs_in_place if inplace_backward else logprobs_from_logits),
        (torch_functional, "entropy_from_logits", entropy_from_logits),
        (torch_functional, "entropy_from_logits_with_chunking", _entropy_with_chunking),
        (fused_linear, "FusedLinearForPPO", FusedLinearForPPO),
        (fused_kernel, "linear_cross_entropy", linear_cross_entropy),
    ]
    try:
        tensor_parallel = import_module("verl.utils.megatron.tensor_parallel")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "megatron":
            raise
    else:
        replacements += [(tensor_parallel, f.__name__, f) for f in _VOCAB_PARALLEL if hasattr(tensor_parallel, f.__name__)]
    return Patch.everywhere("verl", replacements)


def check_config(config: Mapping) -> None:
    """Refuses, before training starts, an actor config that rlkern would fail on or leave without effect.

    Args:
        config: verl's actor config (actor_rollout_ref.actor).

    Raises:
        ImportError: verl is not there, or not one of SUPPORTED_VERSIONS.
        ValueError, TypeError: policy_loss.loss_mode names a loss of rlkern's that is not registered, or one
            with options that it does not take.
    """
    _RELEASES.check()
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    mode = _get(config, "policy_loss.loss_mode", "vanilla")
    if mode.startswith(PREFIX):
        if mode not in POLICY_LOSS_REGISTRY:
            known = [name for name in POLICY_LOSS_REGISTRY if name.startswith(PREFIX)]
            raise ValueError(f"policy_loss.loss_mode {mode!r} is not registered in this process; call register() there. Registered: {known}")
        own = {"config": dict(config) | {"global_batch_info": {}}}
        dry_run(POLICY_LOSS_REGISTRY[mode], **own, loss_agg_mode=_get(config, "loss_agg_mode", "token-mean"))
