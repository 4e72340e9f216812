"""One-sample estimates of KL(pi || pi_ref) from tokens that pi drew, as penalties that policy losses add.

    kind             value               gradient         expected gradient              times the ratio
    "k1"             d                   1                0: noise only                  KL(pi || pi_ref)
    "abs"            |d|                 sign(d), 0 at 0  of sum |pi - pi_ref|           the same
    "k2", "mse"      d^2 / 2             d                of KL(pi || pi_ref)            the same
    "k3"             exp(-d) - 1 + d     1 - exp(-d)      of KL(pi_ref || pi)            KL(pi || pi_ref)
    "k1+" ... "k3+"  as without the +    d, that of k2    of KL(pi || pi_ref)            the same

d = logp - reference_logp; gradients are by logp. abs pulls along twice the total variation, k3 along the KL
of the other direction. The expected gradient needs samples of pi: on those of pi_old, k1's is that of
-KL(pi_old || pi), for example. The last column is `kl_times_ratio` of `grpo_loss`, and holds on samples of
any pi_old. k1 and k3 have the mean KL(pi || pi_ref), so their product with the ratio is differentiated as a
whole. Of the others only the gradient is that of a divergence, so the ratio multiplies it as a constant.

A clamp of the estimate biases the gradient of all kinds without a +. A bound on the ratio biases all: tokens
beyond lose their part.

Names elsewhere: "kl" is k1, "low_var_kl" is k3. Estimates: Schulman, http://joschu.net/blog/kl-approx.html.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import backends
from ..backends.contract import LARGEST_EXPONENT, KLKind
from ..checks import check_choice, check_number, computing_dtype, expect, numbers
from ..operator import Operator
from .kinks import bounded
from .token_terms import TokenTerms


def _k3(d: Tensor) -> Tensor:
    x = bounded(-d, high=LARGEST_EXPONENT)  # no gradient beyond, and no inf - inf
    return torch.expm1(x) - x


ESTIMATES: dict[str, Callable[[Tensor], Tensor]] = {"k1": lambda d: d, "abs": torch.abs, "k2": lambda d: 0.5 * d.square(), "k3": _k3}
_ALIASES = {"mse": "k2", "kl": "k1", "low_var_kl": "k3"}
KINDS = (*ESTIMATES, *_ALIASES, *(f"{name}+" for name in (*ESTIMATES, *_ALIASES)))


def resolve(kind: str) -> tuple[str, bool]:
    """The estimate that a kind names, and whether its gradient is that of k2."""
    name = kind.removesuffix("+")
    return _ALIASES.get(name, name), kind.endswith("+")


def is_unbiased(kind: str) -> bool:
    """Whether the mean over samples of pi is KL(pi || pi_ref) and the gradient is the value's."""
    return resolve(kind) in (("k1", False), ("k3", False))


def check_kl(kind: str, clamp: float | None, names: tuple[str, str] = ("kl_kind", "kl_clamp")) -> None:
    """Raises TypeError or ValueError unless kind is in the table and clamp >= 0. Errors use `names`."""
    check_choice(names[0], kind, KINDS)
    if clamp is not None:
        check_number(names[1], clamp, 0)


def kl_estimate(logp: Tensor, reference_logp: Tensor, kind: str = "k3", *, clamp: float | None = None) -> Tensor:
    """An estimate of the table of `rlkern.primitives.kl` for every token.

    Args:
        logp: float, any shape; gradients flow into it.
        reference_logp: shaped like logp, used detached.
        kind: a name of the table. A trailing + keeps the value, with k2's gradient (straight-through).
        clamp: bounds the value to [-clamp, clamp], without gradient beyond, except with a +. verl and ROLL
            clamp k3 at 10, where tokens with reference_logp - logp > 2.61 lose their gradient. None leaves
            the value alone (TRL); k3's exponent stops at 80 all the same.

    Returns:
        The estimates, shaped like logp, float32 (float64 for float64 logp).

    Raises:
        TypeError, ValueError: for names, numbers and shapes other than these.
    """
    check_kl(kind, clamp, ("kind", "clamp"))
    expect("logp", logp, "float", "[...]")
    expect("reference_logp", reference_logp, "float", "[...]", like=("logp", logp))
    dtype = computing_dtype(logp)  # in bfloat16 expm1(-d) + d would cancel to 0 for |d| < 0.1
    return _estimate(logp.to(dtype) - reference_logp.detach().to(dtype), *resolve(kind), clamp)


def _estimate(d: Tensor, name: str, straight_through: bool, clamp: float | None) -> Tensor:
    value = ESTIMATES[name](d)
    if clamp is not None:
        value = bounded(value, -clamp, clamp)
    if straight_through:
        k2 = 0.5 * d.square()
        value = value.detach() + (k2 - k2.detach())
    return value


# --- as terms of a loss -------------------------------------------------------------------------------------

_CODES = {"k1": KLKind.K1, "abs": KLKind.ABS, "k2": KLKind.K2, "k3": KLKind.K3}
_NAMES = {code: name for name, code in _CODES.items()}


def _new_terms(logp, *args):
    return logp.new_empty((2, *logp.shape), dtype=computing_dtype(logp))


def _kl_terms(logp, reference, where, kind, straight_through, clamp):
    out = _new_terms(logp)
    dense = (x.contiguous() for x in (numbers(logp, out.dtype), numbers(reference, out.dtype), where))
    clamp = math.inf if clamp is None else clamp
    backends.select(logp.device).kl_terms(*dense, kind, straight_through, clamp, out)
    return out


def _plain_kl_terms(logp, reference, where, kind, straight_through, clamp):
    dtype = computing_dtype(logp)
    own, other = (torch.where(where, x.to(dtype), 0) for x in (logp, reference.detach()))
    return _estimate(own - other, _NAMES[kind], straight_through, clamp)


_terms = Operator(
    "kl_terms(Tensor logp, Tensor reference, Tensor where, int kind, bool straight_through, float? clamp) -> Tensor",
    run=_kl_terms,
    fake=_new_terms,
    plain=_plain_kl_terms,
)


def kl_penalty(logp: Tensor, reference_logp: Tensor, where: Tensor, kind: str, clamp: float | None) -> TokenTerms:
    """`kl_estimate` of the tokens of `where`, a part of the mask; 0 elsewhere."""
    name, straight_through = resolve(kind)
    return TokenTerms(logp, _terms(logp, reference_logp, where, _CODES[name], straight_through, clamp))
