"""Checks that every exported loss inherits. A loss registers a small case; test_loss_battery.py checks it.

    @register("ppo_loss", mask="mask")
    def ppo(g, batch, length):
        # float64, int64 or bool; then the names of the inputs that gradients flow into
        inputs = dict(logp=g.normal(batch, length), old_logp=..., mask=g.mask(batch, length))
        return inputs, ("logp",)

Metrics, and what a trainer prepares beforehand, name no such input: then no result may carry a gradient.

The check functions below take a `Case`. The docstring of each says what a loss promises.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import pathlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from public import public
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rlkern

BATCH, LENGTH = 4, 6


class Draw:
    """Reproducible inputs in float64."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        return mean + std * torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def logp(self, *shape: int) -> Tensor:
        """Log-probabilities of tokens: negative, well inside the range of every format."""
        return -0.05 - 2 * torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def mask(self, batch: int, length: int) -> Tensor:
        """Sequences of different lengths, the first one full."""
        ends = self.integers(1, length + 1, batch)
        ends[:1] = length
        return torch.arange(length) < ends.unsqueeze(-1)


@dataclass(frozen=True)
class Case:
    """A loss with inputs to try it on. `name` is the exported one, `label` tells its cases apart."""

    name: str
    draw: Callable[[Draw, int, int], tuple[dict[str, Tensor], tuple[str, ...]]]
    options: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    mask: str | None = None  # the input that says which [B, T] tokens count, if there is one
    empty: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None  # inputs -> inputs without a token; by default mask = 0
    counted: Callable[[dict[str, Tensor]], Tensor] | None = None  # inputs -> bool [B, T] of the tokens that count; by default mask != 0
    zero_when_empty: bool = True
    naive: Callable[..., Tensor] | None = None  # where parts are detached on purpose: **inputs -> scalar with the right float64 autograd gradient
    of_whole: tuple[str, ...] = ()  # metrics that do not merge because the loss selects or scales over the batch that it is given
    seed: int = 0
    function: Callable | None = None  # the loss itself, if rlkern does not export it under that name
    adds_gradients: bool = False  # autograd adds up two gradients that are rounded already: as accurate as the largest entry, not as each

    def __str__(self) -> str:
        return f"{self.name}[{self.label}]" if self.label else self.name

    def inputs(self, batch: int = BATCH, length: int = LENGTH) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        return self.draw(Draw(self.seed), batch, length)

    def __call__(self, inputs: dict[str, Tensor]):
        return (self.function or public(self.name))(**inputs, **self.options)

    def without_tokens(self, inputs: dict[str, Tensor]) -> dict[str, Tensor] | None:
        if self.empty is not None:
            return self.empty(inputs)
        return None if self.mask is None else inputs | {self.mask: torch.zeros_like(inputs[self.mask])}

    def tokens(self, inputs: dict[str, Tensor]) -> Tensor | None:
        if self.counted is not None:
            return self.counted(inputs)
        return None if self.mask is None else inputs[self.mask] != 0


CASES: list[Case] = []


def register(name: str, **fields):
    """Decorates the draw of a loss's inputs: (draw, batch, length) -> (inputs, differentiable ones)."""

    def decorator(draw):
        case = Case(name=name, draw=draw, **fields)
        if any(str(other) == str(case) for other in CASES):
            raise ValueError(f"the case {case} is registered already: give it a label")
        CASES.append(case)
        return draw

    return decorator


def drawing(*wrt: str, base=lambda *shape: ({}, ()), **fields: Callable[[Draw, int, int], Tensor]):
    """What draws the inputs of `base` and these fields. Gradients flow into `wrt` as well."""

    def draw(g, batch, length):
        inputs, names = base(g, batch, length)
        return inputs | {name: field(g, batch, length) for name, field in fields.items()}, (*names, *wrt)

    return draw


def a_sequence(method, **options):
    """A field of `drawing` with one number for each sequence, from a method of `Draw`."""
    return lambda g, batch, length: method(g, batch, **options)


def tensors_of(output) -> list[Tensor]:
    """All tensors of an output, through tuples and dicts."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = tuple(output.values())
    return [t for part in output for t in tensors_of(part)] if isinstance(output, tuple) else []


def total(output) -> Tensor:
    """The number to differentiate: the sum of the first tensor, which is the loss in every output."""
    return tensors_of(output)[0].sum()


def as_leaves(inputs: dict[str, Tensor], wrt: tuple[str, ...], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Copies; floats in `dtype`, gradients required by `wrt`."""
    copies = {}
    for name, x in inputs.items():
        floating = isinstance(x, Tensor) and x.dtype.is_floating_point
        x = x.detach().clone().to(dtype if floating and dtype is not None else x.dtype) if isinstance(x, Tensor) else x
        copies[name] = x.requires_grad_() if name in wrt else x
    return copies


def grad(output, leaves: dict[str, Tensor], wrt: tuple[str, ...]) -> list[Tensor]:
    """Gradients of the loss. Zero for an input that it does not use, an error if it uses none."""
    if not wrt:
        return []
    return list(torch.autograd.grad(total(output), [leaves[name] for name in wrt], allow_unused=True, materialize_grads=True))


def gradients(case: Case, inputs: dict[str, Tensor], wrt: tuple[str, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """(all output tensors, gradients by `wrt`)."""
    output = case(inputs)
    return tensors_of(output), grad(output, inputs, wrt)


def assert_same(actual: list[Tensor], expected: list[Tensor], rtol: float, atol: float, what: str, smallest: float = 0) -> None:
    """atol is a part of the largest finite entry expected: gradients of a mean over 1,000 tokens are small.
    From the second tensor on that entry counts as at least `smallest`: a metric like log_mean_ratio is 0
    on-policy, and as accurate as the numbers around 1 that it is made of."""
    assert len(actual) == len(expected), f"{what}: {len(actual)} tensors, expected {len(expected)}"
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        a, e = a.double(), e.double()
        scale = max([x for x in e.abs().flatten().tolist() if x < math.inf], default=0)
        scale = max(scale, smallest) if i > 0 else scale
        torch.testing.assert_close(a, e, rtol=rtol, atol=atol * scale, msg=lambda m, i=i: f"{what}, tensor {i}: {m}")


def check_gradient(case: Case) -> None:
    """The gradient is that of the value, or where parts are detached on purpose that of a naive loss."""
    inputs, wrt = case.inputs()
    leaves = as_leaves(inputs, wrt)
    if case.naive is not None:
        again = as_leaves(inputs, wrt)
        assert_same(gradients(case, leaves, wrt)[1], grad(case.naive(**again), again, wrt), 1e-9, 1e-11, "gradient against the naive loss")
        return

    def function(*args):
        return total(case(inputs | dict(zip(wrt, args, strict=True))))

    assert torch.autograd.gradcheck(function, [leaves[name] for name in wrt], atol=1e-6, rtol=1e-5, fast_mode=True)


def check_precision(case: Case, dtype: torch.dtype) -> None:
    """Whatever the inputs' dtype, arithmetic is float32: outputs agree with float64 on the rounded inputs,
    gradients up to their own rounding."""
    inputs, wrt = case.inputs()
    low = as_leaves(inputs, wrt, dtype)
    high = as_leaves(low, wrt, torch.float64)
    outputs, grads = gradients(case, low, wrt)
    expected_outputs, expected_grads = gradients(case, high, wrt)
    for t in outputs:
        assert not t.dtype.is_floating_point or t.dtype == torch.float32, f"outputs must be float32 for {dtype} inputs, got {t.dtype}"
    for g, name in zip(grads, wrt, strict=True):
        assert g.dtype == dtype and g.shape == low[name].shape, f"the gradient of {name} is {g.dtype} {tuple(g.shape)}"
    assert_same(outputs, expected_outputs, 1e-5, 5e-6, f"{dtype} values", smallest=0.1)
    rtol = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    assert_same(grads, expected_grads, rtol, rtol if case.adds_gradients else 5e-6, f"{dtype} gradients")


def check_strides(case: Case) -> None:
    """A slice of a larger tensor gives what its copy gives, and the gradient stays inside the slice."""
    inputs, wrt = case.inputs()
    leaves = as_leaves(inputs, wrt, torch.float32)
    outputs, grads = gradients(case, leaves, wrt)
    bases, views = {}, {}
    for name, x in leaves.items():
        if not isinstance(x, Tensor) or x.dim() == 0:
            views[name] = x
            continue
        # Every other entry of dimension 0, all but the last of 1: strides that fit no contiguous tensor.
        shape = (2 * x.shape[0], *(n + 1 for n in x.shape[1:2]), *x.shape[2:])
        base = x.detach().new_full(shape, math.nan if x.dtype.is_floating_point else 1)
        region = (slice(None, None, 2), *(slice(0, n) for n in x.shape[1:2]))
        base[region] = x.detach()
        bases[name] = base.requires_grad_() if name in wrt else base
        views[name] = base[region]
    output = case(views)
    base_grads = grad(output, bases, wrt)
    assert_same(tensors_of(output), outputs, 1e-6, 1e-6, "strided values")
    for name, g, expected in zip(wrt, base_grads, grads, strict=True):
        inside = torch.zeros_like(g, dtype=torch.bool)
        inside[(slice(None, None, 2), *(slice(0, n) for n in expected.shape[1:2]))] = True
        assert (g[~inside] == 0).all(), f"gradient of {name} outside the slice"
        assert_same([g[inside].reshape(expected.shape)], [expected], 1e-6, 1e-6, f"strided gradient of {name}")


def check_empty_mask(case: Case) -> None:
    """Where nothing counts the loss is finite and connected, 0 unless the case says otherwise. Its gradient
    is exactly 0."""
    inputs, wrt = case.inputs()
    inputs = case.without_tokens(inputs)
    outputs, grads = gradients(case, as_leaves(inputs, wrt, torch.float32), wrt)
    for t in outputs:
        assert t.isfinite().all(), f"not finite without tokens: {t}"
    assert not case.zero_when_empty or (outputs[0] == 0).all(), f"loss without tokens is {outputs[0]}, expected 0"
    for g in grads:
        assert (g == 0).all(), f"gradient without tokens: {g}"


def check_empty_batch(case: Case) -> None:
    """A batch of size 0 gives finite results (0-d) or empty ones, and gradients of the inputs' shapes."""
    inputs, wrt = case.inputs(batch=0)
    leaves = as_leaves(inputs, wrt, torch.float32)
    outputs, grads = gradients(case, leaves, wrt)
    for t in outputs:
        assert t.isfinite().all(), f"not finite for an empty batch: {t}"
    assert total(outputs[0]) == 0, f"loss of an empty batch is {outputs[0]}, expected 0"
    assert [g.shape for g in grads] == [leaves[name].shape for name in wrt]


def check_masked_garbage(case: Case) -> None:
    """NaN and inf where no token counts change nothing, neither values nor gradients."""
    inputs, wrt = case.inputs()
    counted = case.tokens(inputs)
    assert not counted.all(), "the case masks nothing, so it tests nothing"
    clean, expected = gradients(case, as_leaves(inputs, wrt, torch.float32), wrt)
    for garbage in (math.nan, math.inf, -math.inf):
        poisoned = dict(inputs)
        for name, x in inputs.items():
            if isinstance(x, Tensor) and x.dtype.is_floating_point and x.shape[: counted.dim()] == counted.shape and name != case.mask:
                poisoned[name] = x.clone()
                poisoned[name][~counted] = garbage
        outputs, grads = gradients(case, as_leaves(poisoned, wrt, torch.float32), wrt)
        assert_same(outputs, clean, 0, 0, f"values with {garbage} where masked")
        assert_same(grads, expected, 0, 0, f"gradients with {garbage} where masked")


class Operators(TorchDispatchMode):
    """Records the operators that run: (function, arguments, the tensors that it returns)."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Callable, tuple, list[Tensor]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, [x for x in tree_leaves(out) if isinstance(x, Tensor)]))
        return out


class HostSync(AssertionError):
    pass


class NoSyncingOperators(TorchDispatchMode):
    """Raises HostSync for operators that wait for the device: reading a number, sizes that depend on data."""

    _always = {
        "aten::_local_scalar_dense", "aten::nonzero", "aten::nonzero_numpy", "aten::masked_select", "aten::equal", "aten::is_nonzero",
        "aten::unique_dim", "aten::_unique2", "aten::unique_consecutive", "aten::bincount", "aten::repeat_interleave", "aten::lift_fresh",
    }  # fmt: skip
    _indexing = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in self._always:
            raise HostSync(f"{name} waits for the device, or makes a tensor from Python data")
        if name in self._indexing and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            raise HostSync(f"{name} with a bool index waits for the device to count it")
        return func(*args, **(kwargs or {}))


class NoSyncingMethods(TorchFunctionMode):
    """Raises HostSync for calls that copy to the host. On the CPU they reach no operator: names tell them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("cpu", "tolist", "numpy", "item", "__bool__", "__int__", "__float__", "__index__", "__array__", "tensor", "as_tensor"):
            raise HostSync(f"{name} waits for the device")
        if name == "to" and any(isinstance(a, (str, torch.device)) for a in (*args[1:], *(kwargs or {}).values())):
            raise HostSync(f"to{args[1:]} names a device")
        return func(*args, **(kwargs or {}))


def check_no_host_sync(case: Case) -> None:
    """Neither forward nor backward reads a device value on the host. So a CUDA graph can capture both."""
    inputs, wrt = case.inputs()
    leaves = as_leaves(inputs, wrt, torch.float32)
    with NoSyncingOperators(), NoSyncingMethods():
        gradients(case, leaves, wrt)


def check_compiles(case: Case, backend: str = "aot_eager") -> None:
    """torch.compile makes one graph of it for all shapes, which computes the same, gradients included."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(lambda inputs: case(inputs), fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for batch, length in ((BATCH, LENGTH), (BATCH + 2, LENGTH + 3)):
        inputs, wrt = case.inputs(batch, length)
        outputs, grads = gradients(case, as_leaves(inputs, wrt, torch.float32), wrt)
        leaves = as_leaves(inputs, wrt, torch.float32)
        # Symbolic floats are traced twice; assert_compiles_once looks at coefficients that change.
        with torch._dynamo.config.patch(specialize_float=True):
            output = compiled(leaves)
        assert_same(tensors_of(output), outputs, 1e-5, 1e-6, "compiled values", smallest=0.1)
        assert_same(grad(output, leaves, wrt), grads, 1e-5, 1e-6, "compiled gradients")
        counts.append(counter.frame_count)
    assert counts[0] > 0 and counts[0] == counts[1], "compiled again for another shape"


def check_results_are_writable(case: Case) -> None:
    """A caller may write into any result: no input and no other result changes. The backward runs on what was
    written."""
    inputs, wrt = case.inputs()
    leaves = as_leaves(inputs, wrt, torch.float32)
    reference, expected = gradients(case, leaves, wrt)
    before = {name: x.detach().clone() if isinstance(x, Tensor) else x for name, x in leaves.items()}
    for i in range(len(reference)):
        output = case(leaves)
        tensors = tensors_of(output)
        written = ~reference[i] if reference[i].dtype == torch.bool else 2 * reference[i]
        tensors[i].logical_not_() if tensors[i].dtype == torch.bool else tensors[i].mul_(2)
        for j, (t, r) in enumerate(zip(tensors, reference, strict=True)):
            assert_same([t], [written if i == j else r], 0, 0, f"result {j} after writing into result {i}")
        assert_same(grad(output, leaves, wrt), [2 * g if i == 0 else g for g in expected], 1e-6, 1e-7, f"gradients after writing into result {i}")
    for name, x in leaves.items():
        if isinstance(x, Tensor):
            assert torch.equal(x.detach(), before[name]), f"{name} was changed"


def check_only_wrt_has_gradient(case: Case) -> None:
    """Nothing else takes a gradient: old and reference log-probabilities are detached. Advantages and weights
    that require one are refused by name."""
    inputs, wrt = case.inputs()
    others = [name for name, x in inputs.items() if name not in wrt and isinstance(x, Tensor) and x.dtype.is_floating_point]
    for refused in [name for name in others if refuses_gradient(case, inputs, name)]:
        others.remove(refused)
    leaves = as_leaves(inputs, (*wrt, *others))
    tensors = tensors_of(case(leaves))
    grads = torch.autograd.grad(tensors[0].sum(), [leaves[name] for name in others], allow_unused=True) if others and wrt else ()
    for name, g in zip(others if wrt else (), grads, strict=True):
        assert g is None or (g == 0).all(), f"{name} must be detached, got a gradient"
    for i, t in enumerate(tensors):
        assert not t.requires_grad or (i == 0 and wrt), f"result {i} must be detached"


def refuses_gradient(case: Case, inputs: dict[str, Tensor], name: str) -> bool:
    try:
        case(as_leaves(inputs, (name,)))
    except ValueError as error:
        assert f"{name} must not require grad" in str(error), f"an error that does not name {name}: {error}"
        return True
    return False


def metrics_of(output) -> dict[str, Tensor]:
    return getattr(output, "metrics", {})


def check_metrics_merge(case: Case) -> None:
    """Metrics of two unequal parts of a batch, and of a third without rows, merge into those of the batch."""
    inputs, _ = case.inputs(batch=6)
    whole = metrics_of(case(inputs))
    parts = [
        metrics_of(case({name: x[rows] if isinstance(x, Tensor) and x.dim() and len(x) == 6 else x for name, x in inputs.items()}))
        for rows in (slice(0, 2), slice(2, 2), slice(2, 6))
    ]
    merged = rlkern.reduce_metrics(parts)
    assert merged.keys() == whole.keys() >= set(case.of_whole)
    for name, value in whole.items():
        assert value.dim() == 0 and value.dtype == torch.float64, f"{name} is {value.dtype} of shape {tuple(value.shape)}"
        if name not in case.of_whole:
            torch.testing.assert_close(merged[name], value, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def check_default_dtype(case: Case) -> None:
    """torch.set_default_dtype changes no bit of values, metrics and gradients, in one pass or plain."""
    inputs, wrt = case.inputs()
    for backend in ("auto", "reference"):
        for dtype in (torch.float32, torch.float64):
            results = []
            for default in (torch.float32, torch.bfloat16, torch.float64):
                leaves = as_leaves(inputs, wrt, dtype)
                torch.set_default_dtype(default)
                try:
                    with rlkern.use_backend(backend):
                        outputs, grads = gradients(case, leaves, wrt)
                finally:
                    torch.set_default_dtype(torch.float32)
                for t in outputs:
                    assert not t.dtype.is_floating_point or t.dtype == dtype, f"{t.dtype} for {dtype} inputs under default dtype {default}"
                results.append([*outputs, *grads])
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), f"other values under another default dtype: {other}"


# --- the packed form ----------------------------------------------------------------------------------------

TAKES_NO_PACK = {  # functions of rows of logits, whose mask is that of the rows
    "bgpo_loss": "logits [N, V]: test_bgpo.py",
    "masked_elbo": "logits [N, V]: test_elbo.py",
    "nlpo_stats": "any rows of logits",
    "spherical_z_loss": "any rows of logits",
    "token_did_entropy": "any rows of logits",
}


def takes_pack(case: Case) -> bool:
    return case.mask == "mask" and case.name not in TAKES_NO_PACK


class Packing:
    """Where the tokens of padded rows [B, T] stand among N packed ones: a random slot for each row, from its
    first token on, longer than its last counted one; then padding, which holds NaN as all that is masked."""

    def __init__(self, mask: Tensor, seed: int, padding: int = 2):
        (batch, self.length), g = mask.shape, torch.Generator().manual_seed(seed)
        places = torch.arange(1, self.length + 1)
        self.ends = torch.where(mask != 0, places, 0).amax(-1) if mask.numel() else places.new_zeros(batch)
        slack = torch.randint(0, 3, (batch,), generator=g)
        self.ends = torch.minimum(self.ends + slack, torch.tensor(self.length))
        self.index = torch.cat([torch.arange(end) + i * self.length for i, end in enumerate(self.ends.tolist())] + [places[:0]])
        self.padding, self.shape = padding, mask.shape
        self.pack = rlkern.packed(torch.nn.functional.pad(self.ends.cumsum(0), (1, 0)), self.tokens(mask, 0).reshape(-1))

    def tokens(self, x: Tensor, fill: Any) -> Tensor:
        """[B, T] -> [1, N]."""
        chosen = x.reshape(-1)[self.index]
        return torch.cat([chosen, chosen.new_full((self.padding,), fill)]).unsqueeze(0)

    def input(self, x: Any) -> Any:
        """The packed form of an input: [B, T] and [B, n, T] are of tokens, all else stays."""
        if not isinstance(x, Tensor) or x.shape == self.shape[:1] or x.dim() < 2:
            return x
        fill = math.nan if x.dtype.is_floating_point else 0
        if x.shape == self.shape:
            x = self.tokens(x, fill)
            return torch.where(self.pack.mask.view(x.shape), x, fill)
        if x.dim() == 3 and (x.shape[0], x.shape[2]) == self.shape:
            return torch.stack([self.tokens(x[:, j], fill) for j in range(x.shape[1])])
        return x

    def output(self, x: Tensor) -> Tensor:
        """The packed form of a padded result or gradient."""
        return self.input(x).nan_to_num(0) if x.dtype.is_floating_point else self.input(x)


def check_packed(case: Case) -> None:
    """A `Packed` in place of the mask: the same values, metrics and gradients as padded rows, without a look
    at the host."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        inputs, wrt = case.inputs()
        p = Packing(inputs["mask"], case.seed)
        options = dict(case.options)
        mode = options.get("aggregation", options.get("mode"))
        if isinstance(mode, str) and mode in ("seq-mean-token-sum-norm", "dr_grpo"):
            options["normalizer"] = float(p.length)
        outputs, grads = gradients(case, as_leaves(inputs, wrt, dtype), wrt)
        leaves = as_leaves({name: p.input(x) for name, x in inputs.items()} | {"mask": p.pack}, wrt, dtype)
        with NoSyncingOperators(), NoSyncingMethods():
            packed_outputs, packed_grads = gradients(dataclasses.replace(case, options=options), leaves, wrt)
        # A loss may be the small sum of large terms, which padding adds up in another order.
        assert_same(packed_outputs, [p.output(x) for x in outputs], tolerance, 10 * tolerance, f"packed {dtype} values", smallest=0.1)
        assert_same(packed_grads, [p.output(g) for g in grads], tolerance, tolerance, f"packed {dtype} gradients")


def assert_compiles_once(function: Callable[[dict[str, float]], Any], coefficients: dict[str, float]) -> None:
    """New coefficients of a loss(coefficients) make no new graph, after a second value to learn from."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for factor in (1.0, 1.01, 1.02, 1.05, 1.1):
        options = {name: value * factor for name, value in coefficients.items()}
        torch.testing.assert_close(total(compiled(options)), total(function(options)))
        frames.append(counter.frame_count)
    assert frames[1] == frames[-1], f"compiled again: {frames}"


for path in sorted(pathlib.Path(__file__).parent.glob("cases_*.py")):  # they register the cases
    importlib.import_module(path.stem)
