// One call over rows of logits, forward or backward, as plain addresses and sizes.
// rlkern/backends/contract.py says what each field means.
#pragma once

#include <cstdint>

#include "constants.h"

namespace rlkern {

struct Matrix {  // [rows / inner, inner, vocab], last stride 1; the other strides count elements
  void* data;
  int64_t stride_outer, stride_inner;
};

// What both halves need. `Acc` below is float, and double for float64 logits.
struct Rows {
  int dtype;  // a DType
  Matrix logits;
  int64_t rows, inner, vocab;
  const int64_t* targets;  // [rows, n_targets]
  int64_t n_targets;
  const bool* mask;          // [rows] or null
  double temperature;        // where `temperatures` is null
  const void* temperatures;  // Acc [rows] or null
  int64_t ignore_index;
  void* state;  // Acc, what the backward needs of each row, written by the forward
  int64_t threads;
};

struct Forward : Rows {
  double softcap;  // 0: none
  int kept_kind;   // a KeptKind
  double log_kept;
  void *logp, *entropy, *logsumexp, *sum_sq_prob, *kept_logmass;  // Acc; any but logsumexp may be null
};

// Of whole rows from the states of their parts, which stand for the logits: [parts, rows, State.TARGETS + n_targets].
struct Merge : Forward {
  int64_t parts;
};

struct KeptMasses : Rows {  // of some columns; the state is the whole rows'
  double softcap;
  int kept_kind;
  void* masses;  // Acc [rows, 2]
};

struct Backward : Rows {
  double softcap;  // the forward's
  int kept_kind;   // the forward's
  // Acc, each may be null
  const void *g_logp, *g_entropy, *g_logsumexp, *g_sum_sq_prob, *g_kept_logmass;
  Matrix out;   // may be the logits
  bool stream;  // past the caches; the schedule sets it
};

// The ids that the softmax of each row is over.
struct Sets {
  int kind, outside;  // a SetKind, an Outside
  bool open_empty;    // an empty list stands for all ids
  // LISTS: list j is ids[begin[j] : end[j]]; without them, ids are `lists` lists of equal length
  const void* ids;  // [n_ids]
  bool wide;        // int64, else int32
  int64_t n_ids, lists;
  const int64_t *begin, *end;
  const int64_t* list;  // [rows], that of each row, negative for none; null: in order
  Matrix entries;       // BITS and MASK: bytes
  const void* least;    // AT_LEAST: Acc [rows]
};

struct ForwardInSets : Forward {
  Sets keep;
  bool* target_kept;                                 // [rows, n_targets]
  void *full_entropy, *full_logsumexp, *full_state;  // Acc, [rows, 3] the last; all null, or none
};

struct BackwardInSets : Backward {
  Sets keep;
  const void *full_state, *g_full_entropy, *g_full_logsumexp;  // Acc, each may be null
};

// What both halves need of two rows at once.
struct Pair : Rows {  // n_targets is 0 or 1; state: Acc [rows, PairState::WIDTH]
  int other_dtype;    // as dtype, or another one if neither is float64
  Matrix other;
  double other_temperature;
  const void* other_temperatures;  // null where `temperatures` is
  double softcap, other_softcap;   // 0: none
  int kind;                        // a PairKind
  double beta;
};

struct PairForward : Pair {
  void *divergence, *logp, *entropy, *logsumexp, *other_logp, *other_entropy, *other_logsumexp;  // Acc; any but divergence may be null
};

struct PairMixtureSums : Pair {  // the state is that of whole rows
  void* sums;                    // Acc [rows, 2]
};

struct PairBackward : Pair {
  const void *g_divergence, *g_logp, *g_entropy, *g_logsumexp;  // Acc, each may be null
  Matrix out;                                                   // may be the logits
  bool stream;                                                  // past the caches; the schedule sets it
};

struct MomentsForward : Rows {
  void *centred_target, *variance;  // Acc [rows]; the state is the mean [rows, 2]
};

struct MomentsBackward : Rows {
  const void *g_target, *g_variance;  // Acc [rows], each may be null
  Matrix out;
  bool stream;
};

// Of two rows; the reference is shaped like the logits. The state is that of token_stats without targets.
struct DidForward : Rows {
  int reference_dtype;
  Matrix reference;
  void* entropy;
};

struct DidBackward : Rows {
  int reference_dtype;
  Matrix reference;
  const void* g_entropy;
  Matrix out, reference_out;  // each of its input's dtype; their data may be null
  bool stream, stream_reference;
};

struct Sampler : Rows {  // state: Acc [rows], the thresholds
  int64_t top_k;         // 0: off
  double top_p;          // 1: off
  double log_min_p;      // -inf: off
  bool joint;
  int mass_bits;
};

// The output matrix at listed ids: pairs (row, id). An id of `vocab` is outside, a row of `rows` no pair.
struct Kept {
  int dtype;  // of hidden, weight, bias and the gradients
  int64_t rows, width, vocab;
  const int32_t *ids, *row;
  int64_t threads;
};

struct KeptLogits : Kept {
  Matrix hidden, weight;  // [rows / inner, inner, width], [1, vocab, width]
  int64_t inner, pairs;
  const void* bias;  // [vocab] or null
  void* out;         // Acc [pairs]
};

struct KeptHidden : Kept {  // row is not used
  Matrix weight;
  const int64_t* offsets;  // [rows + 1]
  const void* grad;        // Acc [pairs]
  void* out;               // [rows, width]
};

constexpr int64_t kSlice = 256;  // columns whose sums stay in the first-level cache
constexpr int64_t kPart = 512;   // pairs of a task

struct KeptWeight : Kept {  // the pairs are sorted by id
  Matrix hidden;
  int64_t inner, pairs;
  const void* grad;
  void* out;  // [vocab, width], zeros
};

// The kernels that are compiled once for every instruction set, and what a call of each is. They compute the
// rows [begin, end) on the calling thread; of kept ids, pairs, rows and tasks.
#define RLKERN_KERNELS(F)                         \
  F(token_stats_forward, Forward)                 \
  F(token_stats_merge, Merge)                     \
  F(token_stats_kept_masses, KeptMasses)          \
  F(token_stats_backward, Backward)               \
  F(token_stats_in_sets_forward, ForwardInSets)   \
  F(token_stats_in_sets_backward, BackwardInSets) \
  F(pair_forward, PairForward)                    \
  F(pair_mixture_sums, PairMixtureSums)           \
  F(pair_backward, PairBackward)                  \
  F(row_moments_forward, MomentsForward)          \
  F(row_moments_backward, MomentsBackward)        \
  F(did_entropy_forward, DidForward)              \
  F(did_entropy_backward, DidBackward)            \
  F(sampler_threshold, Sampler)                   \
  F(kept_logits, KeptLogits)                      \
  F(kept_hidden_gradient, KeptHidden)             \
  F(kept_weight_gradient, KeptWeight)

struct Kernels {  // those for one instruction set
#define RLKERN_MEMBER(name, Call) void (*name)(const Call&, int64_t begin, int64_t end);
  RLKERN_KERNELS(RLKERN_MEMBER)
#undef RLKERN_MEMBER
};

// static: every instruction set keeps its own copy
static inline bool is_skipped(const Rows& call, int64_t row) {
  if (call.mask && !call.mask[row]) return true;
  if (!call.targets) return false;
  for (int64_t k = 0; k < call.n_targets; ++k)
    if (call.targets[row * call.n_targets + k] != call.ignore_index) return false;
  return true;
}

struct List {
  int64_t begin, end;
};
static inline List list_of(const Sets& keep, int64_t row) {
  const int64_t j = keep.list ? keep.list[row] : row;
  if (j < 0 || j >= keep.lists) return {0, 0};
  if (!keep.begin) return {keep.n_ids / keep.lists * j, keep.n_ids / keep.lists * (j + 1)};
  const auto in_bounds = [&](int64_t i) { return i < 0 ? 0 : i > keep.n_ids ? keep.n_ids : i; };
  return {in_bounds(keep.begin[j]), in_bounds(keep.end[j])};
}

}  // namespace rlkern
