// Sums over packed sequences, in float64, and numbers of sequences back to their tokens. A sequence is added up
// in eight lanes by the place of a token in it, folded in one order: what stands around it does not change a
// bit, nor does the processor.

#include <algorithm>
#include <vector>

#include "keep.h"
#include "tokens.h"

namespace rlkern {

template <class A>
void SequenceSums<A>::run() const {
  using Int = typename TokenBits<A>::Int;
  constexpr int64_t lanes = 8;
  const auto place = [&](int64_t i) { return std::clamp<int64_t>(cu_seqlens[i], 0, n); };
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < sequences; ++i) {
      const int64_t begin = place(i), length = place(i + 1) - begin;
      const A* const x = values + row * n + begin;
      const Flag* const counted = mask + begin;
      double sums[lanes] = {};
      int64_t at = 0;
      for (; at + lanes <= length; at += lanes)
        for (int64_t lane = 0; lane < lanes; ++lane) sums[lane] += double(keep(x[at + lane], -Int(bool(counted[at + lane]))));
      for (int64_t lane = 0; at + lane < length; ++lane) sums[lane] += double(keep(x[at + lane], -Int(bool(counted[at + lane]))));
      out[row * sequences + i] = ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
    }
  }
}

template <class A>
void SequenceSpread<A>::run() const {
  using Int = typename TokenBits<A>::Int;
  std::vector<A> numbers(sequences + 1);  // the last is that of no sequence
  std::copy_n(values, sequences, numbers.begin());
  const A* const x = numbers.data();
  const auto own = [&](int64_t i) { return x[std::min<uint64_t>(seq_idx[i], sequences)]; };
  if (mask)
    for (int64_t i = 0; i < n; ++i) out[i] = keep(own(i), -Int(bool(mask[i])));
  else
    for (int64_t i = 0; i < n; ++i) out[i] = own(i);
}

template struct SequenceSums<float>;
template struct SequenceSums<double>;
template struct SequenceSpread<float>;
template struct SequenceSpread<double>;

}  // namespace rlkern
