// What a token adds to a policy loss, and its derivative by the token's log-probability, in one pass. Ratios and their sums are double for
// either type: r - 1 - log r keeps its accuracy near r = 1, and no square overflows.

#include <algorithm>
#include <cmath>
#include <limits>

#include "tokens.h"

namespace rlkern {

template <class A>
void ratio_terms(const A* logp, const A* old_logp, const A* advantages, const bool* mask, const bool* unclipped, int64_t n,
                 const RatioBounds& bounds, A* values, A* slopes, bool* free, A* summary) {
  const A low = A(bounds.low), high = A(bounds.high), dual = A(bounds.dual), least = A(bounds.least), most = A(bounds.most);
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
  // The effective sample size does not depend on the scale of the ratios: one where squares neither overflow nor vanish.
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
  summary[0] = A(total);
  summary[1] = A(below / total);
  summary[2] = A(above / total);
  summary[3] = A(beyond / total);
  summary[4] = A(-sum / total);
  summary[5] = A(k3 / total);
  summary[6] = tokens ? A(std::exp(largest)) : 1;
  summary[7] = tokens ? A(std::exp(smallest)) : 1;
  summary[8] = tokens ? A(weights * weights / (total * squares)) : 1;
  summary[9] = A(tokens);
  summary[10] = tokens ? A(shift + std::log(weights / total)) : 0;
  summary[11] = A(distance / total);
}

template <class A>
void kl_terms(const A* logp, const A* reference, const bool* where, int64_t n, int kind, bool straight_through, double clamp, A* values,
              A* slopes) {
  constexpr double largest_exponent = 80;
  const A bound = A(clamp);
  for (int64_t i = 0; i < n; ++i) {
    values[i] = slopes[i] = 0;
    if (!where[i]) continue;
    const A d = logp[i] - reference[i];
    A value = d, slope = 1;
    if (kind == 1) {
      value = std::fabs(d);
      slope = A((d > 0) - (d < 0));
    } else if (kind == 2) {
      value = A(0.5) * d * d;
      slope = d;
    } else if (kind == 3) {
      const double x = std::min(-double(d), largest_exponent), e = std::expm1(x);
      value = A(e - x);
      slope = -d > A(largest_exponent) ? 0 : A(-e);
    }
    if (value > bound || value < -bound) slope = 0;
    values[i] = value > bound ? bound : value < -bound ? -bound : value;
    slopes[i] = straight_through ? d : slope;
  }
}

template void ratio_terms(const float*, const float*, const float*, const bool*, const bool*, int64_t, const RatioBounds&, float*, float*,
                          bool*, float*);
template void ratio_terms(const double*, const double*, const double*, const bool*, const bool*, int64_t, const RatioBounds&, double*,
                          double*, bool*, double*);
template void kl_terms(const float*, const float*, const bool*, int64_t, int, bool, double, float*, float*);
template void kl_terms(const double*, const double*, const bool*, int64_t, int, bool, double, double*, double*);

}  // namespace rlkern
