"""rlkern in verl: losses against verl's own, with gradient and metrics; patched functions against float64."""

import importlib.util
import json
import math
import os
import pickle
import runpy
import subprocess
import sys
import textwrap
import threading
import types

import pytest
import torch
from thread_ranks import thread_ranks

if importlib.util.find_spec("verl") is None:
    pytest.skip("verl is not installed (requirements-trainers.txt)", allow_module_level=True)

import transformers
import verl
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.models.transformers import dense_common
from verl.trainer.distillation.fsdp.losses import compute_forward_kl_topk
from verl.trainer.ppo import core_algos
from verl.utils import tensordict_utils, torch_functional
from verl.utils.experimental import torch_functional as torch_functional_fused
from verl.utils.kernel import linear_cross_entropy as fused_kernel
from verl.utils.metric import AggregationType, Metric, reduce_metrics
from verl.utils.py_functional import append_to_dict
from verl.workers.config import FSDPActorConfig, PolicyLossConfig
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.utils.losses import ppo_loss as verl_ppo_loss

import rlkern
from rlkern.integrations import verl as rlkern_verl
from rlkern.integrations import verl_packed

MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
GLOBAL = {"dp_size": 2, "batch_num_tokens": 97, "global_batch_size": 12, "loss_scale_factor": 50}
SHARED = tuple(name for name in rlkern_verl.LOSSES if name in core_algos.POLICY_LOSS_REGISTRY)


@pytest.fixture(autouse=True)
def registered():
    rlkern_verl.register()
    yield
    rlkern_verl.unregister()


def config(info=None, policy=None, **options):
    policy = PolicyLossConfig(**({"clip_cov_ratio": 1.0, "kl_cov_ratio": 0.2, "ppo_kl_coef": 0.7, "dro_beta": 0.3} | (policy or {})))
    options = {"clip_ratio_low": 0.15, "clip_ratio_high": 0.28, "tau_pos": 1.3, "tau_neg": 1.9, "clip_ratio_c": 2.5} | options
    return FSDPActorConfig(rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=policy, global_batch_info=dict(info or {}), **options)


def batch(seed=0, n=6, length=11):
    """Covariances in the band, ratios beyond every clip, tokens with A = 0, a sequence without tokens."""
    g = torch.Generator().manual_seed(seed)
    logp = -torch.rand(n, length, generator=g, dtype=torch.float64).pow(4) * 12 - 0.01
    old = logp + 0.5 * torch.randn(n, length, generator=g, dtype=torch.float64)
    old[0, :3] = logp[0, :3] + torch.tensor([-1.5, 1.5, -2.0], dtype=torch.float64)
    advantages = 1.5 * torch.randn(n, length, generator=g, dtype=torch.float64)
    advantages[0, :4] = torch.tensor([-1.0, -1.0, 1.0, 0.0], dtype=torch.float64)
    mask = torch.arange(length) < torch.tensor([length, 3, 7, 1, length - 1, 0])[:n, None]
    weights = torch.rand(n, length, generator=g, dtype=torch.float64) * 2
    return {"old_log_prob": old, "log_prob": logp, "advantages": advantages, "response_mask": mask}, weights


def run(name, inputs, **call):
    logp = inputs["log_prob"].clone().requires_grad_()
    loss, metrics = core_algos.get_policy_loss_fn(name)(**(inputs | {"log_prob": logp}), **call)
    return loss.detach(), torch.autograd.grad(loss, logp)[0], metrics


def assert_equal(name, inputs, **call):
    theirs, ours = run(name, inputs, **call), run(f"rlkern_{name}", inputs, **call)
    # verl divides by the length + 1e-8
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-7, atol=1e-9)
    assert theirs[1].abs().max() > 0
    return theirs[2], ours[2]


# --- losses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_weights_are_verls_global_counts(mode):
    """Micro-batches of two data-parallel ranks: `agg_loss` with the counts of all rows, our weights."""
    g = torch.Generator().manual_seed(7)
    lengths = torch.tensor([[9, 0, 4, 1], [2, 6, 0, 9]])  # by rank
    values, mask = torch.randn(2, 4, 9, generator=g, dtype=torch.float64), torch.arange(9) < lengths[..., None]
    rows = (slice(0, 1), slice(1, 4))
    sequences = int((lengths > 0).sum())
    # verl's sum-norm divides by the sequences too; here that is left to length=.
    length = {"length": 50.0 * sequences} if mode.endswith("norm") else {}
    info = {"dp_size": 2, "batch_num_tokens": int(lengths.sum()), "global_batch_size": sequences, "loss_scale_factor": 50}

    def on(group):
        w = rlkern.sequence_weights(mode, lengths[group.place], group=group, averaged_over=2, **length)
        return [rlkern.aggregate(values[group.place, part], mask[group.place, part], w[part]) for part in rows]

    with thread_ranks(2) as run:
        ours = run(on)
    theirs = [[core_algos.agg_loss(x[part], m[part].double(), mode, **info) for part in rows] for x, m in zip(values, mask, strict=True)]
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-12)  # verl divides by the length + 1e-8


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SHARED)
def test_loss_is_verls_own(name, mode):
    for seed in range(3):
        inputs, weights = batch(seed)
        for info in ({}, GLOBAL):
            for rollout_is_weights in (None, weights):
                call = dict(loss_agg_mode=mode, config=config(info), rollout_is_weights=rollout_is_weights)
                theirs, ours = assert_equal(name, inputs, **call)
                assert all(isinstance(value, float) for value in ours.values())
                if name == "geo_mean":  # verl counts tokens as clipped whose gradient is not: A > 0 below the low bound, A < 0 above the high one
                    assert theirs.pop("actor/pg_clipfrac") > ours["actor/pg_clipfrac"] > 0
                    assert theirs.pop("actor/pg_clipfrac_lower") > ours["actor/pg_clipfrac_lower"] > 0
                assert ours.keys() >= theirs.keys()
                for key, value in theirs.items():
                    assert ours[key] == pytest.approx(value, rel=1e-6, abs=1e-7), key
                if name == "clip_cov":
                    assert ours["actor/pg_clipfrac"] > 0  # something was selected, or there is nothing to see here


def test_all_of_verls_losses_are_accounted_for():
    assert set(core_algos.POLICY_LOSS_REGISTRY) - {f"rlkern_{name}" for name in rlkern_verl.LOSSES} == {
        *SHARED,
        *("dppo_tv", "dppo_kl", "bypass_mode"),
    }


@pytest.mark.parametrize("name", ("vanilla", "gspo", "cispo", "geo_mean", "clip_cov"))
def test_clip_ratio_stands_in_for_a_bound_that_is_none(name):
    inputs, _ = batch()
    assert_equal(name, inputs, config=config(clip_ratio=0.1, clip_ratio_low=None, clip_ratio_high=None))


@pytest.mark.parametrize("name", SHARED)
def test_omegaconf_config(name):
    inputs, _ = batch()
    policy = {"clip_cov_ratio": 1.0, "kl_cov_ratio": 0.2, "ppo_kl_coef": 0.7, "dro_beta": 0.3}
    values = dict(clip_ratio_low=0.15, clip_ratio_high=0.28, tau_pos=1.3, tau_neg=1.9, clip_ratio_c=2.5, policy_loss=policy, global_batch_info=GLOBAL)
    ours = run(f"rlkern_{name}", inputs, config=OmegaConf.create(values))
    torch.testing.assert_close(ours[:2], run(f"rlkern_{name}", inputs, config=config(GLOBAL))[:2], rtol=0, atol=0)


@pytest.mark.parametrize("name", ("vanilla", "sapo", "cispo"))
def test_log_ratios_stop_at_20(name):
    inputs, _ = batch()
    inputs["old_log_prob"][0, 0], inputs["old_log_prob"][0, 1] = inputs["log_prob"][0, 0] - 30, inputs["log_prob"][0, 1] + 30
    assert_equal(name, inputs, config=config(clip_ratio_c=1e12))


def test_gspo_ignores_the_mode_before_0_9_1(monkeypatch):
    inputs, _ = batch()
    expected = run("gspo", inputs, loss_agg_mode="seq-mean-token-mean", config=config())
    for version in ("0.8.0", "0.9.0"):
        monkeypatch.setattr(verl, "__version__", version)
        rlkern_verl.register("gspo")
        torch.testing.assert_close(run("rlkern_gspo", inputs, loss_agg_mode="token-mean", config=config())[:2], expected[:2], rtol=1e-7, atol=1e-9)


def test_clip_cov_draws_as_many_tokens_from_the_same_band():
    inputs, _ = batch(n=5, length=40)
    inputs["response_mask"] = torch.ones_like(inputs["response_mask"])
    every = run("rlkern_clip_cov", inputs, config=config())
    some = config(policy={"clip_cov_ratio": 0.02})
    nobody = config(policy={"clip_cov_lb": 1e8, "clip_cov_ub": 1e9})
    without, plain = run("rlkern_clip_cov", inputs, config=nobody), run("clip_cov", inputs, config=nobody)
    torch.testing.assert_close(plain[1], without[1], rtol=1e-12, atol=1e-15)
    band = every[1] != without[1]
    assert band.sum() > 8
    seen = set()
    for _ in range(20):
        ours, theirs = run("rlkern_clip_cov", inputs, config=some), run("clip_cov", inputs, config=some)
        selected = ours[1] != without[1]
        assert selected.sum() == (theirs[1] != plain[1]).sum() == 4  # 2 % of 200
        assert not (selected & ~band).any()
        seen.add(tuple(selected.flatten().nonzero().flatten().tolist()))
    assert len(seen) > 10


@pytest.mark.parametrize("name", SHARED)
def test_without_tokens_the_loss_is_0(name):
    """verl's is 0 / 0 where it divides by the tokens of the micro-batch."""
    inputs, _ = batch()
    inputs["response_mask"] = torch.zeros_like(inputs["response_mask"])
    loss, gradient, _ = run(f"rlkern_{name}", inputs, config=config())
    assert loss == 0 and (gradient == 0).all()
    if name != "geo_mean":
        assert run(name, inputs, config=config())[0].isnan()


# --- importance weights -------------------------------------------------------------------------------------


def small_batch(seed, level):
    """Weights in [0.5, 1.5] as verl has them: 0 outside of the mask, a sequence's in all its tokens."""
    g = torch.Generator().manual_seed(seed)
    logp = -2 * torch.rand(4, 8, generator=g, dtype=torch.float64) - 0.05
    old = logp + 0.3 * torch.randn(4, 8, generator=g, dtype=torch.float64)
    mask = torch.arange(8) < torch.tensor([[8], [5], [1], [7]])
    weights = 0.5 + torch.rand(4, 8 if level == "token" else 1, generator=g, dtype=torch.float64)
    advantages = torch.tensor([[1.3], [-0.7], [0.4], [-1.1]], dtype=torch.float64).expand(4, 8)
    return {"old_log_prob": old, "log_prob": logp, "advantages": advantages, "response_mask": mask}, weights * mask


@pytest.mark.parametrize("level", ("token", "sequence"))
def test_weights_are_used_as_verl_uses_them(level):
    for seed in range(3):
        inputs, weights = small_batch(seed, level)
        for name in SHARED:
            for mode in ("token-mean", "seq-mean-token-mean"):
                assert_equal(name, inputs, config=config(), rollout_is_weights=weights, loss_agg_mode=mode)


@pytest.mark.parametrize("level", ("token", "sequence"))
def test_weights_of_the_losses_that_verl_lacks(level):
    """Times the loss of each token; in vespo inside of W, where options say what they are weights of."""
    rlkern_verl.register("tis", "topr", "vespo", options={"vespo": {"rollout_is": level}})
    for seed in range(3):
        inputs, weights = small_batch(seed, level)
        mask, a = inputs["response_mask"], inputs["advantages"]
        logp = inputs["log_prob"].clone().requires_grad_()
        ratio = (logp - inputs["old_log_prob"]).detach().exp()
        product = torch.where(mask, ratio, 1).prod(-1, keepdim=True)
        w = product * (torch.where(mask, weights, 1).prod(-1, keepdim=True) if level == "token" else weights[:, :1])
        phi = torch.where(a >= 0, w**2 * (3 - 3 * w).exp(), w**3 * (2 - 2 * w).exp())
        capped = ratio.clamp(max=1)
        factors = {"tis": capped * weights, "topr": torch.where(a < 0, capped, 1) * weights, "vespo": phi}
        for name, factor in factors.items():
            expected = -(factor * a * logp)[mask].mean()
            ours = run(f"rlkern_{name}", inputs, config=config(), rollout_is_weights=weights)
            torch.testing.assert_close(ours[:2], (expected.detach(), torch.autograd.grad(expected, logp)[0]), rtol=1e-9, atol=1e-12)


def test_vespo_asks_what_the_weights_are_of():
    inputs, weights = small_batch(0, "token")
    run("rlkern_vespo", inputs, config=config())
    with pytest.raises(ValueError, match=r"of tokens or of sequences: register\(options=.*'rollout_is'.*'token' or 'sequence'"):
        run("rlkern_vespo", inputs, config=config(), rollout_is_weights=weights)


@pytest.mark.parametrize("name", ("clip_cov", "kl_cov", "gpg", "geo_mean", "vanilla"))
def test_overflow_and_masked_garbage_stay_out(name):
    inputs, _ = batch()
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    inputs["old_log_prob"][0, 5] = -200.0
    inputs["log_prob"][1, 5], inputs["old_log_prob"][1, 6], inputs["advantages"][1, 7] = math.nan, math.inf, math.nan  # masked
    loss, gradient, metrics = run(f"rlkern_{name}", inputs, config=config())
    assert loss.isfinite() and gradient.isfinite().all()
    if name == "kl_cov":
        assert not run(name, inputs, config=config())[0].isfinite()


def test_own_options_win_over_verls_config():
    inputs, _ = batch()
    rlkern_verl.register("vanilla", "tis", options={"vanilla": {"clip_high": 3.0, "dual_clip": None}, "tis": {"cap": 0.5}})
    ratio = (inputs["log_prob"] - inputs["old_log_prob"]).exp()
    a, mask = inputs["advantages"], inputs["response_mask"]
    values = torch.maximum(-a * ratio, -a * ratio.clamp(0.85, 4.0))
    torch.testing.assert_close(run("rlkern_vanilla", inputs, config=config())[0], values[mask].mean())
    values = -ratio.clamp(max=0.5) * a * inputs["log_prob"]
    torch.testing.assert_close(run("rlkern_tis", inputs, config=config())[0], values[mask].mean())


# --- verl's own training loss -------------------------------------------------------------------------------


def jagged(rows):
    return torch.nested.nested_tensor(rows, layout=torch.jagged)


@pytest.mark.parametrize("name", ("vanilla", "geo_mean", "kl_cov"))
def test_inside_verls_ppo_loss(name):
    """With verl's entropy bonus and KL penalty, which it adds in place, and its metric objects."""
    g = torch.Generator().manual_seed(1)
    prompts, responses = (2, 3, 1), (4, 2, 5)

    def responses_of(make):
        return jagged([make(n) for n in responses])

    fields = {
        "prompts": jagged([torch.ones(n, dtype=torch.int64) for n in prompts]),
        "responses": responses_of(lambda n: torch.ones(n, dtype=torch.int64)),
        "response_mask": responses_of(lambda n: torch.ones(n, dtype=torch.int64)),
        "old_log_probs": responses_of(lambda n: -torch.rand(n, generator=g)),
        "ref_log_prob": responses_of(lambda n: -torch.rand(n, generator=g)),
        "advantages": responses_of(lambda n: torch.randn(n, generator=g)),
    }
    total = sum(prompts) + sum(responses)
    values = -torch.rand(total, generator=g)
    entropy = torch.rand(total, generator=g)
    results, kl = [], []
    for loss_mode in (name, f"rlkern_{name}"):
        data = TensorDict(dict(fields), batch_size=len(prompts))
        tensordict_utils.assign_non_tensor(data, dp_size=1, batch_num_tokens=sum(responses), global_batch_size=len(responses))
        actor = config(policy={"loss_mode": loss_mode}, use_kl_loss=True, entropy_coeff=0.1)
        leaf, entropy_leaf = values.clone().requires_grad_(), entropy.clone().requires_grad_()
        loss, metrics = verl_ppo_loss(actor, {"log_probs": leaf, "entropy": entropy_leaf}, data)
        results.append((loss.detach(), *torch.autograd.grad(loss, (leaf, entropy_leaf))))
        kl.append(metrics["actor/ppo_kl"].aggregate())
    assert kl[1] == pytest.approx(kl[0], rel=1e-5)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)
    assert metrics["actor/rlkern/ratio_max"].aggregate() > 0


def clipped(count, tokens, largest):
    """verl's arguments of a micro-batch with `count` tokens clipped and the largest log ratio `largest`."""
    d = torch.zeros(1, tokens)
    d[:, :count] = largest
    return {"old_log_prob": torch.full_like(d, -2.0), "log_prob": d - 2, "advantages": torch.ones_like(d), "response_mask": torch.ones_like(d)}


def as_verl_merges(ranks):
    """What verl's engine makes of the micro-batches' metrics on each rank, and its trainer of these."""
    gathered = []
    for micro_batches in ranks:
        metrics = {}
        for inputs in micro_batches:
            append_to_dict(metrics, Metric.from_dict(run("rlkern_vanilla", inputs, config=config())[2], aggregation=AggregationType.MEAN))
        gathered.append(pickle.loads(pickle.dumps(metrics)))
    if len(ranks) > 1:
        gathered = [{name: Metric.aggregate_dp([metrics[name] for metrics in gathered]) for name in gathered[0]}]
    sent = {}
    append_to_dict(sent, gathered[0])
    return reduce_metrics(tensordict_utils.get(tensordict_utils.get_tensordict({}, {"metrics": sent}).cpu(), "metrics"))


def test_verls_averages_merge():
    """Over micro-batches, over ranks, over both: 6 of 16 tokens clipped, 6 of 30 with two parts more."""
    a, b, c, nothing = clipped(3, 12, 0.5), clipped(3, 4, 1.0), clipped(0, 14, 0.0), clipped(1, 1, 5.0) | {"response_mask": torch.zeros(1, 1)}
    for ranks, tokens in (([[a]], 12), ([[a, b]], 16), ([[a], [b]], 16), ([[a, nothing], [c, b]], 30)):
        metrics = as_verl_merges(ranks)
        assert all(isinstance(value, float) for value in metrics.values())
        assert metrics["actor/pg_clipfrac"] == pytest.approx((3 if ranks == [[a]] else 6) / tokens, rel=1e-6)
        assert metrics["actor/rlkern/ratio_max"] == pytest.approx(math.exp(0.5 if ranks == [[a]] else 1.0), rel=1e-6)
        assert metrics["actor/rlkern/ratio_min"] == (1 if tokens > 4 else math.e) and metrics["actor/pg_clipfrac_lower"] == 0
        assert metrics["actor/ppo_kl"] == pytest.approx(-(1.5 if ranks == [[a]] else 4.5) / tokens, rel=1e-6)
        assert metrics["actor/rlkern/tokens"] == tokens


def test_other_aggregations_stay_verls():
    parts = [run("rlkern_vanilla", clipped(*part), config=config())[2]["actor/pg_clipfrac"] for part in ((3, 12, 0.5), (3, 4, 1.0))]
    for kind, expected in ((AggregationType.MAX, 0.75), (AggregationType.MIN, 0.25), (AggregationType.SUM, 1.0)):
        metric = Metric(kind)
        metric.extend(parts)
        assert metric.aggregate() == pytest.approx(expected)
    ranks = [Metric(AggregationType.MAX, part) for part in parts]
    assert Metric.aggregate_dp(ranks) == pytest.approx(0.75)


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", (rlkern_verl.register, rlkern_verl.patch, rlkern_verl.unregister, lambda: rlkern_verl.check_config(config())))
def test_unknown_version(call, monkeypatch):
    monkeypatch.setattr(verl, "__version__", "0.99.0")
    before = dict(core_algos.POLICY_LOSS_REGISTRY)
    with pytest.raises(ImportError, match=r"verl 0\.99\.0 is not supported.*0\.9\.1"):
        call()
    assert core_algos.POLICY_LOSS_REGISTRY == before
    assert torch_functional.logprobs_from_logits.__module__ == "verl.utils.torch_functional"


@pytest.mark.parametrize(
    "arguments, options, error, message",
    (
        (("lp_reg",), None, ValueError, "lp_reg_loss needs proxy_logp"),
        (("grpp",), None, ValueError, "unknown policy loss 'grpp', expected one of 'vanilla'"),
        ((), {"ppo": {}}, ValueError, "unknown policy loss 'ppo'"),
        ((), {"tis": {"capp": 1.0}}, TypeError, "capp"),
        ((), {"tis": {"cap": -1.0}}, ValueError, "cap must be in"),
        ((), {"vespo": {"rollout_is": "seq"}}, ValueError, "unknown rollout_is 'seq', expected one of None, 'token', 'sequence'"),
        (("tis",), {"topr": {"cap": 2.0}}, ValueError, "options of 'topr' would have no effect, for only 'tis' would be registered"),
        ((), {"clip_cov": {"aggregation": "dapo"}}, TypeError, "aggregation"),
    ),
)
def test_register_refuses(arguments, options, error, message):
    rlkern_verl.unregister()
    with pytest.raises(error, match=message):
        rlkern_verl.register(*arguments, options=options)
    assert not [name for name in core_algos.POLICY_LOSS_REGISTRY if name.startswith("rlkern_")]


@pytest.mark.parametrize(
    "name, actor, message",
    (
        ("vanilla", None, "needs verl's actor config"),
        ("vanilla", dict(clip_ratio_c=1.0), "clip_ratio_c must be above 1, got 1.0"),
        ("vanilla", dict(clip_ratio=None, clip_ratio_low=None), "clip_ratio_low or clip_ratio"),
        ("gspo", dict(clip_ratio_low=1.5), "clip_low must be in"),
        ("clip_cov", dict(policy={"clip_cov_ratio": 0.0}), "clip_cov_ratio is a fraction"),
        ("clip_cov", dict(policy={"clip_cov_ratio": 20.0}), "clip_cov_ratio is a fraction"),
        ("kl_cov", dict(policy={"kl_cov_ratio": 0.0}), "kl_cov_ratio is a fraction"),
        ("dro", dict(policy={"dro_beta": None}), "dro_beta above 0, got None"),
        ("sapo", dict(tau_pos=0.0), "tau_positive must be positive"),
        ("vanilla", dict(info={"dp_size": 2}), "needs batch_num_tokens"),
    ),
)
def test_options_that_do_not_fit(name, actor, message):
    inputs, _ = batch()
    with pytest.raises(ValueError, match=message):
        run(f"rlkern_{name}", inputs, config=None if actor is None else config(**actor))


def test_unknown_aggregation():
    inputs, _ = batch()
    with pytest.raises(ValueError, match="unknown loss_agg_mode 'mean', expected one of 'token-mean'"):
        run("rlkern_vanilla", inputs, config=config(), loss_agg_mode="mean")


def test_check_config():
    rlkern_verl.check_config(config(GLOBAL, policy={"loss_mode": "rlkern_kl_cov"}))
    rlkern_verl.check_config(config(policy={"loss_mode": "vanilla"}))
    with pytest.raises(ValueError, match="clip_cov_ratio is a fraction"):
        rlkern_verl.check_config(config(policy={"loss_mode": "rlkern_clip_cov", "clip_cov_ratio": 2.0}))
    with pytest.raises(ValueError, match="'rlkern_lp_reg' is not registered"):
        rlkern_verl.check_config(config(policy={"loss_mode": "rlkern_lp_reg"}))


# --- log-probabilities and entropy --------------------------------------------------------------------------


def logits_and_labels(dtype=torch.float32, rows=7, vocabulary=301):
    g = torch.Generator().manual_seed(3)
    return (3 * torch.randn(rows, vocabulary, generator=g)).to(dtype), torch.randint(vocabulary, (rows,), generator=g)


def oracle(logits, labels):
    """float64 log-probabilities and entropies of the logits, and the gradient of sum(logp) + 2 sum(H)."""
    exact = logits.double().requires_grad_()
    log_p = exact.log_softmax(-1)
    logp = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return logp.detach(), entropy.detach(), torch.autograd.grad(logp.sum() + 2 * entropy.sum(), exact)[0]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_patched_functions(dtype):
    logits, labels = logits_and_labels(dtype)
    logp, entropy, gradient = oracle(logits, labels)
    theirs = torch_functional.logprobs_from_logits(logits, labels, inplace_backward=False)
    leaf = logits.clone().requires_grad_()
    with rlkern_verl.patch():
        ours = torch_functional.logprobs_from_logits(logits=leaf, labels=labels, inplace_backward=False)
        h = torch_functional.entropy_from_logits(leaf)
        chunked = torch_functional.entropy_from_logits_with_chunking(leaf, chunk_size=2)
    (ours.sum() + h.sum() + chunked.sum()).backward()
    assert ours.dtype == h.dtype == chunked.dtype == torch.float32
    for got, expected in ((ours, logp), (h, entropy), (chunked, entropy)):
        torch.testing.assert_close(got.detach().double(), expected, rtol=1e-5, atol=1e-5)
    tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(leaf.grad.double(), gradient, rtol=3 * tolerance, atol=tolerance * gradient.abs().max().item())
    if dtype == torch.bfloat16:  # the difference that the page speaks of
        assert theirs.dtype == torch.bfloat16
        assert (theirs.double() - logp).abs().max() > 1e-3


def test_masked_vocabulary():
    logits, _ = logits_and_labels()
    logits[:, ::2] = -math.inf
    with rlkern_verl.patch():
        entropy = torch_functional.entropy_from_logits(logits)
    kept = logits[:, 1::2].double().log_softmax(-1)
    torch.testing.assert_close(entropy.double(), -(kept.exp() * kept).sum(-1), rtol=1e-5, atol=1e-5)
    assert torch_functional.entropy_from_logits(logits).isnan().all()


def test_gradient_in_place_only_where_patch_was_told_so():
    logits, labels = logits_and_labels()

    def logits_after(**options):
        leaf = logits.clone().requires_grad_()
        with rlkern_verl.patch(**options):
            torch_functional.logprobs_from_logits(leaf, labels, inplace_backward=True).sum().backward()
        return leaf

    assert torch.equal(logits_after().detach(), logits)
    leaf = logits.clone().requires_grad_()
    rlkern_verl.logprobs_from_logits(leaf, labels, inplace_backward=True).sum().backward()
    assert torch.equal(leaf.detach(), logits)
    overwritten = logits_after(inplace_backward=True)
    torch.testing.assert_close(overwritten.detach(), overwritten.grad, rtol=0, atol=0)


@pytest.mark.parametrize("clamp", [None, -4.0])
def test_topk_distillation_is_verls(clamp):
    """compute_forward_kl_topk, from log-probabilities of rlkern: its gradient, the mass of the student."""
    g = torch.Generator().manual_seed(0)
    lengths, n = (4, 3), 7
    logits = 2 * torch.randn(1, n, 31, generator=g)
    teacher, ids = (2 * torch.randn(n, 31, generator=g)).log_softmax(-1).topk(5)
    options = types.SimpleNamespace(use_chunked_topk=False, log_prob_min_clamp=clamp)

    def verls(x):
        nested = (jagged(list(t.split(lengths))) for t in (teacher, ids))
        result = compute_forward_kl_topk(x, *nested, types.SimpleNamespace(distillation_loss=options), "thd")
        return result["distillation_losses"], 1 - result["student_mass"]

    def ours(x):
        stats = rlkern.token_stats(x, ids.unsqueeze(0), with_tail=True)
        return rlkern.topk_divergence(stats.logp, teacher.unsqueeze(0), min_logp=clamp), stats.tail_logmass.exp()

    assert (rlkern.token_logprobs(logits, ids.unsqueeze(0)) < -4).any()  # something to clamp
    found = []
    for function in (ours, verls):
        leaf = logits.clone().requires_grad_()
        losses, rest = function(leaf)
        found.append((losses, rest, *torch.autograd.grad(losses.sum() + rest.sum(), leaf)))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def engine_gradient(**flags):
    """verl's FSDP engine on a packed batch: a policy gradient on logits that top-k distillation saves."""
    g = torch.Generator().manual_seed(0)
    lengths, vocabulary = (4, 3), 31
    n = sum(lengths)
    hidden, weight = torch.randn(1, n, 6, generator=g), torch.randn(6, vocabulary, generator=g, requires_grad=True)
    ids = torch.randint(vocabulary, (n,), generator=g)
    teacher = [jagged(list(x.split(lengths))) for x in torch.randn(n, vocabulary, generator=g).log_softmax(-1).topk(5)]
    options = types.SimpleNamespace(use_chunked_topk=True, chunked_topk_chunk_size=4, log_prob_min_clamp=None)

    def distill(student_logits, data):
        return compute_forward_kl_topk(student_logits, *teacher, types.SimpleNamespace(distillation_loss=options), "thd")

    data = TensorDict({"input_ids": jagged(list(ids.split(lengths)))}, batch_size=len(lengths))
    tensordict_utils.assign_non_tensor(data, **flags)
    engine = types.SimpleNamespace(use_ulysses_sp=False, _gather_and_unpad_packed=lambda x, pad_size: x)
    scored = {"input_ids_rmpad_rolled": ids.roll(-1), "temperature_rmpad": torch.ones(n), "temperature_is_one": True, "pad_size": 0}
    output = FSDPEngineWithLMHead.prepare_model_outputs(engine, types.SimpleNamespace(logits=hidden @ weight), scored, data, distill)
    loss = sum(output[name].values().sum() for name in ("log_probs", "distillation_losses", "sum_pi_squared") if name in output)
    return torch.autograd.grad(loss, weight)[0]


@pytest.mark.parametrize("flags", ({}, {"distillation_use_topk": True}, {"calculate_sum_pi_squared": True}), ids=str)
def test_verls_engine_trains_whatever_else_saved_the_logits(flags):
    stock = engine_gradient(**flags)
    with rlkern_verl.patch():
        torch.testing.assert_close(engine_gradient(**flags), stock, rtol=1e-5, atol=1e-5)
    with rlkern_verl.patch(inplace_backward=True):
        if not flags:
            torch.testing.assert_close(engine_gradient(), stock, rtol=1e-5, atol=1e-5)
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                engine_gradient(**flags)


# --- from hidden states: use_fused_kernels ------------------------------------------------------------------


def fused_outputs(model, forward, ids, temperature):
    """Log-probabilities, entropy, and the gradients of hidden states and head, of one of verl's forwards."""
    model.zero_grad()
    out = forward(model, input_ids=ids, return_dict=True, temperature=temperature)
    weights = torch.arange(ids.numel(), dtype=torch.float64).view(ids.shape)
    logp, entropy = (x.view(ids.shape).double() for x in (out.log_probs, out.entropy))
    (weights * logp + weights.flip(-1) * entropy).sum().backward()
    gradients = [model.lm_head.weight.grad.clone(), model.model.norm.weight.grad.clone()]
    return logp.detach(), entropy.detach(), *gradients


def test_fused_kernels_are_verls_forwards_on_rlkern():
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, initializer_range=0.5))
    ids = torch.randint(61, (2, 9))
    stock = fused_outputs(model, dense_common.forward_with_torch_backend, ids, 0.7)
    with rlkern_verl.patch():
        for backend in ("torch", "liger"):
            model._verl_fused_kernels_backend = backend
            ours = fused_outputs(model, dense_common.forward_with_torch_backend, ids, 0.7)
            torch.testing.assert_close(ours, stock, rtol=2e-5, atol=1e-5)
        triton = fused_outputs(model, dense_common.forward_with_triton_backend, ids, 0.7)
    assert all(torch.equal(a, b) for a, b in zip(triton, ours, strict=True))
    assert all(x.abs().max() > 0.1 for x in stock)


def test_linear_cross_entropy_does_not_round_the_logits():
    """As verl's Triton kernel, which needs a GPU."""
    hidden, weight, labels = torch.randn(40, 32).bfloat16(), torch.randn(200, 32).bfloat16(), torch.randint(200, (40,))
    exact = rlkern.token_stats(hidden.double() @ weight.double().T, labels)
    rounded = rlkern_verl.FusedLinearForPPO()(hidden, weight, labels)
    got = rlkern_verl.linear_cross_entropy(hidden, weight, labels)
    for ours, less, expected in zip(got, rounded, exact[:2], strict=True):
        assert (ours - expected).abs().max() < 1e-5 < 1e-3 < (less - expected).abs().max()


def test_other_reductions_of_linear_cross_entropy_are_verls(monkeypatch):
    calls = []
    monkeypatch.setattr(fused_kernel.LinearCrossEntropy, "apply", lambda *args: calls.append(args))
    hidden, weight, labels = torch.randn(3, 4, 8), torch.randn(10, 8), torch.randint(10, (3, 4))
    logp, entropy = rlkern_verl.linear_cross_entropy(hidden, weight, labels, 2.0, "none", None)
    stats = rlkern.token_stats((hidden @ weight.T).flatten(0, 1), labels.flatten(), temperature=2.0)
    torch.testing.assert_close((logp, entropy), (stats.logp, stats.entropy))
    assert not calls
    rlkern_verl.linear_cross_entropy(hidden, weight, labels, 2.0, "mean")
    assert [call[3:] for call in calls] == [(2.0, "mean", None)]


def test_compiled_entropy():
    logits, labels = logits_and_labels()
    with rlkern_verl.patch():  # the engines compile what they find here
        compiled = torch.compile(torch_functional.entropy_from_logits, dynamic=True, backend="eager")
        torch.testing.assert_close(compiled(logits).double(), oracle(logits, labels)[1], rtol=1e-5, atol=1e-5)


@pytest.fixture
def engine(monkeypatch):
    """A module of verl that has imported the function by name."""
    module = types.ModuleType("verl.imported_before")
    module.logprobs_from_logits = torch_functional.logprobs_from_logits
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_patch_reaches_every_importer_and_is_undone(engine, monkeypatch):
    stock = fused_kernel.linear_cross_entropy
    original = {
        name: getattr(torch_functional, name) for name in ("logprobs_from_logits", "entropy_from_logits", "entropy_from_logits_with_chunking")
    }
    with pytest.raises(KeyError, match="in the block"), rlkern_verl.patch():
        assert engine.logprobs_from_logits is torch_functional.logprobs_from_logits is rlkern_verl.logprobs_from_logits
        assert (torch_functional_fused.FusedLinearForPPO, fused_kernel.linear_cross_entropy) == (
            *(rlkern_verl.FusedLinearForPPO, rlkern_verl.linear_cross_entropy),
        )
        late = types.ModuleType("verl.imported_later")
        late.logprobs_from_logits = torch_functional.logprobs_from_logits
        monkeypatch.setitem(sys.modules, late.__name__, late)
        with rlkern_verl.patch(inplace_backward=True):
            assert engine.logprobs_from_logits is torch_functional.logprobs_from_logits is not rlkern_verl.logprobs_from_logits
        assert engine.logprobs_from_logits is rlkern_verl.logprobs_from_logits
        raise KeyError("in the block")
    assert late.logprobs_from_logits is engine.logprobs_from_logits is original["logprobs_from_logits"]
    assert {name: getattr(torch_functional, name) for name in original} == original
    assert [torch_functional_fused.FusedLinearForPPO.__module__, fused_kernel.linear_cross_entropy] == [torch_functional_fused.__name__, stock]


def test_patch_from_several_threads(engine):
    original, errors = engine.logprobs_from_logits, []

    def work():
        try:
            for _ in range(20):
                with rlkern_verl.patch():
                    assert engine.logprobs_from_logits is not original
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and engine.logprobs_from_logits is torch_functional.logprobs_from_logits is original


def plugged(monkeypatch, **variables):
    """What the plugin gives `register` and `patch` under these variables of the environment."""
    calls = []
    monkeypatch.setattr(rlkern_verl, "register", lambda *names, **options: calls.append((names, options)))
    monkeypatch.setattr(rlkern_verl, "patch", lambda **options: calls.append(options))
    monkeypatch.setattr(verl_packed, "patch", lambda: calls.append("packed"))
    for name, value in variables.items():
        monkeypatch.setenv(f"RLKERN_VERL_{name}", value)
    runpy.run_module("rlkern.integrations.verl_plugin")
    return calls


@pytest.mark.parametrize(
    "variables, calls",
    (
        ({}, [((), {"options": {}}), {"inplace_backward": False}]),
        ({"PATCH": "1", "INPLACE_BACKWARD": "1"}, [((), {"options": {}}), {"inplace_backward": True}]),
        ({"PATCH": "0", "INPLACE_BACKWARD": "0"}, [((), {"options": {}})]),
        ({"LOSSES": "none"}, [{"inplace_backward": False}]),
        ({"PATCH": "0", "PACKED": "1"}, [((), {"options": {}}), "packed"]),
        (
            {"LOSSES": "tis, vespo", "OPTIONS": json.dumps({"tis": {"cap": 2.0}, "vespo": {"rollout_is": "token"}}), "PATCH": "0"},
            [(("tis", "vespo"), {"options": {"tis": {"cap": 2.0}, "vespo": {"rollout_is": "token"}}})],
        ),
    ),
)
def test_plugin_says_what_register_and_patch_can(monkeypatch, variables, calls):
    assert plugged(monkeypatch, **variables) == calls


@pytest.mark.parametrize(
    "variables, message",
    (
        ({"INPLACE": "1"}, "unknown variable RLKERN_VERL_INPLACE, expected one of RLKERN_VERL_LOSSES, .*RLKERN_VERL_INPLACE_BACKWARD"),
        ({"PATCH": "yes"}, "RLKERN_VERL_PATCH must be '0' or '1', got 'yes'"),
        ({"INPLACE_BACKWARD": ""}, "RLKERN_VERL_INPLACE_BACKWARD must be '0' or '1', got ''"),
        ({"PATCH": "0", "INPLACE_BACKWARD": "1"}, "INPLACE_BACKWARD=1 has no effect with RLKERN_VERL_PATCH=0"),
        ({"OPTIONS": "{tis: 1}"}, "RLKERN_VERL_OPTIONS must be JSON, got '{tis: 1}'"),
        ({"OPTIONS": '{"tis": 2.0}'}, "must be a JSON object of objects, as .*, got"),
        ({"LOSSES": "none", "PACKED": "1"}, "RLKERN_VERL_PACKED=1 has no effect with RLKERN_VERL_LOSSES=none"),
        ({"LOSSES": "none", "OPTIONS": '{"tis": {}}'}, "OPTIONS has no effect with RLKERN_VERL_LOSSES=none"),
    ),
)
def test_plugin_refuses(monkeypatch, variables, message):
    with pytest.raises(ValueError, match=message):
        plugged(monkeypatch, **variables)


def test_plugin_lets_register_check_names(monkeypatch):
    monkeypatch.setenv("RLKERN_VERL_LOSSES", "clipcov")
    with pytest.raises(ValueError, match="unknown policy loss 'clipcov'"):
        runpy.run_module("rlkern.integrations.verl_plugin")
    assert torch_functional.logprobs_from_logits is not rlkern_verl.logprobs_from_logits


@pytest.mark.slow
def test_plugin_in_a_fresh_process():
    """As a Ray worker starts: verl imports the plugin, and its FSDP engine finds rlkern's functions."""
    code = """
        import verl
        from verl.trainer.ppo.core_algos import get_policy_loss_fn
        assert get_policy_loss_fn("rlkern_clip_cov").__name__ == "rlkern_clip_cov"
        from verl.workers.engine.fsdp import transformer_impl
        from rlkern.integrations import verl as rlkern_verl
        assert transformer_impl.logprobs_from_logits is rlkern_verl.logprobs_from_logits
        assert transformer_impl.verl_F.entropy_from_logits is rlkern_verl.entropy_from_logits
    """
    environment = os.environ | {"VERL_USE_EXTERNAL_MODULES": "rlkern.integrations.verl_plugin", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], env=environment, check=True, timeout=300)
