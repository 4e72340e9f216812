"""linear_fused_loss: the loss, metrics and gradients of token_stats and the loss on it, in three products."""

import pytest
import torch
from test_linear_plans import Products, draw
from torch.nn.functional import linear

import rlkern
from rlkern import linear_fused_loss, linear_plan, token_stats
from rlkern.primitives.kl import kl_estimate

B, T, V, H = 3, 7, 53, 6
COEF = torch.ones(2, requires_grad=True)
LOSSES = {"ppo": rlkern.ppo_loss, "reinforce": rlkern.reinforce_loss, "cispo": rlkern.cispo_loss, "sapo": rlkern.sapo_loss}
MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm", "grpo", "dr_grpo")


def problem(dtype=torch.float64, seed=0):
    """(hidden, weight, bias), targets, old_logp, advantages, mask"""
    *leaves, y = draw(B, T, dtype=dtype, seed=seed)
    g = torch.Generator().manual_seed(seed + 1)
    y[0, 2] = -100
    mask = torch.rand(B, T, generator=g) < 0.7
    mask[2] = False
    with torch.no_grad():
        leaves[0][~mask] = torch.nan
    old = token_stats(linear(*leaves), y, mask=mask, temperature=0.7).logp.detach() + 0.3 * torch.randn(B, T, generator=g)
    return leaves, y, old.masked_fill(~mask, torch.nan), torch.tensor([1.0, -2.0, 0.5]), mask


def logits_of(leaves, mask):
    """Masked rows hold NaN, which a product with a gradient of 0 keeps."""
    hidden, *head = leaves
    return linear(torch.where(mask.unsqueeze(-1), hidden, 0), *head)


def gradients(loss, leaves, **options):
    return torch.autograd.grad(loss, [x for x in leaves if x.requires_grad], **options)


def separate(name, leaves, y, old, advantages, mask, *, kl=None, entropy_coef=0.0, lse_coef=0.0, aggregation="token-mean", **options):
    """The same from all logits."""
    stats = token_stats(logits_of(leaves, mask), y, mask=mask, temperature=0.7)
    counted = mask & (y != -100)
    how = {"aggregation": aggregation}
    if name == "ppo":
        options.setdefault("log_ratio_clamp", None)
    loss, metrics = LOSSES[name](stats.logp, old, advantages, counted, **how, **options)
    if kl is not None:
        reference, coef, kind = kl
        estimates = kl_estimate(stats.logp, torch.where(counted, reference, 0.0), kind)
        loss = loss + coef * rlkern.aggregate(estimates, counted, aggregation)
    loss = loss - entropy_coef * rlkern.aggregate(stats.entropy, counted, aggregation)
    return loss + rlkern.lse_penalty(stats.logsumexp, counted, coef=lse_coef, **how), metrics, stats


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunk_rows", [1, 4, None])
def test_named_losses_equal_token_stats_and_the_loss(name, chunk_rows):
    given = leaves, y, old, advantages, mask = problem()
    reference = old + 0.5
    for i, mode in enumerate(MODES):
        kl = (reference, 0.3, ("k1", "k2", "k3", "abs", "k3+")[i])
        terms = {"entropy_coef": 0.02, "lse_coef": 1e-3, "aggregation": mode}
        expected, metrics, stats = separate(name, *given, kl=kl, **terms)
        out = linear_fused_loss(
            leaves[0], leaves[1], y, old, advantages, mask, loss=name, bias=leaves[2], temperature=0.7, chunk_rows=chunk_rows,
            reference_logp=reference, kl_coef=0.3, kl_kind=kl[2], **terms,
        )  # fmt: skip
        torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close({k: out.metrics[k] for k in metrics}, metrics)
        torch.testing.assert_close(out.stats[:3], tuple(x.detach() for x in stats[:3]), rtol=1e-12, atol=1e-12)
        assert set(out.metrics) == {*metrics, "kl"} and not any(x.requires_grad for x in out.stats[:3])
        got, want = gradients(out.loss, leaves), gradients(expected, leaves)
        assert all(not x[..., ~mask, :].any() for x in got[:1])
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ppo", {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 1.5}),
        ("cispo", {"cap": 1.1}),
        ("sapo", {"log_ratio_clamp": 0.1}),
        ("ppo", {"weights": 2}),
    ],
)
def test_options_of_a_loss(name, options):
    given = leaves, y, old, advantages, mask = problem()
    options = {k: torch.rand(B, T) if k == "weights" else v for k, v in options.items()}
    expected, *_ = separate(name, *given, **options)
    out = linear_fused_loss(leaves[0], leaves[1], y, old, advantages, mask, loss=name, bias=leaves[2], temperature=0.7, chunk_rows=4, **options)
    torch.testing.assert_close(out.loss, expected)
    for a, b in zip(gradients(out.loss, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_cross_entropy_equals_pytorch():
    leaves, y, _, _, mask = problem()
    y = y.masked_fill(~mask, -100)
    out = linear_fused_loss(leaves[0], leaves[1], y, loss="ce", bias=leaves[2], chunk_rows=5)
    expected = torch.nn.functional.cross_entropy(logits_of(leaves, mask).flatten(0, 1), y.flatten())
    torch.testing.assert_close(out.loss, expected)
    for a, b in zip(gradients(out.loss, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("chunk_rows", [1, 7, None])
@pytest.mark.parametrize("num_valid", [False, True])
def test_a_loss_of_the_callers(chunk_rows, num_valid):
    leaves, y, old, _, mask = problem()
    counted = mask & (y != -100)
    weight = torch.where(counted, torch.rand(B, T, dtype=torch.float64), 0)
    old = torch.where(counted, old, 0)
    seen = []

    def loss(rows):
        seen.append(rows.index)
        ratio = (rows.logp - old.flatten()[rows.index]).exp()
        terms = -ratio.clamp(max=1.2) * rows.logp + rows.entropy.square() - rows.logsumexp.sin() + 3 * rows.sum_sq_prob + rows.kept_logmass
        return (terms * weight.flatten()[rows.index]).sum()

    options = {"min_p": 0.1, "with_sum_sq": True, "mask": mask, "temperature": 0.7}
    n = int(counted.sum()) if num_valid else None
    out = linear_fused_loss(leaves[0], leaves[1], y, bias=leaves[2], chunk_rows=chunk_rows, loss=loss, num_valid=n, **options)
    rows = torch.cat([torch.arange(B * T)[i] for i in seen])
    assert torch.equal(rows, counted.flatten().nonzero().squeeze(-1) if num_valid else torch.arange(B * T))
    stats = token_stats(logits_of(leaves, mask), y, **options)
    ratio = (stats.logp - old).exp().clamp(max=1.2)
    terms = -ratio * stats.logp + stats.entropy.square() - stats.logsumexp.sin() + 3 * stats.sum_sq_prob + stats.kept_logmass
    expected = (terms * weight).sum()
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.stats.kept_logmass, stats.kept_logmass.detach())
    assert torch.equal(out.stats.target_kept, stats.target_kept) and out.metrics == {}
    for a, b in zip(gradients(out.loss, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_several_targets_a_row_and_a_function_that_ignores_them():
    hidden, weight, _, _ = draw(5)
    y = torch.randint(V, (5, 3))
    out = linear_fused_loss(hidden, weight, y, loss=lambda rows: rows.logp.exp().sum(), chunk_rows=2)
    expected = token_stats(linear(hidden, weight), y).logp.exp().sum()
    torch.testing.assert_close(out.loss, expected)
    for a, b in zip(gradients(out.loss, (hidden, weight)), gradients(expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b)
    out = linear_fused_loss(hidden, weight, y, loss=lambda rows: torch.ones((), dtype=torch.float64), chunk_rows=2)
    assert out.loss == 3 and not any(g.any() for g in gradients(out.loss, (hidden, weight)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("expected", [1.0, 1 / 8, torch.tensor([4.0])])
def test_any_upstream_gradient_is_right_and_a_second_backward_too(dtype, expected):
    leaves, y, old, advantages, mask = problem(dtype)

    def loss():
        given = (leaves[0], leaves[1], y, old, advantages, mask)
        return linear_fused_loss(*given, bias=leaves[2], expected_grad=expected, temperature=0.7, chunk_rows=4).loss

    unit = gradients(loss(), leaves)
    one = loss()
    for factor in (1 / 8, 0.0, 65536.0, -2.0):
        g = torch.tensor(factor, dtype=one.dtype)
        for x, want in zip(gradients(one, leaves, grad_outputs=g, retain_graph=True), unit, strict=True):
            torch.testing.assert_close(x, factor * want, rtol=1e-12 if dtype == torch.float64 else 2**-6, atol=0)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(gradients(loss(), leaves, create_graph=True)[0].sum(), leaves[0])


def test_what_changes_between_forward_and_backward():
    leaves, y, *given = problem()
    expected = torch.tensor(4.0)
    one = linear_fused_loss(leaves[0], leaves[1], y, *given, bias=leaves[2], expected_grad=expected).loss
    first = gradients(one, leaves, retain_graph=True)
    one = linear_fused_loss(leaves[0], leaves[1], y, *given, bias=leaves[2], expected_grad=expected).loss
    expected.fill_(8)  # as a GradScaler does
    for a, b in zip(gradients(one, leaves, retain_graph=True), first, strict=True):
        torch.testing.assert_close(a, b)
    y.zero_()  # the second time it is computed again
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(one, leaves)


def test_scaled_half_precision_keeps_small_gradients():
    hidden, weight, bias, y = draw(4, 8, dtype=torch.float16)
    leaves, A = (hidden, weight, bias), torch.full((4,), 1e-6)
    scale = 65536.0
    out = linear_fused_loss(hidden, weight, y, None, A, loss="reinforce", bias=bias, expected_grad=scale)
    got = gradients(out.loss * scale, leaves)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    want = gradients(linear_fused_loss(wide[0], wide[1], y, None, A, loss="reinforce", bias=wide[2]).loss, wide)
    for a, b in zip(got, want, strict=True):
        assert (a.double() / scale - b).abs().max() <= 4e-3 * b.abs().max()


@pytest.mark.parametrize(("needs", "products"), [((True, True), 3), ((True, False), 2), ((False, True), 2), ((False, False), 1)])
@pytest.mark.parametrize("loss", ["ppo", lambda rows: rows.logp.sum()], ids=["named", "function"])
def test_products(needs, products, loss, monkeypatch):
    monkeypatch.setattr("rlkern.operator.watched", lambda x: False)  # the mode sees what runs inside the operators
    hidden, weight, _, y = draw(4, 8, bias=False, hidden=16, vocab=40)
    hidden.requires_grad_(needs[0]), weight.requires_grad_(needs[1])
    given = (torch.zeros(4, 8), torch.ones(4)) if loss == "ppo" else ()
    with Products(2 * 32 * 40 * 16) as counter:
        out = linear_fused_loss(hidden, weight, y, *given, loss=loss, chunk_rows=8)
        if any(needs):
            out.loss.backward()
    assert counter.products == products
    assert linear_plan(32, 16, 40, torch.float64, needs=(*needs, False), known=True).products == products
    assert out.loss.requires_grad == any(needs)


def test_without_gradients_it_is_one_product_and_the_same_loss():
    leaves, y, old, advantages, mask = problem()
    given = (leaves[0], leaves[1], y, old, advantages, mask)
    with_gradients = linear_fused_loss(*given, bias=leaves[2], chunk_rows=4)
    with torch.no_grad():
        without = linear_fused_loss(*given, bias=leaves[2], chunk_rows=4)
        function = linear_fused_loss(*given[:3], mask=mask, bias=leaves[2], loss=lambda rows: rows.logp.sum())
    torch.testing.assert_close(without.loss, with_gradients.loss.detach())
    assert not without.loss.requires_grad and function.loss == function.stats.logp.sum()
    with torch.no_grad(), pytest.raises(ValueError, match="0-d tensor, got shape"):
        linear_fused_loss(*given[:3], mask=mask, bias=leaves[2], loss=lambda rows: rows.logp)


def test_all_rows_masked_or_none():
    leaves, y, old, advantages, _ = problem()
    out = linear_fused_loss(leaves[0], leaves[1], y, old, advantages, torch.zeros(B, T), bias=leaves[2])
    assert out.loss == 0 and not any(g.any() for g in gradients(out.loss, leaves))
    empty = torch.zeros(0, T, H, dtype=torch.float64, requires_grad=True)
    out = linear_fused_loss(empty, leaves[1], y[:0], old[:0], advantages[:0])
    assert out.loss == 0 and gradients(out.loss, (empty, leaves[1]))[1].shape == (V, H)


def test_checkpoint_and_float32_logits():
    from torch.utils.checkpoint import checkpoint

    leaves, y, old, advantages, mask = problem(torch.bfloat16)

    def loss(hidden, weight, bias):
        return linear_fused_loss(hidden, weight, y, old, advantages, mask, bias=bias, logits_dtype=torch.float32, temperature=0.7, chunk_rows=4).loss

    want = gradients(loss(*leaves), leaves)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    torch.testing.assert_close(loss(*leaves).double(), separate("ppo", wide, y, old, advantages, mask)[0], rtol=1e-5, atol=1e-6)
    for reentrant in (False, True):
        copies = [x.detach().clone().requires_grad_() for x in leaves]
        checkpoint(loss, *copies, use_reentrant=reentrant).backward()
        assert all(torch.equal(a.grad, b) for a, b in zip(copies, want, strict=True))


@pytest.mark.slow
def test_compiled_it_is_the_statistics_and_the_loss():
    leaves, y, old, advantages, mask = problem(torch.float32)

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def step(hidden, weight, bias):
        named = linear_fused_loss(hidden, weight, y, old, advantages, mask, bias=bias, temperature=0.7)
        return named.loss + linear_fused_loss(hidden, weight, y, mask=mask, bias=bias, loss=lambda rows: rows.entropy.sum()).loss

    eager = linear_fused_loss(leaves[0], leaves[1], y, old, advantages, mask, bias=leaves[2], temperature=0.7).loss
    eager = eager + linear_fused_loss(leaves[0], leaves[1], y, mask=mask, bias=leaves[2], loss=lambda rows: rows.entropy.sum()).loss
    compiled = step(*leaves)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(gradients(compiled, leaves), gradients(eager, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"loss": "dpo"}, ValueError, "unknown loss 'dpo'"),
        ({"loss": 3}, TypeError, "loss must be one of ppo, .* or a function"),
        ({"loss": "reinforce", "dual_clip": 3.0}, ValueError, "dual_clip is no option of loss='reinforce'"),
        ({"loss": lambda rows: rows.logp.sum()}, ValueError, "old_logp is no option of a loss that is a function"),
        ({"loss": lambda rows: rows.logp, "old_logp": None, "advantages": None}, ValueError, r"0-d tensor, got shape \(21,\)"),
        ({"loss": lambda rows: 3, "old_logp": None, "advantages": None}, TypeError, "must return a float tensor"),
        ({"loss": lambda rows: torch.tensor(3), "old_logp": None, "advantages": None}, TypeError, "got a tensor of torch.int64"),
        (
            {"loss": lambda rows: (rows.logp * COEF.prod()).sum(), "old_logp": None, "advantages": None},
            ValueError,
            r"by another tensor \(2,\): detach",
        ),
        ({"loss": lambda rows: COEF.sum(), "old_logp": None, "advantages": None}, ValueError, r"by another tensor \(2,\): detach"),
        ({"loss": lambda rows: 3, "old_logp": None, "advantages": None, "aggregation": "grpo"}, ValueError, "aggregation is no option"),
        ({"advantages": None}, TypeError, "needs advantages"),
        ({"old_logp": torch.zeros(B, T + 1)}, ValueError, "old_logp must have the shape"),
        ({"kl_coef": 0.1}, ValueError, "needs reference_logp"),
        ({"entropy_coef": 0.1, "with_entropy": False}, ValueError, "needs with_entropy=True"),
        ({"expected_grad": 0}, ValueError, "expected_grad must not be 0"),
        ({"expected_grad": torch.zeros(2)}, ValueError, "expected_grad must be"),
        ({"aggregation": "sum"}, ValueError, "aggregation mode"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows"),
        ({"workspace": -1}, ValueError, "workspace"),
        ({"hidden": torch.zeros(B * T, H)}, ValueError, r"takes hidden \[B, T, H\]"),
        ({"group": object()}, ValueError, "group"),
    ],
)
def test_errors(change, error, message):
    leaves, y, old, advantages, mask = problem(torch.float32)
    arguments = {"hidden": leaves[0], "weight": leaves[1], "targets": y, "old_logp": old, "advantages": advantages, "mask": mask}
    if "hidden" in change:
        arguments |= {"targets": y.flatten(), "mask": None}
    with pytest.raises(error, match=message):
        linear_fused_loss(**(arguments | change))


def test_transforms_of_raw_logits():
    leaves, y, old, advantages, mask = problem()
    transforms = {"logit_scale": 1.5, "softcap": 2.0}
    out = linear_fused_loss(leaves[0], leaves[1], y, old, advantages, mask, bias=leaves[2], chunk_rows=4, **transforms)
    stats = token_stats(logits_of(leaves, mask), y, mask=mask, **transforms)
    expected = rlkern.ppo_loss(stats.logp, old, advantages, mask & (y != -100), log_ratio_clamp=None).loss
    torch.testing.assert_close(out.loss, expected)
    for a, b in zip(gradients(out.loss, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_make_fx_records_operators():
    from torch.fx.experimental.proxy_tensor import make_fx

    (hidden, weight, _), y, old, advantages, mask = problem(torch.float32)
    hidden = hidden.detach().nan_to_num()

    def f(hidden, weight):
        return linear_fused_loss(hidden, weight, y, old, advantages, mask).loss

    graph, other = make_fx(f)(hidden, weight), 2 * hidden
    torch.testing.assert_close(graph(other, weight), f(other, weight))
