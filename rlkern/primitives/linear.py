"""`token_stats` of hidden states times the output matrix. The logits exist a chunk of rows at a time.

The backward computes them again, so two products of a step become four: the logits twice, and two for their
gradient.
"""

from __future__ import annotations

from torch import Tensor

from ..backends.contract import KeptKind
from ..checks import check_count, check_flags, check_target_range
from ..operator import Operator, differentiable, values_readable
from .kept_sets import Kept, check_kept
from .linear_kept import check_kept_options, linear_kept_stats
from .projection import Chunks, GradientSums, Rows, autocast, check_matrix, default_chunk_rows, new_gradients
from .token_stats import (
    GRADIENTS,
    OPTIONS,
    RESULTS,
    TENSORS,
    Options,
    Results,
    TokenStats,
    compute,
    mark_kept,
    new_results,
    public_stats,
    row_options,
    write_gradient,
)


def _new_stats(hidden, weight, bias, targets, mask, row_temperature, chunk_rows, *options) -> Results:
    return new_results(hidden, targets, Options(*options))


def _forward(hidden, weight, bias, targets, mask, row_temperature, chunk_rows, *options) -> Results:
    o = Options(*options)
    stats = new_results(hidden, targets, o)
    if stats.logsumexp.numel() == 0:
        return stats
    if targets is not None and values_readable(hidden):  # before Rows renumbers the rows
        y = targets.reshape(stats.logsumexp.numel(), -1)
        check_target_range(y, None if mask is None else mask.reshape(-1), o.ignore_index, weight.shape[0])
    rows = Rows(hidden, targets, mask, o.ignore_index, row_temperature)
    results = [rows.room(x) for x in stats]
    for part, logits, *of_rows in Chunks(rows.hidden, weight, bias, chunk_rows, *rows.others):
        for to, value in zip(results, compute(logits, *of_rows, *o), strict=True):
            if to is not None and value is not None:
                to[part] = value
    for to, value in zip(stats, results, strict=True):
        rows.place(to, value)
    mark_kept(stats)
    return stats


def _new_gradients(hidden, weight, bias, *others):
    return new_gradients((hidden, weight, bias), others[-1])


def _backward(
    hidden, weight, bias, targets, mask, row_temperature, chunk_rows,
    temperature, ignore_index, kept_kind, log_kept, with_sum_sq, with_entropy, softcap,
    state, g_logp, g_entropy, g_logsumexp, g_sum_sq_prob, g_kept_logmass, wanted,
):  # fmt: skip
    o = Options(temperature, ignore_index, kept_kind, log_kept, with_sum_sq, with_entropy, softcap)
    by_row = (state, g_logp, g_entropy, g_logsumexp, g_sum_sq_prob, g_kept_logmass)
    out = _new_gradients(hidden, weight, bias, wanted)
    rows = Rows(hidden, targets, mask, ignore_index, row_temperature, *by_row)
    chunks = Chunks(rows.clean(rows.hidden), weight, bias, chunk_rows, *rows.others)
    sums = GradientSums(rows, chunks, out)
    for part, logits, y, kept, row_t, *of_rows in chunks:
        write_gradient(logits, logits, y, kept, row_t, *o, *of_rows)
        sums.add(part, logits)
    sums.finish()
    return out


_ARGUMENTS = f"Tensor hidden, Tensor weight, Tensor? bias, {TENSORS}, int chunk_rows, {OPTIONS}"
_linear_token_stats = differentiable(
    Operator(
        f"linear_token_stats({_ARGUMENTS}) -> {RESULTS}",
        run=_forward,
        fake=_new_stats,
    ),
    Operator(
        f"linear_token_stats_backward({_ARGUMENTS}, {GRADIENTS}, bool[] wanted) -> (Tensor, Tensor, Tensor)",
        run=_backward,
        fake=_new_gradients,
    ),
    outputs=5,
    constants=1,
    wrt=3,
    instead="use rlkern.reference.token_stats of torch.nn.functional.linear(hidden, weight, bias), with targets [..., K]",
)


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
    with_tail: bool = False,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    keep: Kept | None = None,
    outside: str = "include",
    max_dense_rows: int = 0,
    round_logits: bool = False,
    group=None,
) -> TokenStats:
    """`token_stats` of `hidden @ weight.T + bias`, without all logits at once.

    Extra memory is one chunk of logits, for any number of rows. The backward adds float32 sums of the
    gradients of weight and bias if these are wanted, and computes the logits a second time. Use `token_stats`
    where the logits fit.

    Args:
        hidden: [..., H] float32, bfloat16, float16 or float64. torch.autocast casts it, with weight and bias.
        weight: [V, H], the lm_head's. bias: [V]. Dtype and device of hidden. All three may require grad.
        chunk_rows: rows at a time; None takes 64 MiB of logits on a CPU, 512 MiB on a GPU.
        targets, mask, temperature, ignore_index, min_p, min_prob, with_sum_sq, with_entropy, with_tail,
            logit_scale, softcap, group: as in `token_stats`, for the rows of hidden. On a CPU masked rows are
            left out of the products too.
        keep: a `Kept`, the ids S that each row's softmax is over, as a sampler's top-p or top-k left them.
            Values and gradients are those of logits at -inf outside S, but only listed columns are
            multiplied. The logits are float32 sums, not rounded to hidden's dtype. Not with min_p, min_prob
            or with_tail.
        outside: what to do where a target is not in S. "include" adds it to S. "everything" takes the whole
            vocabulary for that row. "minus_inf" gives logp = -inf, without gradient, and is for targets
            [..., K] too.
        max_dense_rows: how many rows may be over the whole vocabulary, by an empty list or by
            outside="everything". They are computed as without keep. More are a ValueError on a CPU, and NaN
            on a GPU.
        round_logits: round the kept logits to hidden's dtype, as a model's own head does.

    Returns:
        TokenStats as of `token_stats`, with its gradients. With keep, `target_kept` says whether S had the
        target (bool; True in rows that are not read). Logits are rounded to hidden's dtype, like those
        of a model's own head. Gradients of weight and bias are summed over the chunks in float32.

    Raises:
        TypeError, ValueError, IndexError: as `token_stats`; for weights of another shape, dtype or device.
            With keep also ValueError for rows that share a list and IndexError for ids >= V; on a GPU NaN.
    """
    if group is not None:
        raise ValueError("group: vocabulary-parallel weights are not supported in this version, expected None")
    if targets is None:
        raise TypeError("targets must be an integer tensor, got None")
    hidden, weight, bias = autocast(hidden, weight, bias)
    check_matrix(hidden, weight, bias)
    check_flags(with_sum_sq=with_sum_sq, with_entropy=with_entropy, with_tail=with_tail)
    y, counted, row_temperature, o = row_options(
        hidden,
        targets,
        of="hidden",
        mask=mask,
        temperature=temperature,
        ignore_index=ignore_index,
        min_p=min_p,
        min_prob=min_prob,
        with_sum_sq=with_sum_sq,
        with_entropy=with_entropy,
        with_tail=with_tail,
        logit_scale=logit_scale,
        softcap=softcap,
    )
    if chunk_rows is None:
        chunk_rows = default_chunk_rows(hidden, weight.shape[0] * hidden.element_size())
    check_count("chunk_rows", chunk_rows, 1)
    check_flags(round_logits=round_logits)
    several = targets.dim() == hidden.dim() and targets.shape[-1] > 1
    check_kept_options(outside, max_dense_rows, several and keep is not None)
    if keep is not None:
        if o.kept_kind != KeptKind.NONE:
            raise ValueError(f"keep takes no min_p, min_prob or with_tail: expected None, None and False, got {min_p}, {min_prob} and {with_tail}")
        keep = check_kept(keep, hidden, "hidden")

        def dense(hidden, *of_rows):
            return _linear_token_stats(hidden, weight, bias, *of_rows, chunk_rows, *o)

        of_rows = (y, counted, row_temperature, o)
        return linear_kept_stats(hidden, weight, bias, *of_rows, keep, outside, max_dense_rows, bool(round_logits), dense)
    return public_stats(o, *_linear_token_stats(hidden, weight, bias, y, counted, row_temperature, chunk_rows, *o))
