"""Which releases of TRL this integration knows, and what is replaced in each."""

from __future__ import annotations

import inspect
from typing import Any

import trl
import trl.trainer.utils

from . import functions, lm_head

_FUNCTIONS = {
    "selective_log_softmax": functions.selective_log_softmax,
    "entropy_from_logits": functions.entropy_from_logits,
    "selective_log_softmax_and_entropy": functions.selective_log_softmax_and_entropy,
}
# In trl.trainer.utils, by (major, minor)
REPLACEMENTS: dict[tuple[int, int], dict[str, Any]] = {
    (1, 14): {**_FUNCTIONS, "_ChunkedLogProbFunction": lm_head.LogpAndEntropy},
    (1, 15): {**_FUNCTIONS, "_ChunkedLogProbFunction": lm_head.FusedLMHead},
    (1, 16): {**_FUNCTIONS, "_ChunkedLogProbFunction": lm_head.FusedLMHead},
}


class UnknownTRLError(ImportError):
    """The installed TRL is a release that this integration has not been tested with."""


def _refuse(why: str) -> UnknownTRLError:
    known = ", ".join(f"{major}.{minor}" for major, minor in REPLACEMENTS)
    return UnknownTRLError(
        f"rlkern.integrations.trl does not know TRL {trl.__version__}: {why}. It knows {known}; nothing has been changed. "
        f"Install one of these (pip install 'trl~={known.split(', ')[-1]}.0') or a newer rlkern."
    )


def _release() -> tuple[int, int]:
    try:
        major, minor = map(int, trl.__version__.split(".")[:2])
    except ValueError:
        raise _refuse("its version cannot be read") from None
    if (major, minor) not in REPLACEMENTS:
        raise _refuse("its functions may mean something else")
    return major, minor


def _arguments(function: Any) -> list[str] | int:
    """What a caller may rely on: a function's argument names; an autograd.Function is called by position."""
    if isinstance(function, type):
        return len(inspect.signature(function.forward).parameters) - 1
    return list(inspect.signature(function).parameters)


def known_replacements() -> dict[str, Any]:
    """Name in trl.trainer.utils -> what replaces it.

    Raises:
        UnknownTRLError: for a release other than those in `REPLACEMENTS`, or one of them whose functions take other arguments.
    """
    replacements = REPLACEMENTS[_release()]
    for name, replacement in replacements.items():
        found = getattr(trl.trainer.utils, name, None)
        if found is None:
            raise _refuse(f"it has no trl.trainer.utils.{name}")
        if _arguments(found) != _arguments(replacement):
            raise _refuse(f"the arguments of its {name} are {_arguments(found)}, expected {_arguments(replacement)}")
    return replacements
