// token_stats of whole rows from the states of their parts, for one instruction set. A row is a lane: its parts
// are added in their order, and which rows are beside it changes nothing.

#include "token_row.h"

namespace {

constexpr int kRows = Pack<double>::lanes;

inline double number_of(const Pack<double>& rows, int i) {
  double numbers[kRows];
  store(numbers, rows);
  return numbers[i];
}

// Some rows of a call side by side.
template <class A>
class RowsOfParts {
 public:
  RowsOfParts(const Merge& call, const int64_t* rows) : step_(call.logits.stride_outer) {
    for (int i = 0; i < kRows; ++i) from_[i] = static_cast<const A*>(call.logits.data) + rows[i] * call.logits.stride_inner;
  }
  Pack<double> column(int64_t part, int64_t column) const {
    double values[kRows];
    for (int i = 0; i < kRows; ++i) values[i] = from_[i][part * step_ + column];
    return load(values);
  }

 private:
  const A* from_[kRows];
  int64_t step_;
};

// The maxima of rows, NaN where a part's is, and the first part that has each.
struct Tops {
  Pack<double> top, first;
};
template <class A>
Tops tops_of(const RowsOfParts<A>& rows, int64_t parts) {
  Tops tops{broadcast(-kInfinity), Pack<double>{}};
  for (int64_t part = 0; part < parts; ++part) {
    const Pack<double> top = rows.column(part, State::MAX);
    const auto raises = each<Mask<double>>([&](int i) { return (top.v[i] > tops.top.v[i]) | (top.v[i] != top.v[i]); });
    tops = {select(raises, top, tops.top), select(raises, broadcast(double(part)), tops.first)};
  }
  return tops;
}

// The logits of the rows' target number k less the rows' maxima, from the parts that have it; else NaN.
template <class A>
Pack<double> shifted_of(const RowsOfParts<A>& rows, int64_t parts, int64_t k, const Pack<double>& top) {
  Pack<double> shifted = broadcast(kNaN);
  for (int64_t part = 0; part < parts; ++part) {
    const Pack<double> part_top = rows.column(part, State::MAX), in_part = rows.column(part, State::TARGETS + k);
    shifted = each<Pack<double>>([&](int i) {
      const auto found = in_part.v[i] + (part_top.v[i] == top.v[i] ? Vec<double>{} : part_top.v[i] - top.v[i]);
      return found > shifted.v[i] || shifted.v[i] != shifted.v[i] ? found : shifted.v[i];
    });
  }
  return shifted;
}

// `count` rows; the others of a pack repeat one.
template <class A>
void merge_pack(const Merge& call, const int64_t* rows, int count) {
  const RowsOfParts<A> parts(call, rows);
  const auto [top, first] = tops_of(parts, call.parts);
  A inv_t[kRows];
  double scales[kRows];
  for (int i = 0; i < kRows; ++i) scales[i] = kLog2E * (inv_t[i] = inverse_temperature<A>(call, rows[i]));
  const Pack<double> scale = load(scales), zero{};
  // The 1 of the row's maximum itself is left out of `rest`, once. Every other part's is an ordinary entry.
  Pack<double> rest{}, linear{}, squares{};
  for (int64_t part = 0; part < call.parts; ++part) {
    const Pack<double> part_top = parts.column(part, State::MAX), part_rest = parts.column(part, State::REST);
    const Pack<double> t = (part_top - top) * scale, mass = power_of_two(t) * (part_rest + 1.0);
    const Mask<double> nothing = part_top == -kInfinity;
    rest = rest + select(nothing, zero, select(first == double(part), part_rest, mass));
    linear = linear + select(nothing, zero, mass * (parts.column(part, State::MEAN_U) + finite_exponent(t) * kLn2));
    if (call.sum_sq_prob) squares = squares + select(nothing, zero, mass * mass * parts.column(part, State::SUM_SQ));
  }
  Distribution<A> distributions[kRows];
  for (int i = 0; i < count; ++i) {
    // There is no distribution of -inf alone, or where there is +inf.
    const double s0 = std::isinf(number_of(top, i)) ? kNaN : number_of(rest, i), mass = 1 + s0;
    distributions[i] = {A(number_of(top, i)), s0, number_of(linear, i) / mass, number_of(squares, i) / (mass * mass), std::log1p(s0)};
    put_row(call, rows[i], distributions[i], inv_t[i]);
  }
  for (int64_t k = 0; k < call.n_targets; ++k) {
    const Pack<double> shifted = shifted_of(parts, call.parts, k, top);
    for (int i = 0; i < count; ++i) {
      const bool ignored = call.targets[rows[i] * call.n_targets + k] == call.ignore_index;
      put_target(call, rows[i], k, ignored, A(number_of(shifted, i)), distributions[i], inv_t[i]);
    }
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
