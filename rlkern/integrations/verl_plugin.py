"""Importing this registers rlkern's losses with verl and patches it.

verl imports it when told actor_rollout_ref.model.external_lib=rlkern.integrations.verl_plugin. Variables say
what `register` and `patch` are given; docs/trainers/verl.md shows how they reach verl's Ray workers.

    RLKERN_VERL_LOSSES              names, comma-separated: "clip_cov,tis"; "none": no loss; unset, all
    RLKERN_VERL_OPTIONS             JSON, name -> options: {"tis": {"cap": 2.0}}
    RLKERN_VERL_PATCH               "0" leaves verl's log-probabilities and entropy alone; unset, "1"
    RLKERN_VERL_PACKED              "1" is verl_packed.patch(): the actor loss without padding; unset, "0"
    RLKERN_VERL_INPLACE_BACKWARD    "1" is patch(inplace_backward=True), a promise: see there; unset, "0"

Raises ValueError for another variable of that prefix, a value that is none of these, and one that would have
no effect; TypeError and ValueError as `register` does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from . import verl_packed
from .verl import patch, register

_PREFIX = "RLKERN_VERL_"
_VARIABLES = ("LOSSES", "OPTIONS", "PATCH", "PACKED", "INPLACE_BACKWARD")


def _switch(settings: Mapping[str, str], name: str, default: str) -> bool:
    value = settings.get(name, default)
    if value not in ("0", "1"):
        raise ValueError(f"{_PREFIX}{name} must be '0' or '1', got {value!r}")
    return value == "1"


def _options(settings: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    text = settings.get("OPTIONS", "{}")
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{_PREFIX}OPTIONS must be JSON, got {text!r}: {error}") from None
    if not isinstance(options, dict) or not all(isinstance(own, dict) for own in options.values()):
        raise ValueError(f'{_PREFIX}OPTIONS must be a JSON object of objects, as {{"tis": {{"cap": 2.0}}}}, got {text!r}')
    return options


def _apply(environment: Mapping[str, str]) -> None:
    settings = {key.removeprefix(_PREFIX): value for key, value in environment.items() if key.startswith(_PREFIX)}
    for name in settings:
        if name not in _VARIABLES:
            raise ValueError(f"unknown variable {_PREFIX}{name}, expected one of {', '.join(_PREFIX + known for known in _VARIABLES)}")
    patches, inplace = _switch(settings, "PATCH", "1"), _switch(settings, "INPLACE_BACKWARD", "0")
    if inplace and not patches:
        raise ValueError(f"{_PREFIX}INPLACE_BACKWARD=1 has no effect with {_PREFIX}PATCH=0: drop one of them")
    options = _options(settings)
    losses, packs = settings.get("LOSSES"), _switch(settings, "PACKED", "0")
    if packs and losses == "none":
        raise ValueError(f"{_PREFIX}PACKED=1 has no effect with {_PREFIX}LOSSES=none: drop one of them")
    if losses != "none":
        register(*([] if losses is None else [name.strip() for name in losses.split(",")]), options=options)
    elif options:
        raise ValueError(f"{_PREFIX}OPTIONS has no effect with {_PREFIX}LOSSES=none: drop one of them")
    if patches:
        patch(inplace_backward=inplace)
    if packs:
        verl_packed.patch()


_apply(os.environ)
