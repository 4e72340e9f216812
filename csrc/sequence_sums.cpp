// Sums over packed sequences, in float64. A sequence is added up in eight lanes by the place of a token in it,
// folded in one order: what stands around it does not change a bit, nor does the processor.

#include <algorithm>

#include "tokens.h"

namespace rlkern {

template <class A>
void SequenceSums<A>::run() const {
  constexpr int64_t lanes = 8;
  const auto place = [&](int64_t i) { return std::clamp<int64_t>(cu_seqlens[i], 0, n); };
  for (int64_t row = 0; row < rows; ++row) {
    const A* const x = values + row * n;
    for (int64_t i = 0; i < sequences; ++i) {
      const int64_t begin = place(i), length = place(i + 1) - begin;
      double sums[lanes] = {};
      // Not a product with the mask, which would keep NaN.
      const auto add = [&](int64_t at, int64_t lane) { sums[lane] += mask[begin + at] ? double(x[begin + at]) : 0.0; };
      int64_t at = 0;
      for (; at + lanes <= length; at += lanes)
        for (int64_t lane = 0; lane < lanes; ++lane) add(at + lane, lane);
      for (int64_t lane = 0; at + lane < length; ++lane) add(at + lane, lane);
      out[row * sequences + i] = ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
    }
  }
}

template struct SequenceSums<float>;
template struct SequenceSums<double>;

}  // namespace rlkern
