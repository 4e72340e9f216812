"""Which process groups rlkern's stand-ins for functions of vocabulary-parallel logits can serve."""

from __future__ import annotations

from typing import Any

from torch import distributed


def check_one_rank(group: Any, trainer: str) -> None:
    """ValueError if the group has several ranks. None is the default group, if there is one."""
    spread = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size(group) > 1
    if spread or (group is not None and not distributed.is_initialized() and group.size() > 1):
        raise ValueError(
            f"tp_group: vocabulary-parallel logits are not supported, expected a group of one rank; {trainer} must run with tensor parallel size 1"
        )
