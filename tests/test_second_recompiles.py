"""The losses of cases_second.py do not compile again when their coefficients change."""

import cases_second  # noqa: F401
import loss_battery as battery
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

COEFFICIENTS = {
    "nft_loss": {"neg_weight": 0.9, "clamp_neg": 0.8},
    "kdrl_loss": {"kd_coef": 0.02, "clip_low": 0.25, "clip_high": 0.3},
    "epo_loss": {"coef": 0.3, "alpha": 0.4, "beta": 1.5, "kappa_low": 0.7, "kappa_high": 1.3},
    "nlpo_loss": {"entropy_coef": 0.2, "clip_low": 0.25},
    "nash_md_loss": {"beta": 0.3},
    "nash_mp_loss": {"beta": 0.3, "eta": 0.7},
    "bradley_terry_loss": {"penalty_weight": 0.02, "reward_bound": 4.0},
    "spherical_z_loss": {"scale": 1.3, "offset": 0.3},
    "lse_penalty": {"coef": 0.02},
}


@pytest.mark.parametrize("name", sorted(COEFFICIENTS))
def test_coefficients_do_not_compile_again(name):
    case = next(case for case in battery.CASES if case.name == name)
    inputs, wrt = case.inputs()
    inputs = battery.as_leaves(inputs, wrt, torch.float32)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    function = getattr(battery.rlkern.losses, name)
    compiled = torch.compile(lambda options: function(**inputs, **{**case.options, **options}), fullgraph=True, dynamic=True, backend=counter)
    # The second value is where torch.compile may still learn that a float varies; after that it must know.
    for factor in (1.0, 1.01):
        compiled({key: value * factor for key, value in COEFFICIENTS[name].items()})
    frames = counter.frame_count
    for factor in (1.02, 1.05, 1.1):
        options = {key: value * factor for key, value in COEFFICIENTS[name].items()}
        actual, expected = compiled(options), function(**inputs, **{**case.options, **options})
        torch.testing.assert_close(battery.total(actual), battery.total(expected))
    assert counter.frame_count == frames
