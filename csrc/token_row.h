// One row's part of token_stats, for one instruction set: its statistics, and its gradient.
#pragma once

#include "rows.h"

namespace {

// The targets of a row, numbered as its logits are.
struct RowTargets {
  const int64_t* ids;
  int64_t n, ignored;
};
inline RowTargets targets_of(const Rows& call, int64_t row) {
  return {call.targets ? call.targets + row * call.n_targets : nullptr, call.n_targets, call.ignore_index};
}

// --- forward -----------------------------------------------------------------------------------------------

// What sum 2^t is of the logits that are kept and of the others.
struct Masses {
  double kept, others;
};
template <class A>
double log_share(const Masses& masses) {
  // Where A does not hold this nothing is kept, as in the other backends: its slopes would not be finite.
  const double ratio = masses.others / masses.kept;
  return ratio > std::numeric_limits<A>::max() ? -kInfinity : -std::log1p(ratio);
}

// Of the logits with x - top >= threshold.
template <class Row, class A>
[[gnu::noinline]] Masses masses_above(const Row& row, A top, A scale, A threshold) {
  using T = typename Row::Tile;
  Masses masses{};
  row.for_each_tile([&](const T* tile, int64_t n, Place place) {
    AccPack<T> outside{}, inside{};
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      prefetch_pack<T>(place.next + i * sizeof(T));
      const AccPack<T> shifted = load(tile + i) - top;
      const AccPack<T> e = power_of_two<sizeof(T) == 2>(shifted * scale);
      const Mask<A> is_kept = shifted >= threshold;
      outside = outside + select(is_kept, AccPack<T>{}, e);
      inside = inside + select(is_kept, e, AccPack<T>{});
    }
    masses.others += sum_lanes(outside);
    masses.kept += sum_lanes(inside);
  });
  return masses;
}

// The ids that a row lists, by the tile they are in.
class Listed {
 public:
  Listed(int64_t vocab, int64_t most) : vocab_(vocab), last_((vocab + kTile - 1) / kTile) { ids_.reserve(most); }
  void take(const RowTargets& y) {
    std::memset(last_.data(), 0, last_.size() * sizeof(Place));
    ids_.clear();
    for (int64_t k = 0; k < y.n; ++k) {
      if (y.ids[k] == y.ignored || y.ids[k] < 0 || y.ids[k] >= vocab_) continue;
      Place& last = last_[y.ids[k] / kTile];
      ids_.push_back({y.ids[k] % kTile, last.place});
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
  int64_t vocab_;
  // Vectors of this file's own types, as in Targets below.
  std::vector<Place> last_;
  std::vector<Id> ids_;
};

// Of the logits that are not listed.
template <class Row, class A>
[[gnu::noinline]] Masses masses_unlisted(const Row& row, A top, A scale, const Listed& listed) {
  using T = typename Row::Tile;
  Masses masses{};
  row.for_each_tile([&](const T* tile, int64_t n, Place place) {
    T rest[kTile], taken[kTile];
    int64_t count = 0;
    listed.for_each_in(place.start / kTile, [&](int64_t at) {
      if (count == 0) std::memcpy(rest, tile, n * sizeof(T));
      if (load_one(rest + at) == -kInfinity) return;  // nothing, or taken before
      taken[count++] = rest[at];
      rest[at] = Element<T>::minus_infinity();
    });
    masses.kept += tile_sums<T, false, false, false>(count == 0 ? tile : rest, n, place.next, top, scale).s0;
    if (count == 0) return;
    for (; count % kLanes<T> != 0; ++count) taken[count] = Element<T>::minus_infinity();
    masses.others += tile_sums<T, false, false, false>(taken, count, place.next, top, scale).s0;
  });
  return masses;
}

template <class Row, class A>
Masses masses_of(const Row& x, int kept_kind, const RowTargets& y, Listed& listed, A top, A scale, A threshold) {
  if (kept_kind != KeptKind::UNLISTED) return masses_above(x, top, scale, threshold);
  listed.take(y);
  return masses_unlisted(x, top, scale, listed);
}

// A row's distribution: NaN where it has none.
template <class A>
struct Distribution {
  A top;  // as it is, also if -inf or +inf
  double rest, mean_u, sum_sq, log_s0;

  double entropy() const { return log_s0 - mean_u; }
  double logsumexp(A inv_t) const { return top == -kInfinity ? -kInfinity : double(top) * inv_t + log_s0; }
};

template <class Row, class A>
Distribution<A> distribution_of(const Row& x, A scale, bool squares, bool entropy) {
  const auto [top, sums] = squares   ? row_sums<true, true>(x, scale)
                           : entropy ? row_sums<false, true>(x, scale)
                                     : row_sums<false, false>(x, scale);
  if (std::isnan(sums.s0)) return {A(kNaN), kNaN, kNaN, kNaN, kNaN};
  if (std::isinf(top)) return {top, kNaN, kNaN, kNaN, kNaN};  // nothing above -inf, or a +inf
  const double mass = 1 + sums.s0;
  return {top, sums.s0, kLn2 * sums.s1 / mass, sums.s2 / (mass * mass), std::log1p(sums.s0)};
}

// x is kept where x - top reaches it. In the accumulation type, as the other backends compute it: the same
// logits are kept.
template <class A>
A kept_threshold(const Forward& call, const Distribution<A>& d, A inv_t) {
  if (call.kept_kind == KeptKind::NONE) return 0;
  if (call.kept_kind == KeptKind::UNLISTED) return A(-kInfinity);
  const A log_kept = A(call.log_kept);
  return (call.kept_kind == KeptKind::MIN_P ? log_kept : log_kept + A(d.log_s0)) / inv_t;
}

// Results and state of a row. What is kept is 0, and its threshold what was asked for.
template <class A>
A* put_row(const Forward& call, int64_t row, const Distribution<A>& d, A inv_t) {
  A* state = static_cast<A*>(call.state) + row * (State::TARGETS + call.n_targets);
  state[State::MAX] = d.top;
  state[State::REST] = A(d.rest);
  state[State::MEAN_U] = A(d.mean_u);
  state[State::SUM_SQ] = call.sum_sq_prob ? A(d.sum_sq) : 0;
  state[State::KEPT] = 0;
  state[State::THRESHOLD] = kept_threshold(call, d, inv_t);
  put<A>(call.entropy, row, d.entropy());
  put<A>(call.logsumexp, row, d.logsumexp(inv_t));
  put<A>(call.sum_sq_prob, row, d.sum_sq);
  return state;
}

// At the row's target number k; shifted: its logit less the row's maximum.
template <class A>
void put_target(const Forward& call, int64_t row, int64_t k, bool ignored, A shifted, const Distribution<A>& d, A inv_t) {
  put<A>(call.state, row * (State::TARGETS + call.n_targets) + State::TARGETS + k, shifted);
  put<A>(call.logp, row * call.n_targets + k, ignored ? 0 : double(shifted) * inv_t - d.log_s0);
}

template <class Row, class A = Acc<typename Row::Tile>>
Distribution<A> forward_row(const Forward& call, int64_t row, const Row& x, const RowTargets& y, Listed& listed, bool with_entropy) {
  const A inv_t = inverse_temperature<A>(call, row), scale = A(kLog2E * inv_t);
  const Distribution<A> d = distribution_of(x, scale, call.sum_sq_prob, with_entropy);
  A* state = put_row(call, row, d, inv_t);
  if (call.kept_kind != KeptKind::NONE) {
    const double kept =
        std::isnan(d.rest) ? kNaN : log_share<A>(masses_of(x, call.kept_kind, y, listed, d.top, scale, state[State::THRESHOLD]));
    state[State::KEPT] = A(kept);
    put<A>(call.kept_logmass, row, kept);
  }
  for (int64_t k = 0; k < y.n; ++k) {
    A shifted = A(kNaN);
    if (y.ids[k] >= 0 && y.ids[k] < x.size()) {
      const A at_y = x.at(y.ids[k]);
      shifted = at_y == -kInfinity ? at_y : at_y - d.top;
    }
    put_target(call, row, k, y.ids[k] == y.ignored, shifted, d, inv_t);
  }
  return d;
}

// A row that is not read.
template <class A>
void skip_row(const Forward& call, int64_t row) {
  const int64_t width = State::TARGETS + call.n_targets;
  for (int64_t i = 0; i < width; ++i) put<A>(call.state, row * width + i, 0);
  for (int64_t k = 0; k < call.n_targets; ++k) put<A>(call.logp, row * call.n_targets + k, 0);
  for (void* out : {call.entropy, call.logsumexp, call.sum_sq_prob, call.kept_logmass}) put<A>(out, row, 0);
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
  double upstream, shifted, slope, full;
};

// At one of a row's targets: the softcap's slope, and the gradient of what is over the full row.
struct Beside {
  double slope, full;
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

// A target at -inf without upstream gradient has what any logit at -inf has. So has one outside a set.
inline bool adds_nothing(double shifted, double upstream) { return shifted == -kInfinity && upstream == 0; }

// Many targets: each once, and their probabilities side by side.
template <class T>
[[gnu::noinline]] void write_targets(const Backward& call, int64_t row, const RowTargets& y, T* out, Targets& targets, const Beside* beside,
                                     AtTarget at_target) {
  using A = Acc<T>;
  const int64_t first = row * y.n;
  const A* shifted = static_cast<const A*>(call.state) + row * (State::TARGETS + y.n) + State::TARGETS;
  targets.clear();
  for (int64_t k = 0; k < y.n; ++k)
    if (y.ids[k] != y.ignored && y.ids[k] != ELSEWHERE)
      targets.add({y.ids[k], get<A>(call.g_logp, first + k), shifted[k], beside ? beside[k].slope : 1, beside ? beside[k].full : 0});
  constexpr int64_t lanes = Pack<double>::lanes;
  for (const Target* t = targets.begin(); t < targets.end(); t += lanes) {
    const int64_t n = std::min<int64_t>(lanes, targets.end() - t);
    double logp[lanes] = {}, p[lanes];
    for (int64_t j = 0; j < n; ++j) logp[j] = at_target.logp(t[j].shifted);
    store(p, power_of_two(load(logp) * kLog2E));
    for (int64_t j = 0; j < n; ++j) {
      if (adds_nothing(t[j].shifted, t[j].upstream)) continue;
      const double p_minus_1 = p[j] > 0.5 ? std::expm1(logp[j]) : p[j] - 1;
      store_one(out + t[j].id, t[j].slope * at_target.gradient(t[j].shifted, t[j].upstream, p[j], p_minus_1) + t[j].full);
    }
  }
}

// The gradient of the entropy and logsumexp of a full row: of all its logits, where others are those of a set.
template <class A>
struct Full {
  double top, inv_t, rest, mean_u, g_h, g_z;

  Coefficients<A> coefficients() const {
    const double weight = inv_t / (1 + rest);
    return {A(top), A(kLog2E * inv_t), A(weight * (g_z + (g_h != 0 ? g_h * mean_u : 0))), A(-weight * g_h * kLn2), 0, 0, 0};
  }
  double at(double x) const {
    const double u = std::max((x - top) * inv_t, -1e4);
    return inv_t * std::exp(u) / (1 + rest) * (g_h != 0 ? g_z - g_h * (u - mean_u) : g_z);
  }
};
struct NotFull {};

template <class T, class A = Acc<T>>
auto gradient_by(const Full<A>& full) {
  return [c = full.coefficients()](auto x) { return gradient_of<T, Terms::linear>(x, c); };
}

// The gradient by the logits, where f is that by what a softcap makes of them.
template <class F, class A>
auto by_logits(F f, A inverse_cap) {
  return [=](auto x) {
    const Capped<A> capped = soft_cap(x, inverse_cap);
    return f(capped.value) * capped.slope;
  };
}

// Where the kernels get and put a row: plain, of all logits.
template <class T, class F>
void write_row(const PlainRow<T>& row, bool stream, bool, T* out, F f, NotFull) {
  write_gradient(stream, row.x, out, row.vocab, f);
}
template <class T, class F, class G>
void write_row(const PlainRow<T>& row, bool stream, bool, T* out, F f, G full) {
  write_gradient(stream, row.x, out, row.vocab, [&](auto x) { return f(x) + full(x); });
}

template <class Row, class T, class FullOrNot>
void backward_row(const Backward& call, int64_t row, const Row& x, const RowTargets& y, T* out, Targets& targets, Beside* beside,
                  const FullOrNot& full) {
  using A = Acc<T>;
  constexpr bool with_full = !std::is_same_v<FullOrNot, NotFull>;
  const A* state = static_cast<const A*>(call.state) + row * (State::TARGETS + y.n);
  const int64_t first = row * y.n;
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
    for (int64_t k = 0; k < y.n; ++k) {
      if (y.ids[k] == y.ignored) continue;
      common -= (y.ids[k] >= 0 && y.ids[k] < x.size()) || y.ids[k] == ELSEWHERE ? get<A>(call.g_logp, first + k) : kNaN;
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
  const bool capped = call.softcap > 0, careful = !std::isfinite(c.constant + c.linear + c.square + c.inside) || std::isnan(c.scale);
  const A inverse_cap = capped ? A(1 / call.softcap) : A(0);
  if (beside && at_targets)  // now: the gradient may be written over the logits
    for (int64_t k = 0; k < y.n; ++k)
      if (y.ids[k] >= 0 && y.ids[k] < x.size()) {
        const A logit = load_one(x.x + y.ids[k]);
        const Capped<A> at_y = soft_cap(broadcast(logit), inverse_cap);
        beside[k] = {capped ? double(at_y.slope.v[0][0]) : 1, 0};
        if constexpr (with_full) beside[k].full = beside[k].slope * full.at(capped ? at_y.value.v[0][0] : logit);
      }
  const auto write = [&](auto gradient) {
    if constexpr (with_full) {
      const auto of_full = gradient_by<T>(full);
      if (!capped) return write_row(x, call.stream, careful, out, gradient, of_full);
      write_row(x, call.stream, careful, out, by_logits(gradient, inverse_cap), by_logits(of_full, inverse_cap));
    } else {
      if (!capped) return write_row(x, call.stream, careful, out, gradient, full);
      write_row(x, call.stream, careful, out, by_logits(gradient, inverse_cap), full);
    }
  };
  if (with_full || g_s2 != 0 || (g_k != 0 && !tail)) {
    write([&](auto x) { return gradient_of<T, Terms::all>(x, c); });
  } else if constexpr (!with_full) {
    if (g_h != 0)
      write([&](auto x) { return gradient_of<T, Terms::linear>(x, c); });
    else
      write([&](auto x) { return gradient_of<T, Terms::constant>(x, c); });
  }

  if (!at_targets || std::isnan(common)) return;
  const AtTarget at_target{inv_t, log_s0, common, g_h, g_s2, g_k, inside, state[State::THRESHOLD]};
  if (y.n > kFewTargets) return write_targets<T>(call, row, y, out, targets, beside, at_target);
  for (int64_t k = 0; k < y.n; ++k) {
    if (y.ids[k] == y.ignored || y.ids[k] == ELSEWHERE) continue;
    double at_y = 0;  // a repeated target collects the gradients of all its entries
    for (int64_t j = 0; j < y.n; ++j)
      if (y.ids[j] == y.ids[k]) at_y += get<A>(call.g_logp, first + j);
    const double shifted = state[State::TARGETS + k], logp = at_target.logp(shifted);
    if (adds_nothing(shifted, at_y)) continue;
    const double gradient = at_target.gradient(shifted, at_y, std::exp(logp), std::expm1(logp));
    store_one(out + y.ids[k], beside ? beside[k].slope * gradient + beside[k].full : gradient);
  }
}

// Room for what backward_row keeps of a row's targets.
class BackwardRoom {
 public:
  BackwardRoom(const Backward& call, bool with_full)
      : targets(has_upstream(call) && call.n_targets > kFewTargets ? call.n_targets : 0),
        beside_(call.softcap > 0 || with_full ? call.n_targets + 1 : 0) {}
  Targets targets;
  Beside* beside() { return beside_.empty() ? nullptr : beside_.data(); }

 private:
  static bool has_upstream(const Backward& call) { return call.g_logp || (call.kept_kind == KeptKind::UNLISTED && call.g_kept_logmass); }
  std::vector<Beside> beside_;  // one more than there are: never empty if it is needed
};

}  // namespace
