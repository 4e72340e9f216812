// sampler_threshold for one instruction set. Sweeps of a row give its maximum, the masses, and in the end the
// smallest logit that reaches what the rules ask for. Nothing is sorted: the token at which the weights of the
// greater ones reach a limit is found a digit at a time, by the weight of each value of the digit.

#include <numeric>
#include <type_traits>

#include "rows.h"

namespace {

template <class T>
using Key = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;

template <class T>
constexpr Key<T> kSign = Key<T>(Key<T>(1) << (8 * sizeof(T) - 1));

// Unsigned integers in the order of the logits; both zeros alike.
template <class T>
RLKERN_INLINE Key<T> key_of(T x) {
  Key<T> bits = bit_cast<Key<T>>(x);
  bits = bits == kSign<T> ? 0 : bits;
  return bits & kSign<T> ? ~bits : bits | kSign<T>;
}
template <class T>
T of_key(Key<T> key) {
  return bit_cast<T>(Key<T>(key & kSign<T> ? key ^ kSign<T> : ~key));
}

// Some of a row's tokens, with room for one more than it has.
template <class T>
struct Tokens {
  std::vector<Key<T>> keys;
  std::vector<int64_t> weights;
  int64_t count = 0;

  explicit Tokens(int64_t vocab) : keys(vocab + 1), weights(vocab + 1) {}

  // Keeps it if `kept`: no branch that a processor would have to guess.
  RLKERN_INLINE void add(Key<T> key, int64_t weight, bool kept) {
    keys[count] = key;
    weights[count] = weight;
    count += kept;
  }
};

constexpr int kDigit = 11;

// The smallest token such that all greater ones weigh less than `limit`, 1 to the weight of all. Uses `tokens` up.
template <class T>
Key<T> select(Tokens<T>& tokens, int64_t limit) {
  for (int shift = 8 * sizeof(T), width; shift > 0;) {
    width = std::min(kDigit, shift);
    shift -= width;
    const auto digit = [=](Key<T> key) { return int(key >> shift & ((1 << width) - 1)); };
    int64_t sums[1 << kDigit] = {};
    for (int64_t i = 0; i < tokens.count; ++i) sums[digit(tokens.keys[i])] += tokens.weights[i];
    int wanted = (1 << width) - 1;
    while (sums[wanted] < limit) limit -= sums[wanted--];
    const int64_t n = std::exchange(tokens.count, 0);
    for (int64_t i = 0; i < n; ++i) tokens.add(tokens.keys[i], tokens.weights[i], digit(tokens.keys[i]) == wanted);
  }
  return tokens.keys[0];
}

// --- sweeps of a row ------------------------------------------------------------------------------------------

template <class A>
struct Range {
  A top = A(-kInfinity);
  int64_t finite = 0;
  bool has_nan = false;
};

template <class T>
Range<Acc<T>> range_of(const T* x, int64_t vocab) {
  using A = Acc<T>;
  AccPack<T> top = broadcast(A(-kInfinity));
  Mask<A> numbers{}, finite{};
  int64_t all = 0;
  for_each_tile(x, vocab, [&](const T* tile, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      prefetch_next_tile(tile + i);
      const AccPack<T> v = load(tile + i);
      top = max_or_second(v, top);
      numbers = numbers + (v >= A(-kInfinity));
      finite = finite + (v > A(-kInfinity));
    }
    all += n;
  });
  return {max_lanes(top), -int64_t(sum_lanes(finite)), -int64_t(sum_lanes(numbers)) != all};
}

// e^((x - top) / T) in the unit of masses, as integers: of a tile, 0 below `least`.
template <class T>
void masses_of(const T* tile, int64_t n, Acc<T> least, double top, double scale, double unit, int64_t* masses) {
  using A = Acc<T>;
  using Narrow = Vec<A, kVectorBytes * sizeof(A) / sizeof(double)>;
  constexpr int lanes = Pack<double>::lanes / kPackVectors;
  constexpr double round = double(int64_t(3) << 51);  // adding it leaves an integer in the low bits
  const AccPack<T> lowest = broadcast(A(-kInfinity));
  A x[kTile];
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const AccPack<T> v = load_in_order(tile + i);
    store_in_order(x + i, select(v >= least, v, lowest));
  }
  for (int64_t i = 0; i < n; i += Pack<double>::lanes) {
    const Pack<double> wide =
        each<Pack<double>>([&](int j) { return __builtin_convertvector(load_raw<Narrow>(x + i + j * lanes), Vec<double>); });
    const Pack<double> mass = power_of_two((wide - top) * scale) * unit + round;
    for (int j = 0; j < kPackVectors; ++j)
      store_raw<false>(masses + i + j * lanes, bit_cast<Bits<double>>(mass.v[j]) - bit_cast<int64_t>(round));
  }
}

// A number that at least k logits reach, if it can be had from one maximum of each lane of each tile.
template <class T>
Acc<T> reached_by(const T* x, int64_t vocab, int64_t k) {
  using A = Acc<T>;
  std::vector<A> maxima;
  for_each_tile(x, vocab, [&](const T* tile, int64_t n) {
    AccPack<T> top = broadcast(A(-kInfinity));
    for (int64_t i = 0; i < n; i += kLanes<T>) top = max_or_second(load(tile + i), top);
    maxima.resize(maxima.size() + kLanes<T>);
    store(maxima.data() + maxima.size() - kLanes<T>, top);
  });
  const A lowest = std::numeric_limits<A>::lowest();
  if (k > int64_t(maxima.size())) return lowest;
  std::nth_element(maxima.begin(), maxima.begin() + (k - 1), maxima.end(), [](A a, A b) { return a > b; });
  return std::max(lowest, maxima[k - 1]);
}

// The k-th largest logit.
template <class T>
Acc<T> kth_largest(const T* x, int64_t vocab, int64_t k, Tokens<T>& tokens) {
  const Acc<T> least = reached_by(x, vocab, k);
  tokens.count = 0;
  for_each_tile(x, vocab, [&](const T* tile, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      const AccPack<T> v = load_in_order(tile + i);
      if (!any(v >= least)) continue;
      Acc<T> values[kLanes<T>];
      store(values, v);
      for (int64_t j = 0; j < kLanes<T>; ++j) tokens.add(key_of(tile[i + j]), 1, values[j] >= least);
    }
  });
  const T found = of_key<T>(select(tokens, k));
  return load_one(&found);
}

// The smallest logit that top_p keeps of those from `least` on.
template <class T>
Acc<T> smallest_of_nucleus(const Sampler& call, const T* x, Acc<T> least, double top, double temperature, Tokens<T>& tokens) {
  const double unit = double(int64_t(1) << call.mass_bits), scale = kLog2E / temperature;
  // What is not greater than a kept token has more than 1 - top_p of the mass. The token has its share of that.
  // Half of it leaves room for rounding.
  const int64_t share = std::max<int64_t>(1, int64_t(unit * (1 - call.top_p) / double(2 * call.vocab)));
  int64_t total = 0;
  tokens.count = 0;
  for_each_tile(x, call.vocab, [&](const T* tile, int64_t n) {
    int64_t masses[kTile];
    masses_of(tile, n, least, top, scale, unit, masses);
    total += std::accumulate(masses, masses + n, int64_t(0));
    constexpr int lanes = Pack<double>::lanes;
    for (int64_t i = 0; i < n; i += lanes) {
      const auto vector = [&](int j) { return load_raw<Bits<double>>(masses + i + j * (lanes / kPackVectors)); };
      if (!any(each<Mask<double>>([&](int j) { return vector(j) >= share; }))) continue;
      for (int64_t j = i; j < i + lanes; ++j) tokens.add(key_of(tile[j]), masses[j], masses[j] >= share);
    }
  });
  const double limit = std::max(1.0, std::ceil(call.top_p * double(total)));
  const int64_t kept = std::accumulate(tokens.weights.begin(), tokens.weights.begin() + tokens.count, int64_t(0));
  const T found = of_key<T>(select(tokens, std::min(int64_t(limit), kept)));
  return load_one(&found);
}

template <class T>
Acc<T> smallest_from(const T* x, int64_t vocab, Acc<T> least) {
  const AccPack<T> highest = broadcast(Acc<T>(kInfinity));
  AccPack<T> smallest = highest;
  for_each_tile(x, vocab, [&](const T* tile, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      const AccPack<T> v = load(tile + i);
      smallest = min_or_second(select(v >= least, v, highest), smallest);
    }
  });
  Acc<T> lanes[kLanes<T>];
  store(lanes, smallest);
  return *std::min_element(lanes, lanes + kLanes<T>);
}

// The smallest number of the type that is not below `bound`, which it may hold only roughly.
template <class A>
A rounded_up(double bound) {
  const A near = A(bound);
  return near < bound ? std::nextafter(near, A(kInfinity)) : near;
}

template <class T>
double threshold_of(const Sampler& call, int64_t row, Tokens<T>& tokens) {
  using A = Acc<T>;
  const T* x = row_of<T>(call, call.logits, row);
  const double temperature = call.temperatures ? double(static_cast<const A*>(call.temperatures)[row]) : call.temperature;
  const Range<A> range = range_of(x, call.vocab);
  if (range.has_nan || std::isinf(range.top) || !(temperature > 0)) return kNaN;
  const A lowest = std::numeric_limits<A>::lowest();
  A least = std::max(lowest, rounded_up<A>(range.top + call.log_min_p * temperature));
  if (call.top_k > 0) least = std::max(least, kth_largest(x, call.vocab, std::min(call.top_k, range.finite), tokens));
  if (call.top_p < 1) {
    const A from = call.joint ? lowest : least;
    least = std::max(least, smallest_of_nucleus(call, x, from, range.top, temperature, tokens));
  }
  return smallest_from(x, call.vocab, least);
}

template <class T>
void threshold_rows(const Sampler& call, int64_t begin, int64_t end) {
  Tokens<T> tokens(call.vocab);
  for (int64_t row = begin; row < end; ++row)
    put<Acc<T>>(call.state, row, is_skipped(call, row) ? -kInfinity : threshold_of<T>(call, row, tokens));
}

}  // namespace

namespace rlkern {
namespace RLKERN_ISA {

void sampler_threshold(const Sampler& call, int64_t begin, int64_t end) {
  with_type(call.dtype, [&](auto logit) { threshold_rows<decltype(logit)>(call, begin, end); });
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
