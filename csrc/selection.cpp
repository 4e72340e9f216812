// Exactly K of the smallest values. The K-th key is found among integers that order as the values do. One
// pass in flat order then marks what lies below it, and as many of its equals as are still wanted.

#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>

#include "tokens.h"

namespace rlkern {
namespace {

template <class A>
using Key = std::conditional_t<sizeof(A) == 4, uint32_t, uint64_t>;

// Unsigned integers in the order of the values; both zeros alike, NaN last.
template <class A>
Key<A> key_of(A x) {
  constexpr Key<A> top = Key<A>(1) << (8 * sizeof(A) - 1);
  Key<A> bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x == 0) bits = 0;
  bits ^= bits & top ? ~Key<A>(0) : top;
  return x != x ? ~Key<A>(0) : bits;
}

template <class A>
void select_bottom(const A* values, const Flag* valid, int64_t n, int64_t count, bool* out) {
  const std::unique_ptr<Key<A>[]> keys(new Key<A>[n]);
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) {
    keys[total] = key_of(values[i]);
    total += bool(valid[i]);
  }
  count = std::min(count, total);
  if (count <= 0) {
    std::fill_n(out, n, false);
    return;
  }
  Key<A>* const last = keys.get() + count - 1;
  std::nth_element(keys.get(), last, keys.get() + total);
  const Key<A> threshold = *last;
  int64_t ties = count - std::count_if(keys.get(), last, [=](Key<A> key) { return key < threshold; });
  for (int64_t i = 0; i < n; ++i) {
    const Key<A> key = key_of(values[i]);
    const bool tie = bool(valid[i]) & (key == threshold);
    out[i] = (bool(valid[i]) & (key < threshold)) | (tie & (ties > 0));
    ties -= tie;
  }
}

}  // namespace

template <class A>
void SelectBottom<A>::run() const {
  select_bottom(values, valid, n, *count, out);
}

template <class A>
void SelectFraction<A>::run() const {
  const int64_t tokens = std::count_if(group, group + n, [](Flag flag) { return bool(flag); });
  const int64_t count = std::max(int64_t(double(tokens) * fraction), minimum);
  select_bottom(values, valid, n, count < least ? 0 : count, out);
}

template <class A>
void SelectedMeans<A>::run() const {
  int64_t tokens = 0, chosen = 0;
  double sum = 0, chosen_sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    tokens += bool(mask[i]);
    chosen += bool(selected[i]);
    sum += mask[i] ? values[i] : 0;
    chosen_sum += selected[i] ? values[i] : 0;
  }
  const double total = double(std::max<int64_t>(tokens, 1));
  out[0] = A(chosen / total);
  out[1] = A(sum / total);
  out[2] = A(chosen_sum / double(std::max<int64_t>(chosen, 1)));
}

template struct SelectBottom<float>;
template struct SelectBottom<double>;
template struct SelectFraction<float>;
template struct SelectFraction<double>;
template struct SelectedMeans<float>;
template struct SelectedMeans<double>;

}  // namespace rlkern
