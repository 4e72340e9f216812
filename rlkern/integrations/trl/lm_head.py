"""TRL's fused LM head on `rlkern.linear_token_stats`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ...checks import computing_dtype
from ...primitives.linear import linear_token_stats
from ...primitives.plans import linear_plan

_OPTIONAL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_TOKENS = 4096  # of a tile of TRL's
_Results = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _workspace(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, chunk_size: int, whole_rows: bool) -> int:
    """Bytes of logits to keep, with which all is as large as what TRL's head takes, or smaller.

    That is a tile of logits, and float32 sums of 16-bit gradients. dtype: of the logits.
    """
    (n, h), v = hidden.shape, len(weight)
    needs: Any = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias))
    size = min(n, _TOKENS) * min(chunk_size, v) * dtype.itemsize
    size += sum(4 * x.numel() * need for x, need in zip((hidden, weight), needs, strict=False) if x.dtype.itemsize < 4)
    if weight.dtype != dtype:
        size -= v * h * dtype.itemsize  # a copy of the matrix, which TRL makes of a tile
    plan, size = partial(linear_plan, n, h, v, dtype, needs=needs, whole_rows=whole_rows), max(0, size)
    return size if plan(workspace=size).bytes <= size else max(0, size - plan(workspace=0).bytes)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """As the softmax sees them, before the temperature."""
    z = linear(hidden, weight, bias).to(computing_dtype(hidden)).mul_(scale)
    return z if softcap is None else z.div_(softcap).tanh_().mul_(softcap)


def _mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """[N]. Without a softcap it is the mean row of the matrix that counts; with one, a product more."""
    if softcap is None:
        mean = (hidden * weight.mean(0, dtype=computing_dtype(weight))).sum(-1)
        return scale * (mean if bias is None else mean + bias.mean(dtype=mean.dtype))
    step = max(1, _TOKENS * _TOKENS // len(weight))
    return torch.cat([_logits(part, weight, bias, scale, softcap).mean(-1) for part in hidden.split(step)])


def _is_top1(stats: Any, targets: Tensor, hidden: Tensor, *head: Any) -> Tensor:
    """[N] bool, from statistics with min_p=1, whose kept set has the largest logits.

    The first of several wins, as in argmax. Only rows whose target is one of several are multiplied again.
    """
    several = stats.target_kept & (stats.kept_logmass - stats.logp > 0.5)  # the difference is the log of their number
    rows = several.nonzero().squeeze(-1)  # waits for their number, as TRL does for that of the labels
    step = max(1, _TOKENS * _TOKENS // len(head[0]))
    for part in rows.split(step):
        stats.target_kept[part] = _logits(hidden[part], *head).argmax(-1) == targets[part]
    return stats.target_kept


def _fused_lm_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    final_logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = _OPTIONAL,
) -> _Results:
    """(log p, entropy, log sum p^2, mean logit, is_top1), each [N]. All but log p only if among `outputs`.

    hidden [N, H], weight [V, H], bias [V] or None, targets [N]. With x = hidden @ weight.T + bias, logits are
    softcap * tanh(scale * x / softcap) / temperature; without a softcap scale * x / temperature. The first
    two carry gradients to hidden, weight and bias. The others are for metrics.
    """
    given, top1, device = (weight, bias), "is_top1" in outputs, hidden.device.type
    cast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if cast else hidden.dtype
    workspace = _workspace(hidden, weight, bias, dtype, chunk_size, top1)
    if not cast:
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    if logit_scale <= 0:  # a sign, or 0, may as well be that of the hidden states
        sign = (logit_scale > 0) - (logit_scale < 0)
        hidden, bias, logit_scale = hidden * sign, None if bias is None else bias * sign, abs(logit_scale) or 1.0

    def gathered() -> Any:
        from trl.trainer.utils import maybe_gather_lm_head_ctx

        return maybe_gather_lm_head_ctx(*given)

    stats = linear_token_stats(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        workspace=workspace,
        gathered=gathered if hasattr(given[0], "ds_id") else None,  # ZeRO-3 takes the weight away before the backward
        min_p=1.0 if top1 else None,
        with_sum_sq="log_sum_sq_probs" in outputs,
        with_entropy="entropy" in outputs,
        logit_scale=logit_scale,
        softcap=final_logit_softcapping,
    )
    with torch.no_grad():
        head = weight, bias, logit_scale, final_logit_softcapping
        log_sum_sq = stats.sum_sq_prob.log() if "log_sum_sq_probs" in outputs else None
        mean = _mean_logits(hidden, *head) / temperature if "mean_logits" in outputs else None
        return stats.logp, stats.entropy, log_sum_sq, mean, _is_top1(stats, targets, hidden, *head) if top1 else None


class FusedLMHead:
    """In place of TRL's autograd.Function, which is called as `FusedLMHead.apply(...)`."""

    apply = staticmethod(_fused_lm_head)


class LogpAndEntropy:
    """The fused head as TRL 1.14 calls it: two results, and no argument that chooses them."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
    ) -> tuple[Tensor, Tensor | None]:
        return _fused_lm_head(hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, ("entropy",))[:2]
