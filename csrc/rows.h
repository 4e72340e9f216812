// What the kernels over rows of logits share: tiles of a row, their maxima and sums, a call's numbers by row.
// A row is read in tiles of 2048 logits, which stay in the first-level cache.
#pragma once

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <vector>

#include "call.h"
#include "simd.h"

namespace {

using namespace rlkern;

constexpr int64_t kTile = 2048;
constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN(), kInfinity = std::numeric_limits<double>::infinity();

template <class T>
using Acc = typename Element<T>::Acc;
template <class T>
using AccPack = Pack<Acc<T>>;
template <class T>
constexpr int kLanes = AccPack<T>::lanes;

// Calls f(tile, count) along the row. -inf pads the last tile: count is a multiple of the lanes.
template <class T, class F>
inline void for_each_tile(const T* x, int64_t vocab, F f) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t start = 0; start < vocab; start += kTile) {
    const int64_t n = vocab - start < kTile ? vocab - start : kTile;
    if (n % lanes == 0) {
      f(x + start, n);
    } else {
      T padded[kTile];
      const int64_t whole = (n + lanes - 1) / lanes * lanes;
      std::memcpy(padded, x + start, n * sizeof(T));
      for (int64_t i = n; i < whole; ++i) padded[i] = Element<T>::minus_infinity();
      f(padded, whole);
    }
  }
}

template <class T>
Acc<T> load_one(const T* x) {
  if constexpr (sizeof(T) == sizeof(Acc<T>)) {
    return *x;
  } else {
    const Vec<uint16_t> first{x->bits};  // through memory, the load would wait for the store
    return load(reinterpret_cast<const T*>(&first)).v[0][0];
  }
}

template <class T>
void store_one(T* x, double value) {
  // Through Acc first, as every other element of the row. NaN in the hardware's own form, see bfloat16_pairs.
  T padded[kLanes<T>];
  store(padded, broadcast(std::isnan(value) ? Acc<T>(kNaN) : Acc<T>(value)));
  std::memcpy(x, padded, sizeof(T));
}

// --- a tile ---------------------------------------------------------------------------------------------------

template <class T>
Acc<T> tile_max(const T* x, int64_t n) {
  AccPack<T> top = broadcast(Acc<T>(-kInfinity));
  for (int64_t i = 0; i < n; i += kLanes<T>) top = max_or_second(load(x + i), top);
  return max_lanes(top);
}

// The bits of 16-bit floats order as signed integers if one is not negative. Else the magnitude is inverted.
template <class T>
Acc<T> tile_max_by_bits(const T* x, int64_t n) {
  static_assert(sizeof(T) == 2 && kLanes<T> == kVectorBytes / 2, "one vector of bits is one pack");
  const auto largest = [&](int16_t turn) {
    Vec<int16_t> top = Vec<int16_t>{} + int16_t(INT16_MIN);
    for (int64_t i = 0; i < n; i += kLanes<T>) top = larger(load_raw<Vec<int16_t>>(x + i) ^ turn, top);
    return int16_t(fold<int16_t, kVectorBytes>(top, [](auto a, auto b) { return a > b ? a : b; }) ^ turn);
  };
  int16_t bits = largest(0);
  if (bits < 0) bits = largest(INT16_MAX);
  const Vec<int16_t> all = Vec<int16_t>{} + bits;
  return load(reinterpret_cast<const T*>(&all)).v[0][0];
}
template <>
inline float tile_max(const BFloat16* x, int64_t n) {
  return tile_max_by_bits(x, n);
}
template <>
inline float tile_max(const Float16* x, int64_t n) {
  return tile_max_by_bits(x, n);
}

// What the next tile is made of. Behind this one's arithmetic the processor would ask for it too late.
template <class T>
RLKERN_INLINE void prefetch_pack(uintptr_t next) {
  for (size_t byte = 0; byte < kLanes<T> * sizeof(T); byte += 64) __builtin_prefetch(reinterpret_cast<const void*>(next + byte));
}
template <class T>
uintptr_t tile_after(const T* x) {
  return reinterpret_cast<uintptr_t>(x) + kTile * sizeof(T);
}
template <class T>
void prefetch_next_tile(const T* x) {
  prefetch_pack<T>(tile_after(x));
}

// Where a tile lies in its row, and the address of what the next one is made of.
struct Place {
  int64_t start;
  uintptr_t next;
};

// With t = (x - top) log2(e) / T over some logits. Any NaN makes s0 and s1 NaN, even one the maximum missed.
struct Sums {
  double s0 = 0, s1 = 0, s2 = 0;  // of 2^t, 2^t t, 2^2t; without the logits equal to an excluded maximum
  double ties = 0;                // how many those are
};

template <class T, bool ExcludeMax, bool Squares, bool Entropy>
Sums tile_sums(const T* x, int64_t n, uintptr_t next, Acc<T> top, Acc<T> scale) {
  using A = Acc<T>;
  AccPack<T> s0{}, s1{}, s2{};
  Mask<A> ties{};
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    prefetch_pack<T>(next + i * sizeof(T));
    const AccPack<T> v = load(x + i), t = (v - top) * scale, e = power_of_two<sizeof(T) == 2>(t);
    const Mask<A> at_max = v == top;
    const auto add = [&](const AccPack<T>& sum, const AccPack<T>& term) {
      return ExcludeMax ? select(at_max, sum, sum + term) : sum + term;
    };
    s0 = add(s0, e);
    if constexpr (Entropy) s1 = s1 + e * finite_exponent(t);  // t is 0 at the maximum
    if constexpr (Squares) s2 = add(s2, e * e);
    if constexpr (ExcludeMax) ties = ties + at_max;
  }
  return {sum_lanes(s0), Entropy ? sum_lanes(s1) : 0, Squares ? sum_lanes(s2) : 0, ExcludeMax ? -double(sum_lanes(ties)) : 0};
}

// A row's maximum and sums, tile by tile. One logit equal to the maximum stays out of s0: sum 2^t = 1 + s0, and
// log1p(s0) keeps the relative accuracy of a row that is all but certain. s1 and s2 are complete.
template <class A>
struct RowSums {
  A top = A(-kInfinity);
  Sums sums;

  // Takes a higher maximum. Returns whether it is one.
  bool raise(A highest, A scale) {
    if (!(highest > top)) return false;
    if (top > -kInfinity) {
      const double d = double(top - highest) * scale, steps = d < -2000 ? -2000 : d, e = std::exp2(steps);
      sums.s1 = e * (sums.s1 + steps * (1 + sums.s0));
      sums.s0 = e * (1 + sums.s0);
      sums.s2 *= e * e;
    }
    top = highest;
    return true;
  }
  // The sums of the next tile, whose maximum raised the row's or did not.
  void take(const Sums& part, bool raised) {
    sums.s0 += part.s0 + (part.ties - raised);
    sums.s1 += part.s1;
    sums.s2 += part.s2 + part.ties;
  }

  template <bool Squares, bool Entropy, class T>
  void add(const T* tile, int64_t n, A scale, uintptr_t next) {
    const A highest = tile_max(tile, n);
    const bool raised = raise(highest, scale);
    // While there is nothing but -inf any finite number stands for the maximum: every term is 0.
    take(highest > -kInfinity && highest == top ? tile_sums<T, true, Squares, Entropy>(tile, n, next, top, scale)
                                                : tile_sums<T, false, Squares, Entropy>(tile, n, next, top > -kInfinity ? top : 0, scale),
         raised);
  }
};

// A row of logits as its statistics see it. for_each_tile calls f(tile, count, place).
template <class T>
struct PlainRow {
  using Tile = T;  // a pointer to these is what tiles are
  const T* x;
  int64_t vocab;
  const T* following = x + vocab;  // what is read after the row

  template <class F>
  void for_each_tile(F f) const {
    int64_t start = 0;
    ::for_each_tile(x, vocab, [&](const T* tile, int64_t n) {
      const int64_t next = start + kTile;
      f(tile, n, Place{start, reinterpret_cast<uintptr_t>(next < vocab ? x + next : following + (next - vocab))});
      start = next;
    });
  }
  Acc<T> at(int64_t i) const { return load_one(x + i); }
  int64_t size() const { return vocab; }
};

// tanh(x / cap) of a row.
template <class Row>
struct CappedRow {
  using Tile = Acc<typename Row::Tile>;
  Row row;
  Tile inverse_cap;

  template <class F>
  void for_each_tile(F f) const {
    using T = typename Row::Tile;
    row.for_each_tile([&](const T* tile, int64_t n, Place place) {
      Tile capped[kTile];
      for (int64_t i = 0; i < n; i += kLanes<T>) {
        prefetch_pack<T>(place.next + i * sizeof(T));
        store(capped + i, soft_cap(load_in_order(tile + i), inverse_cap).value);
      }
      f(static_cast<const Tile*>(capped), n, Place{place.start, reinterpret_cast<uintptr_t>(capped)});
    });
  }
  Tile at(int64_t i) const { return soft_cap(broadcast(row.at(i)), inverse_cap).value.v[0][0]; }
  int64_t size() const { return row.size(); }
};

template <bool Squares, bool Entropy, class Row, class A>
RowSums<A> row_sums(const Row& row, A scale) {
  RowSums<A> sums;
  row.for_each_tile([&](const auto* tile, int64_t n, Place place) { sums.template add<Squares, Entropy>(tile, n, scale, place.next); });
  return sums;
}

// --- a gradient -----------------------------------------------------------------------------------------------

// dz = 2^t (constant + linear t + square 2^t + [kept] inside), t as above: the row's scalars.
// 1 / T and 1 / sum 2^t are folded in.
template <class A>
struct Coefficients {
  A top, scale, constant, linear, square, inside, threshold;
};

enum class Terms { constant, linear, all };

template <class T, Terms Kind>
inline AccPack<T> gradient_of(AccPack<T> x, const Coefficients<Acc<T>>& c) {
  const AccPack<T> shifted = x - c.top, t = shifted * c.scale;
  const AccPack<T> e = power_of_two<sizeof(T) == 2>(t);
  if constexpr (Kind == Terms::constant) return e * c.constant;
  AccPack<T> g = finite_exponent(t) * c.linear + c.constant;
  if constexpr (Kind == Terms::all) g = g + e * c.square + select(shifted >= c.threshold, broadcast(c.inside), AccPack<T>{});
  return e * g;
}

// Writes f of each of n logits, a pack at a time. X is T, or what T is computed in. `x` and `out` may be the
// same memory, if nothing is streamed. Flat: compilers made a call of f, for AVX2 at four times the time.
template <bool Stream, class X, class T, class F>
[[gnu::flatten]] void write_gradient(const X* x, T* out, int64_t n, F f) {
  const auto write = [&](const X* from, T* to, auto stream) {
    if constexpr (std::is_same_v<X, T>)
      store<stream>(to, f(load(from)));
    else
      store_in_order<stream>(to, f(load_in_order(from)));
  };
  const auto edge = [&](int64_t start, int64_t count) {
    X from[kLanes<T>] = {};
    T to[kLanes<T>];
    std::memcpy(from, x + start, count * sizeof(X));
    write(from, to, std::false_type{});
    std::memcpy(out + start, to, count * sizeof(T));
  };
  int64_t i = 0;
  if constexpr (Stream) {  // from the first aligned address on
    i = std::min<int64_t>(n, -reinterpret_cast<uintptr_t>(out) % kVectorBytes / sizeof(T));
    if (i > 0) edge(0, i);
  }
  for (; i + kLanes<T> <= n; i += kLanes<T>) write(x + i, out + i, std::bool_constant<Stream>{});
  if (i < n) edge(i, n - i);
}
template <class X, class T, class F>
void write_gradient(bool stream, const X* x, T* out, int64_t n, F f) {
  return stream ? write_gradient<true>(x, out, n, f) : write_gradient<false>(x, out, n, f);
}

// --- a call ---------------------------------------------------------------------------------------------------

template <class T>
const T* row_of(const Rows& call, const Matrix& matrix, int64_t row) {
  return static_cast<const T*>(matrix.data) + row / call.inner * matrix.stride_outer + row % call.inner * matrix.stride_inner;
}

// 1 / T in the accumulation type, NaN where T is not positive: the row shows it.
template <class A>
A inverse_temperature(double temperature, const void* temperatures, int64_t row) {
  if (!temperatures) return A(1 / temperature);
  const A t = static_cast<const A*>(temperatures)[row];
  return t > 0 ? 1 / t : A(kNaN);
}
template <class A>
A inverse_temperature(const Rows& call, int64_t row) {
  return inverse_temperature<A>(call.temperature, call.temperatures, row);
}

template <class A>
void put(void* to, int64_t i, double value) {
  if (to) static_cast<A*>(to)[i] = A(value);
}

template <class A>
double get(const void* from, int64_t i) {
  return from ? double(static_cast<const A*>(from)[i]) : 0;
}

// Calls f with a value of the logits' type.
template <class F>
void with_type(int dtype, F f) {
  if (dtype == DType::float32) return f(float{});
  if (dtype == DType::float64) return f(double{});
  if (dtype == DType::bfloat16) return f(BFloat16{});
  f(Float16{});
}

}  // namespace
