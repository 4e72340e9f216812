"""`token_stats` of hidden states times the output matrix: the logits exist a chunk of rows at a time, and are computed again in the backward.

Products are the library's; what is ours is that nothing of size [N, V] stays. Two products of a step become four: the logits twice, and the two of
their gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_count, check_flag
from .ops import (
    TokenStats,
    _as_op,
    _as_stats,
    _check_kept,
    _new_stats,
    _token_stats,
    _write_gradient,
)
from .rows import (
    DEBUG,
    OnlyOnce,
    accumulation_dtype,
    check_device,
    check_ignore_index,
    check_logits,
    check_mask,
    check_target_range,
    check_targets,
    check_temperature,
    counted_rows,
)

__all__ = ["linear_token_stats"]

_SECOND = "use rlkern.reference.token_stats of torch.nn.functional.linear(hidden, weight, bias), with targets [..., K]"

_lib = torch.library.Library("rlkern", "FRAGMENT")
_ARGS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? targets, Tensor? mask, Tensor? row_temperature, int chunk_rows, float temperature, "
    "int ignore_index"
)
_GRADS = "Tensor? g_logp, Tensor? g_entropy, Tensor? g_logsumexp, Tensor? g_sum_sq_prob, Tensor? g_kept_logmass"
_lib.define(
    f"linear_token_stats({_ARGS}, int kept_kind, float log_kept, bool with_sum_sq, bool with_entropy) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_lib.define(
    f"linear_token_stats_backward({_ARGS}, Tensor state, {_GRADS}, bool[] wanted) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _default_chunk_rows(hidden: Tensor, vocab: int) -> int:
    """As many rows as keep the product busy: a GPU must read the whole matrix for each chunk."""
    return max(1, (64 << 20 if hidden.device.type == "cpu" else 512 << 20) // (vocab * hidden.element_size()))


class _Chunks:
    """The rows in pieces, their logits always in the same memory."""

    def __init__(self, hidden, weight, bias, chunk_rows, *by_row):
        self.hidden, self.weight, self.bias, self.by_row = hidden, weight, bias, by_row
        self.step = min(chunk_rows, max(1, hidden.shape[0]))
        self.buffer = hidden.new_empty(self.step, weight.shape[0])

    def __iter__(self):
        """Yields (rows, logits of these rows, *these rows of every other tensor)."""
        for start in range(0, self.hidden.shape[0], self.step):
            rows = slice(start, start + self.step)
            hidden = self.hidden[rows]
            logits = self.buffer[: hidden.shape[0]]
            if self.bias is None:
                torch.mm(hidden, self.weight.t(), out=logits)
            else:
                torch.addmm(self.bias, hidden, self.weight.t(), out=logits)
            yield rows, logits, *(None if x is None else x[rows] for x in self.by_row)


def _indices(counted: Tensor | None) -> Tensor | None:
    """The rows that count, to leave the others out of the products; None for all, as on a GPU, which the host would have to wait for."""
    if counted is None or counted.device.type != "cpu" or counted.all():
        return None
    return counted.nonzero().squeeze(-1)


def _pick(rows: Tensor | None, *tensors):
    return tensors if rows is None else tuple(None if x is None else x[rows] for x in tensors)


def _flat(lead: torch.Size, *tensors):
    """Leading dimensions merged into one, if they are `lead`; what has more keeps its last."""
    return tuple(None if x is None else x.reshape(lead.numel(), *x.shape[len(lead) :]) for x in tensors)


def _linear_token_stats(hidden, weight, bias, targets, mask, row_temperature, chunk_rows, temperature, ignore_index, *options):
    stats = _new_stats(hidden, targets, options[0], *options[2:])
    lead = hidden.shape[:-1]
    if lead.numel() == 0:
        return stats
    out = _flat(lead, *stats)  # views: they are contiguous
    hidden, targets, mask, row_temperature = _flat(lead, hidden, targets, mask, row_temperature)
    if targets is not None and (DEBUG or hidden.device.type == "cpu"):  # here, where rows have their own numbers
        check_target_range(targets.view(len(hidden), -1), mask, ignore_index, weight.shape[0])
    counted = _indices(counted_rows(targets, mask, ignore_index, 1))
    picked = _pick(counted, hidden, targets, mask, row_temperature)
    results = out if counted is None else _new_stats(picked[0], picked[1], options[0], *options[2:])
    for rows, logits, *of_rows in _Chunks(picked[0], weight, bias, chunk_rows, *picked[1:]):
        for to, value in zip(results, _token_stats(logits, *of_rows, temperature, ignore_index, *options), strict=True):
            if to is not None:
                to[rows] = value
    if counted is not None:
        for to, value in zip(out, results, strict=True):
            if to is not None:
                to.zero_()[counted] = value
    return stats


def _linear_token_stats_backward(
    hidden, weight, bias, targets, mask, row_temperature, chunk_rows, temperature, ignore_index, state, g0, g1, g2, g3, g4, wanted
):
    d_hidden, d_weight, d_bias = out = _new_gradients(hidden, weight, bias, wanted)
    acc, lead = accumulation_dtype(hidden), hidden.shape[:-1]
    by_row = (hidden, targets, mask, row_temperature, state, g0, g1, g2, g3, g4)
    hidden, *by_row = _flat(lead, *by_row)
    (d_hidden,) = _flat(lead, d_hidden)
    weight_sum = None if d_weight is None else torch.zeros_like(weight, dtype=acc)
    bias_sum = None if d_bias is None else torch.zeros_like(bias, dtype=acc)
    counts = counted_rows(*by_row[:2], ignore_index, 1)
    counted = _indices(counts)
    if counted is None and counts is not None:
        hidden = hidden.masked_fill(~counts.unsqueeze(-1), 0)  # what a row that does not count holds, NaN even, meets a gradient of 0
    hidden, *by_row = _pick(counted, hidden, *by_row)
    d_rows = d_hidden if counted is None else hidden.new_empty(hidden.shape)
    for rows, logits, y, kept, row_t, row_state, *grads in _Chunks(hidden, weight, bias, chunk_rows, *by_row):
        _write_gradient(logits, logits, y, kept, row_t, temperature, ignore_index, row_state, *grads)
        if d_hidden is not None:
            torch.mm(logits, weight, out=d_rows[rows])
        if weight_sum is not None and weight_sum.dtype == logits.dtype:
            weight_sum.addmm_(logits.t(), hidden[rows])
        elif weight_sum is not None:
            weight_sum += torch.mm(logits.t(), hidden[rows])
        if bias_sum is not None:
            bias_sum += logits.sum(0, dtype=acc)
    if d_hidden is not None and counted is not None:
        d_hidden.zero_()[counted] = d_rows
    for to, value in ((d_weight, weight_sum), (d_bias, bias_sum)):
        if to is not None:
            to.copy_(value)
    return out


def _new_gradients(hidden, weight, bias, wanted):
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if want else None for x, want in zip((hidden, weight, bias), wanted, strict=True)
    )


def _new_gradients_fake(hidden, weight, bias, *args):
    return _new_gradients(hidden, weight, bias, args[-1])


_lib.impl("linear_token_stats", _as_op(_linear_token_stats), "CompositeExplicitAutograd")
_lib.impl("linear_token_stats_backward", _as_op(_linear_token_stats_backward), "CompositeExplicitAutograd")
torch.library.register_fake(
    "rlkern::linear_token_stats",
    _as_op(lambda hidden, weight, bias, targets, *args: _new_stats(hidden, targets, args[-4], *args[-2:])),
    lib=_lib,
)
torch.library.register_fake("rlkern::linear_token_stats_backward", _as_op(_new_gradients_fake), lib=_lib)


def _refuse(ctx, *grads):
    raise RuntimeError("rlkern's operators are differentiated through rlkern.linear_token_stats, once, by torch.autograd; not by torch.func")


for _name in ("linear_token_stats", "linear_token_stats_backward"):
    torch.library.register_autograd(f"rlkern::{_name}", _refuse, setup_context=lambda ctx, inputs, output: None, lib=_lib)


class _LinearTokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, mask, row_temperature, chunk_rows, options):
        temperature, ignore_index, kept_kind, _, with_sum_sq, with_entropy = options
        tensors = (hidden, weight, bias, targets, mask, row_temperature)
        outputs = torch.ops.rlkern.linear_token_stats.default(*tensors, chunk_rows, *options)
        ctx.save_for_backward(*tensors, outputs[-1])
        ctx.constants = (chunk_rows, temperature, ignore_index)
        ctx.given = (targets is not None, with_entropy, True, with_sum_sq, bool(kept_kind))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(outputs[-1])
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        *tensors, state = ctx.saved_tensors
        # torch.compile hands zeros also to the outputs that were not asked for
        grads = [g if given else None for g, given in zip(grads[:-1], ctx.given, strict=True)]
        wanted = list(ctx.needs_input_grad[:3])
        with torch.no_grad():
            out = torch.ops.rlkern.linear_token_stats_backward.default(*tensors, *ctx.constants, state, *grads, wanted)
        out = [g if want else None for g, want in zip(out, wanted, strict=True)]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            out = [None if g is None else OnlyOnce.apply(g, x, _SECOND) for g, x in zip(out, tensors[:3], strict=True)]
        return (*out, None, None, None, None, None)


def _check_matrix(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_logits(hidden, "hidden")
    for name, x in (("weight", weight),) if bias is None else (("weight", weight), ("bias", bias)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dtype != hidden.dtype:
            raise TypeError(f"{name} must have the dtype of hidden {hidden.dtype} (or run under torch.autocast), got {x.dtype}")
        check_device(name, x, hidden, "hidden")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(f"weight must be [V, {hidden.shape[-1]}] with V >= 1 for hidden {tuple(hidden.shape)}, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}] for weight {tuple(weight.shape)}, got {tuple(bias.shape)}")


def _autocast(x: Tensor | None, device: str) -> Tensor | None:
    castable = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(device)) if castable else x


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_rows: int | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    min_p: float | None = None,
    min_prob: float | None = None,
    with_sum_sq: bool = False,
    with_entropy: bool = True,
    group=None,
) -> TokenStats:
    """`token_stats` of `hidden @ weight.T + bias`, without the logits ever existing at once.

    Extra memory is one chunk of logits, whatever the number of rows; in the backward also float32 sums of the gradients of weight and bias where
    these are wanted. The price is a second product for the logits in the backward: use `token_stats` where the logits fit.

    Args:
        hidden: [..., H] float32, bfloat16, float16 or float64. Under torch.autocast it is cast to autocast's dtype, with weight and bias.
        weight: [V, H], the lm_head's. bias: [V]. Dtype and device of hidden. Each of the three may or may not require grad.
        chunk_rows: rows at a time; None takes 64 MiB of logits on a CPU, 512 MiB on a GPU.
        targets, mask, temperature, ignore_index, min_p, min_prob, with_sum_sq, with_entropy, group: as in `token_stats`, for the rows of hidden. On
            a CPU masked rows are left out of the products too.

    Returns:
        TokenStats as `token_stats` returns them. Logits are rounded to hidden's dtype, as those of a model's own head. The gradients are those of
        `token_stats`; weight's and bias's are summed over the chunks in float32.

    Raises:
        TypeError, ValueError, IndexError: as `token_stats`; for weights whose shape, dtype or device does not go with hidden.
    """
    if group is not None:
        raise ValueError("group: vocabulary-parallel weights are not supported in this version, expected None")
    if targets is None:
        raise TypeError("targets must be an integer tensor, got None")
    if isinstance(hidden, Tensor) and not hidden.is_meta and torch.is_autocast_enabled(hidden.device.type):
        hidden, weight, bias = (_autocast(x, hidden.device.type) for x in (hidden, weight, bias))
    _check_matrix(hidden, weight, bias)
    targets = check_targets(targets, hidden, "hidden")
    mask = check_mask(mask, hidden, "hidden")
    ignore_index = check_ignore_index(ignore_index)
    row_temperature, temperature = check_temperature(temperature, hidden, targets, mask, ignore_index)
    kept_kind, log_kept = _check_kept(min_p, min_prob)
    if chunk_rows is None:
        chunk_rows = _default_chunk_rows(hidden, weight.shape[0])
    else:
        check_count("chunk_rows", chunk_rows, 1)
    check_flag("with_sum_sq", with_sum_sq)
    check_flag("with_entropy", with_entropy)

    options = (temperature, ignore_index, kept_kind, log_kept, bool(with_sum_sq), bool(with_entropy))
    return _as_stats(_LinearTokenStats.apply(hidden, weight, bias, targets, mask, row_temperature, chunk_rows, options), targets, options)
