"""The policy losses by name, what each needs from a trainer, and trying one out before training starts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch

from .. import losses
from ..checks import check_choice
from ..losses.aggregate import SEQUENCE_MODES, own_aggregation

TOKENS = ("logp", "old_logp", "advantages", "mask")  # what every trainer has


class RegisteredLoss(NamedTuple):
    function: Callable[..., losses.LossOutput]
    arguments: tuple[str, ...]  # the positional ones, in order
    needs: tuple[str, ...]  # what it needs beside TOKENS
    compares_sequences: bool  # it selects among the tokens of many sequences: one at a time makes no sense
    averages_sequences: bool  # it is a mean over sequences by definition
    takes_weights: bool  # importance weights can multiply the loss of each token


def _describe(function: Callable[..., losses.LossOutput], *needs: str, compares_sequences: bool = False) -> RegisteredLoss:
    parameters = inspect.signature(function).parameters
    arguments = tuple(name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD)
    needs += tuple(name for name in arguments if name not in TOKENS)
    averages = own_aggregation(function) in SEQUENCE_MODES
    return RegisteredLoss(function, arguments, needs, compares_sequences, averages, "weights" in parameters)


REGISTRY = {
    "ppo": _describe(losses.ppo_loss),
    "grpo": _describe(losses.grpo_loss),
    "gspo": _describe(losses.gspo_loss),
    "cispo": _describe(losses.cispo_loss),
    "sapo": _describe(losses.sapo_loss),
    "gmpo": _describe(losses.gmpo_loss),
    "vespo": _describe(losses.vespo_loss),
    "tis": _describe(losses.tis_loss),
    "topr": _describe(losses.topr_loss),
    "reinforce": _describe(losses.reinforce_loss),
    "clip_cov": _describe(losses.clip_cov_loss, compares_sequences=True),
    "kl_cov": _describe(losses.kl_cov_loss, compares_sequences=True),
    "lp_reg": _describe(losses.lp_reg_loss, compares_sequences=True),
    "nft": _describe(losses.nft_loss),
    "kdrl": _describe(losses.kdrl_loss),
    "epo": _describe(losses.epo_loss),
    "nlpo": _describe(losses.nlpo_loss, "the keep-set's mass"),
    "nash_md": _describe(losses.nash_md_loss),
    "nash_mp": _describe(losses.nash_mp_loss),
}


def check_offered(what: str, name: str, offered: Collection[str], trainer: str, *, one_by_one: bool = False) -> None:
    """Raises ValueError unless the trainer offers the loss, with the reason where it is one of rlkern's.

    one_by_one: the trainer calls a loss with one sequence at a time.
    """
    loss = REGISTRY.get(name) if isinstance(name, str) and name not in offered else None
    if loss and loss.compares_sequences and one_by_one:
        why = f"compares tokens of many sequences, and {trainer} calls a custom loss with one sequence at a time"
        raise ValueError(f"{what} {name!r} {why}; expected one of {', '.join(map(repr, offered))}")
    if loss and loss.needs:
        why = f"needs {' and '.join(loss.needs)}, which {trainer} does not hand to a policy loss"
        raise ValueError(f"{name}_loss {why}: call it from a loss of your own")
    check_choice(what, name, offered)


def check_options(what: str, function: Callable, options: Iterable[str], given: Collection[str], *more: str) -> None:
    """Raises TypeError for an option that is neither the function's nor `more`, or that the trainer gives."""
    allowed = [name for name in inspect.signature(function).parameters if name not in given]
    unknown = ", ".join(repr(name) for name in options if name not in allowed)
    if unknown:
        raise TypeError(f"{what} has no option {unknown}, expected one of {', '.join(map(repr, [*allowed, *more]))}")


def check_effect(config: Any, on: str, advice: Mapping[str, tuple[bool, str]]) -> None:
    """Raises ValueError for an option of a trainer's config that would have no effect.

    advice: option -> (whether it has its default, what to do otherwise).
    """
    for option, (default, what) in advice.items():
        if not default:
            given = f"{option}={getattr(config, option)!r} in {type(config).__name__}"
            raise ValueError(f"{given} has no effect on {on}: {what}")


def dry_run(loss: Callable, arguments: Iterable[str] = TOKENS, /, **options: Any) -> None:
    """Calls a loss once, on two sequences of two tokens: it refuses bad options before training starts.

    arguments: rlkern's names for what it takes, in order; "response" is a response's log-probability and
        "length" its length.
    """
    tokens, ones = torch.zeros(2, 2), torch.ones(2)
    known = {"mask": tokens == 0, "correct": ones, "success_rate": ones, "response": tokens[0], "length": ones.long()}
    loss(*(known.get(name, tokens) for name in arguments), **options)
