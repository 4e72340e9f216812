// Two rows of logits at once, for one instruction set: divergences with what else one read of both gives.
//
// With p and q the distributions of logits z and other w, x = log(q / p) and t = q / p - 1, every divergence is
// sum p f(x), f >= 0, and its gradient by z is p (g(x) - sum p g) / T. In units of the row's maximum e stands for
// p, and q for q. Where |x| <= 1/2 differences of the two come from x, by series, and elsewhere from e and q: all
// terms keep their relative accuracy, and so does a divergence of 1e-12.
//
// x needs both normalisers, which only the end of the row knows. The KL kinds are summed around a stand-in for
// their difference, and corrected to second order. The others take a second sweep, from cache.

#include "rows.h"

namespace {

constexpr double kNear = 0.5;

// Stands for infinity: finite, for products with 0.
template <class A>
constexpr A kFar = sizeof(A) == 8 ? A(1e300) : A(1e20);

// --- an entry ----------------------------------------------------------------------------------------------

// e = 2^((z - top) / t log2(e)), x = (w - other_ref) / other_t - (z - ref) / t + offset, q = e 2^(x log2(e)).
template <class A>
struct Frame {
  A top, ref, other_ref, offset;
  A inv_t, other_inv_t;
};

template <class A>
Frame<A> frame_of(const Pair& call, int64_t row) {
  return {0, 0, 0, 0, inverse_temperature<A>(call, row), inverse_temperature<A>(call.other_temperature, call.other_temperatures, row)};
}

// What every entry needs of a frame.
template <class A>
struct Units {
  A top, ref, other_ref, offset, inv_t, other_inv_t;
  A scale, other_scale, shift;  // e = 2^((z - top) scale), q = 2^((w - other_ref) other_scale + shift)
  A lead;

  explicit Units(const Frame<A>& f)
      : top(f.top),
        ref(f.ref),
        other_ref(f.other_ref),
        offset(f.offset),
        inv_t(f.inv_t),
        other_inv_t(f.other_inv_t),
        scale(A(kLog2E * f.inv_t)),
        other_scale(A(kLog2E * f.other_inv_t)),
        shift(A(kLog2E * (double(f.offset) + (double(f.ref) - double(f.top)) * f.inv_t))),
        lead(f.ref - f.other_ref) {}
};

template <class T, bool Same>
inline AccPack<T> log_ratio(const AccPack<T>& z, const AccPack<T>& w, const Units<Acc<T>>& u) {
  const AccPack<T> lowest = broadcast(-kFar<Acc<T>>), finite = max_or_second(lowest, z);
  AccPack<T> x;
  if constexpr (Same)  // the difference first: of rows that are all but equal it is exact
    x = ((w - finite) + u.lead) * u.inv_t + u.offset;
  else
    x = (w - u.other_ref) * u.other_inv_t - (finite - u.ref) * u.inv_t + u.offset;
  return max_or_second(lowest, x);
}

// How differences of e and q are formed: from x, by series, or from e and q themselves. The latter is cheaper, and
// loses digits where |x| is small.
enum class By { series, either, parts };

template <class T, By Difference>
struct Entries {
  AccPack<T> e, t, x;        // t the exponent of e
  AccPack<T> excess, grown;  // e^x - 1 - x, e^x - 1, by series
  AccPack<T> q, other_t;     // by parts
  Mask<Acc<T>> far;

  Entries(const AccPack<T>& e, const AccPack<T>& t, const AccPack<T>& x, const AccPack<T>& w, const Units<Acc<T>>& u) : e(e), t(t), x(x) {
    if constexpr (Difference != By::parts) {
      excess = ::excess(x);
      grown = x + excess;
    }
    if constexpr (Difference != By::series) {
      other_t = (w - u.other_ref) * u.other_scale + u.shift;
      q = power_of_two<sizeof(T) == 2>(other_t);
    }
    if constexpr (Difference == By::either) far = magnitude(x) > Acc<T>(kNear);
  }
  template <class Near, class Far>
  AccPack<T> choose(Near near, Far by_parts) const {
    if constexpr (Difference == By::series) return near();
    if constexpr (Difference == By::parts) return by_parts();
    if constexpr (Difference == By::either) return select(far, by_parts(), near());
  }
  AccPack<T> e_t() const {  // q - e
    return choose([&] { return e * grown; }, [&] { return q - e; });
  }
  AccPack<T> e_reverse() const {  // q - e - e x
    return choose([&] { return e * excess; }, [&] { return (q - e) - e * x; });
  }
  AccPack<T> e_forward() const {  // q x - (q - e)
    return choose([&] { return e * (x * grown - excess); }, [&] { return q * x - (q - e); });
  }
  AccPack<T> all_q() const {
    return choose([&] { return e * grown + e; }, [&] { return q; });
  }
};

// Calls f with the entries, whose type says how to form differences: `Coarse`, always by parts.
template <class T, bool Same, bool Coarse, class F>
inline void with_entries(const AccPack<T>& z, const AccPack<T>& w, const AccPack<T>& e, const AccPack<T>& t, const Units<Acc<T>>& u, F f) {
  const AccPack<T> x = log_ratio<T, Same>(z, w, u);
  if constexpr (Coarse)
    f(Entries<T, By::parts>(e, t, x, w, u));
  else if (any_above(magnitude(x), Acc<T>(kNear)))
    f(Entries<T, By::either>(e, t, x, w, u));
  else
    f(Entries<T, By::series>(e, t, x, w, u));
}

// What mixing a share of q into p does, M = (1 - share) p + share q: log(M / p), log(q / M), t / (1 + share t) with
// t = q / p - 1. From the larger one's side: nothing overflows.
template <class A>
struct Mixture {
  Pack<A> log, log_other, slope;
};
template <bool Short, class A>
inline Mixture<A> mixture_of(const Pack<A>& x, A share) {
  const Pack<A> zero{}, one = broadcast(A(1)), s = power_of_two<Short>(magnitude(x) * A(-kLog2E));
  const Mask<A> up = x > A(0);
  const Pack<A> own = select(up, broadcast(share), broadcast(1 - share)), mass = own + (one - own) * s;
  const Pack<A> rest = log_positive(mass), gap = one - s;
  return {select(up, x, zero) + rest, select(up, zero, x) - rest, select(up, gap, zero - gap) / mass};
}

// (e f, e g) of the kinds that mix.
template <int Kind, class T, By Difference>
inline std::pair<AccPack<T>, AccPack<T>> mixture_terms(const Entries<T, Difference>& v, Acc<T> beta) {
  using A = Acc<T>;
  const A rest = 1 - beta, share = Kind == PairKind::SKEW_REVERSE_KL ? rest : beta;
  if constexpr (Difference == By::parts) {
    // One logarithm, that of M. The others are exponents. Each is as accurate as these: to 1e-7 of the exponent.
    const AccPack<T> mass = max_or_second(broadcast(A(1e-37)), v.e * (1 - share) + v.q * share), log_m = log2_positive(mass);
    const AccPack<T> log_p = finite_exponent(v.t), log_q = finite_exponent(v.other_t), to_p = v.e * (log_m - log_p) * A(kLn2);
    if constexpr (Kind == PairKind::JSD) return {(v.q * (log_q - log_m)) * A(beta * kLn2) - to_p * rest, to_p * -rest};
    const AccPack<T> share_of_e = v.e * (v.q - v.e) / mass;
    if constexpr (Kind == PairKind::SKEW_FORWARD_KL)
      return {v.q * (log_q - log_m) * A(kLn2) - (v.q - v.e) * rest, share_of_e * (-rest * rest)};
    else
      return {(v.q - v.e) * rest - to_p, share_of_e * (beta * rest) - to_p};
  } else {
    const AccPack<T> v_t = v.grown * share, y = log1p_near(v_t);
    AccPack<T> e_f, e_g;
    if constexpr (Kind == PairKind::JSD) {
      e_f = v.e * ((v.x * v.grown - v.excess) * beta - (y * v_t - excess(y)));
      e_g = v.e * y * -rest;
    } else if constexpr (Kind == PairKind::SKEW_FORWARD_KL) {
      e_f = v.e * ((v.x * v.grown - v.excess) - (y * v_t - excess(y)) - v.grown * y * rest);
      e_g = v.e * v.grown / (v_t + A(1)) * (-rest * rest);
    } else {
      e_f = v.e * excess(y);
      e_g = v.e * (v_t / (v_t + A(1)) * beta - y);
    }
    if constexpr (Difference == By::either) {
      const Mixture<A> m = mixture_of<sizeof(T) == 2>(v.x, share);
      if constexpr (Kind == PairKind::JSD) {
        e_f = select(v.far, v.q * m.log_other * beta - v.e * m.log * rest, e_f);
        e_g = select(v.far, v.e * m.log * -rest, e_g);
      } else if constexpr (Kind == PairKind::SKEW_FORWARD_KL) {
        e_f = select(v.far, v.q * m.log_other - (v.q - v.e) * rest, e_f);
        e_g = select(v.far, v.e * m.slope * (-rest * rest), e_g);
      } else {
        e_f = select(v.far, (v.q - v.e) * rest - v.e * m.log, e_f);
        e_g = select(v.far, v.e * (m.slope * (beta * rest) - m.log), e_g);
      }
    }
    return {e_f, e_g};
  }
}

// --- tiles of both rows ------------------------------------------------------------------------------------

// Both rows have the kernel's type, or else they are converted to float, a tile at a time.
inline bool mixed(const Pair& call) { return call.dtype != call.other_dtype; }

template <class F>
inline void with_common_type(const Pair& call, F f) {
  return mixed(call) ? f(float{}) : with_type(call.dtype, f);
}

const void* row_start(const Pair& call, const Matrix& matrix, int dtype, int64_t row) {
  const void* start = nullptr;
  with_type(dtype, [&](auto logit) { start = row_of<decltype(logit)>(call, matrix, row); });
  return start;
}

// n logits from `start` on as floats; -inf pads them to whole packs.
void to_floats(const void* row, int dtype, int64_t start, int64_t n, float* to) {
  with_type(dtype, [&](auto logit) {
    using T = decltype(logit);
    const T* from = static_cast<const T*>(row) + start;
    if constexpr (std::is_same_v<T, BFloat16>) {
      for (int64_t i = 0; i < n; ++i) to[i] = bit_cast<float>(uint32_t(from[i].bits) << 16);
    } else if constexpr (std::is_same_v<T, Float16>) {
      T padded[kTile];
      std::memcpy(padded, from, n * sizeof(T));
      for (int64_t i = 0; i < n; i += kLanes<T>) store(to + i, load(padded + i));
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = float(from[i]);
    }
  });
  for (; n % kLanes<float> != 0; ++n) to[n] = -std::numeric_limits<float>::infinity();
}

void from_floats(const float* from, int64_t n, void* row, int dtype, int64_t start) {
  with_type(dtype, [&](auto logit) {
    using T = decltype(logit);
    T* to = static_cast<T*>(row) + start;
    if constexpr (sizeof(T) == 2) {
      for (int64_t i = 0; i < n; ++i) store_one(to + i, from[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = T(from[i]);
    }
  });
}

// Calls f(tile of z, tile of w, count), as for_each_tile does.
template <class T, class F>
inline void for_each_pair(const Pair& call, int64_t row, F f) {
  if (mixed(call)) {
    if constexpr (std::is_same_v<T, float>) {
      const void *z = row_start(call, call.logits, call.dtype, row), *w = row_start(call, call.other, call.other_dtype, row);
      float z_tile[kTile], w_tile[kTile];
      for (int64_t start = 0; start < call.vocab; start += kTile) {
        const int64_t n = std::min(kTile, call.vocab - start);
        to_floats(z, call.dtype, start, n, z_tile);
        to_floats(w, call.other_dtype, start, n, w_tile);
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

// What a sweep sums in place of a kind that needs both normalisers first; and no more than these need.
constexpr int kShift = PairKind::REVERSE_KL, kTrial = -1;
template <int Kind>
constexpr int kFirstSweep = Kind >= PairKind::JSD ? kShift : Kind;

struct PairSums {
  Sums own;                // of e, as in tile_sums
  double x = 0;            // q - e
  double a = 0, b = 0;     // q - e - e x, q x - (q - e); in a second sweep e f, e g
  double u = 0;            // q t, t the exponent of e
  bool unbounded = false;  // some x stands for infinity
};

// Whole: with the sum for the entropy, and without the entries equal to the maximum. Else the tile has none.
template <class T, int Kind, bool Same, bool Coarse, bool Whole>
PairSums pair_sums(const T* z, const T* w, int64_t n, const Frame<Acc<T>>& frame, Acc<T> beta) {
  using A = Acc<T>;
  constexpr bool mixes = Kind >= PairKind::JSD, forward = Kind == PairKind::FORWARD_KL || Kind == PairKind::MIXED_KL,
                 reverse = !mixes && Kind != PairKind::FORWARD_KL && Kind != kTrial;
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
    with_entries<T, Same, Coarse>(at_z, load(w + i), e, t, units, [&](const auto& v) {
      if constexpr (mixes) {
        const auto [e_f, e_g] = mixture_terms<Kind>(v, beta);
        a = a + e_f;
        b = b + e_g;
      } else {
        x = x + v.e_t();
        if constexpr (reverse) a = a + v.e_reverse();
        if constexpr (forward) b = b + v.e_forward();
        if constexpr (Kind == PairKind::CROSS_ENTROPY) u = u + v.all_q() * max_or_second(broadcast(-kFar<A>), t);
        if constexpr (Kind != kTrial) furthest = max_or_second(magnitude(v.x), furthest);
      }
    });
  }
  PairSums sums;
  sums.own = {sum_lanes(s0), sum_lanes(s1), 0, -double(sum_lanes(ties))};
  sums.x = sum_lanes(x);
  sums.a = sum_lanes(a);
  sums.b = sum_lanes(b);
  sums.u = sum_lanes(u);
  sums.unbounded = max_lanes(furthest) > kFar<A> / 2;
  return sums;
}

// A divergence from the first on is summed by parts. One that then falls below the second is summed again.
constexpr double kCoarseFrom = 0.2, kCoarseTo = 0.05;

// The sums over the tiles so far, in units of the frame.
template <class T, int Kind, bool Same>
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
    // One product where there can be one: of equal rows nothing must remain.
    const double eta = other_top == -kInfinity ? 0 : Same ? (lost - gained) * frame.inv_t : lost * frame.other_inv_t - gained * frame.inv_t;
    const double lk = gained * frame.inv_t;
    frame.top = frame.ref = top;
    frame.other_ref = other_ref;
    const double k = std::exp(lk), grown = std::exp(lk + eta), gain = std::abs(eta) < 1 ? k * std::expm1(eta) : grown - k;
    const double moved = k * x + gain * (x + mass);
    u = grown * (u + kLog2E * lk * (x + mass));
    b = grown * (b + x + eta * (mass + x)) - moved;
    a = k * a + gain * x + (gain - k * eta) * mass;
    x = moved;
    mass *= k;
  }

  template <bool Coarse>
  PairSums sums_of(const T* z, const T* w, int64_t n, bool with_max) const {
    return with_max ? pair_sums<T, Kind, Same, Coarse, true>(z, w, n, frame, beta)
                    : pair_sums<T, Kind, Same, Coarse, false>(z, w, n, frame, beta);
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
        const PairSums part = pair_sums<T, kTrial, Same, false, false>(z, w, n, frame, beta);
        const double eta = -std::log1p((x + part.x) / (mass + part.own.s0));
        if (std::isfinite(eta)) move(frame.top, A(double(frame.other_ref) - eta / frame.other_inv_t));
      }
    }
    const bool with_max = whole || (z_top == top && top > -kInfinity);
    const PairSums part = coarse ? sums_of<true>(z, w, n, with_max) : sums_of<false>(z, w, n, with_max);
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
  // What tells whether the rows differ much.
  double distance() const { return Kind == PairKind::FORWARD_KL ? forward() : reverse(); }

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

template <class T, int Kind, bool Same>
PairRow<T, Kind, Same> sums_of_row(const PairForward& call, int64_t row, const Frame<Acc<T>>& frame) {
  for (bool precise = false;; precise = true) {
    PairRow<T, Kind, Same> sums(frame, Acc<T>(call.beta), call.entropy);
    bool first = true;
    for_each_pair<T>(call, row, [&](const T* z, const T* w, int64_t n) {
      sums.add(z, w, n);
      if (first && !precise) sums.coarse = sums.distance() >= kCoarseFrom;
      first = false;
    });
    if (!sums.coarse || !(sums.distance() < kCoarseTo)) return sums;
  }
}

struct Divergence {
  double value, mean_slope, offset;
};

// The second sweep of a kind that mixes, with both normalisers.
template <class T, int Kind, bool Same>
Divergence mixture_divergence(const Pair& call, int64_t row, const PairRow<T, kShift, Same>& sums, double offset) {
  Frame<Acc<T>> frame = sums.frame;
  frame.offset = Acc<T>(offset);
  for (bool coarse = sums.coarse;; coarse = false) {
    double f = 0, g = 0;
    for_each_pair<T>(call, row, [&](const T* z, const T* w, int64_t n) {
      const PairSums part = coarse ? pair_sums<T, Kind, Same, true, false>(z, w, n, frame, sums.beta)
                                   : pair_sums<T, Kind, Same, false, false>(z, w, n, frame, sums.beta);
      f += part.a;
      g += part.b;
    });
    if (!coarse || !(f < kCoarseTo * sums.mass)) return {std::max(0., f / sums.mass), g / sums.mass, offset};
  }
}

template <class T, int Kind, bool Same>
Divergence divergence_of(const Pair& call, int64_t row, const PairRow<T, kFirstSweep<Kind>, Same>& sums) {
  const double offset = -sums.log_xi();
  if constexpr (Kind >= PairKind::JSD) {
    return mixture_divergence<T, Kind, Same>(call, row, sums, offset);
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
  A shifted(const T* x, int64_t y, int64_t vocab) const {
    if (y < 0 || y >= vocab) return A(kNaN);
    const A at_y = A(load_one(x + y));
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

template <class T, int Kind, bool Same>
void pair_forward_row(const PairForward& call, int64_t row, const Frame<Acc<T>>& frame) {
  using A = Acc<T>;
  const auto sums = sums_of_row<T, kFirstSweep<Kind>, Same>(call, row, frame);
  const SideStats<A> own(sums.own, frame.inv_t);
  Divergence d = divergence_of<T, Kind, Same>(call, row, sums);
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
    with_type(call.dtype,
              [&](auto logit) { state[PairState::TARGET] = own.shifted(static_cast<const decltype(logit)*>(z), y, call.vocab); });
    put<A>(call.logp, row, own.logp(state[PairState::TARGET]));
  }
  if (!call.other_logsumexp) return;
  RowSums<A> other;
  for_each_pair<T>(call, row, [&](const T*, const T* w, int64_t n) { other.template add<false, true>(w, n, Units<A>(frame).other_scale); });
  const SideStats<A> others(other, frame.other_inv_t);
  state[PairState::OTHER_MAX] = others.top;
  state[PairState::OTHER_REST] = A(others.rest);
  state[PairState::OTHER_MEAN_SLOPE] = A(d.value - d.mean_slope);
  put<A>(call.other_logsumexp, row, others.logsumexp());
  put<A>(call.other_entropy, row, others.entropy());
  if (!call.other_logp) return;
  const void* w = row_start(call, call.other, call.other_dtype, row);
  with_type(call.other_dtype, [&](auto logit) {
    put<A>(call.other_logp, row, others.logp(others.shifted(static_cast<const decltype(logit)*>(w), y, call.vocab)));
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
    with_kind(call.kind, [&](auto kind) {
      const bool same = frame.inv_t == frame.other_inv_t;
      same ? pair_forward_row<T, kind, true>(call, row, frame) : pair_forward_row<T, kind, false>(call, row, frame);
    });
  }
}

// --- backward ----------------------------------------------------------------------------------------------

// dz = e (slope g + constant + linear t), t the exponent of e. 1 / T and the row's sum are folded in.
template <class A>
struct PairCoefficients {
  Frame<A> frame;
  A slope, constant, linear, beta;
};

// e g of entries whose differences are formed in a given way.
template <int Kind, class T, By Difference>
inline AccPack<T> slope_terms(const Entries<T, Difference>& v, Acc<T> beta) {
  if constexpr (Kind == PairKind::REVERSE_KL) return AccPack<T>{} - v.e * v.x;
  if constexpr (Kind == PairKind::FORWARD_KL) return AccPack<T>{} - v.e_t();
  if constexpr (Kind == PairKind::MIXED_KL) return AccPack<T>{} - v.e_t() * beta - v.e * v.x * (1 - beta);
  if constexpr (Kind >= PairKind::JSD) return mixture_terms<Kind>(v, beta).second;
}

template <class T, int Kind, bool Same>
inline AccPack<T> pair_gradient_of(const AccPack<T>& z, const AccPack<T>& w, const Units<Acc<T>>& u, const PairCoefficients<Acc<T>>& c) {
  using A = Acc<T>;
  const AccPack<T> t = (z - u.top) * u.scale, e = power_of_two<sizeof(T) == 2>(t);
  AccPack<T> e_g;
  const auto take = [&](const auto& v) { e_g = slope_terms<Kind>(v, c.beta); };
  const AccPack<T> x = log_ratio<T, Same>(z, w, u);
  if constexpr (Kind == PairKind::REVERSE_KL) {
    e_g = AccPack<T>{} - e * x;
  } else if (!any_above(magnitude(x), A(kNear))) {
    take(Entries<T, By::series>(e, t, x, w, u));
  } else if (sizeof(T) == 2 && !any_above(broadcast(A(1. / 128)) - magnitude(x), A(0))) {
    // Rounding to 16 bits hides what differences by parts lose from there on.
    take(Entries<T, By::parts>(e, t, x, w, u));
  } else {
    take(Entries<T, By::either>(e, t, x, w, u));
  }
  return e_g * c.slope + e * (finite_exponent(t) * c.linear + c.constant);
}

template <class T, int Kind, bool Same>
void write_pair_gradient(const T* z, const T* w, T* out, int64_t n, bool stream, const PairCoefficients<Acc<T>>& c) {
  const Units<Acc<T>> u(c.frame);
  const auto gradient = [&](const T* z, const T* w) { return pair_gradient_of<T, Kind, Same>(load(z), load(w), u, c); };
  const auto edge = [&](int64_t start, int64_t count) {
    T of_z[kLanes<T>] = {}, of_w[kLanes<T>] = {};
    std::memcpy(of_z, z + start, count * sizeof(T));
    std::memcpy(of_w, w + start, count * sizeof(T));
    store(of_z, gradient(of_z, of_w));
    std::memcpy(out + start, of_z, count * sizeof(T));
  };
  int64_t i = 0;
  if (stream) {  // from the first aligned address on
    i = std::min<int64_t>(n, -reinterpret_cast<uintptr_t>(out) % kVectorBytes / sizeof(T));
    if (i > 0) edge(0, i);
    for (; i + kLanes<T> <= n; i += kLanes<T>) store<true>(out + i, gradient(z + i, w + i));
  } else {
    for (; i + kLanes<T> <= n; i += kLanes<T>) store(out + i, gradient(z + i, w + i));
  }
  if (i < n) edge(i, n - i);
}

// g(x) of one entry.
double slope_at(int kind, double beta, double x) {
  x = std::min(std::max(x, -700.), 700.);
  const double t = std::expm1(x), rest = 1 - beta;
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
  const bool lost = g_y != 0 && (y < 0 || y >= call.vocab);

  PairCoefficients<A> c{};
  c.frame = frame_of<A>(call, row);
  c.frame.top = state[PairState::MAX];
  c.frame.ref = state[PairState::REF];
  c.frame.other_ref = state[PairState::OTHER_REF];
  c.frame.offset = state[PairState::OFFSET];
  c.beta = A(call.beta);
  // Terms without upstream gradient are left out: 0 * (-inf) is NaN.
  double others = g_z;
  if (g_h != 0) others += g_h * double(state[PairState::MEAN_U]);
  if (g_d != 0) others -= g_d * mean_slope;
  if (lost) others = kNaN;
  const double inv_t = c.frame.inv_t, weight = inv_t / (1 + rest);
  c.slope = A(weight * g_d);
  c.constant = A(weight * (others - g_y));
  c.linear = A(-weight * g_h * kLn2);

  const int kind = g_d == 0 ? int(PairKind::REVERSE_KL) : call.kind == PairKind::CROSS_ENTROPY ? int(PairKind::FORWARD_KL) : call.kind;
  void* out = const_cast<void*>(row_start(call, call.out, call.dtype, row));
  with_kind(kind, [&](auto constant_kind) {
    const auto write = [&](auto same) {
      constexpr int Kind = constant_kind == PairKind::CROSS_ENTROPY ? int(PairKind::FORWARD_KL) : int(constant_kind);
      if (!mixed(call)) {
        const T *z = row_of<T>(call, call.logits, row), *w = row_of<T>(call, call.other, row);
        return write_pair_gradient<T, Kind, same>(z, w, static_cast<T*>(out), call.vocab, call.stream, c);
      }
      int64_t start = 0;
      for_each_pair<T>(call, row, [&](const T* z, const T* w, int64_t n) {
        if constexpr (std::is_same_v<T, float>) {
          float tile[kTile];
          write_pair_gradient<float, Kind, same>(z, w, tile, n, false, c);
          from_floats(tile, std::min(n, call.vocab - start), out, call.dtype, start);
        }
        start += kTile;
      });
    };
    c.frame.inv_t == c.frame.other_inv_t ? write(std::true_type{}) : write(std::false_type{});
  });

  if (g_y == 0 || lost) return;
  // At the target p - 1 is given beside p: no cancellation as p goes to 1.
  const double shifted = state[PairState::TARGET], u = shifted * inv_t, logp = u - log_s0;
  double here = others;
  if (g_h != 0) here -= g_h * (u < -1e4 ? -1e4 : u);
  if (g_d != 0 && shifted > -kInfinity) {
    with_type(call.other_dtype, [&](auto logit) {
      using W = decltype(logit);
      const double at_w = load_one(static_cast<const W*>(row_start(call, call.other, call.other_dtype, row)) + y);
      const double z_ref = shifted + (double(c.frame.top) - double(c.frame.ref));
      here += g_d * slope_at(kind, call.beta, (at_w - c.frame.other_ref) * c.frame.other_inv_t - z_ref * inv_t + c.frame.offset);
    });
  }
  const double at_y = inv_t * (std::exp(logp) * here - g_y * std::expm1(logp));
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

void pair_backward(const PairBackward& call, int64_t begin, int64_t end) {
  with_common_type(call, [&](auto logit) { pair_backward_rows<decltype(logit)>(call, begin, end); });
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
