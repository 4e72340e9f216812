// Random calls of the CPU kernels, without Python: for the sanitizers of `make sanitize`.
//
//     stress --calls 200 --seed 0 [--isa avx2]      stress --seed 0 --only 17      stress --plant race
//
// A call is drawn from (seed, index). It is made on one thread, again on one, and on several: the results must
// have the same bits. Then several threads make the same calls at once, as Python's do, each with OpenMP
// threads of its own. All memory is of the exact size, so one entry too far is outside. Prints the index of a
// call before it is made, and exits 1 where bits differ. With --plant it does something wrong on purpose.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "dispatch.h"
#include "schedule.h"
#include "tokens.h"

using namespace rlkern;

namespace {

// splitmix64: a few instructions a number, where the sanitizers make each one dear.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }
  int64_t below(int64_t n) { return int64_t(bits() % uint64_t(n)); }
  int64_t from(int64_t least, int64_t most) { return least + below(most - least + 1); }
  double unit() { return double(bits() >> 11) / double(int64_t(1) << 53); }
  bool chance(double p) { return unit() < p; }

 private:
  uint64_t state_;
};

// Memory that is all the same until somebody writes it, each block of the exact size.
class Memory {
 public:
  void* bytes(int64_t n) {
    blocks_.push_back({std::make_unique<unsigned char[]>(n), n});
    std::memset(blocks_.back().data.get(), 0, n);
    return blocks_.back().data.get();
  }
  template <class T>
  T* of(int64_t n) {
    return static_cast<T*>(bytes(n * sizeof(T)));
  }
  bool operator==(const Memory& other) const {
    if (blocks_.size() != other.blocks_.size()) return false;
    for (size_t i = 0; i < blocks_.size(); ++i)
      if (blocks_[i].size != other.blocks_[i].size || std::memcmp(blocks_[i].data.get(), other.blocks_[i].data.get(), blocks_[i].size))
        return false;
    return true;
  }

 private:
  struct Block {
    std::unique_ptr<unsigned char[]> data;
    int64_t size;
  };
  std::vector<Block> blocks_;
};

// A call with its inputs, which no thread writes. `run` makes its results in the memory that it is given.
struct Job {
  const char* name;
  Memory inputs;
  std::function<void(Memory& results, int64_t threads)> run;
};
using Draw = Job (*)(Random&);

// --- inputs ---------------------------------------------------------------------------------------------------

constexpr int64_t kIgnored = -100;
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN(), kInfinity = std::numeric_limits<double>::infinity();
int64_t size_of(int dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }
int64_t acc_size(int dtype) { return dtype == DType::float64 ? 8 : 4; }
int acc_of(int dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }
// A dtype that may stand beside another one.
int beside(Random& r, int dtype) {
  constexpr int narrow[] = {DType::float32, DType::bfloat16, DType::float16};
  return dtype == DType::float64 || r.chance(0.4) ? dtype : narrow[r.below(3)];
}
bool is_half(int dtype) { return size_of(dtype) == 2; }

void put_number(void* to, int64_t i, int dtype, double value) {
  if (dtype == DType::float64)
    static_cast<double*>(to)[i] = value;
  else
    static_cast<float*>(to)[i] = float(value);
}

// Numbers between -8 and 8; of 16-bit types random bits with such an exponent. A few are special if asked for.
void fill(Random& r, void* to, int64_t n, int dtype, bool specials = false) {
  const double every = specials ? 0.02 : 0;
  for (int64_t i = 0; i < n; ++i) {
    const bool special = every > 0 && r.chance(every), nan = special && r.chance(0.01);
    if (!is_half(dtype)) {
      put_number(to, i, dtype, nan ? kNaN : special ? -kInfinity : 16 * r.unit() - 8);
      continue;
    }
    const bool wide = dtype == DType::bfloat16;
    const int64_t exponent = wide ? r.from(118, 129) : r.from(6, 17), mantissa = r.below(wide ? 128 : 1024);
    const int64_t number = r.below(2) << 15 | exponent << (wide ? 7 : 10) | mantissa;
    static_cast<uint16_t*>(to)[i] = uint16_t(!special ? number : wide ? (nan ? 0x7fc0 : 0xff80) : (nan ? 0x7e00 : 0xfc00));
  }
}
void* numbers(Random& r, Memory& memory, int64_t n, int dtype, bool specials = false) {
  void* const to = memory.bytes(n * size_of(dtype));
  fill(r, to, n, dtype, specials);
  return to;
}

// Gradients from above: mostly there, some of them 0.
void* upstream(Random& r, Memory& memory, int64_t n, int dtype, double there = 0.6) {
  if (!r.chance(there)) return nullptr;
  void* const to = numbers(r, memory, n, acc_of(dtype));
  for (int64_t i = 0; i < n; ++i)
    if (r.chance(0.2)) put_number(to, i, acc_of(dtype), 0);
  return to;
}

// Flags of one byte. Some hold another byte than 0 and 1, where that is allowed.
unsigned char* flags(Random& r, Memory& memory, int64_t n, bool any_byte = false) {
  unsigned char* const to = memory.of<unsigned char>(n);
  const double p = r.chance(0.5) ? 0.8 : r.unit();
  for (int64_t i = 0; i < n; ++i) to[i] = r.chance(p) ? (any_byte ? r.from(1, 255) : 1) : 0;
  return to;
}
const bool* mask_or_none(Random& r, Memory& memory, int64_t n) {
  return r.chance(0.5) ? reinterpret_cast<const bool*>(flags(r, memory, n)) : nullptr;
}

struct Shape {
  int64_t outer, inner, vocab;
  int64_t rows() const { return outer * inner; }
};

// Mostly small; else enough for some threads, and rarely so much that gradients are streamed past the caches.
Shape draw_shape(Random& r, int dtype) {
  if (r.chance(0.5)) return {r.from(0, 3), r.from(1, 4), r.chance(0.2) ? 1 : r.from(2, 90)};
  const int64_t vocab = r.chance(0.5) ? r.from(4000, 9000) : r.from(100, 2100);
  const int64_t logits = r.chance(0.02) ? (int64_t(36) << 20) / size_of(dtype) : r.from(40'000, 120'000);
  const int64_t inner = r.from(1, 3);
  return {logits / (vocab * inner) + 1, inner, vocab};
}

Matrix strides(Random& r, const Shape& s, int64_t width) {
  const int64_t inner = width + (r.chance(0.5) ? 0 : r.from(1, 9));
  return {nullptr, inner * s.inner + (r.chance(0.5) ? 0 : r.from(1, 9)), inner};
}
int64_t extent(const Matrix& m, const Shape& s, int64_t width) {
  return s.outer ? (s.outer - 1) * m.stride_outer + (s.inner - 1) * m.stride_inner + width : 0;
}
Matrix matrix(Random& r, Memory& memory, const Shape& s, int dtype, bool specials) {
  Matrix m = strides(r, s, s.vocab);
  m.data = numbers(r, memory, extent(m, s, s.vocab), dtype, specials);
  return m;
}

void* temperatures(Random& r, Memory& memory, int64_t rows, int dtype) {
  void* const to = numbers(r, memory, rows, acc_of(dtype));
  for (int64_t i = 0; i < rows; ++i) put_number(to, i, acc_of(dtype), r.chance(0.02) ? 0 : 0.3 + r.unit());
  return to;
}

// What all calls over rows of logits need.
struct RowsDraw {
  Rows rows{};
  Shape shape;
  Memory memory;
};
RowsDraw draw_rows(Random& r, int64_t most_targets, double with_targets = 0.8) {
  RowsDraw draw;
  Rows& call = draw.rows;
  call.dtype = int(r.below(4));
  const Shape s = draw.shape = draw_shape(r, call.dtype);
  call.logits = matrix(r, draw.memory, s, call.dtype, r.chance(0.3));
  call.rows = s.rows();
  call.inner = s.inner;
  call.vocab = s.vocab;
  call.ignore_index = kIgnored;
  if (most_targets && r.chance(with_targets)) {
    call.n_targets = r.chance(0.7) ? 1 : r.from(1, most_targets);
    int64_t* const y = draw.memory.of<int64_t>(call.rows * call.n_targets);
    const double other = r.chance(0.5) ? 0 : 0.2;
    for (int64_t i = 0; i < call.rows * call.n_targets; ++i)
      y[i] = !r.chance(other) ? r.below(call.vocab) : r.chance(0.7) ? kIgnored : ELSEWHERE;
    if (call.rows && r.chance(0.05)) y[r.below(call.rows * call.n_targets)] = r.chance(0.5) ? call.vocab : -1;  // out of range
    call.targets = y;
  }
  call.mask = mask_or_none(r, draw.memory, call.rows);
  call.temperature = 0.3 + r.unit();
  if (r.chance(0.3)) call.temperatures = temperatures(r, draw.memory, call.rows, call.dtype);
  return draw;
}

// --- results --------------------------------------------------------------------------------------------------

// Memory for n numbers of what is computed in.
struct AccResults {
  Memory& memory;
  int dtype;
  void* operator()(int64_t n, bool wanted = true) const { return wanted ? memory.bytes(n * acc_size(dtype)) : nullptr; }
};

// A gradient of the logits' shape: of strides of its own, or in place. Then the call reads a copy of the logits.
struct Gradient {
  bool in_place;
  Matrix strides;
  Gradient(Random& r, const Shape& s, bool may_be_in_place = true)
      : in_place(may_be_in_place && r.chance(0.3)), strides(::strides(r, s, s.vocab)) {}

  template <class Call>
  void take(Memory& results, Call& call, const Shape& s) const {
    const Matrix& like = in_place ? call.logits : strides;
    const int64_t size = extent(like, s, s.vocab) * size_of(call.dtype);
    call.out = like;
    call.out.data = results.bytes(size);
    if (!in_place) return;
    if (size) std::memcpy(call.out.data, call.logits.data, size);
    call.logits.data = call.out.data;
  }
};

// Calls the function. A target out of range is one more result.
template <class Call>
bool made(void (*function)(const Call&), const Call& call, Memory& results) {
  int* const error = results.of<int>(1);
  try {
    function(call);
  } catch (const std::out_of_range&) {
    *error = 1;
  }
  return !*error;
}

template <class To, class From>
To with_base(const From& base) {
  To to{};
  static_cast<From&>(to) = base;
  return to;
}

// --- token_stats ----------------------------------------------------------------------------------------------

struct StatsOptions {
  double softcap, log_kept;
  int kept_kind;
  bool logp, entropy, sum_sq, kept;
};
StatsOptions draw_options(Random& r, bool with_targets) {
  StatsOptions o{};
  o.softcap = r.chance(0.3) ? 4 + 10 * r.unit() : 0;
  o.kept_kind = int(r.below(with_targets ? 4 : 3));
  o.log_kept = -3 * r.unit();
  o.logp = with_targets && r.chance(0.9);
  o.entropy = r.chance(0.6);
  o.sum_sq = r.chance(0.4);
  o.kept = o.kept_kind != KeptKind::NONE;
  return o;
}
void results_of(Forward& call, const StatsOptions& o, Memory& results) {
  const AccResults acc{results, call.dtype};
  call.softcap = o.softcap;
  call.kept_kind = o.kept_kind;
  call.log_kept = o.log_kept;
  call.logp = acc(call.rows * call.n_targets, o.logp);
  call.entropy = acc(call.rows, o.entropy);
  call.logsumexp = acc(call.rows);
  call.sum_sq_prob = acc(call.rows, o.sum_sq);
  call.kept_logmass = acc(call.rows, o.kept);
  call.state = acc(call.rows * (State::TARGETS + call.n_targets));
}
// The gradients from above of the results that there are.
Backward backward_of(Random& r, RowsDraw& draw, const StatsOptions& o) {
  Backward call = with_base<Backward>(draw.rows);
  call.softcap = o.softcap;
  call.kept_kind = o.kept_kind;
  const auto g = [&](int64_t n, bool of) { return of ? upstream(r, draw.memory, n, call.dtype) : nullptr; };
  call.g_logp = g(call.rows * call.n_targets, o.logp);
  call.g_entropy = g(call.rows, o.entropy);
  call.g_logsumexp = g(call.rows, true);
  call.g_sum_sq_prob = g(call.rows, o.sum_sq);
  call.g_kept_logmass = g(call.rows, o.kept);
  return call;
}

Job token_stats(Random& r) {
  RowsDraw draw = draw_rows(r, 12);
  const StatsOptions o = draw_options(r, draw.rows.targets);
  Backward down = backward_of(r, draw, o);
  const Gradient gradient(r, draw.shape);
  return {"token_stats", std::move(draw.memory), [=, rows = draw.rows, shape = draw.shape](Memory& results, int64_t threads) mutable {
            Forward up = with_base<Forward>(rows);
            up.threads = threads;
            results_of(up, o, results);
            if (!made(&token_stats_forward, up, results)) return;
            KeptMasses masses = with_base<KeptMasses>(static_cast<const Rows&>(up));
            masses.softcap = o.softcap;
            masses.kept_kind = o.kept_kind;
            masses.masses = AccResults{results, up.dtype}(2 * up.rows);
            token_stats_kept_masses(masses);
            Backward call = down;
            call.threads = threads;
            call.state = up.state;
            gradient.take(results, call, shape);
            token_stats_backward(call);
          }};
}

Job token_stats_of_parts(Random& r) {
  Memory memory;
  Merge call{};
  call.dtype = r.chance(0.5) ? DType::float32 : DType::float64;
  call.rows = r.chance(0.5) ? r.from(0, 9) : r.from(800, 3000);
  call.parts = r.from(1, 7);
  call.inner = 1;
  call.n_targets = r.below(3);
  const int64_t width = State::TARGETS + call.n_targets;
  const Shape parts{call.parts, std::max<int64_t>(call.rows, 1), width};
  call.vocab = width;
  call.logits = matrix(r, memory, parts, call.dtype, r.chance(0.3));
  call.ignore_index = kIgnored;
  if (call.n_targets) {
    int64_t* const y = memory.of<int64_t>(call.rows * call.n_targets);
    for (int64_t i = 0; i < call.rows * call.n_targets; ++i) y[i] = r.chance(0.2) ? kIgnored : 0;
    call.targets = y;
  }
  call.mask = mask_or_none(r, memory, call.rows);
  call.temperature = 0.3 + r.unit();
  StatsOptions o = draw_options(r, call.targets);
  o.softcap = 0;
  o.kept = false;
  return {"token_stats of parts", std::move(memory), [=](Memory& results, int64_t threads) {
            Merge merge = call;
            merge.threads = threads;
            results_of(merge, o, results);
            made(&token_stats_merge, merge, results);
          }};
}

// Lists of ids, or a byte, bit or threshold for each row. `rows` is what the sets are for.
Sets draw_sets(Random& r, RowsDraw& draw) {
  const Rows& rows = draw.rows;
  Sets keep{};
  keep.kind = int(r.below(4));
  keep.outside = rows.n_targets > 1 ? int(Outside::MINUS_INF) : int(r.below(3));
  keep.open_empty = r.chance(0.5);
  Memory& memory = draw.memory;
  if (keep.kind == SetKind::AT_LEAST) {
    void* const least = numbers(r, memory, rows.rows, acc_of(rows.dtype));
    for (int64_t i = 0; i < rows.rows; ++i)
      if (r.chance(0.1)) put_number(least, i, acc_of(rows.dtype), kNaN);
    keep.least = least;
  } else if (keep.kind != SetKind::LISTS) {
    const int64_t width = keep.kind == SetKind::BITS ? (rows.vocab + 7) / 8 : rows.vocab;
    keep.entries = strides(r, draw.shape, width);
    const int64_t n = extent(keep.entries, draw.shape, width);
    unsigned char* const bytes = flags(r, memory, n);
    if (keep.kind == SetKind::BITS)
      for (int64_t i = 0; i < n; ++i) bytes[i] = bytes[i] ? (unsigned char)(r.bits()) : 0;
    keep.entries.data = bytes;
  } else {
    const bool equal = r.chance(0.4);
    const int64_t length = r.chance(0.2) ? 0 : r.from(1, 40);
    keep.lists = equal ? rows.rows : r.from(1, 9);
    keep.n_ids = keep.lists * length;
    keep.wide = r.chance(0.5);
    void* const ids = memory.bytes(keep.n_ids * (keep.wide ? 8 : 4));
    const bool wrong = r.chance(0.05);
    for (int64_t i = 0; i < keep.n_ids; ++i) {
      const int64_t id = r.chance(0.1) ? -r.from(1, 9) : wrong && r.chance(0.1) ? rows.vocab : r.below(rows.vocab);
      if (keep.wide)
        static_cast<int64_t*>(ids)[i] = id;
      else
        static_cast<int32_t*>(ids)[i] = int32_t(id);
    }
    keep.ids = ids;
    if (!equal) {
      int64_t *const begin = memory.of<int64_t>(keep.lists), *const end = memory.of<int64_t>(keep.lists);
      for (int64_t j = 0; j < keep.lists; ++j) {  // ends may be anything: they are moved inside
        begin[j] = r.from(-2, keep.n_ids);
        end[j] = r.chance(0.1) ? r.from(-2, keep.n_ids + 2) : begin[j] + r.below(30);
      }
      keep.begin = begin;
      keep.end = end;
      int64_t* const list = memory.of<int64_t>(rows.rows);
      for (int64_t i = 0; i < rows.rows; ++i) list[i] = r.from(-1, keep.lists - 1 + (wrong && r.chance(0.1)));
      keep.list = list;
    }
  }
  return keep;
}

Job token_stats_in_sets(Random& r) {
  RowsDraw draw = draw_rows(r, 3, 1);
  const StatsOptions o = draw_options(r, true);
  const Sets keep = draw_sets(r, draw);
  const bool with_full = r.chance(0.5);
  BackwardInSets down = with_base<BackwardInSets>(backward_of(r, draw, o));
  down.keep = keep;
  if (with_full) {
    down.g_full_entropy = upstream(r, draw.memory, draw.rows.rows, draw.rows.dtype);
    down.g_full_logsumexp = upstream(r, draw.memory, draw.rows.rows, draw.rows.dtype);
  }
  const Gradient gradient(r, draw.shape);
  return {"token_stats in sets", std::move(draw.memory), [=, rows = draw.rows, shape = draw.shape](Memory& results, int64_t threads) {
            ForwardInSets up = with_base<ForwardInSets>(with_base<Forward>(rows));
            const AccResults acc{results, up.dtype};
            up.threads = threads;
            results_of(up, o, results);
            up.keep = keep;
            up.target_kept = results.of<bool>(up.rows * up.n_targets);
            up.full_entropy = acc(up.rows, with_full);
            up.full_logsumexp = acc(up.rows, with_full);
            up.full_state = acc(3 * up.rows, with_full);
            if (!made(&token_stats_in_sets_forward, up, results)) return;
            BackwardInSets call = down;
            call.threads = threads;
            call.state = up.state;
            call.full_state = up.full_state;
            gradient.take(results, call, shape);
            token_stats_in_sets_backward(call);
          }};
}

// --- two rows at once, moments, samplers ----------------------------------------------------------------------

Job pair(Random& r) {
  RowsDraw draw = draw_rows(r, 1);
  const Rows& rows = draw.rows;
  Pair call = with_base<Pair>(rows);
  call.other_dtype = beside(r, rows.dtype);
  call.other = matrix(r, draw.memory, draw.shape, call.other_dtype, r.chance(0.3));
  call.other_temperature = 0.3 + r.unit();
  if (rows.temperatures) call.other_temperatures = temperatures(r, draw.memory, rows.rows, rows.dtype);
  call.softcap = r.chance(0.3) ? 4 + 10 * r.unit() : 0;
  call.other_softcap = r.chance(0.3) ? 4 + 10 * r.unit() : 0;
  call.kind = int(r.below(7));
  call.beta = 0.1 + 0.8 * r.unit();
  const bool entropy = r.chance(0.5), logsumexp = r.chance(0.5), other = r.chance(0.5);
  PairBackward down = with_base<PairBackward>(call);
  down.g_divergence = upstream(r, draw.memory, rows.rows, rows.dtype);
  down.g_logp = rows.targets ? upstream(r, draw.memory, rows.rows, rows.dtype) : nullptr;
  down.g_entropy = entropy ? upstream(r, draw.memory, rows.rows, rows.dtype) : nullptr;
  down.g_logsumexp = logsumexp ? upstream(r, draw.memory, rows.rows, rows.dtype) : nullptr;
  const Gradient gradient(r, draw.shape);
  return {"pair", std::move(draw.memory), [=, shape = draw.shape](Memory& results, int64_t threads) {
            PairForward up = with_base<PairForward>(call);
            const AccResults acc{results, up.dtype};
            up.threads = threads;
            up.state = acc(up.rows * PairState::WIDTH);
            up.divergence = acc(up.rows);
            up.logp = acc(up.rows, up.targets);
            up.entropy = acc(up.rows, entropy);
            up.logsumexp = acc(up.rows, logsumexp);
            up.other_logp = acc(up.rows, up.targets && other);
            up.other_entropy = acc(up.rows, other);
            up.other_logsumexp = acc(up.rows, other);
            if (!made(&pair_forward, up, results)) return;
            if (up.kind >= PairKind::JSD) {
              PairMixtureSums sums = with_base<PairMixtureSums>(static_cast<const Pair&>(up));
              sums.sums = acc(2 * up.rows);
              pair_mixture_sums(sums);
            }
            PairBackward back = down;
            back.threads = threads;
            back.state = up.state;
            gradient.take(results, back, shape);
            pair_backward(back);
          }};
}

Job row_moments(Random& r) {
  RowsDraw draw = draw_rows(r, 1, 1);
  draw.rows.temperatures = nullptr;
  MomentsBackward down = with_base<MomentsBackward>(draw.rows);
  down.g_target = upstream(r, draw.memory, draw.rows.rows, draw.rows.dtype);
  down.g_variance = upstream(r, draw.memory, draw.rows.rows, draw.rows.dtype);
  const Gradient gradient(r, draw.shape, false);
  return {"row_moments", std::move(draw.memory), [=, rows = draw.rows, shape = draw.shape](Memory& results, int64_t threads) {
            MomentsForward up = with_base<MomentsForward>(rows);
            const AccResults acc{results, up.dtype};
            up.threads = threads;
            up.state = acc(2 * up.rows);
            up.centred_target = acc(up.rows);
            up.variance = acc(up.rows);
            if (!made(&row_moments_forward, up, results)) return;
            MomentsBackward call = down;
            call.threads = threads;
            call.state = up.state;
            gradient.take(results, call, shape);
            row_moments_backward(call);
          }};
}

Job did_entropy(Random& r) {
  RowsDraw draw = draw_rows(r, 0);
  const Rows& rows = draw.rows;
  DidForward up = with_base<DidForward>(rows);
  up.reference_dtype = beside(r, rows.dtype);
  up.reference = matrix(r, draw.memory, draw.shape, up.reference_dtype, r.chance(0.3));
  DidBackward down = with_base<DidBackward>(rows);
  down.reference_dtype = up.reference_dtype;
  down.reference = up.reference;
  down.g_entropy = upstream(r, draw.memory, rows.rows, rows.dtype, 1);
  const bool of_logits = r.chance(0.8), of_reference = !of_logits || r.chance(0.5);
  const Gradient gradient(r, draw.shape, false);
  const Matrix other = strides(r, draw.shape, rows.vocab);
  return {"did_entropy", std::move(draw.memory), [=, shape = draw.shape](Memory& results, int64_t threads) {
            DidForward forward = up;
            const AccResults acc{results, up.dtype};
            forward.threads = threads;
            forward.state = acc(up.rows * State::TARGETS);
            forward.entropy = acc(up.rows);
            did_entropy_forward(forward);
            DidBackward call = down;
            call.threads = threads;
            call.state = forward.state;
            if (of_logits) gradient.take(results, call, shape);
            if (of_reference) {
              call.reference_out = other;
              call.reference_out.data = results.bytes(extent(other, shape, shape.vocab) * size_of(call.reference_dtype));
            }
            did_entropy_backward(call);
          }};
}

Job sampler_threshold(Random& r) {
  RowsDraw draw = draw_rows(r, 0);
  Sampler call = with_base<Sampler>(draw.rows);
  call.top_k = r.chance(0.6) ? r.from(1, call.vocab) : 0;
  call.top_p = r.chance(0.6) ? r.unit() : 1;
  call.log_min_p = r.chance(0.5) ? -5 * r.unit() : -kInfinity;
  call.joint = r.chance(0.5);
  int bits = 0;
  while (int64_t(1) << bits < call.vocab) ++bits;
  call.mass_bits = std::min(50, 62 - bits);
  return {"sampler_threshold", std::move(draw.memory), [=](Memory& results, int64_t threads) {
            Sampler sampler = call;
            sampler.threads = threads;
            sampler.state = AccResults{results, call.dtype}(call.rows);
            rlkern::sampler_threshold(sampler);
          }};
}

// --- the output matrix at listed ids --------------------------------------------------------------------------

Job kept(Random& r) {
  Memory memory;
  const int dtype = int(r.below(4));
  const bool large = r.chance(0.5);
  const Shape s{large ? r.from(20, 60) : r.from(1, 3), r.from(1, 3), large ? r.from(200, 700) : r.from(1, 70)};  // `vocab` is the width
  const int64_t rows = s.rows(), width = s.vocab, vocab = r.from(1, 50);
  const Matrix hidden = matrix(r, memory, s, dtype, false);
  const Shape of_weight{1, vocab, width};
  Matrix weight = matrix(r, memory, of_weight, dtype, false);
  const void* const bias = r.chance(0.5) ? numbers(r, memory, vocab, dtype) : nullptr;
  // Pairs in the order of rows, and the same in the order of ids. Behind them is room for none.
  int64_t* const offsets = memory.of<int64_t>(rows + 1);
  for (int64_t i = 0; i < rows; ++i) offsets[i + 1] = offsets[i] + r.below(large ? 40 : 4);
  const int64_t used = offsets[rows], pairs = used + r.below(4);
  int32_t *const ids = memory.of<int32_t>(pairs), *const row = memory.of<int32_t>(pairs);
  std::fill_n(row, pairs, int32_t(rows));
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t p = offsets[i]; p < offsets[i + 1]; ++p) {
      row[p] = int32_t(i);
      ids[p] = int32_t(r.chance(0.02) ? vocab : r.below(vocab));
    }
  void* const grad = numbers(r, memory, pairs, acc_of(dtype));
  std::vector<int64_t> order(used);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return ids[a] < ids[b]; });
  int32_t *const sorted_ids = memory.of<int32_t>(used), *const sorted_row = memory.of<int32_t>(used);
  void* const sorted_grad = memory.bytes(used * acc_size(dtype));
  for (int64_t p = 0; p < used; ++p) {
    sorted_ids[p] = ids[order[p]];
    sorted_row[p] = row[order[p]];
    std::memcpy(static_cast<char*>(sorted_grad) + p * acc_size(dtype), static_cast<char*>(grad) + order[p] * acc_size(dtype),
                acc_size(dtype));
  }
  return {"kept", std::move(memory), [=](Memory& results, int64_t threads) {
            KeptLogits logits{};
            static_cast<Kept&>(logits) = {dtype, rows, width, vocab, ids, row, threads};
            logits.hidden = hidden;
            logits.weight = weight;
            logits.inner = s.inner;
            logits.pairs = pairs;
            logits.bias = bias;
            logits.out = AccResults{results, dtype}(pairs);
            kept_logits(logits);
            KeptHidden of_hidden{};
            static_cast<Kept&>(of_hidden) = {dtype, rows, width, vocab, ids, nullptr, threads};
            of_hidden.weight = weight;
            of_hidden.offsets = offsets;
            of_hidden.grad = grad;
            of_hidden.out = results.bytes(rows * width * size_of(dtype));
            kept_hidden_gradient(of_hidden);
            KeptWeight of_weight{};
            static_cast<Kept&>(of_weight) = {dtype, rows, width, vocab, sorted_ids, sorted_row, threads};
            of_weight.hidden = hidden;
            of_weight.inner = s.inner;
            of_weight.pairs = used;
            of_weight.grad = sorted_grad;
            of_weight.out = results.bytes(vocab * width * size_of(dtype));
            kept_weight_gradient(of_weight);
          }};
}

// --- one number a token ---------------------------------------------------------------------------------------

template <class A>
constexpr int kTokenType = sizeof(A) == 8 ? DType::float64 : DType::float32;

template <class A>
Job token_functions(Random& r) {
  Memory memory;
  const int64_t n = r.chance(0.1) ? 1 : r.from(1, 300);
  const auto values = [&](int64_t n) { return static_cast<A*>(numbers(r, memory, n, kTokenType<A>, r.chance(0.3))); };
  const auto flag = [&] { return reinterpret_cast<const Flag*>(flags(r, memory, n, true)); };
  const A *const logp = values(n), *const old = r.chance(0.5) ? values(n) : nullptr, *const advantages = values(n);
  const Flag *const mask = flag(), *const other = flag();
  int64_t* const count = memory.of<int64_t>(1);
  *count = r.from(-1, n + 2);
  const double fraction = r.unit();
  const int64_t minimum = r.below(3), least = r.below(3);
  const int kind = int(r.below(4));
  const bool through = r.chance(0.5), with_unclipped = r.chance(0.5), with_sums = r.chance(0.5);
  const int64_t sequences = r.from(1, 9), of_rows = r.from(1, 3);
  const A *const packed = values(n * of_rows), *const spread = values(sequences);
  int64_t *const ends = memory.of<int64_t>(sequences + 1), *const of_token = memory.of<int64_t>(n);
  for (int64_t i = 0; i <= sequences; ++i) ends[i] = r.from(-2, n + 2);
  if (r.chance(0.8)) std::sort(ends, ends + sequences + 1);
  for (int64_t i = 0; i < n; ++i) of_token[i] = r.from(-2, sequences + 1);
  return {"tokens", std::move(memory), [=](Memory& results, int64_t) {
            double* const sums = results.of<double>(3);
            CovarianceSums<A>{n, logp, advantages, mask, sums}.run();
            TokenCovariance<A>{n, logp, advantages, mask, with_sums ? sums : nullptr, results.of<A>(n)}.run();
            bool* const chosen = results.of<bool>(n);
            SelectBottom<A>{n, logp, mask, count, chosen}.run();
            SelectFraction<A>{n, logp, mask, other, fraction, minimum, least, results.of<bool>(n)}.run();
            SelectedMeans<A>{n, advantages, reinterpret_cast<const Flag*>(chosen), mask, results.of<A>(3)}.run();
            RatioTerms<A>{n,
                          logp,
                          old,
                          advantages,
                          mask,
                          with_unclipped ? other : nullptr,
                          0.8,
                          1.2,
                          3,
                          -20,
                          20,
                          results.of<A>(2 * n),
                          results.of<bool>(n),
                          results.of<A>(Summary::abs_log_ratio + 1)}
                .run();
            KLTerms<A>{n, logp, advantages, mask, kind, through, 10, results.of<A>(2 * n)}.run();
            SequenceSums<A>{n, of_rows, sequences, packed, mask, ends, results.of<double>(of_rows * sequences)}.run();
            SequenceSpread<A>{n, sequences, spread, of_token, with_sums ? mask : nullptr, results.of<A>(n)}.run();
          }};
}

template <class A>
Job kept_rows(Random& r) {
  Memory memory;
  const int64_t n = r.from(0, 9), n_targets = r.from(1, 3);
  const Flag* const counted = reinterpret_cast<const Flag*>(flags(r, memory, n, true));
  int64_t* const offsets = memory.of<int64_t>(n + 1);
  for (int64_t i = 0; i < n; ++i) offsets[i + 1] = offsets[i] + (counted[i] ? r.below(30) : 0);
  const int64_t pairs = offsets[n];
  int32_t *const ids = memory.of<int32_t>(pairs), *const targets = memory.of<int32_t>(n * n_targets);
  for (int64_t p = 0; p < pairs; ++p) ids[p] = int32_t(r.below(20));
  for (int64_t i = 0; i < n * n_targets; ++i) targets[i] = int32_t(r.from(-1, 20));
  const A* const logits = static_cast<A*>(numbers(r, memory, pairs, kTokenType<A>, r.chance(0.5)));
  const A* const of_row = r.chance(0.5) ? static_cast<A*>(temperatures(r, memory, n, kTokenType<A>)) : nullptr;
  const bool entropy = r.chance(0.5), squares = r.chance(0.5);
  const auto g = [&](int64_t n) { return static_cast<A*>(upstream(r, memory, n, kTokenType<A>)); };
  const A *const g_logp = g(n * n_targets), *const g_entropy = g(n), *const g_logsumexp = g(n), *const g_sum_sq = g(n);
  return {"kept rows", std::move(memory), [=](Memory& results, int64_t) {
            A* const state = results.of<A>(n * State::KEPT);
            int32_t* const place = results.of<int32_t>(n * n_targets);
            KeptRowsForward<A>{n,
                               n_targets,
                               logits,
                               ids,
                               offsets,
                               targets,
                               counted,
                               0.7,
                               of_row,
                               results.of<A>(n * n_targets),
                               entropy ? results.of<A>(n) : nullptr,
                               results.of<A>(n),
                               squares ? results.of<A>(n) : nullptr,
                               state,
                               place}
                .run();
            KeptRowsBackward<A>{n,        n_targets,           logits, offsets, place, 0.7, of_row, state, g_logp, g_entropy, g_logsumexp,
                                g_sum_sq, results.of<A>(pairs)}
                .run();
          }};
}

const Draw draws[] = {token_stats,
                      token_stats,
                      token_stats_of_parts,
                      token_stats_in_sets,
                      token_stats_in_sets,
                      pair,
                      pair,
                      row_moments,
                      did_entropy,
                      sampler_threshold,
                      kept,
                      token_functions<float>,
                      token_functions<double>,
                      kept_rows<float>,
                      kept_rows<double>};

Job draw(uint64_t seed, int64_t index) {
  Random r(seed * 1'000'003 + uint64_t(index));
  return draws[r.below(std::size(draws))](r);
}

// --- what is compared -----------------------------------------------------------------------------------------

constexpr int kCallers = 4;

struct Findings {
  int64_t count = 0;
  void add(const Job& job, const char* what, int64_t threads) {
    std::printf("found: %s: other bits %s (%d threads)\n", job.name, what, int(threads));
    ++count;
  }
};

// The calls [begin, end) one after the other, then all of them by several threads at once.
void check(uint64_t seed, int64_t begin, int64_t end, Findings& findings) {
  std::vector<Job> jobs;
  std::vector<Memory> expected;
  for (int64_t index = begin; index < end; ++index) {
    jobs.push_back(draw(seed, index));
    const Job& job = jobs.back();
    std::printf("at %d %s\n", int(index), job.name);
    std::fflush(stdout);
    expected.emplace_back();
    job.run(expected.back(), 1);
    for (const int64_t threads : {1, 2, 3, 7}) {
      Memory results;
      job.run(results, threads);
      if (!(results == expected.back())) findings.add(job, "alone", threads);
    }
  }
  std::printf("at %d to %d at once\n", int(begin), int(end - 1));
  std::fflush(stdout);
  std::vector<Findings> of_caller(kCallers);
  std::vector<std::thread> callers;
  for (int caller = 0; caller < kCallers; ++caller)
    callers.emplace_back([&, caller] {
      for (size_t i = 0; i < jobs.size(); ++i) {
        const size_t j = (i + caller) % jobs.size();
        Memory results;
        jobs[j].run(results, 1 + caller % 3);
        if (!(results == expected[j])) of_caller[caller].add(jobs[j], "beside other calls", 1 + caller % 3);
      }
    });
  for (std::thread& caller : callers) caller.join();
  for (const Findings& own : of_caller) findings.count += own.count;
}

// Another thread changes the instruction set while calls run. Each must take its kernels from one of them; a
// forward and its backward may have different ones, so no bits are compared.
void switch_while_running(uint64_t seed) {
  const auto names = available_isas();
  const std::string before = active_isa();
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 2; ++caller)
    callers.emplace_back([=] {
      for (int64_t index = 0; index < 20; ++index) {
        Memory results;
        draw(seed, index).run(results, 2);
      }
    });
  for (int i = 0; i < 400; ++i) use_isa(names[i % names.size()]);
  for (std::thread& caller : callers) caller.join();
  use_isa(before);
}

// --- what the sanitizers must catch ---------------------------------------------------------------------------

// A call that only writes `out`, and that in whole vectors: memory that the caller may have got wrong.
MomentsBackward planted(Memory& memory, int64_t vocab, int64_t out) {
  MomentsBackward call{};
  call.dtype = DType::float32;
  call.rows = call.inner = 1;
  call.vocab = vocab;
  call.logits = {memory.of<float>(vocab), vocab, vocab};
  call.out = {memory.of<float>(out), vocab, vocab};
  call.targets = memory.of<int64_t>(1);
  call.n_targets = 1;
  call.ignore_index = kIgnored;
  call.state = memory.of<float>(2);
  float* const g = memory.of<float>(1);
  *g = 1;
  call.g_variance = g;
  call.threads = 1;
  return call;
}

int plant(const std::string& what) {
  Memory memory;
  if (what == "overrun") {  // a gradient with room for one number fewer than the call says
    row_moments_backward(planted(memory, 128, 127));
  } else if (what == "overflow") {  // in the schedule: 8 * width
    KeptHidden call{};
    call.rows = 1;
    call.width = int64_t(1) << 61;
    call.threads = 2;
    kept_hidden_gradient(call);
  } else if (what == "race") {  // two callers share their results
    const MomentsBackward call = planted(memory, 128, 128);
    std::thread one([&] { row_moments_backward(call); }), other([&] { row_moments_backward(call); });
    one.join();
    other.join();
  } else if (what == "race-openmp") {  // a shared sum; static: every thread has its part
    double* const sum = memory.of<double>(1);
#pragma omp parallel for num_threads(4) schedule(static)
    for (int i = 0; i < 1000; ++i) *sum += i;
  } else {
    std::fprintf(stderr, "--plant %s: expected overrun, overflow, race or race-openmp\n", what.c_str());
    return 2;
  }
  std::puts("planted, and nobody noticed");
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  int64_t calls = 100, seed = 0, only = -1;
  std::string isa, planted_error;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string option = argv[i], value = argv[i + 1];
    if (option == "--calls")
      calls = std::stoll(value);
    else if (option == "--seed")
      seed = std::stoll(value);
    else if (option == "--only")
      only = std::stoll(value);
    else if (option == "--isa")
      isa = value;
    else if (option == "--plant")
      planted_error = value;
    else {
      std::fprintf(stderr, "unknown option %s, expected --calls, --seed, --only, --isa or --plant\n", argv[i]);
      return 2;
    }
  }
  use_isa(isa);
  if (!planted_error.empty()) return plant(planted_error);
  Findings findings;
  const std::vector<std::string> names = isa.empty() ? available_isas() : std::vector<std::string>{isa};
  for (const auto& name : names) {
    use_isa(name);
    constexpr int64_t together = 10;
    const int64_t first = only < 0 ? 0 : only, last = only < 0 ? calls : only + 1;
    for (int64_t begin = first; begin < last; begin += together) check(seed, begin, std::min(begin + together, last), findings);
    std::printf("%s: %d calls\n", name.c_str(), int(last - first));
  }
  if (only < 0) switch_while_running(seed);
  std::printf("%d findings\n", int(findings.count));
  return findings.count ? 1 : 0;
}
