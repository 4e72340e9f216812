"""`token_stats` of rows whose columns are cut over the ranks of a group, or into segments.

Each rank sends what its columns add up to: one gather of a few numbers a row, and with min_p, min_prob or a
tail a second one of two. The gradient needs none: the state of whole rows is on every rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..backends.contract import KeptKind
from ..operator import Steps, differentiable
from ..parallel import gather
from .parts import token_stats_kept_masses, token_stats_merge, token_stats_parts, with_kept
from .row_stats import INSTEAD, Options, Results, backward, overwrite

_N = len(Options._fields)


class _Ranks(NamedTuple):
    """What the steps take after `Options`."""

    group_name: str
    ranks: int
    segments: int


def _split(args: Any) -> tuple[Options, _Ranks, Any]:
    m = _N + len(_Ranks._fields)
    return Options(*args[:_N]), _Ranks(*args[_N:m]), args[m:]


def all_parts(parts: Tensor, ranks: _Ranks) -> Tensor:
    """[P, ...] of this rank -> [ranks * P, ...]"""
    return parts if ranks.ranks == 1 else gather(parts, ranks.group_name, ranks.ranks).flatten(0, 1)


def _forward(call, logits, targets, mask, row_temperature, *args) -> tuple:
    o, ranks, _ = _split(args)
    of_rows = (targets, mask, row_temperature, *o)
    parts = all_parts(call(token_stats_parts, logits, *of_rows, ranks.segments), ranks)
    results = Results(*call(token_stats_merge, parts, *of_rows))
    if o.kept_kind != KeptKind.NONE:
        masses = all_parts(call(token_stats_kept_masses, logits, *of_rows, ranks.segments, results.state), ranks)
        results = with_kept(results, masses, targets, mask, o)
    return tuple(results)


def _without_ranks(operator):
    def steps(call, *args):
        n = operator.tensors
        o, _, rest = _split(args[n:])
        return call(operator, *args[:n], *o, *rest)

    return steps


_sharded_stats = differentiable(
    Steps("sharded_token_stats", _forward, token_stats_parts, token_stats_merge, token_stats_kept_masses),
    Steps("sharded_token_stats_backward", _without_ranks(backward), backward),
    outputs=5,
    constants=1,
    instead=INSTEAD,
    overwrite=Steps("sharded_token_stats_backward_", _without_ranks(overwrite), overwrite),
)
