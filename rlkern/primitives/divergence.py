"""Divergences of two rows of logits by token, and what else one read of both gives."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.contract import PairKind
from ..checks import (
    check_choice,
    check_count,
    check_flags,
    check_ignore_index,
    check_inplace,
    check_logits,
    check_mask,
    check_number,
    check_targets,
    check_temperature,
    check_transforms,
    computing_dtype,
    expect,
    shown,
)
from ..dtensors import is_dtensor, local_columns
from ..parallel import is_sharded
from .pair_rows import REFERENCE_ONLY, PairOptions, pair_rows
from .sharded_pairs import agreed_pairs, sharded_pair_rows
from .sharded_stats import Columns, refuse_rows

_KINDS = {name.lower(): kind for name, kind in vars(PairKind).items() if name.isupper()}
KINDS = tuple(_KINDS)
_SMALLEST_ALPHA = 1e-3  # the divergence divides by beta (1 - beta)


class PairStats(NamedTuple):
    """Numbers of two rows of logits, see `pair_stats`, of the rows' shape."""

    divergence: Tensor
    logp: Tensor | None
    other_logp: Tensor | None
    entropy: Tensor
    other_entropy: Tensor
    logsumexp: Tensor
    other_logsumexp: Tensor


def check_beta(kind: str, beta: float) -> float:
    """The parameter of a kind, in the kind's interval."""
    check_number("beta", beta)
    if kind == "mixed_kl":
        if not 0 <= beta <= 1:
            raise ValueError(f"beta is the weight of the forward KL, 0 <= beta <= 1, got {beta}")
    elif kind == "alpha":
        if not _SMALLEST_ALPHA <= beta <= 1 - _SMALLEST_ALPHA:
            raise ValueError(
                f"beta of 'alpha' must be in [{_SMALLEST_ALPHA}, {1 - _SMALLEST_ALPHA}], got {beta}: "
                "its limits are 'forward_kl' (1) and 'reverse_kl' (0)"
            )
    elif not 0 < beta < 1:
        raise ValueError(f"beta must be a weight in a mixture, 0 < beta < 1, got {beta}")
    return float(beta)


def _check_vocab(vocab: int | None, widths: dict[str, int], of: str) -> int:
    """How many tokens count, of two tensors by name with so many columns, or what `of` says."""
    (name, width), (other_name, other_width) = widths.items()
    least = min(width, other_width)
    if vocab is None and width != other_width:
        given = f"{name} with {width} {of} and {other_name} with {other_width}"
        raise ValueError(f"{given}: give vocab=, how many of them mean the same token, here at most {least}")
    if vocab is None:
        return width
    check_count("vocab", vocab, 1)
    if vocab > least:
        raise ValueError(f"vocab must be at most the {of} of {name} ({width}) and of {other_name} ({other_width}), got {vocab}")
    return vocab


def pair_options(
    logits: Tensor,
    targets: Tensor | None,
    *,
    of: str,
    widths: dict[str, int],
    counted: str,
    kind: str,
    beta: float,
    temperature: float | Tensor,
    other_temperature: float | Tensor | None,
    mask: Tensor | None,
    vocab: int | None,
    other_grad: bool,
    ignore_index: int,
    with_stats: bool,
    logit_scale: float,
    softcap: float | None,
    other_logit_scale: float | None,
    other_softcap: float | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, PairOptions]:
    """Checks all but the rows: (targets, mask, row_temperature, other_row_temperature, options).

    of: the name of `logits`, whose leading dimensions are the rows. widths, counted: see `_check_vocab`.
    """
    check_choice("kind", kind, KINDS)
    beta = check_beta(kind, beta)
    check_flags(other_grad=other_grad)
    if other_grad and kind == "cross_entropy":
        raise ValueError("other_grad: the cross entropy has no gradient by other here, expected kind='forward_kl' or another divergence")
    vocab = _check_vocab(vocab, widths, counted)
    if targets is not None:
        targets = check_targets(targets, logits, of, several=False)
    ignore_index = check_ignore_index(ignore_index)
    mask = check_mask(mask, logits, of)
    plain = check_temperature(temperature, logits, targets, mask, ignore_index)
    row_temperature, number, cap = check_transforms(logit_scale, softcap, *plain, logits)
    others = (logit_scale if other_logit_scale is None else other_logit_scale, softcap if other_softcap is None else other_softcap)
    if other_temperature is not None:
        plain = check_temperature(other_temperature, logits, targets, mask, ignore_index, name="other_temperature")
    other_row_temperature, other_number, other_cap = check_transforms(*others, *plain, logits, "other_", math.inf)
    if other_temperature is None and others == (logit_scale, softcap):
        other_row_temperature = row_temperature  # as it was divided: backends see by the memory that it is the same
    if row_temperature is not None and other_row_temperature is row_temperature:
        other_row_temperature = row_temperature.detach()  # a tensor of its own: Dynamo does not take one twice
    code = _KINDS[kind]
    if kind == "mixed_kl" and beta in (0, 1):
        code = PairKind.FORWARD_KL if beta else PairKind.REVERSE_KL
    options = PairOptions(number, other_number, ignore_index, code, beta, vocab, with_stats, bool(other_grad), cap, other_cap)
    return targets, mask, row_temperature, other_row_temperature, options


def _pair(
    function: str,
    logits: Any,  # tensors, or DTensors
    other: Any,
    targets: Any,
    *,
    at: Columns,
    vocab: int | None,
    inplace_backward: bool,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """(divergence, logp, entropy, logsumexp, other_logp, other_entropy, other_logsumexp)"""
    if is_dtensor(logits):
        if not is_dtensor(other):
            raise TypeError(f"other must be a DTensor like logits, got {type(other).__name__}")
        local, of_columns, placed = local_columns("logits", logits, at.group, at.vocab_start, at.vocab_size)
        other = other.redistribute(logits.device_mesh, logits.placements).to_local()
        options |= {name: placed.local(options[name]) for name in ("mask", "temperature", "other_temperature")}
        at = Columns(**of_columns, segments=at.segments)
        results = _pair(function, local, other, placed.local(targets), at=at, vocab=vocab, inplace_backward=inplace_backward, **options)
        return tuple(map(placed.whole, results)) if is_dtensor(targets) else results
    sharded = is_sharded(*at)

    def checked() -> tuple:
        least = 1 if at.group is None else 0
        check_logits(logits, least=least)
        check_logits(other, "other", least)
        expect("other", other, "float", "[..., V]", shape=(*logits.shape[:-1], other.shape[-1]), like=("logits", logits))
        check_flags(inplace_backward=inplace_backward)
        if inplace_backward:
            check_inplace(logits)
        widths = {"logits": logits.shape[-1], "other": other.shape[-1]}
        if sharded:
            _check_shard(widths, vocab)
        *by_row, o = pair_options(logits, targets, of="logits", widths=widths, counted="columns", vocab=vocab, **options)
        if not sharded:
            return *by_row, o
        if o.kind in REFERENCE_ONLY:
            raise ValueError(f"kind={options['kind']!r} takes no group, vocab_start, vocab_size or segments: expected another kind")
        return *by_row, o._replace(vocab=0)  # the ranks will say

    if sharded:
        shard, (*by_row, o) = agreed_pairs(function, logits, other, options["kind"], at, checked)
    else:
        *by_row, o = checked()
    if (logits.dtype == torch.float64) != (other.dtype == torch.float64):
        other = other.to(computing_dtype(logits))
    other = other if o.other_grad else other.detach()
    if sharded:
        return sharded_pair_rows(shard, logits, other, *by_row, o, in_place=bool(inplace_backward))
    return pair_rows(logits, other, *by_row, *o, in_place=bool(inplace_backward))


def _check_shard(widths: dict[str, int], vocab: int | None) -> None:
    if vocab is not None:
        raise ValueError(f"vocab is for whole rows: with group, vocab_start, vocab_size or segments give vocab_size alone, got vocab={shown(vocab)}")
    if len(set(widths.values())) > 1:
        raise ValueError(f"logits and other must hold the same columns, got {widths['logits']} and {widths['other']}")


def token_divergence(
    logits: Tensor,
    other: Tensor,
    *,
    kind: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    other_temperature: float | Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    other_logit_scale: float | None = None,
    other_softcap: float | None = None,
    mask: Tensor | None = None,
    vocab: int | None = None,
    other_grad: bool = False,
    inplace_backward: bool = False,
    group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    segments: int | None = None,
) -> Tensor:
    """Full-vocabulary divergence by row of p = softmax(logits / temperature), the student or policy, and
    q = softmax(other / other_temperature), the teacher or reference:

        kind               value
        "reverse_kl"       KL(p, q) = sum p log(p / q)
        "forward_kl"       KL(q, p)
        "mixed_kl"         beta KL(q, p) + (1 - beta) KL(p, q)
        "cross_entropy"    -sum q log p, for soft labels
        "jsd"              beta KL(q, M) + (1 - beta) KL(p, M), M = beta q + (1 - beta) p
                           (GKD, arXiv 2306.13649)
        "skew_forward_kl"  KL(q, beta q + (1 - beta) p) (DistiLLM, arXiv 2402.03898, alpha = beta)
        "skew_reverse_kl"  KL(p, beta p + (1 - beta) q)
        "alpha"            (1 - sum q^beta p^(1 - beta)) / (beta (1 - beta)) (Amari), in plain PyTorch
        "total_variation"  sum |p - q| / 2, in plain PyTorch

    The KL kinds and the cross entropy read both rows once, the others twice; the gradient reads both once and
    writes once. Equal rows give exactly 0. Values keep their relative accuracy however close the rows are,
    also where a constant lies between them: mostly 1e-7 in float32. There are two limits. With two
    temperatures, scales or softcaps an error of 1e-7 of the logits counts as a difference of the rows. And as
    beta nears 1 the skewed kinds compare rows that are all but equal: their accuracy is 1e-5 at 0.9 and 1e-3
    at 0.99.

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64, any leading strides; the gradient flows here.
        other: [..., V] in any of these dtypes; float64 is rounded to float32 unless the logits are float64.
        beta: see the table; 0 < beta < 1, for "mixed_kl" 0 <= beta <= 1, for "alpha" 0.001 <= beta <= 0.999.
            The other kinds do not use it.
        temperature, other_temperature: a positive float, or a tensor [...] with one a row, anything in rows
            that are not read. No gradient. other_temperature=None is `temperature`: soft labels that are
            ready as they are want other_temperature=1.
        logit_scale, softcap: what the models do with their raw logits, as in `token_stats`. The gradient is
            by the raw logits. Not for the `.logits` of a Hugging Face model: those are capped already.
        other_logit_scale, other_softcap: the same of `other`. None is that of `logits`, as for two models of
            one family; other_softcap=math.inf is no softcap. `logit_transforms(config, other=True)` of
            `rlkern.integrations` has both.
        mask: [...] bool or number; rows where it is 0 are not read: 0 out, zero gradient.
        vocab: the number of columns that count, for logits of different widths. Columns beyond are not read,
            and their gradient is 0.
        other_grad: whether `other` takes a gradient too; not for "cross_entropy". Without it `other` is
            used detached.
        inplace_backward: write the gradient over the logits, as in `token_stats`.
        group, vocab_start, vocab_size, segments: columns of the rows on several ranks, as in `token_stats`.
            `other` is cut like the logits, and a DTensor if they are. The forward is one gather of 14 numbers
            a row, of a mixture one more of 2, the backward none. vocab_size takes the place of vocab. Not for
            "alpha" and "total_variation".

    Returns:
        [...] in float32 (float64 for float64 logits), freshly allocated. Weights, clamps and a factor
        temperature^2 are left to the caller; `aggregate` reduces it.

        An entry at -inf has probability 0. On both sides it contributes nothing. On one side it makes a KL
        infinite whose first argument has mass there: +inf. Its gradient is NaN, but zero where the upstream
        gradient of the row is 0. The mixtures stay finite. A row with a NaN, with +inf or with nothing above
        -inf is NaN.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices or options other than the above; over a group as
            `token_stats`.
    """
    return _pair(
        "token_divergence",
        logits,
        other,
        None,
        kind=kind,
        beta=beta,
        temperature=temperature,
        other_temperature=other_temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        other_logit_scale=other_logit_scale,
        other_softcap=other_softcap,
        mask=mask,
        vocab=vocab,
        other_grad=other_grad,
        inplace_backward=inplace_backward,
        at=Columns(group, vocab_start, vocab_size, segments),
        ignore_index=-100,
        with_stats=False,
    )[0]  # type: ignore[return-value]


def pair_stats(
    logits: Tensor,
    other: Tensor,
    targets: Tensor | None = None,
    *,
    kind: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    other_temperature: float | Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    other_logit_scale: float | None = None,
    other_softcap: float | None = None,
    mask: Tensor | None = None,
    vocab: int | None = None,
    other_grad: bool = False,
    inplace_backward: bool = False,
    group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    segments: int | None = None,
    ignore_index: int = -100,
) -> PairStats:
    """`token_divergence` with the log-probabilities and entropies of both rows, from one read of each.

    All gradients by the logits go into one write. Distillation with a policy loss or an entropy bonus needs
    nothing else: KDRL's exact form, GKD with an entropy term, or the control variate of arXiv 2605.07865,
    other_logp - logp + divergence.

    Args:
        targets: [...] integer token ids, or None.
        ignore_index: a target that marks its row as masked.
        others: as in `token_divergence`.

    Returns:
        PairStats(divergence, logp | None, other_logp | None, entropy, other_entropy, logsumexp,
        other_logsumexp), each [...] in float32 (float64 for float64 logits), freshly allocated. logp, entropy
        and logsumexp are those of `token_stats(logits, targets)` and carry gradients like the divergence. The
        other's are detached, even with other_grad.

    Raises:
        TypeError, ValueError: for dtypes, shapes, devices or options other than the above.
        IndexError: for a target outside the vocabulary, as in `token_stats`.
    """
    divergence, logp, entropy, logsumexp, other_logp, other_entropy, other_logsumexp = _pair(
        "pair_stats",
        logits,
        other,
        targets,
        kind=kind,
        beta=beta,
        temperature=temperature,
        other_temperature=other_temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        other_logit_scale=other_logit_scale,
        other_softcap=other_softcap,
        mask=mask,
        vocab=vocab,
        other_grad=other_grad,
        inplace_backward=inplace_backward,
        at=Columns(group, vocab_start, vocab_size, segments),
        ignore_index=ignore_index,
        with_stats=True,
    )
    return PairStats(divergence, logp, other_logp, entropy, other_entropy, logsumexp, other_logsumexp)  # type: ignore[arg-type]


def gkd_kind(beta: float) -> tuple[str, float]:
    """kind and beta of `token_divergence` for the beta of GKD's trainers."""
    check_number("beta", beta, 0, 1)
    return ("jsd", beta) if 0 < beta < 1 else ("reverse_kl" if beta else "forward_kl", 0.5)


def gkd_divergence(logits: Tensor, other: Tensor, beta: float, **options) -> Tensor:
    """The divergence of GKD's trainers: beta = 0 is the forward KL, 1 the reverse KL, between them the jsd.

    The two ends are the KL divergences themselves, as in TRL. The limits of jsd / (beta (1 - beta)) are the
    same. The options are those of `token_divergence` without kind. Raises as that, TypeError for a kind, and
    ValueError for a beta outside [0, 1].
    """
    try:
        if "kind" in options:
            raise TypeError(f"gkd_divergence takes no kind, beta chooses it; got {options['kind']!r}")
        kind, beta = gkd_kind(beta)
    except Exception as error:
        refuse_rows(error, logits, Columns(options.get("group")))
    return token_divergence(logits, other, kind=kind, beta=beta, **options)
