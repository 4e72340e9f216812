"""Which releases of TRL this integration knows, and what is replaced in each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import trl
import trl.trainer.utils

from ..versions import Releases, other_arguments
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


_BY_RELEASE = {f"{major}.{minor}": replacements for (major, minor), replacements in REPLACEMENTS.items()}
_USER = "rlkern.integrations.trl"
_RELEASES = Releases("TRL", lambda: trl.__version__, _USER, tuple(_BY_RELEASE), "rlkern[trl]", 2, UnknownTRLError)


def known_replacements() -> dict[str, Any]:
    """Name in trl.trainer.utils -> what replaces it.

    Raises:
        UnknownTRLError: for a release other than those in `REPLACEMENTS`, or one of them whose functions take
            other arguments.
    """
    replacements = _BY_RELEASE[_RELEASES.check()]
    for name, found, expected in other_arguments(trl.trainer.utils, replacements):
        if found is None:
            raise _RELEASES.refusal(f"it has no trl.trainer.utils.{name}")
        raise _RELEASES.refusal(f"the arguments of its {name} are {found}, expected {expected}")
    return replacements


def check_arguments(name: str, function: Callable, *known: Sequence[str]) -> None:
    """Raises UnknownTRLError unless the function of TRL takes these arguments, of one of some releases."""
    found = list(inspect.signature(function).parameters)
    if found not in [list(arguments) for arguments in known]:
        raise _RELEASES.refusal(f"the arguments of its {name} are {found}, expected {' or '.join(str(list(a)) for a in known)}")
