"""Which releases of a trainer an integration knows, and whether the installed one is among them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch


class Releases(NamedTuple):
    """The releases of a trainer that an integration was tested with."""

    trainer: str
    installed: Callable[[], str]  # its version; raises ModuleNotFoundError without one
    used_by: str  # what of rlkern's needs it
    known: tuple[str, ...]
    install: str  # for pip
    parts: int | None = None  # so many numbers of a version count; None: all
    error: type[ImportError] = ImportError

    def refusal(self, why: str) -> ImportError:
        return self.error(
            f"{self.trainer} {self.installed()} is not supported by {self.used_by}: {why}. It knows "
            f"{', '.join(self.known)}; nothing has been changed. Install one of these (pip install '{self.install}') "
            f"or a newer rlkern, or train without {self.used_by}"
        )

    def check(self) -> str:
        """The one of `known` that is installed. Raises ImportError if none is."""
        try:
            release = ".".join(self.installed().split(".")[: self.parts])
        except ModuleNotFoundError as error:
            if error.name != self.trainer.lower():  # the trainer is there, and something that it needs is not
                raise
            raise ImportError(f"{self.used_by} needs {self.trainer}: pip install '{self.install}'") from None
        if release not in self.known:
            raise self.refusal("its functions may mean something else")
        return release


def module_of(name: str, needed: str) -> ModuleType:
    """The module of a trainer, by its full name. ImportError if the trainer is not there, or its Megatron.

    needed: what needs it, and what it is, for the error.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in (name.partition(".")[0], "megatron"):
            raise  # the trainer is there, and something that it needs is not
        raise ImportError(f"{needed}: no module {error.name}") from None


def _arguments(function: Any) -> list[str] | int:
    """What a caller may rely on: a function's argument names; function.apply is called by position."""
    if isinstance(function, type) and issubclass(function, torch.autograd.Function):
        return len(inspect.signature(function.forward).parameters) - 1
    if isinstance(function, type):
        return len(inspect.signature(function.apply).parameters)  # type: ignore[attr-defined]
    return list(inspect.signature(function).parameters)


def other_arguments(owner: Any, replacements: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(name, arguments, expected) of each function of the owner whose arguments are not its replacement's.

    The arguments are None where the owner has no such function. A replacement may have more options, by
    keyword only.
    """
    for name, replacement in replacements.items():
        found = getattr(owner, name, None)
        arguments, expected = None if found is None else _arguments(found), _arguments(replacement)
        if isinstance(arguments, list) and isinstance(expected, list):
            options = [p.name for p in inspect.signature(replacement).parameters.values() if p.kind is p.KEYWORD_ONLY and p.default is not p.empty]
            expected = [argument for argument in expected if argument in arguments or argument not in options]
        if arguments != expected:
            yield name, arguments, expected


def check_arguments(trainer: str, owner: Any, replacements: Mapping[str, Any]) -> None:
    """Raises ImportError if `other_arguments` finds any: what is there is another version of the trainer."""
    for name, found, expected in other_arguments(owner, replacements):
        raise ImportError(
            f"this {trainer}'s {name} takes {found}, expected {expected}: rlkern does not know this version of {trainer}; "
            "use a newer rlkern, or leave out patch()"
        )
