"""Importance weights and averages of GRPOTrainer's losses, against TRL's `_compute_loss`, without a model."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

trl = pytest.importorskip("trl")
pytest.importorskip("peft")

from trl.experimental.gmpo import GMPOConfig, GMPOTrainer  # noqa: E402

import rlkern.integrations.trl as integration  # noqa: E402

SHAPE = (4, 8)
STEPS = 3  # of gradient accumulation


@pytest.fixture(autouse=True)
def without_model(monkeypatch):
    """TRL's GRPOTrainer as far as `_compute_loss` needs it: a configuration, one process, the test's logp."""

    def init(self, model=None, reward_funcs=None, args=None, **kwargs):
        self.args, self.model = args, SimpleNamespace(training=True, forward=lambda: None)
        self.accelerator = SimpleNamespace(num_processes=1, process_index=0, gather=lambda x: x, reduce=lambda x, reduction: x)
        self.current_gradient_accumulation_steps = STEPS
        self.epsilon_low, self.epsilon_high = args.epsilon, args.epsilon if args.epsilon_high is None else args.epsilon_high
        self.aux_loss_enabled = self._entropy_bonus_enabled = self._is_vlm = False
        self._metrics = {"train": defaultdict(list)}
        for name in (
            *("loss_type", "beta", "top_entropy_quantile", "off_policy_mask_threshold", "importance_sampling_level", "use_vllm"),
            *("vllm_importance_sampling_correction", "max_completion_length", "num_iterations"),
        ):
            setattr(self, name, getattr(args, name))
        self.ref_model = None

    def scored(self, model, *args, **kwargs):
        return model, torch.zeros_like(model), None  # the "model" is the log-probabilities

    monkeypatch.setattr(trl.GRPOTrainer, "__init__", init)
    monkeypatch.setattr(trl.GRPOTrainer, "_get_per_token_logps_and_entropies", scored)


def trained(trainer, config, inputs, config_class=trl.GRPOConfig, **options):
    """Loss and gradient of one micro-batch."""
    args = config_class("unused", report_to=[], use_cpu=True, bf16=False, steps_per_generation=STEPS, **config)
    made = trainer(None, reward_funcs=None, args=args, **options)
    leaf = inputs["logp"].clone().requires_grad_()
    loss = made._compute_loss(leaf, {key: value for key, value in inputs.items() if key != "logp"})
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def batch(seed, weights=None):
    g = torch.Generator().manual_seed(seed)
    logp = -2 * torch.rand(SHAPE, generator=g) - 0.05
    mask = (torch.arange(8) < torch.tensor([[8], [5], [2], [7]])).long()
    shape = {"token": SHAPE, "sequence": (SHAPE[0], 1)}.get(weights)
    inputs = {
        "logp": logp,
        "old_per_token_logps": logp + 0.3 * torch.randn(SHAPE, generator=g),
        "ref_per_token_logps": logp + 0.3 * torch.randn(SHAPE, generator=g),
        "advantages": torch.tensor([1.3, -0.7, 0.4, -1.1]),
        "completion_mask": mask,
        "completion_ids": torch.zeros(SHAPE, dtype=torch.long),
        "num_items_in_batch": torch.tensor(3 * 40),
        **{name: torch.zeros(SHAPE[0], 2, dtype=torch.long) for name in ("prompt_ids", "prompt_mask")},
    }
    if shape is not None:
        drawn = 0.5 + torch.rand(shape, generator=g)
        inputs["importance_sampling_ratio"] = torch.where(mask == 0, 1.0, drawn) if weights == "token" else drawn  # TRL has 1 outside of the mask
    return inputs


WITH_WEIGHTS = {"use_vllm": True}
# name -> options here, and the configuration with which TRL computes it; both take TRL's aggregation
SAME_IN_TRL = {
    "grpo": ({"dual_clip": 3.0}, {"delta": 3.0}),
    "ppo": ({"clip_high": 0.28}, {"epsilon_high": 0.28}),
    "gspo": ({"clip_low": 0.05, "clip_high": 0.05}, {"importance_sampling_level": "sequence", "epsilon": 0.05, "loss_type": "grpo"}),
    "cispo": ({"cap": 1.2}, {"loss_type": "cispo", "epsilon_high": 1.2}),
    "sapo": ({}, {"loss_type": "sapo"}),
    "vespo": ({}, {"loss_type": "vespo"}),
}


@pytest.mark.parametrize("name", SAME_IN_TRL)
def test_weights_are_used_as_trl_uses_them(name):
    options, config = SAME_IN_TRL[name]
    kl = {"beta": 0.1}  # times the ratio, of the sequence at TRL's sequence level
    for seed in range(3):
        for weights in (None, "token", "sequence"):
            inputs = batch(seed, weights)
            flags = {} if weights is None else WITH_WEIGHTS
            for more in (flags, flags | kl):  # the KL term is averaged as the policy loss is
                theirs = trained(trl.GRPOTrainer, config | more, inputs)
                ours = trained(integration.GRPOTrainer, more, inputs, policy_loss=name, policy_loss_options=options)
                torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)
                assert theirs[1].abs().max() > 0


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_gspo_under_every_average_that_it_is_told(loss_type):
    for weights in ("token", "sequence"):
        inputs = batch(1, weights)
        config = {"importance_sampling_level": "sequence", "loss_type": loss_type, **WITH_WEIGHTS}
        theirs = trained(trl.GRPOTrainer, config, inputs)
        options = {"clip_low": 0.2, "clip_high": 0.2, "aggregation": loss_type}
        ours = trained(integration.GRPOTrainer, WITH_WEIGHTS, inputs, policy_loss="gspo", policy_loss_options=options)
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)


def test_gmpo_is_trls_experimental_one():
    """A mean over sequences under the default loss_type, divided over accumulation, without weights."""
    for seed in range(3):
        theirs = trained(GMPOTrainer, {}, batch(seed), GMPOConfig)
        torch.testing.assert_close(trained(integration.GRPOTrainer, {}, batch(seed), policy_loss="gmpo"), theirs, rtol=2e-5, atol=1e-6)
    weighted = batch(0, "token")
    torch.testing.assert_close(trained(GMPOTrainer, WITH_WEIGHTS, weighted, GMPOConfig), trained(GMPOTrainer, {}, batch(0), GMPOConfig))
    with pytest.raises(
        ValueError, match="policy_loss='gmpo' takes no importance weights, as TRL's own.*set vllm_importance_sampling_correction=False"
    ):
        trained(integration.GRPOTrainer, WITH_WEIGHTS, weighted, policy_loss="gmpo")
    with pytest.raises(ValueError, match="policy_loss='gmpo' takes no importance weights"):
        trained(integration.GRPOTrainer, {}, weighted, policy_loss="gmpo")
    with pytest.raises(ValueError, match="policy_loss='nft' takes no importance weights, for it has no advantages"):
        trained(integration.GRPOTrainer, WITH_WEIGHTS, weighted, policy_loss="nft")


def surrogates(x):
    """The losses that TRL lacks, a value per token, at options where nothing is clipped or chosen."""
    logp, ratio, a = x["logp"], (x["logp"] - x["old_per_token_logps"]).exp(), x["advantages"][:, None]
    capped = ratio.detach().clamp(max=1)
    return {
        "reinforce": ({}, -a * logp),
        "tis": ({}, -capped * a * logp),
        "topr": ({}, -torch.where(a < 0, capped, 1) * a * logp),
        "clip_cov": ({"clip_low": 1.0, "clip_high": 9.0, "cov_low": 50.0, "cov_high": 60.0}, -a * ratio),
        "kl_cov": ({"kl_coef": 0.0}, -a * ratio),
        "lp_reg": ({"rho": 0.0}, -a * ratio),
    }


def test_every_other_loss_is_multiplied_token_by_token(monkeypatch):
    rows = ("logp", "entropy", "kept_logmass", "proxy_logp")
    monkeypatch.setattr(integration.GRPOTrainer, "_rlkern_full_rows", lambda self, logp, *args, **kwargs: dict.fromkeys(rows, logp))
    for weights in ("token", "sequence"):
        inputs = batch(2, weights)
        w, mask = inputs["importance_sampling_ratio"], inputs["completion_mask"] != 0
        for name in surrogates(inputs):
            leaf = inputs["logp"].clone().requires_grad_()
            options, values = surrogates(inputs | {"logp": leaf})[name]
            expected = (w * values)[mask].sum() / (40 * STEPS)  # a third of the generation batch is one window
            ours = trained(integration.GRPOTrainer, WITH_WEIGHTS, inputs, policy_loss=name, policy_loss_options=options)
            torch.testing.assert_close(ours, (expected.detach(), torch.autograd.grad(expected, leaf)[0]), rtol=2e-5, atol=1e-6)


def test_every_loss_has_been_asked_about_its_weights():
    assert set(integration.POLICY_LOSSES) == {*SAME_IN_TRL, *surrogates(batch(0)), "gmpo", "nft"}


def test_a_weight_that_overflows_leaves_vespo_finite():
    """Without an upper bound TRL's weight of a token can be infinite; TRL's vespo bounds its logarithm."""
    inputs = batch(0, "token")
    inputs["importance_sampling_ratio"][0, 0] = math.inf
    theirs = trained(trl.GRPOTrainer, WITH_WEIGHTS | {"loss_type": "vespo"}, inputs)
    ours = trained(integration.GRPOTrainer, WITH_WEIGHTS, inputs, policy_loss="vespo")
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)
    assert ours[0].isfinite()


# --- averages of losses that are defined over sequences -----------------------------------------------------


@pytest.mark.parametrize("name", ["gspo", "gmpo", "sapo"])
def test_sequences_weigh_alike_under_the_default_loss_type(name):
    """The mean of the sequences' losses, each computed alone; told to take another average, it does."""
    inputs = batch(3)
    rows = [{k: v[i : i + 1] if v.dim() else v for k, v in inputs.items()} for i in range(4)]
    alone = [trained(integration.GRPOTrainer, {}, row, policy_loss=name)[0] for row in rows]
    together, gradient = trained(integration.GRPOTrainer, {}, inputs, policy_loss=name)
    torch.testing.assert_close(together, torch.stack(alone).mean())
    told, _ = trained(integration.GRPOTrainer, {}, inputs, policy_loss=name, policy_loss_options={"aggregation": "dapo"})
    lengths = inputs["completion_mask"].sum(1)
    torch.testing.assert_close(told, STEPS * (torch.stack(alone) * lengths).sum() / (40 * STEPS))
    assert not torch.isclose(told, together)


def test_refusals_of_averages():
    for name in ("gspo", "gmpo", "sapo"):
        trained(integration.GRPOTrainer, {"loss_type": "grpo"}, batch(0), policy_loss=name)
        with pytest.raises(ValueError, match=rf"loss_type='bnpo'.*policy_loss='{name}', whose own average is 'grpo': give .*'aggregation': 'bnpo'"):
            trained(integration.GRPOTrainer, {"loss_type": "bnpo"}, batch(0), policy_loss=name)
        with pytest.raises(ValueError, match=f"unknown aggregation 'token-mean' for policy_loss '{name}', expected one of 'grpo', 'bnpo'"):
            trained(integration.GRPOTrainer, {}, batch(0), policy_loss=name, policy_loss_options={"aggregation": "token-mean"})
    with pytest.raises(TypeError, match="'ppo' has no option 'aggregation'"):
        trained(integration.GRPOTrainer, {}, batch(0), policy_loss="ppo", policy_loss_options={"aggregation": "grpo"})
