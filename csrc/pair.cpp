// Two rows of logits at once, for one instruction set: divergences with what else one read of both gives.
//
// The log ratio of an entry, x in pair_terms.h, needs both rows' normalisers, which only their end knows. The KL
// kinds are summed around a stand-in for the difference of the two, and corrected to second order. The others
// take a second sweep, from cache.

#include "pair_terms.h"

namespace {

// --- tiles of both rows ------------------------------------------------------------------------------------

// Rows are converted to the accumulation type, a tile at a time, if their types differ, are rare or have a softcap.
inline bool converts(const Pair& call) {
  return call.dtype != call.other_dtype || call.dtype == DType::float16 || call.softcap > 0 || call.other_softcap > 0;
}

// One logit under a softcap, to the bit as in a tile.
template <class A>
A capped(A x, double softcap) {
  return softcap > 0 ? soft_cap(broadcast(x), A(1 / softcap)).value.v[0][0] : x;
}

// Calls f with a value of the type in which both are read.
template <class F>
inline void with_common_type(const Pair& call, F f) {
  if (call.dtype == DType::float64) return f(double{});
  if (converts(call) || call.dtype == DType::float32) return f(float{});
  f(BFloat16{});
}

const void* row_start(const Pair& call, const Matrix& matrix, int dtype, int64_t row) {
  const void* start = nullptr;
  with_type(dtype, [&](auto logit) { start = row_of<decltype(logit)>(call, matrix, row); });
  return start;
}

// n logits from `start` on, converted; -inf pads them to whole packs.
template <class A>
void convert_from(const void* row, int dtype, int64_t start, int64_t n, A* to) {
  constexpr int64_t lanes = kLanes<A>;
  with_type(dtype, [&](auto logit) {
    using T = decltype(logit);
    if constexpr (std::is_same_v<Acc<T>, A>) {
      const T* from = static_cast<const T*>(row) + start;
      int64_t i = 0;
      for (; i + lanes <= n; i += lanes) store(to + i, load_in_order(from + i));
      if (i == n) return;
      T padded[lanes];
      for (int64_t j = 0; j < lanes; ++j) padded[j] = i + j < n ? from[i + j] : Element<T>::minus_infinity();
      store(to + i, load_in_order(padded));
    }
  });
}

template <class A>
void convert_to(const A* from, int64_t n, void* row, int dtype, int64_t start) {
  constexpr int64_t lanes = kLanes<A>;
  with_type(dtype, [&](auto logit) {
    using T = decltype(logit);
    if constexpr (std::is_same_v<Acc<T>, A>) {
      T *to = static_cast<T*>(row) + start, last[lanes];
      int64_t i = 0;
      for (; i + lanes <= n; i += lanes) store_in_order(to + i, load(from + i));
      if (i == n) return;
      store_in_order(last, load(from + i));
      std::memcpy(to + i, last, (n - i) * sizeof(T));
    }
  });
}

template <class A>
void cap_tile(A* tile, int64_t n, double softcap) {
  if (softcap > 0)
    for (int64_t i = 0; i < n; i += kLanes<A>) store(tile + i, soft_cap(load(tile + i), A(1 / softcap)).value);
}

// Calls f(tile of z, tile of w, count), as for_each_tile does.
template <class T, class F>
inline void for_each_pair(const Pair& call, int64_t row, F f) {
  if (converts(call)) {
    if constexpr (std::is_same_v<T, Acc<T>>) {
      const void *z = row_start(call, call.logits, call.dtype, row), *w = row_start(call, call.other, call.other_dtype, row);
      T z_tile[kTile], w_tile[kTile];
      for (int64_t start = 0; start < call.vocab; start += kTile) {
        const int64_t n = std::min(kTile, call.vocab - start);
        convert_from(z, call.dtype, start, n, z_tile);
        convert_from(w, call.other_dtype, start, n, w_tile);
        cap_tile(z_tile, n, call.softcap);
        cap_tile(w_tile, n, call.other_softcap);
        f(z_tile, w_tile, (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>);
      }
    }
    return;
  }
  const T *z = row_of<T>(call, call.logits, row), *w = row_of<T>(call, call.other, row);
  for_each_tile(z, call.vocab, [&](const T* z_tile, int64_t n) {
    if (z_tile >= z && z_tile < z + call.vocab) return f(z_tile, w + (z_tile - z), n);
    const int64_t start = call.vocab / kTile * kTile;  // the last tile, padded
    T w_tile[kTile];
    std::memcpy(w_tile, w + start, (call.vocab - start) * sizeof(T));
    for (int64_t i = call.vocab - start; i < n; ++i) w_tile[i] = Element<T>::minus_infinity();
    f(z_tile, w_tile, n);
  });
}

// --- forward -----------------------------------------------------------------------------------------------

// What a sweep sums that is no kind: what the normalisers need, and with it how much the rows differ.
constexpr int kTrial = -1, kShift = -2;
template <int Kind>
constexpr int kFirstSweep = Kind >= PairKind::JSD ? kShift : Kind;
// The reverse KL says how much rows differ. Where the kind is another, an entry that the other row lacks must not
// count for more than this times its mass: the rest may be close.
constexpr double kMostPerMass = 64;

struct PairSums {
  Sums own;                // of e, as in tile_sums
  double x = 0;            // q - e
  double a = 0, b = 0;     // q - e - e x, q x - (q - e); in a second sweep e f, e g
  double u = 0;            // q t, t the exponent of e
  bool unbounded = false;  // some x stands for infinity
};

// Whole: with the sum for the entropy, and without the entries equal to the maximum. Else the tile has none.
template <class T, int Kind, bool Coarse, bool Whole>
PairSums pair_sums(const T* z, const T* w, int64_t n, const Frame<Acc<T>>& frame, Acc<T> beta, Acc<T> base) {
  using A = Acc<T>;
  constexpr bool mixes = Kind >= PairKind::JSD, forward = Kind == PairKind::FORWARD_KL || Kind == PairKind::MIXED_KL;
  constexpr bool bounds = Kind == kShift || Kind == PairKind::CROSS_ENTROPY, infinite = !mixes && Kind >= 0;
  constexpr bool reverse = bounds || Kind == PairKind::REVERSE_KL || Kind == PairKind::MIXED_KL;
  const Units<A> units(frame);
  AccPack<T> s0{}, s1{}, x{}, a{}, b{}, u{}, furthest{};
  Mask<A> ties{};
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    prefetch_next_tile(z + i);
    prefetch_next_tile(w + i);
    const AccPack<T> at_z = load(z + i), t = (at_z - units.top) * units.scale, e = power_of_two<sizeof(T) == 2>(t);
    if constexpr (Whole) {
      const Mask<A> at_max = at_z == units.top;
      s0 = select(at_max, s0, s0 + e);
      ties = ties + at_max;
      s1 = s1 + e * finite_exponent(t);
    } else if constexpr (!mixes) {
      s0 = s0 + e;
    }
    with_entries<T, Coarse>(at_z, load(w + i), e, t, units, [&](const auto& v) __attribute__((always_inline)) {
      if constexpr (mixes) {
        const auto [e_f, e_g] = mixture_terms<Kind>(v, beta, base);
        a = a + e_f;
        b = b + e_g;
        return;
      }
      if constexpr (Kind == PairKind::CROSS_ENTROPY) u = u + v.all_q() * max_or_second(broadcast(-kFar<A>), t);
      if constexpr (Coarse) {  // what the terms are made of; put together below
        const AccPack<T> bits = v.bits();
        x = x + v.q;
        if constexpr (reverse) a = a + e * (bounds ? max_or_second(broadcast(A(-kMostPerMass * kLog2E)), bits) : bits);
        if constexpr (forward) b = b + v.q * bits;
        if constexpr (infinite) furthest = max_or_second(magnitude(bits), furthest);
      } else {
        x = x + v.e_t();
        if constexpr (reverse) a = a + (bounds ? min_or_second(e * A(kMostPerMass), v.e_reverse()) : v.e_reverse());
        if constexpr (forward) b = b + v.e_forward();
        if constexpr (infinite) furthest = max_or_second(magnitude(v.x), furthest);
      }
    });
  }
  PairSums sums;
  sums.own = {sum_lanes(s0), sum_lanes(s1), 0, -double(sum_lanes(ties))};
  sums.x = sum_lanes(x);
  sums.a = sum_lanes(a);
  sums.b = sum_lanes(b);
  sums.u = sum_lanes(u);
  if constexpr (Coarse && !mixes) {
    sums.x -= sums.own.s0 + sums.own.ties;
    if constexpr (reverse) sums.a = sums.x - kLn2 * sums.a;
    if constexpr (forward) sums.b = kLn2 * sums.b - sums.x;
  }
  sums.unbounded = max_lanes(furthest) > kFar<A> / 2;
  return sums;
}

// Rows whose first tile differs by the first, as differs_much has it, are summed by parts. If the divergence then
// is below the second they are summed again.
constexpr double kCoarseFrom = 0.2, kCoarseTo = 0.05;
template <class T>
constexpr bool kMayBeCoarse = sizeof(T) < 8;  // nobody waits for float64
// A mixture of nearly one row alone has a small divergence from it, whatever the rows.
inline bool may_be_coarse(const Pair& call) { return call.kind < PairKind::JSD || (call.beta >= 0.1 && call.beta <= 0.9); }

// The sums over the tiles so far, in units of the frame.
template <class T, int Kind>
struct PairRow {
  using A = Acc<T>;
  Frame<A> frame;
  A beta;
  bool whole;                  // the entropy is wanted
  bool coarse = false;         // rows that differ much: the first tile decides
  RowSums<A> own;              // of z, as in token_stats
  A other_top = -kInfinity;    // of w
  double mass = 0;             // e, all of it
  double x = 0, a = 0, b = 0;  // as in PairSums
  double u = 0;
  bool only_p = false, only_q = false;  // some entry has mass on one side alone

  PairRow(const Frame<A>& frame, A beta, bool whole) : frame(frame), beta(beta), whole(whole) {}

  // The sums are linear in what a change of the frame does: e grows by k, and x by eta. A side that has had no
  // mass yet has no unit either.
  void move(A top, A other_ref) {
    const double gained = own.top > -kInfinity ? double(frame.top) - double(top) : 0, lost = double(frame.other_ref) - double(other_ref);
    // As the entries' own log ratios move. The bracket is exact: of equal rows nothing may remain.
    const double stretch = Units<A>(frame).stretch, moved_by = lost * stretch - gained;
    const double eta = other_top > -kInfinity ? moved_by * frame.inv_t : 0;
    const double lk = gained * frame.inv_t;
    frame.top = frame.ref = top;
    frame.other_ref = other_ref;
    const double k = std::exp(lk), grown = other_top > -kInfinity ? std::exp(lost * stretch * frame.inv_t) : k,
                 gain = std::abs(eta) < 1 ? k * std::expm1(eta) : grown - k;
    const double moved = k * x + gain * (x + mass);
    u = grown * (u + kLog2E * lk * (x + mass));
    b = grown * (b + x + eta * (mass + x)) - moved;
    a = k * a + gain * x + (gain - k * eta) * mass;
    x = moved;
    mass *= k;
  }

  template <bool Coarse>
  PairSums sums_of(const T* z, const T* w, int64_t n, bool with_max) const {
    return with_max ? pair_sums<T, Kind, Coarse, true>(z, w, n, frame, beta, 0)
                    : pair_sums<T, Kind, Coarse, false>(z, w, n, frame, beta, 0);
  }

  void add(const T* z, const T* w, int64_t n) {
    const A z_top = tile_max(z, n), w_top = tile_max(w, n), top = std::max(own.top, z_top), new_other = std::max(other_top, w_top);
    const bool raised = top > own.top;
    if (raised || new_other > other_top) {
      move(top > -kInfinity ? top : 0, new_other > -kInfinity ? new_other : 0);
      own.raise(top, Units<A>(frame).scale);
      other_top = new_other;
      if (top > -kInfinity && new_other > -kInfinity) {
        // Both normalisers with this tile, so that its terms are summed near their zero.
        const PairSums part = pair_sums<T, kTrial, false, false>(z, w, n, frame, beta, 0);
        const double eta = -std::log1p((x + part.x) / (mass + part.own.s0));
        if (std::isfinite(eta)) move(frame.top, A(double(frame.other_ref) - eta / frame.other_inv_t));
      }
    }
    const bool with_max = whole || (z_top == top && top > -kInfinity);
    const PairSums part = coarse ? sums_of<kMayBeCoarse<T>>(z, w, n, with_max) : sums_of<false>(z, w, n, with_max);
    own.take(part.own, raised);
    mass += part.own.s0 + part.own.ties;
    x += part.x;
    a += part.a;
    b += part.b;
    u += part.u;
    if (part.unbounded) look_for_infinity(z, w, n);
  }

  double log_xi() const { return std::log1p(x / mass); }
  double reverse() const { return std::max(0., a / mass - (x / mass - log_xi())); }
  double forward() const {
    const double xi = x / mass;
    return std::max(0., (b / mass - ((1 + xi) * log_xi() - xi)) / (1 + xi));
  }
  bool differs_much() const { return (Kind == PairKind::FORWARD_KL ? forward() : reverse()) >= kCoarseFrom; }

  void look_for_infinity(const T* z, const T* w, int64_t n) {
    Mask<A> p{}, q{};
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      const Mask<A> no_p = load(z + i) == A(-kInfinity), no_q = load(w + i) == A(-kInfinity);
      p = each<Mask<A>>([&](int j) { return p.v[j] | (no_q.v[j] & ~no_p.v[j]); });
      q = each<Mask<A>>([&](int j) { return q.v[j] | (no_p.v[j] & ~no_q.v[j]); });
    }
    only_p |= any(p);
    only_q |= any(q);
  }
};

template <class T, int Kind>
PairRow<T, Kind> sums_of_row(const PairForward& call, int64_t row, const Frame<Acc<T>>& frame, bool precise) {
  PairRow<T, Kind> sums(frame, Acc<T>(call.beta), call.entropy);
  bool first = true;
  for_each_pair<T>(call, row, [&](const T* z, const T* w, int64_t n) {
    sums.add(z, w, n);
    if (first && !precise && kMayBeCoarse<T>) sums.coarse = may_be_coarse(call) && sums.differs_much();
    first = false;
  });
  return sums;
}

struct Divergence {
  double value, mean_slope, offset;
};

// How contract.py has the MEAN_SLOPE of SKEW_FORWARD_KL: its sign says whether 1 - beta is taken off.
inline double based(double mean_slope, bool is_taken_off) { return is_taken_off ? std::min(mean_slope, -1e-30) : std::max(mean_slope, 0.); }
template <class A>
A base_of(const Pair& call, A mean_slope) {
  return call.kind == PairKind::SKEW_FORWARD_KL && mean_slope < 0 ? A(1 - call.beta) : 0;
}

// The second sweep of a kind that mixes, with both normalisers.
template <class T, int Kind>
Divergence mixture_divergence(const Pair& call, int64_t row, const PairRow<T, kShift>& sums, double offset) {
  Frame<Acc<T>> frame = sums.frame;
  frame.offset = Acc<T>(offset);
  // Of rows that differ much g is all but 1 - beta in most of p: then that is its base.
  const Acc<T> base = Kind == PairKind::SKEW_FORWARD_KL && may_be_coarse(call) && sums.differs_much() ? 1 - sums.beta : 0;
  double f = 0, g = 0;
  for_each_pair<T>(call, row, [&](const T* z, const T* w, int64_t n) {
    const PairSums part = sums.coarse ? pair_sums<T, Kind, kMayBeCoarse<T>, false>(z, w, n, frame, sums.beta, base)
                                      : pair_sums<T, Kind, false, false>(z, w, n, frame, sums.beta, base);
    f += part.a;
    g += part.b;
  });
  return {std::max(0., f / sums.mass), Kind == PairKind::SKEW_FORWARD_KL ? based(g / sums.mass, base != 0) : g / sums.mass, offset};
}

template <class T, int Kind>
Divergence divergence_of(const Pair& call, int64_t row, const PairRow<T, kFirstSweep<Kind>>& sums) {
  const double offset = -sums.log_xi();
  if constexpr (Kind >= PairKind::JSD) {
    return mixture_divergence<T, Kind>(call, row, sums, offset);
  } else if constexpr (Kind == PairKind::CROSS_ENTROPY) {
    // Two sums of positive terms.
    const double value = sums.only_q ? kInfinity : std::log1p(sums.own.sums.s0) - kLn2 * sums.u / (sums.mass + sums.x);
    return {value, 0, offset};
  } else {
    const double reverse = sums.only_p ? kInfinity : sums.reverse(), forward = sums.only_q ? kInfinity : sums.forward();
    if (Kind == PairKind::REVERSE_KL) return {reverse, reverse, offset};
    if (Kind == PairKind::FORWARD_KL) return {forward, 0, offset};
    return {call.beta * forward + (1 - call.beta) * reverse, (1 - call.beta) * reverse, offset};
  }
}

// Statistics of one side as token_stats has them. No maximum: nothing above -inf, +inf or NaN.
template <class A>
struct SideStats {
  A top, inv_t;
  bool undefined;
  double rest, log_s0, mean_u;

  SideStats(const RowSums<A>& row, A inv_t) : top(row.top), inv_t(inv_t) {
    undefined = std::isinf(top) || std::isnan(row.sums.s0);
    if (std::isnan(row.sums.s0)) top = A(kNaN);
    rest = undefined ? kNaN : row.sums.s0;
    log_s0 = undefined ? kNaN : std::log1p(row.sums.s0);
    mean_u = undefined ? kNaN : kLn2 * row.sums.s1 / (1 + row.sums.s0);
  }
  double entropy() const { return log_s0 - mean_u; }
  double logsumexp() const { return top == -kInfinity ? -kInfinity : double(top) * inv_t + log_s0; }
  // x[y] - top, NaN outside of the row
  template <class T>
  A shifted(const T* x, int64_t y, int64_t vocab, double softcap) const {
    if (y < 0 || y >= vocab) return A(kNaN);
    const A at_y = capped(A(load_one(x + y)), softcap);
    return at_y == -kInfinity ? at_y : at_y - top;
  }
  double logp(A shifted) const { return double(shifted) * inv_t - log_s0; }
};

// Calls f with a kind as a constant.
template <class F>
void with_kind(int kind, F f) {
  switch (kind) {
    case PairKind::REVERSE_KL:
      return f(std::integral_constant<int, PairKind::REVERSE_KL>{});
    case PairKind::FORWARD_KL:
      return f(std::integral_constant<int, PairKind::FORWARD_KL>{});
    case PairKind::MIXED_KL:
      return f(std::integral_constant<int, PairKind::MIXED_KL>{});
    case PairKind::CROSS_ENTROPY:
      return f(std::integral_constant<int, PairKind::CROSS_ENTROPY>{});
    case PairKind::JSD:
      return f(std::integral_constant<int, PairKind::JSD>{});
    case PairKind::SKEW_FORWARD_KL:
      return f(std::integral_constant<int, PairKind::SKEW_FORWARD_KL>{});
    case PairKind::SKEW_REVERSE_KL:
      return f(std::integral_constant<int, PairKind::SKEW_REVERSE_KL>{});
  }
}

template <class T, int Kind>
void pair_forward_row(const PairForward& call, int64_t row, const Frame<Acc<T>>& frame) {
  using A = Acc<T>;
  auto sums = sums_of_row<T, kFirstSweep<Kind>>(call, row, frame, false);
  Divergence d = divergence_of<T, Kind>(call, row, sums);
  if (sums.coarse && d.value < kCoarseTo) {
    sums = sums_of_row<T, kFirstSweep<Kind>>(call, row, frame, true);
    d = divergence_of<T, Kind>(call, row, sums);
  }
  const SideStats<A> own(sums.own, frame.inv_t);
  if (own.undefined || std::isinf(sums.other_top) || std::isnan(sums.x)) d = {kNaN, kNaN, kNaN};
  if (std::isinf(d.value)) d.mean_slope = kNaN;  // as the gradient: no number is right

  A* state = static_cast<A*>(call.state) + row * PairState::WIDTH;
  for (int64_t i = 0; i < PairState::WIDTH; ++i) state[i] = 0;
  state[PairState::MAX] = own.top;
  state[PairState::REST] = A(own.rest);
  state[PairState::MEAN_U] = A(own.mean_u);
  state[PairState::REF] = sums.frame.ref;
  state[PairState::OTHER_REF] = sums.frame.other_ref;
  state[PairState::OFFSET] = A(d.offset);
  state[PairState::MEAN_SLOPE] = A(d.mean_slope);
  put<A>(call.divergence, row, d.value);
  put<A>(call.entropy, row, own.entropy());
  put<A>(call.logsumexp, row, own.logsumexp());
  const int64_t y = call.targets ? call.targets[row] : 0;
  if (call.targets) {
    const void* z = row_start(call, call.logits, call.dtype, row);
    with_type(call.dtype, [&](auto logit) {
      state[PairState::TARGET] = own.shifted(static_cast<const decltype(logit)*>(z), y, call.vocab, call.softcap);
    });
    put<A>(call.logp, row, own.logp(state[PairState::TARGET]));
  }
  if (!call.other_logsumexp) return;
  RowSums<A> other;
  for_each_pair<T>(call, row, [&](const T*, const T* w, int64_t n) {
    other.template add<false, true>(w, n, A(kLog2E * frame.other_inv_t), tile_after(w));
  });
  const SideStats<A> others(other, frame.other_inv_t);
  state[PairState::OTHER_MAX] = others.top;
  state[PairState::OTHER_REST] = A(others.rest);
  state[PairState::OTHER_MEAN_SLOPE] = A(d.value - d.mean_slope - base_of(call, d.mean_slope));
  put<A>(call.other_logsumexp, row, others.logsumexp());
  put<A>(call.other_entropy, row, others.entropy());
  if (!call.other_logp) return;
  const void* w = row_start(call, call.other, call.other_dtype, row);
  with_type(call.other_dtype, [&](auto logit) {
    put<A>(call.other_logp, row, others.logp(others.shifted(static_cast<const decltype(logit)*>(w), y, call.vocab, call.other_softcap)));
  });
}

template <class T>
void pair_forward_rows(const PairForward& call, int64_t begin, int64_t end) {
  using A = Acc<T>;
  for (int64_t row = begin; row < end; ++row) {
    if (is_skipped(call, row)) {
      for (int64_t i = 0; i < PairState::WIDTH; ++i) put<A>(call.state, row * PairState::WIDTH + i, 0);
      for (void* out :
           {call.divergence, call.logp, call.entropy, call.logsumexp, call.other_logp, call.other_entropy, call.other_logsumexp})
        put<A>(out, row, 0);
      continue;
    }
    const Frame<A> frame = frame_of<A>(call, row);
    with_kind(call.kind, [&](auto kind) { pair_forward_row<T, kind>(call, row, frame); });
  }
}

// --- sums of a mixture over some columns -------------------------------------------------------------------

// What contract.py has in `state` of where entries are counted from.
template <class A>
Frame<A> frame_of_state(const Pair& call, int64_t row) {
  const A* state = static_cast<const A*>(call.state) + row * PairState::WIDTH;
  Frame<A> frame = frame_of<A>(call, row);
  frame.top = state[PairState::MAX];
  frame.ref = state[PairState::REF];
  frame.other_ref = state[PairState::OTHER_REF];
  frame.offset = state[PairState::OFFSET];
  return frame;
}

template <class T, int Kind>
void mixture_sums_of_row(const PairMixtureSums& call, int64_t row) {
  using A = Acc<T>;
  const Frame<A> frame = frame_of_state<A>(call, row);
  double f = 0, g = 0;
  for_each_pair<T>(call, row, [&](const T* z, const T* w, int64_t n) {
    const PairSums part = pair_sums<T, Kind, false, false>(z, w, n, frame, A(call.beta), 0);
    f += part.a;
    g += part.b;
  });
  const double rest = static_cast<const A*>(call.state)[row * PairState::WIDTH + PairState::REST];
  const double total = std::isnan(frame.offset) ? kNaN : 1 + rest;  // NaN where a row is no distribution
  put<A>(call.sums, 2 * row, f / total);
  put<A>(call.sums, 2 * row + 1, g / total);
}

template <class T>
void pair_mixture_sums_rows(const PairMixtureSums& call, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (is_skipped(call, row)) {
      for (int64_t i : {2 * row, 2 * row + 1}) put<Acc<T>>(call.sums, i, 0);
      continue;
    }
    with_kind(call.kind, [&](auto kind) {
      if constexpr (kind >= PairKind::JSD) mixture_sums_of_row<T, kind>(call, row);
    });
  }
}

// --- backward ----------------------------------------------------------------------------------------------

// dz = e (slope (g - base) + constant + linear t), t the exponent of e. 1 / T and the row's sum are folded in.
template <class A>
struct PairCoefficients {
  Frame<A> frame;
  A slope, constant, linear, beta, base;
};

// e (g - base) of entries whose differences are formed in a given way.
template <int Kind, class T, By Difference>
RLKERN_INLINE AccPack<T> slope_terms(const Entries<T, Difference>& v, const PairCoefficients<Acc<T>>& c) {
  const Acc<T> beta = c.beta;
  if constexpr (Kind == PairKind::REVERSE_KL) return AccPack<T>{} - v.e * v.x;
  if constexpr (Kind == PairKind::FORWARD_KL || Kind == PairKind::CROSS_ENTROPY) return AccPack<T>{} - v.e_t();
  if constexpr (Kind == PairKind::MIXED_KL) return AccPack<T>{} - v.e_t() * beta - v.e * v.x * (1 - beta);
  if constexpr (Kind >= PairKind::JSD) return mixture_terms<Kind>(v, beta, c.base).second;
}

template <class T, int Kind>
RLKERN_INLINE AccPack<T> pair_gradient_of(const AccPack<T>& z, const AccPack<T>& w, const Units<Acc<T>>& u,
                                          const PairCoefficients<Acc<T>>& c) {
  using A = Acc<T>;
  const AccPack<T> t = (z - u.top) * u.scale, e = power_of_two<sizeof(T) == 2>(t);
  AccPack<T> e_g;
  const auto take = [&](const auto& v) __attribute__((always_inline)) { e_g = slope_terms<Kind>(v, c); };
  const AccPack<T> x = log_ratio<T>(z, w, u);
  if constexpr (Kind == PairKind::REVERSE_KL) {
    e_g = AccPack<T>{} - e * x;
  } else if (!any_above(magnitude(x), A(kNear))) {
    take(Entries<T, By::series>(e, t, x, w, u));
  } else {
    take(Entries<T, sizeof(T) == 2 ? By::either_of_few_digits : By::either>(e, t, x, w, u));
  }
  return e_g * c.slope + e * (finite_exponent(t) * c.linear + c.constant);
}

// A tile of the gradient by capped logits becomes that by the logits, which are not yet written over.
template <class A>
void multiply_by_slopes(const PairBackward& call, int64_t row, int64_t start, int64_t n, A* tile) {
  if (!(call.softcap > 0)) return;
  A raw[kTile];
  convert_from(row_start(call, call.logits, call.dtype, row), call.dtype, start, n, raw);
  for (int64_t i = 0; i < n; i += kLanes<A>) store(tile + i, load(tile + i) * soft_cap(load(raw + i), A(1 / call.softcap)).slope);
}

template <class T, int Kind>
void write_pair_gradient(const PairBackward& call, int64_t row, void* out, const PairCoefficients<Acc<T>>& c) {
  const Units<Acc<T>> u(c.frame);
  int64_t start = 0;
  for_each_pair<T>(call, row, [&](const T* z, const T* w, int64_t n) {
    T tile[kTile];
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      prefetch_next_tile(z + i);
      prefetch_next_tile(w + i);
      store(tile + i, pair_gradient_of<T, Kind>(load(z + i), load(w + i), u, c));
    }
    const int64_t left = std::min(kTile, call.vocab - start);
    if constexpr (std::is_same_v<T, Acc<T>>)
      if (converts(call)) {
        multiply_by_slopes(call, row, start, left, tile);
        return convert_to(tile, left, out, call.dtype, std::exchange(start, start + left));
      }
    write_gradient(call.stream, tile, static_cast<T*>(out) + std::exchange(start, start + left), left, [](auto dz) { return dz; });
  });
}

// g(x) of one entry.
double slope_at(int kind, double beta, double x) {
  const double t = std::expm1(std::min(x, 700.)), rest = 1 - beta;
  const auto log_mixture = [&](double share) {
    return std::max(x, 0.) + std::log1p((x > 0 ? 1 - share : share) * std::expm1(-std::abs(x)));
  };
  switch (kind) {
    case PairKind::REVERSE_KL:
      return -x;
    case PairKind::MIXED_KL:
      return -beta * t - rest * x;
    case PairKind::JSD:
      return -rest * log_mixture(beta);
    case PairKind::SKEW_FORWARD_KL:
      return -rest * rest * t / (1 + beta * t);
    case PairKind::SKEW_REVERSE_KL:
      return -log_mixture(rest) + beta * rest * t / (1 + rest * t);
  }
  return -t;
}

template <class T>
void pair_backward_row(const PairBackward& call, int64_t row) {
  using A = Acc<T>;
  const A* state = static_cast<const A*>(call.state) + row * PairState::WIDTH;
  const double g_d = get<A>(call.g_divergence, row), g_h = get<A>(call.g_entropy, row), g_z = get<A>(call.g_logsumexp, row);
  const double g_y = call.targets ? get<A>(call.g_logp, row) : 0;
  const double rest = state[PairState::REST], log_s0 = std::log1p(rest), mean_slope = state[PairState::MEAN_SLOPE];
  const int64_t y = call.targets ? call.targets[row] : 0;
  const bool inside = y >= 0 && y < call.vocab, lost = g_y != 0 && !inside && y != ELSEWHERE;

  PairCoefficients<A> c{};
  c.frame = frame_of_state<A>(call, row);
  c.beta = A(call.beta);
  c.base = base_of(call, state[PairState::MEAN_SLOPE]);
  // Terms without upstream gradient are left out: 0 * (-inf) is NaN.
  double others = g_z;
  if (g_h != 0) others += g_h * double(state[PairState::MEAN_U]);
  if (g_d != 0) others -= g_d * mean_slope;
  if (lost) others = kNaN;
  const double inv_t = c.frame.inv_t, weight = inv_t / (1 + rest);
  c.slope = A(weight * g_d);
  c.constant = A(weight * (others - g_y));
  c.linear = A(-weight * g_h * kLn2);

  const int kind = g_d == 0 ? int(PairKind::REVERSE_KL) : call.kind;
  void* out = const_cast<void*>(row_start(call, call.out, call.dtype, row));
  double slope = 1;  // at the target, of a softcap; read now: the gradient may be written over the logits
  if (call.softcap > 0 && g_y != 0 && inside)
    with_type(call.dtype, [&](auto logit) {
      const A raw = A(load_one(static_cast<const decltype(logit)*>(row_start(call, call.logits, call.dtype, row)) + y));
      slope = soft_cap(broadcast(raw), A(1 / call.softcap)).slope.v[0][0];
    });
  with_kind(kind, [&](auto kind) { write_pair_gradient<T, kind>(call, row, out, c); });

  if (g_y == 0 || !inside) return;
  // At the target p - 1 is given beside p: no cancellation as p goes to 1.
  const double shifted = state[PairState::TARGET], u = shifted * inv_t, logp = u - log_s0;
  double here = others;
  if (g_h != 0) here -= g_h * (u < -1e4 ? -1e4 : u);
  if (g_d != 0 && shifted > -kInfinity) {
    with_type(call.other_dtype, [&](auto logit) {
      using W = decltype(logit);
      const double at_w =
          capped(A(load_one(static_cast<const W*>(row_start(call, call.other, call.other_dtype, row)) + y)), call.other_softcap);
      const double z_ref = shifted + (double(c.frame.top) - double(c.frame.ref));
      here += g_d * (slope_at(kind, call.beta, (at_w - c.frame.other_ref) * c.frame.other_inv_t - z_ref * inv_t + c.frame.offset) - c.base);
    });
  }
  const double at_y = slope * inv_t * (std::exp(logp) * here - g_y * std::expm1(logp));
  with_type(call.dtype, [&](auto logit) { store_one(static_cast<decltype(logit)*>(out) + y, at_y); });
}

template <class T>
void pair_backward_rows(const PairBackward& call, int64_t begin, int64_t end) {
  using A = Acc<T>;
  for (int64_t row = begin; row < end; ++row) {
    bool idle = is_skipped(call, row);
    if (!idle) {
      idle = true;
      for (const void* g : {call.g_divergence, call.g_logp, call.g_entropy, call.g_logsumexp}) idle &= get<A>(g, row) == 0;
    }
    if (!idle) {
      pair_backward_row<T>(call, row);
      continue;
    }
    void* out = const_cast<void*>(row_start(call, call.out, call.dtype, row));
    with_type(call.dtype, [&](auto logit) { std::memset(out, 0, call.vocab * sizeof logit); });
  }
  if (call.stream) finish_stream();
}

}  // namespace

namespace rlkern {
namespace RLKERN_ISA {

void pair_forward(const PairForward& call, int64_t begin, int64_t end) {
  with_common_type(call, [&](auto logit) { pair_forward_rows<decltype(logit)>(call, begin, end); });
}

void pair_mixture_sums(const PairMixtureSums& call, int64_t begin, int64_t end) {
  with_common_type(call, [&](auto logit) { pair_mixture_sums_rows<decltype(logit)>(call, begin, end); });
}

void pair_backward(const PairBackward& call, int64_t begin, int64_t end) {
  with_common_type(call, [&](auto logit) { pair_backward_rows<decltype(logit)>(call, begin, end); });
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
