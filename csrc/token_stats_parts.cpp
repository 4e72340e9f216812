// token_stats of whole rows from the states of their parts, for one instruction set. A row is a lane: its parts
// are added in their order, and which rows are beside it changes nothing.

#include "token_row.h"

namespace {

constexpr int kRows = Pack<double>::lanes;

template <class A>
const A* part_of_row(const Merge& call, int64_t part, int64_t row) {
  return static_cast<const A*>(call.logits.data) + part * call.logits.stride_outer + row * call.logits.stride_inner;
}

// The maxima of a pack of rows, NaN where a part's is, and the first part that has each.
struct Tops {
  double top[kRows], first[kRows];
};
template <class A>
Tops tops_of(const Merge& call, const int64_t* rows) {
  Tops tops{};
  for (double& top : tops.top) top = -kInfinity;
  for (int64_t part = 0; part < call.parts; ++part)
    for (int i = 0; i < kRows; ++i) {
      const double top = part_of_row<A>(call, part, rows[i])[State::MAX];
      if (!(top > tops.top[i] || std::isnan(top))) continue;
      tops.top[i] = top;
      tops.first[i] = double(part);
    }
  return tops;
}

// The row's targets, found in the parts that have them.
template <class A>
void merge_targets(const Merge& call, int64_t row, const Distribution<A>& d, A inv_t) {
  A* shifted = static_cast<A*>(call.state) + row * (State::TARGETS + call.n_targets) + State::TARGETS;
  std::fill(shifted, shifted + call.n_targets, A(kNaN));
  for (int64_t part = 0; part < call.parts; ++part) {
    const A* of_part = part_of_row<A>(call, part, row);
    const double below = of_part[State::MAX] == d.top ? 0 : double(of_part[State::MAX]) - d.top;
    for (int64_t k = 0; k < call.n_targets; ++k) {
      const A found = A(of_part[State::TARGETS + k] + below);
      if (!std::isnan(found) && !(found <= shifted[k])) shifted[k] = found;
    }
  }
  const RowTargets y = targets_of(call, row);
  for (int64_t k = 0; k < y.n; ++k) put_target(call, row, k, y.ids[k] == y.ignored, shifted[k], d, inv_t);
}

// A pack of rows; `count` of them are written, and the others repeat one.
template <class A>
void merge_pack(const Merge& call, const int64_t* rows, int count) {
  const Tops tops = tops_of<A>(call, rows);
  double scales[kRows];
  for (int i = 0; i < kRows; ++i) scales[i] = kLog2E * inverse_temperature<A>(call, rows[i]);
  const Pack<double> top = load(tops.top), first = load(tops.first), scale = load(scales), zero{};
  // The 1 of the row's maximum itself is left out of `rest`, once. Every other part's is an ordinary entry.
  Pack<double> rest{}, linear{}, squares{};
  for (int64_t part = 0; part < call.parts; ++part) {
    double of_rows[State::SUM_SQ + 1][kRows];
    for (int i = 0; i < kRows; ++i) {
      const A* from = part_of_row<A>(call, part, rows[i]);
      for (int column = 0; column <= State::SUM_SQ; ++column) of_rows[column][i] = from[column];
    }
    const Pack<double> part_top = load(of_rows[State::MAX]), part_rest = load(of_rows[State::REST]);
    const Pack<double> t = (part_top - top) * scale, mass = power_of_two(t) * (part_rest + 1.0);
    const Mask<double> nothing = part_top == -kInfinity;
    rest = rest + select(nothing, zero, select(first == double(part), part_rest, mass));
    linear = linear + select(nothing, zero, mass * (load(of_rows[State::MEAN_U]) + finite_exponent(t) * kLn2));
    squares = squares + select(nothing, zero, mass * mass * load(of_rows[State::SUM_SQ]));
  }
  double rests[kRows], linears[kRows], sums_of_squares[kRows];
  store(rests, rest);
  store(linears, linear);
  store(sums_of_squares, squares);
  for (int i = 0; i < count; ++i) {
    const double mass = std::isinf(tops.top[i]) ? kNaN : 1 + rests[i];  // of -inf alone there is none, nor of a +inf
    const Distribution<A> d{A(tops.top[i]), mass == mass ? rests[i] : kNaN, linears[i] / mass, sums_of_squares[i] / (mass * mass),
                            mass == mass ? std::log1p(rests[i]) : kNaN};
    const A inv_t = inverse_temperature<A>(call, rows[i]);
    put_row(call, rows[i], d, inv_t);
    merge_targets(call, rows[i], d, inv_t);
  }
}

template <class A>
void merge_rows(const Merge& call, int64_t begin, int64_t end) {
  int64_t rows[kRows];
  int count = 0;
  for (int64_t row = begin; row < end; ++row) {
    if (is_skipped(call, row))
      skip_row<A>(call, row);
    else
      rows[count++] = row;
    if (count < kRows && (count == 0 || row + 1 < end)) continue;
    std::fill(rows + count, rows + kRows, rows[0]);
    merge_pack<A>(call, rows, count);
    count = 0;
  }
}

}  // namespace

namespace rlkern {
namespace RLKERN_ISA {

void token_stats_merge(const Merge& call, int64_t begin, int64_t end) {
  call.dtype == DType::float64 ? merge_rows<double>(call, begin, end) : merge_rows<float>(call, begin, end);
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
