// What a token adds to a policy loss, and its derivative by the token's log-probability, in one pass. Ratios
// and their sums are double for either type: r - 1 - log r is accurate near r = 1, and no square overflows.

#include <algorithm>
#include <cmath>
#include <limits>

#include "tokens.h"

namespace rlkern {

template <class A>
void RatioTerms<A>::run() const {
  const A low = A(this->low), high = A(this->high), dual = A(this->dual);
  const A least = A(this->least), most = A(this->most);
  A *const values = terms, *const slopes = terms + n;
  constexpr double infinity = std::numeric_limits<double>::infinity();
  const A* const old = old_logp ? old_logp : logp;
  int64_t tokens = 0;
  double sum = 0, distance = 0, largest = -infinity, smallest = infinity;
  for (int64_t i = 0; i < n; ++i) {
    if (!mask[i]) continue;
    const double d = logp[i] - old[i];
    ++tokens;
    sum += d;
    distance += std::fabs(d);
    largest = std::max(largest, d);
    smallest = std::min(smallest, d);
  }
  // The effective sample size does not depend on the scale. At this one no square overflows or vanishes.
  const double shift = std::fabs(largest) < 300 || std::isinf(largest) ? 0 : largest;
  int64_t below = 0, above = 0, beyond = 0;
  double k3 = 0, weights = 0, squares = 0;
  for (int64_t i = 0; i < n; ++i) {
    values[i] = slopes[i] = 0;
    free[i] = false;
    if (!mask[i]) continue;
    const A d = logp[i] - old[i], a = advantages[i];
    const bool outside = d < least || d > most;
    double ratio = std::exp(double(d < least ? least : d > most ? most : d));
    const A r = A(ratio);
    const bool is_below = a < 0 && r < low, is_above = a > 0 && r > high, is_beyond = a < 0 && r > dual;
    const bool clips = !(unclipped && unclipped[i]) && (is_below || is_above || is_beyond);
    values[i] = -a * (clips ? (is_below ? low : is_above ? high : dual) : r);
    slopes[i] = clips || outside ? 0 : values[i];
    free[i] = std::isfinite(logp[i]) && !is_below && !is_above;
    below += is_below;
    above += is_above;
    beyond += is_beyond;
    if (outside) ratio = std::exp(double(d));
    k3 += ratio - 1 - d;
    if (shift != 0) ratio = std::exp(d - shift);
    weights += ratio;
    squares += ratio * ratio;
  }
  const double total = double(std::max<int64_t>(tokens, 1));
  summary[Summary::count] = A(total);
  summary[Summary::clip_fraction_low] = A(below / total);
  summary[Summary::clip_fraction_high] = A(above / total);
  summary[Summary::clip_fraction_dual] = A(beyond / total);
  summary[Summary::approx_kl_k1] = A(-sum / total);
  summary[Summary::approx_kl_k3] = A(k3 / total);
  summary[Summary::ratio_max] = tokens ? A(std::exp(largest)) : 1;
  summary[Summary::ratio_min] = tokens ? A(std::exp(smallest)) : 1;
  summary[Summary::effective_sample_size] = tokens ? A(weights * weights / (total * squares)) : 1;
  summary[Summary::tokens] = A(tokens);
  summary[Summary::log_mean_ratio] = tokens ? A(shift + std::log(weights / total)) : 0;
  summary[Summary::abs_log_ratio] = A(distance / total);
}

template <class A>
void KLTerms<A>::run() const {
  A *const values = terms, *const slopes = terms + n;
  const A bound = A(clamp);
  for (int64_t i = 0; i < n; ++i) {
    values[i] = slopes[i] = 0;
    if (!mask[i]) continue;
    const A d = logp[i] - reference[i];
    A value = d, slope = 1;
    if (kind == KLKind::ABS) {
      value = std::fabs(d);
      slope = A((d > 0) - (d < 0));
    } else if (kind == KLKind::K2) {
      value = A(0.5) * d * d;
      slope = d;
    } else if (kind == KLKind::K3) {
      const double x = std::min(-double(d), LARGEST_EXPONENT), e = std::expm1(x);
      value = A(e - x);
      slope = -d > A(LARGEST_EXPONENT) ? 0 : A(-e);
    }
    if (value > bound || value < -bound) slope = 0;
    values[i] = value > bound ? bound : value < -bound ? -bound : value;
    slopes[i] = straight_through ? d : slope;
  }
}

template struct RatioTerms<float>;
template struct RatioTerms<double>;
template struct KLTerms<float>;
template struct KLTerms<double>;

}  // namespace rlkern
