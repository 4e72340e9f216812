"""Every check of loss_battery.py on every case of cases_*.py, every exported loss has a case, and every check can fail."""

import dataclasses
import importlib
import pathlib

import loss_battery as battery
import pytest
import torch

import rlkern
import rlkern

for path in sorted(pathlib.Path(__file__).parent.glob("cases_*.py")):
    importlib.import_module(path.stem)

every_case = pytest.mark.parametrize("case", battery.CASES, ids=str)
differentiable = pytest.mark.parametrize("case", [c for c in battery.CASES if c.inputs()[1]], ids=str)
emptiable = pytest.mark.parametrize("case", [c for c in battery.CASES if c.mask or c.empty], ids=str)
maskable = pytest.mark.parametrize("case", [c for c in battery.CASES if c.mask or c.counted], ids=str)


# What is exported without a case, each with the reason.
WITHOUT_CASE = {
    **dict.fromkeys(("BGPOAccumulator", "EntropyHistory"), "state between calls, with tests of its own: test_bgpo_accumulator.py, test_epo.py"),
    **dict.fromkeys(("BGPOOutput", "BGPOStats", "DPOOutput", "LossOutput"), "what losses return"),
    **dict.fromkeys(("epo_beta", "kd_coefficient"), "numbers to numbers, no tensor"),
    "nlpo_keep_set": "prepared with the rollout: walks the rows in chunks, reads ids that may lie on the host; test_nlpo.py",
}


def test_every_export_has_a_case_or_a_reason():
    exported = {name for space in (rlkern, rlkern.losses, rlkern.diffusion) for name in space.__all__ if name.endswith("_loss")}
    cases = {case.name for case in battery.CASES}
    assert not cases & WITHOUT_CASE.keys()
    assert exported <= cases | WITHOUT_CASE.keys()


@differentiable
def test_gradient(case):
    battery.check_gradient(case)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_precision(case, dtype):
    battery.check_precision(case, dtype)


@every_case
def test_strides(case):
    battery.check_strides(case)


@emptiable
def test_empty_mask(case):
    battery.check_empty_mask(case)


@every_case
def test_empty_batch(case):
    battery.check_empty_batch(case)


@maskable
def test_masked_garbage(case):
    battery.check_masked_garbage(case)


@every_case
def test_no_host_sync(case):
    battery.check_no_host_sync(case)


@every_case
def test_compiles(case):
    battery.check_compiles(case)


@every_case
def test_results_are_writable(case):
    battery.check_results_are_writable(case)


@every_case
def test_only_wrt_has_gradient(case):
    battery.check_only_wrt_has_gradient(case)


@pytest.mark.parametrize("case", [c for c in battery.CASES if battery.metrics_of(c(c.inputs()[0]))], ids=str)
def test_metrics_merge(case):
    names = battery.check_metrics_merge(case)
    assert set(case.of_whole) <= names


@every_case
def test_default_dtype(case):
    battery.check_default_dtype(case)


# --- every check fails on a loss that breaks its promise ---------------------------------------------------------------------------------------


def masked_mean(values, mask):
    return torch.where(mask, values.float() if values.dtype != torch.float64 else values, 0).sum() / mask.sum().clamp(min=1)


def case_of(function):
    def draw(g, batch, length):
        return {"values": g.normal(batch, length), "mask": g.mask(batch, length), "weights": g.normal(batch, length)}, ("values",)

    return battery.Case("broken", draw, mask="mask", function=lambda values, mask, weights: function(values, mask, weights))


def multiplies_by_mask(values, mask, weights):
    return (values * mask).sum() / mask.sum()


def detaches(values, mask, weights):
    return masked_mean(values * values.detach(), mask)


def stays_in_dtype(values, mask, weights):
    return (values * mask).sum() / mask.sum()


def rounds(values, mask, weights):
    return masked_mean(values.bfloat16().float() if values.dtype == torch.float32 else values, mask)


def reads_flat_storage(values, mask, weights):
    return masked_mean(values.as_strided(values.shape, (values.shape[1], 1)), mask)


def asks_host(values, mask, weights):
    return masked_mean(values, mask) if mask.any() else values.sum() * 0


def selects_by_mask(values, mask, weights):
    return values[mask].float().mean()


def builds_constants(values, mask, weights):
    return masked_mean(values + torch.tensor([1.0]), mask)


def copies_to_host(values, mask, weights):
    return masked_mean(values * weights.detach().to("cpu"), mask)


def lists(values, mask, weights):
    return masked_mean(values, mask) * len(weights.tolist())


def saves_result(values, mask, weights):
    return masked_mean(values, mask).exp()


def returns_input(values, mask, weights):
    return masked_mean(values, mask), weights.detach()


def forgets_detach(values, mask, weights):
    return masked_mean(values * weights, mask)


def writes_into_input(values, mask, weights):
    weights.detach().mul_(2)
    return masked_mean(values, mask)


def keeps_the_graph_of_a_metric(values, mask, weights):
    return masked_mean(values, mask), {"mean": masked_mean(values, mask)}


def adds_a_constant(values, mask, weights):
    return masked_mean(values, mask) + 1


def pulls_where_masked(values, mask, weights):
    return torch.where(mask, values.float(), 1e-3 * (values - values.detach()).float()).sum()


def bends_the_gradient(values, mask, weights):
    value = masked_mean(values, mask)
    return value + 0.02 * (value - value.detach()) if values.dtype == torch.bfloat16 else value


def squares_what_is_masked(values, mask, weights):
    return torch.where(mask, values.square(), 0).sum()


def shares_memory(values, mask, weights):
    value = masked_mean(values, mask)
    return value, value.detach()


def check_against_naive(case):
    battery.check_gradient(dataclasses.replace(case, naive=lambda values, mask, weights: masked_mean(values.square(), mask)))


def mean_of_sequences(values, mask, weights):
    """Called what it is not: a mean over tokens."""
    tokens = mask.sum().to(values.dtype)
    means = torch.where(mask, values, 0).sum(-1) / mask.sum(-1).clamp(min=1)
    return rlkern.LossOutput(masked_mean(values, mask), {"entropy": means.detach().sum() / max(len(means), 1), "tokens": tokens})


def metric_without_rule(values, mask, weights):
    return rlkern.LossOutput(masked_mean(values, mask), {"surprise": values.detach().sum()})


def metric_without_count(values, mask, weights):
    return rlkern.LossOutput(masked_mean(values, mask), {"entropy": masked_mean(values, mask).detach()})


def divides_integers(values, mask, weights):
    return rlkern.LossOutput(masked_mean(values, mask), {"clip_fraction_low": mask.sum() / mask.numel()})


def rounds_weights(values, mask, weights):
    return masked_mean(values * (mask.sum(-1, keepdim=True) / 7).to(values.dtype), mask)


@pytest.mark.parametrize(
    ("check", "broken", "error", "message"),
    [
        (battery.check_gradient, detaches, RuntimeError, "Jacobian mismatch"),
        (check_against_naive, detaches, AssertionError, "gradient against the naive loss"),
        (lambda case: battery.check_precision(case, torch.bfloat16), stays_in_dtype, AssertionError, "outputs must be float32"),
        (lambda case: battery.check_precision(case, torch.float32), rounds, AssertionError, "torch.float32 values, tensor 0"),
        (lambda case: battery.check_precision(case, torch.bfloat16), bends_the_gradient, AssertionError, "torch.bfloat16 gradients, tensor 0"),
        (battery.check_strides, reads_flat_storage, AssertionError, "strided values"),
        (battery.check_empty_mask, multiplies_by_mask, AssertionError, "not finite without tokens"),
        (battery.check_empty_mask, adds_a_constant, AssertionError, "loss without tokens is"),
        (battery.check_empty_mask, pulls_where_masked, AssertionError, "gradient without tokens"),
        (battery.check_empty_batch, multiplies_by_mask, AssertionError, "not finite for an empty batch"),
        (battery.check_empty_batch, adds_a_constant, AssertionError, "loss of an empty batch is"),
        (battery.check_masked_garbage, multiplies_by_mask, AssertionError, "values with nan where masked"),
        (battery.check_masked_garbage, squares_what_is_masked, AssertionError, "gradients with nan where masked"),
        (battery.check_no_host_sync, asks_host, battery.HostSync, "__bool__ waits for the device"),
        (battery.check_no_host_sync, selects_by_mask, battery.HostSync, "a bool index"),
        (battery.check_no_host_sync, builds_constants, battery.HostSync, "tensor waits for the device"),
        (battery.check_no_host_sync, copies_to_host, battery.HostSync, "names a device"),
        (battery.check_no_host_sync, lists, battery.HostSync, "tolist waits for the device"),
        (battery.check_results_are_writable, saves_result, RuntimeError, "modified by an inplace operation"),
        (battery.check_results_are_writable, shares_memory, AssertionError, "result 1 after writing into result 0"),
        (battery.check_results_are_writable, returns_input, AssertionError, "weights was changed"),
        (battery.check_results_are_writable, writes_into_input, AssertionError, "weights was changed"),
        (battery.check_only_wrt_has_gradient, forgets_detach, AssertionError, "weights must be detached"),
        (battery.check_only_wrt_has_gradient, keeps_the_graph_of_a_metric, AssertionError, "result 1 must be detached"),
        (battery.check_metrics_merge, mean_of_sequences, AssertionError, "entropy: "),
        (battery.check_metrics_merge, metric_without_rule, ValueError, "unknown metric 'surprise'"),
        (battery.check_metrics_merge, metric_without_count, ValueError, "metric 'entropy' is merged by 'tokens'"),
        (battery.check_default_dtype, divides_integers, AssertionError, "torch.bfloat16 for torch.float32 inputs"),
        (battery.check_default_dtype, rounds_weights, AssertionError, "other values under another default dtype"),
    ],
)
def test_check_catches(check, broken, error, message):
    with pytest.raises(error, match=message):
        check(case_of(broken))


def test_metrics_must_carry_no_gradient():
    case = dataclasses.replace(
        case_of(lambda values, mask, weights: masked_mean(values, mask)), draw=lambda *shape: (case_of(None).draw(*shape)[0], ())
    )
    with pytest.raises(AssertionError, match="result 0 must be detached"):
        battery.check_only_wrt_has_gradient(case)


def unrolls(values, mask, weights):
    return masked_mean(values * int(values.shape[0] > battery.BATCH), mask)


def computes_otherwise_when_compiled(values, mask, weights):
    return masked_mean(values, mask) * (2 if torch.compiler.is_compiling() else 1)


def test_compile_check_catches():
    with pytest.raises(torch._dynamo.exc.Unsupported, match="(?i)data-dependent|dynamic control flow"):
        battery.check_compiles(case_of(asks_host))
    with pytest.raises(AssertionError, match="compiled again"):
        battery.check_compiles(case_of(unrolls))
    with pytest.raises(AssertionError, match="compiled values"):
        battery.check_compiles(case_of(computes_otherwise_when_compiled))


def test_checks_pass_a_sound_loss():
    case = case_of(lambda values, mask, weights: masked_mean(values * torch.where(mask, weights.detach(), 0), mask))
    battery.check_gradient(case)
    battery.check_precision(case, torch.float32)
    for check in (battery.check_strides, battery.check_empty_mask, battery.check_empty_batch, battery.check_masked_garbage):
        check(case)
    for check in (battery.check_metrics_merge, battery.check_default_dtype):
        check(case)
    for check in (battery.check_no_host_sync, battery.check_compiles, battery.check_results_are_writable, battery.check_only_wrt_has_gradient):
        check(case)
