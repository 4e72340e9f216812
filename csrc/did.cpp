// The entropy of softmax((logits - reference) / T) for one instruction set: token_stats on tiles of the
// difference, which stay in the first-level cache. The forward reads both rows once. The backward reads them
// once and writes the gradient of each.

#include "rows.h"

namespace {

// x - r, -inf where x is -inf: mass 0, whatever r holds. -inf pads it to whole packs; returns how many logits
// these hold. In order, as the types may differ.
template <class T, class R>
int64_t difference(const T* x, const R* r, int64_t n, Acc<T>* out) {
  using A = Acc<T>;
  const AccPack<T> nothing = broadcast(A(-kInfinity));
  const auto write = [&](const T* x, const R* r, A* out) {
    const AccPack<T> of_x = load_in_order(x);
    store(out, select(of_x == A(-kInfinity), nothing, of_x - load_in_order(r)));
  };
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) {
    prefetch_next_tile(x + i);
    prefetch_next_tile(r + i);
    write(x + i, r + i, out + i);
  }
  if (i == n) return n;
  T last_x[kLanes<T>];
  R last_r[kLanes<T>] = {};
  for (T& at : last_x) at = Element<T>::minus_infinity();
  std::memcpy(last_x, x + i, (n - i) * sizeof(T));
  std::memcpy(last_r, r + i, (n - i) * sizeof(R));
  write(last_x, last_r, out + i);
  return i + kLanes<T>;
}

template <class T, class R>
void forward_row(const DidForward& call, int64_t row) {
  using A = Acc<T>;
  const T* x = row_of<T>(call, call.logits, row);
  const R* r = row_of<R>(call, call.reference, row);
  const A scale = A(kLog2E * inverse_temperature<A>(call, row));
  RowSums<A> of_row;
  for (int64_t start = 0; start < call.vocab; start += kTile) {
    A tile[kTile];
    const int64_t n = difference(x + start, r + start, std::min(kTile, call.vocab - start), tile);
    of_row.template add<false, true>(tile, n, scale, tile_after(tile));
  }
  const double s0 = of_row.sums.s0;
  const bool undefined = std::isinf(of_row.top) || std::isnan(s0);
  const double mean_u = undefined ? kNaN : kLn2 * of_row.sums.s1 / (1 + s0);
  A* state = static_cast<A*>(call.state) + row * State::TARGETS;
  state[State::MAX] = of_row.top;
  state[State::REST] = undefined ? A(kNaN) : A(s0);
  state[State::MEAN_U] = A(mean_u);
  state[State::SUM_SQ] = state[State::KEPT] = state[State::THRESHOLD] = 0;
  put<A>(call.entropy, row, std::log1p(s0) - mean_u);
}

template <class T, class R>
void forward_rows(const DidForward& call, int64_t begin, int64_t end) {
  using A = Acc<T>;
  for (int64_t row = begin; row < end; ++row) {
    if (!is_skipped(call, row)) {
      forward_row<T, R>(call, row);
      continue;
    }
    for (int64_t i = 0; i < State::TARGETS; ++i) put<A>(call.state, row * State::TARGETS + i, 0);
    put<A>(call.entropy, row, 0);
  }
}

template <class T, class R>
void backward_row(const DidBackward& call, int64_t row, T* d_x, R* d_r) {
  using A = Acc<T>;
  const T* x = row_of<T>(call, call.logits, row);
  const R* r = row_of<R>(call, call.reference, row);
  const A* state = static_cast<const A*>(call.state) + row * State::TARGETS;
  const A inv_t = inverse_temperature<A>(call, row);
  const double g = get<A>(call.g_entropy, row), weight = g * inv_t / (1 + double(state[State::REST]));
  Coefficients<A> c{};
  c.top = state[State::MAX];
  c.scale = A(kLog2E * inv_t);
  c.constant = A(weight * state[State::MEAN_U]);
  c.linear = A(-weight * kLn2);
  for (int64_t start = 0; start < call.vocab; start += kTile) {
    A tile[kTile];
    const int64_t left = std::min(kTile, call.vocab - start), n = difference(x + start, r + start, left, tile);
    // A NaN of a wider type may have a payload that rounding would lose.
    for (int64_t i = 0; i < n; i += kLanes<T>)
      store(tile + i, std::isnan(weight) ? broadcast(A(kNaN)) : gradient_of<A, Terms::linear>(load(tile + i), c));
    if (d_x) write_gradient(call.stream, tile, d_x + start, left, [](auto dz) { return dz; });
    if (d_r) write_gradient(call.stream_reference, tile, d_r + start, left, [](auto dz) { return broadcast(A(0)) - dz; });
  }
}

template <class T, class R>
void backward_rows(const DidBackward& call, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    T* d_x = call.out.data ? const_cast<T*>(row_of<T>(call, call.out, row)) : nullptr;
    R* d_r = call.reference_out.data ? const_cast<R*>(row_of<R>(call, call.reference_out, row)) : nullptr;
    if (!is_skipped(call, row) && get<Acc<T>>(call.g_entropy, row) != 0) {
      backward_row<T, R>(call, row, d_x, d_r);
      continue;
    }
    if (d_x) std::memset(d_x, 0, call.vocab * sizeof(T));
    if (d_r) std::memset(d_r, 0, call.vocab * sizeof(R));
  }
  if (call.stream || call.stream_reference) finish_stream();
}

// Calls f with a value of T and one of the reference's type. double goes with double alone.
template <class T, class F>
void with_reference(int dtype, F f) {
  with_type(dtype, [&](auto reference) {
    if constexpr (std::is_same_v<Acc<T>, Acc<decltype(reference)>>) f(T{}, reference);
  });
}
template <class Call, class F>
void with_types(const Call& call, F f) {
  with_type(call.dtype, [&](auto logit) { with_reference<decltype(logit)>(call.reference_dtype, f); });
}

}  // namespace

namespace rlkern {
namespace RLKERN_ISA {

void did_entropy_forward(const DidForward& call, int64_t begin, int64_t end) {
  with_types(call, [&](auto x, auto r) { forward_rows<decltype(x), decltype(r)>(call, begin, end); });
}

void did_entropy_backward(const DidBackward& call, int64_t begin, int64_t end) {
  with_types(call, [&](auto x, auto r) { backward_rows<decltype(x), decltype(r)>(call, begin, end); });
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
