// What token_stats computes, of the logits of each row's pairs. Lists are short: all in double, on one thread.

#include <algorithm>
#include <cmath>
#include <limits>

#include "tokens.h"

namespace rlkern {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN(), kInfinity = std::numeric_limits<double>::infinity();

template <class Call>
double inverse_temperature(const Call& call, int64_t row) {
  const double t = call.temperatures ? double(call.temperatures[row]) : call.temperature;
  return t > 0 ? 1 / t : kNaN;
}

}  // namespace

template <class A>
void KeptRowsForward<A>::run() const {
  for (int64_t row = 0; row < n; ++row) {
    A* const of_row = state + row * State::KEPT;
    const int64_t begin = offsets[row], end = offsets[row + 1];
    double top = -kInfinity, rest = 0, linear = 0, squares = 1;
    int64_t at_top = begin;
    for (int64_t p = begin; p < end && !std::isnan(top); ++p)
      if (!(logits[p] <= top)) top = logits[at_top = p];
    const double inv_t = inverse_temperature(*this, row);
    const bool undefined = std::isinf(top) || std::isnan(top);
    for (int64_t p = begin; p < end && !undefined; ++p) {
      if (p == at_top || logits[p] == -kInfinity) continue;  // the sum is without the 1 of the maximum
      const double u = (logits[p] - top) * inv_t, e = std::exp(u);
      rest += e;
      linear += e * u;
      squares += e * e;
    }
    if (undefined) rest = kNaN;
    const double log_s0 = std::log1p(rest), mean_u = linear / (1 + rest), sum_squares = squares / ((1 + rest) * (1 + rest));
    const bool reads = counted[row];
    of_row[State::MAX] = reads ? A(top) : 0;
    of_row[State::REST] = reads ? A(rest) : 0;
    of_row[State::MEAN_U] = reads ? A(mean_u) : 0;
    of_row[State::SUM_SQ] = reads ? A(sum_squares) : 0;
    if (entropy) entropy[row] = reads ? A(log_s0 - mean_u) : 0;
    if (sum_sq) sum_sq[row] = reads ? A(sum_squares) : 0;
    logsumexp[row] = !reads ? 0 : top == -kInfinity ? A(top) : A(top * inv_t + log_s0);
    for (int64_t k = row * n_targets; k < (row + 1) * n_targets; ++k) {
      const int64_t found = targets[k] < 0 ? end : std::find(ids + begin, ids + end, targets[k]) - ids;
      place[k] = found < end ? int32_t(found - begin) : -1;
      const double shifted = found < end && !undefined ? logits[found] - top : -kInfinity;
      logp[k] = !reads || targets[k] < 0 ? 0 : A(undefined ? kNaN : shifted * inv_t - log_s0);
    }
  }
}

template <class A>
void KeptRowsBackward<A>::run() const {
  const auto get = [](const A* from, int64_t i) { return from ? double(from[i]) : 0; };
  for (int64_t row = 0; row < n; ++row) {
    const A* const of_row = state + row * State::KEPT;
    const int64_t begin = offsets[row], end = offsets[row + 1];
    std::fill(out + begin, out + end, A(0));
    double total = 0;
    bool idle = true;
    for (int64_t k = row * n_targets; g_logp && k < (row + 1) * n_targets; ++k) {
      if (place[k] < 0) continue;
      idle &= g_logp[k] == 0;
      total += g_logp[k];
      out[begin + place[k]] += g_logp[k];
    }
    const double g_h = get(g_entropy, row), g_z = get(g_logsumexp, row), g_s2 = get(g_sum_sq, row);
    if (idle && g_h == 0 && g_z == 0 && g_s2 == 0) continue;
    const double inv_t = inverse_temperature(*this, row), top = of_row[State::MAX], rest = of_row[State::REST];
    for (int64_t p = begin; p < end; ++p) {
      const double u = std::max((logits[p] - top) * inv_t, -1e4), q = std::exp(u) / (1 + rest), upstream = out[p];
      double common = g_z;
      if (g_h != 0) common -= g_h * (u - of_row[State::MEAN_U]);  // entropy + log q
      if (g_s2 != 0) common += 2 * g_s2 * (q - of_row[State::SUM_SQ]);
      // 1 - q without cancellation: at the maximum it is rest / (1 + rest), and elsewhere q <= 1/2.
      const double others = logits[p] == top ? rest / (1 + rest) : 1 - q;
      out[p] = A(inv_t * (q * (common + (upstream - total)) + upstream * others));
    }
  }
}

template struct KeptRowsForward<float>;
template struct KeptRowsForward<double>;
template struct KeptRowsBackward<float>;
template struct KeptRowsBackward<double>;

}  // namespace rlkern
