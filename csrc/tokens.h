// Statistics over all tokens of a batch, one number a token; rlkern/backends.py says what each argument means. `A` is float or double.
// They read a few bytes a token and run on the calling thread, so one build serves all instruction sets.
#pragma once

#include <cstdint>

namespace rlkern {

// sums[3]: how many tokens count, the sums of their logp and of their advantages.
template <class A>
void covariance_sums(const A* logp, const A* advantages, const bool* mask, int64_t n, double* sums);
template <class A>
void covariance(const A* logp, const A* advantages, const bool* mask, int64_t n, const double* sums, A* out);

template <class A>
void select_bottom(const A* values, const bool* valid, int64_t n, int64_t count, bool* out);

}  // namespace rlkern
