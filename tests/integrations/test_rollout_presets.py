"""Presets of rollout_weights against what the trainers compute, run from their own code where it is here.

`python -m pytest -s` prints the table of docs/rollout_corrections.md: preset, function, largest difference.
"""

import inspect
import math
import re
import textwrap
import types

import pytest
import torch
from torch import Tensor

from rlkern import off_policy_mask, rollout_weights


def drawn(seed=0, spread=0.5):
    """(train, rollout, mask): 16 sequences of up to 12 tokens, one without any."""
    g = torch.Generator().manual_seed(seed)
    train = -torch.rand(16, 12, generator=g) * 2
    rollout = (train + spread * torch.randn(16, 12, generator=g)).clamp(max=-1e-3)
    mask = torch.arange(12) < torch.randint(1, 13, (16, 1), generator=g)
    mask[5] = False
    return train, rollout, mask


def ours(train, rollout, mask, **options) -> Tensor:
    """The factor of each token's loss."""
    r = rollout_weights(train, rollout, mask, **options)
    return r.weights if r.level == "token" else r.weights.unsqueeze(-1) * mask


def report(name, function, mine, theirs, mask):
    """Both are the same, reject something, and keep something."""
    mine, theirs = (torch.where(mask, x.to(torch.float64), 0) for x in (mine, theirs))
    print(f"| {name} | {function} | {(mine - theirs).abs().max().item():.1e} |")
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert mine.any()


# --- verl ---------------------------------------------------------------------------------------------------

VERL = [  # preset and options; the recipe of verl's RolloutCorrectionConfig
    ("tis", {}, "decoupled_token_is"),
    ("icepop", {}, "decoupled_token_icepop"),
    ("seq-tis", {}, "decoupled_seq_is"),
    ("seq-mis", {}, "decoupled_seq_is_rs"),
    ("geo-rs", {}, "decoupled_geo_rs"),
    ("seq-tis", {"gates": {"seq_mean_k1": (0.999, 1.001)}}, "decoupled_geo_rs_seq_tis"),
    ("tis", {"gates": {"seq_mean_k1": (0.999, 1.001)}}, "decoupled_geo_rs_token_tis"),
    ("tis", {"gates": {"seq_mean_k3": 0.01}}, "decoupled_k3_rs_token_tis"),
]


@pytest.mark.parametrize(("preset", "options", "recipe"), VERL, ids=[row[2] for row in VERL])
@pytest.mark.parametrize("normalize", [False, True])
def test_verl(preset, options, recipe, normalize):
    helper = pytest.importorskip("verl.trainer.ppo.rollout_corr_helper")
    config = pytest.importorskip("verl.trainer.config.algorithm").RolloutCorrectionConfig
    train, rollout, mask = drawn(spread=0.002 if "geo" in recipe else 0.1 if "k3" in recipe else 0.5)
    c = getattr(config, recipe)()
    weights, kept, _ = helper.compute_rollout_correction_and_rejection_mask(
        *(train, rollout, mask.float()),
        rollout_is=c.rollout_is,
        rollout_is_threshold=c.rollout_is_threshold,
        rollout_is_batch_normalize=normalize,
        rollout_rs=c.rollout_rs,
        rollout_rs_threshold=c.rollout_rs_threshold,
    )
    theirs = kept if weights is None else weights.batch["rollout_is_weights"] * kept
    normalize &= c.rollout_is is not None
    report(preset, f"verl {recipe}", ours(train, rollout, mask, preset=preset, normalize=normalize, **options), theirs, mask)


def test_verl_gates():
    """All of its gates. Its k1 bound pi_rollout / pi_train."""
    helper = pytest.importorskip("verl.trainer.ppo.rollout_corr_helper")
    train, rollout, mask = drawn()
    upper = {"token_k2": 0.1, "token_k3": 0.1, "seq_sum_k2": 1.0, "seq_sum_k3": 1.0, "seq_mean_k2": 0.1, "seq_mean_k3": 0.1}
    upper |= {"seq_max_k2": 0.5, "seq_max_k3": 0.5}
    names = upper | dict.fromkeys(("token_k1", "seq_sum_k1", "seq_mean_k1"), "0.7_1.25")
    assert set(names) == set(helper.SUPPORTED_ROLLOUT_RS_OPTIONS)
    for name, bound in names.items():
        theirs, _ = helper.compute_rollout_rejection_mask(train - rollout, mask.float(), name, bound)
        mine = rollout_weights(train, rollout, mask, mode="none", gates={name: upper.get(name, (1 / 1.25, 1 / 0.7))})
        assert torch.equal(mine.keep, theirs != 0) and 0 < mine.keep.sum() < mask.sum(), name
    one = torch.tensor([[math.log(0.5)]])
    theirs, _ = helper.compute_rollout_rejection_mask(one, torch.ones(1, 1), "token_k1", "0.4_1.2")
    assert theirs.item() == 0  # a ratio of 0.5 lies in [0.4, 1.2], but its inverse does not
    assert rollout_weights(one, torch.zeros(1, 1), torch.ones(1, 1), mode="none", gates={"token_k1": (0.4, 1.2)}).keep.item()


def test_verl_where_a_batch_is_masked():
    helper = pytest.importorskip("verl.trainer.ppo.rollout_corr_helper")
    x, mask = torch.full((2, 3), 5.0), torch.ones(2, 3)
    with pytest.raises(ZeroDivisionError):
        helper.compute_rollout_correction_weights(x, mask, "token", "0.5_5.0")
    r = rollout_weights(x, torch.zeros(2, 3), mask, preset="icepop", normalize=True)
    assert (r.weights == 0).all() and r.metrics["rollout/ess"] == 0


# --- TRL ----------------------------------------------------------------------------------------------------

TRL = [
    ("tis", "token_truncate"),
    ("icepop", "token_mask"),
    ("seq-tis", "sequence_truncate"),
    ("seq-mask", "sequence_mask"),
]


@pytest.mark.parametrize(("preset", "mode"), TRL, ids=[row[1] for row in TRL])
def test_trl(preset, mode):
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    source = inspect.getsource(trainer._generate_and_score_completions)
    found = re.search(r"^ +mask = completion_mask if tool_mask is None.*?vllm_importance_sampling_ratio\.masked_fill\(.*?\)$", source, re.S | re.M)
    assert found, "TRL computes the ratio elsewhere now"
    train, rollout, mask = drawn(spread=0.3)
    rollout[0, 0] = math.nan
    me = types.SimpleNamespace(vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_min=None, vllm_importance_sampling_clip_max=3.0)
    names = {"torch": torch, "math": math, "self": me, "tool_mask": None, "completion_mask": mask.int()}
    names |= {"old_per_token_logps": train, "sampling_per_token_logps": rollout}
    exec(textwrap.dedent(found.group()), names)
    theirs = names["vllm_importance_sampling_ratio"].expand_as(train)
    report(preset, f"TRL {mode}, clip_max 3", ours(train, rollout, mask, preset=preset, low=None, high=3.0), theirs, mask)


def test_trl_off_policy_mask():
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    train, rollout, mask = drawn(spread=0.1)
    a = torch.linspace(-1, 1, 16)[:, None]
    theirs = trainer.get_off_policy_mask(a, train, rollout, mask.float(), 0.01)
    mine = off_policy_mask(train, rollout, a, mask, 0.01)
    assert torch.equal(mine, (theirs.expand_as(mask) != 0) & mask) and 0 < mine.sum() < mask.sum()


# --- trainers that are not here: their formulas, token by token ---------------------------------------------


def naive(formula):
    """formula(x of a sequence's tokens, counted) -> their factors."""

    def theirs(train, rollout, mask):
        out = torch.zeros(train.shape, dtype=torch.float64)
        for i in range(len(train)):
            x = [(train[i, t].double() - rollout[i, t].double()).item() for t in range(train.shape[1]) if mask[i, t]]
            if x:
                out[i, mask[i]] = torch.tensor(formula(x), dtype=torch.float64)
        return out

    return theirs


def mean(x):
    return sum(x) / len(x)


def band(low, value, high):
    return low <= value <= high


OTHERS = [  # (preset, options, whose, formula)
    ("icepop", {"low": 0.2}, "prime-rl [0.2, 5]", lambda x: [math.exp(v) * band(0.2, math.exp(v), 5) for v in x]),
    ("icepop", {"low": None}, "AReaL <= 5", lambda x: [math.exp(v) * (math.exp(v) <= 5) for v in x]),
    ("tis", {}, "slime --tis-clip 2, NeMo-RL", lambda x: [min(math.exp(v), 2) for v in x]),
    ("seq-tis", {"high": 5.0}, "SkyRL sequence 5", lambda x: [min(math.exp(sum(x)), 5)] * len(x)),
    ("seq-mis", {}, "SkyRL product", lambda x: [min(math.exp(sum(x)), 2) * band(0.5, math.exp(sum(x)), 2)] * len(x)),
    ("geo-rs", {"gates": {"seq_mean_k1": (0.99, 1.01)}}, "SkyRL geometric", lambda x: [band(0.99, math.exp(mean(x)), 1.01)] * len(x)),
    ("seq-mask-tis", {}, "NeMo-RL seq-mask-tis", lambda x: [math.exp(v) * band(0.999, math.exp(mean(x)), 1.002) for v in x]),
    ("veto", {"gates": {"seq_all_ratio": (0.5, 2.0)}}, "slime veto", lambda x: [all(band(0.5, math.exp(v), 2) for v in x)] * len(x)),
]


@pytest.mark.parametrize(("preset", "options", "whose", "formula"), OTHERS, ids=[row[2] for row in OTHERS])
def test_others(preset, options, whose, formula):
    train, rollout, mask = drawn(spread={"icepop": 1.5, "geo-rs": 0.01, "seq-mask-tis": 0.01}.get(preset, 0.6))
    mine = ours(train, rollout, mask, preset=preset, **options)
    report(preset, whose, mine, naive(formula)(train, rollout, mask), mask)
    if preset not in ("tis", "seq-tis"):
        assert (mine[mask] == 0).any()
