"""Losses that are methods of TRL's trainer classes: which are replaced, and when."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from trl.trainer.base_trainer import _BaseTrainer

from ..patching import Patch

Replacement = tuple[Any, str, Any]  # as `Patch` takes them
_OURS = __name__.rpartition(".")[0]


@functools.cache  # patches that come and go put the same object there
def replacement(stock: Callable, ours: Callable[..., Any]) -> Callable:
    """A function with the arguments of TRL's that calls ours, or TRL's where ours returns None."""
    if stock.__module__.startswith(_OURS):  # by another patch
        return stock
    signature = inspect.signature(stock)

    @functools.wraps(stock, assigned=("__name__", "__qualname__", "__doc__"))
    def function(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        result = ours(**bound.arguments)
        return stock(*args, **kwargs) if result is None else result

    function.__module__ = ours.__module__
    return function


def own(cls: type, name: str) -> bool:
    """Whether the class is TRL's and has such an attribute itself."""
    return cls.__module__.startswith("trl.") and name in vars(cls)


def _subclasses(cls: type) -> set[type]:
    return {cls}.union(*map(_subclasses, cls.__subclasses__()))


def patch_trainers(patch: Patch, replacements: Callable[[type], Iterable[Replacement]]) -> None:
    """Adds the replacements for each of TRL's trainer classes to the patch, of those that exist and of those
    made later.

    They are in trl.experimental, which is not imported for those who do not use it.
    """
    earlier = vars(_BaseTrainer).get("__init_subclass__")

    def __init_subclass__(cls, **kwargs):
        if earlier is None:
            super(_BaseTrainer, cls).__init_subclass__(**kwargs)
        else:
            earlier.__func__(cls, **kwargs)
        patch.extend(replacements(cls))

    now = [replaced for cls in _subclasses(_BaseTrainer) for replaced in replacements(cls)]
    patch.extend([(_BaseTrainer, "__init_subclass__", classmethod(__init_subclass__)), *now])
