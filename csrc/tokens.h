// Statistics over all tokens of a batch, one number a token. `A` is float or double.
// They read a few bytes a token, or the logits of short lists, on the calling thread: one build serves all
// processors.
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

// Sums over packed sequences; sequence i is [cu_seqlens[i], cu_seqlens[i + 1]).
template <class A>
struct SequenceSums {
  int64_t n, rows, sequences;
  const A* values;  // [rows, n]
  const Flag* mask;
  const int64_t* cu_seqlens;
  double* out;  // [rows, sequences]
  void run() const;
};

// Each token the number of its sequence, 0 where it has none or does not count.
template <class A>
struct SequenceSpread {
  int64_t n, sequences;
  const A* values;         // [sequences]
  const int64_t* seq_idx;  // outside [0, sequences): none
  const Flag* mask;        // null: all count
  A* out;
  void run() const;
};

// Rows of logits of pairs; row r has the pairs [offsets[r], offsets[r + 1]).
template <class A>
struct KeptRowsForward {
  int64_t n, n_targets;
  const A* logits;
  const int32_t* ids;
  const int64_t* offsets;
  const int32_t* targets;  // [n, n_targets], -1: ignored
  const Flag* counted;     // other rows have no pairs
  double temperature;      // where temperatures is null
  const A* temperatures;
  A *logp, *entropy, *logsumexp, *sum_sq;  // entropy and sum_sq may be null
  A* state;                                // [n, State::KEPT]
  int32_t* place;                          // [n, n_targets]
  void run() const;
};

template <class A>
struct KeptRowsBackward {
  int64_t n, n_targets;
  const A* logits;
  const int64_t* offsets;
  const int32_t* place;
  double temperature;
  const A* temperatures;
  const A* state;
  const A *g_logp, *g_entropy, *g_logsumexp, *g_sum_sq;  // each may be null
  A* out;                                                // as the logits
  void run() const;
};

}  // namespace rlkern
