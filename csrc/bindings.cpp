// The Python module rlkern._cpu: addresses and sizes in, no tensor library. rlkern/native.py is its only caller.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <string>

#include "dispatch.h"
#include "tokens.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace py = pybind11;
using namespace rlkern;

namespace {

Chosen active;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Before any row is computed: a wrong target must not leave half of the outputs written.
void check_targets(const Rows& call) {
  if (!call.targets) return;
  for (int64_t row = 0; row < call.rows; ++row)
    for (int64_t k = 0; k < call.n_targets; ++k) {
      const int64_t y = call.targets[row * call.n_targets + k];
      if ((y >= 0 && y < call.vocab) || y == call.ignore_index || is_skipped(call, row)) continue;
      throw py::index_error("target " + std::to_string(y) + " of row " + std::to_string(row) + " is out of range for " +
                            std::to_string(call.vocab) + " logits (and is not ignore_index=" + std::to_string(call.ignore_index) + ")");
    }
}

// Hands ranges of rows to the threads as they become free: masked rows cost next to nothing and come in runs. Neither the ranges nor the
// threads can change a result: a row is computed by one thread, in one way.
template <class Call>
void run(void (*rows)(const Call&, int64_t, int64_t), const Call& call, int64_t threads) {
  constexpr int64_t worth_a_thread = 1 << 15;  // logits; waking a thread costs more than computing fewer
  threads = std::min({threads, call.rows, 1 + call.rows * call.vocab / worth_a_thread});
  if (threads <= 1) return rows(call, 0, call.rows);
  const int64_t ranges = std::min(call.rows, 8 * threads);
#pragma omp parallel for num_threads(int(threads)) schedule(dynamic, 1)
  for (int64_t i = 0; i < ranges; ++i) rows(call, call.rows * i / ranges, call.rows * (i + 1) / ranges);
}

// Asks for huge pages behind a gradient that is about to be written. It is mostly fresh memory, whose page faults, 4 KiB at a time, would
// cost several times what the arithmetic does.
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

Rows rows_from(int dtype, uintptr_t logits, int64_t stride_outer, int64_t stride_inner, int64_t rows, int64_t inner, int64_t vocab,
               uintptr_t targets, int64_t n_targets, uintptr_t mask, double temperature, uintptr_t temperatures, int64_t ignore_index,
               uintptr_t state) {
  return {DType(dtype), {pointer<void>(logits), stride_outer, stride_inner},
          rows,         inner,
          vocab,        pointer<const int64_t>(targets),
          n_targets,    pointer<const bool>(mask),
          temperature,  pointer<const void>(temperatures),
          ignore_index, pointer<void>(state)};
}

void forward(int dtype, uintptr_t logits, int64_t stride_outer, int64_t stride_inner, int64_t rows, int64_t inner, int64_t vocab,
             uintptr_t targets, int64_t n_targets, uintptr_t mask, double temperature, uintptr_t temperatures, int64_t ignore_index,
             uintptr_t state, int kept_kind, double log_kept, uintptr_t logp, uintptr_t entropy, uintptr_t logsumexp, uintptr_t sum_sq_prob,
             uintptr_t kept_logmass, int64_t threads) {
  const Forward call{rows_from(dtype, logits, stride_outer, stride_inner, rows, inner, vocab, targets, n_targets, mask, temperature,
                               temperatures, ignore_index, state),
                     kept_kind,
                     log_kept,
                     pointer<void>(logp),
                     pointer<void>(entropy),
                     pointer<void>(logsumexp),
                     pointer<void>(sum_sq_prob),
                     pointer<void>(kept_logmass)};
  const py::gil_scoped_release release;
  check_targets(call);
  run(active.kernels->forward, call, threads);
}

void backward(int dtype, uintptr_t logits, int64_t stride_outer, int64_t stride_inner, int64_t rows, int64_t inner, int64_t vocab,
              uintptr_t targets, int64_t n_targets, uintptr_t mask, double temperature, uintptr_t temperatures, int64_t ignore_index,
              uintptr_t state, uintptr_t g_logp, uintptr_t g_entropy, uintptr_t g_logsumexp, uintptr_t g_sum_sq_prob,
              uintptr_t g_kept_logmass, uintptr_t out, int64_t out_stride_outer, int64_t out_stride_inner, int64_t threads) {
  constexpr int64_t beyond_caches = 1 << 25;   // bytes; little of such a gradient would still be there when somebody reads it
  constexpr int64_t worth_a_target = 1 << 12;  // bytes of a row; each target is written once more, and waits for what went past the caches
  const int64_t element = dtype == int(DType::float64) ? 8 : dtype == int(DType::float32) ? 4 : 2;
  const bool in_place = out == logits;
  const Backward call{rows_from(dtype, logits, stride_outer, stride_inner, rows, inner, vocab, targets, n_targets, mask, temperature,
                                temperatures, ignore_index, state),
                      pointer<const void>(g_logp),
                      pointer<const void>(g_entropy),
                      pointer<const void>(g_logsumexp),
                      pointer<const void>(g_sum_sq_prob),
                      pointer<const void>(g_kept_logmass),
                      {pointer<void>(out), out_stride_outer, out_stride_inner},
                      !in_place && rows * vocab * element >= beyond_caches && vocab * element > n_targets * worth_a_target};
  const py::gil_scoped_release release;
  if (!in_place) advise_huge_pages(call.out, rows, inner, vocab * element, element);
  run(active.kernels->backward, call, threads);
}

// The statistics over all tokens, for A = float or double, under names that end in that of the type.
template <class A>
void define_token_kernels(py::module_& m, const std::string& type) {
  m.def(("covariance_sums_" + type).c_str(), [](uintptr_t logp, uintptr_t advantages, uintptr_t mask, int64_t n, uintptr_t sums) {
    const py::gil_scoped_release release;
    covariance_sums(pointer<const A>(logp), pointer<const A>(advantages), pointer<const bool>(mask), n, pointer<double>(sums));
  });
  m.def(("covariance_" + type).c_str(), [](uintptr_t logp, uintptr_t advantages, uintptr_t mask, int64_t n, uintptr_t sums, uintptr_t out) {
    const py::gil_scoped_release release;
    double own[3];
    if (!sums) covariance_sums(pointer<const A>(logp), pointer<const A>(advantages), pointer<const bool>(mask), n, own);
    covariance(pointer<const A>(logp), pointer<const A>(advantages), pointer<const bool>(mask), n, sums ? pointer<const double>(sums) : own,
               pointer<A>(out));
  });
  m.def(("select_bottom_" + type).c_str(), [](uintptr_t values, uintptr_t valid, int64_t n, uintptr_t count, uintptr_t out) {
    const py::gil_scoped_release release;
    select_bottom(pointer<const A>(values), pointer<const bool>(valid), n, *pointer<const int64_t>(count), pointer<bool>(out));
  });
  m.def(("select_fraction_" + type).c_str(),
        [](uintptr_t values, uintptr_t valid, uintptr_t group, int64_t n, double fraction, int64_t minimum, int64_t least, uintptr_t out) {
          const py::gil_scoped_release release;
          const int64_t count = fraction_count(pointer<const bool>(group), n, fraction, minimum, least);
          select_bottom(pointer<const A>(values), pointer<const bool>(valid), n, count, pointer<bool>(out));
        });
  m.def(("selected_means_" + type).c_str(), [](uintptr_t values, uintptr_t selected, uintptr_t mask, int64_t n, uintptr_t means) {
    const py::gil_scoped_release release;
    selected_means(pointer<const A>(values), pointer<const bool>(selected), pointer<const bool>(mask), n, pointer<A>(means));
  });
  m.def(("ratio_terms_" + type).c_str(),
        [](uintptr_t logp, uintptr_t old_logp, uintptr_t advantages, uintptr_t mask, uintptr_t unclipped, int64_t n, double low,
           double high, double dual, double least, double most, uintptr_t terms, uintptr_t free, uintptr_t summary) {
          const py::gil_scoped_release release;
          ratio_terms(pointer<const A>(logp), pointer<const A>(old_logp), pointer<const A>(advantages), pointer<const bool>(mask),
                      pointer<const bool>(unclipped), n, {low, high, dual, least, most}, pointer<A>(terms), pointer<A>(terms) + n,
                      pointer<bool>(free), pointer<A>(summary));
        });
  m.def(("kl_terms_" + type).c_str(), [](uintptr_t logp, uintptr_t reference, uintptr_t where, int64_t n, int kind, bool straight_through,
                                         double clamp, uintptr_t terms) {
    const py::gil_scoped_release release;
    kl_terms(pointer<const A>(logp), pointer<const A>(reference), pointer<const bool>(where), n, kind, straight_through, clamp,
             pointer<A>(terms), pointer<A>(terms) + n);
  });
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  const char* forced = std::getenv("RLKERN_CPU_ISA");
  active = choose(forced ? forced : "");
  m.def("isa", [] { return active.isa; });
  m.def("isas", &available_isas);
  m.def("use_isa", [](const std::string& isa) { active = choose(isa); });
  m.def("token_stats_forward", &forward);
  m.def("token_stats_backward", &backward);
  define_token_kernels<float>(m, "float32");
  define_token_kernels<double>(m, "float64");
}
