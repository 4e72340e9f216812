"""Defaults that papers, TRL, verl or OpenRLHF have, and that a trainer who names none must get."""

import inspect

import pytest
from public import FUNCTIONS, public

import rlkern

DEFAULTS = {
    "bernoulli_masks": {"complementary": False},
    "bgpo_loss": {"clip": None, "dual_clip": None, "max_log_ratio": 20.0, "kl_coef": 0.0, "kl": "k2"},
    "bradley_terry_loss": {"penalty_weight": 0.01, "reward_bound": 5.0, "centering": 0.0, "focal_gamma": 0.0, "penalty": "none"},
    "cispo_loss": {"aggregation": "token-mean"},
    "cpo_loss": {"beta": 0.1, "label_smoothing": 0.0, "nll_coef": 1.0, "nll": "token"},
    "diffu_grpo_loss": {"clip_low": 0.5, "clip_high": 0.5},  # d1's recipes
    "dpo_loss": {"beta": 0.1, "label_smoothing": 0.0},
    "elbo_coeff": {"max_log_ratio": 20.0, "kl": "k2"},
    "epo_beta": {"gamma": 1.0, "schedule": "paper"},
    "epo_loss": {"coef": 1e-3, "alpha": 0.1, "beta": 1.0, "kappa_low": 0.8, "kappa_high": 1.2, "smoothing": "hinge"},
    "espo_loss": {"clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.0},
    "grpo_loss": {"clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.0, "kl_kind": "k3", "kl_clamp": None},
    "gspo_loss": {"clip_low": 3e-4, "clip_high": 4e-4, "log_ratio_clamp": 10.0, "aggregation": "seq-mean-token-mean"},  # the paper; verl's clamp
    "kd_coefficient": {"start": 5e-3, "decrement": 5e-5, "floor": 1e-3},
    "kdrl_loss": {"kd": "k2", "kd_coef": 5e-3, "kd_norm": "all"},
    "kto_loss": {"beta": 0.1, "kl": None, "loss_type": "kto", "desirable_weight": 1.0, "undesirable_weight": 1.0},
    "lp_reg_loss": {"rho": 0.01, "kl_coef": 1.0, "clip_low": 1.0, "clip_high": 9.0, "kl_clamp": 10.0, "min_count": 2, "kl_term": "sampled"},
    "lse_penalty": {"coef": 1e-4},
    "nash_md_loss": {"beta": 0.1, "aggregation": "seq-mean-token-sum"},
    "nash_mp_loss": {"beta": 0.1, "eta": 1.0},
    "nlpo_loss": {"normalize_advantages": True, "entropy_coef": 0.0},
    "orpo_loss": {"beta": 0.1, "nll_coef": 1.0, "nll": "sequence"},
    "ppo_loss": {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": None, "log_ratio_clamp": 20.0, "aggregation": "token-mean"},  # verl's clamp
    "simpo_loss": {"beta": 2.0, "gamma": 0.5, "label_smoothing": 0.0, "nll_coef": 0.0, "nll": "token"},  # the authors'
    "spg_loss": {"beta": 1.5, "upper_weight": 0.5},
    "spherical_z_loss": {"scale": 1.0, "offset": 0.0, "reduction": "sum"},
    "pair_stats": {"kind": "reverse_kl", "beta": 0.5, "other_temperature": None, "vocab": None, "other_grad": False},
    "token_divergence": {"kind": "reverse_kl", "beta": 0.5, "other_temperature": None, "vocab": None, "other_grad": False},
    "unigrpo_loss": {"clip_low": 0.2, "clip_high": 0.2},
    "wd1_loss": {"psi": 1.0, "group_size": None},
}


def defaults_of(function):
    return {name: p.default for name, p in inspect.signature(function).parameters.items() if p.default is not p.empty}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults(name):
    found = defaults_of(public(name))
    assert {option: found[option] for option in DEFAULTS[name]} == DEFAULTS[name]


def test_options_that_many_functions_share_have_one_default():
    shared = {"ignore_index": (-100,), "inplace_backward": (False,), "temperature": (1.0,), "normalizer": (None,), "mc_weight": (None, 1.0)}
    for function in (*FUNCTIONS.values(), rlkern.BGPOAccumulator.observe, rlkern.BGPOAccumulator.loss):
        for option, value in defaults_of(function).items():
            assert option not in shared or value in shared[option], (function.__name__, option, value)
