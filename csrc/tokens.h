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

// How many tokens a fraction of a group stands for: at least `minimum`, and none where that makes fewer than `least`.
int64_t fraction_count(const bool* group, int64_t n, double fraction, int64_t minimum, int64_t least);

// means[3]: the fraction of the masked tokens that is selected, the mean of their values, and that of the selected ones' values.
template <class A>
void selected_means(const A* values, const bool* selected, const bool* mask, int64_t n, A* means);

// The ratio's clip, [low, high] and for negative advantages at most dual, and the bounds of its logarithm, [least, most].
struct RatioBounds {
  double low, high, dual, least, most;
};

template <class A>
void ratio_terms(const A* logp, const A* old_logp, const A* advantages, const bool* mask, const bool* unclipped, int64_t n,
                 const RatioBounds& bounds, A* values, A* slopes, bool* free, A* summary);
template <class A>
void kl_terms(const A* logp, const A* reference, const bool* where, int64_t n, int kind, bool straight_through, double clamp, A* values,
              A* slopes);

}  // namespace rlkern
