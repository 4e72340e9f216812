"""Divergence between two rows of logits, token by token, with its gradient in closed form. Plain PyTorch, on any device.

Rows are processed a chunk at a time: neither log-probabilities nor float32 copies of all the logits ever exist.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import check_choice, check_number
from .rows import OnlyOnce, accumulation_dtype, as_rows, check_device, check_logits, check_mask, check_temperature, rows_per_chunk

KINDS = ("reverse_kl", "forward_kl", "jsd")

_lib = torch.library.Library("rlkern", "FRAGMENT")
_ARGS = "Tensor logits, Tensor other, Tensor? mask, Tensor? row_temperature, float temperature, str kind, float beta"
_lib.define(f"token_divergence({_ARGS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_lib.define(f"token_divergence_backward({_ARGS}, Tensor gradient) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _terms(l: Tensor, m: Tensor, against: Tensor) -> Tensor:  # noqa: E741
    """exp(l) (m - against), summed over by the caller: 0 where exp(l) has no support, +inf where `against` lacks support that l has."""
    x = (m - against).masked_fill_(l == -math.inf, 0)
    # An underflown exp(l) is still support: 0 * inf would be NaN.
    return torch.where(x == math.inf, x, x * l.exp())


def _row_divergence(l: Tensor, m: Tensor, kind: str, beta: float) -> Tensor:  # noqa: E741
    """[R, 1] from log-probabilities l (of `logits`) and m (of `other`), both [R, V]."""
    if kind == "reverse_kl":
        return _terms(l, l, m).sum(-1, keepdim=True)
    if kind == "forward_kl":
        return _terms(m, m, l).sum(-1, keepdim=True)
    log_mix = torch.logaddexp(l + math.log1p(-beta), m + math.log(beta))
    return (beta * _terms(m, m, log_mix) + (1 - beta) * _terms(l, l, log_mix)).sum(-1, keepdim=True)


def _row_gradient(l: Tensor, m: Tensor, kind: str, beta: float) -> Tensor:  # noqa: E741
    """[R, V], the derivative of `_row_divergence` by logits / temperature."""
    p = l.exp()
    if kind == "forward_kl":
        dz = p - m.exp()
    else:
        log_mix = m if kind == "reverse_kl" else torch.logaddexp(l + math.log1p(-beta), m + math.log(beta))
        mean = _terms(l, l, log_mix).sum(-1, keepdim=True)
        dz = p * (l - log_mix - mean)
        dz = dz if kind == "reverse_kl" else (1 - beta) * dz
    return dz.masked_fill_(l == -math.inf, 0)


def _log_probs(rows: Tensor, row_temperature: Tensor | None, temperature: float, acc: torch.dtype) -> Tensor:
    rows = rows.to(acc)
    return (rows / (temperature if row_temperature is None else row_temperature)).log_softmax(-1)


def _chunks(logits, other, row_temperature, temperature):
    """Yields (a, rows, flat, l, m): log-probabilities of `logits[a, rows]`, whose row numbers are `flat`, and those of `other`."""
    acc = accumulation_dtype(logits)
    outer, inner, vocab = logits.shape
    step = rows_per_chunk(logits)
    for a in range(outer):
        for start in range(0, inner, step):
            rows = slice(start, min(inner, start + step))
            flat = slice(a * inner + start, a * inner + rows.stop)
            t = None if row_temperature is None else row_temperature[flat].unsqueeze(-1)
            yield a, rows, flat, *(_log_probs(x[a, rows], t, temperature, acc) for x in (logits, other))


def _flat_temperature(logits, row_temperature):
    return None if row_temperature is None else row_temperature.to(accumulation_dtype(logits)).reshape(-1)


def _token_divergence(logits, other, mask, row_temperature, temperature, kind, beta):
    out = logits.new_empty(logits.shape[:-1], dtype=accumulation_dtype(logits))
    values = out.view(-1)
    row_temperature = _flat_temperature(logits, row_temperature)
    for _, _, flat, l, m in _chunks(as_rows(logits), as_rows(other), row_temperature, temperature):  # noqa: E741
        values[flat] = _row_divergence(l, m, kind, beta).squeeze(-1)
    return out if mask is None else out.masked_fill_(~mask, 0)


def _token_divergence_backward(logits, other, mask, row_temperature, temperature, kind, beta, gradient):
    out = logits.new_empty(logits.shape)
    gradient = gradient.to(accumulation_dtype(logits))
    gradient = (gradient if mask is None else gradient.masked_fill(~mask, 0)).reshape(-1)
    row_temperature = _flat_temperature(logits, row_temperature)
    rows_of_out = as_rows(out)
    for a, rows, flat, l, m in _chunks(as_rows(logits), as_rows(other), row_temperature, temperature):  # noqa: E741
        g = gradient[flat].unsqueeze(-1)
        scale = g / (temperature if row_temperature is None else row_temperature[flat].unsqueeze(-1))
        # A row that nothing flows back into is zero whatever it holds, NaN and infinite divergences included.
        rows_of_out[a, rows] = (_row_gradient(l, m, kind, beta) * scale).masked_fill_(g == 0, 0).to(out.dtype)
    return out


_lib.impl("token_divergence", _token_divergence, "CompositeExplicitAutograd")
_lib.impl("token_divergence_backward", _token_divergence_backward, "CompositeExplicitAutograd")
torch.library.register_fake(
    "rlkern::token_divergence", lambda logits, *args: logits.new_empty(logits.shape[:-1], dtype=accumulation_dtype(logits)), lib=_lib
)
torch.library.register_fake("rlkern::token_divergence_backward", lambda logits, *args: logits.new_empty(logits.shape), lib=_lib)


def _refuse(ctx, *grads):
    raise RuntimeError("rlkern's operators are differentiated through rlkern.token_divergence, once, by torch.autograd; not by torch.func")


for _name in ("token_divergence", "token_divergence_backward"):
    torch.library.register_autograd(f"rlkern::{_name}", _refuse, setup_context=lambda ctx, inputs, output: None, lib=_lib)


class _TokenDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, other, mask, row_temperature, temperature, kind, beta):
        ctx.save_for_backward(logits, other, mask, row_temperature)
        ctx.constants = (temperature, kind, beta)
        return torch.ops.rlkern.token_divergence.default(logits, other, mask, row_temperature, temperature, kind, beta)

    @staticmethod
    def backward(ctx, gradient):
        backward = torch.ops.rlkern.token_divergence_backward.default
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return (backward(*ctx.saved_tensors, *ctx.constants, gradient), *(None,) * 6)
        with torch.no_grad():  # create_graph=True
            d_logits = backward(*ctx.saved_tensors, *ctx.constants, gradient)
        return (OnlyOnce.apply(d_logits, ctx.saved_tensors[0], "use rlkern.reference.token_divergence"), *(None,) * 6)


def token_divergence(
    logits: Tensor,
    other: Tensor,
    *,
    kind: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Full-vocabulary divergence between p = softmax(logits / temperature) and q = softmax(other / temperature), row by row.

        kind            value                                                       gradient by logits
        "reverse_kl"    KL(p || q) = sum p log(p / q)                               p (log(p / q) - KL) / T
        "forward_kl"    KL(q || p) = sum q log(q / p)                               (p - q) / T
        "jsd"           beta KL(q || M) + (1 - beta) KL(p || M),                    (1 - beta) p (log(p / M) - KL(p || M)) / T
                        M = beta q + (1 - beta) p  (GKD, arXiv 2306.13649)

    Args:
        logits: [..., V] of the policy or student, float32, bfloat16, float16 or float64, any leading strides; the gradient flows here.
        other: [..., V] of the teacher or reference, any of these dtypes; used detached.
        kind, beta: see above; 0 < beta < 1 and for "jsd" alone (the two KL divergences are its limits, rescaled).
        temperature: a positive float, or a tensor [...] with one entry a row, anything where mask is 0; it divides both.
        mask: [...] bool or number; where it is 0 the result is 0 and no gradient flows, whatever the rows hold.

    Returns:
        [...] in float32 (float64 for float64 logits), freshly allocated. Entries at -inf on both sides contribute 0 and an entry at -inf
        receives no gradient. The divergence is +inf where its first argument has mass that the second lacks (forward: q > 0 = p; reverse:
        p > 0 = q, whose gradient is not finite then); the jsd is at most log 2 for beta = 0.5.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices or options other than the above.
    """
    check_logits(logits)
    check_logits(other, "other")
    if other.shape != logits.shape:
        raise ValueError(f"other must have the shape of logits {tuple(logits.shape)}, got {tuple(other.shape)}")
    check_device("other", other, logits)
    check_choice("kind", kind, KINDS)
    check_number("beta", beta)
    if not 0 < beta < 1:
        raise ValueError(f"beta is the weight of `other` in the mixture, 0 < beta < 1, got {beta}")
    mask = check_mask(mask, logits)
    row_temperature, temperature = check_temperature(temperature, logits, mask=mask)
    return _TokenDivergence.apply(logits, other.detach(), mask, row_temperature, temperature, kind, float(beta))
