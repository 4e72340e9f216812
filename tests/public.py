"""What rlkern offers: every public name, in whichever namespace."""

from __future__ import annotations

import inspect
from typing import Any

import rlkern

_SPACES = {"": rlkern} | {f"{name}.": getattr(rlkern, name) for name in ("advantages", "losses", "diffusion", "metrics", "selection")}


def _offered() -> dict[str, Any]:
    """Shortest name -> what it names. Of a module only what it exports."""
    found = {}
    for prefix, space in _SPACES.items():
        names = [n for n in vars(space) if not n.startswith("_")] if space is rlkern.losses else space.__all__
        for name in names:
            value = getattr(space, name)
            if callable(value) and not any(value is other for other in found.values()):
                found[prefix + name] = value
    return found


OFFERED = _offered()
FUNCTIONS = {name: value for name, value in OFFERED.items() if inspect.isfunction(value)}


def public(name: str) -> Any:
    """By its name without the namespace, unless that is advantages."""
    return next(value for full, value in OFFERED.items() if full == name or full.partition(".")[2] == name and not full.startswith("adv"))
