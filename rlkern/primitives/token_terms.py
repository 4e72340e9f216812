"""What tokens add to a loss, with gradient.

Plain PyTorch gives values [B, T] that autograd differentiates. A kernel computes in one pass the values and
their derivatives by logp, the slopes: [2, B, T]. Losses only choose among terms, scale them and add them.
That is linear in both rows, so one expression serves both forms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..operator import once

_INSTEAD = 'compute the loss under rlkern.use_backend("reference"), or differentiate it with torch.func'


class TokenTerms:
    """One number a token, [B, T], float32 (or float64, as logp), 0 where masked, with gradient by logp."""

    __slots__ = ("_logp", "_rows")

    def __init__(self, logp: Tensor, rows: Tensor):
        """rows: [B, T] with gradient, or [2, B, T], values and slopes."""
        self._logp, self._rows = logp, rows

    @property
    def one_pass(self) -> bool:
        """Whether a kernel made these terms."""
        return self._rows.dim() > self._logp.dim()

    @property
    def values(self) -> Tensor:
        """[B, T] without gradient."""
        return self._rows[0] if self.one_pass else self._rows.detach()

    def tensor(self) -> Tensor:
        """[B, T] with gradient, for functions that are not linear."""
        return _Attached.apply(self._logp, self._rows, False) if self.one_pass else self._rows

    def sum_over(self, divisor: float | Tensor | None) -> Tensor:
        """The sum of terms / divisor, with gradient; None divides by nothing."""
        rows = self._rows if divisor is None else self._rows / divisor
        return _Attached.apply(self._logp, rows, True) if self.one_pass else rows.sum()

    # Methods, not operators: Dynamo does not trace operators between an object and a tensor.

    def plus(self, other: TokenTerms) -> TokenTerms:
        return TokenTerms(self._logp, self._rows + other._rows)

    def scaled(self, factor: float | Tensor) -> TokenTerms:
        """Times a number or [B, T] without gradient."""
        return TokenTerms(self._logp, self._rows * factor)

    def times(self, other: TokenTerms) -> TokenTerms:
        """The product, with the gradient of both."""
        if not self.one_pass:
            return TokenTerms(self._logp, self._rows * other._rows)
        (value, slope), (factor, factor_slope) = self._rows.unbind(), other._rows.unbind()
        return TokenTerms(self._logp, torch.stack([value * factor, slope * factor + value * factor_slope]))

    def dropped(self, where: Tensor) -> TokenTerms:
        """0 where `where` is set."""
        return TokenTerms(self._logp, self._rows.masked_fill(where, 0))

    def held(self, where: Tensor) -> TokenTerms:
        """The same values, without gradient where `where` is set."""
        if not self.one_pass:
            return TokenTerms(self._logp, torch.where(where, self._rows.detach(), self._rows))
        return TokenTerms(self._logp, torch.stack([self._rows[0], torch.where(where, 0, self._rows[1])]))


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logp, terms, total):
        values, slopes = terms.unbind()
        ctx.save_for_backward(slopes)
        ctx.logp = logp  # not saved, so it may be written to afterwards
        return values.sum() if total else values.clone()

    @staticmethod
    def backward(ctx, g):
        (slopes,) = ctx.saved_tensors
        with torch.no_grad():
            gradient = g * slopes  # autograd gives it the dtype of logp
        return (once(gradient, ctx.logp, _INSTEAD) if torch.is_grad_enabled() else gradient), None, None
