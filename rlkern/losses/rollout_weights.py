"""Corrections for a rollout engine that samples from another distribution than the trainer computes.

From the log-probabilities of the same tokens in both: importance weights for a policy loss, truncated or
masked, by token, sequence or geometric mean, and gates that reject tokens, sequences or whole prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..advantages import Groups
from ..checks import check_choice, check_flags, check_number, check_tokens, computing_dtype, shown
from ..parallel import Meeting, add_up
from ..primitives.packing import Packed, Rows, per_token, sequences_of
from ..primitives.reductions import fraction, masked_mean, total
from ..primitives.sequence_sums import wide

LEVELS = ("token", "sequence", "geometric")
BY_SEQUENCE = ("sequence", "geometric")
MODES = ("truncate", "mask", "none")
_LARGEST = 20.0  # of exponents
_FINITE = 1e9  # of x: infinite ones of both signs then have a sum
_PROBABILITY = 1e-6  # p and q of the binary KL stay this far from 0 and 1

_UPPER = ("k2", "k3", "tv", "binary_kl")  # statistics of a token with an upper bound
_UPPER_GATES = (
    *(f"token_{name}" for name in _UPPER),
    *(f"seq_mean_{name}" for name in _UPPER),
    *(f"{how}_{name}" for how in ("seq_sum", "seq_max") for name in ("k2", "k3")),
)
_RATIO_GATES = ("token_k1", "seq_sum_k1", "seq_mean_k1", "seq_all_ratio")  # with (low, high) of pi_train / pi_rollout
GATES = _UPPER_GATES + _RATIO_GATES

OF_PRESET = "preset"  # as an option: the preset's
_WITHOUT: dict[str, Any] = {"level": "token", "mode": "truncate", "low": None, "high": 2.0, "gates": {}}
PRESETS: dict[str, dict[str, Any]] = {  # what differs from these
    "tis": {},
    "icepop": {"mode": "mask", "low": 0.5, "high": 5.0},
    "seq-tis": {"level": "sequence"},
    "seq-mask": {"level": "sequence", "mode": "mask", "high": 3.0},
    "seq-mis": {"level": "sequence", "gates": {"seq_sum_k1": (0.5, 2.0)}},
    "geo-rs": {"mode": "none", "gates": {"seq_mean_k1": (0.999, 1.001)}},
    "seq-mask-tis": {"high": None, "gates": {"seq_mean_k1": (0.999, 1.002)}},
    "veto": {"mode": "none", "gates": {"seq_all_ratio": (1e-4, 100.0)}},
}


class RolloutWeights(NamedTuple):
    """What `rollout_weights` returns. It goes into a loss as `weights=`, which knows what it takes.

    weights: float, without gradient, 0 where rejected. "token": [B, T] (packed: in the shape of the tokens),
        0 where masked. Else one a sequence, [B] ([S]).
    keep: bool tokens: those that count and were not rejected. `mask & keep` also leaves them out of means.
    sequences_kept: bool [B] ([S]): False where a sequence was rejected as a whole.
    level, source: the level, and rollout_logp as it was given.
    metrics: 0-d tensors by name, `rollout/...`.
    """

    weights: Tensor
    keep: Tensor
    sequences_kept: Tensor
    level: str
    source: Tensor
    metrics: dict[str, Tensor]


@torch.no_grad()
def rollout_weights(
    train_logp: Tensor,
    rollout_logp: Tensor,
    mask: Tensor | Packed,
    *,
    preset: str | None = None,
    level: str = OF_PRESET,
    mode: str = OF_PRESET,
    low: float | str | None = OF_PRESET,
    high: float | str | None = OF_PRESET,
    gates: Mapping[str, float | tuple[float | None, float | None]] | None = None,
    groups: int | Tensor | None = None,
    whole_groups: bool = False,
    normalize: bool = False,
    group: torch.distributed.ProcessGroup | None = None,
) -> RolloutWeights:
    """Importance weights pi_train / pi_rollout for a policy loss, and which tokens to reject.

        r = rlkern.rollout_weights(old_logp, rollout_logp, mask, preset="tis")
        loss, metrics = rlkern.grpo_loss(logp, old_logp, advantages, mask, weights=r)

    With x = train_logp - rollout_logp of a token, and n the tokens of a sequence, u is

        level          u                    mode        weight
        "token"        x                    "truncate"  e^u within [low, high]
        "sequence"     sum x                "mask"      e^u if it is in [low, high], else 0: rejected
        "geometric"    (sum x) / n          "none"      1

    A gate rejects what exceeds its bound. Some have an upper bound, of k2 = x^2 / 2, k3 = e^x - 1 - x, tv =
    |p - q| or binary_kl, that of the event "this token", KL(rollout, train): `token_...` for each token,
    `seq_mean_...` for a sequence, with k2 and k3 also `seq_sum_...` and `seq_max_...`. Others have bounds
    (low, high) of the ratio pi_train / pi_rollout, each may be None: `token_k1`, `seq_sum_k1` (the product),
    `seq_mean_k1` (the geometric mean), `seq_all_ratio` (every token, a veto). verl's gates of these names
    bound the inverse: pass (1 / high, 1 / low). Presets; an option that is given replaces the preset's:

        None, "tis"      truncated importance sampling: "token", "truncate", low=None, high=2
        "icepop"         "token", "mask", [0.5, 5]
        "seq-tis"        "sequence", "truncate", high=2
        "seq-mask"       "sequence", "mask", high=3
        "seq-mis"        "seq-tis" with the gate seq_sum_k1 (0.5, 2)
        "geo-rs"         no weights, seq_mean_k1 (0.999, 1.001)
        "seq-mask-tis"   "token" without a bound, seq_mean_k1 (0.999, 1.002)
        "veto"           no weights, seq_all_ratio (1e-4, 100)

    Rejection is a weight of 0: a loss's denominators stay. To leave rejected tokens out of them (verl) pass
    `mask & r.keep` as the mask, or `pack.among(r.keep)`. Rejected responses should not be in the statistics
    of their group: `rewards.masked_fill(~r.sequences_kept, math.nan)` before advantages are made.

    Args:
        train_logp: [B, T] float, detached here: the trainer's, under the policy that sampled.
        rollout_logp: [B, T] float: the engine's. NaN is a token that it did not score: ratio 1. So is -inf in
            both. NaN of the trainer alone stays NaN where its mode makes the weight of it.
        mask: [B, T] bool or number, or a `Packed`.
        preset: a name of the table, or None.
        level, mode: see above. "preset": the preset's, as for low and high.
        low, high: bounds of e^u, inclusive; None: none. They are compared before exponentiating, and
            exponents stay within 20 of 0.
        gates: name -> bound; added to those of the preset. In k2 and k3 x stays within 20 of 0, as in verl:
            for x < 0 bounds above 200 and 19 reject nothing.
        groups: prompts, as in `rlkern.advantages`, for whole_groups: a rejected response rejects its prompt.
        normalize: divide weights by their mean over tokens or sequences, zeros included, before the gates. A
            mean of 0 leaves them.
        group: data-parallel processes, over which normalize takes the mean: one sum of two numbers. It may
            hold the context-parallel ranks of a pack too, or none of them.

    Returns:
        RolloutWeights. Its metrics, over tokens before rejection: kl_k1 = mean(-x), kl_k3 (estimates of
        KL(rollout, train)), abs_difference_mean and _max of x, ess (the effective sample size of the weights,
        a fraction of the units: tokens or sequences), weight_mean, ratio_max, ratio_min (of the units),
        fraction_high, fraction_low (units beyond a bound), masked_fraction (tokens rejected),
        sequences_masked_fraction, `gate/<name>` (tokens that this gate rejects), unscored_fraction,
        chi2_token, chi2_sequence, log_ppl_difference, and the counts tokens, sequences, units.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices, names and bounds other than the above. With a
            group on CPUs every rank raises if one does.
    """
    with Meeting("rollout_weights", group, train_logp) as meeting:
        if isinstance(train_logp, Tensor):
            meeting.would_add(lambda: [train_logp.new_empty(2, dtype=wide(train_logp))])
        given = {"level": level, "mode": mode, "low": low, "high": high, "gates": gates}
        o = _options(preset, given)
        sequences = sequences_of(mask, train_logp, "train_logp")
        if not sequences.whole:
            raise ValueError("mask must hold whole sequences: parts of them (full_lengths=) have no sums")
        check_tokens("rollout_logp", rollout_logp, train_logp, of="train_logp")
        check_flags(whole_groups=whole_groups, normalize=normalize)
        if whole_groups and groups is None:
            raise ValueError("whole_groups=True needs groups= (the size of a group or ids [B])")
        prompts = Groups(groups, sequences.lengths.double(), name="the sequences") if groups is not None else None
        if group is not None and not normalize:
            raise ValueError("group is for normalize=True, got it with normalize=False")
        if meeting.exchanges:
            meeting.about(options={"level": o["level"], "mode": o["mode"]})
    tokens, by_token = _Tokens(train_logp, rollout_logp, sequences), o["level"] == "token"
    u, counted = tokens.units(o["level"])
    below = counted & (u < _log(o["low"], -math.inf))
    above = counted & (u > _log(o["high"], math.inf))
    ratio = u.clamp(-_LARGEST, _LARGEST).exp()
    weights = ratio
    if o["mode"] == "truncate":
        weights = ratio.clamp(o["low"], o["high"]) if o["low"] is not None or o["high"] is not None else ratio
    elif o["mode"] == "none":
        weights = torch.ones_like(ratio)
    rejected = (below | above) if o["mode"] == "mask" else torch.zeros_like(below)
    weights = torch.where(counted & ~rejected, weights, 0)
    if normalize:
        weights = _normalized(weights, counted, [sequences.group_name if by_token else "", meeting.group_name])

    token_rejected = rejected if by_token else sequences.spread(rejected).expand_as(train_logp)
    sequence_rejected = torch.zeros_like(sequences.lengths, dtype=torch.bool) if by_token else rejected
    gate_metrics = {}
    for name, bound in o["gates"].items():
        out = _exceeds(name, bound, tokens)
        if name.startswith("seq_"):
            sequence_rejected = sequence_rejected | out
            out = sequences.spread(out).expand_as(train_logp)
        token_rejected = token_rejected | out
        gate_metrics[f"rollout/gate/{name}"] = fraction(out, sequences.mask, weights.dtype)
    if whole_groups and prompts is not None:
        sequence_rejected = prompts.total(sequence_rejected.double()) > 0
    token_rejected = sequences.mask & (token_rejected | sequences.spread(sequence_rejected))
    metrics = {**_metrics(tokens, ratio, weights, counted, below, above, token_rejected, sequence_rejected), **gate_metrics}
    weights = torch.where(token_rejected if by_token else sequence_rejected, 0, weights)
    keep = sequences.mask & ~token_rejected
    return RolloutWeights(weights, keep, ~sequence_rejected, o["level"], rollout_logp, metrics)


@torch.no_grad()
def off_policy_mask(logp: Tensor, rollout_logp: Tensor, advantages: Tensor, mask: Tensor | Packed, threshold: float) -> Tensor:
    """Tokens to keep, bool like logp: those with A >= 0, or in sequences whose policy has not moved far.

    A sequence with mean(rollout_logp - logp) > threshold over its counted tokens is too far off-policy to be
    pushed down (DeepSeek-V3.2, arXiv 2512.02556, section 3.1; TRL's off_policy_mask_threshold).

    Args:
        logp: [B, T] float, of the current policy, detached here. rollout_logp: [B, T] float, NaN not scored.
        advantages: [B, T], [B, 1] or [B] float.
        mask: [B, T] bool or number, or a `Packed`; False where it is 0.
        threshold: in nats a token.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices and numbers other than the above.
    """
    check_number("threshold", threshold)
    sequences = sequences_of(mask, logp)
    if not sequences.whole:
        raise ValueError("mask must hold whole sequences: parts of them (full_lengths=) have no means")
    check_tokens("rollout_logp", rollout_logp, logp)
    a = per_token("advantages", advantages, logp, sequences)
    near = -sequences.mean(_Tokens(logp, rollout_logp, sequences).x) <= threshold
    return sequences.mask & ((a >= 0) | sequences.spread(near))


# --- options ------------------------------------------------------------------------------------------------


def _options(preset: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """Those of the preset, changed by what was given."""
    check_choice("preset", preset, (None, *PRESETS))
    gates = given.pop("gates")
    if gates is not None and not isinstance(gates, Mapping):
        raise TypeError(f"gates must be a dict, name -> bound, got {shown(gates)}")
    o = _WITHOUT | ({} if preset is None else PRESETS[preset])
    o["gates"] = {**o["gates"], **(gates or {})}
    for name, value in given.items():
        if not isinstance(value, str) or value != OF_PRESET:
            o[name] = value
    check_choice("level", o["level"], LEVELS)
    check_choice("mode", o["mode"], MODES)
    _check_bounds("", o["low"], o["high"])
    for name, bound in o["gates"].items():
        check_choice("gates", name, GATES)
        if name in _UPPER_GATES:
            check_number(f"gates[{name!r}]", bound, 0)
        elif not isinstance(bound, (tuple, list)) or len(bound) != 2:
            raise TypeError(f"gates[{name!r}] must be a pair (low, high) of the ratio pi_train / pi_rollout, got {shown(bound)}")
        else:
            _check_bounds(f"gates[{name!r}]: ", *bound)
    return o


def _check_bounds(of: str, low: Any, high: Any) -> None:
    for name, value in (("low", low), ("high", high)):
        if value is not None:
            check_number(f"{of}{name}", value, 0)
    if low is not None and high is not None and low > high:
        raise ValueError(f"{of}low must not be above high, got {low} and {high}")


def _log(bound: float | None, without: float) -> float:
    return without if bound is None else -math.inf if bound == 0 else math.log(bound)


# --- numbers of tokens and sequences ------------------------------------------------------------------------


class _Tokens:
    """x and what gates look at, 0 where masked."""

    def __init__(self, train_logp: Tensor, rollout_logp: Tensor, sequences: Rows | Packed):
        dtype = computing_dtype(train_logp)
        self.sequences, mask = sequences, sequences.mask
        self.train = torch.where(mask, train_logp.to(dtype), 0)
        self.rollout = torch.where(mask, rollout_logp.to(dtype), 0)
        self.unscored = self.rollout.isnan()
        x = (self.train - self.rollout).clamp(-_FINITE, _FINITE)
        self.x = torch.where(self.unscored | (self.train == self.rollout), 0, x)  # equal: both may be -inf
        self.bounded = self.x.clamp(-_LARGEST, _LARGEST)

    def units(self, level: str) -> tuple[Tensor, Tensor]:
        """(u, which of them count), a number a token or one a sequence."""
        if level == "token":
            return self.x, self.sequences.mask
        u = self.sequences.sum(self.x) if level == "sequence" else self.sequences.mean(self.x)
        return u, self.sequences.lengths > 0

    def statistic(self, name: str) -> Tensor:
        if name == "k2":
            return self.bounded.square() / 2
        if name == "k3":
            return torch.expm1(self.bounded) - self.bounded
        p, q = (torch.where(self.unscored, 0, logp).exp() for logp in (self.train, self.rollout))
        if name == "tv":
            return (p - q).abs()
        p, q = (y.clamp(_PROBABILITY, 1 - _PROBABILITY) for y in (p, q))
        return q * (q.log() - p.log()) + (1 - q) * (torch.log1p(-q) - torch.log1p(-p))


def _exceeds(name: str, bound: Any, tokens: _Tokens) -> Tensor:
    """What a gate rejects, a bool a token or, for seq_..., one a sequence."""
    sequences = tokens.sequences
    if name in _UPPER_GATES:
        how, _, what = name.removeprefix("seq_").partition("_")
        values = tokens.statistic(what)
        if how == "token":
            return sequences.mask & (values > bound)
        statistic = {"sum": sequences.sum, "mean": sequences.mean, "max": sequences.max}[how](values)
        return (sequences.lengths > 0) & (statistic > bound)
    low, high = _log(bound[0], -math.inf), _log(bound[1], math.inf)
    if name == "token_k1":
        return sequences.mask & ((tokens.x < low) | (tokens.x > high))
    if name == "seq_all_ratio":
        outside = (sequences.min(tokens.x) < low) | (sequences.max(tokens.x) > high)
    else:
        u = sequences.sum(tokens.x) if name == "seq_sum_k1" else sequences.mean(tokens.x)
        outside = (u < low) | (u > high)
    return (sequences.lengths > 0) & outside


def _normalized(weights: Tensor, counted: Tensor, groups: list[str]) -> Tensor:
    """Over the mean. Ranks that are in two of the groups count twice above and below."""
    sums = torch.stack([weights.sum(dtype=wide(weights)), counted.sum().to(wide(weights))])
    for name in groups:
        if name != "":
            sums = add_up(sums, name)
    mean = sums[0] / sums[1].clamp(min=1)
    return weights / torch.where(mean == 0, 1, mean).to(weights.dtype)


def _metrics(tokens, ratio, weights, counted, below, above, token_rejected, sequence_rejected) -> dict[str, Tensor]:
    mask, dtype, has = tokens.sequences.mask, weights.dtype, tokens.sequences.lengths > 0
    sums = tokens.sequences.sum(tokens.x)
    units = total(counted, dtype)
    square = weights.square().sum()
    ess = torch.where(square > 0, weights.sum().square() / (units.clamp(min=1) * torch.where(square > 0, square, 1)), 0)
    named = {
        "kl_k1": masked_mean(-tokens.x, mask),
        "kl_k3": masked_mean(tokens.statistic("k3"), mask),
        "abs_difference_mean": masked_mean(tokens.x.abs(), mask),
        "abs_difference_max": _largest(tokens.x.abs(), mask, 0.0),
        "ess": torch.where(units > 0, ess, 1),
        "weight_mean": masked_mean(weights, counted),
        "ratio_max": _largest(ratio, counted, 1.0),
        "ratio_min": -_largest(-ratio, counted, -1.0),
        "fraction_high": fraction(above, counted, dtype),
        "fraction_low": fraction(below, counted, dtype),
        "masked_fraction": fraction(token_rejected, mask, dtype),
        "sequences_masked_fraction": fraction(sequence_rejected, has, dtype),
        "unscored_fraction": fraction(tokens.unscored, mask, dtype),
        "chi2_token": masked_mean(torch.expm1((2 * tokens.x).clamp(max=2 * _LARGEST)), mask),
        "chi2_sequence": masked_mean(torch.expm1((2 * sums).clamp(max=2 * _LARGEST)), has),
        "log_ppl_difference": masked_mean(-tokens.sequences.mean(tokens.x), has),
        "tokens": total(mask, dtype),
        "sequences": total(has, dtype),
        "units": units,
    }
    return {f"rollout/{name}": value for name, value in named.items()}


def _largest(x: Tensor, where: Tensor, empty: float) -> Tensor:
    if x.numel() == 0:
        return x.new_full((), empty)
    return torch.where(where.any(), torch.where(where, x, -math.inf).amax(), empty)
