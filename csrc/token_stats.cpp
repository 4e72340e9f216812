// token_stats for one instruction set. The forward reads a row once (a second time, from cache, for a kept
// set or a tail). The backward reads and writes it once.
//
// A tile's maximum is found first, then its sums.
// How a row is reduced depends on its length alone: it has the same bits in any batch, on any thread.

#include "rows.h"

namespace {

// --- forward -----------------------------------------------------------------------------------------------

// log of the share of sum 2^t that the logits with x - top >= threshold hold; -inf where there is none.
template <class Row, class A>
double kept_logmass(const Row& row, A top, A scale, A threshold) {
  using T = typename Row::Tile;
  double kept = 0, dropped = 0;
  row.for_each_tile([&](const T* tile, int64_t n) {
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

// The ids that a row lists, by the tile they are in.
class Listed {
 public:
  Listed(int64_t vocab, int64_t most) : last_((vocab + kTile - 1) / kTile) { ids_.reserve(most); }
  void take(const Rows& call, int64_t row) {
    std::memset(last_.data(), 0, last_.size() * sizeof(Place));
    ids_.clear();
    const int64_t* y = call.targets + row * call.n_targets;
    for (int64_t k = 0; k < call.n_targets; ++k) {
      if (y[k] == call.ignore_index) continue;
      Place& last = last_[y[k] / kTile];
      ids_.push_back({y[k] % kTile, last.place});
      last.place = ids_.size();
    }
  }
  // Calls f with the place in its tile of every listed id, as often as it is listed.
  template <class F>
  void for_each_in(int64_t tile, F f) const {
    for (size_t place = last_[tile].place; place; place = ids_[place - 1].before) f(ids_[place - 1].at);
  }

 private:
  struct Id {
    int64_t at;
    size_t before;  // the place of another one in the same tile
  };
  struct Place {
    size_t place;  // in ids_, from 1 on; 0: none
  };
  // Vectors of this file's own types, as in Targets below.
  std::vector<Place> last_;
  std::vector<Id> ids_;
};

// log of the share of sum 2^t that the logits hold which are not listed; -inf where there is none.
template <class Row, class A>
[[gnu::noinline]] double tail_logmass(const Row& row, A top, A scale, const Listed& listed) {
  using T = typename Row::Tile;
  double inside = 0, outside = 0;
  int64_t number = 0;
  row.for_each_tile([&](const T* tile, int64_t n) {
    T rest[kTile], taken[kTile];
    int64_t count = 0;
    listed.for_each_in(number++, [&](int64_t at) {
      if (count == 0) std::memcpy(rest, tile, n * sizeof(T));
      if (load_one(rest + at) == -kInfinity) return;  // nothing, or taken before
      taken[count++] = rest[at];
      rest[at] = Element<T>::minus_infinity();
    });
    outside += tile_sums<T, false, false, false>(count == 0 ? tile : rest, n, top, scale).s0;
    if (count == 0) return;
    for (; count % kLanes<T> != 0; ++count) taken[count] = Element<T>::minus_infinity();
    inside += tile_sums<T, false, false, false>(taken, count, top, scale).s0;
  });
  // Where A does not hold this there is no tail, as in the other backends: its slopes would not be finite.
  const double ratio = inside / outside;
  return ratio > std::numeric_limits<A>::max() ? -kInfinity : -std::log1p(ratio);
}

template <class Row>
void forward_row(const Forward& call, int64_t row, const Row& x, Listed& listed) {
  using A = Acc<typename Row::Tile>;
  A* state = static_cast<A*>(call.state) + row * (State::TARGETS + call.n_targets);
  const A inv_t = inverse_temperature<A>(call, row), scale = A(kLog2E * inv_t);

  auto [top, sums] = call.sum_sq_prob ? row_sums<true, true>(x, scale)
                     : call.entropy   ? row_sums<false, true>(x, scale)
                                      : row_sums<false, false>(x, scale);
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
  if (call.kept_kind == KeptKind::UNLISTED) {
    listed.take(call, row);
    const double tail = undefined ? kNaN : tail_logmass(x, top, scale, listed);
    state[State::KEPT] = A(tail);
    state[State::THRESHOLD] = A(-kInfinity);
    put<A>(call.kept_logmass, row, tail);
  } else if (call.kept_kind != KeptKind::NONE) {
    // In the accumulation type, as the other backends compute it: the same logits are kept.
    const A log_kept = A(call.log_kept), threshold = (call.kept_kind == KeptKind::MIN_P ? log_kept : log_kept + A(log_s0)) / inv_t;
    const double kept = undefined ? kNaN : kept_logmass(x, top, scale, threshold);
    state[State::KEPT] = A(kept);
    state[State::THRESHOLD] = threshold;
    put<A>(call.kept_logmass, row, kept);
  }
  for (int64_t k = 0; k < call.n_targets; ++k) {
    const int64_t y = call.targets[row * call.n_targets + k];
    A shifted = A(kNaN);
    if (y >= 0 && y < call.vocab) {
      const A at_y = x.at(y);
      shifted = at_y == -kInfinity ? at_y : at_y - top;
    }
    state[State::TARGETS + k] = shifted;
    put<A>(call.logp, row * call.n_targets + k, y == call.ignore_index ? 0 : double(shifted) * inv_t - log_s0);
  }
}

template <class T>
void forward_rows(const Forward& call, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const bool tails = call.kept_kind == KeptKind::UNLISTED;
  Listed listed(tails ? call.vocab : 0, tails ? call.n_targets : 0);
  for (int64_t row = begin; row < end; ++row) {
    if (!is_skipped(call, row)) {
      const T* x = row_of<T>(call, call.logits, row);
      if (call.softcap > 0)
        forward_row(call, row, CappedRow<T>{x, call.vocab, A(1 / call.softcap)}, listed);
      else
        forward_row(call, row, PlainRow<T>{x, call.vocab}, listed);
      continue;
    }
    const int64_t width = State::TARGETS + call.n_targets;
    for (int64_t i = 0; i < width; ++i) put<A>(call.state, row * width + i, 0);
    for (int64_t k = 0; k < call.n_targets; ++k) put<A>(call.logp, row * call.n_targets + k, 0);
    for (void* out : {call.entropy, call.logsumexp, call.sum_sq_prob, call.kept_logmass}) put<A>(out, row, 0);
  }
}

// --- backward ----------------------------------------------------------------------------------------------

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
  double upstream, shifted, slope;
};

struct Slope {  // of the softcap at one of a row's targets
  double value;
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
[[gnu::noinline]] void write_targets(const Backward& call, int64_t row, T* out, Targets& targets, const Slope* slopes, AtTarget at_target) {
  using A = Acc<T>;
  const int64_t first = row * call.n_targets, *y = call.targets + first;
  const A* shifted = static_cast<const A*>(call.state) + row * (State::TARGETS + call.n_targets) + State::TARGETS;
  targets.clear();
  for (int64_t k = 0; k < call.n_targets; ++k)
    if (y[k] != call.ignore_index && y[k] != ELSEWHERE)
      targets.add({y[k], get<A>(call.g_logp, first + k), shifted[k], slopes ? slopes[k].value : 1});
  constexpr int64_t lanes = Pack<double>::lanes;
  for (const Target* t = targets.begin(); t < targets.end(); t += lanes) {
    const int64_t n = std::min<int64_t>(lanes, targets.end() - t);
    double logp[lanes] = {}, p[lanes];
    for (int64_t j = 0; j < n; ++j) logp[j] = at_target.logp(t[j].shifted);
    store(p, power_of_two(load(logp) * kLog2E));
    for (int64_t j = 0; j < n; ++j) {
      const double p_minus_1 = p[j] > 0.5 ? std::expm1(logp[j]) : p[j] - 1;
      store_one(out + t[j].id, t[j].slope * at_target.gradient(t[j].shifted, t[j].upstream, p[j], p_minus_1));
    }
  }
}

template <class T>
void backward_row(const Backward& call, int64_t row, T* out, Targets& targets, Slope* slopes) {
  using A = Acc<T>;
  const T* x = row_of<T>(call, call.logits, row);
  const A* state = static_cast<const A*>(call.state) + row * (State::TARGETS + call.n_targets);
  const int64_t *y = call.targets ? call.targets + row * call.n_targets : nullptr, first = row * call.n_targets;
  const A inv_t = inverse_temperature<A>(call, row);
  const double rest = state[State::REST], log_s0 = std::log1p(rest), mean_u = state[State::MEAN_U], sum_sq = state[State::SUM_SQ],
               kept = state[State::KEPT];
  const double g_h = get<A>(call.g_entropy, row), g_z = get<A>(call.g_logsumexp, row), g_s2 = get<A>(call.g_sum_sq_prob, row);
  const double g_k = kept == -kInfinity ? 0 : get<A>(call.g_kept_logmass, row);  // an empty set is a constant
  const bool tail = call.kept_kind == KeptKind::UNLISTED && g_k != 0, at_targets = call.g_logp || tail;
  const double inside = g_k != 0 && !tail ? g_k * std::exp(-kept) : 0;

  // What multiplies p in every logit. Terms without upstream gradient are left out: 0 * (-inf) is NaN.
  double common = g_z;
  if (g_h != 0) common += g_h * mean_u;
  if (g_s2 != 0) common -= 2 * g_s2 * sum_sq;
  if (g_k != 0) common -= g_k;
  if (at_targets)
    for (int64_t k = 0; k < call.n_targets; ++k) {
      if (y[k] == call.ignore_index) continue;
      common -= (y[k] >= 0 && y[k] < call.vocab) || y[k] == ELSEWHERE ? get<A>(call.g_logp, first + k) : kNaN;
    }

  // A tail keeps every logit but the targets, where p is multiplied by 1 / (1 - S) - 1 = S / (1 - S).
  const double elsewhere = tail ? common + g_k + g_k * std::expm1(-kept) : common;
  const double weight = inv_t / (1 + rest);
  Coefficients<A> c{};
  c.top = state[State::MAX];
  c.scale = A(kLog2E * inv_t);
  c.constant = A(std::isnan(common) ? kNaN : weight * elsewhere);
  c.linear = A(-weight * g_h * kLn2);
  c.square = A(2 * weight * g_s2 / (1 + rest));
  c.inside = A(weight * inside);
  c.threshold = state[State::THRESHOLD];
  const A inverse_cap = slopes ? A(1 / call.softcap) : A(0);
  if (slopes && at_targets)  // now: the gradient may be written over the logits
    for (int64_t k = 0; k < call.n_targets; ++k)
      if (y[k] >= 0 && y[k] < call.vocab) slopes[k].value = soft_cap(broadcast(load_one(x + y[k])), inverse_cap).slope.v[0][0];
  const auto write = [&](auto gradient) {
    if (!slopes) return write_gradient(call.stream, x, out, call.vocab, gradient);
    write_gradient(call.stream, x, out, call.vocab, [&](auto x) {
      const Capped<A> capped = soft_cap(x, inverse_cap);
      return gradient(capped.value) * capped.slope;
    });
  };
  if (g_s2 != 0 || (g_k != 0 && !tail))
    write([&](auto x) { return gradient_of<T, Terms::all>(x, c); });
  else if (g_h != 0)
    write([&](auto x) { return gradient_of<T, Terms::linear>(x, c); });
  else
    write([&](auto x) { return gradient_of<T, Terms::constant>(x, c); });

  if (!at_targets || std::isnan(common)) return;
  const AtTarget at_target{inv_t, log_s0, common, g_h, g_s2, g_k, inside, state[State::THRESHOLD]};
  if (call.n_targets > kFewTargets) return write_targets<T>(call, row, out, targets, slopes, at_target);
  for (int64_t k = 0; k < call.n_targets; ++k) {
    if (y[k] == call.ignore_index || y[k] == ELSEWHERE) continue;
    double at_y = 0;  // a repeated target collects the gradients of all its entries
    for (int64_t j = 0; j < call.n_targets; ++j)
      if (y[j] == y[k]) at_y += get<A>(call.g_logp, first + j);
    const double shifted = state[State::TARGETS + k], logp = at_target.logp(shifted);
    store_one(out + y[k], (slopes ? slopes[k].value : 1) * at_target.gradient(shifted, at_y, std::exp(logp), std::expm1(logp)));
  }
}

template <class T>
void backward_rows(const Backward& call, int64_t begin, int64_t end) {
  const bool at_targets = call.g_logp || (call.kept_kind == KeptKind::UNLISTED && call.g_kept_logmass);
  Targets targets(at_targets && call.n_targets > kFewTargets ? call.n_targets : 0);
  std::vector<Slope> slopes(call.softcap > 0 ? call.n_targets + 1 : 0);  // of a row; one more: never empty with a softcap
  for (int64_t row = begin; row < end; ++row) {
    T* out = const_cast<T*>(row_of<T>(call, call.out, row));
    if (is_skipped(call, row) || is_idle<Acc<T>>(call, row))
      std::memset(out, 0, call.vocab * sizeof(T));
    else
      backward_row<T>(call, row, out, targets, call.softcap > 0 ? slopes.data() : nullptr);
  }
  if (call.stream) finish_stream();
}

}  // namespace

namespace rlkern {
namespace RLKERN_ISA {

void token_stats_forward(const Forward& call, int64_t begin, int64_t end) {
  with_type(call.dtype, [&](auto logit) { forward_rows<decltype(logit)>(call, begin, end); });
}

void token_stats_backward(const Backward& call, int64_t begin, int64_t end) {
  with_type(call.dtype, [&](auto logit) { backward_rows<decltype(logit)>(call, begin, end); });
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
