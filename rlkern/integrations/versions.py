"""Which releases of a trainer an integration knows, and whether the installed one is among them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
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


def _arguments(function: Any) -> list[str] | int:
    """What a caller may rely on: a function's argument names; function.apply is called by position."""
    if isinstance(function, type) and issubclass(function, torch.autograd.Function):
        return len(inspect.signature(function.forward).parameters) - 1
    if isinstance(function, type):
        return len(inspect.signature(function.apply).parameters)  # type: ignore[attr-defined]
    return list(inspect.signature(function).parameters)


def other_arguments(owner: Any, replacements: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(name, arguments, expected) of each function of the owner whose arguments are not its replacement's.

    The arguments are None where the owner has no such function.
    """
    for name, replacement in replacements.items():
        found = getattr(owner, name, None)
        arguments, expected = None if found is None else _arguments(found), _arguments(replacement)
        if arguments != expected:
            yield name, arguments, expected
