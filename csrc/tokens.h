// Statistics over all tokens of a batch, one number a token. `A` is float or double.
// They read a few bytes a token, on the calling thread: one build serves all processors.
// rlkern/backends/contract.py says what each field is.
#pragma once

#include <cstdint>

#include "constants.h"

namespace rlkern {

template <class A>
struct CovarianceSums {
  int64_t n;
  const A *logp, *advantages;
  const bool* mask;
  double* sums;  // [3]
  void run() const;
};

template <class A>
struct TokenCovariance {
  int64_t n;
  const A *logp, *advantages;
  const bool* mask;
  const double* sums;  // [3], or null: those of the tokens
  A* out;
  void run() const;
};

template <class A>
struct SelectBottom {
  int64_t n;
  const A* values;
  const bool* valid;
  const int64_t* count;
  bool* out;
  void run() const;
};

template <class A>
struct SelectFraction {
  int64_t n;
  const A* values;
  const bool *valid, *group;
  double fraction;
  int64_t minimum, least;
  bool* out;
  void run() const;
};

template <class A>
struct SelectedMeans {
  int64_t n;
  const A* values;
  const bool *selected, *mask;
  A* out;  // [3]
  void run() const;
};

template <class A>
struct RatioTerms {
  int64_t n;
  const A *logp, *old_logp, *advantages;  // old_logp may be null
  const bool *mask, *unclipped;           // unclipped may be null
  double low, high, dual, least, most;
  A* terms;  // [2, n]
  bool* free;
  A* summary;  // one for each of Summary
  void run() const;
};

template <class A>
struct KLTerms {
  int64_t n;
  const A *logp, *reference;
  const bool* mask;
  int kind;  // a KLKind
  bool straight_through;
  double clamp;
  A* terms;  // [2, n]
  void run() const;
};

}  // namespace rlkern
