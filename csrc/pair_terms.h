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
  return min_or_second(broadcast(kFar<A>), max_or_second(broadcast(-kFar<A>), x));
}

// The exponent of q.
template <class T>
RLKERN_INLINE AccPack<T> other_exponent(const AccPack<T>& w, const Units<Acc<T>>& u) {
  return (w - u.other_ref) * u.other_scale + u.shift;
}

// How differences of e and q are formed: from x, by series, or from e and q themselves. The latter is cheaper, and
// loses digits where |x| is small. What is then rounded to 16 bits needs few of them.
enum class By { series, either, either_of_few_digits, parts };
constexpr double kNearOfFewDigits = 1. / 32;  // from there on e and q lose 5 bits of 23

template <class T, By Difference>
struct Entries {
  AccPack<T> e, t, x;        // t the exponent of e; by parts there is no x
  AccPack<T> excess, grown;  // e^x - 1 - x, e^x - 1, by series
  AccPack<T> q, other_t;     // by parts
  Mask<Acc<T>> far;

  RLKERN_INLINE Entries(const AccPack<T>& e, const AccPack<T>& t, const AccPack<T>& x, const AccPack<T>& w, const Units<Acc<T>>& u)
      : e(e), t(t), x(x) {
    using A = Acc<T>;
    constexpr bool few = Difference == By::either_of_few_digits;
    if constexpr (Difference != By::parts) {
      excess = few ? (x * A(1. / 6) + A(1. / 2)) * (x * x) : ::excess(x);
      grown = x + excess;
    }
    if constexpr (Difference != By::series) {
      other_t = other_exponent<T>(w, u);
      q = power_of_two<sizeof(T) == 2>(other_t);
    }
    if constexpr (Difference != By::parts) far = magnitude(x) > A(few ? kNearOfFewDigits : kNear);
  }
  template <class Near, class Far>
  RLKERN_INLINE AccPack<T> choose(Near near, Far by_parts) const {
    static_assert(Difference != By::parts, "by parts the sums of e, q, e x and q x are enough");
    if constexpr (Difference == By::series) return near();
    return select(far, by_parts(), near());
  }
  RLKERN_INLINE AccPack<T> bits() const {  // x in units of ln 2, by parts; between -kFar and kFar
    const AccPack<T> least = broadcast(-kFar<Acc<T>>);
    return max_or_second(least, other_t) - max_or_second(least, t);
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
    if constexpr (Difference == By::parts)
      return q;
    else
      return choose([&] { return e * grown + e; }, [&] { return q; });
  }
};

// Calls f with the entries, whose type says how to form differences: `Coarse`, always by parts.
template <class T, bool Coarse, class F>
RLKERN_INLINE void with_entries(const AccPack<T>& z, const AccPack<T>& w, const AccPack<T>& e, const AccPack<T>& t, const Units<Acc<T>>& u,
                                F f) {
  if constexpr (Coarse) {
    f(Entries<T, By::parts>(e, t, {}, w, u));
  } else {
    const AccPack<T> x = log_ratio<T>(z, w, u);
    if (any_above(magnitude(x), Acc<T>(kNear)))
      f(Entries<T, By::either>(e, t, x, w, u));
    else
      f(Entries<T, By::series>(e, t, x, w, u));
  }
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

// (e f, e (g - base)) of the kinds that mix, from exponents: one logarithm, that of M, as accurate as these: to 1e-7
// of the exponent.
template <int Kind, class T, By Difference>
RLKERN_INLINE std::pair<AccPack<T>, AccPack<T>> mixture_by_parts(const Entries<T, Difference>& v, Acc<T> share, Acc<T> beta, Acc<T> base) {
  using A = Acc<T>;
  const A rest = 1 - beta;
  const AccPack<T> mass = max_or_second(broadcast(A(1e-37)), v.e * (1 - share) + v.q * share), log_m = log2_positive(mass);
  const AccPack<T> log_p = finite_exponent(v.t), log_q = finite_exponent(v.other_t), to_p = v.e * (log_m - log_p) * A(kLn2);
  if constexpr (Kind == PairKind::JSD) return {(v.q * (log_q - log_m)) * A(beta * kLn2) - to_p * rest, to_p * -rest};
  if constexpr (Kind == PairKind::SKEW_FORWARD_KL)
    return {v.q * (log_q - log_m) * A(kLn2) - (v.q - v.e) * rest, v.e * (broadcast(rest - base) - v.q / mass * rest)};
  else
    return {(v.q - v.e) * rest - to_p, v.e * (v.q - v.e) / mass * (beta * rest) - to_p};
}

// The same by series.
template <int Kind, class T, By Difference>
RLKERN_INLINE std::pair<AccPack<T>, AccPack<T>> mixture_by_series(const Entries<T, Difference>& v, Acc<T> share, Acc<T> beta, Acc<T> base) {
  using A = Acc<T>;
  const A rest = 1 - beta;
  const AccPack<T> v_t = v.grown * share;
  const AccPack<T> y = Difference == By::either_of_few_digits ? v_t * ((v_t * A(1. / 3) - A(1. / 2)) * v_t + A(1)) : log1p_near(v_t);
  if constexpr (Kind == PairKind::JSD) return {v.e * ((v.x * v.grown - v.excess) * beta - (y * v_t - excess(y))), v.e * y * -rest};
  if constexpr (Kind == PairKind::SKEW_FORWARD_KL)
    return {v.e * ((v.x * v.grown - v.excess) - (y * v_t - excess(y)) - v.grown * y * rest),
            v.e * (v.grown / (v_t + A(1)) * (-rest * rest) - base)};
  else
    return {v.e * excess(y), v.e * (v_t / (v_t + A(1)) * beta - y)};
}

// The same from x alone.
template <int Kind, class T, By Difference>
RLKERN_INLINE std::pair<AccPack<T>, AccPack<T>> mixture_by_ratio(const Entries<T, Difference>& v, Acc<T> share, Acc<T> beta, Acc<T> base) {
  using A = Acc<T>;
  const A rest = 1 - beta;
  const Mixture<A> m = mixture_of<sizeof(T) == 2>(v.x, share);
  if constexpr (Kind == PairKind::JSD) return {v.q * m.log_other * beta - v.e * m.log * rest, v.e * m.log * -rest};
  if constexpr (Kind == PairKind::SKEW_FORWARD_KL)
    return {v.q * m.log_other - (v.q - v.e) * rest, v.e * (broadcast(rest - base) - m.other * rest)};
  else
    return {(v.q - v.e) * rest - v.e * m.log, v.e * (m.slope * (beta * rest) - m.log)};
}

template <int Kind, class T, By Difference>
RLKERN_INLINE std::pair<AccPack<T>, AccPack<T>> mixture_terms(const Entries<T, Difference>& v, Acc<T> beta, Acc<T> base) {
  const Acc<T> share = Kind == PairKind::SKEW_REVERSE_KL ? 1 - beta : beta;
  if constexpr (Difference == By::parts) {
    return mixture_by_parts<Kind>(v, share, beta, base);
  } else if constexpr (Difference == By::series) {
    return mixture_by_series<Kind>(v, share, beta, base);
  } else {
    const auto near = mixture_by_series<Kind>(v, share, beta, base);
    const auto far = Difference == By::either ? mixture_by_ratio<Kind>(v, share, beta, base) : mixture_by_parts<Kind>(v, share, beta, base);
    return {select(v.far, far.first, near.first), select(v.far, far.second, near.second)};
  }
}

}  // namespace
