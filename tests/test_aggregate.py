"""Aggregation modes against loops written from verl's and TRL's definitions."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlkern import aggregate
from rlkern.losses.aggregate import MODES, SEQUENCE_MODES, TOKEN_MODES


def draw():
    g = torch.Generator().manual_seed(0)
    values = torch.randn(5, 6, generator=g, dtype=torch.float64)
    mask = torch.rand(5, 6, generator=g) < 0.6
    mask[2] = False  # a sequence without tokens
    return values.requires_grad_(), mask


def naive(values, mask, mode, normalizer=None):
    """Sequence by sequence, token by token."""
    batch, length = mask.shape
    rows = [[values[i, t] for t in range(length) if mask[i, t]] for i in range(batch)]
    tokens, filled = sum(map(len, rows)), sum(1 for row in rows if row)
    total = sum(sum(row) for row in rows)
    means = sum(sum(row) / len(row) for row in rows if row)
    return {
        **dict.fromkeys(("token-mean", "bnpo", "dapo"), total / (normalizer or tokens)),
        "seq-mean-token-mean": means / (normalizer or filled),
        "seq-mean-token-sum": total / (normalizer or filled),
        "seq-mean-token-sum-norm": total / (normalizer or length),
        "grpo": means / (normalizer or batch),
        "dr_grpo": total / (batch * (normalizer or length)),
    }[mode]


def grad_of(loss, values):
    return torch.autograd.grad(loss, values)[0]


every_mode = pytest.mark.parametrize("mode", MODES)


@pytest.mark.parametrize("normalizer", [None, 7, 12.5, torch.tensor(12.5)], ids=str)
@every_mode
def test_matches_the_definition(mode, normalizer):
    values, mask = draw()
    number = normalizer.item() if isinstance(normalizer, torch.Tensor) else normalizer
    loss, expected = aggregate(values, mask, mode, normalizer), naive(values, mask, mode, number)
    assert loss.shape == () and loss.dtype == torch.float64
    assert_close(loss, expected)
    assert_close(grad_of(loss, values), grad_of(expected, values))


def test_the_definitions_differ():
    values, mask = draw()
    results = {mode: aggregate(values, mask, mode).item() for mode in MODES}
    assert len({round(x, 9) for x in results.values()}) == len(MODES) - 2  # token-mean = bnpo = dapo on one batch


def test_default_is_the_mean_over_tokens():
    values, mask = draw()
    assert_close(aggregate(values, mask), values[mask].mean())


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32, torch.bfloat16], ids=str)
def test_masks_of_any_dtype_select(dtype):
    values, mask = draw()
    for mode in MODES:
        assert_close(aggregate(values, mask.to(dtype), mode), aggregate(values, mask, mode))
    assert_close(aggregate(values, 0.5 * mask.float()), aggregate(values, mask))  # selects, does not weigh


@pytest.mark.parametrize("shape", [(30,), (5, 2, 3)])
@pytest.mark.parametrize("mode", TOKEN_MODES)
def test_token_modes_take_any_shape(mode, shape):
    values, mask = draw()
    assert_close(aggregate(values.reshape(shape), mask.reshape(shape), mode), aggregate(values, mask, mode))


@pytest.mark.parametrize("normalizer", [None, 3.0, 0, torch.tensor(0.0)], ids=str)
@every_mode
@pytest.mark.parametrize("shape", [(5, 6), (0, 6), (5, 0), (0, 0)])
def test_nothing_to_count_is_a_connected_zero(shape, mode, normalizer):
    values = torch.full(shape, math.nan, requires_grad=True)
    loss = aggregate(values, torch.zeros(shape, dtype=torch.bool), mode, normalizer)
    assert loss.item() == 0
    assert (grad_of(loss, values) == 0).all()


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@every_mode
def test_masked_positions_may_hold_anything(mode, garbage):
    values, mask = draw()
    poisoned = values.detach().masked_fill(~mask, garbage).requires_grad_()
    loss, expected = aggregate(poisoned, mask, mode), aggregate(values, mask, mode)
    assert torch.equal(loss, expected)
    assert torch.equal(grad_of(loss, poisoned), grad_of(expected, values))


def test_unmasked_nan_is_not_hidden():
    values, mask = draw()
    assert aggregate(torch.where(mask, math.nan, values), mask).isnan()


def test_half_precision_accumulates_in_float32():
    values = torch.full((64, 512), 1 / 3).bfloat16().requires_grad_()
    mask = torch.ones(64, 512)
    for mode in MODES:
        loss = aggregate(values, mask, mode)
        assert loss.dtype == torch.float32
        assert_close(loss.double(), aggregate(values.detach().double(), mask, mode), rtol=1e-6, atol=0)
        assert grad_of(loss, values).dtype == torch.bfloat16


def test_micro_batches_add_up_with_a_global_count():
    """What `normalizer` is for: gradient accumulation gives the gradient of the whole batch."""
    values, mask = draw()
    counts = {"token-mean": mask.sum(), "dapo": mask.sum(), "seq-mean-token-mean": 4, "seq-mean-token-sum": 4, "grpo": 5}
    for mode, count in counts.items():
        parts = sum(aggregate(values[rows], mask[rows], mode, count) for rows in (slice(0, 2), slice(2, 3), slice(3, 5)))
        assert_close(parts, aggregate(values, mask, mode), msg=mode)


def test_weights_of_a_row_do_not_depend_on_padding():
    values, mask = draw()
    wide, wide_mask = torch.nn.functional.pad(values, (0, 4), value=math.nan), torch.nn.functional.pad(mask, (0, 4))
    for mode in MODES:
        by_width = mode in ("seq-mean-token-sum-norm", "dr_grpo")
        assert_close(aggregate(wide, wide_mask, mode) * (10 / 6 if by_width else 1), aggregate(values, mask, mode))
        assert not by_width or torch.equal(aggregate(wide, wide_mask, mode, 6), aggregate(values, mask, mode))


v, m = torch.zeros(2, 3), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("error", "message", "args"),
    [
        (ValueError, "unknown aggregation mode 'mean'.*'token-mean'.*'dr_grpo'", (v, m, "mean")),
        (ValueError, r"mask must have the shape of values \(2, 3\), got \(3,\)", (v, m[0])),
        (ValueError, "mask must be on the device", (v, m.to("meta"))),
        (TypeError, "values must be a float tensor, got torch.int64", (v.long(), m)),
        (TypeError, "values must be a float tensor, got list", ([1.0], m)),
        (TypeError, "mask must be a bool or number tensor, got None", (v, None)),
        (TypeError, "normalizer must be a number", (v, m, "token-mean", "4")),
        (TypeError, "normalizer must be a number", (v, m, "token-mean", True)),
        (ValueError, "normalizer must not be negative", (v, m, "token-mean", -4)),
        (ValueError, "normalizer must not be negative", (v, m, "token-mean", math.nan)),
        (ValueError, "normalizer must be one number", (v, m, "token-mean", torch.ones(2))),
        (ValueError, "normalizer must be one number", (v, m, "token-mean", torch.ones((), requires_grad=True))),
    ],
)
def test_errors(error, message, args):
    with pytest.raises(error, match=message):
        aggregate(*args)


@pytest.mark.parametrize("mode", SEQUENCE_MODES)
def test_sequence_modes_need_sequences(mode):
    with pytest.raises(ValueError, match=r"\[B, T\], got shape \(3,\)"):
        aggregate(v[0], m[0], mode)
