"""Log-probability, entropy and more of rows of logits in one read. Most losses start from it."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from ..backends.contract import KeptKind
from ..checks import check_flags, check_inplace, check_logits, check_mask, check_temperature, check_transforms
from ..dtensors import is_dtensor, local_columns
from ..parallel import is_sharded, world
from .kept_sets import Kept, check_kept, check_outside
from .kept_stats import kept_stats
from .row_stats import Options, TokenStats, public_stats, row_options, row_stats
from .sharded_kept import check_kept_over_ranks, kept_part_payloads, largest_kept_id, sharded_kept_stats, what_keep_says
from .sharded_stats import Columns, agreed_shard, sharded_row_stats


def token_stats(
    logits: Tensor,
    targets: Tensor,
    *,
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
    inplace_backward: bool = False,
    keep: Kept | Tensor | None = None,
    outside: str = "include",
    with_full: bool = False,
    group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    segments: int | None = None,
) -> TokenStats:
    """Log-probability, entropy and more of each row of logits in one read; gradient: one read, one write.

    With u = logits / temperature and p = softmax(u):

        logp = log p[target]     entropy = -sum p log p     logsumexp = log sum e^u     sum_sq_prob = sum p^2
        kept_logmass = log of the mass of the kept set, {p >= min_p * max p} or {p >= min_prob};
                       KL(kept, renormalised || p) = -kept_logmass
        tail_logmass = log of the mass of all ids that are not among the row's targets

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64, any leading strides (`logits[:, :-1]` is not
            copied). Entries may be -inf: probability 0, gradient 0.
        targets: [...] integer token ids, or [..., K] for K log-probabilities a row.
        mask: [...] bool or number; rows where it is 0 are not read: zeros out, zero gradient.
        temperature: a positive float, or a tensor [...] with one a row, anything in unread rows. No gradient.
        ignore_index: a target that marks its row as masked. With [..., K] it marks its entry, and the row
            only if all K are ignored.
        min_p: keep the tokens with p >= min_p * max p, inclusive, detached (Lp-Reg, arXiv 2510.03222, eq. 5).
        min_prob: keep the tokens with p >= min_prob, inclusive. An empty set: kept_logmass -inf, no gradient.
        with_sum_sq: also compute sum_sq_prob.
        with_entropy: False leaves the entropy out (None). A CPU saves a tenth of the forward.
        with_tail: also compute tail_logmass, in a second sweep: summed as such, so it keeps its relative
            accuracy beside targets that hold nearly everything. An id counts as listed once, however often it
            is; entries equal to ignore_index list nothing. All of the mass listed, or all but e^-87 of it
            (float64 logits: e^-708): -inf, no gradient. Not together with min_p or min_prob.
            `topk_divergence` takes it.
        logit_scale, softcap: what the model does with its raw logits: u = z / temperature with
            z = softcap tanh(logit_scale logits / softcap), or logit_scale logits without a softcap. The
            gradient is by the raw logits, accurate also where the tanh is 1. -inf stays -inf. Both are
            positive floats; `rlkern.integrations.logit_transforms` reads them from a model's config. Only for
            raw logits: the `.logits` of a Hugging Face model are scaled and capped already.
        inplace_backward: write the gradient over the logits. It takes no memory, and the backward destroys
            the logits. Another operation that saved them raises in its own backward. Under torch.compile the
            gradient is a new tensor.
        keep: the ids S that each row's softmax is over, as the sampler left them: a `Kept`, or a bool tensor
            [..., V]. Values and gradients are those of logits at -inf outside S. What stands there does not
            count, not even NaN, and its gradient is 0. Lists are the fastest form: only listed logits are
            read, and the gradient is one write. min_p and min_prob look inside S. Not with with_tail or
            segments. Over several ranks only lists, the same on all of them, of ids of the whole vocabulary;
            not with min_p or min_prob. With a vocab_size the sets are of so many ids.
        outside: what to do where a target is not in S. "include" adds it to S. "everything" takes the whole
            vocabulary for that row. "minus_inf" gives logp = -inf, without gradient, and is for targets
            [..., K] too.
        with_full: also compute full_entropy and full_logsumexp, of the whole vocabulary.
        group: a torch.distributed.ProcessGroup whose ranks hold the columns of the same rows between them.
            All arguments but the logits must be the same on all ranks, and so must be the upstream gradients.
            Results are those of the whole rows, the same bits on every rank. A rank gets the gradient of its
            own columns; it may hold none. The forward is one gather of 6 + K numbers a row for K targets
            (min_p, min_prob and with_tail: another of 2), the backward none. DTensor logits need no group,
            see below.
        vocab_start: the id of this rank's first column; None: rank * columns. Targets are ids of the whole
            vocabulary.
        vocab_size: V. Columns of ids from there on are padding: they are not read, and their gradient is 0.
            None: the columns of all ranks. Also without a group.
        segments: cut rows into so many equal parts wherever ranks begin, a multiple of the number of ranks:
            8 gives the same bits on 1, 2, 4 and 8 ranks. The columns of all ranks must be a multiple of
            16 * segments.

    Returns:
        TokenStats(logp, entropy | None, logsumexp, sum_sq_prob | None, kept_logmass | None) in float32
        (float64 for float64 logits), freshly allocated, shaped like the rows (logp like targets), and
        tail_logmass | None. All carry gradients. `.proxy_logp` is logp - kept_logmass, -inf outside the set
        of min_p or min_prob. With keep, `target_kept` says whether S had the target (bool like targets; True
        in rows that are not read or are over everything). With with_full, full_entropy and full_logsumexp;
        logsumexp - full_logsumexp is the log of the mass that S holds.

        A DTensor of logits may be sharded on its last dimension over one dimension of its mesh, and on others
        by rows. targets, mask and temperature are then those of the local rows, or DTensors. Results are
        DTensors if targets are one.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices or options other than the above.
        IndexError: on a CPU for a target outside [0, V) that is not ignore_index, and for a kept id >= V. On
            a GPU that row's logp is NaN, or with RLKERN_DEBUG=1 this error.

        With a group on CPUs every rank raises if one of them does, or if what they were given does not fit
        together. On GPUs the host does not wait for the others: their rows are NaN where a rank refused.
        RLKERN_DEBUG=1 checks there too, and compares targets, mask and temperature of every row.
    """
    if is_dtensor(logits):
        options: Any = dict(ignore_index=ignore_index, min_p=min_p, min_prob=min_prob, with_sum_sq=with_sum_sq, with_entropy=with_entropy)
        options |= dict(with_tail=with_tail, logit_scale=logit_scale, softcap=softcap, inplace_backward=inplace_backward, keep=keep)
        options |= dict(outside=outside, with_full=with_full, segments=segments)
        local, at, placed = local_columns("logits", logits, group, vocab_start, vocab_size)
        by_row = {"mask": placed.local(mask), "temperature": placed.local(temperature)}
        stats = token_stats(local, placed.local(targets), **by_row, **at, **options)
        return TokenStats(*map(placed.whole, stats)) if is_dtensor(targets) else stats

    def checked() -> tuple:
        if targets is None:
            raise TypeError("targets must be an integer tensor; entropy_from_logits works without targets")
        check_logits(logits, least=1 if group is None else 0)
        check_flags(with_sum_sq=with_sum_sq, with_entropy=with_entropy, with_tail=with_tail, inplace_backward=inplace_backward, with_full=with_full)
        if inplace_backward:
            check_inplace(logits)
        rows = row_options(
            logits,
            targets,
            mask=mask,
            temperature=temperature,
            ignore_index=ignore_index,
            min_p=min_p,
            min_prob=min_prob,
            with_sum_sq=with_sum_sq,
            with_entropy=with_entropy or (bool(with_full) and keep is None),
            with_tail=with_tail,
            logit_scale=logit_scale,
            softcap=softcap,
        )
        check_outside(outside)
        if keep is not None and segments is not None:
            raise ValueError(f"keep takes no segments: expected None, got {segments}")
        if keep is not None and world(group) > 1:
            check_kept_over_ranks(keep, outside, logits, targets, rows[-1])
        return rows

    columns = Columns(group, vocab_start, vocab_size, segments)
    sharded = is_sharded(*columns)
    if sharded:
        second = not (min_p is None and min_prob is None) or bool(with_tail)

        def asked() -> dict[str, Any]:
            return {"with_full": bool(with_full), "outside": outside, **what_keep_says(keep)}

        of_keep: Any = {}
        if keep is not None:
            of_keep["payloads"] = partial(kept_part_payloads, logits, targets, with_full)
        if isinstance(keep, Kept):
            of_keep["largest_id"] = partial(largest_kept_id, keep, logits)
        shard, rows = agreed_shard("token_stats", logits, targets, columns, checked, second=second, options=asked, **of_keep)
        y, counted, row_temperature, o = rows
    else:
        y, counted, row_temperature, o = checked()
    if keep is not None:
        keep = check_kept(keep, logits, "logits", o.vocab_size or logits.shape[-1])
        check_outside(outside, several=targets.dim() == logits.dim() and targets.shape[-1] > 1)
        if sharded and shard.ranks > 1:
            how: Any = {"keep": keep, "outside": outside, "with_full": bool(with_full), "in_place": bool(inplace_backward)}
            return sharded_kept_stats(shard, logits, y, counted, row_temperature, o, **how)
        return kept_stats(logits, y, counted, row_temperature, o, keep, outside, bool(with_full), bool(inplace_backward))
    if sharded:
        results = sharded_row_stats(shard, logits, y, counted, row_temperature, o, in_place=bool(inplace_backward))
    else:
        results = row_stats(logits, y, counted, row_temperature, *o, in_place=bool(inplace_backward))
    stats = public_stats(o, *results)
    if not with_full:
        return stats
    entropy = stats.entropy if with_entropy else None
    # Not _replace, which Dynamo of torch 2.6 does not follow.
    full = {"entropy": entropy, "full_entropy": stats.entropy.clone(), "full_logsumexp": stats.logsumexp.clone()}
    return TokenStats(**{**dict(zip(TokenStats._fields, stats, strict=True)), **full})  # type: ignore[arg-type]


def token_logprobs(logits: Tensor, targets: Tensor, **options) -> Tensor:
    """log softmax(logits / temperature) at targets. Replaces `selective_log_softmax`, `logprobs_from_logits`.

    Takes the arguments of `token_stats`; returns its `logp`, float32, shaped like targets.
    """
    return token_stats(logits, targets, **{"with_entropy": False, **options}).logp


def entropy_from_logits(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    segments: int | None = None,
) -> Tensor:
    """Entropy in nats of softmax(logits / temperature): [..., V] -> [...], float32 (float64 for float64).

    Differentiable; `temperature`, `mask`, `logit_scale`, `softcap`, `group` and what belongs to it as in
    `token_stats`. Entries at -inf count as probability 0.
    """
    if is_dtensor(logits):
        local, at, placed = local_columns("logits", logits, group, vocab_start, vocab_size)
        by_row = {"mask": placed.local(mask), "temperature": placed.local(temperature)}
        return entropy_from_logits(local, **by_row, **at, logit_scale=logit_scale, softcap=softcap, segments=segments)

    def checked() -> tuple:
        check_logits(logits, least=1 if group is None else 0)
        counted = check_mask(mask, logits)
        row_temperature, number = check_temperature(temperature, logits, mask=counted)
        row_temperature, number, cap = check_transforms(logit_scale, softcap, row_temperature, number, logits)
        return None, counted, row_temperature, Options(number, -100, KeptKind.NONE, 0.0, with_sum_sq=False, with_entropy=True, softcap=cap)

    columns = Columns(group, vocab_start, vocab_size, segments)
    if is_sharded(*columns):
        shard, rows = agreed_shard("entropy_from_logits", logits, None, columns, checked)
        return TokenStats(*sharded_row_stats(shard, logits, *rows)).entropy
    *of_rows, o = checked()
    return TokenStats(*row_stats(logits, *of_rows, *o)).entropy
