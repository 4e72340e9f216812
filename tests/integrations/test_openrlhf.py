"""rlkern under OpenRLHF's names, against OpenRLHF's own functions.

OpenRLHF as a whole does not import without a GPU: its models need flash-attn and DeepSpeed. models/loss.py
and models/utils.py need one name of these at import. Nothing tested here uses it, so it gets a stand-in.
"""

import importlib
import importlib.metadata
import importlib.util
import itertools
import math
import sys
import types

import pytest
import torch

import rlkern
from rlkern.integrations import openrlhf as rlkern_openrlhf

INSTALLED = importlib.util.find_spec("openrlhf") is not None
needs_openrlhf = pytest.mark.skipif(not INSTALLED, reason="OpenRLHF is not installed (requirements-trainers.txt)")


@pytest.fixture(scope="module")
def theirs():
    """OpenRLHF's models.loss and models.utils."""
    patch = pytest.MonkeyPatch()
    models = types.ModuleType("openrlhf.models")
    models.__path__ = [f"{path}/models" for path in importlib.util.find_spec("openrlhf").submodule_search_locations]
    patch.setitem(sys.modules, models.__name__, models)
    if importlib.util.find_spec("deepspeed") is None:
        patch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    loss, utils = importlib.import_module("openrlhf.models.loss"), importlib.import_module("openrlhf.models.utils")
    importlib.import_module("openrlhf").models = models
    models.PolicyLoss = loss.PolicyLoss
    yield types.SimpleNamespace(loss=loss, utils=utils, models=models)
    for name in [n for n in sys.modules if n.startswith("openrlhf")]:
        del sys.modules[name]
    patch.undo()


def batch(seed=0, n=5, length=9):
    g = torch.Generator().manual_seed(seed)
    logp = -torch.rand(n, length, generator=g, dtype=torch.float64).square() * 4 - 0.01
    old = logp + 0.5 * torch.randn(n, length, generator=g, dtype=torch.float64)
    rollout = old + 0.3 * torch.randn(n, length, generator=g, dtype=torch.float64)
    rollout[0, 0], rollout[1, 1] = old[0, 0] - 3, old[1, 1] + 3
    advantages = 1.5 * torch.randn(n, length, generator=g, dtype=torch.float64)
    old[0, :2] = logp[0, :2] + torch.tensor([-2.0, -25.0], dtype=torch.float64)
    advantages[0, :3] = torch.tensor([-1.0, -1.0, 0.0], dtype=torch.float64)
    mask = (torch.arange(length) < torch.tensor([length, 4, 7, 1, 0])[:n, None]).to(torch.int64)
    return logp, old, advantages, mask, rollout


CORRECTIONS = (
    {},
    dict(is_correction_level="token", is_correction_mode="clip", is_correction_threshold=(0.8, 1.2)),
    dict(is_correction_level="token", is_correction_threshold=(0.7, 1.3)),
    dict(is_correction_level="seq", is_correction_threshold=(0.9, 1.2)),
    dict(is_correction_level="token", is_correction_gating="tv", is_correction_threshold=(0, 0.1)),
    dict(is_correction_level="token", is_correction_gating="binary_kl", is_correction_threshold=(0, 0.02)),
    dict(is_correction_level="seq", is_correction_gating="binary_kl", is_correction_threshold=(0, 0.05)),
)


@needs_openrlhf
@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda c: "-".join(str(v) for v in c.values() if isinstance(v, str)) or "off")
@pytest.mark.parametrize("kind", ("ppo", "gspo"))
def test_policy_loss_is_openrlhfs(theirs, kind, correction):
    counts = dict(dp_size=2, batch_num_tokens=37.0, global_batch_size=12.0)
    for seed, dual_clip, token_level, info in itertools.product(range(2), (None, 2.5), (True, False), ({}, counts)):
        logp, old, advantages, mask, rollout = batch(seed)
        options = dict(clip_eps_low=0.15, clip_eps_high=0.28, dual_clip=dual_clip, token_level_loss=token_level, policy_loss_type=kind, **correction)
        results = []
        for loss in (theirs.loss.PolicyLoss(**options), rlkern_openrlhf.PolicyLoss(**options)):
            leaf = logp.clone().requires_grad_()
            value, *rest = loss(leaf, old, advantages, action_mask=mask, rollout_log_probs=rollout, **info)
            results.append([value.detach(), torch.autograd.grad(value, leaf)[0], *rest])
        for ours, expected in zip(results[1], results[0], strict=True):
            assert (ours is None) == (expected is None)
            if expected is not None:
                torch.testing.assert_close(ours.double(), expected.double(), rtol=1e-7, atol=1e-7)
        assert results[0][1].abs().max() > 0 and 0 < results[0][2] < 1
        if correction and kind == "ppo":
            assert 0 < results[1][-1] < 1


WIDE = ({}, *(c for c in CORRECTIONS if c.get("is_correction_mode") != "clip"), dict(is_correction_level="seq"))


@needs_openrlhf
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_weights_that_overflow_leave_the_loss_finite(theirs, dtype):
    """Log ratios to the rollout that cancel in a sequence's mean: the gate lets them through."""
    infinite = 0
    for size, correction, kind, dual_clip in itertools.product((60, 84, 100, 1e4), WIDE, ("ppo", "gspo"), (None, 2.0)):
        logp = torch.tensor([[-3.0, -3.0, -2.0], [-1.0, -3.0, -0.5]], dtype=dtype)
        old = logp + torch.tensor([[0.1, -0.2, 0.3], [0.0, 0.0, -25.0]], dtype=dtype)
        rollout = old + torch.tensor([[-size, size, 0.0], [-size, 0.0, size]], dtype=dtype)
        advantages, mask = torch.tensor([[1.5], [-2.0]], dtype=dtype).expand(2, 3), torch.ones(2, 3)
        results = []
        for loss in (theirs.loss.PolicyLoss, rlkern_openrlhf.PolicyLoss):
            leaf = logp.clone().requires_grad_()
            value = loss(policy_loss_type=kind, dual_clip=dual_clip, **correction)(leaf, old, advantages, mask, rollout)[0]
            results.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
        expected, ours = results
        assert ours[0].isfinite() and ours[1].isfinite().all(), (size, correction, kind, dual_clip)
        if expected[0].isfinite() and expected[1].isfinite().all():
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
        else:
            infinite += 1
    assert infinite > 3


@pytest.mark.parametrize("level", ["token", "seq"])
def test_weights_of_half_precision_and_of_few_tokens(level):
    """The bound on a weight is float32's, whatever the dtype given, and knows what the sum is divided by."""
    zeros = torch.zeros(8, 1024, dtype=torch.float16)
    loss = rlkern_openrlhf.PolicyLoss(is_correction_level=level)(zeros, zeros, zeros + 1, zeros + 1, zeros - 1.5)[0]
    assert loss.item() == pytest.approx(-math.exp(1.5), rel=1e-5)
    for token_level, counts in ((True, {"dp_size": 8, "batch_num_tokens": 1.0}), (False, {"dp_size": 64, "global_batch_size": 2})):
        leaf = torch.zeros(1, 2, requires_grad=True)
        policy_loss = rlkern_openrlhf.PolicyLoss(is_correction_level="seq", token_level_loss=token_level)
        loss = policy_loss(leaf, torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2), torch.tensor([[-100.0, 100.0]]), **counts)[0]
        loss.backward()
        assert loss.isfinite() and leaf.grad.isfinite().all()


@needs_openrlhf
def test_functions_of_logits(theirs):
    g = torch.Generator().manual_seed(0)
    exact = 3 * torch.randn(2, 4, 203, generator=g)
    labels = torch.randint(203, (2, 4), generator=g)
    expected = (exact.double() / 0.7).log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    ours = rlkern_openrlhf.log_probs_from_logits(exact, labels, temperature=0.7)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs.utils.log_probs_from_logits(exact.clone(), labels, temperature=0.7), ours, rtol=1e-4, atol=1e-4)
    rounded = exact.bfloat16()
    assert theirs.utils.log_probs_from_logits(rounded, labels).dtype == torch.bfloat16
    ours = rlkern_openrlhf.log_probs_from_logits(rounded, labels)
    expected = rounded.double().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(theirs.utils.compute_entropy(exact), rlkern_openrlhf.compute_entropy(exact), rtol=1e-5, atol=1e-5)


def test_results_merge_as_openrlhf_weighs_them():
    """Its trainer weighs what is 0-d by the tokens of each micro-batch: 6 of 16, one without tokens."""
    sums, total = torch.zeros(4), 0
    for count, tokens in ((3, 12), (3, 4), (2, 0)):
        d = torch.zeros(1, 12)
        d[:, :count] = 0.5
        mask = torch.arange(12).unsqueeze(0) < tokens
        loss = rlkern_openrlhf.PolicyLoss(is_correction_level="token", is_correction_threshold=(0.5, 1.2))
        _, *results = loss(d - 2, torch.full_like(d, -2.0), torch.ones_like(d), action_mask=mask, rollout_log_probs=-2 - d)
        assert all(x.dim() == 0 and not x.requires_grad for x in results)
        sums, total = sums + tokens * torch.stack(results), total + tokens
    torch.testing.assert_close(sums / total, torch.tensor([0.375, -0.1875, -0.1875, 0.375]))


def test_logits_are_not_scaled_in_place():
    logits = torch.randn(3, 17)
    before = logits.clone()
    rlkern_openrlhf.log_probs_from_logits(logits, torch.tensor([0, 1, 2]), temperature=2.0)
    assert torch.equal(logits, before)


def test_without_tokens_the_loss_is_0():
    logp, old, advantages, mask, _ = batch()
    leaf = logp.requires_grad_()
    value, clip_ratio, *_ = rlkern_openrlhf.PolicyLoss()(leaf, old, advantages, action_mask=torch.zeros_like(mask))
    assert value == 0 and clip_ratio == 0 and (torch.autograd.grad(value, leaf)[0] == 0).all()


def test_no_mask_counts_every_token():
    logp, old, advantages, mask, _ = batch()
    loss = rlkern_openrlhf.PolicyLoss()
    assert loss(logp, old, advantages)[0] == loss(logp, old, advantages, torch.ones_like(mask))[0]


def test_masked_garbage_stays_out():
    logp, old, advantages, mask, rollout = batch()
    logp[1, 6], old[1, 7], advantages[1, 8], rollout[1, 5] = math.nan, math.inf, math.nan, -math.inf
    for kind, correction in itertools.product(("ppo", "gspo"), CORRECTIONS):
        leaf = logp.clone().requires_grad_()
        value, *_ = rlkern_openrlhf.PolicyLoss(policy_loss_type=kind, **correction)(leaf, old, advantages, mask, rollout)
        assert value.isfinite() and torch.autograd.grad(value, leaf)[0].isfinite().all()


@pytest.mark.parametrize(
    "options, error, message",
    (
        (dict(policy_loss_type="cispo"), ValueError, "unknown policy_loss_type 'cispo', expected one of 'ppo', 'gspo'"),
        (dict(is_correction_level="tok"), ValueError, "unknown is_correction_level 'tok'"),
        (dict(is_correction_mode="drop"), ValueError, "unknown is_correction_mode 'drop'"),
        (dict(is_correction_gating="kl"), ValueError, "unknown is_correction_gating 'kl'"),
        (dict(is_correction_level="seq", is_correction_mode="clip"), ValueError, "needs is_correction_level 'token'"),
        (dict(is_correction_level="token", is_correction_gating="tv"), ValueError, r"must be \(0, bound\), got \(0.5, 5.0\)"),
        (dict(dual_clip=1.0), ValueError, "dual_clip must be above 1, got 1.0"),
        (dict(clip_eps_low=1.2), ValueError, "clip_eps_low must be in"),
        (dict(enable_vllm_is_correction=True), TypeError, "enable_vllm_is_correction"),
    ),
)
def test_refusals(options, error, message):
    with pytest.raises(error, match=message):
        rlkern_openrlhf.PolicyLoss(**options)


def test_correction_needs_rollout_log_probs():
    logp, old, advantages, mask, _ = batch()
    with pytest.raises(ValueError, match="needs rollout_log_probs"):
        rlkern_openrlhf.PolicyLoss(is_correction_level="token")(logp, old, advantages, mask)


@needs_openrlhf
def test_patch(theirs, monkeypatch):
    original = theirs.utils.log_probs_from_logits, theirs.utils.compute_entropy, theirs.loss.PolicyLoss
    actor = types.ModuleType("openrlhf.models.actor")
    actor.log_probs_from_logits, actor.compute_entropy = original[:2]
    monkeypatch.setitem(sys.modules, actor.__name__, actor)
    with pytest.raises(KeyError, match="in the block"), rlkern_openrlhf.patch():
        with rlkern_openrlhf.patch():
            pass
        assert actor.log_probs_from_logits is theirs.utils.log_probs_from_logits is rlkern_openrlhf.log_probs_from_logits
        assert actor.compute_entropy is rlkern_openrlhf.compute_entropy
        assert theirs.models.PolicyLoss is theirs.loss.PolicyLoss is rlkern_openrlhf.PolicyLoss
        raise KeyError("in the block")
    assert (theirs.utils.log_probs_from_logits, theirs.utils.compute_entropy, theirs.loss.PolicyLoss) == original
    assert (actor.log_probs_from_logits, actor.compute_entropy, theirs.models.PolicyLoss) == original


def test_unknown_version(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.99.0")
    with pytest.raises(ImportError, match=r"OpenRLHF 0\.99\.0 is not supported.*0\.11\.2"):
        rlkern_openrlhf.patch()


PRESETS = [  # of rlkern.rollout_weights
    (dict(is_correction_level="token", is_correction_threshold=(0.7, 1.3)), dict(preset="icepop", low=0.7, high=1.3)),
    (dict(is_correction_level="token", is_correction_mode="clip", is_correction_threshold=(0.8, 1.2)), dict(preset="tis", low=0.8, high=1.2)),
    (
        dict(is_correction_level="seq", is_correction_threshold=(0.9, 1.2)),
        dict(preset="seq-mask-tis", gates={"seq_mean_k1": (0.9, 1.2)}),
    ),
    *(
        (
            dict(is_correction_level=level, is_correction_gating=gating, is_correction_threshold=(0, bound)),
            dict(high=None, gates={f"{'seq_mean' if level == 'seq' else 'token'}_{gating}": bound}),
        )
        for level, gating, bound in (("token", "tv", 0.1), ("token", "binary_kl", 0.02), ("seq", "tv", 0.1), ("seq", "binary_kl", 0.03))
    ),
]


@needs_openrlhf
@pytest.mark.parametrize(("theirs_options", "options"), PRESETS, ids=str)
def test_rollout_weights(theirs, theirs_options, options):
    """`rollout_weights` and `ppo_loss` are its loss, to the gradient."""
    logp, old, advantages, mask, rollout = batch()
    logp, mask = logp[:4], mask[:4]  # a mean over no tokens is NaN there
    old, advantages, rollout = old[:4].clamp(max=-1e-5), advantages[:4], rollout[:4].clamp(max=-1e-5)
    rollout[0, 1] = old[0, 1] + 3  # e^-20 at least is a weight here
    leaves = [logp.clone().requires_grad_() for _ in range(2)]
    value, *_, masked = theirs.loss.PolicyLoss(**theirs_options)(leaves[0], old, advantages, mask, rollout)
    r = rlkern.rollout_weights(old, rollout, mask, **options)
    mine = rlkern.ppo_loss(leaves[1], old, advantages, mask, weights=r)
    print(f"| {options} | OpenRLHF {theirs_options} | {(mine.loss - value).abs().item():.1e} |")
    torch.testing.assert_close(mine.loss, value, rtol=1e-9, atol=1e-12)
    value.backward()
    mine.loss.backward()
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad, rtol=1e-9, atol=1e-12)
    assert masked > 0 and r.weights.any()
