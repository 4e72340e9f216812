"""Triton's interpreter, faster."""

import functools
import inspect

from triton.language.core import is_builtin
from triton.runtime import interpreter


@functools.cache
def _builtins(package) -> list[str]:
    return [name for name, member in inspect.getmembers(package) if is_builtin(member)]


def _patch_builtin(package, builder, *scope) -> None:
    if is_builtin(getattr(package, _builtins(package)[0])):  # else all are patched
        for name in _builtins(package):
            interpreter._patch_attr(package, name, getattr(package, name), builder, *scope)


def look_up_the_language_once() -> None:
    """Triton searches all of its language for what it replaces, at every call of a function by a kernel. That
    is half of the time that our kernels take."""
    interpreter._patch_builtin = _patch_builtin
