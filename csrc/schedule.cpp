#include "schedule.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "dispatch.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rlkern {
namespace {

// Before any row is computed: a wrong target must not leave half of the outputs written.
void check_targets(const Rows& call, bool may_be_elsewhere) {
  if (!call.targets) return;
  for (int64_t row = 0; row < call.rows; ++row)
    for (int64_t k = 0; k < call.n_targets; ++k) {
      const int64_t y = call.targets[row * call.n_targets + k];
      if ((y >= 0 && y < call.vocab) || y == call.ignore_index || (y == ELSEWHERE && may_be_elsewhere) || is_skipped(call, row)) continue;
      throw std::out_of_range("target " + std::to_string(y) + " of row " + std::to_string(row) + " is out of range for " +
                              std::to_string(call.vocab) + " logits (and is not ignore_index=" + std::to_string(call.ignore_index) + ")");
    }
}

template <class Id>
void check_ids(const Id* ids, const List& list, int64_t row, int64_t vocab) {
  Id largest = -1;
  for (int64_t i = list.begin; i < list.end; ++i) largest = std::max(largest, ids[i]);
  if (largest < vocab) return;
  throw std::out_of_range("keep holds the id " + std::to_string(largest) + " for row " + std::to_string(row) + ", out of range for " +
                          std::to_string(vocab) + " logits");
}

// As check_targets, of lists of kept ids. How many logits a row costs as much as, on average.
int64_t check_sets(const Rows& call, const Sets& keep) {
  constexpr int64_t a_list = 1000;  // logits that cost as much as a list's own overhead
  if (keep.kind != SetKind::LISTS) return call.vocab;
  int64_t total = 0;
  for (int64_t row = 0; row < call.rows; ++row) {
    if (is_skipped(call, row)) continue;
    if (keep.list && keep.list[row] >= keep.lists)
      throw std::out_of_range("keep names the list " + std::to_string(keep.list[row]) + " for row " + std::to_string(row) +
                              ", out of range for " + std::to_string(keep.lists) + " lists");
    const List list = list_of(keep, row);
    if (keep.wide)
      check_ids(static_cast<const int64_t*>(keep.ids), list, row, call.vocab);
    else
      check_ids(static_cast<const int32_t*>(keep.ids), list, row, call.vocab);
    total += list.begin < list.end ? a_list + 8 * (list.end - list.begin) : call.vocab;
  }
  return call.rows ? total / call.rows : 0;
}

// Hands ranges of rows to the threads as they become free: masked rows cost next to nothing and come in runs.
// A row is computed by one thread, in one way: neither the ranges nor the threads can change a result.
template <class Call>
void run(void (*rows)(const Call&, int64_t, int64_t), const Call& call, int64_t n, int64_t width) {
  constexpr int64_t worth_a_thread = 1 << 15;  // logits; waking a thread costs more than computing fewer
  const int64_t threads = std::min({call.threads, n, 1 + n * width / worth_a_thread});
  if (threads <= 1) return rows(call, 0, n);
  const int64_t ranges = std::min(n, 8 * threads);
#pragma omp parallel for num_threads(int(threads)) schedule(dynamic, 1)
  for (int64_t i = 0; i < ranges; ++i) rows(call, n * i / ranges, n * (i + 1) / ranges);
}
template <class Call>
void run(void (*rows)(const Call&, int64_t, int64_t), const Call& call) {
  run(rows, call, call.rows, call.vocab);
}

// Asks for huge pages behind a gradient that is about to be written. It is mostly fresh memory, whose page
// faults, 4 KiB at a time, would cost several times what the arithmetic does.
void advise_huge_pages(const Matrix& out, int64_t rows, int64_t inner, int64_t row_bytes, int64_t element) {
#if defined(__linux__)
  constexpr uintptr_t huge = uintptr_t(1) << 21;
  const bool dense = out.stride_inner * element == row_bytes && out.stride_outer * element == inner * row_bytes;
  if (!dense || uintptr_t(rows * row_bytes) < 2 * huge) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(out.data), end = begin + rows * row_bytes;
  const uintptr_t first = (begin + huge - 1) / huge * huge, last = end / huge * huge;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: a refusal changes nothing
#endif
}

// Readies memory for a gradient, each row of it written in one go but for `targets` of it. Whether it is to be
// streamed past the caches.
bool prepare(const Rows& call, const Matrix& out, int dtype, int64_t targets) {
  // Bytes of a gradient, of which a reader would find little in the caches.
  constexpr int64_t beyond_caches = 1 << 25;
  // Bytes of a row. Each target is written once more, and must wait for a write past the caches.
  constexpr int64_t worth_a_target = 1 << 12;
  const bool in_place = out.data == call.logits.data;
  if (in_place || !out.data) return false;
  const int64_t element = dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2, row_bytes = call.vocab * element;
  advise_huge_pages(out, call.rows, call.inner, row_bytes, element);
  return call.rows * row_bytes >= beyond_caches && row_bytes > targets * worth_a_target;
}

// Runs a kernel that writes a gradient of the logits.
template <class Call>
void run_gradient(void (*rows)(const Call&, int64_t, int64_t), Call call, int64_t targets) {
  call.stream = prepare(call, call.out, call.dtype, targets);
  run(rows, call);
}

}  // namespace

void token_stats_forward(const Forward& call) {
  check_targets(call, true);
  run(active_kernels().token_stats_forward, call);
}
void token_stats_merge(const Merge& call) {
  constexpr int64_t a_part = 16;  // logits that cost as much
  run(active_kernels().token_stats_merge, call, call.rows, a_part * call.parts);
}
void token_stats_kept_masses(const KeptMasses& call) { run(active_kernels().token_stats_kept_masses, call); }
void token_stats_backward(const Backward& call) { run_gradient(active_kernels().token_stats_backward, call, call.n_targets); }

void token_stats_in_sets_forward(const ForwardInSets& call) {
  check_targets(call, true);
  const int64_t width = check_sets(call, call.keep);
  run(active_kernels().token_stats_in_sets_forward, call, call.rows, call.full_state ? call.vocab : width);
}
void token_stats_in_sets_backward(const BackwardInSets& call) {
  // Listed ids are written once more, as targets are.
  const int64_t listed = call.keep.kind == SetKind::LISTS && call.rows ? call.keep.n_ids / call.rows : 0;
  run_gradient(active_kernels().token_stats_in_sets_backward, call, call.n_targets + listed);
}

void pair_forward(const PairForward& call) {
  check_targets(call, true);
  run(active_kernels().pair_forward, call);
}
void pair_mixture_sums(const PairMixtureSums& call) { run(active_kernels().pair_mixture_sums, call); }
void pair_backward(const PairBackward& call) { run_gradient(active_kernels().pair_backward, call, call.n_targets); }

void row_moments_forward(const MomentsForward& call) {
  check_targets(call, false);
  run(active_kernels().row_moments_forward, call);
}
void row_moments_backward(const MomentsBackward& call) { run_gradient(active_kernels().row_moments_backward, call, 1); }

void did_entropy_forward(const DidForward& call) { run(active_kernels().did_entropy_forward, call); }
void did_entropy_backward(const DidBackward& given) {
  DidBackward call = given;
  call.stream_reference = prepare(call, call.reference_out, call.reference_dtype, 0);
  run_gradient(active_kernels().did_entropy_backward, call, 0);
}

void sampler_threshold(const Sampler& call) { run(active_kernels().sampler_threshold, call); }

void kept_logits(const KeptLogits& call) { run(active_kernels().kept_logits, call, call.pairs, call.width); }
void kept_hidden_gradient(const KeptHidden& call) { run(active_kernels().kept_hidden_gradient, call, call.rows, 8 * call.width); }
void kept_weight_gradient(const KeptWeight& call) {
  const int64_t tasks = (call.pairs + kPart - 1) / kPart * ((call.width + kSlice - 1) / kSlice);
  run(active_kernels().kept_weight_gradient, call, tasks, kPart * kSlice);
}

}  // namespace rlkern
