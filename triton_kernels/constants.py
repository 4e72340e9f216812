"""The numbers that kernels share with the other backends. rlkern/backends/contract.py says what they mean."""

import triton.language as tl

(
    STATE_MAX, STATE_REST, STATE_MEAN_U, STATE_SUM_SQ, STATE_KEPT, STATE_THRESHOLD, STATE_TARGETS,
) = (tl.constexpr(column) for column in range(7))  # fmt: skip

(
    PAIR_MAX, PAIR_REST, PAIR_MEAN_U, PAIR_REF, PAIR_OTHER_REF, PAIR_OFFSET, PAIR_MEAN_SLOPE,
    PAIR_OTHER_MAX, PAIR_OTHER_REST, PAIR_OTHER_MEAN_SLOPE, PAIR_TARGET, PAIR_WIDTH,
) = (tl.constexpr(column) for column in range(12))  # fmt: skip

PART_DIVERGENCE, PART_OTHER_ENTROPY, PART_OTHER_LOGP = (tl.constexpr(column) for column in range(11, 14))

(
    PAIR_KIND_REVERSE_KL, PAIR_KIND_FORWARD_KL, PAIR_KIND_MIXED_KL, PAIR_KIND_CROSS_ENTROPY,
    PAIR_KIND_JSD, PAIR_KIND_SKEW_FORWARD_KL, PAIR_KIND_SKEW_REVERSE_KL, PAIR_KIND_ALPHA, PAIR_KIND_TOTAL_VARIATION,
) = (tl.constexpr(kind) for kind in range(9))  # fmt: skip

KEPT_NONE, KEPT_MIN_P, KEPT_MIN_PROB, KEPT_UNLISTED = (tl.constexpr(kind) for kind in range(4))
SET_LISTS, SET_BITS, SET_MASK, SET_AT_LEAST = (tl.constexpr(kind) for kind in range(4))
OUTSIDE_INCLUDE, OUTSIDE_EVERYTHING, OUTSIDE_MINUS_INF = (tl.constexpr(rule) for rule in range(3))
KL_K1, KL_ABS, KL_K2, KL_K3 = (tl.constexpr(kind) for kind in range(4))

(
    SUMMARY_COUNT, SUMMARY_CLIP_FRACTION_LOW, SUMMARY_CLIP_FRACTION_HIGH, SUMMARY_CLIP_FRACTION_DUAL,
    SUMMARY_APPROX_KL_K1, SUMMARY_APPROX_KL_K3, SUMMARY_RATIO_MAX, SUMMARY_RATIO_MIN, SUMMARY_EFFECTIVE_SAMPLE_SIZE,
    SUMMARY_TOKENS, SUMMARY_LOG_MEAN_RATIO, SUMMARY_ABS_LOG_RATIO,
) = (tl.constexpr(column) for column in range(12))  # fmt: skip

ELSEWHERE = tl.constexpr(-(1 << 62) - 1)
LARGEST_EXPONENT = tl.constexpr(80.0)
