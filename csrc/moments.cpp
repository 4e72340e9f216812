// row_moments for one instruction set. The forward reads a row once, its first tile twice. The backward reads
// and writes it once.
//
// Every tile is summed around the mean of those before it, the first around its own: sums around zero cancel
// in rows far from it. Tiles merge by the rule of Chan, Golub and LeVeque (1983), in double.

#include "rows.h"

namespace {

struct ShiftedSums {
  double sum, squares;  // of x - shift
};

template <class T>
ShiftedSums shifted_sums(const T* x, int64_t n, Acc<T> shift) {
  constexpr int64_t run = 16 * kLanes<T>;  // longer sums in the lanes' precision would lose digits
  ShiftedSums total{};
  int64_t i = 0;
  for (const int64_t whole = n / kLanes<T> * kLanes<T>; i < whole;) {
    AccPack<T> sum{}, squares{};
    for (const int64_t end = std::min(whole, i + run); i < end; i += kLanes<T>) {
      prefetch_next_tile(x + i);
      const AccPack<T> d = load(x + i) - shift;
      sum = sum + d;
      squares = squares + d * d;
    }
    total.sum += sum_lanes(sum);
    total.squares += sum_lanes(squares);
  }
  if (i == n) return total;
  T padded[kLanes<T>] = {};
  Acc<T> rest[kLanes<T>];
  std::memcpy(padded, x + i, (n - i) * sizeof(T));
  store(rest, load_in_order(padded));
  for (int64_t j = 0; j < n - i; ++j) {
    const double d = rest[j] - shift;
    total.sum += d;
    total.squares += d * d;
  }
  return total;
}

struct Moments {
  double count = 0, mean = 0, squares = 0;  // of x - mean

  void merge(const ShiftedSums& tile, double n, double shift) {
    const double apart = shift + tile.sum / n - mean, total = count + n;
    squares += tile.squares - tile.sum * tile.sum / n + apart * apart * count * n / total;
    mean += apart * n / total;
    count = total;
  }
};

template <class T>
Moments moments_of(const T* x, int64_t vocab) {
  using A = Acc<T>;
  const int64_t n = std::min(kTile, vocab);
  const A first = load_one(x);
  const A shift = first + A(shifted_sums(x, n, first).sum / n);
  Moments row;
  for (int64_t start = 0; start < vocab; start += kTile) {
    const int64_t n = std::min(kTile, vocab - start);
    const A around = start ? A(row.mean) : shift;
    row.merge(shifted_sums(x + start, n, around), n, around);
  }
  return row;
}

template <class T>
void forward_row(const MomentsForward& call, int64_t row) {
  using A = Acc<T>;
  const T* x = row_of<T>(call, call.logits, row);
  const Moments moments = moments_of(x, call.vocab);
  // Two numbers hold the mean: one alone is off by more than the spread of a row far from zero.
  A* mean = static_cast<A*>(call.state) + 2 * row;
  mean[0] = A(moments.mean);
  mean[1] = A(moments.mean - mean[0]);
  put<A>(call.centred_target, row, double(load_one(x + call.targets[row])) - mean[0] - mean[1]);
  put<A>(call.variance, row, moments.squares / call.vocab);
}

template <class T>
void forward_rows(const MomentsForward& call, int64_t begin, int64_t end) {
  using A = Acc<T>;
  for (int64_t row = begin; row < end; ++row) {
    if (!is_skipped(call, row)) {
      forward_row<T>(call, row);
      continue;
    }
    for (int64_t i = 0; i < 2; ++i) put<A>(call.state, 2 * row + i, 0);
    for (void* out : {call.centred_target, call.variance}) put<A>(out, row, 0);
  }
}

template <class T>
void backward_row(const MomentsBackward& call, int64_t row, T* out) {
  using A = Acc<T>;
  const T* x = row_of<T>(call, call.logits, row);
  const A* mean = static_cast<const A*>(call.state) + 2 * row;
  const double g_target = get<A>(call.g_target, row), g_variance = get<A>(call.g_variance, row);
  const double slope = 2 * g_variance / call.vocab, constant = -g_target / call.vocab;
  const int64_t y = call.targets[row];
  double at_target = constant + g_target;
  if (g_variance != 0) {
    const A a = A(slope), b = A(constant), head = mean[0], tail = mean[1];
    at_target += (double(load_one(x + y)) - head - tail) * slope;
    write_gradient(call.stream, x, out, call.vocab, [=](auto x) { return (x - head - tail) * a + b; });
  } else {  // no infinite logit times 0
    const AccPack<T> b = broadcast(A(constant));
    write_gradient(call.stream, x, out, call.vocab, [=](auto) { return b; });
  }
  if (g_target != 0) store_one(out + y, at_target);
}

template <class T>
void backward_rows(const MomentsBackward& call, int64_t begin, int64_t end) {
  using A = Acc<T>;
  for (int64_t row = begin; row < end; ++row) {
    T* out = const_cast<T*>(row_of<T>(call, call.out, row));
    if (is_skipped(call, row) || (get<A>(call.g_target, row) == 0 && get<A>(call.g_variance, row) == 0))
      std::memset(out, 0, call.vocab * sizeof(T));
    else
      backward_row<T>(call, row, out);
  }
  if (call.stream) finish_stream();
}

}  // namespace

namespace rlkern {
namespace RLKERN_ISA {

void row_moments_forward(const MomentsForward& call, int64_t begin, int64_t end) {
  with_type(call.dtype, [&](auto logit) { forward_rows<decltype(logit)>(call, begin, end); });
}

void row_moments_backward(const MomentsBackward& call, int64_t begin, int64_t end) {
  with_type(call.dtype, [&](auto logit) { backward_rows<decltype(logit)>(call, begin, end); });
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
