"""logit_scale and softcap of raw logits: against the printed formula in float64, on every backend."""

import itertools
import math

import oracle
import pytest
import torch
from oracle import INF, draw, ids

import rlkern
from rlkern import backends, reference
from rlkern.integrations import logit_transforms

ISAS = [f"native {isa}" for isa in getattr(backends.load("native"), "isas", lambda: [])()]
BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton", *ISAS[:1], *ISAS[-1:]], indirect=True)
ALL = pytest.mark.parametrize("backend", ["reference", "triton", *ISAS], indirect=True)
ACCURACY = {torch.float64: 1e-11, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
ROUNDING = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
SCALE, CAP = 1.3, 30.0


def check(logits, targets, *, inplace_backward=False, scale=SCALE, cap=CAP, **options):
    """Every statistic and its gradient."""
    leaf, exact = logits.detach().requires_grad_(), logits.detach().double().cpu().clone().requires_grad_()
    stats = rlkern.token_stats(leaf, targets, logit_scale=scale, softcap=cap, inplace_backward=inplace_backward, **options)
    of_reference = {k: v.double().cpu() if isinstance(v, torch.Tensor) else v for k, v in options.items() if k != "with_sum_sq"}
    want = reference.token_stats(exact, targets.cpu(), logit_scale=scale, softcap=cap, **of_reference)
    values = [(name, getattr(stats, name), getattr(want, name)) for name in oracle.FIELDS if getattr(stats, name) is not None]
    for name, got, right in values:
        tolerance = ACCURACY[logits.dtype]
        torch.testing.assert_close(got.double().cpu(), right, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")
    upstream = oracle.upstream([right for _, _, right in values])
    torch.autograd.backward([got for _, got, _ in values], [g.to(got) for g, (_, got, _) in zip(upstream, values, strict=True)])
    torch.autograd.backward([right for _, _, right in values], upstream)
    tolerance = ROUNDING[logits.dtype]
    atol = max(2**-25 if logits.dtype == torch.float16 else 0, ACCURACY[logits.dtype] * exact.grad.abs().max().item())
    torch.testing.assert_close(leaf.grad.double().cpu(), exact.grad, rtol=tolerance, atol=atol)
    return stats, leaf.grad


OPTIONS = ({"min_p": 0.01, "with_sum_sq": True}, {"min_prob": 0.001, "temperature": 0.7}, {"with_tail": True}, {"temperature": None})


@ALL
@pytest.mark.parametrize(("vocab", "dtype"), [(7, torch.float32), (2049, torch.bfloat16), (2049, torch.float64)], ids=str)
def test_every_statistic_and_gradient(backend, device, vocab, dtype):
    x = draw(2, 3, vocab + 3, dtype=dtype, scale=25.0, device=device)[:, :, 1 : vocab + 1]  # no row starts on a boundary
    x[0, 1, ::5] = -INF
    for options, k in zip(OPTIONS, (1, 3, 20, 3), strict=True):
        y = ids(vocab, 2, 3, k, device=device)
        y[1, 1] = y[1, 1, 0]
        if "temperature" in options and options["temperature"] is None:
            options = {"temperature": 0.5 + torch.rand(2, 3, generator=torch.Generator().manual_seed(0)).to(device)}
        check(x.clone() if k == 20 else x, y, **options)


@BACKENDS
def test_split_and_whole_rows_in_place(backend, device, monkeypatch):
    if backend == "triton":
        from rlkern.triton_kernels import launch, token_stats

        monkeypatch.setattr(token_stats, "forward_shape", lambda *_: launch.ForwardShape(256, 1, 2, splits=4))
        monkeypatch.setattr(token_stats, "backward_shape", lambda *_: launch.BackwardShape(256, 1, 2, tiles=3))
    x = draw(3, 1501, scale=25.0, device=device)
    for k, options in ((1, {"min_p": 0.1}), (20, {"with_tail": True})):  # written with their tile, and by themselves
        y = ids(1501, 3, k, device=device)
        y[:, -1] = y[:, 0]
        _, want = check(x, y, **options)
        memory = x.clone()
        _, got = check(memory, y, inplace_backward=True, **options)
        assert torch.equal(got, want) and got.data_ptr() == memory.data_ptr()


@ALL
def test_slope_where_tanh_is_1(backend, device):
    """Relative to itself. 1 - tanh^2 is 0 from 9 on in float32, from 19 on in float64."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        a = torch.cat([torch.linspace(-40, 40, 161, dtype=torch.float64), torch.tensor([1e-6, -1e-3, 0.1, 0.54, -0.56], dtype=torch.float64)])
        x = (a * CAP).to(dtype).to(device).requires_grad_()
        slope = 1 / (x.detach().double().cpu() / CAP).cosh().square()
        k = rlkern.token_stats(x.unsqueeze(0), torch.zeros(1, dtype=torch.int64, device=device), softcap=CAP, temperature=1e6).logsumexp
        (g,) = torch.autograd.grad(k * 1e8, x)  # no subnormal numbers
        p = (CAP * (x.detach().double().cpu() / CAP).tanh() / 1e6).softmax(0)
        torch.testing.assert_close(g.double().cpu() / 100 / p, slope, rtol=tolerance, atol=0)
        y = torch.tensor([[a.argmax()]], device=device)  # a target in saturation
        (g,) = torch.autograd.grad(rlkern.token_logprobs(x.unsqueeze(0), y, softcap=CAP).sum(), x)
        p = (CAP * (x.detach().double().cpu() / CAP).tanh()).softmax(0)
        assert g[y.item()].item() == pytest.approx(((1 - p) * slope)[y.item()].item(), rel=2 * tolerance)


@BACKENDS
def test_small_logits_lose_nothing(backend, device):
    """A (1 - r) / (1 + r) alone would have an absolute error of cap * 6e-8."""
    x = draw(4, 50, scale=1e-3, device=device)
    stats = rlkern.token_stats(x, ids(50, 4, device=device), softcap=CAP, temperature=1e-3)
    want = reference.token_stats(x.double().cpu(), ids(50, 4, 1), 1e-3, softcap=CAP)
    torch.testing.assert_close(stats.entropy.double().cpu(), want.entropy, rtol=1e-6, atol=0)


@BACKENDS
def test_a_large_cap_is_none(backend, device):
    x, y = draw(4, 300, scale=5.0, device=device), ids(300, 4, 2, device=device)
    got, want = (rlkern.token_stats(x, y, logit_scale=0.7, softcap=cap, min_p=0.1) for cap in (1e6, None))
    for a, b in zip(got, want, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@BACKENDS
def test_masked_and_undefined_entries(backend, device):
    """-inf is no logit but a mask: cap(-inf) = -cap would give it mass. NaN stays. +inf is the cap."""
    x, y = draw(6, 37, scale=20.0, device=device), ids(36, 6, device=device)
    x[:, 36] = -INF
    x[1, 5], x[2], x[3, 4], y[4], x[4] = math.nan, -INF, INF, -100, math.nan
    leaf = x.clone().requires_grad_()
    stats = rlkern.token_stats(leaf, y, softcap=CAP, logit_scale=SCALE)
    assert stats.logp.isnan().tolist() == [False, True, True, False, False, False] == stats.entropy.isnan().tolist()
    assert stats.logp[4] == 0 and stats.logsumexp[2] == -INF
    finite = x[[0, 5], :36]
    want = reference.token_stats(finite.double().cpu(), y[[0, 5], None].cpu(), logit_scale=SCALE, softcap=CAP)
    torch.testing.assert_close(stats.logsumexp[[0, 5]].double().cpu(), want.logsumexp, rtol=1e-6, atol=0)
    infinite = reference.token_stats(x[3:4].double().cpu(), y[3:4, None].cpu(), logit_scale=SCALE, softcap=CAP)
    torch.testing.assert_close(stats.logp[3:4, None].double().cpu(), infinite.logp, rtol=2e-6, atol=0)
    (g,) = torch.autograd.grad(stats.logp[[0, 3, 4, 5]].sum() + stats.entropy[[0, 3, 4, 5]].sum(), leaf)
    assert g.isfinite().all() and (g[:, 36] == 0).all() and (g[4] == 0).all() and g[3, 4] == 0
    certain = torch.full((1, 37), -INF, device=device)
    certain[0, 8] = 7.0
    assert rlkern.token_logprobs(certain, torch.tensor([8], device=device), softcap=CAP).item() == 0


@ALL
def test_confident_rows_keep_their_digits(backend, device):
    """The target is the maximum, to the bit, wherever it stands."""
    for at in (0, 8, 36):
        x = torch.full((1, 37), -40.0, device=device)
        x[0, at] = 35.3
        stats = rlkern.token_stats(x, torch.tensor([at], device=device), softcap=CAP, min_p=1.0)
        z = CAP * (x.double() / CAP).tanh()
        rest = 36 * math.exp((z.min() - z.max()).item())
        assert stats.logp.item() == pytest.approx(-math.log1p(rest), rel=1e-5) and stats.target_kept.item()


@BACKENDS
def test_a_scale_without_a_cap_is_a_temperature(backend, device):
    x, y = draw(4, 300, device=device), ids(300, 4, device=device)
    for t in (0.7, torch.tensor([0.5, 1.0, 2.0, 1.5], device=device)):
        got, want = (
            rlkern.token_stats(x, y, logit_scale=1.7, temperature=t, min_prob=0.01),
            rlkern.token_stats(x, y, temperature=t / 1.7, min_prob=0.01),
        )
        assert all(a is None or torch.equal(a, b) for a, b in zip(got, want, strict=True))


def naive(x, cap, scale):
    return cap * (scale * x / cap).tanh()


@pytest.mark.parametrize("wrong", [
    lambda x: x * (x / CAP).tanh(),  # multiplied by the logit
    lambda x: naive(x, CAP, 1.0),  # the scale is missing
    lambda x: SCALE * naive(x, CAP, 1.0),  # the scale after the cap
    lambda x: naive(naive(x, CAP, SCALE), CAP, 1.0),  # capped twice
    lambda x: SCALE * x,  # the cap is missing
])  # fmt: skip
def test_what_others_got_wrong_is_another_number(wrong):
    x, y = draw(4, 50, dtype=torch.float64, scale=20.0), ids(50, 4, 1)
    got = rlkern.token_logprobs(x, y, logit_scale=SCALE, softcap=CAP)
    assert (got - reference.token_stats(wrong(x), y).logp).abs().min() > 1e-4
    torch.testing.assert_close(got, reference.token_stats(naive(x, CAP, SCALE), y).logp)


def test_every_way_in_takes_them():
    """A cap in one of two paths only is a bug that others had."""
    x, y = draw(4, 50, dtype=torch.float64, scale=20.0), ids(50, 4)
    z, options = naive(x, CAP, SCALE), {"logit_scale": SCALE, "softcap": CAP}
    torch.testing.assert_close(rlkern.entropy_from_logits(x, temperature=2.0, **options), rlkern.entropy_from_logits(z, temperature=2.0))
    torch.testing.assert_close(rlkern.token_logprobs(x, y, **options), rlkern.token_logprobs(z, y))
    hidden, weight, bias = draw(6, 8, dtype=torch.float64, seed=2), draw(50, 8, dtype=torch.float64, seed=3), draw(50, dtype=torch.float64, seed=4)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    y = ids(50, 6)

    def loss(stats):
        return (stats.logp + stats.entropy).sum()

    got = loss(rlkern.linear_token_stats(leaves[0], leaves[1], y, bias=leaves[2], chunk_rows=4, **options))
    want = loss(rlkern.token_stats(naive(leaves[0] @ leaves[1].T + leaves[2], CAP, SCALE), y))
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_and_twice_differentiable_form():
    x, y = draw(4, 50, scale=20.0).requires_grad_(), ids(50, 4)

    def loss(x):
        stats = rlkern.token_stats(x, y, softcap=CAP, logit_scale=SCALE, temperature=0.7)
        return (stats.logp + stats.entropy).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*(torch.autograd.grad(f(x), x)[0] for f in (compiled, loss)))
    z = draw(2, 5, dtype=torch.float64, scale=20.0).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda z: reference.token_stats(z, ids(5, 2, 1), softcap=CAP).logp, z)


@pytest.mark.parametrize("name", ["logit_scale", "softcap"])
@pytest.mark.parametrize("value", [0, -1, math.nan, INF, 1e39, "30", True, torch.ones(())])
def test_errors(name, value):
    x, y = draw(2, 5), ids(5, 2)
    hidden, weight = draw(2, 3), draw(5, 3)
    for call in (
        lambda **o: rlkern.token_stats(x, y, **o),
        lambda **o: rlkern.entropy_from_logits(x, **o),
        lambda **o: rlkern.linear_token_stats(hidden, weight, y, **o),
    ):
        with pytest.raises((TypeError, ValueError), match=name):
            call(**{name: value})


def test_numbers_that_do_not_go_together():
    x, y = draw(2, 5), ids(5, 2)
    for options in ({"logit_scale": 1e30, "temperature": 1e-30}, {"softcap": 1e30, "temperature": 1e-30}, {"softcap": 1e-30, "logit_scale": 1e30}):
        with pytest.raises(ValueError, match=r"logit_scale=.*, softcap=.* temperature"):
            rlkern.token_stats(x, y, **options)


# --- pairs --------------------------------------------------------------------------------------------------

SIDES = ({}, {"other_softcap": INF}, {"softcap": None, "other_softcap": 20.0}, {"other_logit_scale": 0.5, "other_temperature": 0.9})


@BACKENDS
@pytest.mark.parametrize(
    ("kind", "dtype", "cases"),
    [
        ("reverse_kl", torch.bfloat16, (0, 1)),
        ("mixed_kl", torch.float64, (2, 3)),
        ("jsd", torch.float32, (1, 2)),
        ("cross_entropy", torch.float32, (0, 3)),
    ],
    ids=str,
)
def test_pairs(backend, device, kind, dtype, cases):
    """Both gradients; caps of one family, of the first or the second model alone, and two of their own."""
    for sides, vocab in ((SIDES[i], 260 if i % 2 else 37) for i in cases):
        x = draw(2, 3, vocab + 1, dtype=torch.float32, scale=15.0, device=device)
        other, x = (x + draw(2, 3, vocab + 1, scale=3.0, seed=5, device=device)).to(dtype), x.to(dtype)
        options = {"logit_scale": SCALE, "softcap": CAP, "temperature": 0.8, **sides}
        y, both = ids(vocab, 2, 3, device=device), kind != "cross_entropy"
        leaves = [t[..., 1:].detach().requires_grad_() for t in (x, other)]
        exact = [t.detach().double().cpu().requires_grad_() for t in leaves]
        got = rlkern.pair_stats(leaves[0], leaves[1], y, kind=kind, other_grad=both, **options)
        own = {name: options[name] for name in ("logit_scale", "softcap", "temperature")}
        want = reference.token_stats(exact[0], y.unsqueeze(-1).cpu(), **own)
        divergence = reference.token_divergence(*exact, kind, **options)
        tolerance = 1e-11 if dtype == torch.float64 else 5e-6
        for a, b in ((got.divergence, divergence), (got.logp, want.logp.squeeze(-1)), (got.entropy, want.entropy)):
            torch.testing.assert_close(a.double().cpu(), b, rtol=tolerance, atol=tolerance)
        g = oracle.upstream([divergence] * 3)
        grads = torch.autograd.grad([got.divergence, got.logp, got.entropy], leaves[: 1 + both], [t.to(got.logp) for t in g])
        right = torch.autograd.grad([divergence, want.logp.squeeze(-1), want.entropy], exact[: 1 + both], g)
        rounding = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2**-7}[dtype]
        for a, b in zip(grads, right, strict=True):
            torch.testing.assert_close(a.double().cpu(), b, rtol=rounding, atol=10 * tolerance * b.abs().max().item())


@BACKENDS
def test_equal_pairs_are_0_apart(backend, device):
    x = draw(3, 50, scale=20.0, device=device)
    for t in (0.7, torch.tensor([0.5, 1.0, 2.0], device=device)):
        for cap in (None, CAP):
            assert (rlkern.token_divergence(x, x.clone(), softcap=cap, logit_scale=SCALE, temperature=t, kind="jsd") == 0).all()


def test_pairs_in_place_masked_and_from_hidden_states():
    x, other, y = draw(4, 50, scale=20.0), draw(4, 50, scale=20.0, seed=3), ids(50, 4)
    x[:, 7] = other[:, 7] = -INF
    options = {"softcap": CAP, "other_softcap": INF, "logit_scale": SCALE, "kind": "reverse_kl"}

    def gradient(leaf, **more):
        stats = rlkern.pair_stats(leaf, other, y, **options, **more)
        return torch.autograd.grad((stats.divergence + stats.logp).sum(), leaf)[0]

    want, memory = gradient(x.clone().requires_grad_()), x.clone().requires_grad_()
    assert torch.equal(gradient(memory, inplace_backward=True), want) and want.isfinite().all() and (want[:, 7] == 0).all()
    hidden, weight, others = (draw(*shape, dtype=torch.float64, seed=s, scale=3.0) for s, shape in enumerate([(6, 8), (50, 8), (6, 8)]))
    leaf = hidden.clone().requires_grad_()
    got = rlkern.linear_token_divergence(leaf, weight, others, weight, chunk_rows=4, other_logit_scale=0.7, softcap=CAP)
    want = rlkern.token_divergence(naive(leaf @ weight.T, CAP, 1.0), naive(others @ weight.T, CAP, 0.7))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(d.sum(), leaf)[0] for d in (got, want)))


def test_errors_of_pairs():
    x, other = draw(2, 5), draw(2, 5, seed=3)
    for name in ("logit_scale", "softcap", "other_logit_scale", "other_softcap"):
        for value in (0, -1, math.nan, "30", True, *([] if name == "other_softcap" else [INF])):
            with pytest.raises((TypeError, ValueError), match=rf"^{name} "):
                rlkern.token_divergence(x, other, **{name: value})


# --- configs ------------------------------------------------------------------------------------------------


class Config:
    """Attributes and no more, as of a model with a config of its own."""

    def __init__(self, **attributes):
        vars(self).update(attributes)


@pytest.mark.parametrize(("attributes", "scale", "cap"), [
    ({}, 1.0, None),
    ({"logit_scale": 0.0625}, 0.0625, None),
    ({"logit_scale": None, "final_logit_softcapping": None}, 1.0, None),
    ({"model_type": "granite", "logits_scaling": 8}, 0.125, None),
    ({"model_type": "hyperclovax", "logits_scaling": 0.125}, 0.125, None),
    ({"model_type": "minicpm", "hidden_size": 2304, "dim_model_base": 256}, 1 / 9, None),
    ({"model_type": "falcon_h1", "lm_head_multiplier": 0.04}, 0.04, None),
    ({"final_logit_softcapping": 20.0, "output_multiplier": 0.2}, 0.2, 20.0),
    ({"final_logit_softcapping": 30}, 1.0, 30.0),
    ({"logits_soft_cap": 30.0}, 1.0, 30.0),
])  # fmt: skip
def test_attributes_of_configs(attributes, scale, cap):
    config = Config(**attributes)
    assert logit_transforms(config) == {"logit_scale": pytest.approx(scale), "softcap": cap}
    assert logit_transforms(config, other=True) == {"other_logit_scale": pytest.approx(scale), "other_softcap": cap or INF}
    nested = Config(get_text_config=lambda decoder: config, logit_scale=77.0)
    assert logit_transforms(nested) == logit_transforms(config)


SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
SMALL |= {"head_dim": 8, "pad_token_id": 0}
_MLA = {"num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
MODELS = {
    "Gemma2": {"final_logit_softcapping": 0.3, "query_pre_attn_scalar": 8},
    "Granite": {"logits_scaling": 7.0},
    "Cohere": {"logit_scale": 0.3},
    "HyperCLOVAX": {"logits_scaling": 0.3},
    "MiniCPM3": {"dim_model_base": 4, **_MLA},
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_transformers(name):
    """Raw logits, and hidden states, give what the model's own logits give."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config = getattr(transformers, f"{name}Config")(**SMALL | MODELS[name])
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().double()
    model.lm_head.weight.data *= 20
    tokens = ids(64, 2, 9)
    with torch.no_grad():
        logits, hidden = model(tokens).logits, model.model(tokens).last_hidden_state
    want = rlkern.token_stats(logits[:, :-1], tokens[:, 1:])
    transforms = logit_transforms(config)
    assert transforms != {"logit_scale": 1.0, "softcap": None}
    raw = torch.nn.functional.linear(hidden, model.lm_head.weight)
    for got in (
        rlkern.token_stats(raw[:, :-1], tokens[:, 1:], **transforms),
        rlkern.linear_token_stats(hidden[:, :-1], model.lm_head.weight, tokens[:, 1:], **transforms),
    ):
        for a, b in itertools.islice(zip(got, want, strict=True), 3):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # some heads compute in float32
    plain = rlkern.token_stats(raw[:, :-1], tokens[:, 1:])
    assert (plain.entropy - want.entropy).abs().max() > 1e-3
