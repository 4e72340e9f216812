// Entries of two rows of logits: their log ratio, and the terms of divergences.
//
// With p and q the distributions of logits z and other w, x = log(q / p) and t = q / p - 1, every divergence is
// sum p f(x), f >= 0, and its gradient by z is p (g(x) - sum p g) / T. In units of the row's maximum e stands for
// p, and q for q. Where |x| <= 1/2 differences of the two come from x, by series, and elsewhere from e and q: all
// terms keep their relative accuracy, and so does a divergence of 1e-12.
#pragma once

#include "rows.h"

namespace {

constexpr double kNear = 0.5;

// Stands for infinity: finite, for products with 0.
template <class A>
constexpr A kFar = sizeof(A) == 8 ? A(1e300) : A(1e20);

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
  A top, other_ref, inv_t, offset;
  A stretch, of_w, of_z, lead;  // x = ((w stretch - of_w) - (z - of_z) + lead) inv_t + offset
  A scale, other_scale, shift;  // e = 2^((z - top) scale), q = 2^((w - other_ref) other_scale + shift)

  explicit Units(const Frame<A>& f)
      : top(f.top),
        other_ref(f.other_ref),
        inv_t(f.inv_t),
        offset(f.offset),
        stretch(f.other_inv_t / f.inv_t),
        of_w(0),
        of_z(0),
        lead(A(double(f.ref) - double(f.other_ref) * stretch)),
        scale(A(kLog2E * f.inv_t)),
        other_scale(A(kLog2E * f.inv_t * stretch)),
        shift(A(kLog2E * (double(f.offset) + (double(f.ref) - double(f.top)) * f.inv_t))) {
    // w - z first is exact for rows that are all but equal. Rows that lie far apart would lose digits.
    if (std::abs(lead) <= 32) return;
    of_w = A(double(f.other_ref) * stretch);
    of_z = f.ref;
    lead = 0;
  }
};

template <class T>
RLKERN_INLINE AccPack<T> log_ratio(const AccPack<T>& z, const AccPack<T>& w, const Units<Acc<T>>& u) {
  using A = Acc<T>;
  const AccPack<T> finite = max_or_second(broadcast(std::numeric_limits<A>::lowest()), z);
  const AccPack<T> x = ((w * u.stretch - u.of_w) - (finite - u.of_z) + u.lead) * u.inv_t + u.offset;
  // Between -kFar and kFar; a NaN stays one.
  return AccPack<T>{} - max_or_second(broadcast(-kFar<A>), AccPack<T>{} - max_or_second(broadcast(-kFar<A>), x));
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

  RLKERN_INLINE Entries(const AccPack<T>& e, const AccPack<T>& t, const AccPack<T>& x, const AccPack<T>& w, const Units<Acc<T>>& u)
      : e(e), t(t), x(x) {
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
  RLKERN_INLINE AccPack<T> choose(Near near, Far by_parts) const {
    if constexpr (Difference == By::series) return near();
    if constexpr (Difference == By::parts) return by_parts();
    if constexpr (Difference == By::either) return select(far, by_parts(), near());
  }
  RLKERN_INLINE AccPack<T> e_t() const {  // q - e
    return choose([&] { return e * grown; }, [&] { return q - e; });
  }
  RLKERN_INLINE AccPack<T> e_reverse() const {  // q - e - e x
    return choose([&] { return e * excess; }, [&] { return (q - e) - e * x; });
  }
  RLKERN_INLINE AccPack<T> e_forward() const {  // q x - (q - e)
    return choose([&] { return e * (x * grown - excess); }, [&] { return q * x - (q - e); });
  }
  RLKERN_INLINE AccPack<T> all_q() const {
    return choose([&] { return e * grown + e; }, [&] { return q; });
  }
};

// Calls f with the entries, whose type says how to form differences: `Coarse`, always by parts.
template <class T, bool Coarse, class F>
RLKERN_INLINE void with_entries(const AccPack<T>& z, const AccPack<T>& w, const AccPack<T>& e, const AccPack<T>& t, const Units<Acc<T>>& u,
                                F f) {
  const AccPack<T> x = log_ratio<T>(z, w, u);
  if constexpr (Coarse)
    f(Entries<T, By::parts>(e, t, x, w, u));
  else if (any_above(magnitude(x), Acc<T>(kNear)))
    f(Entries<T, By::either>(e, t, x, w, u));
  else
    f(Entries<T, By::series>(e, t, x, w, u));
}

// What mixing a share of q into p does, M = (1 - share) p + share q: log(M / p), log(q / M), q / M, and
// t / (1 + share t) with t = q / p - 1. From the larger one's side: nothing overflows.
template <class A>
struct Mixture {
  Pack<A> log, log_other, other, slope;
};
template <bool Short, class A>
RLKERN_INLINE Mixture<A> mixture_of(const Pack<A>& x, A share) {
  const Pack<A> zero{}, one = broadcast(A(1)), s = power_of_two<Short>(magnitude(x) * A(-kLog2E));
  const Mask<A> up = x > A(0);
  const Pack<A> own = select(up, broadcast(share), broadcast(1 - share)), mass = own + (one - own) * s;
  const Pack<A> gap = one - s, v = (own - one) * gap;  // M is 1 + v of the larger one
  const Pack<A> rest = select(v >= A(-0.4), log1p_near(v), log_positive(mass));
  return {select(up, x, zero) + rest, select(up, zero, x) - rest, select(up, one, s) / mass, select(up, gap, zero - gap) / mass};
}

// (e f, e (g - base)) of the kinds that mix.
template <int Kind, class T, By Difference>
RLKERN_INLINE std::pair<AccPack<T>, AccPack<T>> mixture_terms(const Entries<T, Difference>& v, Acc<T> beta, [[maybe_unused]] Acc<T> base) {
  using A = Acc<T>;
  const A rest = 1 - beta, share = Kind == PairKind::SKEW_REVERSE_KL ? rest : beta;
  if constexpr (Difference == By::parts) {
    // One logarithm, that of M. The others are exponents. Each is as accurate as these: to 1e-7 of the exponent.
    const AccPack<T> mass = max_or_second(broadcast(A(1e-37)), v.e * (1 - share) + v.q * share), log_m = log2_positive(mass);
    const AccPack<T> log_p = finite_exponent(v.t), log_q = finite_exponent(v.other_t), to_p = v.e * (log_m - log_p) * A(kLn2);
    if constexpr (Kind == PairKind::JSD) return {(v.q * (log_q - log_m)) * A(beta * kLn2) - to_p * rest, to_p * -rest};
    if constexpr (Kind == PairKind::SKEW_FORWARD_KL)
      return {v.q * (log_q - log_m) * A(kLn2) - (v.q - v.e) * rest, v.e * (broadcast(rest - base) - v.q / mass * rest)};
    else
      return {(v.q - v.e) * rest - to_p, v.e * (v.q - v.e) / mass * (beta * rest) - to_p};
  } else {
    const AccPack<T> v_t = v.grown * share, y = log1p_near(v_t);
    AccPack<T> e_f, e_g;
    if constexpr (Kind == PairKind::JSD) {
      e_f = v.e * ((v.x * v.grown - v.excess) * beta - (y * v_t - excess(y)));
      e_g = v.e * y * -rest;
    } else if constexpr (Kind == PairKind::SKEW_FORWARD_KL) {
      e_f = v.e * ((v.x * v.grown - v.excess) - (y * v_t - excess(y)) - v.grown * y * rest);
      e_g = v.e * (v.grown / (v_t + A(1)) * (-rest * rest) - base);
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
        e_g = select(v.far, v.e * (broadcast(rest - base) - m.other * rest), e_g);
      } else {
        e_f = select(v.far, (v.q - v.e) * rest - v.e * m.log, e_f);
        e_g = select(v.far, v.e * (m.slope * (beta * rest) - m.log), e_g);
      }
    }
    return {e_f, e_g};
  }
}

}  // namespace
