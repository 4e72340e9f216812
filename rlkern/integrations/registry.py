"""The policy losses by name, what a trainer must give each of them, and how one is tried out before training starts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .. import losses
from ..checks import check_choice
from ..losses.aggregate import SEQUENCE_MODES, own_aggregation

TOKENS = ("logp", "old_logp", "advantages", "mask")  # what every trainer has


@dataclass(frozen=True)
class RegisteredLoss:
    """A policy loss, and what a trainer must know of it.

    Args:
        function: rlkern's.
        compares_sequences: it selects among the tokens of many sequences, so one sequence at a time makes no sense.
        beside: what it needs beside TOKENS, in words, where its positional arguments do not tell.
    """

    function: Callable[..., losses.LossOutput]
    compares_sequences: bool = False
    beside: str | None = None

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.function).parameters

    @property
    def arguments(self) -> tuple[str, ...]:
        """The positional ones, in order."""
        return tuple(name for name, p in self.parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD)

    @property
    def needs(self) -> tuple[str, ...]:
        """What it needs beside TOKENS, such as proxy_logp."""
        return tuple(name for name in self.arguments if name not in TOKENS) if self.beside is None else (self.beside,)

    @property
    def averages_sequences(self) -> bool:
        """Whether it is a mean over sequences by definition."""
        return own_aggregation(self.function) in SEQUENCE_MODES

    @property
    def takes_weights(self) -> bool:
        """Whether importance weights can multiply the loss of each token."""
        return "weights" in self.parameters


REGISTRY = {
    "ppo": RegisteredLoss(losses.ppo_loss),
    "grpo": RegisteredLoss(losses.grpo_loss),
    "gspo": RegisteredLoss(losses.gspo_loss),
    "cispo": RegisteredLoss(losses.cispo_loss),
    "sapo": RegisteredLoss(losses.sapo_loss),
    "gmpo": RegisteredLoss(losses.gmpo_loss),
    "vespo": RegisteredLoss(losses.vespo_loss),
    "tis": RegisteredLoss(losses.tis_loss),
    "topr": RegisteredLoss(losses.topr_loss),
    "reinforce": RegisteredLoss(losses.reinforce_loss),
    "clip_cov": RegisteredLoss(losses.clip_cov_loss, compares_sequences=True),
    "kl_cov": RegisteredLoss(losses.kl_cov_loss, compares_sequences=True),
    "lp_reg": RegisteredLoss(losses.lp_reg_loss, compares_sequences=True),
    "nft": RegisteredLoss(losses.nft_loss),
    "kdrl": RegisteredLoss(losses.kdrl_loss),
    "epo": RegisteredLoss(losses.epo_loss),
    "nlpo": RegisteredLoss(losses.nlpo_loss, beside="the keep-set's mass"),
    "nash_md": RegisteredLoss(losses.nash_md_loss),
    "nash_mp": RegisteredLoss(losses.nash_mp_loss),
}


def check_offered(what: str, name: str, offered: Collection[str], trainer: str, *, single_sequences: bool = False) -> None:
    """Raises ValueError unless a trainer offers the loss. Of a loss of rlkern's the error says what stands against it.

    Args:
        what: what the trainer calls a loss, for the error.
        single_sequences: the trainer calls a loss with one sequence at a time.
    """
    known = REGISTRY.get(name) if isinstance(name, str) and name not in offered else None
    if known is not None and known.compares_sequences and single_sequences:
        raise ValueError(
            f"{what} {name!r} compares tokens of many sequences, and {trainer} calls a custom loss with one sequence at a "
            f"time; expected one of {', '.join(map(repr, offered))}"
        )
    if known is not None and known.needs:
        raise ValueError(
            f"{name}_loss needs {' and '.join(known.needs)}, which {trainer} does not hand to a policy loss: call it from a loss of your own"
        )
    check_choice(what, name, offered)


def check_options(what: str, function: Callable, options: Iterable[str], given: Collection[str], *, more: Iterable[str] = ()) -> None:
    """Raises TypeError for an option that the function does not take or the trainer gives itself; `more` are allowed too."""
    allowed = [name for name in inspect.signature(function).parameters if name not in given]
    unknown = [name for name in options if name not in allowed]
    if unknown:
        expected = ", ".join(map(repr, [*allowed, *more]))
        raise TypeError(f"{what} has no option {', '.join(map(repr, unknown))}, expected one of {expected}")


def check_effect(config: Any, on: str, advice: Mapping[str, tuple[bool, str]]) -> None:
    """Raises ValueError for an option of a trainer's config that would have no effect: whoever sets one means it.

    Args:
        on: what it would have no effect on.
        advice: option -> (whether it has its default, what to do otherwise).
    """
    for option, (default, what) in advice.items():
        if not default:
            given = f"{option}={getattr(config, option)!r} in {type(config).__name__}"
            raise ValueError(f"{given} has no effect on {on}: {what}")


def dry_run(loss: Callable, arguments: Iterable[str] = TOKENS, /, **options: Any) -> None:
    """Calls the loss once, on two sequences of two tokens: what it says against its options, it says before training.

    arguments: names of rlkern's for what it takes, in order. "response" is the sum and "length" the number of a
    response's tokens; whatever is not known is one number a token.
    """
    tokens, sequences = torch.zeros(2, 2), torch.ones(2)
    known = {"mask": tokens == 0, "correct": sequences, "success_rate": sequences}
    known |= {"response": torch.zeros(2), "length": torch.ones(2, dtype=torch.long)}
    loss(*(known.get(name, tokens) for name in arguments), **options)
