// Statistics over all tokens of a batch, one number a token. `A` is float or double.
// They read a few bytes a token, on the calling thread: one build serves all processors.
// rlkern/backends/contract.py says what each field is.
#pragma once

#include <cstdint>

#include "constants.h"

namespace rlkern {

// An entry of a bool tensor, true unless it is 0. Memory that was never written may hold other bytes than
// 0 and 1. A sum of such must not pass the end of an array.
struct Flag {
  unsigned char byte;
  operator bool() const { return byte != 0; }
};

template <class A>
struct CovarianceSums {
  int64_t n;
  const A *logp, *advantages;
  const Flag* mask;
  double* sums;  // [3]
  void run() const;
};

template <class A>
struct TokenCovariance {
  int64_t n;
  const A *logp, *advantages;
  const Flag* mask;
  const double* sums;  // [3], or null: those of the tokens
  A* out;
  void run() const;
};

template <class A>
struct SelectBottom {
  int64_t n;
  const A* values;
  const Flag* valid;
  const int64_t* count;
  bool* out;
  void run() const;
};

template <class A>
struct SelectFraction {
  int64_t n;
  const A* values;
  const Flag *valid, *group;
  double fraction;
  int64_t minimum, least;
  bool* out;
  void run() const;
};

template <class A>
struct SelectedMeans {
  int64_t n;
  const A* values;
  const Flag *selected, *mask;
  A* out;  // [3]
  void run() const;
};

template <class A>
struct RatioTerms {
  int64_t n;
  const A *logp, *old_logp, *advantages;  // old_logp may be null
  const Flag *mask, *unclipped;           // unclipped may be null
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
  const Flag* mask;
  int kind;  // a KLKind
  bool straight_through;
  double clamp;
  A* terms;  // [2, n]
  void run() const;
};

}  // namespace rlkern
