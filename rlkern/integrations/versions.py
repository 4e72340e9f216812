"""Which releases of a trainer an integration knows, and whether the installed one is among them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Releases:
    """The releases of a trainer that an integration was tested with.

    Args:
        trainer: its name.
        version: returns that of the installed one; ModuleNotFoundError without one.
        used_by: what of rlkern's needs the trainer.
        known: the versions tested.
        install: for pip, to get one of these.
        parts: so many numbers of a version count, 2 for "1.16"; None counts all.
        error: what to raise for a release that is not known.
    """

    trainer: str
    version: Callable[[], str]
    used_by: str
    known: tuple[str, ...]
    install: str
    parts: int | None = None
    error: type[ImportError] = ImportError

    def refusal(self, why: str) -> ImportError:
        """The error for the installed release."""
        return self.error(
            f"{self.trainer} {self.version()} is not supported by {self.used_by}: {why}. It knows "
            f"{', '.join(self.known)}; nothing has been changed. Install one of these (pip install '{self.install}') "
            f"or a newer rlkern, or train without {self.used_by}"
        )

    def check(self) -> str:
        """The one of `known` that is installed. Raises ImportError if none is."""
        try:
            version = self.version()
        except ModuleNotFoundError as error:
            if error.name != self.trainer.lower():  # the trainer is there, and something that it needs is not
                raise
            raise ImportError(f"{self.used_by} needs {self.trainer}: pip install '{self.install}'") from None
        release = ".".join(version.split(".")[: self.parts])
        if release not in self.known:
            raise self.refusal("its functions may mean something else")
        return release


def _arguments(function: Any) -> list[str] | int:
    """What a caller may rely on: a function's argument names; an autograd.Function is called by position."""
    if isinstance(function, type):
        return len(inspect.signature(function.forward).parameters) - 1
    return list(inspect.signature(function).parameters)


def other_arguments(owner: Any, replacements: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(name, arguments, ours) for each function of the owner that takes other arguments than what is to replace it.

    The arguments are None where it has no such function.
    """
    for name, replacement in replacements.items():
        found = getattr(owner, name, None)
        arguments, ours = None if found is None else _arguments(found), _arguments(replacement)
        if arguments != ours:
            yield name, arguments, ours
