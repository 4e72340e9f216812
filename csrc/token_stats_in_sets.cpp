// token_stats over each row's set of kept ids, for one instruction set. A row of bits, bools or a threshold is
// read as without one, but for what is dropped whole. Of a list its logits alone are read, and its gradient is
// zeros and as many numbers. Where results of the full row are asked for it is read once more.

#include "kept_sets.h"

namespace {

// Calls f with the row, behind a softcap if there is one.
template <class Row, class F>
void with_softcap(const Row& x, double softcap, F f) {
  using A = Acc<typename Row::Tile>;
  if (softcap > 0)
    f(CappedRow<Row>{x, A(1 / softcap)});
  else
    f(x);
}

template <class A>
void put_full(const ForwardInSets& call, int64_t row, const Distribution<A>& d, A inv_t) {
  put<A>(call.full_entropy, row, d.entropy());
  put<A>(call.full_logsumexp, row, d.logsumexp(inv_t));
  put<A>(call.full_state, 3 * row + State::MAX, d.top);
  put<A>(call.full_state, 3 * row + State::REST, d.rest);
  put<A>(call.full_state, 3 * row + State::MEAN_U, d.mean_u);
}

constexpr int64_t kAhead = 3;  // rows whose listed logits are on their way

template <class T>
void forward_rows(const ForwardInSets& call, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const bool tails = call.kept_kind == KeptKind::UNLISTED, with_full = call.full_state;
  Listed listed(tails ? std::max(call.vocab, call.keep.n_ids) + 1 : 0, tails ? call.n_targets : 0);
  KeptRow<T> kept(call, call.keep);
  for (int64_t row = begin; row < end; ++row) {
    kept.prefetch(row + kAhead);
    if (is_skipped(call, row)) {
      skip_row<A>(call, row);
      for (int64_t k = 0; k < call.n_targets; ++k) call.target_kept[row * call.n_targets + k] = true;
      if (with_full) put_full<A>(call, row, {0, 0, 0, 0, 0}, 0);
      continue;
    }
    const Over over = kept.find(row, call.target_kept);
    const auto forward = [&](const auto& x, const RowTargets& y) {
      with_softcap(x, call.softcap, [&](const auto& x) {
        const auto d = forward_row(call, row, x, y, listed, call.entropy || with_full);
        if (with_full && over == Over::everything) put_full<A>(call, row, d, inverse_temperature<A>(call, row));
      });
    };
    if (over == Over::everything) {
      forward(kept.plain(), targets_of(call, row));
      continue;
    }
    if (over == Over::list)
      forward(kept.gathered(), kept.targets(call.n_targets));
    else
      forward(kept.set(), targets_of(call, row));
    if (!with_full) continue;
    const A inv_t = inverse_temperature<A>(call, row);
    with_softcap(kept.plain(), call.softcap,
                 [&](const auto& x) { put_full<A>(call, row, distribution_of(x, A(kLog2E * inv_t), false, true), inv_t); });
  }
}

template <class T>
class BackwardRows {
  using A = Acc<T>;

 public:
  explicit BackwardRows(const BackwardInSets& call) : call_(call), kept_(call, call.keep), room_(call, call.full_state) {}

  void run(int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      kept_.prefetch(row + kAhead);
      T* out = const_cast<T*>(row_of<T>(call_, call_.out, row));
      const double g_h = get<A>(call_.g_full_entropy, row), g_z = get<A>(call_.g_full_logsumexp, row);
      const bool skipped = is_skipped(call_, row), with_full = !skipped && (g_h != 0 || g_z != 0);
      const bool with_kept = !skipped && !is_idle<A>(call_, row);
      if (!with_full) {
        with_kept ? write(row, out, NotFull{}) : write_zeros(call_.stream, out, call_.vocab);
        continue;
      }
      const A* state = static_cast<const A*>(call_.full_state) + 3 * row;
      const Full<A> full{state[State::MAX], inverse_temperature<A>(call_, row), state[State::REST], state[State::MEAN_U], g_h, g_z};
      with_kept ? write(row, out, full) : write_full(row, out, full);
    }
    if (call_.stream) finish_stream();
  }

 private:
  template <class FullOrNot>
  void write(int64_t row, T* out, const FullOrNot& full) {
    const Over over = kept_.find(row, nullptr);
    if (over == Over::everything)
      backward_row(call_, row, kept_.plain(), targets_of(call_, row), out, room_.targets, room_.beside(), full);
    else if (over == Over::set)
      backward_row(call_, row, kept_.set(), targets_of(call_, row), out, room_.targets, room_.beside(), full);
    else
      write_list(row, out, full);
  }

  // First the list's, then the row: it may be written over the logits.
  template <class FullOrNot>
  void write_list(int64_t row, T* out, const FullOrNot& full) {
    const PlainRow<T> x = kept_.gathered();
    T* gradients = gradients_.room(x.vocab);
    Backward call = call_;
    call.stream = false;
    backward_row(call, row, x, kept_.targets(call.n_targets), gradients, room_.targets, room_.beside(), full);
    write_full(row, out, full);
    for (int64_t i = 0; i < kept_.list().count; ++i) out[kept_.list().ids()[i]] = gradients[i];
  }

  void write_full(int64_t, T* out, NotFull) { write_zeros(call_.stream, out, call_.vocab); }
  void write_full(int64_t row, T* out, const Full<A>& full) {
    const T* x = row_of<T>(call_, call_.logits, row);
    if (call_.softcap > 0)
      write_gradient(call_.stream, x, out, call_.vocab, by_logits(gradient_by<T>(full), A(1 / call_.softcap)));
    else
      write_gradient(call_.stream, x, out, call_.vocab, gradient_by<T>(full));
  }

  const BackwardInSets& call_;
  KeptRow<T> kept_;
  BackwardRoom room_;
  Buffer<T> gradients_;
};

}  // namespace

namespace rlkern {
namespace RLKERN_ISA {

void token_stats_in_sets_forward(const ForwardInSets& call, int64_t begin, int64_t end) {
  with_type(call.dtype, [&](auto logit) { forward_rows<decltype(logit)>(call, begin, end); });
}

void token_stats_in_sets_backward(const BackwardInSets& call, int64_t begin, int64_t end) {
  with_type(call.dtype, [&](auto logit) { BackwardRows<decltype(logit)>(call).run(begin, end); });
}

}  // namespace RLKERN_ISA
}  // namespace rlkern
