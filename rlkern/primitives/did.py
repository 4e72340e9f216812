"""The differential information distribution (DID) of a policy and its reference, by token."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..backends.contract import State
from ..backends.gradient_memory import new_gradient
from ..checks import check_logits, check_mask, check_temperature, computing_dtype, expect
from ..layout import as_rows
from ..operator import Operator, differentiable


def _new_entropy(logits, *_):
    """(entropy, what the backward needs)"""
    entropy = logits.new_empty(logits.shape[:-1], dtype=computing_dtype(logits))
    return entropy, entropy.new_empty((*entropy.shape, State.TARGETS))


def _for_backend(logits, reference, mask, row_temperature, temperature):
    if row_temperature is not None:
        temperature = row_temperature.to(computing_dtype(logits)).contiguous().view(-1)
    return as_rows(logits), as_rows(reference), None if mask is None else mask.contiguous().view(-1), temperature


def _entropy(logits, *args):
    out = _new_entropy(logits)
    if out[0].numel():
        backends.select(logits.device).did_entropy_forward(*_for_backend(logits, *args), out)
    return out


def _new_gradients(logits, reference, *others):
    *_, wanted = others
    return tuple(new_gradient(x) if want else None for x, want in zip((logits, reference), wanted, strict=True))


def _gradients(logits, reference, mask, row_temperature, temperature, state, grad, wanted):
    out = _new_gradients(logits, reference, wanted)
    if grad.numel():
        args = _for_backend(logits, reference, mask, row_temperature, temperature)
        rows_of_out = [None if x is None else as_rows(x) for x in out]
        backends.select(logits.device).did_entropy_backward(*args, state, grad.to(state.dtype).contiguous(), rows_of_out)
    return out


_ARGUMENTS = "Tensor logits, Tensor reference, Tensor? mask, Tensor? row_temperature, float temperature"
_did_entropy = differentiable(
    Operator(f"token_did_entropy({_ARGUMENTS}) -> (Tensor, Tensor)", _entropy, _new_entropy),
    Operator(
        f"token_did_entropy_backward({_ARGUMENTS}, Tensor state, Tensor grad, bool[] wanted) -> (Tensor, Tensor)",
        run=_gradients,
        fake=_new_gradients,
    ),
    wrt=2,
    instead="use rlkern.reference.token_did_entropy",
)


def token_did_entropy(logits: Tensor, reference_logits: Tensor, *, temperature: float | Tensor = 1.0, mask: Tensor | None = None) -> Tensor:
    """Entropy of the DID of the next token (arXiv 2505.23761), softmax((logits - reference_logits) / T).

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64, any leading strides.
        reference_logits: the same shape, any of these dtypes. The gradient flows into both.
        temperature: a positive float, or a tensor [...] with one a row, anything where mask is 0.
        mask: [...] bool or number. Where it is 0 the rows are not read: zeros out, zero gradients.

    Returns:
        [...] in float32 (float64 for float64 logits), freshly allocated. An entry at -inf in `logits` has
        mass 0 and no gradient, whatever the reference holds. One at -inf in the reference alone has infinite
        mass, and its row is NaN. The differences are formed as they are read: nothing of the logits' size is
        allocated, but a copy of the reference if one alone is float64.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices or options other than the above.
    """
    check_logits(logits)
    check_logits(reference_logits, "reference_logits")
    expect("reference_logits", reference_logits, "float", "[..., V]", like=("logits", logits))
    if torch.float64 in (logits.dtype, reference_logits.dtype):
        reference_logits = reference_logits.to(computing_dtype(logits))
    mask = check_mask(mask, logits)
    row_temperature, temperature = check_temperature(temperature, logits, mask=mask)
    return _did_entropy(logits, reference_logits, mask, row_temperature, temperature)
