// The Python module rlkern._cpu; rlkern/backends/native.py is its only caller.
//
// A call is a dict of named arguments. Tensors are asked for data_ptr() and stride(): no tensor library.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <string>

#include "dispatch.h"
#include "schedule.h"
#include "tokens.h"

namespace py = pybind11;
using namespace rlkern;

namespace {

// --- structures from dicts ---------------------------------------------------------------------------------

template <class T>
struct Field {
  PyObject* name;
  T& value;
};

PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

// `call.name`, to be filled from the argument of that name.
#define FIELD(name) field([] { return interned(#name); }, call.name)
template <class Name, class T>
Field<T> field(Name name, T& value) {
  static PyObject* const key = name();  // each lambda is a type of its own: every name is made once
  return {key, value};
}

template <class T>
void convert(py::handle from, T& to) {
  to = from.cast<T>();
}
py::object result_of(py::handle tensor, PyObject* method) {
  PyObject* const result = PyObject_CallMethodNoArgs(tensor.ptr(), method);
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}
template <class T>
void convert(py::handle tensor, T*& to) {
  static PyObject* const data_ptr = interned("data_ptr");
  to = tensor.is_none() ? nullptr : reinterpret_cast<T*>(result_of(tensor, data_ptr).cast<uintptr_t>());
}
void convert(py::handle tensor, Matrix& to) {
  if (tensor.is_none()) return;  // no data
  static PyObject* const stride = interned("stride");
  const py::tuple strides = result_of(tensor, stride);
  convert(tensor, to.data);
  to.stride_outer = strides[0].cast<int64_t>();
  to.stride_inner = strides[1].cast<int64_t>();
}

template <class T>
void fill_one(const py::dict& arguments, const Field<T>& field) {
  PyObject* const value = PyDict_GetItemWithError(arguments.ptr(), field.name);
  if (!value) throw py::type_error("missing argument: " + py::str(field.name).cast<std::string>());
  convert(value, field.value);
}
template <class... T>
void fill(const py::dict& arguments, const Field<T>&... fields) {
  (fill_one(arguments, fields), ...);
  if (arguments.size() == sizeof...(fields)) return;
  throw py::type_error("expected " + std::to_string(sizeof...(fields)) + " arguments, got " + py::repr(arguments).cast<std::string>());
}

// --- functions ---------------------------------------------------------------------------------------------

// A function over rows of logits takes a dict of what all of them need, and one or two that `read` reads.
template <class Call, class... Dicts, class Read>
void define_rows_of(py::module_& m, const char* name, void (*function)(const Call&), Read read) {
  m.def(name, [=](const py::dict& rows, const Dicts&... own) {
    Call call{};
    fill(rows, FIELD(dtype), FIELD(logits), FIELD(rows), FIELD(inner), FIELD(vocab), FIELD(targets), FIELD(n_targets), FIELD(mask),
         FIELD(temperature), FIELD(temperatures), FIELD(ignore_index), FIELD(state), FIELD(threads));
    read(own..., call);
    const py::gil_scoped_release release;
    function(call);
  });
}

// A function over pairs (row, kept id) takes a dict of what all of them need, and one that `read` reads.
template <class Call, class Read>
void define_kept(py::module_& m, const char* name, void (*function)(const Call&), Read read) {
  m.def(name, [=](const py::dict& pairs, const py::dict& own) {
    Call call{};
    fill(pairs, FIELD(dtype), FIELD(rows), FIELD(width), FIELD(vocab), FIELD(ids), FIELD(row), FIELD(threads));
    read(own, call);
    const py::gil_scoped_release release;
    function(call);
  });
}

// A function over tokens takes the dtype and one dict.
template <template <class> class Call, class Read>
void define_tokens(py::module_& m, const char* name, Read read) {
  m.def(name, [=](int dtype, const py::dict& arguments) {
    const auto run = [&](auto call) {
      read(arguments, call);
      const py::gil_scoped_release release;
      call.run();
    };
    dtype == DType::float64 ? run(Call<double>{}) : run(Call<float>{});
  });
}

py::object split(const char* names) { return py::str(names).attr("split")(", "); }

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  const char* forced = std::getenv("RLKERN_CPU_ISA");
  use_isa(forced ? forced : "");
  m.def("isa", &active_isa);
  m.def("isas", &available_isas);
  m.def("use_isa", &use_isa);

  const auto read_forward = [](const py::dict& from, Forward& call) {
    fill(from, FIELD(softcap), FIELD(kept_kind), FIELD(log_kept), FIELD(logp), FIELD(entropy), FIELD(logsumexp), FIELD(sum_sq_prob),
         FIELD(kept_logmass));
  };
  const auto read_backward = [](const py::dict& from, Backward& call) {
    fill(from, FIELD(softcap), FIELD(kept_kind), FIELD(g_logp), FIELD(g_entropy), FIELD(g_logsumexp), FIELD(g_sum_sq_prob),
         FIELD(g_kept_logmass), FIELD(out));
  };
  const auto read_sets = [](const py::dict& from, Sets& call) {
    fill(from, FIELD(kind), FIELD(outside), FIELD(open_empty), FIELD(ids), FIELD(wide), FIELD(n_ids), FIELD(lists), FIELD(begin),
         FIELD(end), FIELD(list), FIELD(entries), FIELD(least));
  };
  define_rows_of<Forward, py::dict>(m, "token_stats_forward", &token_stats_forward, read_forward);
  define_rows_of<Merge, py::dict, py::dict>(m, "token_stats_merge", &token_stats_merge,
                                            [=](const py::dict& own, const py::dict& from, Merge& call) {
                                              read_forward(own, call);
                                              fill(from, FIELD(parts));
                                            });
  define_rows_of<KeptMasses, py::dict>(m, "token_stats_kept_masses", &token_stats_kept_masses, [](const py::dict& from, KeptMasses& call) {
    fill(from, FIELD(softcap), FIELD(kept_kind), FIELD(masses));
  });
  define_rows_of<Backward, py::dict>(m, "token_stats_backward", &token_stats_backward, read_backward);
  define_rows_of<ForwardInSets, py::dict, py::dict, py::dict>(
      m, "token_stats_in_sets_forward", &token_stats_in_sets_forward,
      [=](const py::dict& own, const py::dict& keep, const py::dict& from, ForwardInSets& call) {
        read_forward(own, call);
        read_sets(keep, call.keep);
        fill(from, FIELD(target_kept), FIELD(full_entropy), FIELD(full_logsumexp), FIELD(full_state));
      });
  define_rows_of<BackwardInSets, py::dict, py::dict, py::dict>(
      m, "token_stats_in_sets_backward", &token_stats_in_sets_backward,
      [=](const py::dict& own, const py::dict& keep, const py::dict& from, BackwardInSets& call) {
        read_backward(own, call);
        read_sets(keep, call.keep);
        fill(from, FIELD(full_state), FIELD(g_full_entropy), FIELD(g_full_logsumexp));
      });
  const auto read_pair = [](const py::dict& from, Pair& call) {
    fill(from, FIELD(other_dtype), FIELD(other), FIELD(other_temperature), FIELD(other_temperatures), FIELD(softcap), FIELD(other_softcap),
         FIELD(kind), FIELD(beta));
  };
  define_rows_of<PairForward, py::dict, py::dict>(m, "pair_forward", &pair_forward,
                                                  [=](const py::dict& pair, const py::dict& from, PairForward& call) {
                                                    read_pair(pair, call);
                                                    fill(from, FIELD(divergence), FIELD(logp), FIELD(entropy), FIELD(logsumexp),
                                                         FIELD(other_logp), FIELD(other_entropy), FIELD(other_logsumexp));
                                                  });
  define_rows_of<PairMixtureSums, py::dict, py::dict>(m, "pair_mixture_sums", &pair_mixture_sums,
                                                      [=](const py::dict& pair, const py::dict& from, PairMixtureSums& call) {
                                                        read_pair(pair, call);
                                                        fill(from, FIELD(sums));
                                                      });
  define_rows_of<PairBackward, py::dict, py::dict>(
      m, "pair_backward", &pair_backward, [=](const py::dict& pair, const py::dict& from, PairBackward& call) {
        read_pair(pair, call);
        fill(from, FIELD(g_divergence), FIELD(g_logp), FIELD(g_entropy), FIELD(g_logsumexp), FIELD(out));
      });
  define_rows_of<MomentsForward, py::dict>(m, "row_moments_forward", &row_moments_forward, [](const py::dict& from, MomentsForward& call) {
    fill(from, FIELD(centred_target), FIELD(variance));
  });
  define_rows_of<MomentsBackward, py::dict>(
      m, "row_moments_backward", &row_moments_backward,
      [](const py::dict& from, MomentsBackward& call) { fill(from, FIELD(g_target), FIELD(g_variance), FIELD(out)); });
  define_rows_of<DidForward, py::dict>(m, "did_entropy_forward", &did_entropy_forward, [](const py::dict& from, DidForward& call) {
    fill(from, FIELD(reference_dtype), FIELD(reference), FIELD(entropy));
  });
  define_rows_of<DidBackward, py::dict>(m, "did_entropy_backward", &did_entropy_backward, [](const py::dict& from, DidBackward& call) {
    fill(from, FIELD(reference_dtype), FIELD(reference), FIELD(g_entropy), FIELD(out), FIELD(reference_out));
  });
  define_rows_of<Sampler, py::dict>(m, "sampler_threshold", &sampler_threshold, [](const py::dict& from, Sampler& call) {
    fill(from, FIELD(top_k), FIELD(top_p), FIELD(log_min_p), FIELD(joint), FIELD(mass_bits));
  });
  define_kept<KeptLogits>(m, "kept_logits", &kept_logits, [](const py::dict& from, KeptLogits& call) {
    fill(from, FIELD(hidden), FIELD(weight), FIELD(inner), FIELD(pairs), FIELD(bias), FIELD(out));
  });
  define_kept<KeptHidden>(m, "kept_hidden_gradient", &kept_hidden_gradient, [](const py::dict& from, KeptHidden& call) {
    fill(from, FIELD(weight), FIELD(offsets), FIELD(grad), FIELD(out));
  });
  define_kept<KeptWeight>(m, "kept_weight_gradient", &kept_weight_gradient, [](const py::dict& from, KeptWeight& call) {
    fill(from, FIELD(hidden), FIELD(inner), FIELD(pairs), FIELD(grad), FIELD(out));
  });
  define_tokens<KeptRowsForward>(m, "kept_rows_forward", [](const py::dict& from, auto& call) {
    fill(from, FIELD(n), FIELD(n_targets), FIELD(logits), FIELD(ids), FIELD(offsets), FIELD(targets), FIELD(counted), FIELD(temperature),
         FIELD(temperatures), FIELD(logp), FIELD(entropy), FIELD(logsumexp), FIELD(sum_sq), FIELD(state), FIELD(place));
  });
  define_tokens<KeptRowsBackward>(m, "kept_rows_backward", [](const py::dict& from, auto& call) {
    fill(from, FIELD(n), FIELD(n_targets), FIELD(logits), FIELD(offsets), FIELD(place), FIELD(temperature), FIELD(temperatures),
         FIELD(state), FIELD(g_logp), FIELD(g_entropy), FIELD(g_logsumexp), FIELD(g_sum_sq), FIELD(out));
  });
  define_tokens<SequenceSums>(m, "sequence_sums", [](const py::dict& from, auto& call) {
    fill(from, FIELD(n), FIELD(rows), FIELD(sequences), FIELD(values), FIELD(mask), FIELD(cu_seqlens), FIELD(out));
  });
  define_tokens<SequenceSpread>(m, "sequence_spread", [](const py::dict& from, auto& call) {
    fill(from, FIELD(n), FIELD(sequences), FIELD(values), FIELD(seq_idx), FIELD(mask), FIELD(out));
  });
  define_tokens<TokenCovariance>(m, "token_covariance", [](const py::dict& from, auto& call) {
    fill(from, FIELD(n), FIELD(logp), FIELD(advantages), FIELD(mask), FIELD(sums), FIELD(out));
  });
  define_tokens<SelectBottom>(m, "select_bottom", [](const py::dict& from, auto& call) {
    fill(from, FIELD(n), FIELD(values), FIELD(valid), FIELD(count), FIELD(out));
  });
  define_tokens<SelectFraction>(m, "select_fraction", [](const py::dict& from, auto& call) {
    fill(from, FIELD(n), FIELD(values), FIELD(valid), FIELD(group), FIELD(fraction), FIELD(minimum), FIELD(least), FIELD(out));
  });
  define_tokens<SelectedMeans>(m, "selected_means", [](const py::dict& from, auto& call) {
    fill(from, FIELD(n), FIELD(values), FIELD(selected), FIELD(mask), FIELD(out));
  });
  define_tokens<RatioTerms>(m, "ratio_terms", [](const py::dict& from, auto& call) {
    fill(from, FIELD(n), FIELD(logp), FIELD(old_logp), FIELD(advantages), FIELD(mask), FIELD(unclipped), FIELD(low), FIELD(high),
         FIELD(dual), FIELD(least), FIELD(most), FIELD(terms), FIELD(free), FIELD(summary));
  });
  define_tokens<KLTerms>(m, "kl_terms", [](const py::dict& from, auto& call) {
    fill(from, FIELD(n), FIELD(logp), FIELD(reference), FIELD(mask), FIELD(kind), FIELD(straight_through), FIELD(clamp), FIELD(terms));
  });

  using namespace py::literals;
  m.attr("constants") =
      py::dict("DType"_a = split(DType::names), "State"_a = split(State::names), "KeptKind"_a = split(KeptKind::names),
               "SetKind"_a = split(SetKind::names), "Outside"_a = split(Outside::names), "PairState"_a = split(PairState::names),
               "PairKind"_a = split(PairKind::names), "KLKind"_a = split(KLKind::names), "SUMMARY"_a = split(Summary::names),
               "LARGEST_EXPONENT"_a = LARGEST_EXPONENT, "ELSEWHERE"_a = ELSEWHERE);
}
