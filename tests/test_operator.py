"""The operators as PyTorch sees them: validation, compile, export, checkpointing, in place, memory."""

import itertools
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import rlkern
from rlkern import backends
from rlkern.primitives.moments import row_moments


def inputs(*shape, dtype=torch.float32, device="cpu", seed=0):
    """Leaf logits of this shape, and targets."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=g).to(device, dtype)
    return x.requires_grad_(), torch.randint(0, shape[-1], shape[:-1], generator=g).to(device)


OLD_DYNAMO = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11)  # cannot trace a property of a named tuple


def loss(x, y, temperature=0.7):
    s = rlkern.token_stats(x, y, temperature=temperature, min_p=0.1, with_sum_sq=True)
    proxy_logp = s.logp - s.kept_logmass if OLD_DYNAMO else s.proxy_logp
    return (2 * s.logp + 0.1 * s.entropy + s.sum_sq_prob + proxy_logp.clamp_min(-5)).sum()


def gradient(f, x, *args):
    return torch.autograd.grad(f(x, *args), x)[0]


X, Y = torch.zeros(2, 3, 10), torch.zeros(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: rlkern.token_stats([1.0], Y), TypeError, "list"),
        (lambda: rlkern.token_stats(X.long(), Y), TypeError, "torch.int64"),
        (lambda: rlkern.token_stats(torch.zeros(()), Y), ValueError, r"\[\.\.\., V\]"),
        (lambda: rlkern.token_stats(torch.zeros(2, 3, 0), Y), ValueError, r"\(2, 3, 0\)"),
        (lambda: rlkern.token_stats(X, None), TypeError, "entropy_from_logits"),
        (lambda: rlkern.token_stats(X, Y.float()), TypeError, "torch.float32"),
        (lambda: rlkern.token_stats(X, Y[:, :2]), ValueError, r"\(2, 3\).*\(2, 2\)"),
        (lambda: rlkern.token_stats(X, Y[..., None][..., :0]), ValueError, "K >= 1"),
        (lambda: rlkern.token_stats(X, Y.to("meta")), ValueError, "device"),
        (lambda: rlkern.token_stats(X, Y, mask=torch.ones(2)), ValueError, r"\(2, 3\).*\(2,\)"),
        (lambda: rlkern.token_stats(X, Y, mask=[1, 0]), TypeError, "list"),
        (lambda: rlkern.token_stats(X, Y, temperature=0.0), ValueError, "positive"),
        (lambda: rlkern.token_stats(X, Y, temperature=math.nan), ValueError, "nan"),
        (lambda: rlkern.token_stats(X, Y, temperature=-1), ValueError, "-1"),
        (lambda: rlkern.token_stats(X, Y, temperature="hot"), TypeError, "'hot'"),
        (lambda: rlkern.token_stats(X, Y, temperature=torch.ones(3)), ValueError, r"\(2, 3\).*\(3,\)"),
        (lambda: rlkern.token_stats(X, Y, temperature=torch.zeros(2, 3)), ValueError, "positive"),
        (lambda: rlkern.token_stats(X, Y, temperature=torch.ones(2, 3, dtype=torch.long)), TypeError, "int64"),
        (lambda: rlkern.token_stats(X, Y, temperature=torch.ones(2, 3, requires_grad=True)), ValueError, "detach"),
        (lambda: rlkern.token_stats(X, Y, ignore_index=-100.5), TypeError, "ignore_index must be an int, got -100.5"),
        (lambda: rlkern.token_stats(X, Y, min_p=0.0), ValueError, "min_p"),
        (lambda: rlkern.token_stats(X, Y, min_p=0.1, min_prob=0.1), ValueError, "not both"),
        (lambda: rlkern.token_stats(X, Y, min_prob=1.5), ValueError, "1.5"),
        (lambda: rlkern.token_stats(X, Y, group=object()), TypeError, "group"),
        (lambda: rlkern.token_stats(X.expand(2, 3, 10).transpose(1, 2), Y[:, :1].expand(2, 10), inplace_backward=True), ValueError, "stride"),
        (lambda: rlkern.token_stats(X[:, :1].expand(2, 3, 10), Y, inplace_backward=True), ValueError, "expanded"),
        (lambda: rlkern.use_backend("cuda"), ValueError, "'native'"),
        (lambda: rlkern.entropy_from_logits(X.int()), TypeError, "int32"),
    ],
)
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call()


@pytest.mark.parametrize("bad", [10, -1, 2**40, -101])
def test_target_out_of_range(backend, device, bad):
    y = Y.clone()
    y[1, 2] = bad
    if device == "cpu":
        for targets in (y, y.unsqueeze(-1).repeat(1, 1, 3)):
            with pytest.raises(IndexError, match=str(bad)):
                rlkern.token_stats(X, targets)
    else:
        x = X.to(device).requires_grad_()
        logp = rlkern.token_logprobs(x, y.to(device))
        logp.sum().backward()
        assert logp[1, 2].isnan() and x.grad[1, 2].isnan().all()
        assert logp.isnan().sum() == 1 and x.grad.isnan().sum() == 10


def test_empty_inputs(backend, device):
    for shape in ((0, 10), (2, 0, 10), (0, 3, 10)):
        x = torch.zeros(*shape, device=device, requires_grad=True)
        s = rlkern.token_stats(x, torch.zeros(shape[:-1], dtype=torch.long, device=device), with_sum_sq=True, min_p=0.1)
        assert s.logp.shape == shape[:-1] and s.sum_sq_prob.shape == shape[:-1]
        (s.logp.sum() + s.entropy.sum()).backward()
        assert x.grad.shape == shape


def test_all_masked_is_zero_and_connected(backend, device):
    x = torch.randn(2, 10, device=device, requires_grad=True)
    s = rlkern.token_stats(x, torch.full((2,), -100, device=device))
    assert (s.logp == 0).all()
    s.logp.sum().backward()
    assert (x.grad == 0).all()


def test_integer_types_of_targets(backend, device):
    x, y = inputs(3, 10, device=device)
    want = rlkern.token_logprobs(x, y)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(rlkern.token_logprobs(x, y.to(dtype)), want)


def test_results_may_be_written_into(backend, device):
    x, y = inputs(4, 50, device=device)
    want = gradient(lambda x: rlkern.token_stats(x, y).logp[1:].sum() + rlkern.token_stats(x, y).entropy[1:].sum(), x)
    s = rlkern.token_stats(x, y, with_sum_sq=True, min_p=0.1)
    for t in s[:5]:
        assert t._base is None and t.is_contiguous()
        t[0] = 0.0
    (s.logp.sum() + s.entropy.sum()).backward()
    torch.testing.assert_close(x.grad, want, rtol=1e-5, atol=1e-6)
    assert len({t.data_ptr() for t in s[:5]}) == 5


@pytest.mark.parametrize("cut", [lambda x: x[:, :3], lambda x: x[:, :, :2], lambda x: x[1:], lambda x: x.transpose(0, 1)])
@pytest.mark.parametrize(
    "value",
    [lambda x, y: rlkern.token_logprobs(x, y), lambda x, y: rlkern.token_divergence(x, x.detach().flip(-1)), lambda x, y: row_moments(x, y).variance],
)
def test_gradients_of_slices_of_four_dimensions(backend, device, value, cut):
    """Their rows need not have a view, and the gradient must reach its memory all the same."""
    x = cut(torch.randn(2, 4, 3, 7, generator=torch.Generator().manual_seed(0)).to(device))
    y = torch.arange(x[..., 0].numel(), device=device).view(x.shape[:-1]) % 7
    leaf, dense = x.detach().requires_grad_(), x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    want = torch.autograd.grad(value(dense, y).sum(), dense)[0]
    torch.full((1 << 16,), math.nan, device=device)  # what uninitialised memory may hold
    assert torch.equal(torch.autograd.grad(value(leaf, y).sum(), leaf)[0], want)


def test_no_grad_and_detached(backend, device):
    x, y = inputs(4, 50, device=device)
    with torch.no_grad():
        assert not rlkern.token_stats(x, y).logp.requires_grad
    assert not rlkern.token_logprobs(x.detach(), y).requires_grad


@pytest.mark.parametrize(("kept_kind", "targets"), [*itertools.product((0, 1, 2), ("one", "several", "none")), (3, "one"), (3, "several")])
def test_opcheck(kept_kind, targets):
    x, y = inputs(2, 5, 33)
    x = x.detach()
    y = y.clamp(max=29)  # below a vocabulary of 30
    y = {"one": y, "several": y.unsqueeze(-1).repeat(1, 1, 3), "none": None}[targets]
    row_temperature, mask = torch.rand(2, 5) + 0.5, torch.rand(2, 5) > 0.3
    forward = (
        x,
        y,
        mask,
        row_temperature,
        1.0,
        -100,
        kept_kind,
        -2.0,
        kept_kind == 1,
        True,
        20.0 if kept_kind == 2 else 0.0,
        0,
        30 if kept_kind == 1 else 0,
    )
    torch.library.opcheck(torch.ops.rlkern.token_stats.default, forward)
    state = torch.ops.rlkern.token_stats(*forward)[-1]
    g = torch.randn(2, 5)
    backward = (*forward[1:], state, None if y is None else torch.randn(y.shape), g, None, None, g if kept_kind else None)
    torch.library.opcheck(torch.ops.rlkern.token_stats_backward.default, (x, *backward))
    torch.library.opcheck(torch.ops.rlkern.token_stats_backward_.default, (x.clone(), *backward))


def test_compile_is_one_graph_for_every_size():
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    counter = CompileCounter()
    counting = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for i, shape in enumerate([(2, 5, 33), (3, 7, 40), (4, 6, 51)]):
        x, y = inputs(*shape, seed=i)
        torch.testing.assert_close(gradient(compiled, x, y), gradient(loss, x, y), rtol=1e-6, atol=1e-7)
        counting(x, y)
    assert counter.frame_count == 1


def test_compile_with_temperature_that_changes():
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    x, y = inputs(2, 5, 33)
    for t in (0.5, 0.9, 1.3):
        torch.testing.assert_close(compiled(x, y, t), loss(x, y, t))
    t = torch.rand(2, 5) + 0.5
    torch.testing.assert_close(gradient(compiled, x, y, t), gradient(loss, x, y, t))


@pytest.mark.skipif(OLD_DYNAMO, reason="may take every float for a constant")
@pytest.mark.parametrize("source", ["logits", "hidden", "divergence"])
def test_a_temperature_that_changes_is_not_compiled_again(source):
    x, y = inputs(2, 5, 33)
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(1))
    call = {
        "logits": lambda t: rlkern.token_stats(x, y, temperature=t).entropy,
        "hidden": lambda t: rlkern.linear_token_stats(x, weight, y % 7, temperature=t).entropy,
        "divergence": lambda t: rlkern.token_divergence(x, x.flip(-1), temperature=t),
    }[source]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for t in (0.5, 0.9, 1.3, 1.1):  # the second value is where torch.compile learns that it varies
        torch.testing.assert_close(compiled(t), call(t))
    assert counter.frame_count == 2


def test_compile_with_inplace_backward():
    torch._dynamo.reset()
    x, y = inputs(4, 33)
    compiled = torch.compile(lambda x: rlkern.token_stats(x * 1.0, y, inplace_backward=True).logp.sum(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradient(compiled, x), gradient(lambda x: rlkern.token_stats(x, y).logp.sum(), x))


def test_export():
    class Module(torch.nn.Module):
        def forward(self, x, y):
            return rlkern.token_logprobs(x, y, temperature=0.7)

    x, y = inputs(2, 5, 33)
    exported = torch.export.export(Module(), (x.detach(), y))
    torch.testing.assert_close(exported.module()(x.detach(), y), rlkern.token_logprobs(x, y, temperature=0.7))


def test_fake_tensors():
    with torch._subclasses.FakeTensorMode():
        s = rlkern.token_stats(torch.empty(2, 5, 33, dtype=torch.bfloat16), torch.zeros(2, 5, 4, dtype=torch.long), with_sum_sq=True)
        assert s.logp.shape == (2, 5, 4) and s.entropy.shape == (2, 5) and s.sum_sq_prob.dtype == torch.float32


def test_meta_tensors():
    """Shapes without data, outside of FakeTensorMode: no backend runs."""
    x, y = (t.detach().to("meta") for t in inputs(2, 3, 50))
    loss(x.requires_grad_(), y).backward()
    assert x.grad.is_meta and x.grad.shape == (2, 3, 50)


def test_autocast(backend, device):
    x, y = inputs(4, 33, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = rlkern.token_logprobs(x, y)
    assert torch.equal(inside, rlkern.token_logprobs(x, y)) and inside.dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(backend, device, use_reentrant):
    x, y = inputs(4, 33, device=device)
    want = gradient(loss, x, y)
    checkpoint(loss, x, y, use_reentrant=use_reentrant).backward()
    assert torch.equal(x.grad, want)


def test_functorch_is_refused():
    """Or, where PyTorch can make something of it, right."""
    torch._dynamo.reset()
    x, y = inputs(4, 33)
    with pytest.raises(RuntimeError, match="autograd.Function with functorch"):  # PyTorch's refusal, for us
        torch.func.grad(lambda x: loss(x, y))(x.detach())
    want = gradient(loss, x, y)
    try:
        got = torch.compile(torch.func.grad(lambda x: loss(x, y)), backend="eager")(x.detach())
    except Exception as refusal:  # up to PyTorch 2.13
        assert any(word in str(refusal) for word in ("rlkern", "token_stats", "functorch"))
    else:  # since then Dynamo differentiates the autograd function: never zeros
        torch.testing.assert_close(got, want)


def test_double_backward_is_refused(backend, device):
    x, y = inputs(4, 33, device=device)
    (first,) = torch.autograd.grad(loss(x, y), x, create_graph=True)
    assert torch.equal(first, gradient(loss, x, y))
    with pytest.raises(RuntimeError, match="second time"):
        (first.square().sum() + x.sum()).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n_targets", [None, 3])
def test_inplace_backward(backend, device, dtype, n_targets):
    x, y = inputs(3, 4, 301, dtype=dtype, device=device)
    y = y if n_targets is None else y.unsqueeze(-1).repeat(1, 1, n_targets)
    y[0, 0] = -100

    def run(inplace):
        logits = x * 1.0
        s = rlkern.token_stats(logits, y, temperature=0.7, min_p=0.1, with_sum_sq=True, inplace_backward=inplace)
        total = s.logp.sum() + 0.1 * s.entropy.sum() + s.sum_sq_prob.sum() + s.kept_logmass.sum()
        return torch.autograd.grad(total, x)[0], logits.detach()

    want, untouched = run(False)
    got, overwritten = run(True)
    assert torch.equal(got, want) and torch.equal(untouched, x) and torch.equal(overwritten, want)


def test_inplace_backward_of_a_slice(backend, device):
    x, y = inputs(3, 5, 301, device=device)
    got = gradient(lambda x: rlkern.token_logprobs((x * 1.0)[:, :-1], y[:, :-1], inplace_backward=True).sum(), x)
    assert torch.equal(got, gradient(lambda x: rlkern.token_logprobs(x[:, :-1], y[:, :-1]).sum(), x))


def test_second_consumer_of_overwritten_logits_raises(backend, device):
    x, y = inputs(4, 33, device=device)
    logits = x * 1.0
    other = logits.exp().log_softmax(-1).square().sum() + logits.square().sum()  # saved the logits, and runs its backward after ours
    logp = rlkern.token_logprobs(logits, y, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (other + logp.sum()).backward()


def test_two_uses_of_overwritten_logits_raise(backend, device):
    x, y = inputs(4, 33, device=device)
    logits = x * 1.0
    first, second = (rlkern.token_logprobs(logits, y, inplace_backward=True) for _ in range(2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (first.sum() + second.sum()).backward()


@pytest.mark.parametrize("inplace", [False, True])
def test_no_memory_grows_with_the_vocabulary(inplace):
    """Native: the forward allocates nothing of this size, the backward the one gradient, in place nothing."""
    rows, vocab = 8, 20000
    gradient_bytes = rows * vocab * 2
    x = torch.randn(rows, vocab).bfloat16().requires_grad_()
    y = torch.randint(0, vocab, (rows,))

    def allocated(f):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            result = f()
        return result, sum(e.cpu_memory_usage for e in profile.events() if e.name == "aten::empty")

    with rlkern.use_backend("native"):
        stats, forward = allocated(lambda: rlkern.token_stats(x, y, with_sum_sq=True, min_p=0.1, inplace_backward=inplace))
        total = stats.logp.sum() + stats.entropy.sum()
        _, backward = allocated(lambda: torch.autograd.grad(total, x))
    assert 0 < forward < 2000
    assert backward < (4000 if inplace else gradient_bytes + 4000)
    assert inplace or backward >= gradient_bytes


def test_use_backend_restores():
    before = backends._current
    with pytest.raises(KeyError, match="in the block"), rlkern.use_backend("reference"):
        assert backends._current == "reference"
        raise KeyError("in the block")
    assert backends._current == before


def test_missing_backend_is_named(monkeypatch):
    monkeypatch.setitem(backends._loaded, "native", ImportError("no compiler at build time"))
    with pytest.raises(RuntimeError, match="'native' is not available: no compiler"):
        rlkern.use_backend("native")
    assert "no compiler" in rlkern.backend_info()["native"]
    x, y = inputs(2, 10)
    assert rlkern.token_logprobs(x, y).isfinite().all()  # "auto" goes on with the reference


def test_info_names_every_backend():
    assert {"reference", "native", "triton", "torch", "rlkern"} <= rlkern.backend_info().keys()


class Seen(TorchDispatchMode):
    """Looks at every operator and changes none."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(6, 4), (3, 7)])
@pytest.mark.parametrize("loss", [rlkern.clip_cov_loss, rlkern.kl_cov_loss, rlkern.ppo_loss])
def test_a_dispatch_mode_changes_nothing(backend, device, loss, shape):
    """Not a bit: activation checkpointing runs the second forward under one."""
    g = torch.Generator().manual_seed(0)
    logp, old, advantages = (-torch.rand(*size, generator=g) for size in (shape, shape, shape[:1]))
    mask = torch.rand(*shape, generator=g) < 0.8
    arguments = [x.to(device) for x in (old, advantages, mask)]
    options = {} if loss is rlkern.ppo_loss else {"select_ratio": 0.3}
    options |= {"cov_low": -1.0, "generator": torch.Generator(device)} if loss is rlkern.clip_cov_loss else {}

    def step():
        if "generator" in options:
            options["generator"].manual_seed(1)
        leaf = logp.to(device).requires_grad_()
        value = loss(leaf, *arguments, **options).loss
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    plain = step()
    with Seen():
        watched = step()
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


@pytest.mark.parametrize(
    "function", [lambda x: rlkern.token_divergence(x, x.detach() / 2), lambda x: rlkern.token_logprobs(x, torch.ones(2, 3, dtype=torch.long))]
)
def test_batched_gradients(function):
    """jacobian(vectorize=True) runs the backward under torch.func."""
    x = torch.randn(2, 3, 5)
    rows = torch.autograd.functional.jacobian(function, x)
    torch.testing.assert_close(torch.autograd.functional.jacobian(function, x, vectorize=True), rows)


def test_a_plain_subclass_is_checked_like_a_tensor(backend, device):
    class Named(torch.Tensor):
        pass

    if device != "cpu":
        pytest.skip("a GPU's targets are not looked at")
    with pytest.raises(IndexError, match="target 9 of row 0 is out of range for 5 logits"):
        rlkern.token_stats(torch.zeros(2, 3, 5).as_subclass(Named), torch.full((2, 3), 9))
