"""The plans of linear_token_stats: kept logits, tiles of the matrix, chunks of rows; the parts of a row."""

import contextlib
import math

import pytest
import torch
from oracle import FIELDS, upstream
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from two_processes import one_of_them, results_of

from rlkern import LinearPlan, linear_plan, linear_token_stats, reference, token_stats
from rlkern.primitives import plans

V, H, N = 53, 6, 10
KEEP_ALL, KEEP_SOME, KEEP_NONE = 1 << 30, 4 * V * 8, 1  # bytes of float64 logits


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(plans, "TILE", 20)
    monkeypatch.setattr(plans, "BLOCK", 3)


@pytest.fixture
def products_of_16_bits(monkeypatch):
    """As on a CPU that has the instructions: on another the operands are cast to float32."""
    monkeypatch.setattr("rlkern.primitives.projection._multiplies", lambda *_: True)


def draw(*lead, dtype=torch.float64, bias=True, seed=0, vocab=V, hidden=H):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    return normal(*lead, hidden), normal(vocab, hidden), normal(vocab) if bias else None, torch.randint(vocab, lead, generator=g)


def gradients(stats, leaves, seed=0, **options):
    fields = [getattr(stats, name) for name in FIELDS if getattr(stats, name) is not None]
    loss = sum((f * g.to(f).masked_fill(f == -math.inf, 0)).sum() for f, g in zip(fields, upstream(fields, seed), strict=True))
    return torch.autograd.grad(loss, [x for x in leaves if x is not None], **options)


def ours(hidden, weight, bias, targets, **options):
    return linear_token_stats(hidden, weight, targets, bias=bias, **options)


class Products(TorchDispatchMode):
    """How many operations the products in the block take, in multiples of 2 N H V."""

    def __init__(self, unit):
        super().__init__()
        self.unit, self.operations = unit, 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        if f._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            self.operations += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return f(*args, **(kwargs or {}))

    @property
    def products(self):
        return self.operations / self.unit


MASK = torch.tensor([[1, 0, 1, 1, 1], [0, 1, 1, 1, 0]])
SEVERAL = torch.tensor([[[1, 2], [-100, 3], [-100, -100], [52, 20], [19, 21]], [[-100, -100], [52, 52], [0, -100], [39, 40], [5, 45]]])


@pytest.mark.parametrize("workspace", [KEEP_ALL, KEEP_SOME, KEEP_NONE])
@pytest.mark.parametrize(
    "options",
    [
        {"with_sum_sq": True},
        {"temperature": torch.linspace(0.5, 2, N).view(2, 5), "mask": MASK},
        {"min_p": 0.1, "with_sum_sq": True, "temperature": 0.7},
        {"with_entropy": False, "ignore_index": 20, "mask": MASK},
        {"targets": SEVERAL, "with_sum_sq": True},
        {"targets": SEVERAL, "with_tail": True},
        {"targets": SEVERAL, "with_sum_sq": True, "logit_scale": 0.7, "softcap": 1.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("as_on_a_gpu", [False, True])
def test_every_plan_equals_the_product_written_out(options, workspace, as_on_a_gpu, monkeypatch):
    if as_on_a_gpu:  # all rows are in the products
        monkeypatch.setattr("rlkern.primitives.projection._indices", lambda *_: None)
    hidden, weight, bias, targets = draw(2, 5)
    options = dict(options)
    targets = options.pop("targets", targets)
    with torch.no_grad():
        bias[torch.tensor([0, 3, *range(20, 40)])] = -math.inf  # a whole tile among them
        targets[1, 2] = 25 if targets.dim() == 2 else targets[1, 2]
        if "mask" in options:
            hidden[0, 1] = math.nan
    leaves = hidden, weight, bias
    dirty = [torch.where(MASK.unsqueeze(-1) == 0, 0.0, hidden) if "mask" in options else hidden, weight, bias]
    stats, expected = ours(*leaves, targets, workspace=workspace, **options), token_stats(linear(*dirty), targets, **options)
    for name in (*FIELDS, "target_kept"):
        got, want = getattr(stats, name), getattr(expected, name)
        assert (got is None) == (want is None), name
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")
    got, want = gradients(stats, leaves, retain_graph=True), gradients(expected, leaves)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    again = gradients(stats, leaves)  # the kept logits are gone
    torch.testing.assert_close(again, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("transforms", [{}, {"softcap": 12.0}], ids=str)
def test_confident_rows_in_tiles(backend, device, transforms):
    """1 - p, logp and entropy keep their relative accuracy, wherever the maximum is."""
    weight, hidden = torch.zeros(V, 1, device=device, requires_grad=True), torch.ones(1, 1, device=device)
    for y in (0, 19, 20, 45):
        bias = torch.linspace(-3, 0, V, device=device)
        bias[y] = 18
        exact = bias.double().requires_grad_()
        stats = linear_token_stats(hidden, weight, torch.tensor([y], device=device), bias=bias.requires_grad_(), workspace=KEEP_NONE, **transforms)
        expected = reference.token_stats(exact.unsqueeze(0), torch.tensor([[y]], device=device), **transforms)
        (got,), (want,) = torch.autograd.grad(stats.logp.sum(), bias), torch.autograd.grad(expected.logp.sum(), exact)
        for a, b in ((stats.logp, expected.logp.squeeze(-1)), (stats.entropy, expected.entropy), (got, want)):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=0)


def test_many_targets_in_tiles(backend, device):
    """Repeated, ignored, in one tile or in all, and in a row whose others are all elsewhere."""
    hidden, weight, bias, _ = draw(4, dtype=torch.float32)
    leaves = [x.detach().to(device).requires_grad_() for x in (hidden, weight, bias)]
    targets = torch.randint(V, (4, 12), generator=torch.Generator().manual_seed(1)).to(device)
    targets[0, :5], targets[1], targets[2, 3:9], targets[3] = 7, 52, -100, torch.tensor([33] * 11 + [50])
    exact = [x.detach().double().requires_grad_() for x in leaves]
    stats, expected = ours(*leaves, targets, workspace=KEEP_NONE), token_stats(linear(*exact), targets)
    torch.testing.assert_close(stats.logp.double(), expected.logp, rtol=2e-6, atol=2e-6)
    for got, want in zip(gradients(stats, leaves), gradients(expected, exact), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_rows_without_a_distribution():
    """All -inf, +inf, NaN in any tile: as token_stats."""
    weight = torch.randn(V, 5, dtype=torch.float64)
    weight[:, 0] = -math.inf
    weight[30, 1], weight[45, 2], weight[:45, 3], weight[52, 3] = math.inf, math.nan, -math.inf, math.nan
    hidden, y = torch.ones(1, 1, dtype=torch.float64), torch.tensor([7])
    for column in weight.split(1, dim=1):
        got, want = linear_token_stats(hidden, column.requires_grad_(), y, workspace=KEEP_NONE), token_stats(linear(hidden, column), y)
        for name in ("logp", "entropy", "logsumexp"):
            torch.testing.assert_close(getattr(got, name), getattr(want, name), equal_nan=True)


@pytest.mark.parametrize(
    ("workspace", "frozen", "expected"),
    [
        (KEEP_ALL, (), 3),
        (KEEP_NONE, (), 4),
        (KEEP_SOME, (), 3.6),
        (KEEP_ALL, (1,), 2),
        (KEEP_NONE, (1,), 3),
        (KEEP_ALL, (0, 1), 1),
        (KEEP_NONE, (0,), 3),
    ],
    ids=str,
)
def test_products(workspace, frozen, expected, monkeypatch):
    monkeypatch.setattr("rlkern.operator.watched", lambda x: False)  # the mode sees what runs inside the operators
    hidden, weight, _, targets = draw(N, bias=False)
    leaves = [x.detach() if i in frozen else x for i, x in enumerate((hidden, weight))]
    needs = (leaves[0].requires_grad, leaves[1].requires_grad, False)
    plan = linear_plan(N, H, V, torch.float64, needs=needs, workspace=workspace)
    with Products(2 * N * H * V) as counted:
        stats = linear_token_stats(*leaves, targets, workspace=workspace)
        if any(needs):
            stats.logp.sum().backward()
    assert counted.products == pytest.approx(expected) and plan.products == pytest.approx(expected)


def test_table():
    def plan(*args, **options):
        return linear_plan(*args, **options)[1:6]

    large = (4096, 151936)
    with pytest.MonkeyPatch.context() as real:
        real.setattr(plans, "TILE", 8192)
        real.setattr(plans, "BLOCK", 8192)
        assert plan(2048, *large) == (2048, "tiles", 8192, 1, 3)
        assert plan(8192, *large, workspace=1) == (0, "tiles", 8192, 8192, 4)
        assert plan(8192, *large)[0] == 3533 and 3.5 < plan(8192, *large)[4] < 3.6
        assert plan(8192, *large, logits_dtype=torch.float32)[0] == 1766
        assert plan(8192, *large, device="cpu")[0] == 883
        assert plan(8192, *large, needs=(True, False, False), workspace=1) == (0, "chunks", 151936, 441, 3)
        assert plan(8192, *large, needs=(False, False, False)) == (0, "chunks", 151936, 1766, 1)
        assert plan(8192, *large, whole_rows=True) == (3533, "chunks", 151936, 1766, pytest.approx(3 + 4659 / 8192))
        assert plan(8192, *large, chunk_rows=64) == (0, "chunks", 151936, 64, 4)
        assert plan(8192, *large, known=True) == (0, "chunks", 151936, 3533, 3)
        assert linear_plan(8192, *large, workspace=1).bytes == 8192 * 8192 * 2 + 8192 * 4096 * 4
        assert linear_plan(2048, *large).bytes == 2048 * 151936 * 2
        wide = linear_plan(8192, *large, workspace=1, logits_dtype=torch.float32).bytes
        assert wide == 8192 * 8192 * (4 + 2) + 8192 * 4096 * 4
        text = "3533 of 8192 rows kept; tiles of 4659 x 8192 logits; 3.569 products, 1353 MiB"
        assert str(linear_plan(8192, *large)) == text
    assert isinstance(linear_plan(1, 1, 1), LinearPlan)


@pytest.mark.parametrize("bias", [False, True])
def test_kept_logits_give_the_bits_of_token_stats(bias, products_of_16_bits):
    *leaves, targets = draw(256, dtype=torch.bfloat16, bias=bias, vocab=9001, hidden=128)
    stats, expected = ours(*leaves, targets, with_sum_sq=True), token_stats(linear(*leaves), targets, with_sum_sq=True)
    for name in ("logp", "entropy", "logsumexp", "sum_sq_prob"):
        assert torch.equal(getattr(stats, name), getattr(expected, name)), name
    got, want = gradients(stats, leaves), gradients(expected, leaves)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def relative_error(x, exact):
    return ((x.double() - exact).norm() / exact.norm()).item()


def test_accuracy_of_tiles(monkeypatch, products_of_16_bits):
    """Of bfloat16: the statistics; the gradients against products in float64 of the same logits' gradient."""
    monkeypatch.setattr(plans, "TILE", 2048)
    monkeypatch.setattr(plans, "BLOCK", 256)
    hidden, weight, bias, targets = draw(256, dtype=torch.bfloat16, vocab=9001, hidden=128)
    with torch.no_grad():
        weight /= 3
    stats = ours(hidden, weight, bias, targets, workspace=1, with_sum_sq=True)
    logits = linear(hidden, weight, bias).detach().requires_grad_()
    expected = token_stats(logits, targets, with_sum_sq=True)
    for name in ("logp", "entropy", "logsumexp", "sum_sq_prob"):
        torch.testing.assert_close(getattr(stats, name), getattr(expected, name), rtol=2e-6, atol=2e-6)
    wide = logits.detach().double().requires_grad_()
    (rounded,), (d_logits,) = gradients(expected, [logits]), gradients(token_stats(wide, targets, with_sum_sq=True), [wide])
    d_hidden, d_weight, d_bias = gradients(stats, (hidden, weight, bias))
    h, w = hidden.detach().double(), weight.detach().double()
    for got, limit, product in ((d_weight, 1.02, lambda d: d.t() @ h), (d_hidden, 1.25, lambda d: d @ w)):
        one_product, exact = product(rounded.double()).bfloat16(), product(d_logits)
        assert relative_error(got, exact) <= limit * relative_error(one_product, exact)
    torch.testing.assert_close(d_bias.double(), rounded.double().sum(0), rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("workspace", [KEEP_ALL, KEEP_SOME, KEEP_NONE])
@pytest.mark.parametrize(("dtype", "fixed_blocks"), [(torch.bfloat16, False), (torch.float16, True)], ids=str)
def test_float32_logits_of_16_bit_operands(dtype, fixed_blocks, workspace):
    hidden, weight, bias, targets = draw(N, dtype=dtype, hidden=64)
    leaves, options = (hidden, weight, bias), {"workspace": workspace, "fixed_blocks": fixed_blocks}
    stats = ours(*leaves, targets, logits_dtype=torch.float32, **options)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    expected = token_stats(linear(*exact), targets)
    torch.testing.assert_close(stats.logp.double(), expected.logp, rtol=1e-6, atol=1e-5)
    for got, want in zip(gradients(stats, leaves), gradients(expected, exact), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=2**-8 * want.abs().max().item())
    # Rounded logits are off by far more than that.
    rounded = (ours(*leaves, targets, **options).logp - expected.logp).abs().max()
    assert 1e-3 < rounded < 0.2


@pytest.mark.parametrize("workspace", [KEEP_ALL, KEEP_SOME, KEEP_NONE])
def test_num_valid_leaves_rows_out(workspace, monkeypatch):
    """As on a GPU: rows in the order of a stable sort, none of the others in a product."""
    indices = "rlkern.primitives.projection.values_readable"
    hidden, weight, bias, targets = draw(2, 5)
    with torch.no_grad():
        hidden[0, 1] = hidden[1, 4] = math.nan
    targets[1, 2] = -100
    options = {"mask": MASK, "temperature": torch.linspace(0.5, 2, N).view(2, 5)}
    leaves, count = (hidden, weight, bias), 6
    want = ours(*leaves, targets, **options)
    want_gradients = gradients(want, leaves)
    monkeypatch.setattr(indices, lambda x: False)
    monkeypatch.setattr("rlkern.primitives.linear.values_readable", lambda x: False)
    monkeypatch.setattr("rlkern.operator.watched", lambda x: False)
    for num_valid in (count, count + 2):
        with Products(2 * num_valid * H * V) as counted:
            stats = ours(*leaves, targets, num_valid=num_valid, workspace=workspace, **options)
        assert counted.products == 1
        for got, expected in zip((stats.logp, stats.entropy), (want.logp, want.entropy), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(gradients(stats, leaves), want_gradients, rtol=1e-11, atol=1e-11)
    fewer = ours(*leaves, targets, num_valid=count - 1, workspace=workspace, **options)
    assert fewer.logp[1, 3] == 0 and torch.allclose(fewer.logp[:, :3], want.logp[:, :3])
    monkeypatch.undo()
    with pytest.raises(ValueError, match="num_valid must be the number of rows that count, here 6, got 5"):
        ours(*leaves, targets, num_valid=count - 1, **options)


@pytest.mark.parametrize("workspace", [KEEP_ALL, KEEP_SOME, KEEP_NONE])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_weight_grad_out_is_added_to(workspace, dtype):
    *leaves, targets = draw(N, dtype=dtype)
    hidden, weight, bias = leaves
    want = gradients(ours(*leaves, targets, workspace=workspace), leaves)
    main_grad = torch.ones(V, H, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    stats = [ours(*leaves, targets, workspace=workspace, weight_grad_out=main_grad) for _ in range(2)]
    main_grad += 1  # another one's between forward and backward
    for s in stats:
        fields = [getattr(s, name) for name in FIELDS if getattr(s, name) is not None]
        loss = sum((f * g.to(f)).sum() for f, g in zip(fields, upstream(fields, 0), strict=True))
        d_hidden, d_weight, d_bias = torch.autograd.grad(loss, leaves, allow_unused=True)
        assert d_weight is None and torch.equal(d_hidden, want[0]) and torch.equal(d_bias, want[2])
    tolerance = 1e-11 if dtype == torch.float64 else 2**-6
    torch.testing.assert_close(main_grad, 2 + 2 * want[1].to(main_grad), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("workspace", [KEEP_ALL, KEEP_SOME, KEEP_NONE])
@pytest.mark.parametrize("frozen", [True, False])
def test_lora(workspace, frozen):
    hidden, weight, bias, targets = draw(2, 5)
    a, b = draw(1, seed=1, vocab=2)[1], draw(1, seed=2, hidden=2)[1]
    weight.requires_grad_(not frozen)
    leaves = [x for x in (hidden, weight, bias, a, b) if x.requires_grad]
    options = {"mask": MASK, "with_sum_sq": True}
    expected = token_stats(linear(hidden, weight + 0.7 * b @ a, bias), targets, **options)
    hidden = hidden.masked_fill((MASK == 0).unsqueeze(-1), torch.nan)  # the gradient by A is a product with all rows
    stats = ours(hidden, weight, bias, targets, lora=(a, b, 0.7), workspace=workspace, **options)
    for name in ("logp", "entropy", "sum_sq_prob"):
        torch.testing.assert_close(getattr(stats, name), getattr(expected, name), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(gradients(stats, leaves), gradients(expected, leaves), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("workspace", [KEEP_ALL, KEEP_NONE])
def test_parameters_that_are_only_there_when_gathered(workspace):
    """As in ZeRO-3: outside of the context the matrix is empty."""
    hidden, weight, _, targets = draw(N, bias=False)
    want = torch.autograd.grad(ours(hidden, weight, None, targets).logp.sum(), (hidden, weight))
    values, entered = weight.detach().clone(), []

    @contextlib.contextmanager
    def gathered():
        entered.append(True)
        weight.data = values
        yield
        weight.data = values[:0]

    with gathered():  # its accumulator of gradients knows the size
        weight.expand_as(weight)
    stats = ours(hidden, weight, None, targets, gathered=gathered, workspace=workspace)
    assert weight.numel() == 0
    got = torch.autograd.grad(stats.logp.sum(), (hidden, weight))
    torch.testing.assert_close(got, want)
    assert weight.numel() == 0 and len(entered) == 3


def test_fixed_blocks_are_products_of_one_shape(monkeypatch):
    monkeypatch.setattr(plans, "FIXED_BLOCK", 4)
    monkeypatch.setattr("rlkern.operator.watched", lambda x: False)
    *leaves, targets = draw(N)
    want = token_stats(linear(*leaves), targets)
    for workspace in (KEEP_ALL, 4 * V * 8, KEEP_NONE):
        with Products(2 * 4 * H * V) as counted:
            stats = ours(*leaves, targets, fixed_blocks=True, workspace=workspace)
        assert counted.products == 3  # 10 rows by fours
        torch.testing.assert_close(stats.entropy, want.entropy, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(gradients(stats, leaves), gradients(want, leaves, retain_graph=True), rtol=1e-11, atol=1e-11)
    alone = ours(leaves[0][9:], *leaves[1:], targets[9:], fixed_blocks=True)
    assert torch.equal(alone.logp, stats.logp[9:])


def test_nothing_of_the_size_of_the_logits_without_gradients():
    hidden, weight, bias, targets = (x.detach() for x in draw(64))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        ours(hidden, weight, bias, targets)
        with torch.no_grad():
            ours(hidden.requires_grad_(), weight, bias, targets)
        assert not saved
        ours(hidden, weight, bias, targets)
    assert max(saved) == 64 * V


class Allocated(TorchDispatchMode):
    """The (elements, dtype) of every new tensor."""

    def __init__(self):
        super().__init__()
        self.tensors = set()

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        results = f(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.Tensor)}
        for x in results if isinstance(results, (tuple, list)) else [results]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.tensors.add((x.numel(), x.dtype))
        return results


def test_memory(monkeypatch, products_of_16_bits):
    """Tiles make no float32 copy of the matrix' gradient, chunks of a frozen matrix nothing of its size."""
    monkeypatch.setattr("rlkern.operator.watched", lambda x: False)
    hidden, weight, _, targets = draw(N, dtype=torch.bfloat16, bias=False)
    for w in (weight, weight.detach()):
        with Allocated() as new:
            linear_token_stats(hidden, w, targets, workspace=KEEP_NONE).logp.sum().backward()
        large = {x for x in new.tensors if x[0] >= V * H}
        assert large == ({(V * H, torch.bfloat16)} if w.requires_grad else set())


@pytest.mark.parametrize("workspace", [KEEP_ALL, KEEP_NONE])
def test_checkpoint_offloading_and_vectorized_jacobian(workspace):
    *leaves, targets = draw(N)

    def f(*leaves):
        return ours(*leaves, targets, workspace=workspace).logp

    (want,) = torch.autograd.grad(f(*leaves).sum(), leaves[1])
    recomputed = torch.utils.checkpoint.checkpoint(f, *leaves, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(recomputed.sum(), leaves[1])[0], want)
    with torch.autograd.graph.save_on_cpu():
        stats = f(*leaves)
    torch.testing.assert_close(torch.autograd.grad(stats.sum(), leaves[1])[0], want)
    rows = torch.autograd.functional.jacobian(lambda w: f(leaves[0], w, leaves[2]), leaves[1].detach(), vectorize=True)
    torch.testing.assert_close(rows.sum(0), want)


@pytest.mark.parametrize("workspace", [1 << 20, 4 * V * 4])
def test_compile(workspace):
    hidden, weight, bias, targets = draw(N, dtype=torch.float32)

    def loss(*inputs):
        stats = ours(*inputs, workspace=workspace)
        return (stats.logp * stats.entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for rows in (N, 7, 5):
        inputs = hidden[:rows], weight, bias, targets[:rows]
        got, want = (torch.autograd.grad(f(*inputs), (hidden, weight, bias)) for f in (compiled, loss))
        torch.testing.assert_close(got, want)


def test_consuming_operators():
    *leaves, targets = draw(N, dtype=torch.float32)
    how = (4, 20, 3, False, False, None, None, 0, "", 1, True)
    options = (*how, 1.0, -100, 0, 0.0, False, True, 0.0, 0, 0)
    args = [x.detach() for x in leaves]
    with torch.no_grad():
        *_, state, logits = torch.ops.rlkern.linear_token_stats(*args, None, None, targets, None, None, *options)
    grads = (torch.ones(N), None, None, None, None)
    operator = torch.ops.rlkern.linear_token_stats_backward_.default
    args = (*args, None, None, targets, None, None, *options, state, logits, *grads, [True, True, True, False, False])
    torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"workspace": -1}, ValueError, "workspace must be at least 0"),
        ({"workspace": 1e9}, TypeError, "workspace must be an int"),
        ({"logits_dtype": torch.float32}, ValueError, "logits_dtype must be torch.float64"),
        ({"logits_dtype": "float32"}, TypeError, "logits_dtype must be a torch.dtype"),
        ({"num_valid": 4}, ValueError, "num_valid must be at most the number of rows 3, got 4"),
        ({"num_valid": True}, TypeError, "num_valid must be an integer"),
        ({"fixed_blocks": "yes"}, TypeError, "fixed_blocks must be True or False"),
        ({"weight_grad_out": torch.zeros(V, H)}, TypeError, "weight_grad_out must be torch.float64"),
        ({"weight_grad_out": torch.zeros(H, V)}, ValueError, "weight_grad_out must have the shape of weight"),
        ({"gathered": 3}, TypeError, "gathered must be a function"),
        ({"gathered": lambda: 3}, TypeError, "gathered must be .* got one that returns 3"),
        ({"lora": (1, 2)}, TypeError, "lora must be"),
        ({"lora": (torch.zeros(2, H), torch.zeros(V, 2), 1.0)}, TypeError, "dtype of hidden"),
        ({"lora": (torch.zeros(2, H - 1).double(), torch.zeros(V, 2).double(), 1.0)}, ValueError, r"lora must be A \[r, 6\] and B \[53, r\]"),
        ({"lora": (torch.zeros(2, H).double(), torch.zeros(V, 3).double(), 1.0)}, ValueError, "lora must be"),
        ({"lora": (torch.zeros(2, H).double(), torch.zeros(V, 2).double(), "1")}, TypeError, "lora's scale"),
    ],
)
def test_errors(change, error, message):
    hidden, weight, bias, targets = draw(3)
    with pytest.raises(error, match=message):
        linear_token_stats(hidden, weight, targets, bias=bias, **change)


@pytest.mark.slow  # what DTensor imports
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_matrix_of_fsdp(tmp_path):
    """A sharded matrix is gathered, and the processes' gradients are averaged."""
    want = torch.stack([w for _, w in map(of_process, range(2))]).mean(0)
    results = results_of(__file__, tmp_path)
    for rank, result in enumerate(results):
        torch.testing.assert_close(result["logp"], of_process(rank)[0])
        torch.testing.assert_close(result["gradient"], want.chunk(2)[rank])


def of_process(rank, shard=lambda x: x):
    hidden, weight, _, targets = draw(4, seed=rank, bias=False)
    weight = shard(draw(1, seed=7)[1].detach()).requires_grad_()
    logp = linear_token_stats(hidden, weight, targets, workspace=KEEP_NONE).logp
    logp.sum().backward()
    return logp.detach(), weight.grad


def main():
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    with one_of_them() as (rank, results):
        mesh = init_device_mesh("cpu", (2,))
        results["logp"], gradient = of_process(rank, lambda x: distribute_tensor(x, mesh, [Shard(0)]))
        results["gradient"] = gradient.to_local()


if __name__ == "__main__":
    main()
