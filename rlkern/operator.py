"""The one mechanism behind every primitive: an operator of PyTorch, with its gradient in closed form.

An operator is opaque on purpose: torch.compile keeps it whole and fuses the [B, T] arithmetic around it.
This is the only file that names torch.library or functorch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends

DEBUG = os.environ.get("RLKERN_DEBUG", "0") == "1"  # also check values on a GPU, at the price of a sync
_ABSENT = (0,) * 6  # stands for None among an operator's results; no result has six dimensions

_library = torch.library.Library("rlkern", "DEF")


_ORDINARY = (Tensor, torch.nn.Parameter)
_is_compiling, _dispatch_modes = torch.compiler.is_compiling, torch._C._len_torch_dispatch_stack
_transform = torch._C._functorch.peek_interpreter_stack  # torch.func's, or None
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # as in jacobian(vectorize=True)


_Mode = torch._C._TorchDispatchModeKey
_TRACERS = (_Mode.FAKE, _Mode.PROXY, _Mode.FUNCTIONAL)  # dispatch modes that record operators, as in make_fx


def traced(x: Tensor) -> bool:
    """Whether only operators will do: x is compiled, a tensor subclass (FakeTensor, DTensor) or a meta
    tensor, or a mode records what is called. Modes that only count may see into operators."""
    if _is_compiling() or type(x) not in _ORDINARY or x.is_meta:
        return True
    return _dispatch_modes() > 0 and any(torch._C._get_dispatch_mode(key) is not None for key in _TRACERS)


def watched(x: Tensor) -> bool:
    """Whether x or a dispatch mode needs to see operators. If not, dispatch is pure overhead."""
    return traced(x) or _dispatch_modes() > 0


def in_transform() -> bool:
    """Whether a transform of torch.func is active: it takes PyTorch's own operations alone."""
    return not _is_compiling() and _transform() is not None


def transformed(x: Tensor) -> bool:
    """`in_transform`, or x is a batch of gradients, as in jacobian(vectorize=True), which takes the same."""
    return not _is_compiling() and (_transform() is not None or _is_batched(x))


def values_readable(x: Tensor) -> bool:
    """Whether the host may read x: its values are on the CPU, or RLKERN_DEBUG=1 asks to wait for them."""
    own_values = type(x) in _ORDINARY or type(x).__torch_dispatch__ is Tensor.__torch_dispatch__
    if not own_values or _is_compiling() or x.is_meta or _dispatch_modes() > 0:
        return False
    return DEBUG or x.device.type == "cpu"


def _without_none(x: Tensor, results: Any) -> Any:
    """The results with tensors in place of None: an operator may only return tensors."""
    if isinstance(results, tuple):
        return tuple(x.new_empty(_ABSENT) if r is None else r for r in results)
    return results


def _with_none(results: Any) -> Any:
    if isinstance(results, (tuple, list)):
        return tuple(None if r.shape == _ABSENT else r for r in results)
    return results


class Operator:
    """An operator without gradient, called like the function behind it, which runs directly unless watched.

    Args:
        schema: such as "name(Tensor x, Tensor? mask, float scale) -> (Tensor, Tensor)". Tensors come first.
            One that comes later takes no gradient and is not saved: the backward gets it as it is by then.
        run: the implementation. It may return None for a result that was not asked for.
        fake: returns new tensors of the results' shapes and dtypes, and computes nothing.
        plain: the same in PyTorch's own operations, with gradient. It replaces the kernels under
            torch.compile and torch.func, for meta tensors and in the reference backend.
    """

    def __init__(self, schema: str, run: Callable, fake: Callable, plain: Callable | None = None):
        self.name, self.run, self.plain = schema.partition("(")[0], run, plain
        arguments = schema.partition("(")[2].split(", ")
        self.tensors = len(list(takewhile(lambda argument: argument.startswith("Tensor"), arguments)))  # how many come first
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(self.name, lambda x, *args: _without_none(x, run(x, *args)), "CompositeExplicitAutograd")
        torch.library.register_fake(f"rlkern::{self.name}", lambda x, *args: _without_none(x, fake(x, *args)), lib=_library)
        self.op = getattr(torch.ops.rlkern, self.name).default

    def __call__(self, x: Tensor, *args: Any) -> Any:
        looked_at = watched(x) or _transform() is not None
        if self.plain is not None:
            # torch.compile fuses the plain form, torch.func transforms it, and the reference backend
            # differentiates it any number of times.
            if looked_at and (_is_compiling() or x.is_meta or _transform() is not None):
                return self.plain(x, *args)
            if backends.select(x.device) is backends.reference:
                return self.plain(x, *args)
        if not looked_at:
            return self.run(x, *args)
        with torch.no_grad():
            return _with_none(self.op(x, *args))


class Steps:
    """Operators with collectives between them, in place of one operator.

    Args:
        name: what no operator has.
        steps: steps(call, *arguments), where call(operator, *arguments) runs one. Traced, that gives the
            operator's own results, with a tensor in place of a None.
        operators: all that it may call.
    """

    def __init__(self, name: str, steps: Callable, *operators: Operator):
        self.name, self.steps, self.operators, self.tensors = name, steps, operators, operators[0].tensors

    def run(self, *args: Any) -> Any:
        return self.steps(_directly, *args)

    def op(self, *args: Any) -> Any:
        return _without_none(args[0], self.steps(_dispatched, *args))


def _directly(operator: Operator, *args: Any) -> Any:
    return operator.run(*args)


def _dispatched(operator: Operator, *args: Any) -> Any:
    return operator.op(*args)


class _Once(torch.autograd.Function):
    """Identity on a gradient that must not be differentiated again."""

    @staticmethod
    def forward(ctx, gradient, x, instead):
        ctx.instead = instead
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(f"rlkern's gradients cannot be differentiated a second time; where you need that, {ctx.instead}")


def once(gradient: Tensor, x: Tensor, instead: str) -> Tensor:
    """A gradient by x from a backward under create_graph=True. Differentiating it is an error."""
    return _Once.apply(gradient, x, instead)


def refuse_torch_func(operator: Operator) -> None:
    """For an operator that a Function differentiates."""

    def refuse(ctx, *grads):
        raise RuntimeError("rlkern's operators are differentiated by torch.autograd, once, through rlkern's functions; not by torch.func")

    # Without this, torch.compile(torch.func.grad(f)) silently returns zeros (pytorch/pytorch#193279).
    torch.library.register_autograd(f"rlkern::{operator.name}", refuse, setup_context=lambda ctx, inputs, output: None, lib=_library)


class _Rule(NamedTuple):
    """What `differentiable` was told."""

    forward: Operator | Steps
    backward: Operator | Steps
    overwrite: Operator | Steps | None
    consume: Operator | Steps | None
    outputs: int
    shown: int  # outputs and constants
    wrt: int
    instead: str


_refusing: set[str] = set()
_rules: dict[str, _Rule] = {}  # by the forward's name: Dynamo of torch 2.6 follows a global, and not a closure


def _run(operator: Operator | Steps, args: Sequence, batched: bool = False) -> Any:
    if not batched and not watched(args[0]):
        return operator.run(*args)
    results = operator.op(*args)
    return results if _is_compiling() else _with_none(results)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, *tensors):
        rule = _rules[call[0]]
        forward, outputs, shown = rule.forward, rule.outputs, rule.shown
        results = _run(forward, (*tensors, *call[1]))
        if not isinstance(results, tuple):
            results = (results,)
        ctx.save_for_backward(*tensors, *results[shown:])
        ctx.call, ctx.consumed = call, False
        ctx.set_materialize_grads(False)
        if outputs < shown:
            constants = [x for x in results[outputs:shown] if x is not None]
            if constants:
                ctx.mark_non_differentiable(*constants)
        if _is_compiling():  # Dynamo of torch 2.6 has no place for a None among the results
            ctx.absent = [x.shape == _ABSENT for x in results[:shown]]
        return results[:shown]

    @staticmethod
    def backward(ctx, *grads):
        around = ctx.call[3]
        if around is None:
            return _gradients(ctx, grads)
        with around():
            return _gradients(ctx, grads)


def _gradients(ctx: Any, grads: Sequence) -> tuple:
    rule, saved = _rules[ctx.call[0]], ctx.saved_tensors
    if _is_compiling():  # it hands zeros to the results that were not asked for
        grads = tuple(None if absent else g for g, absent in zip(grads, ctx.absent, strict=True))
        gradients = _derivative(rule, ctx, saved, grads)
    elif grads[0] is None and all(g is None for g in grads):
        gradients = ()
    elif torch.is_grad_enabled():  # create_graph=True
        with torch.no_grad():
            gradients = _derivative(rule, ctx, saved, grads)
        pairs = zip(gradients, saved, strict=False)
        gradients = tuple(None if g is None else once(g, x, rule.instead) for g, x in pairs)
    else:
        gradients = _derivative(rule, ctx, saved, grads)
    return (None, *gradients, *(None,) * (rule.forward.tensors - len(gradients)))


def only_values(tensors: Sequence[Tensor | None]) -> bool:
    """Whether nothing can ask for a derivative: then a call needs no Function, which takes 6 us."""
    if _is_compiling() or _transform() is not None or forward_ad._current_level >= 0:
        return False
    return not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in tensors)


def _first(grads: Sequence[Tensor | None]) -> Tensor | None:
    for g in grads:
        if g is not None:
            return g
    return None


def _derivative(rule: _Rule, ctx: Any, saved: Sequence, grads: Sequence) -> tuple[Tensor | None, ...]:
    n, (_, options, in_place, _) = rule.forward.tensors, ctx.call
    kept, backward = saved[n:], rule.backward
    compiling = _is_compiling()
    if compiling:
        kept = _with_none(kept)
    batched = not compiling and _is_batched(_first(grads))  # type: ignore[arg-type]  # one is there
    if rule.consume is not None and not compiling:
        last = None if ctx.consumed else kept[-1]
        if not batched:
            backward, ctx.consumed = rule.consume, True
            # With a version of its own: nobody but this Function can read it, and that knows that it is gone.
            last = None if last is None else last.data
        kept = (*kept[:-1], last)
    args = (*saved[:n], *options, *kept, *grads[: rule.outputs])
    overwrites = rule.overwrite is not None and in_place and ctx.needs_input_grad[1] and not batched and not compiling
    gradients: tuple[Tensor | None, ...] = (None,) * rule.wrt
    if rule.wrt > 1:
        wanted = [w and not (overwrites and i == 0) for i, w in enumerate(ctx.needs_input_grad[1 : 1 + rule.wrt])]
        if any(wanted):
            results = _run(backward, (*args, wanted), batched)
            gradients = tuple(g if want else None for g, want in zip(results, wanted, strict=True))
    elif not overwrites:
        gradients = (_run(backward, args, batched),)
    if not overwrites:
        return gradients
    _run(rule.overwrite, args)  # type: ignore[arg-type]
    torch.autograd.graph.increment_version(args[0])
    return (args[0].detach(), *gradients[1:])


def differentiable(
    forward: Operator | Steps,
    backward: Operator | Steps,
    *,
    outputs: int = 1,
    constants: int = 0,
    wrt: int = 1,
    instead: str,
    overwrite: Operator | Steps | None = None,
    consume: Operator | Steps | None = None,
) -> Callable:
    """The forward as a function with gradients, which the backward computes.

    Called with the forward's arguments, it returns the first `outputs` results, which carry gradients, and
    the next `constants`, which do not. One that was not asked for is None. All further results are kept for
    this call, in the context around() if the function was called with around=:

        backward(*arguments, *kept results, *gradients by the outputs, each may be None)

    It returns the gradient by the first argument. With `wrt` > 1 it gets one more argument: a list that says
    which of the first `wrt` arguments want a gradient. It then returns `wrt` gradients or None.

    Args:
        instead: what can be differentiated twice. The error for a second derivative names it.
        overwrite: the backward in place. Called with in_place=True, the function writes the gradient over its
            first argument. Whoever else saved that tensor gets PyTorch's error, not a wrong number.
        consume: the backward that may write over the last kept result, and over tensors among the options. It
            runs where nothing is compiled. From the second time on (retain_graph=True) that result is None.
    """
    for part in (forward, backward):
        for operator in part.operators if isinstance(part, Steps) else (part,):
            if operator.name not in _refusing:
                _refusing.add(operator.name)
                refuse_torch_func(operator)
    n, name, shown = forward.tensors, forward.name, outputs + constants
    _rules[name] = _Rule(forward, backward, overwrite, consume, outputs, shown, wrt, instead)

    def apply(*args: Any, in_place: bool = False, around: Callable | None = None) -> Any:
        if only_values(args[:n]):
            results = _run(forward, args)
            results = results[:shown] if isinstance(results, tuple) else (results,)
        else:
            results = _Function.apply((name, args[n:], in_place, around), *args[:n])
            results = _with_none(results) if _is_compiling() else results
        return results if shown > 1 else results[0]

    return apply
