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
    """A policy loss, and what a trainer must know of it."""

    function: Callable[..., losses.LossOutput]
    arguments: tuple[str, ...]  # the positional ones, in order
    needs: tuple[str, ...]  # what it needs beside TOKENS
    compares_sequences: bool  # it selects among the tokens of many sequences: one at a time makes no sense
    averages_sequences: bool  # it is a mean over sequences by definition
    takes_weights: bool  # importance weights can multiply its term of the advantages


def _describe(function: Callable[..., losses.LossOutput]) -> RegisteredLoss:
    parameters = inspect.signature(function).parameters
    arguments = tuple(name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD)
    needs = tuple(name for name in arguments if name not in TOKENS)
    if function is losses.nlpo_loss:
        needs = ("the keep-set's mass",)  # it is in the log-probabilities
    averages = own_aggregation(function) in SEQUENCE_MODES
    takes_weights = "weights" in parameters and "advantages" in arguments
    return RegisteredLoss(function, arguments, needs, function in _SELECTING, averages, takes_weights)


_SELECTING = (losses.clip_cov_loss, losses.kl_cov_loss, losses.lp_reg_loss)
_LOSSES = (
    *(losses.ppo_loss, losses.grpo_loss, losses.gspo_loss, losses.cispo_loss, losses.sapo_loss, losses.gmpo_loss),
    *(losses.vespo_loss, losses.tis_loss, losses.topr_loss, losses.reinforce_loss, *_SELECTING, losses.nft_loss),
    *(losses.kdrl_loss, losses.epo_loss, losses.nlpo_loss, losses.nash_md_loss, losses.nash_mp_loss),
)
REGISTRY = {function.__name__.removesuffix("_loss"): _describe(function) for function in _LOSSES}


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
