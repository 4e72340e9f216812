"""Triton's interpreter, faster, and in old Tritons with the maxima that a GPU has."""

import dataclasses
import functools
import inspect

import numpy as np
from triton.language import core
from triton.language.core import is_builtin
from triton.runtime import interpreter


@functools.cache
def _builtins(package) -> list[str]:
    return [name for name, member in inspect.getmembers(package) if is_builtin(member)]


def _is_patched(package) -> bool:
    return not is_builtin(getattr(package, _builtins(package)[0]))  # else all are patched


def _patch_builtin(package, builder, *scope) -> None:
    if not _is_patched(package):
        for name in _builtins(package):
            interpreter._patch_attr(package, name, getattr(package, name), builder, *scope)


@functools.cache
def _languages(function) -> list:
    return [value for value in function.__globals__.values() if value is interpreter.tl or value is core]


def look_up_the_language_once() -> None:
    """Triton searches all of its language for what it replaces, at every call of a function by a kernel. That
    is half of the time that our kernels take."""
    patch = interpreter._patch_lang

    def patch_lang(function):
        if not all(map(_is_patched, _languages(function))):  # else the kernel that calls it has done so
            return patch(function)

    interpreter._patch_builtin, interpreter._patch_lang = _patch_builtin, patch_lang


def describe_types_once() -> None:
    """What Triton derives from a type, it derives anew for every intermediate result. And it adds integers
    twice, the second time with 64 bits, for an assertion that it skips. Without both, and patched once, our
    kernels take a third of the time."""
    builder, tensor = interpreter.interpreter_builder, core.tensor
    np_dtype, init = interpreter._get_np_dtype, tensor.__init__
    np_dtypes, blocks, attributes = {}, {}, {}  # by name, by name and shape, by shape

    def get_np_dtype(dtype):
        name = dtype.scalar.name
        if name not in np_dtypes:
            np_dtypes[name] = np_dtype(dtype)
        return np_dtypes[name]

    def block_type(element, shape):
        key = element.name, *shape
        if key not in blocks:
            blocks[key] = core.block_type(element, shape)
        return blocks[key]

    def init_tensor(self, handle, type):
        shape = tuple(type.shape) if type.is_block() else ()
        if shape not in attributes:
            init(self, handle, type)
            attributes[shape] = dict(vars(self))
        vars(self).update(attributes[shape], handle=handle, type=type, dtype=type.scalar)

    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    builder.get_block_ty, core.block_type.with_element_ty = block_type, lambda self, element: block_type(element, self.shape)
    interpreter._get_np_dtype, tensor.__init__ = get_np_dtype, init_tensor


def pass_over_nan() -> None:
    """The larger of a number and a NaN is the number on a GPU, and in this interpreter from Triton 3.9 on."""
    builder, reduce = interpreter.InterpreterBuilder, interpreter.ReduceOps
    builder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    builder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)
    min_max, passing = reduce.min_max, {np.max: np.nanmax, np.min: np.nanmin}

    def min_max_of_numbers(self, value, val_reduce_op, idx_reduce_op=None):
        return min_max(self, value, passing.get(val_reduce_op, val_reduce_op), idx_reduce_op)

    reduce.min_max = min_max_of_numbers
