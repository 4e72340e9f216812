"""rlkern under prime-rl's names. It is not on the package index: its trainer/rl/loss.py is restated here.

LossInputs, the sum over sequences divided by the batch's tokens, and the signatures of the functions that
`patch` replaces are those of public copies of it in autumn 2026.
"""

import math
import re
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rlkern
from rlkern.integrations import prime_rl as rlkern_prime


@dataclass
class LossInputs:
    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None = field(default=None)


def sequences(seed=0, weighted=False):
    g = torch.Generator().manual_seed(seed)
    made = []
    for length in (5, 9, 1):
        logp = (-torch.rand(length, generator=g, dtype=torch.float64) - 0.01).requires_grad_()
        old = logp.detach() + 0.5 * torch.randn(length, generator=g, dtype=torch.float64)
        advantages = torch.randn(1, generator=g, dtype=torch.float64).expand(length)
        mask = torch.rand(length, generator=g) < 0.8
        mask[0] = True
        weights = torch.rand(length, generator=g, dtype=torch.float64) if weighted else None
        made.append(LossInputs(logp, old, None, advantages, mask, weights))
    return made


def train(inputs, **kwargs):
    """What prime-rl makes of a custom loss."""
    outputs = [rlkern_prime.policy_loss(x, **kwargs) for x in inputs]
    for name, value in outputs[0].metrics.items():
        assert torch.stack([out.metrics[name] for out in outputs]).shape == (3,), name
        assert not value.requires_grad
    return sum(out.loss for out in outputs) / sum(x.loss_mask.sum() for x in inputs)


def naive(x, kwargs):
    """Per-token losses from the papers' formulas."""
    d = x.trainer_logprobs - x.inference_logprobs
    ratio, a = d.exp(), x.advantages
    low, high = 1 - kwargs.get("clip_low", 0.2), 1 + kwargs.get("clip_high", 0.2)
    if kwargs["loss"] == "ppo":
        return torch.maximum(-a * ratio, -a * ratio.clamp(low, high))
    if kwargs["loss"] == "cispo":
        return -ratio.detach().clamp(low, high) * a * x.trainer_logprobs
    if kwargs["loss"] == "reinforce":
        return -a * x.trainer_logprobs
    if kwargs["loss"] == "tis":
        return -ratio.detach().clamp(max=kwargs["cap"]) * a * x.trainer_logprobs
    mean = (d * x.loss_mask).sum() / x.loss_mask.sum()
    if kwargs["loss"] == "gspo":
        s = (mean.detach() + x.trainer_logprobs - x.trainer_logprobs.detach()).exp()
        return torch.maximum(-a * s, -a * s.clamp(low, high))
    raise AssertionError(kwargs)


def test_what_prime_rl_makes_of_metrics():
    """Statistics over all sequences: the extremes are those of all tokens, a mean counts sequences alike."""
    outputs = []
    for tokens, largest in ((12, 0.5), (4, 1.0)):
        d = torch.zeros(tokens)
        d[:3] = largest
        inputs = LossInputs(d - 2, torch.full_like(d, -2.0), None, torch.ones_like(d), torch.ones_like(d, dtype=torch.bool))
        outputs.append(rlkern_prime.policy_loss(inputs, loss="ppo").metrics)
    stacked = {name: torch.stack([metrics[name] for metrics in outputs]) for name in outputs[0]}
    assert stacked["ratio_max"].max().item() == pytest.approx(math.e, rel=1e-6) and stacked["ratio_min"].min() == 1
    assert stacked["clip_fraction_high"].mean() == 0.5 and stacked["tokens"].tolist() == [12, 4]
    assert rlkern.reduce_metrics(outputs)["clip_fraction_high"] == 0.375


@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize(
    "kwargs",
    (
        dict(loss="ppo", clip_low=0.1, clip_high=0.3),
        dict(loss="cispo", clip_low=0.5, clip_high=0.3),
        dict(loss="reinforce"),
        dict(loss="tis", cap=1.2),
        dict(loss="gspo", clip_low=0.05, clip_high=0.05, aggregation="token-mean"),
    ),
    ids=lambda kwargs: kwargs["loss"],
)
def test_custom_loss(kwargs, weighted):
    inputs = sequences(weighted=weighted)
    leaves = [x.trainer_logprobs for x in inputs]
    ours = train(inputs, **kwargs)
    tokens = sum(x.loss_mask.sum() for x in inputs)
    expected = sum((naive(x, kwargs) * (1 if x.loss_weights is None else x.loss_weights))[x.loss_mask].sum() for x in inputs) / tokens
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(ours, leaves), torch.autograd.grad(expected, leaves), rtol=1e-10, atol=1e-12)


def sequence_losses(x, name):
    """-A s, A g(r), the clips and tau of the papers: a value per token, of which the loss takes the mean."""
    d, a, mask = x.trainer_logprobs - x.inference_logprobs, x.advantages, x.loss_mask
    if name == "sapo":
        tau = torch.where(a > 0, 1, torch.tensor(1.05, dtype=a.dtype))
        return -a * 4 / tau * torch.sigmoid(tau * (d.exp() - 1))
    if name == "gmpo":
        clipped = torch.where(a > 0, d.clamp(max=0.4), d.clamp(min=-0.4))
        return (-a * clipped[mask].mean().exp()).expand_as(d)
    s = (d[mask].mean().detach() + x.trainer_logprobs - x.trainer_logprobs.detach()).exp()
    return torch.maximum(-a * s, -a * s.clamp(1 - 3e-4, 1 + 4e-4))


@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("name", ("gspo", "gmpo", "sapo"))
def test_sequences_weigh_alike_in_losses_that_are_means_over_them(name, weighted):
    """Sequence means, whose sum prime-rl divides by the batch's tokens; mean_length makes a mean of it."""
    inputs = sequences(weighted=weighted)
    leaves = [x.trainer_logprobs for x in inputs]
    means = [(sequence_losses(x, name) * (1 if x.loss_weights is None else x.loss_weights))[x.loss_mask].mean() for x in inputs]
    tokens = sum(x.loss_mask.sum().item() for x in inputs)
    for options, expected in (({}, sum(means) / tokens), ({"mean_length": tokens / 3}, sum(means) / 3)):
        ours = train(inputs, loss=name, **options)
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
        gradients = [torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (ours, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_the_average_is_the_losss_own_unless_told_otherwise():
    inputs = sequences()
    for name in rlkern_prime.LOSSES:
        own = {"gspo": "seq-mean-token-mean", "gmpo": "seq-mean-token-mean", "sapo": "seq-mean-token-mean"}.get(name, "token-mean")
        other = "token-mean" if own != "token-mean" else "seq-mean-token-mean"
        assert train(inputs, loss=name) == train(inputs, loss=name, aggregation=own) != train(inputs, loss=name, aggregation=other)


def test_every_loss_runs():
    for name in rlkern_prime.LOSSES:
        rlkern_prime.check_loss(loss=name)
        assert train(sequences(), loss=name).isfinite()


LISTS = ("trainer_logprobs", "inference_logprobs", "advantages", "loss_mask", "loss_weights")


def lists(inputs, weighted=True):
    return [[getattr(x, name) for x in inputs] for name in LISTS[: 4 + weighted]]


@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("name", rlkern_prime.LOSSES)
def test_one_call_for_a_micro_batch_is_the_sum_over_its_sequences(name, weighted):
    """A sequence of padding alone, NaN where nothing counts, advantages of tokens."""
    inputs = sequences(weighted=weighted)
    for x in inputs:
        x.advantages = x.advantages * torch.linspace(1, -0.5, len(x.advantages), dtype=torch.float64)
        x.inference_logprobs = x.inference_logprobs.masked_fill(~x.loss_mask, torch.nan)
    inputs[2].loss_mask = torch.zeros(1, dtype=torch.bool)
    leaves = [x.trainer_logprobs for x in inputs]
    for options in ({}, {"aggregation": "seq-mean-token-mean", "mean_length": 4.0}):
        one_by_one = sum(rlkern_prime.policy_loss(x, loss=name, **options).loss for x in inputs)
        out = rlkern_prime.packed_policy_loss(*lists(inputs, weighted), loss=name, **options)
        torch.testing.assert_close(out.loss, one_by_one, rtol=1e-12, atol=1e-14)
        gradients = [torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (out.loss, one_by_one)]
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)
        assert out.metrics["tokens"] == sum(x.loss_mask.sum() for x in inputs) and out.loss != 0


def test_a_micro_batch_offers_choices_among_its_tokens():
    """The token of largest covariance in three sequences is in one of them, not in each."""
    inputs = sequences()
    assert set(rlkern_prime.PACKED_LOSSES) == {*rlkern_prime.LOSSES, "clip_cov", "kl_cov"}
    out = rlkern_prime.packed_policy_loss(*lists(inputs, False), loss="kl_cov", select_ratio=1e-9)
    rows = [torch.cat(x).unsqueeze(0) for x in lists(inputs, False)]
    expected = rlkern.kl_cov_loss(*rows, select_ratio=1e-9, aggregation="token-mean", normalizer=1.0)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-12, atol=0)
    tokens = sum(x.loss_mask.sum().item() for x in inputs)
    assert out.metrics["selected_fraction"].item() * tokens == pytest.approx(1)


def test_the_page_takes_the_lists_of_compute_loss():
    page = (Path(__file__).resolve().parents[2] / "docs" / "trainers" / "prime_rl.md").read_text()
    (block,) = re.findall(r"```python\n([^`]*import packed_policy_loss.*?)```", page, re.S)
    inputs = sequences()
    names = dict(zip(LISTS, lists(inputs, False), strict=False)) | {"rl_scale": 7}
    exec(block, names)
    expected = sum(rlkern_prime.policy_loss(x, loss="gspo").loss for x in inputs) / 7
    torch.testing.assert_close(names["loss"], expected, rtol=1e-12, atol=0)


def test_lists_that_do_not_match_are_refused():
    given = lists(sequences(), False)
    for i, name in enumerate(LISTS[1:4], start=1):
        short = [*given[:i], [*given[i][:2]], *given[i + 1 :]]
        with pytest.raises(ValueError, match=rf"{name} must have sequences of the lengths of trainer_logprobs, \[5, 9, 1\], got \[5, 9\]"):
            rlkern_prime.packed_policy_loss(*short, loss="ppo")
    with pytest.raises(ValueError, match="loss_weights must have sequences of the lengths"):
        rlkern_prime.packed_policy_loss(*given, given[0][::-1], loss="ppo")
    for nothing in (None, 3, given[0][0]):
        with pytest.raises(TypeError, match=rf"trainer_logprobs must be a list of tensors \[seq\], got {type(nothing).__name__}"):
            rlkern_prime.packed_policy_loss(nothing, *given[1:], loss="ppo")
    with pytest.raises(ValueError, match="needs at least one sequence, got an empty list"):
        rlkern_prime.packed_policy_loss([], [], [], [], loss="ppo")
    with pytest.raises(ValueError, match=r"trainer_logprobs\[0\] must be \[seq\], got shape \(1, 5\)"):
        rlkern_prime.packed_policy_loss([x.unsqueeze(0) for x in given[0]], *given[1:], loss="ppo")
    with pytest.raises(TypeError, match=r"advantages\[0\] must be"):
        rlkern_prime.packed_policy_loss(*given[:2], [1.0, 2.0, 3.0], given[3], loss="ppo")
    with pytest.raises(ValueError, match="nft_loss needs success_rate and correct"):
        rlkern_prime.packed_policy_loss(*given, loss="nft")


def test_inputs_of_older_versions_have_no_weights():
    x = sequences()[0]
    older = types.SimpleNamespace(**{k: v for k, v in vars(x).items() if k != "loss_weights"})
    assert rlkern_prime.policy_loss(older, loss="ppo").loss == rlkern_prime.policy_loss(x, loss="ppo").loss


@pytest.mark.parametrize(
    "kwargs, error, message",
    (
        (dict(loss="clip_cov"), ValueError, "'clip_cov' compares tokens of many sequences"),
        (dict(loss="nft"), ValueError, "nft_loss needs success_rate and correct, which prime-rl does not hand to a policy loss"),
        (dict(loss="pppo"), ValueError, "unknown policy loss 'pppo', expected one of 'ppo'"),
        (dict(loss="ppo", clip=0.1), TypeError, "unexpected keyword argument 'clip'"),
        (dict(loss="ppo", clip_low=2.0), ValueError, "clip_low must be in"),
        (dict(loss="ppo", aggregation="dapo"), ValueError, "unknown aggregation 'dapo', expected one of 'token-mean', 'seq-mean-token-mean'"),
        (
            dict(loss="ppo", mean_length=300),
            ValueError,
            "mean_length is a number above 0 for aggregation 'seq-mean-token-mean', got 300 with 'token-mean'",
        ),
        (dict(loss="gspo", mean_length=0), ValueError, "mean_length is a number above 0"),
        (dict(loss="gspo", mean_length=math.inf), ValueError, "mean_length is a number above 0"),
        (dict(loss="gspo", mean_length="300"), TypeError, "mean_length must be a number, got str"),
        (dict(loss="ppo", normalizer=2.0), TypeError, "multiple values for keyword argument 'normalizer'"),
        (dict(), TypeError, "missing 1 required keyword-only argument: 'loss'"),
    ),
)
def test_refusals(kwargs, error, message):
    for call in (rlkern_prime.check_loss, lambda **k: rlkern_prime.policy_loss(sequences()[0], **k)):
        with pytest.raises(error, match=message):
            call(**kwargs)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_functions_of_logits(dtype):
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(1, 6, 211, generator=g)).to(dtype)
    index, topk = torch.randint(211, (1, 6), generator=g), torch.randint(211, (1, 6, 3), generator=g)
    topk[0, 2, 1] = topk[0, 3] = -1
    log_p = logits.double().log_softmax(-1)
    leaf = logits.clone().requires_grad_()
    picked = rlkern_prime.selective_log_softmax(leaf, index)
    head = rlkern_prime.selective_topk_log_softmax(leaf, topk)
    entropy = rlkern_prime.compute_entropy(leaf)
    torch.testing.assert_close(picked.detach().double(), log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1), rtol=1e-5, atol=1e-5)
    expected = torch.where(topk < 0, 0, log_p.gather(-1, topk.clamp(min=0)))
    torch.testing.assert_close(head.detach().double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=1e-5, atol=1e-5)
    assert picked.requires_grad and head.requires_grad and not entropy.requires_grad
    logits[..., 7] = -math.inf
    assert rlkern_prime.compute_entropy(logits).isfinite().all()


@pytest.fixture
def prime_rl(monkeypatch):
    """prime_rl.trainer.rl.loss, and a train.py that has imported from it."""

    def selective_log_softmax(logits, index):
        return logits.log_softmax(-1).gather(-1, index.unsqueeze(-1)).squeeze(-1)

    def compute_entropy(shifted_logits):
        return torch.distributions.Categorical(logits=shifted_logits).entropy()

    names = ("prime_rl", "prime_rl.trainer", "prime_rl.trainer.rl", "prime_rl.trainer.rl.loss", "prime_rl.trainer.rl.train")
    modules = {name: types.ModuleType(name) for name in names}
    for name, module in modules.items():
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    loss, train_module = modules["prime_rl.trainer.rl.loss"], modules["prime_rl.trainer.rl.train"]
    for module in (loss, train_module):
        module.selective_log_softmax, module.compute_entropy = selective_log_softmax, compute_entropy
    return types.SimpleNamespace(loss=loss, train=train_module)


def test_patch(prime_rl):
    original = dict(vars(prime_rl.train))
    with pytest.raises(KeyError, match="in the block"), rlkern_prime.patch():
        assert prime_rl.train.selective_log_softmax is prime_rl.loss.selective_log_softmax is rlkern_prime.selective_log_softmax
        with rlkern_prime.patch():
            pass
        assert prime_rl.train.compute_entropy is rlkern_prime.compute_entropy
        raise KeyError("in the block")
    assert dict(vars(prime_rl.train)) == original
    assert prime_rl.loss.selective_log_softmax is original["selective_log_softmax"]


@pytest.mark.parametrize("name", ["selective_log_softmax_with_kept", "selective_log_softmax_with_sampling_mask"])
def test_patch_of_a_version_that_replays_sets(prime_rl, name):
    """The second is its name since pull request 3431."""

    def with_kept(logits, index, kept_tokens): ...
    def with_sampling_mask(logits, index, sampling_mask): ...

    before = with_kept if name.endswith("kept") else with_sampling_mask
    for module in (prime_rl.loss, prime_rl.train):
        setattr(module, name, before)
    with rlkern_prime.patch():
        assert getattr(prime_rl.train, name) is getattr(rlkern_prime, name)
    assert getattr(prime_rl.train, name) is before


def test_patch_refuses_another_signature(prime_rl):
    def selective_log_softmax(logits, index, temperature=1.0): ...

    prime_rl.loss.selective_log_softmax = selective_log_softmax
    with pytest.raises(ImportError, match=r"selective_log_softmax takes \['logits', 'index', 'temperature'\], expected \['logits', 'index'\]"):
        rlkern_prime.patch()
    del prime_rl.loss.selective_log_softmax
    with pytest.raises(ImportError, match="selective_log_softmax takes None"):
        rlkern_prime.patch()


def test_without_prime_rl():
    with pytest.raises(ImportError, match="needs prime-rl"):
        rlkern_prime.patch()
