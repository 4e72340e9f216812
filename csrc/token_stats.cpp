// token_stats for one instruction set. The forward reads a row once (a second time, from cache, for a kept
// set). The backward reads and writes it once.
//
// Tiles of 2048 logits stay in the first-level cache. A tile's maximum is found first, then its sums.
// How a row is reduced depends on its length alone: it has the same bits in any batch, on any thread.

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

// --- forward -----------------------------------------------------------------------------------------------

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
float tile_max(const BFloat16* x, int64_t n) {
  return tile_max_by_bits(x, n);
}
template <>
float tile_max(const Float16* x, int64_t n) {
  return tile_max_by_bits(x, n);
}

// The tile after the one that is being summed. Behind its arithmetic the processor would ask for it too late.
template <class T>
void prefetch_next_tile(const T* x) {
  for (size_t byte = 0; byte < kLanes<T> * sizeof(T); byte += 64) __builtin_prefetch(reinterpret_cast<const char*>(x + kTile) + byte);
}

// With t = (x - top) log2(e) / T over some logits. Any NaN makes s0 and s1 NaN, even one the maximum missed.
struct Sums {
  double s0 = 0, s1 = 0, s2 = 0;  // of 2^t, 2^t t, 2^2t; without the logits equal to an excluded maximum
  double ties = 0;                // how many those are
};

template <class T, bool ExcludeMax, bool Squares, bool Entropy>
Sums tile_sums(const T* x, int64_t n, Acc<T> top, Acc<T> scale) {
  using A = Acc<T>;
  AccPack<T> s0{}, s1{}, s2{};
  Mask<A> ties{};
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    prefetch_next_tile(x + i);
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

// The whole row's maximum and sums. One logit equal to the maximum stays out of s0: sum 2^t = 1 + s0, and
// log1p(s0) keeps the relative accuracy of a row that is all but certain. s1 and s2 are complete.
template <class T, bool Squares, bool Entropy>
Sums row_sums(const T* x, int64_t vocab, Acc<T> scale, Acc<T>& top) {
  Sums row;
  top = Acc<T>(-kInfinity);
  for_each_tile(x, vocab, [&](const T* tile, int64_t n) {
    const Acc<T> highest = tile_max(tile, n);
    const bool is_new = highest > top;
    if (is_new) {
      if (top > -kInfinity) {
        const double d = double(top - highest) * scale, steps = d < -2000 ? -2000 : d, e = std::exp2(steps);
        row.s1 = e * (row.s1 + steps * (1 + row.s0));
        row.s0 = e * (1 + row.s0);
        row.s2 *= e * e;
      }
      top = highest;
    }
    // While there is nothing but -inf any finite number stands for the maximum: every term is 0.
    const Sums part = highest > -kInfinity && highest == top
                          ? tile_sums<T, true, Squares, Entropy>(tile, n, top, scale)
                          : tile_sums<T, false, Squares, Entropy>(tile, n, top > -kInfinity ? top : 0, scale);
    row.s0 += part.s0 + (part.ties - is_new);
    row.s1 += part.s1;
    row.s2 += part.s2 + part.ties;
  });
  return row;
}

// log of the share of sum 2^t that the logits with x - top >= threshold hold; -inf where there is none.
template <class T>
double kept_logmass(const T* x, int64_t vocab, Acc<T> top, Acc<T> scale, Acc<T> threshold) {
  using A = Acc<T>;
  double kept = 0, dropped = 0;
  for_each_tile(x, vocab, [&](const T* tile, int64_t n) {
    AccPack<T> outside{}, inside{};
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      const AccPack<T> shifted = load(tile + i) - top;
      const AccPack<T> e = power_of_two<sizeof(T) == 2>(shifted * scale);
      const Mask<A> is_kept = shifted >= threshold;
      outside = outside + select(is_kept, AccPack<T>{}, e);
      inside = inside + select(is_kept, e, AccPack<T>{});
    }
    dropped += sum_lanes(outside);
    kept += sum_lanes(inside);
  });
  return -std::log1p(dropped / kept);
}

template <class T>
const T* row_of(const Rows& call, const Matrix& matrix, int64_t row) {
  return static_cast<const T*>(matrix.data) + row / call.inner * matrix.stride_outer + row % call.inner * matrix.stride_inner;
}

// 1 / T in the accumulation type, NaN where T is not positive: the row shows it.
template <class A>
A inverse_temperature(const Rows& call, int64_t row) {
  if (!call.temperatures) return A(1 / call.temperature);
  const A t = static_cast<const A*>(call.temperatures)[row];
  return t > 0 ? 1 / t : A(kNaN);
}

template <class A>
void put(void* to, int64_t i, double value) {
  if (to) static_cast<A*>(to)[i] = A(value);
}

template <class T>
void forward_row(const Forward& call, int64_t row) {
  using A = Acc<T>;
  const T* x = row_of<T>(call, call.logits, row);
  A* state = static_cast<A*>(call.state) + row * (State::TARGETS + call.n_targets);
  const A inv_t = inverse_temperature<A>(call, row), scale = A(kLog2E * inv_t);

  A top;
  Sums sums = call.sum_sq_prob ? row_sums<T, true, true>(x, call.vocab, scale, top)
              : call.entropy   ? row_sums<T, false, true>(x, call.vocab, scale, top)
                               : row_sums<T, false, false>(x, call.vocab, scale, top);
  // Nothing above -inf, a +inf or a NaN: not a distribution.
  const bool undefined = std::isinf(top) || std::isnan(sums.s0);
  if (std::isnan(sums.s0)) top = A(kNaN);

  const double log_s0 = undefined ? kNaN : std::log1p(sums.s0), mass = 1 + sums.s0;
  const double mean_u = kLn2 * sums.s1 / mass, entropy = log_s0 - mean_u;
  state[State::MAX] = top;
  state[State::REST] = undefined ? A(kNaN) : A(sums.s0);
  state[State::MEAN_U] = undefined ? A(kNaN) : A(mean_u);
  state[State::SUM_SQ] = state[State::KEPT] = state[State::THRESHOLD] = 0;
  put<A>(call.entropy, row, entropy);
  put<A>(call.logsumexp, row, top == -kInfinity ? -kInfinity : double(top) * inv_t + log_s0);
  if (call.sum_sq_prob) {
    const double sum_sq = undefined ? kNaN : sums.s2 / (mass * mass);
    state[State::SUM_SQ] = A(sum_sq);
    put<A>(call.sum_sq_prob, row, sum_sq);
  }
  if (call.kept_kind != KeptKind::NONE) {
    // In the accumulation type, as the other backends compute it: the same logits are kept.
    const A log_kept = A(call.log_kept), threshold = (call.kept_kind == KeptKind::MIN_P ? log_kept : log_kept + A(log_s0)) / inv_t;
    const double kept = undefined ? kNaN : kept_logmass(x, call.vocab, top, scale, threshold);
    state[State::KEPT] = A(kept);
    state[State::THRESHOLD] = threshold;
    put<A>(call.kept_logmass, row, kept);
  }
  for (int64_t k = 0; k < call.n_targets; ++k) {
    const int64_t y = call.targets[row * call.n_targets + k];
    A shifted = A(kNaN);
    if (y >= 0 && y < call.vocab) {
      const A at_y = load_one(x + y);
      shifted = at_y == -kInfinity ? at_y : at_y - top;
    }
    state[State::TARGETS + k] = shifted;
    put<A>(call.logp, row * call.n_targets + k, y == call.ignore_index ? 0 : double(shifted) * inv_t - log_s0);
  }
}

template <class T>
void forward_rows(const Forward& call, int64_t begin, int64_t end) {
  using A = Acc<T>;
  for (int64_t row = begin; row < end; ++row) {
    if (!is_skipped(call, row)) {
      forward_row<T>(call, row);
      continue;
    }
    const int64_t width = State::TARGETS + call.n_targets;
    for (int64_t i = 0; i < width; ++i) put<A>(call.state, row * width + i, 0);
    for (int64_t k = 0; k < call.n_targets; ++k) put<A>(call.logp, row * call.n_targets + k, 0);
    for (void* out : {call.entropy, call.logsumexp, call.sum_sq_prob, call.kept_logmass}) put<A>(out, row, 0);
  }
}

// --- backward ----------------------------------------------------------------------------------------------

// dz = 2^t (constant + linear t + square 2^t + [kept] inside), t as in the forward: the row's scalars.
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

// `x` and `out` may be the same memory, if nothing is streamed.
template <class T, Terms Kind, bool Stream>
void write_gradient(const T* x, T* out, int64_t vocab, const Coefficients<Acc<T>>& c) {
  const auto edge = [&](int64_t start, int64_t n) {
    T padded[kLanes<T>] = {};
    std::memcpy(padded, x + start, n * sizeof(T));
    store(padded, gradient_of<T, Kind>(load(padded), c));
    std::memcpy(out + start, padded, n * sizeof(T));
  };
  int64_t i = 0;
  if constexpr (Stream) {  // from the first aligned address on
    i = std::min<int64_t>(vocab, -reinterpret_cast<uintptr_t>(out) % kVectorBytes / sizeof(T));
    if (i > 0) edge(0, i);
  }
  for (; i + kLanes<T> <= vocab; i += kLanes<T>) store<Stream>(out + i, gradient_of<T, Kind>(load(x + i), c));
  if (i < vocab) edge(i, vocab - i);
}

template <class T, Terms Kind>
void write_gradient(const Backward& call, const T* x, T* out, const Coefficients<Acc<T>>& c) {
  return call.stream ? write_gradient<T, Kind, true>(x, out, call.vocab, c) : write_gradient<T, Kind, false>(x, out, call.vocab, c);
}

template <class A>
double get(const void* from, int64_t i) {
  return from ? double(static_cast<const A*>(from)[i]) : 0;
}

template <class A>
bool is_idle(const Backward& call, int64_t row) {
  for (const void* g : {call.g_entropy, call.g_logsumexp, call.g_sum_sq_prob, call.g_kept_logmass})
    if (get<A>(g, row) != 0) return false;
  if (call.g_logp)
    for (int64_t i = row * call.n_targets; i < (row + 1) * call.n_targets; ++i)
      if (call.targets[i] != call.ignore_index && get<A>(call.g_logp, i) != 0) return false;
  return true;
}

// One of a row's targets, with what the upstream gradients of its entries come to.
struct Target {
  int64_t id;
  double upstream, shifted;
};

constexpr int64_t kFewTargets = 16;  // so many are compared with one another as fast as they are hashed

// The targets of a row, each once, in the order in which they first appear.
class Targets {
 public:
  explicit Targets(int64_t most) {
    if (most == 0) return;
    list_.reserve(most);
    while (int64_t(1) << bits_ < 4 * most) ++bits_;
    slots_.resize(size_t(1) << bits_);
  }
  void clear() {
    list_.clear();
    std::memset(slots_.data(), 0, slots_.size() * sizeof(Slot));
  }
  void add(const Target& target) {
    // The golden ratio spreads neighbours and multiples alike.
    size_t i = uint64_t(target.id) * 0x9e3779b97f4a7c15 >> (64 - bits_);
    while (slots_[i].place && list_[slots_[i].place - 1].id != target.id) i = (i + 1) & (slots_.size() - 1);
    if (slots_[i].place) {
      list_[slots_[i].place - 1].upstream += target.upstream;
    } else {
      list_.push_back(target);
      slots_[i].place = uint32_t(list_.size());
    }
  }
  const Target* begin() const { return list_.data(); }
  const Target* end() const { return begin() + list_.size(); }

 private:
  struct Slot {
    uint32_t place;  // in the list, from 1 on; 0: free
  };
  // Vectors of this file's own types: what they instantiate, code for one instruction set, must stay in it.
  std::vector<Target> list_;
  std::vector<Slot> slots_;
  int bits_ = 1;
};

// The gradient at a target, where p - 1 is given beside p: no cancellation as p goes to 1.
struct AtTarget {
  double inv_t, log_s0, common, g_h, g_s2, g_k, inside, threshold;

  double logp(double shifted) const { return shifted * inv_t - log_s0; }
  double gradient(double shifted, double upstream, double p, double p_minus_1) const {
    const double u = shifted * inv_t;
    double here = common;
    if (g_h != 0) here -= g_h * (u < -1e4 ? -1e4 : u);
    if (g_s2 != 0) here += 2 * g_s2 * p;
    if (g_k != 0 && shifted >= threshold) here += inside;
    return inv_t * (p * (here + upstream) - upstream * p_minus_1);
  }
};

// Many targets: each once, and their probabilities side by side.
template <class T>
[[gnu::noinline]] void write_targets(const Backward& call, int64_t row, T* out, Targets& targets, AtTarget at_target) {
  using A = Acc<T>;
  const int64_t first = row * call.n_targets, *y = call.targets + first;
  const A* shifted = static_cast<const A*>(call.state) + row * (State::TARGETS + call.n_targets) + State::TARGETS;
  targets.clear();
  for (int64_t k = 0; k < call.n_targets; ++k)
    if (y[k] != call.ignore_index) targets.add({y[k], get<A>(call.g_logp, first + k), shifted[k]});
  constexpr int64_t lanes = Pack<double>::lanes;
  for (const Target* t = targets.begin(); t < targets.end(); t += lanes) {
    const int64_t n = std::min<int64_t>(lanes, targets.end() - t);
    double logp[lanes] = {}, p[lanes];
    for (int64_t j = 0; j < n; ++j) logp[j] = at_target.logp(t[j].shifted);
    store(p, power_of_two(load(logp) * kLog2E));
    for (int64_t j = 0; j < n; ++j) {
      const double p_minus_1 = p[j] > 0.5 ? std::expm1(logp[j]) : p[j] - 1;
      store_one(out + t[j].id, at_target.gradient(t[j].shifted, t[j].upstream, p[j], p_minus_1));
    }
  }
}

template <class T>
void backward_row(const Backward& call, int64_t row, T* out, Targets& targets) {
  using A = Acc<T>;
  const T* x = row_of<T>(call, call.logits, row);
  const A* state = static_cast<const A*>(call.state) + row * (State::TARGETS + call.n_targets);
  const int64_t *y = call.targets ? call.targets + row * call.n_targets : nullptr, first = row * call.n_targets;
  const A inv_t = inverse_temperature<A>(call, row);
  const double rest = state[State::REST], log_s0 = std::log1p(rest), mean_u = state[State::MEAN_U], sum_sq = state[State::SUM_SQ],
               kept = state[State::KEPT];
  const double g_h = get<A>(call.g_entropy, row), g_z = get<A>(call.g_logsumexp, row), g_s2 = get<A>(call.g_sum_sq_prob, row);
  const double g_k = kept == -kInfinity ? 0 : get<A>(call.g_kept_logmass, row);  // an empty set is a constant
  const double inside = g_k != 0 ? g_k * std::exp(-kept) : 0;

  // What multiplies p in every logit. Terms without upstream gradient are left out: 0 * (-inf) is NaN.
  double common = g_z;
  if (g_h != 0) common += g_h * mean_u;
  if (g_s2 != 0) common -= 2 * g_s2 * sum_sq;
  if (g_k != 0) common -= g_k;
  if (call.g_logp)
    for (int64_t k = 0; k < call.n_targets; ++k) {
      if (y[k] == call.ignore_index) continue;
      common -= y[k] >= 0 && y[k] < call.vocab ? get<A>(call.g_logp, first + k) : kNaN;
    }

  const double weight = inv_t / (1 + rest);
  Coefficients<A> c{};
  c.top = state[State::MAX];
  c.scale = A(kLog2E * inv_t);
  c.constant = A(std::isnan(common) ? kNaN : weight * common);
  c.linear = A(-weight * g_h * kLn2);
  c.square = A(2 * weight * g_s2 / (1 + rest));
  c.inside = A(weight * inside);
  c.threshold = state[State::THRESHOLD];
  if (g_s2 != 0 || g_k != 0)
    write_gradient<T, Terms::all>(call, x, out, c);
  else if (g_h != 0)
    write_gradient<T, Terms::linear>(call, x, out, c);
  else
    write_gradient<T, Terms::constant>(call, x, out, c);

  if (!call.g_logp || std::isnan(common)) return;
  const AtTarget at_target{inv_t, log_s0, common, g_h, g_s2, g_k, inside, state[State::THRESHOLD]};
  if (call.n_targets > kFewTargets) return write_targets<T>(call, row, out, targets, at_target);
  for (int64_t k = 0; k < call.n_targets; ++k) {
    if (y[k] == call.ignore_index) continue;
    double at_y = 0;  // a repeated target collects the gradients of all its entries
    for (int64_t j = 0; j < call.n_targets; ++j)
      if (y[j] == y[k]) at_y += get<A>(call.g_logp, first + j);
    const double shifted = state[State::TARGETS + k], logp = at_target.logp(shifted);
    store_one(out + y[k], at_target.gradient(shifted, at_y, std::exp(logp), std::expm1(logp)));
  }
}

template <class T>
void backward_rows(const Backward& call, int64_t begin, int64_t end) {
  Targets targets(call.g_logp && call.n_targets > kFewTargets ? call.n_targets : 0);
  for (int64_t row = begin; row < end; ++row) {
    T* out = const_cast<T*>(row_of<T>(call, call.out, row));
    if (is_skipped(call, row) || is_idle<Acc<T>>(call, row))
      std::memset(out, 0, call.vocab * sizeof(T));
    else
      backward_row<T>(call, row, out, targets);
  }
  if (call.stream) finish_stream();
}

// --- entry points ------------------------------------------------------------------------------------------

// Calls f with a value of the logits' type.
template <class F>
void with_type(int dtype, F f) {
  if (dtype == DType::float32) return f(float{});
  if (dtype == DType::float64) return f(double{});
  if (dtype == DType::bfloat16) return f(BFloat16{});
  f(Float16{});
}

void forward(const Forward& call, int64_t begin, int64_t end) {
  with_type(call.dtype, [&](auto logit) { forward_rows<decltype(logit)>(call, begin, end); });
}

void backward(const Backward& call, int64_t begin, int64_t end) {
  with_type(call.dtype, [&](auto logit) { backward_rows<decltype(logit)>(call, begin, end); });
}

}  // namespace

namespace rlkern {
extern const Kernels RLKERN_KERNELS;  // a const would otherwise stay inside this file
const Kernels RLKERN_KERNELS{forward, backward};
}  // namespace rlkern
