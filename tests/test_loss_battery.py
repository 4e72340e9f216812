"""Every check of loss_battery.py on every case of cases_*.py. Every check can fail."""

import dataclasses
from functools import partial

import loss_battery as battery
import pytest
import torch
from every_case import EVERY_CASE

import rlkern

CHECKS = {name.removeprefix("check_"): check for name, check in vars(battery).items() if name.startswith("check_")}
precision = CHECKS.pop("precision")
CHECKS |= {f"precision, {dtype}": partial(precision, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}
APPLIES = {  # where not to every case
    "gradient": lambda case: case.inputs()[1],
    "empty_mask": lambda case: case.mask or case.empty,
    "compiles": lambda case: compiled_as_well(case),
    "packed": battery.takes_pack,
    "masked_garbage": lambda case: case.mask or case.counted,
    "metrics_merge": lambda case: battery.metrics_of(case(case.inputs()[0])),
}
# What is exported without a case, each with the reason.
WITHOUT_CASE = {
    **dict.fromkeys(("BGPOAccumulator", "EntropyHistory"), "state between calls, with tests of its own: test_bgpo_accumulator.py, test_epo.py"),
    **dict.fromkeys(("BGPOOutput", "BGPOStats", "DPOOutput", "FusedOutput", "LossOutput"), "what losses return"),
    **dict.fromkeys(("epo_beta", "kd_coefficient"), "numbers to numbers, no tensor"),
    "linear_fused_loss": "from hidden states: the losses of its names on statistics have cases; test_linear_fused.py",
    "nlpo_keep_set": "prepared with the rollout: walks the rows in chunks, reads ids that may lie on the host; test_nlpo.py",
}


def compiled_as_well(case: battery.Case) -> bool:
    """Of each loss the first case and every sixth: compiling takes a second, and most variants differ in one
    formula. RLKERN_EVERY_CASE=1 compiles all."""
    place = [str(other) for other in battery.CASES if other.name == case.name].index(str(case))
    return place % 6 == 0 or EVERY_CASE


def test_every_export_has_a_case_or_a_reason():
    exported = {name for space in (rlkern, rlkern.losses, rlkern.diffusion) for name in space.__all__ if name.endswith("_loss")}
    cases = {case.name for case in battery.CASES}
    assert not cases & WITHOUT_CASE.keys()
    assert exported <= cases | WITHOUT_CASE.keys()


def checks_of_cases():
    for name, check in CHECKS.items():
        applies = APPLIES.get(name, lambda case: True)
        yield from (pytest.param(check, case, id=f"{name}-{case}") for case in battery.CASES if applies(case))


@pytest.mark.parametrize("check, case", list(checks_of_cases()))
def test_case(check, case):
    check(case)


# --- every check fails on a loss that breaks its promise ---


def wide(x):
    return x if x.dtype == torch.float64 else x.float()


def masked_mean(x, mask):
    return torch.where(mask, wide(x), 0).sum() / mask.sum().clamp(min=1)


def with_metrics(x, mask, **metrics):
    return rlkern.LossOutput(masked_mean(x, mask), metrics)


def mean_of_sequences(x, mask, w):
    """Called what it is not: a mean over tokens."""
    means = torch.where(mask, x, 0).sum(-1) / mask.sum(-1).clamp(min=1)
    return with_metrics(x, mask, entropy=means.detach().sum() / max(len(means), 1), tokens=mask.sum().to(x.dtype))


BROKEN = {
    "sound": lambda x, mask, w: masked_mean(wide(x) * torch.where(mask, wide(w.detach()), 0), mask),
    "multiplies by mask": lambda x, mask, w: (x * mask).sum() / mask.sum(),
    "detaches": lambda x, mask, w: masked_mean(x * x.detach(), mask),
    "rounds": lambda x, mask, w: masked_mean(x.bfloat16().float() if x.dtype == torch.float32 else x, mask),
    "reads flat storage": lambda x, mask, w: masked_mean(x.as_strided(x.shape, (x.shape[1], 1)), mask),
    "asks host": lambda x, mask, w: masked_mean(x, mask) if mask.any() else x.sum() * 0,
    "selects by mask": lambda x, mask, w: x[mask].float().mean(),
    "builds constants": lambda x, mask, w: masked_mean(x + torch.tensor([1.0]), mask),
    "copies to host": lambda x, mask, w: masked_mean(x * w.detach().to("cpu"), mask),
    "lists": lambda x, mask, w: masked_mean(x, mask) * len(w.tolist()),
    "saves result": lambda x, mask, w: masked_mean(x, mask).exp(),
    "returns input": lambda x, mask, w: (masked_mean(x, mask), w.detach()),
    "forgets detach": lambda x, mask, w: masked_mean(x * w, mask),
    "writes into input": lambda x, mask, w: masked_mean(x, mask) + 0 * w.detach().mul_(2).sum(),
    "keeps the graph of a metric": lambda x, mask, w: (masked_mean(x, mask), {"mean": masked_mean(x, mask)}),
    "adds a constant": lambda x, mask, w: masked_mean(x, mask) + 1,
    "pulls where masked": lambda x, mask, w: torch.where(mask, x.float(), 1e-3 * (x - x.detach()).float()).sum(),
    "bends the gradient": lambda x, mask, w: masked_mean(x + 0.02 * (x - x.detach()) if x.dtype == torch.bfloat16 else x, mask),
    "squares what is masked": lambda x, mask, w: torch.where(mask, x.square(), 0).sum(),
    "shares memory": lambda x, mask, w: ((value := masked_mean(x, mask)), value.detach()),
    "mean of sequences": mean_of_sequences,
    "metric without rule": lambda x, mask, w: with_metrics(x, mask, surprise=x.detach().sum()),
    "metric without count": lambda x, mask, w: with_metrics(x, mask, entropy=masked_mean(x, mask).detach()),
    "divides integers": lambda x, mask, w: with_metrics(x, mask, clip_fraction_low=mask.sum() / mask.numel()),
    "rounds weights": lambda x, mask, w: masked_mean(x * (mask.sum(-1, keepdim=True) / 7).to(x.dtype), mask),
    "unrolls": lambda x, mask, w: masked_mean(x * int(x.shape[0] > battery.BATCH), mask),
    "computes otherwise when compiled": lambda x, mask, w: masked_mean(x, mask) * (2 if torch.compiler.is_compiling() else 1),
}


def case_of(function, naive=None):
    def draw(g, batch, length):
        return {"values": g.normal(batch, length), "mask": g.mask(batch, length), "weights": g.normal(batch, length)}, ("values",)

    def of_tokens(values, mask, weights):
        return function(values, mask.mask.view(values.shape) if isinstance(mask, rlkern.Packed) else mask, weights)

    return battery.Case("broken", draw, mask="mask", function=of_tokens, naive=naive)


@pytest.mark.parametrize(
    ("check", "broken", "error", "message"),
    [
        ("gradient", "detaches", RuntimeError, "Jacobian mismatch"),
        ("precision, torch.bfloat16", "multiplies by mask", AssertionError, "outputs must be float32"),
        ("precision, torch.float32", "rounds", AssertionError, "torch.float32 values, tensor 0"),
        ("precision, torch.bfloat16", "bends the gradient", AssertionError, "torch.bfloat16 gradients, tensor 0"),
        ("strides", "reads flat storage", AssertionError, "strided values"),
        ("empty_mask", "multiplies by mask", AssertionError, "not finite without tokens"),
        ("empty_mask", "adds a constant", AssertionError, "loss without tokens is"),
        ("empty_mask", "pulls where masked", AssertionError, "gradient without tokens"),
        ("empty_batch", "multiplies by mask", AssertionError, "not finite for an empty batch"),
        ("empty_batch", "adds a constant", AssertionError, "loss of an empty batch is"),
        ("masked_garbage", "multiplies by mask", AssertionError, "values with nan where masked"),
        ("masked_garbage", "squares what is masked", AssertionError, "gradients with nan where masked"),
        ("no_host_sync", "asks host", battery.HostSync, "__bool__ waits for the device"),
        ("no_host_sync", "selects by mask", battery.HostSync, "a bool index"),
        ("no_host_sync", "builds constants", battery.HostSync, "tensor waits for the device"),
        ("no_host_sync", "copies to host", battery.HostSync, "names a device"),
        ("no_host_sync", "lists", battery.HostSync, "tolist waits for the device"),
        ("results_are_writable", "saves result", RuntimeError, "modified by an inplace operation"),
        ("results_are_writable", "shares memory", AssertionError, "result 1 after writing into result 0"),
        ("results_are_writable", "returns input", AssertionError, "weights was changed"),
        ("results_are_writable", "writes into input", AssertionError, "weights was changed"),
        ("only_wrt_has_gradient", "forgets detach", AssertionError, "weights must be detached"),
        ("only_wrt_has_gradient", "keeps the graph of a metric", AssertionError, "result 1 must be detached"),
        ("metrics_merge", "mean of sequences", AssertionError, "entropy: "),
        ("metrics_merge", "metric without rule", ValueError, "unknown metric 'surprise'"),
        ("metrics_merge", "metric without count", ValueError, "metric 'entropy' is merged by 'tokens'"),
        ("packed", "mean of sequences", AssertionError, "packed torch.float64 values, tensor 1"),
        ("packed", "multiplies by mask", AssertionError, "packed torch.float64 values, tensor 0"),
        ("packed", "asks host", battery.HostSync, "waits for the device"),
        ("default_dtype", "divides integers", AssertionError, "torch.bfloat16 for torch.float32 inputs"),
        ("default_dtype", "rounds weights", AssertionError, "other values under another default dtype"),
        ("compiles", "asks host", torch._dynamo.exc.Unsupported, "(?i)data-dependent|dynamic control flow"),
        ("compiles", "unrolls", AssertionError, "compiled again"),
        ("compiles", "computes otherwise when compiled", AssertionError, "compiled values"),
    ],
)
def test_check_catches(check, broken, error, message):
    with pytest.raises(error, match=message):
        CHECKS[check](case_of(BROKEN[broken]))


def test_gradient_check_catches_a_naive_loss_of_another_gradient():
    with pytest.raises(AssertionError, match="gradient against the naive loss"):
        battery.check_gradient(case_of(BROKEN["detaches"], naive=lambda values, mask, weights: masked_mean(values.square(), mask)))


def test_metrics_must_carry_no_gradient():
    case = case_of(lambda x, mask, w: masked_mean(x, mask))
    with pytest.raises(AssertionError, match="result 0 must be detached"):
        battery.check_only_wrt_has_gradient(dataclasses.replace(case, draw=lambda *shape: (case.draw(*shape)[0], ())))


@pytest.mark.parametrize("check", CHECKS)
def test_check_passes_a_sound_loss(check):
    CHECKS[check](case_of(BROKEN["sound"]))
