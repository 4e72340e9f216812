"""Losses do not compile again when their coefficients change."""

import loss_battery as battery
import pytest
import torch
from public import public

COEFFICIENTS = {  # of cases of the battery
    "nft_loss": {"neg_weight": 0.9, "clamp_neg": 0.8},
    "kdrl_loss[k1]": {"kd_coef": 0.02, "clip_low": 0.25, "clip_high": 0.3},
    "epo_loss": {"coef": 0.3, "alpha": 0.4, "beta": 1.5, "kappa_low": 0.7, "kappa_high": 1.3},
    "epo_loss[first]": {"mean_entropy": 0.8},
    "nlpo_loss": {"entropy_coef": 0.2, "clip_low": 0.25},
    "nash_md_loss": {"beta": 0.3},
    "nash_mp_loss": {"beta": 0.3, "eta": 0.7},
    "bradley_terry_loss": {"penalty_weight": 0.02, "reward_bound": 4.0},
    "spherical_z_loss[sum]": {"scale": 1.3, "offset": 0.3},
    "lse_penalty": {"coef": 0.02},
    "espo_loss[kl]": {"kl_coef": 0.2, "clip_low": 0.25, "clip_high": 0.3},
    "spg_loss": {"beta": 1.2, "upper_weight": 0.4},
    "vrpo_loss[weighted]": {"beta": 0.2},
    "wd1_loss": {"psi": 0.8},
}


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_coefficients_do_not_compile_again(name):
    (case,) = [case for case in battery.CASES if str(case) == name]
    inputs, wrt = case.inputs()
    inputs, function = battery.as_leaves(inputs, wrt, torch.float32), public(case.name)
    battery.assert_compiles_once(lambda options: function(**inputs, **{**case.options, **options}), COEFFICIENTS[name])
