// The numbers that Python, C++ and Triton agree on. rlkern/backends/contract.py says what they mean.
#pragma once

#include <cstdint>

namespace rlkern {

// Values that count from 0. `names` lists their names for Python.
#define RLKERN_ENUM(Name, ...)                         \
  struct Name {                                        \
    enum { __VA_ARGS__ };                              \
    static constexpr const char* names = #__VA_ARGS__; \
  }

RLKERN_ENUM(DType, float32, float64, bfloat16, float16);
RLKERN_ENUM(State, MAX, REST, MEAN_U, SUM_SQ, KEPT, THRESHOLD, TARGETS);
RLKERN_ENUM(KeptKind, NONE, MIN_P, MIN_PROB, UNLISTED);
RLKERN_ENUM(SetKind, LISTS, BITS, MASK, AT_LEAST);
RLKERN_ENUM(Outside, INCLUDE, EVERYTHING, MINUS_INF);
RLKERN_ENUM(PairState, MAX, REST, MEAN_U, REF, OTHER_REF, OFFSET, MEAN_SLOPE, OTHER_MAX, OTHER_REST, OTHER_MEAN_SLOPE, TARGET, WIDTH);
RLKERN_ENUM(PairKind, REVERSE_KL, FORWARD_KL, MIXED_KL, CROSS_ENTROPY, JSD, SKEW_FORWARD_KL, SKEW_REVERSE_KL, ALPHA, TOTAL_VARIATION);
RLKERN_ENUM(KLKind, K1, ABS, K2, K3);
RLKERN_ENUM(Summary, count, clip_fraction_low, clip_fraction_high, clip_fraction_dual, approx_kl_k1, approx_kl_k3, ratio_max, ratio_min,
            effective_sample_size, tokens, log_mean_ratio, abs_log_ratio);
#undef RLKERN_ENUM

constexpr int64_t ELSEWHERE = -(int64_t(1) << 62) - 1;
constexpr double LARGEST_EXPONENT = 80;

}  // namespace rlkern
