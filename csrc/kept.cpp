// The output matrix at listed ids, for one instruction set: logits of pairs (row, id), and gradients back.
// A sum's order depends on the width, or on the pairs of its row or id: never on threads or on other rows.

#include "rows.h"

namespace {

// Calls f(start, count) along a row. The count is that of the lanes, but for the end of the row.
template <class T, class F>
inline void for_each_pack(int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) f(i, kLanes<T>);
  if (i < n) f(i, n - i);
}

template <class T>
AccPack<T> load_some(const T* from, int64_t count) {
  if (count == kLanes<T>) return load(from);
  T padded[kLanes<T>] = {};
  std::memcpy(padded, from, count * sizeof(T));
  return load(padded);
}

template <class T>
void store_some(T* to, const AccPack<T>& p, int64_t count) {
  if (count == kLanes<T>) return store(to, p);
  T padded[kLanes<T>];
  store(padded, p);
  std::memcpy(to, padded, count * sizeof(T));
}

template <class T>
Acc<T> dot(const T* a, const T* b, int64_t n) {
  constexpr int64_t lanes = kLanes<T>;
  AccPack<T> even{}, odd{};  // two sums: each addition waits for the one before it
  int64_t i = 0;
  for (; i + 2 * lanes <= n; i += 2 * lanes) {
    even = even + load(a + i) * load(b + i);
    odd = odd + load(a + i + lanes) * load(b + i + lanes);
  }
  for_each_pack<T>(n - i, [&](int64_t j, int64_t count) { even = even + load_some(a + i + j, count) * load_some(b + i + j, count); });
  return sum_lanes(even + odd);
}

template <class T>
const T* row_at(const Matrix& matrix, int64_t inner, int64_t row) {
  return static_cast<const T*>(matrix.data) + row / inner * matrix.stride_outer + row % inner * matrix.stride_inner;
}

template <class T>
void logits_of(const KeptLogits& call, int64_t begin, int64_t end) {
  using A = Acc<T>;
  A* const out = static_cast<A*>(call.out);
  for (int64_t p = begin; p < end; ++p) {
    const int64_t row = call.row[p], id = call.ids[p];
    if (row == call.rows) {
      out[p] = 0;
    } else if (id == call.vocab) {
      out[p] = A(kNaN);
    } else {
      out[p] = dot(row_at<T>(call.hidden, call.inner, row), row_at<T>(call.weight, call.vocab, id), call.width);
      if (call.bias) out[p] += load_one(static_cast<const T*>(call.bias) + id);
    }
  }
}

// Adds scale * from[0..n) to sums, packs in the order of `load`.
template <class T>
void add_scaled(AccPack<T>* sums, const T* from, int64_t n, Acc<T> scale) {
  for_each_pack<T>(n, [&](int64_t i, int64_t count) { sums[i / kLanes<T>] = sums[i / kLanes<T>] + load_some(from + i, count) * scale; });
}

template <class T>
struct Slice {  // the sums of some columns
  AccPack<T> packs[kSlice / kLanes<T>];
  int64_t n;

  explicit Slice(int64_t columns) : n(columns) { std::memset(packs, 0, sizeof packs); }
  void write(T* out) const {
    for_each_pack<T>(n, [&](int64_t i, int64_t count) { store_some(out + i, packs[i / kLanes<T>], count); });
  }
};

template <class T>
void hidden_gradient(const KeptHidden& call, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const A* const grad = static_cast<const A*>(call.grad);
  for (int64_t row = begin; row < end; ++row)
    for (int64_t column = 0; column < call.width; column += kSlice) {
      Slice<T> sums(std::min(kSlice, call.width - column));
      for (int64_t p = call.offsets[row]; p < call.offsets[row + 1]; ++p) {
        const bool undefined = call.ids[p] == call.vocab;  // its gradient is NaN, which any id's row shows
        add_scaled(sums.packs, row_at<T>(call.weight, call.vocab, undefined ? 0 : call.ids[p]) + column, sums.n, grad[p]);
      }
      sums.write(static_cast<T*>(call.out) + row * call.width + column);
    }
}

// A task is a slice of columns of the ids whose first pairs are among kPart of them.
template <class T>
void weight_gradient(const KeptWeight& call, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const A* const grad = static_cast<const A*>(call.grad);
  const int64_t parts = (call.pairs + kPart - 1) / kPart;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t column = task / parts * kSlice, first = task % parts * kPart, last = std::min(first + kPart, call.pairs);
    int64_t p = first;
    while (p > 0 && p < last && call.ids[p] == call.ids[p - 1]) ++p;  // the part before has it
    while (p < last && call.ids[p] < call.vocab) {
      const int64_t id = call.ids[p];
      Slice<T> sums(std::min(kSlice, call.width - column));
      for (; p < call.pairs && call.ids[p] == id; ++p)
        add_scaled(sums.packs, row_at<T>(call.hidden, call.inner, call.row[p]) + column, sums.n, grad[p]);
      sums.write(static_cast<T*>(call.out) + id * call.width + column);
    }
  }
}

}  // namespace

namespace rlkern {
namespace RLKERN_ISA {

void kept_logits(const KeptLogits& call, int64_t begin, int64_t end) {
  with_type(call.dtype, [&](auto x) { logits_of<decltype(x)>(call, begin, end); });
}

void kept_hidden_gradient(const KeptHidden& call, int64_t begin, int64_t end) {
  with_type(call.dtype, [&](auto x) { hidden_gradient<decltype(x)>(call, begin, end); });
}

void kept_weight_gradient(const KeptWeight& call, int64_t begin, int64_t end) {
  with_type(call.dtype, [&](auto x) { weight_gradient<decltype(x)>(call, begin, end); });
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
