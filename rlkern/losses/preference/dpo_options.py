"""What `dpo_loss` and `dpo_loss_from_logits` are asked for, checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ...checks import FINITE, check_choice, check_flags, check_number, check_positive
from .dpo_types import F_DIVERGENCES, PAIR_LOSSES


class Options(NamedTuple):
    beta: float
    label_smoothing: float
    gamma: float
    loss_types: tuple[str, ...]
    loss_weights: tuple[float, ...]
    f_divergence: str
    f_alpha: float
    discopop_tau: float
    reference_free: bool

    def uses(self, option: str) -> list[str]:
        """The loss types in use that listen to the option."""
        return [name for name in self.loss_types if option in PAIR_LOSSES[name].uses]

    # Methods, not properties: Dynamo of torch 2.6 does not follow those of a named tuple.

    def without_reference(self) -> list[str]:
        """The loss types in use that are defined without a reference."""
        return [name for name in self.loss_types if PAIR_LOSSES[name].reward is not None]

    def references_optional(self) -> bool:
        """Whether there is a loss without a reference. `reference_free` makes one of any."""
        return self.reference_free or all(PAIR_LOSSES[name].policy_only for name in self.loss_types)

    def refuse_sorted(self, what: str) -> None:
        for name in self.loss_types:
            if PAIR_LOSSES[name].sorts_batch:
                raise ValueError(f"loss_type {name!r} sorts the batch, so its entries belong to no pair: it cannot be combined with {what}")

    def refuse_references(self, **references: Any) -> None:
        given = [name for name, x in references.items() if x is not None]
        if given and self.without_reference():
            found = type(references[given[0]]).__name__
            raise ValueError(f"loss_type {self.without_reference()[0]!r} has no reference: {given[0]} must be None, got {found}")


def _sequence(name: str, value: Sequence[Any]) -> tuple:
    if not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence, got {type(value).__name__}")
    return tuple(value)


def _loss_types(loss_type: str | Sequence[str], ipo: bool) -> tuple[str, ...]:
    names = (loss_type,) if isinstance(loss_type, str) else _sequence("loss_type", loss_type)
    if ipo:
        if names not in (("sigmoid",), ("ipo",)):
            raise ValueError(f"ipo=True stands for loss_type='ipo', got loss_type={loss_type!r} as well")
        return ("ipo",)
    if not names:
        raise ValueError("loss_type is an empty sequence, expected at least one name")
    for name in names:
        check_choice("loss_type", name, PAIR_LOSSES)
    return names


def _loss_weights(loss_weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    if loss_weights is None:
        return (1.0,) * count
    weights = _sequence("loss_weights", loss_weights)
    if len(weights) != count:
        raise ValueError(f"loss_weights must have one entry for each of the {count} loss types, got {len(weights)}")
    for weight in weights:
        check_number("loss_weights", weight, -FINITE, FINITE)
    return weights


def check_options(
    *,
    beta: float,
    label_smoothing: float,
    ipo: bool,
    reference_free: bool,
    loss_type: str | Sequence[str],
    loss_weights: Sequence[float] | None,
    gamma: float | None,
    f_divergence: str,
    f_alpha: float,
    discopop_tau: float,
) -> Options:
    """The options checked. One that nothing listens to is a mistake, which would otherwise stay unseen."""
    check_positive("beta", beta, FINITE)
    check_positive("discopop_tau", discopop_tau, FINITE)
    check_number("f_alpha", f_alpha, -FINITE, FINITE)
    check_number("label_smoothing", label_smoothing)
    if gamma is not None:
        check_number("gamma", gamma, 0, FINITE)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is the rate of flipped labels, 0 <= label_smoothing < 0.5, got {label_smoothing}")
    check_flags(ipo=ipo, reference_free=reference_free)
    check_choice("f_divergence", f_divergence, F_DIVERGENCES)
    names = _loss_types(loss_type, ipo)
    weights = _loss_weights(loss_weights, len(names))
    options = Options(beta, label_smoothing, 0.5 if gamma is None else gamma, names, weights, f_divergence, f_alpha, discopop_tau, reference_free)
    what = "ipo=True" if ipo else f"loss_type {loss_type!r}"
    if label_smoothing > 0 and not options.uses("label_smoothing"):
        raise ValueError(f"{what} takes no label_smoothing, got {label_smoothing}")
    if gamma is not None and not options.uses("gamma"):
        raise ValueError(f"{what} takes no gamma, got {gamma}")
    if f_divergence != "reverse_kl" and not options.uses("f_divergence"):
        raise ValueError(f"{what} takes no f_divergence, got {f_divergence!r}")
    if "exo_pair" in names and label_smoothing == 0:
        raise ValueError("loss_type 'exo_pair' needs label_smoothing > 0 (its paper: 1e-3), got 0")
    return options
