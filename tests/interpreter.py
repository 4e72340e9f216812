"""Triton's interpreter, faster, and in old Tritons with the maxima that a GPU has."""

import functools
import inspect

import numpy as np
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


def pass_over_nan() -> None:
    """The larger of a number and a NaN is the number on a GPU, and in this interpreter from Triton 3.9 on."""
    builder, reduce = interpreter.InterpreterBuilder, interpreter.ReduceOps
    builder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    builder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)
    min_max, passing = reduce.min_max, {np.max: np.nanmax, np.min: np.nanmin}

    def min_max_of_numbers(self, value, val_reduce_op, idx_reduce_op=None):
        return min_max(self, value, passing.get(val_reduce_op, val_reduce_op), idx_reduce_op)

    reduce.min_max = min_max_of_numbers
