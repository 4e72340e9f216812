"""Every public function with every argument wrong: it works, or says what is wrong with which argument."""

from __future__ import annotations

import linecache
import math
import re
import traceback

import pytest
import torch
from calls import CALLS, Call, signature
from public import FUNCTIONS
from torch import Tensor

import rlkern
from rlkern import advantages

PLAIN = (None, "x", [], [1.5], ["x"], {}, (), True, 3, -1, 2.5, -0.5, 0, 10**400, 1e300, math.nan, math.inf, -math.inf, 1j, object(), abs)


def wrong_values(original):
    yield from PLAIN
    yield from (torch.ones(()), torch.ones(3), torch.ones(2, 2, 2), torch.empty(0), torch.ones(3, dtype=torch.complex64))
    if not isinstance(original, Tensor):
        return
    yield from (original.to(dtype) for dtype in (torch.bool, torch.int32, torch.int64, torch.float16, torch.float64, torch.complex64))
    yield from (original[:-1] if original.dim() else original, original.unsqueeze(0), original.unsqueeze(-1), original.flatten())
    yield from (original.new_zeros(()), original.to("meta"), original.new_empty((0, *original.shape[1:])), original.tolist())
    if original.is_floating_point():
        yield original.clone().requires_grad_()
    elif original.dtype != torch.bool:
        yield from (original + 10**6, original - 10**6)


# Of these a function is a right value, whose own errors come through.
FUNCTION = {(rlkern.linear_fused_loss, "loss")}

# What the adapters call otherwise, in the words of the function behind them.
BEHIND = {
    "labels": "targets",
    "index": "targets",
    "topk_ids": "targets",
    "shifted_logits": "logits",
    "kept_tokens": "(keep|ids)",
    "sampling_mask": "(keep|ids)",
}


def names(error: BaseException, name: str) -> bool:
    """Whether the message names the argument, and a raise statement of rlkern's stands behind it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    ours = "rlkern" in frame.filename and linecache.getline(frame.filename, frame.lineno).strip().startswith("raise")
    target = isinstance(error, IndexError) and re.match(r"target -?\d+ |keep holds ", str(error))  # ids, under whatever name; also from C++
    return bool(target) or (ours and re.search(rf"\b{name}\b", str(error)) is not None)


def describe(value) -> str:
    if not isinstance(value, Tensor):
        return repr(value)[:40]
    return f"{value.dtype} {tuple(value.shape)} on {value.device}, requires_grad={value.requires_grad}"


def complaints(call: Call) -> list[str]:
    found, adapter = [], call.function.__module__.startswith("rlkern.integrations")
    for name in call.parameters:
        for value in wrong_values(call.arguments.get(name)):
            if value is abs and (call.function, name) in FUNCTION:
                continue
            try:
                call(**{name: value})
            except Exception as error:
                expected = isinstance(error, (ValueError, TypeError, IndexError))
                if not (expected and (names(error, name) or (adapter and names(error, BEHIND.get(name, name))))):
                    found.append(f"{call}({name}={describe(value)}): {type(error).__name__}: {str(error)[:200]}")
    return found


def refuses_nan(call: Call) -> list[str]:
    """Names of numeric options that may be NaN."""
    accepted = []
    for name in call.parameters:
        given = call.arguments.get(name, signature(call.function)[name].default if name in signature(call.function) else None)
        if isinstance(given, (int, float)) and not isinstance(given, bool):
            try:
                call(**{name: math.nan})
            except (ValueError, TypeError):
                continue
            accepted.append(f"{call}({name}=nan)")
    return accepted


def different(calls: list[Call]) -> list[Call]:
    """One for every function and set of arguments."""
    return list({(call.function, frozenset(call.arguments)): call for call in reversed(calls)}.values())


@pytest.mark.parametrize("call", different(CALLS), ids=str)
def test_errors(call):
    call()
    found = complaints(call) + refuses_nan(call)
    assert not found, "\n".join(found)


def test_every_public_function_has_a_call():
    called = {call.function for call in CALLS}
    missing = {name for name, function in FUNCTIONS.items() if function not in called} - {"backend_info"}
    assert not missing and {"use_backend", "BGPOAccumulator"} <= {call.name for call in CALLS}


TOKENS, ROWS, ONES = torch.zeros(2, 3), torch.zeros(2, 3, 5), {"mc_weight": 1.0, "ratio_scale": 1.0}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: advantages.gpg(torch.ones(4), 2, f_norm="a"), TypeError, "f_norm must be a number, got str"),
        (lambda: advantages.overlong_penalty(torch.ones(4), "10", 4), TypeError, "max_length must be a number, got str"),
        (lambda: rlkern.losses.kd_coefficient(3, start="a"), TypeError, "start must be a number, got str"),
        (lambda: rlkern.losses.epo_beta(1, 10, gamma="1"), TypeError, "gamma must be a number, got str"),
        (lambda: rlkern.diffusion.quadrature_levels("3"), TypeError, "n must be an integer, got '3'"),
        (lambda: rlkern.metrics.covariance_quantiles(TOKENS, TOKENS, 0.5), TypeError, r"quantiles must be a tuple of numbers in \[0, 1\], got 0.5"),
        (lambda: rlkern.cispo_loss(TOKENS, None, torch.ones(2), TOKENS, cap=0), ValueError, "cap must be positive, got 0"),
        (
            lambda: rlkern.ppo_loss(TOKENS, None, torch.ones(2), TOKENS, dual_clip=1e300),
            ValueError,
            "dual_clip must be a number that float32 can hold",
        ),
        (lambda: rlkern.token_stats(ROWS, TOKENS.long(), with_sum_sq="no"), TypeError, "with_sum_sq must be True or False, got 'no'"),
        (
            lambda: rlkern.bgpo_loss(ROWS, TOKENS.long(), *torch.ones(2, 2), seq_weight=math.inf, **ONES),
            ValueError,
            r"seq_weight must be in \[0, inf\), got inf",
        ),
    ],
)
def test_messages(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()
