"""How the metrics of parts of a batch, micro-batches or processes, make those of the whole.

A mean merges by the count that it was taken over. A largest and a smallest value merge over the parts that
have any token. The effective sample size merges through the sums that it was made of. With N the tokens, r
the ratios, L the log of their mean and ess = (sum r)^2 / (N sum r^2), a part has

    sum r = N exp(L)        sum r^2 = (sum r)^2 / (N ess)

A loss also reports what its metrics need to be merged, so the result of merging is a part again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_choice, shown
from ..parallel import Meeting, digest_of, gather
from ..primitives.sequence_sums import wide

__all__ = ["KINDS", "RULES", "Rule", "merge_metrics", "merge_rows", "reduce_metrics"]


class Rule(NamedTuple):
    """merge: values [P, K] of K metrics in P parts, and for each name in `needs` that metric [P] -> [K]."""

    merge: Callable[..., Tensor]
    needs: tuple[str, ...] = ()


# --- the ways to merge --------------------------------------------------------------------------------------


def _sum(values: Tensor) -> Tensor:
    return values.sum(0)


def _mean(values: Tensor, *counts: Tensor) -> Tensor:
    """Over the product of the counts; 0 of nothing.

    A part without tokens is left out: its value may be infinite.
    """
    weight = reduce(torch.mul, counts).unsqueeze(-1)
    total = weight.sum()
    return torch.where(weight > 0, weight * values, 0).sum(0) / torch.where(total == 0, 1, total)


def _largest(values: Tensor, count: Tensor, empty: float = 1.0) -> Tensor:
    counted = torch.where(count.unsqueeze(-1) > 0, values, -math.inf).amax(0)
    return torch.where(count.sum() > 0, counted, empty)


def _largest_or_0(values: Tensor, count: Tensor) -> Tensor:
    return _largest(values, count, 0.0)


def _smallest_or_0(values: Tensor, count: Tensor) -> Tensor:
    return -_largest(-values, count, 0.0)


def _smallest(values: Tensor, count: Tensor) -> Tensor:
    return -_largest(-values, count, -1.0)


def _log_mean(values: Tensor, count: Tensor) -> Tensor:
    total = count.sum()
    logs = torch.where(count.unsqueeze(-1) > 0, values + count.log().unsqueeze(-1), -math.inf)
    return torch.where(total > 0, logs.logsumexp(0) - total.log(), 0)


def _effective_sample_size(values: Tensor, count: Tensor, log_mean: Tensor) -> Tensor:
    top = torch.where(count > 0, log_mean, -math.inf).amax(0)
    scale = (log_mean - torch.where(top.isinf(), 0, top)).exp()  # the size of all ratios cancels: no overflow
    sums = torch.where(count > 0, count * scale, 0).unsqueeze(-1)
    squares = torch.where(sums == 0, 0, sums.square() / (count.unsqueeze(-1) * values))
    total = count.sum()
    return torch.where(total > 0, sums.sum(0).square() / (total * squares.sum(0)), 1)


def _ess_of_mean(values: Tensor, count: Tensor, mean: Tensor) -> Tensor:
    """As `_effective_sample_size`, with the mean itself. A part whose weights are all 0 has none."""
    sums, has = (count * mean).unsqueeze(-1), (count > 0).unsqueeze(-1) & (values > 0)
    squares = torch.where(has, sums.square() / torch.where(has, count.unsqueeze(-1) * values, 1), 0)
    total, square = count.sum(), squares.sum(0)
    return torch.where(total > 0, torch.where(square > 0, sums.sum(0).square() / (total * torch.where(square > 0, square, 1)), 0), 1)


# --- which metric merges how --------------------------------------------------------------------------------


_ROLLOUT = "rollout/"  # of `rollout_weights`, with counts of its own
_TOTALS = ("tokens", "sequences", "pairs", "groups", "draws", "answers", "mask_tokens", "loss")
_MEANS = {  # counts: the means over their product
    ("tokens",): """clip_fraction_low clip_fraction_high clip_fraction_dual approx_kl_k1 approx_kl_k3 abs_log_ratio kl
        kl_reference kl_target kernel_mean selected_fraction covariance_mean kd kd_fraction eubo entropy
        entropy_low_fraction entropy_high_fraction""",
    ("tokens", "selected_fraction"): "covariance_selected proxy_kl",
    ("mask_tokens",): "outside_fraction",
    ("answers",): "positive_fraction clamped_fraction success_rate",
    ("pairs",): """accuracy reward_margin chosen_reward rejected_reward chosen_shift rejected_shift margin_shift
        both_decreased chosen_decreased""",
    ("sequences",): "win_prob ess",
    ("draws",): "d_mean clip_fraction",
}
_ROLLOUT_MEANS = {
    "tokens": "kl_k1 kl_k3 abs_difference_mean masked_fraction unscored_fraction chi2_token",
    "sequences": "sequences_masked_fraction chi2_sequence log_ppl_difference",
    "units": "weight_mean fraction_high fraction_low",
}
KINDS = ("mean", "max", "min", "sum", "log_mean", "ess")
_OF_KIND = {  # of a caller's metrics, which are over tokens
    "mean": Rule(_mean, ("tokens",)),
    "max": Rule(_largest_or_0, ("tokens",)),
    "min": Rule(_smallest_or_0, ("tokens",)),
    "sum": Rule(_sum),
    "log_mean": Rule(_log_mean, ("tokens",)),
    "ess": Rule(_effective_sample_size, ("tokens", "log_mean_ratio")),
}
# Name -> rules. Losses share names, so there may be several: the first holds whose needs are reported.
RULES: Mapping[str, tuple[Rule, ...]] = MappingProxyType(
    dict.fromkeys(_TOTALS, (Rule(_sum),))
    | {name: (Rule(_mean, counts),) for counts, names in _MEANS.items() for name in names.split()}
    | {
        "elbo": (Rule(_mean, ("tokens",)), Rule(_mean, ("sequences",))),
        "ratio_max": (Rule(_largest, ("tokens",)),),
        "ratio_min": (Rule(_smallest, ("tokens",)),),
        "d_max": (Rule(_largest_or_0, ("draws",)),),
        "log_mean_ratio": (Rule(_log_mean, ("tokens",)),),
        "effective_sample_size": (Rule(_effective_sample_size, ("tokens", "log_mean_ratio")), Rule(_mean, ("groups",))),
    }
    | {_ROLLOUT + name: (Rule(_sum),) for name in ("tokens", "sequences", "units")}
    | {_ROLLOUT + name: (Rule(_mean, (_ROLLOUT + of,)),) for of, names in _ROLLOUT_MEANS.items() for name in names.split()}
    | {
        _ROLLOUT + "abs_difference_max": (Rule(_largest_or_0, (_ROLLOUT + "tokens",)),),
        _ROLLOUT + "ratio_max": (Rule(_largest, (_ROLLOUT + "units",)),),
        _ROLLOUT + "ratio_min": (Rule(_smallest, (_ROLLOUT + "units",)),),
        _ROLLOUT + "ess": (Rule(_ess_of_mean, (_ROLLOUT + "units", _ROLLOUT + "weight_mean")),),
    }
)
_GATE = (Rule(_mean, (_ROLLOUT + "tokens",)),)  # of rollout/gate/<name>


def _rule(name: str, names: Sequence[str], kinds: Mapping[str, str]) -> Rule:
    rules = (_OF_KIND[kinds[name]],) if name in kinds else _GATE if name.startswith(_ROLLOUT + "gate/") else RULES.get(name, ())
    if not rules:
        expected = f"a kind in kinds= ({', '.join(KINDS)}) or one of {', '.join(map(repr, RULES))}"
        raise ValueError(f"unknown metric {name!r}: it has no rule to merge by, expected {expected}")
    for rule in rules:
        if all(need in names for need in rule.needs):
            return rule
    expected = " or ".join(" and ".join(map(repr, rule.needs)) for rule in rules)
    raise ValueError(f"metric {name!r} is merged by {expected}, which the metrics do not have: got {', '.join(map(repr, names))}")


@torch.no_grad()
def merge_rows(names: Sequence[str], rows: Tensor, kinds: Mapping[str, str] = MappingProxyType({})) -> Tensor:
    """`reduce_metrics` of numbers: rows [P, K] float, one a part, with the K names of the columns -> [K].

    Raises:
        ValueError: a name without a rule, or one whose counts are missing.
    """
    groups: dict[Rule, list[str]] = {}
    for name in names:
        groups.setdefault(_rule(name, names, kinds), []).append(name)
    columns = dict(zip(names, rows.unbind(-1), strict=True))
    merged: dict[str, Tensor] = {}
    for rule, group in groups.items():
        values = rule.merge(torch.stack([columns[name] for name in group], -1), *(columns[need] for need in rule.needs))
        merged.update(zip(group, values.unbind(), strict=True))
    return torch.stack([merged[name] for name in names])


@torch.no_grad()
def reduce_metrics(
    parts: Sequence[Mapping[str, Tensor]],
    *,
    group: torch.distributed.ProcessGroup | None = None,
    kinds: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """The metrics of a batch from those of its parts. For every loss, exact up to the rounding of the parts.

    Means weigh by their counts (`tokens`, `sequences`, ...), which are added up. `ratio_max` and `ratio_min`
    take the parts that have tokens. `effective_sample_size` is that of all tokens together. What a selection
    made of each part (`selected_fraction`, ...) is merged as it is. The `loss` of `BGPOAccumulator` is added
    up. Those of `rollout_weights` merge by counts of their own.

    Args:
        parts: the metrics of one loss for each micro-batch, name -> 0-d tensor, all with the same names. A
            part may be empty (a batch without tokens), or the result of another merge.
        group: processes to merge over as well, by one all_gather of a number a metric. Each hands over its
            own parts, as many as it has but at least one, with the same names everywhere.
        kinds: how to merge metrics of your own, name -> "mean", "max", "min", "sum", "log_mean" (the log of
            a mean) or "ess" (of ratios with `log_mean_ratio`). All but sums go by `tokens`: parts without any
            have no say, and of nothing the result is 0 ("ess": 1).

    Returns:
        name -> 0-d float64 tensor (float32 on Apple's GPUs), on the device of the parts and detached. Nothing
        is read on the host. On GPUs NaN if the processes' names differ, or if one of them raises.

    Raises:
        TypeError: a part that is no mapping, a name that is no string, a metric that is no tensor.
        ValueError: no parts, names that differ between parts or have no rule, missing counts, tensors that
        are not 0-d. With a group on CPUs every rank raises if one does, or if their names differ.
    """
    first = next(iter(parts[0].values()), None) if isinstance(parts, Sequence) and parts and isinstance(parts[0], Mapping) else None
    with Meeting("reduce_metrics", group, first) as meeting:
        if isinstance(first, Tensor):
            meeting.would_send(lambda: [first.new_empty(_message_size(len(parts[0])), dtype=wide(first))])
        kinds = _check_kinds(kinds)
        _check_parts(parts)
        names = sorted(parts[0])  # processes may have them in any order
        for name in names:
            _rule(name, names, kinds)
        if meeting.exchanges:
            meeting.about(options={"the metrics": tuple(names), "kinds": tuple(sorted(kinds.items()))})
    if not names:
        return {}
    widest = wide(parts[0][names[0]])
    merged = merge_rows(names, torch.stack([torch.stack([part[name].detach().to(widest) for name in names]) for part in parts]), kinds)
    if meeting.ranks > 1:
        digest = digest_of(repr((names, sorted(kinds.items()))).encode()) % (1 << 23)  # exact in float32
        message = torch.nn.functional.pad(merged, (0, _message_size(len(names)) - len(names)), value=digest)
        everyone = gather(message, meeting.group_name, meeting.ranks)
        merged = torch.where((everyone[:, -1] == digest).all(), merge_rows(names, everyone[:, : len(names)], kinds), torch.nan)
    result = dict(zip(names, merged.unbind(), strict=True))
    return {name: result[name] for name in parts[0]}


merge_metrics = reduce_metrics  # its first name


def _message_size(count: int) -> int:
    """Numbers that a process sends: its metrics, then the digest, at least once.

    In steps: where no header goes round, processes with a few metrics more must still send as many numbers.
    """
    return -(-(count + 1) // 64) * 64


def _check_kinds(kinds: Mapping[str, str] | None) -> Mapping[str, str]:
    if kinds is None:
        return {}
    if not isinstance(kinds, Mapping):
        raise TypeError(f"kinds must be a dict, name -> kind, got {shown(kinds)}")
    for kind in kinds.values():
        check_choice("kinds", kind, KINDS)
    return kinds


def _check_parts(parts: Any) -> None:
    if not isinstance(parts, Sequence) or isinstance(parts, str):
        raise TypeError(f"parts must be a list of dicts of metrics, got {type(parts).__name__}")
    if not parts:
        raise ValueError("parts must hold the metrics of at least one micro-batch, got none")
    for part in parts:
        if not isinstance(part, Mapping):
            raise TypeError(f"parts must be dicts of metrics, got {type(part).__name__}")
        if part.keys() != parts[0].keys():
            some = ", ".join(sorted(map(str, part.keys() ^ parts[0].keys())))
            raise ValueError(f"all parts must have the same metrics, got {some} in some of them only")
        for name, value in part.items():
            if not isinstance(name, str):
                raise TypeError(f"the names of metrics must be strings, got {shown(name)}")
            if not isinstance(value, Tensor):
                raise TypeError(f"metric {name!r} must be a 0-d tensor, got {type(value).__name__}")
            if value.dim() != 0 or value.dtype.is_complex:
                got = f"{value.dtype} of shape {tuple(value.shape)}"
                raise ValueError(f"metric {name!r} must be one real number, a 0-d tensor, got {got}")
