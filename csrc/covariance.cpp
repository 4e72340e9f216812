// Covariance of every token's log-probability with its advantage.

#include "keep.h"
#include "tokens.h"

namespace rlkern {
namespace {

// All ones where the token counts (mask set, logp finite), else 0.
template <class A>
typename TokenBits<A>::Int counted(A logp, bool mask) {
  using Int = typename TokenBits<A>::Int;
  Int bits;
  std::memcpy(&bits, &logp, sizeof bits);
  const Int finite = ((bits & TokenBits<A>::exponent) - TokenBits<A>::exponent) >> (8 * sizeof(Int) - 1);
  return -Int(mask) & finite;
}

}  // namespace

template <class A>
void CovarianceSums<A>::run() const {
  constexpr int64_t lanes = 16;
  double x[lanes] = {}, a[lanes] = {};
  int64_t count[lanes] = {};
  const auto add = [&](int64_t i, int64_t lane) {
    const auto where = counted(logp[i], mask[i]);
    count[lane] -= where;
    x[lane] += keep(logp[i], where);
    a[lane] += keep(advantages[i], where);
  };
  const int64_t whole = n / lanes * lanes;
  for (int64_t i = 0; i < whole; i += lanes)
    for (int64_t lane = 0; lane < lanes; ++lane) add(i + lane, lane);
  for (int64_t i = whole; i < n; ++i) add(i, i - whole);
  sums[0] = sums[1] = sums[2] = 0;
  for (int64_t lane = 0; lane < lanes; ++lane) {
    sums[0] += double(count[lane]);
    sums[1] += x[lane];
    sums[2] += a[lane];
  }
}

template <class A>
void TokenCovariance<A>::run() const {
  double own[3];
  if (!sums) CovarianceSums<A>{n, logp, advantages, mask, own}.run();
  const double* const of = sums ? sums : own;
  const double count = of[0] < 1 ? 1 : of[0];
  const A mean_logp = A(of[1] / count), mean_advantage = A(of[2] / count);
  for (int64_t i = 0; i < n; ++i) {
    const A product = (advantages[i] - mean_advantage) * (logp[i] - mean_logp);
    out[i] = keep(product, counted(logp[i], mask[i]));
  }
}

template struct CovarianceSums<float>;
template struct CovarianceSums<double>;
template struct TokenCovariance<float>;
template struct TokenCovariance<double>;

}  // namespace rlkern
