"""The calling convention that all backends share, and the numbers that they agree on.

A backend is a module with these functions. They write into tensors that the operators allocated, and may
assume validated input. `CHECKS_TARGETS` says whether forwards check the range of targets.

Rows of logits:

    token_stats_forward(logits, targets, mask, temperature, ignore_index, kept_kind, log_kept, out,
                        softcap=0.0, keep=None, keep_out=None)
    token_stats_backward(logits, targets, mask, temperature, ignore_index, kept_kind, state, grads, out,
                         softcap=0.0, keep=None, full=None)

    logits       [A, B, V], any strides over A and B, last stride 1; row r is (r // B, r % B), N = A * B
    targets      [N, K] int64 contiguous, or None (K = 0); ELSEWHERE: a target in columns that are not these
    mask         [N] bool contiguous, or None; a row is skipped if it is False or all targets are ignored
    temperature  float, or [N] contiguous in the accumulation dtype (float64 for float64 logits, else float32)
    kept_kind    a `KeptKind`; log_kept = log k, for those with a k
    out          forward: (logp [.., K], entropy, logsumexp, sum_sq_prob, kept_logmass,
                 state [.., State.TARGETS + K]), contiguous, N rows; all but logsumexp and state may be None
                 backward: [A, B, V] of the logits' dtype, last stride 1; may be `logits` itself
    grads        upstream gradients (logp, entropy, logsumexp, sum_sq_prob, kept_logmass), contiguous,
                 in the accumulation dtype; each may be None
    softcap      0, or c > 0: the rows are x = tanh(logits / c), also in `state`, and the temperature is for
                 these. -inf stays -inf. The gradient is by the logits. The slope of x by them keeps its
                 relative accuracy: 4 r / (1 + r)^2 / c with r = exp(-2 |logits| / c).

`state` holds what the backward needs of a row, in the accumulation dtype and the columns of `State`. A
backward can continue from the forward of any backend.

Skipped rows are not read. They are zero in every output, in `state` and in the gradient. An ignored entry of
a row that is not skipped has logp 0 and no gradient. A row whose upstream gradients are all zero gets a zero
gradient without being read.

The logits may be some columns of a row. The forward's state is then that of a part of the row, NaN at a
target that is ELSEWHERE. The backward takes the state of the whole row. A target ELSEWHERE counts in what
its logp sends to all columns. It is not counted as ignored. Of whole rows from their parts:

    token_stats_merge(parts, targets, mask, temperature, ignore_index, kept_kind, log_kept, out)
    token_stats_kept_masses(logits, targets, mask, temperature, ignore_index, kept_kind, state, out,
                            softcap=0.0)

    parts        [P, N, State.TARGETS + K], P >= 1, the forward's state of each part, any strides over P and
                 N, last stride 1; KEPT and THRESHOLD are not used. Columns that are all -inf leave MAX -inf,
                 and -inf at targets among them: of such a part only the targets count
    targets      token_stats_merge: of the whole rows. They only say which entries are ignored
    out          token_stats_merge: as of token_stats_forward, with kept_logmass None. The order of additions
                 depends on P alone. A target that is NaN in all parts is NaN. THRESHOLD as kept_kind asks,
                 KEPT 0
                 token_stats_kept_masses: [N, 2] contiguous: the sums of e^((x - MAX) / T) over the columns of
                 the part that are kept and over the others; zeros in skipped rows
    state        that of the whole rows. kept_logmass is -log1p(sum of the others / sum of the kept)

With `keep`, a `Keep`, each row's softmax is over a set S' of ids: its set S, and what `outside` says. All of
the above, also `state` and the sets of kept_kind, is then that of a row at -inf outside S'. But nothing that
stands there counts, not even NaN. The gradient there is exactly 0. There are targets. One that is ELSEWHERE
adds nothing to S', and is not what `outside` asks about.

    keep_out     forward: (target_kept [N, K] bool, full_entropy, full_logsumexp, full_state [N, 3]). The last
                 three may be None; they are of the whole row, without S': State.MAX, REST and MEAN_U.
                 target_kept: S has the target, or the row has no set. True for ignored targets and in rows
                 that are skipped
    full         backward: (full_state, upstream gradient of full_entropy, of full_logsumexp), or None. A
                 gradient may be None. It goes to all columns
    grads        those of logp are 0 at targets outside S'

Two rows at once, logits and those of another policy:

    pair_forward(logits, other, targets, mask, temperature, other_temperature, ignore_index, kind, beta, out,
                 softcap=0.0, other_softcap=0.0)
    pair_backward(logits, other, targets, mask, temperature, other_temperature, ignore_index, kind, beta,
                  state, grads, out, softcap=0.0, other_softcap=0.0)

    logits, mask, temperature, ignore_index, softcap  as above
    other              [A, B, V] as logits, in any dtype but float64; float64 beside float64 logits
    targets            [N, 1] or None; ELSEWHERE as above
    other_softcap      of other; as softcap
    other_temperature  as temperature; a float where temperature is one, a tensor where it is one
    kind, beta         a `PairKind` and its parameter, see primitives/divergence.py; only the reference has
                       ALPHA and TOTAL_VARIATION
    out                forward: (divergence, logp, entropy, logsumexp, other_logp, other_entropy,
                       other_logsumexp, state [.., PairState.WIDTH]), contiguous, N rows; all but divergence
                       and state may be None; the logp are None without targets, and the other_* are all None
                       or all there but for that
                       backward: [A, B, V] of the logits' dtype, last stride 1; may be `logits` itself
    grads              upstream gradients (divergence, logp, entropy, logsumexp), as above

Skipped rows, ignored targets and rows without upstream gradient are as above. The gradient by `other` is
that by logits with both rows' places exchanged: primitives/pair_rows.py does that.

Both may be the same columns of whole rows, as above. Of whole rows from their parts:

    pair_merge(parts, mask, temperature, other_temperature, kind, beta, out)
    pair_mixture_sums(logits, other, mask, temperature, other_temperature, kind, beta, state, out,
                      softcap=0.0, other_softcap=0.0)

    parts        [P, N, PairPart.WIDTH], P >= 1: of each part the forward's state, and what PairPart adds.
                 With MAX -inf nothing else of the logits counts, with OTHER_MAX -inf nothing else of other
    kind         pair_mixture_sums: JSD or later
    state        that of whole rows, with REF = MAX
    out          pair_merge: as of pair_forward, with REF = MAX. Parts are added in their order. Of a mixture
                 the divergence and both MEAN_SLOPE are not there yet
                 pair_mixture_sums: [N, 2] contiguous, sum p f and sum p g over the columns of the part. Their
                 sums over all parts are the divergence and MEAN_SLOPE. Zeros in skipped rows

Moments of rows, and the entropy of softmax((logits - reference) / T):

    row_moments_forward(logits, targets, mask, ignore_index, out)
    row_moments_backward(logits, targets, mask, ignore_index, mean, grads, out)
    did_entropy_forward(logits, reference, mask, temperature, out)
    did_entropy_backward(logits, reference, mask, temperature, state, grad, out)

    logits, mask, temperature, ignore_index   as above
    targets      [N, 1], as above
    reference    [A, B, V] like the logits, with strides and a dtype of its own; float64 only beside float64
    out          row_moments_forward: (centred target [N], variance [N], mean [N, 2]), contiguous
                 row_moments_backward: as that of token_stats_backward, but never `logits` itself
                 did_entropy_forward: (entropy [N], state [N, State.TARGETS]), contiguous
                 did_entropy_backward: (gradient of the logits, of the reference), each may be None
    mean         the sum of two numbers, in the accumulation dtype: one alone is too far off where the
                 variance is small
    grads, grad  upstream gradients (target, variance), each may be None; of the entropy

A row of moments with an infinite or NaN logit is NaN. Backwards continue from the forward of any backend.

The output matrix at listed ids, and statistics of each row's:

    kept_logits(hidden, weight, bias, ids, row, out)
    kept_hidden_gradient(weight, ids, offsets, grad, out)
    kept_weight_gradient(hidden, ids, row, grad, out)
    kept_rows_forward(logits, ids, row, offsets, targets, counted, temperature, out)
    kept_rows_backward(logits, row, offsets, place, temperature, state, grads, out)

    ids, row     [P] int32, the pairs: row r has those in [offsets[r], offsets[r + 1]), row N stands for none.
                 An id of V is outside the vocabulary: its logit is NaN, and nothing of it is read.
                 kept_weight_gradient takes pairs and `grad` sorted by id, of each in the order of rows
    offsets      [N + 1] int64
    hidden       [A, B, H], any strides over A and B, last stride 1
    weight       [1, V, H], any stride over V; bias [V] contiguous, or None; of hidden's dtype
    logits, grad [P] contiguous in the accumulation dtype; beyond the last pair their values are not used
    out          kept_logits: [P], 0 beyond the last pair
                 kept_hidden_gradient: [N, H] contiguous, all of it written
                 kept_weight_gradient: [V, H] contiguous, zeros
                 kept_rows_forward: (logp [N, K], entropy, logsumexp, sum_sq_prob, state [N, State.KEPT],
                 place [N, K] int32); entropy and sum_sq_prob may be None
                 kept_rows_backward: [P], zeros
    targets      [N, K] int32, -1 where ignored: logp 0 and no gradient; -inf where the row lacks it
    place        where a row has its target first, from 0 on; -1: nowhere
    counted      [N] bool: other rows have no pairs, and are zero in every output
    state        the first columns of State
    grads        upstream gradients (logp, entropy, logsumexp, sum_sq_prob), contiguous, each may be None

Dot products along H and sums over pairs are in the accumulation dtype, in an order that depends on H, on the
row's list or on the id's pairs alone.

What a sampler's rules keep of each row, as its smallest logit:

    sampler_threshold(logits, mask, temperature, top_k, top_p, log_min_p, joint, out)

    logits, mask, temperature   as above
    top_k        0: off; at most V
    top_p        1: off
    log_min_p    -inf: off
    joint        top_p is of the whole row's mass, else of the mass that the other two left
    out          [N] in the accumulation dtype: the smallest logit that all rules keep, -inf in skipped rows,
                 NaN in undefined ones

No rule keeps -inf. With u = (x - m) / T in float64: min_p keeps x >= m + log_min_p T; top_k keeps x >= the
top_k-th largest; top_p keeps x if the masses of the greater ones add up to less than top_p times the total,
a mass being e^u 2^mass_bits(V), rounded to an integer. Integers have one sum in any order.

One number a token, over all tokens of a batch:

    token_covariance(logp, advantages, mask, sums, out)
    select_bottom(values, valid, count, out)
    select_fraction(values, valid, group, fraction, minimum, least, out)
    selected_means(values, selected, mask, out)
    ratio_terms(logp, old_logp, advantages, mask, unclipped, bounds, out)
    kl_terms(logp, reference, mask, kind, straight_through, clamp, out)

    logp, advantages, values  [N] contiguous, all float32 or all float64; N >= 1 in the first two functions
    mask, valid, group        [N] bool contiguous; the covariance masks tokens whose logp is not finite
    sums             [1, 3] float64: (counted tokens, sum of their logp, sum of their advantages), or None for
                     those of these tokens
    count            0-d int64 on the device; bounded to [0, number of valid entries]
    out              [N]: the covariances, 0 where masked; or bool, True for the `count` smallest valid
                     values; NaN is the largest, both zeros are equal, equals are in order of their index
    select_fraction  as select_bottom with count = max(floor(fraction * size of the group), minimum), the
                     product in float64, or with 0 if that is less than `least`
    selected_means   out [3]: the selected fraction of the mask, the mean of the values over the mask, and
                     that over the selected; 0 of nothing
    ratio_terms      see primitives/ratio.py; old_logp and unclipped may be None;
                     bounds (low, high, dual, least, most);
                     out (terms [2, N], free [N] bool, summary [len(SUMMARY)])
    kl_terms         see primitives/kl.py; kind a `KLKind`; out [2, N]

The rows of [2, N] are values and their derivatives by logp.

Sums over the sequences of a pack:

    sequence_sums(values, mask, cu_seqlens, out)

    values       [K, N] contiguous, float32 or float64; masked places may hold anything
    mask         [N] bool contiguous
    cu_seqlens   [S + 1] int64 contiguous, S >= 1; sequence i is [cu_seqlens[i], cu_seqlens[i + 1]). On a GPU
                 nobody has checked them: places outside [0, N) are not read
    out          [K, S] float64: sums in float64 of the counted values, 0 of nothing. The order in which a
                 sequence is added up depends on its own tokens alone

and back, a number of each sequence to its tokens:

    sequence_spread(x, mask, seq_idx, out)

    x            [S] contiguous, float32 or float64
    mask         [N] bool contiguous, or None: all count
    seq_idx      [N] int64 contiguous, the sequence of each token; outside [0, S): none
    out          [N] as x: 0 where a token has no sequence or does not count
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class State:
    """Columns of `state`, with u = (x - m) / T. From TARGETS on: x[y_k] - m, NaN for y_k outside [0, V)."""

    MAX = 0  # m = max x
    REST = 1  # sum exp(u) - 1: without the 1 of the maximum itself
    MEAN_U = 2  # sum p u
    SUM_SQ = 3
    KEPT = 4  # kept_logmass
    THRESHOLD = 5  # x is kept where x - m >= this; of UNLISTED, -inf, all but the targets are
    TARGETS = 6


class KeptKind:
    NONE = 0
    MIN_P = 1  # p >= k * max p
    MIN_PROB = 2  # p >= k
    UNLISTED = 3  # no target of the row, or one equal to ignore_index


class SetKind:
    LISTS = 0  # of ids; negative ones are padding
    BITS = 1  # bit v % 8 of byte v / 8
    MASK = 2  # bool
    AT_LEAST = 3  # logits >= a threshold, as they are: without softcap or temperature


class Outside:
    """What S' is where a target is not in S. With several targets a row, MINUS_INF."""

    INCLUDE = 0  # S and the target
    EVERYTHING = 1  # all ids
    MINUS_INF = 2  # S


class Keep(NamedTuple):
    """The ids that the softmax of each row is over, before `outside`.

    A row without a list, or with an empty one where `open_empty`, is over all ids. So is one with a NaN
    threshold. A list with an id >= V, or a row that names a list beyond the last, makes the row NaN if it is
    not skipped; native raises IndexError. Ends of lists outside [0, M] are moved there. An id that a list
    holds twice may count twice. The order of a list may change last bits; padding may not.
    """

    kind: int  # a `SetKind`
    sets: Tensor  # LISTS: [M] int32 or int64 contiguous. BITS: [A, B, bytes] uint8, MASK: [A, B, V], each with any
    # strides over A and B, last stride 1. AT_LEAST: [N] contiguous in the accumulation dtype
    outside: int
    begin: Tensor | None = None  # LISTS: [R] int64, list j is sets[begin[j] : end[j]]; None: N lists of M / N ids
    end: Tensor | None = None
    rows: Tensor | None = None  # LISTS: [N] int64, the list of each row, negative for none; None: R = N, in order
    open_empty: bool = False


class PairState:
    """Columns of a pair's `state`. p and q are the distributions of logits z and other w. The log ratio
    log(q / p) of an entry is (w - OTHER_REF) / other_temperature - (z - REF) / temperature + OFFSET.

    The references are near the normalisers, so the sum keeps its accuracy where p and q are all but equal.
    """

    MAX = 0  # as in State, of logits
    REST = 1
    MEAN_U = 2  # only if the entropy was asked for
    REF = 3
    OTHER_REF = 4
    OFFSET = 5
    MEAN_SLOPE = 6  # sum p g; NaN where the divergence is infinite; of SKEW_FORWARD_KL less 1 - beta if negative
    OTHER_MAX = 7  # MAX, REST and MEAN_SLOPE with the places exchanged; only if other_logsumexp was asked for
    OTHER_REST = 8
    OTHER_MEAN_SLOPE = 9
    TARGET = 10  # z[y] - MAX, NaN for y outside [0, V)
    WIDTH = 11


class PairPart:
    """Columns of a part of a pair, after those of PairState: the forward's results of the part."""

    DIVERGENCE = PairState.WIDTH
    OTHER_ENTROPY = DIVERGENCE + 1
    OTHER_LOGP = DIVERGENCE + 2
    WIDTH = DIVERGENCE + 3


class PairKind:
    REVERSE_KL = 0
    FORWARD_KL = 1
    MIXED_KL = 2
    CROSS_ENTROPY = 3
    JSD = 4
    SKEW_FORWARD_KL = 5
    SKEW_REVERSE_KL = 6
    ALPHA = 7
    TOTAL_VARIATION = 8


class KLKind:
    K1 = 0
    ABS = 1
    K2 = 2
    K3 = 3


# What ratio_terms reports over all tokens. `count` divides the means: it is `tokens`, but at least 1.
SUMMARY = (
    "count",
    *("clip_fraction_low", "clip_fraction_high", "clip_fraction_dual"),
    *("approx_kl_k1", "approx_kl_k3", "ratio_max", "ratio_min", "effective_sample_size"),
    *("tokens", "log_mean_ratio", "abs_log_ratio"),
)

ELSEWHERE = -(1 << 62) - 1  # in place of a target
LARGEST_EXPONENT = 80.0  # exp of it is finite in float32, with room for a product


def mass_bits(vocab: int) -> int:
    """Of the unit of sampler_threshold's masses: a row's total fits int64, one mass a float64 with room."""
    return min(50, 62 - (vocab - 1).bit_length())
