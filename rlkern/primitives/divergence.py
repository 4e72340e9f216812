"""Divergence of two rows of logits, by token, with closed-form gradient. Plain PyTorch, any device.

Rows are processed in chunks, so log-probabilities and float32 copies of all logits never exist at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..backends.gradient_memory import new_gradient
from ..checks import check_choice, check_flags, check_logits, check_mask, check_number, check_temperature, computing_dtype, expect
from ..layout import as_rows, row_chunks
from ..operator import Operator, differentiable

KINDS = ("reverse_kl", "forward_kl", "jsd")


def _terms(l: Tensor, m: Tensor, against: Tensor) -> Tensor:  # noqa: E741
    """exp(l) (m - against), to be summed: 0 where l has no support, +inf where only `against` has none."""
    x = (m - against).masked_fill_(l == -math.inf, 0)
    # An exp(l) that underflows is still support, where 0 * inf would be NaN.
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


class _Pairs:
    """The rows of both tensors as log-probabilities, a chunk at a time."""

    def __init__(self, logits, other, row_temperature, temperature):
        self.logits, self.other, self.temperature = as_rows(logits), as_rows(other), temperature
        self.acc = computing_dtype(logits)
        self.row_temperature = None if row_temperature is None else row_temperature.to(self.acc).reshape(-1)

    def scale(self, flat: slice) -> float | Tensor:
        """The temperature of these rows, a number or [R, 1]."""
        return self.temperature if self.row_temperature is None else self.row_temperature[flat].unsqueeze(-1)

    def __iter__(self) -> Iterator[tuple[int, slice, slice, Tensor, Tensor]]:
        """Yields (a, b, flat, l, m): log-probabilities of `logits[a, b]` (rows `flat`) and of `other`."""
        for a, b, flat in row_chunks(self.logits):
            l, m = ((x[a, b].to(self.acc) / self.scale(flat)).log_softmax(-1) for x in (self.logits, self.other))  # noqa: E741
            yield a, b, flat, l, m


def _new_divergence(logits, *args):
    return logits.new_empty(logits.shape[:-1], dtype=computing_dtype(logits))


def _divergence(logits, other, mask, row_temperature, temperature, kind, beta):
    out = _new_divergence(logits)
    values = out.view(-1)
    for _, _, flat, l, m in _Pairs(logits, other, row_temperature, temperature):  # noqa: E741
        values[flat] = _row_divergence(l, m, kind, beta).squeeze(-1)
    return out if mask is None else out.masked_fill_(~mask, 0)


def _gradient(logits, other, mask, row_temperature, temperature, kind, beta, gradient):
    out = new_gradient(logits)
    gradient = gradient.to(computing_dtype(logits))
    gradient = (gradient if mask is None else gradient.masked_fill(~mask, 0)).reshape(-1)
    rows_of_out, pairs = as_rows(out), _Pairs(logits, other, row_temperature, temperature)
    for a, b, flat, l, m in pairs:  # noqa: E741
        g = gradient[flat].unsqueeze(-1)
        # A row without upstream gradient gets zeros, whatever it holds: NaN or infinite divergences too.
        dx = (_row_gradient(l, m, kind, beta) * (g / pairs.scale(flat))).masked_fill_(g == 0, 0)
        rows_of_out[a, b] = dx.to(out.dtype)
    return out


_ARGUMENTS = "Tensor logits, Tensor other, Tensor? mask, Tensor? row_temperature, float temperature, str kind, float beta"
_token_divergence = differentiable(
    Operator(f"token_divergence({_ARGUMENTS}) -> Tensor", _divergence, _new_divergence),
    Operator(
        f"token_divergence_backward({_ARGUMENTS}, Tensor gradient) -> Tensor",
        run=_gradient,
        fake=lambda logits, *_: new_gradient(logits),
    ),
    instead="use rlkern.reference.token_divergence",
)


def token_divergence(
    logits: Tensor,
    other: Tensor,
    *,
    kind: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Full-vocabulary divergence by row: p = softmax(logits / temperature), q = softmax(other / temperature).

        kind          value                                      gradient by logits
        "reverse_kl"  KL(p || q) = sum p log(p / q)              p (log(p / q) - KL) / T
        "forward_kl"  KL(q || p) = sum q log(q / p)              (p - q) / T
        "jsd"         beta KL(q || M) + (1 - beta) KL(p || M),   (1 - beta) p (log(p / M) - KL(p || M)) / T
                      M = beta q + (1 - beta) p  (GKD, arXiv 2306.13649)

    Args:
        logits: [..., V] of the policy or student, float32, bfloat16, float16 or float64, any leading strides;
            the gradient flows here.
        other: [..., V] of the teacher or reference, any of these dtypes; used detached.
        kind, beta: see above. 0 < beta < 1, for "jsd" alone. The two KL divergences are its limits, rescaled.
        temperature: a positive float, or a tensor [...], anything where mask is 0. It divides both.
        mask: [...] bool or number. Where it is 0 the result is 0 without gradient, whatever the rows hold.

    Returns:
        [...] in float32 (float64 for float64 logits), freshly allocated. Entries at -inf on both sides
        contribute 0. An entry at -inf receives no gradient. The divergence is +inf where its first argument
        has mass that the second lacks: forward q > 0 = p; reverse p > 0 = q, with a gradient that is not
        finite. The jsd is at most log 2 for beta = 0.5.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices or options other than the above.
    """
    check_logits(logits)
    check_logits(other, "other")
    expect("other", other, "float", "[..., V]", like=("logits", logits))
    check_choice("kind", kind, KINDS)
    check_number("beta", beta)
    if not 0 < beta < 1:
        raise ValueError(f"beta is the weight of `other` in the mixture, 0 < beta < 1, got {beta}")
    mask = check_mask(mask, logits)
    row_temperature, temperature = check_temperature(temperature, logits, mask=mask)
    return _token_divergence(logits, other.detach(), mask, row_temperature, temperature, kind, float(beta))


def topk_reverse_kl(logp: Tensor, teacher_logp: Tensor, *, renormalize: bool = False) -> Tensor:
    """Reverse KL over K ids a token: sum_k p_k (log p_k - log q_k), [..., K] twice -> [...], with gradient.

    `logp` is `token_logprobs(logits, ids)` with ids [..., K] of the student's or the teacher's top K.
    `teacher_logp` is the teacher's at the same ids, detached. renormalize makes both distributions over the K
    ids. Without it the sum lacks the tail, and may be negative. Ids at -inf in `logp` contribute 0. The
    result is float32 (float64 for float64 logp), for `kdrl_loss(kd="exact", teacher_kl=...)`. Raises
    TypeError, ValueError for other dtypes and shapes.
    """
    expect("logp", logp, "float", "[..., K]")
    expect("teacher_logp", teacher_logp, "float", "[..., K]", like=("logp", logp))
    check_flags(renormalize=renormalize)
    logp, teacher_logp = logp.to(computing_dtype(logp)), teacher_logp.detach().to(computing_dtype(logp))
    if renormalize:
        logp, teacher_logp = logp.log_softmax(-1), teacher_logp.log_softmax(-1)
    none = logp == -math.inf
    return torch.where(none, 0, logp.exp() * torch.where(none, 0, logp - teacher_logp)).sum(-1)
