// token_stats for one instruction set. The forward reads a row once (a second time, from cache, for a kept
// set or a tail). The backward reads and writes it once.
//
// A tile's maximum is found first, then its sums.
// How a row is reduced depends on its length alone: it has the same bits in any batch, on any thread.

#include "token_row.h"

namespace {

template <class T>
PlainRow<T> plain_row(const Rows& call, int64_t row) {
  return {row_of<T>(call, call.logits, row), call.vocab, row_of<T>(call, call.logits, row + 1)};
}

template <class T>
void forward_rows(const Forward& call, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const bool tails = call.kept_kind == KeptKind::UNLISTED;
  Listed listed(tails ? call.vocab : 0, tails ? call.n_targets : 0);
  for (int64_t row = begin; row < end; ++row) {
    if (is_skipped(call, row)) {
      skip_row<A>(call, row);
      continue;
    }
    const PlainRow<T> x = plain_row<T>(call, row);
    if (call.softcap > 0)
      forward_row(call, row, CappedRow<PlainRow<T>>{x, A(1 / call.softcap)}, targets_of(call, row), listed, call.entropy);
    else
      forward_row(call, row, x, targets_of(call, row), listed, call.entropy);
  }
}

template <class T>
void kept_masses_rows(const KeptMasses& call, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const bool tails = call.kept_kind == KeptKind::UNLISTED;
  Listed listed(tails ? call.vocab : 0, tails ? call.n_targets : 0);
  for (int64_t row = begin; row < end; ++row) {
    const A* state = static_cast<const A*>(call.state) + row * (State::TARGETS + call.n_targets);
    const A scale = A(kLog2E * inverse_temperature<A>(call, row));
    const auto masses = [&](const auto& x) {
      return masses_of(x, call.kept_kind, targets_of(call, row), listed, state[State::MAX], scale, state[State::THRESHOLD]);
    };
    Masses found{};
    if (!is_skipped(call, row)) {
      const PlainRow<T> x = plain_row<T>(call, row);
      found = call.softcap > 0 ? masses(CappedRow<PlainRow<T>>{x, A(1 / call.softcap)}) : masses(x);
    }
    put<A>(call.masses, 2 * row, found.kept);
    put<A>(call.masses, 2 * row + 1, found.others);
  }
}

template <class T>
void backward_rows(const Backward& call, int64_t begin, int64_t end) {
  BackwardRoom room(call, false);
  for (int64_t row = begin; row < end; ++row) {
    T* out = const_cast<T*>(row_of<T>(call, call.out, row));
    if (is_skipped(call, row) || is_idle<Acc<T>>(call, row)) {
      std::memset(out, 0, call.vocab * sizeof(T));
      continue;
    }
    const PlainRow<T> x = plain_row<T>(call, row);
    backward_row(call, row, x, targets_of(call, row), out, room.targets, room.beside(), NotFull{});
  }
  if (call.stream) finish_stream();
}

}  // namespace

namespace rlkern {
namespace RLKERN_ISA {

void token_stats_forward(const Forward& call, int64_t begin, int64_t end) {
  with_type(call.dtype, [&](auto logit) { forward_rows<decltype(logit)>(call, begin, end); });
}

void token_stats_kept_masses(const KeptMasses& call, int64_t begin, int64_t end) {
  with_type(call.dtype, [&](auto logit) { kept_masses_rows<decltype(logit)>(call, begin, end); });
}

void token_stats_backward(const Backward& call, int64_t begin, int64_t end) {
  with_type(call.dtype, [&](auto logit) { backward_rows<decltype(logit)>(call, begin, end); });
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
