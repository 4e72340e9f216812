"""The sets that a sampler's top-k, top-p and min-p keep, each as one number a row: its smallest logit."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import backends
from ..checks import check_choice, check_count, check_logits, check_mask, check_positive, check_temperature, computing_dtype
from ..layout import as_rows
from ..operator import Operator

ORDERS = ("top_k_first", "joint")


def _new_thresholds(logits, *_):
    return logits.new_empty(logits.shape[:-1], dtype=computing_dtype(logits))


def _thresholds(logits, mask, temperatures, temperature, top_k, top_p, min_p, joint):
    out = _new_thresholds(logits)
    if out.numel():
        mask = None if mask is None else mask.contiguous().view(-1)
        if temperatures is not None:
            temperature = temperatures.to(out.dtype).contiguous().view(-1)
        log_min_p = math.log(min_p) if min_p > 0 else -math.inf
        backends.select(logits.device).sampler_threshold(as_rows(logits), mask, temperature, top_k, top_p, log_min_p, joint, out)
    return out


_sampler_threshold = Operator(
    "sampler_threshold(Tensor logits, Tensor? mask, Tensor? temperatures, float temperature, int top_k, float top_p, float min_p, bool joint)"
    " -> Tensor",
    run=_thresholds,
    fake=_new_thresholds,
)


@torch.no_grad()
def sampler_threshold(
    logits: Tensor,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    temperature: float | Tensor = 1.0,
    order: str = "top_k_first",
    mask: Tensor | None = None,
) -> Tensor:
    """The smallest logit of each row that a sampler may draw: [..., V] -> [...]. Its set is {logits >= it}.

        min_p  keeps p >= min_p * max p
        top_k  keeps p >= the k-th largest p: ties with the last stay
        top_p  keeps a token if those more likely than it hold less than top_p of the mass

        order          top_p counts the mass of
        "top_k_first"  what min_p and top_k left, renormalised (vLLM, Hugging Face)
        "joint"        the whole row (FlashInfer, SGLang). A token must pass each rule by itself

    With p = (0.4, 0.3, 0.2, 0.1), top_k=2, top_p=0.5 the first order keeps token 0, the other 0 and 1. Equal
    logits are kept or dropped together. An engine that cuts ties by their place in a sort keeps fewer.

    Args:
        logits: [..., V] float, as the sampler has them but for its temperature; used detached. A logit_scale
            divides the temperature instead. Sets of softcapped logits need these.
        top_k, top_p, min_p: an integer >= 1, a number in (0, 1], one in (0, 1]. None is off; so are a top_k
            of V and more and a top_p of 1. Engines' own 0 or -1 for off are errors.
        temperature: divides the logits, as in `token_stats`.
        order: see above.
        mask: [...] bool or number; rows with 0 are not read.

    Returns:
        [...] float32 (float64 for float64 logits), each one of its row's logits, for `Kept.at_least`. -inf is
        all ids: in rows that the mask leaves out, and in all if no rule is on. With a rule tokens at -inf are
        never kept. NaN in a row that is no distribution (NaN, +inf, nothing but -inf). No gradient.

        Masses are integers, good to 1e-9 of the row's: a row has the same set in any batch and at any number
        of threads.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices and options other than the above.
    """
    check_logits(logits)
    if top_k is not None:
        check_count("top_k", top_k, 1)
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if value is not None:
            check_positive(name, value, 1)
    check_choice("order", order, ORDERS)
    mask = check_mask(mask, logits)
    row_temperature, temperature = check_temperature(temperature, logits, mask=mask)
    logits = logits.detach()
    top_k = 0 if top_k is None or top_k >= logits.shape[-1] else top_k
    top_p = 1.0 if top_p is None else top_p
    if top_k == 0 and top_p == 1 and min_p is None:
        everything = logits.new_full((), -math.inf, dtype=computing_dtype(logits))
        thresholds = torch.where(logits.amax(-1).isfinite(), everything, math.nan)
        return thresholds if mask is None else torch.where(mask, thresholds, everything)
    return _sampler_threshold(logits, mask, row_temperature, temperature, top_k, top_p, 0.0 if min_p is None else min_p, order == "joint")
