"""Every check of loss_battery.py on every case of cases_*.py, every exported loss has a case, and every check can fail."""

import importlib
import inspect
import pathlib

import loss_battery as battery
import pytest
import torch

import rlkern
import rlkern.losses

for path in sorted(pathlib.Path(__file__).parent.glob("cases_*.py")):
    importlib.import_module(path.stem)

every_case = pytest.mark.parametrize("case", battery.CASES, ids=str)
emptiable = pytest.mark.parametrize("case", [c for c in battery.CASES if c.mask or c.empty], ids=str)
maskable = pytest.mark.parametrize("case", [c for c in battery.CASES if c.mask or c.counted], ids=str)


def test_every_exported_loss_has_a_case():
    losses = {name for name in rlkern.losses.__all__ if "_loss" in name and inspect.isfunction(getattr(rlkern.losses, name))}
    assert "dpo_loss" in losses
    assert losses <= {case.name for case in battery.CASES}


@every_case
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


def takes_bare_mean(values, mask, weights):
    return values.mean()


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
    return masked_mean(values * (mask.sum(-1, keepdim=True) / 7), mask)


@pytest.mark.parametrize(
    ("check", "broken"),
    [
        (battery.check_gradient, detaches),
        (lambda case: battery.check_precision(case, torch.bfloat16), stays_in_dtype),
        (lambda case: battery.check_precision(case, torch.float32), rounds),
        (battery.check_strides, reads_flat_storage),
        (battery.check_empty_mask, multiplies_by_mask),
        (battery.check_empty_batch, multiplies_by_mask),
        (battery.check_empty_mask, takes_bare_mean),
        (battery.check_masked_garbage, multiplies_by_mask),
        (battery.check_no_host_sync, asks_host),
        (battery.check_no_host_sync, selects_by_mask),
        (battery.check_no_host_sync, builds_constants),
        (battery.check_no_host_sync, copies_to_host),
        (battery.check_no_host_sync, lists),
        (battery.check_results_are_writable, saves_result),
        (battery.check_results_are_writable, returns_input),
        (battery.check_only_wrt_has_gradient, forgets_detach),
        (battery.check_metrics_merge, mean_of_sequences),
        (battery.check_metrics_merge, metric_without_rule),
        (battery.check_metrics_merge, metric_without_count),
        (battery.check_default_dtype, divides_integers),
        (battery.check_default_dtype, rounds_weights),
    ],
)
def test_check_catches(check, broken):
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        check(case_of(broken))


def unrolls(values, mask, weights):
    return masked_mean(values * int(values.shape[0] > battery.BATCH), mask)


def test_compile_check_catches():
    with pytest.raises(torch._dynamo.exc.Unsupported):
        battery.check_compiles(case_of(asks_host))
    with pytest.raises(AssertionError, match="compiled again"):
        battery.check_compiles(case_of(unrolls))


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
