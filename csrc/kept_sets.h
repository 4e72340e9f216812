// Rows of logits of which only a set of ids counts.
//
// Of a set of bits, bools or a threshold, a tile has -inf in place of what is dropped. A tile without a kept id
// is not read. Listed ids are gathered: their logits are a short row of its own, which the same code reads.
#pragma once

#include "token_row.h"

namespace {

// Calls f(part, i) with every part of Size entries, the last one filled up with zeros. Returns where it ends.
template <int64_t Size, class T, class F>
inline int64_t for_each_part(const T* x, int64_t n, F f) {
  int64_t i = 0;
#pragma GCC unroll 4
  for (; i + Size <= n; i += Size) f(x + i, i);
  if (i == n) return n;
  T last[Size] = {};
  std::memcpy(last, x + i, (n - i) * sizeof(T));
  f(static_cast<const T*>(last), i);
  return i + Size;
}

template <class T>
void write_zeros(bool stream, T* out, int64_t n) {
  if (stream)
    write_gradient<true>(out, out, n, [](auto) { return AccPack<T>{}; });  // reads nothing
  else
    std::memset(out, 0, n * sizeof(T));
}

// --- bits, bools and thresholds -------------------------------------------------------------------------------

// One pack, at -inf where its bits are not set.
template <class T>
RLKERN_INLINE void keep_bits(uint64_t bits, const T* from, T* to) {
  using U = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
  constexpr int64_t lanes = kVectorBytes / sizeof(T);
  const U dropped = bit_cast<U>(Element<T>::minus_infinity());
  for (int64_t i = 0; i < kLanes<T>; i += lanes) store_raw<false>(to + i, select_bits(bits >> i, load_raw<Vec<U>>(from + i), dropped));
}

template <class T>
struct SetRow {
  using Tile = T;
  const T* x;
  int64_t vocab;
  int kind;                    // BITS, MASK or AT_LEAST
  const unsigned char* bytes;  // of BITS and MASK
  Acc<T> least;                // of AT_LEAST
  int64_t included;            // an id beside them, or -1

  struct Bits {                  // of a tile
    const unsigned char* bytes;  // the row's own, or these:
    uint64_t words[kTile / 64];

    uint64_t of_pack(int64_t i) const {
      using Word = std::conditional_t<kLanes<T> == 32, uint32_t, std::conditional_t<kLanes<T> == 16, uint16_t, unsigned char>>;
      const auto word = load_raw<Word>(bytes + i / 8);
      return kLanes<T> < 8 ? word >> i % 8 : word;
    }
    bool has(int64_t i) const { return bytes[i / 8] >> i % 8 & 1; }
  };

  int64_t size() const { return vocab; }
  bool lists(int64_t id) const {  // without the one beside them
    if (kind == SetKind::BITS) return bytes[id / 8] >> id % 8 & 1;
    return kind == SetKind::MASK ? bytes[id] != 0 : load_one(x + id) >= least;
  }
  Acc<T> at(int64_t id) const { return id == included || lists(id) ? load_one(x + id) : Acc<T>(-kInfinity); }

  // Tiles without a kept id are left out.
  template <class F>
  void for_each_tile(F f) const {
    for_each_kept([&](int64_t start, int64_t n, const Bits& bits, uintptr_t next) {
      T tile[kTile];
      const int64_t whole = fill(start, n, bits, tile);
      f(static_cast<const T*>(tile), whole, Place{start, next});
    });
  }

  // Calls f(start, count, bits, address of the next one) for tiles with a kept id.
  template <class F>
  void for_each_kept(F f) const {
    Bits both[2];
    int64_t start = find_from(0, both[0]);
    for (int at = 0; start < vocab; at = 1 - at) {
      const int64_t next = find_from(start + kTile, both[1 - at]);
      // A threshold's next tile is read already.
      const int64_t ahead = std::min(kind == SetKind::AT_LEAST ? next + kTile : next, vocab);
      f(start, std::min(kTile, vocab - start), both[at], reinterpret_cast<uintptr_t>(x + ahead));
      start = next;
    }
  }
  int64_t find_from(int64_t start, Bits& bits) const {
    while (start < vocab && !find(start, std::min(kTile, vocab - start), bits)) start += kTile;
    return start;
  }

  // The ids of a tile. Returns whether there are any.
  bool find(int64_t start, int64_t n, Bits& bits) const {
    if (kind == SetKind::BITS && n == kTile && !(included >= start && included < start + n)) {
      bits.bytes = bytes + start / 8;
      using V = Vec<uint64_t>;
      V any{};
      for (int64_t i = 0; i < kTile / 8; i += sizeof any) any |= load_raw<V>(bits.bytes + i);
      return fold<uint64_t, kVectorBytes>(any, [](auto a, auto b) { return a | b; }) != 0;
    }
    bits.bytes = reinterpret_cast<const unsigned char*>(bits.words);
    uint64_t any = 0;
    for_each_word(start, n, [&](int64_t i, uint64_t word) {
      if (n - i < 64) word &= (uint64_t(1) << (n - i)) - 1;
      const int64_t at = included - start - i;
      if (included >= 0 && at >= 0 && at < 64) word |= uint64_t(1) << at;
      any |= word;
      bits.words[i / 64] = word;
    });
    return any != 0;
  }

  // Calls f(i, bits) for each 64 ids of a tile. Beyond its end they mean nothing.
  template <class F>
  void for_each_word(int64_t start, int64_t n, F f) const {
    if (kind == SetKind::BITS)
      for_each_part<8>(bytes + start / 8, (n + 7) / 8, [&](const unsigned char* part, int64_t i) { f(8 * i, load_raw<uint64_t>(part)); });
    else if (kind == SetKind::MASK)
      for_each_part<64>(bytes + start, n, [&](const unsigned char* part, int64_t i) { f(i, bits_of_nonzero(part)); });
    else
      for_each_part<64>(x + start, n, [&](const T* part, int64_t i) {
        uint64_t word = 0;
        for (int64_t j = 0; j < 64; j += kLanes<T>) word |= bits_at_least(load_in_order(part + j), least) << j;
        f(i, word);
      });
  }

  // The tile's logits, padded. Returns their number.
  int64_t fill(int64_t start, int64_t n, const Bits& bits, T* tile) const {
    return for_each_part<kLanes<T>>(x + start, n, [&](const T* pack, int64_t i) { keep_bits(bits.of_pack(i), pack, tile + i); });
  }
};

// Where no id is kept.
template <class T>
void write_dropped(const T*, bool stream, T* out, int64_t n, NotFull) {
  write_zeros(stream, out, n);
}
template <class T, class G>
void write_dropped(const T* x, bool stream, T* out, int64_t n, G full) {
  write_gradient(stream, x, out, n, full);
}

// Careful: the gradient of what is dropped is set to 0, where 0 times a number of the row would not be.
template <class T, class F, class G>
void write_row(const SetRow<T>& row, bool stream, bool careful, T* out, F f, G full) {
  constexpr bool with_full = !std::is_same_v<G, NotFull>;
  int64_t done = 0;
  row.for_each_kept([&](int64_t start, int64_t n, const typename SetRow<T>::Bits& bits, uintptr_t next) {
    if (done < start) write_dropped(row.x + done, stream, out + done, start - done, full);
    done = start + n;
    T tile[kTile];
    row.fill(start, n, bits, tile);
    if (!with_full && !careful)
      return write_gradient(stream, tile, out + start, n, [&](auto x) {
        prefetch_pack<T>(next);
        next += kLanes<T> * sizeof(T);
        return f(x);
      });
    const T zeros[kLanes<T>] = {};
    T sum[kTile];
    for_each_part<kLanes<T>>(row.x + start, n, [&](const T* x, int64_t i) {
      prefetch_pack<T>(next + i * sizeof(T));
      AccPack<T> g = f(load(tile + i));
      if (careful) {
        T marks[kLanes<T>];
        keep_bits(bits.of_pack(i), zeros, marks);
        g = select(load(marks) == Acc<T>(0), g, AccPack<T>{});
      }
      if constexpr (with_full) g = g + full(load(x));
      store(sum + i, g);
    });
    write_gradient(stream, sum, out + start, n, [](auto g) { return g; });
  });
  if (done < row.vocab) write_dropped(row.x + done, stream, out + done, row.vocab - done, full);
}

// --- lists ----------------------------------------------------------------------------------------------------

// Memory that grows. std::vector<float> would be shared with files for other instruction sets.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  ~Buffer() { delete[] data_; }
  T* room(int64_t n) {  // for n entries; the old ones are lost
    if (n > size_) {
      delete[] data_;
      data_ = new T[size_ = 2 * n];
    }
    return data_;
  }
  T* get() const { return data_; }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

// A row's list: ids that are none are left out.
class RowList {
 public:
  int64_t count = 0;
  const int64_t* ids() const { return ids_.get(); }

  void take(const Sets& keep, int64_t row, int64_t vocab) {
    const List list = list_of(keep, row);
    int64_t* ids = ids_.room(list.end - list.begin + 1);
    count = 0;
    const auto take_from = [&](auto* from) {
      for (int64_t i = list.begin; i < list.end; ++i) {
        ids[count] = from[i];
        count += uint64_t(from[i]) < uint64_t(vocab);
      }
    };
    keep.wide ? take_from(static_cast<const int64_t*>(keep.ids)) : take_from(static_cast<const int32_t*>(keep.ids));
  }
  void include(int64_t id) { ids_.get()[count++] = id; }  // there is room for one

  // Where an id is, `count` if it is nowhere. Targets often come in the list's order: looks from `first` on.
  int64_t place(int64_t id, int64_t first) const {
    for (int64_t i = first; i < count; ++i)
      if (ids()[i] == id) return i;
    for (int64_t i = 0; i < first; ++i)
      if (ids()[i] == id) return i;
    return count;
  }

 private:
  Buffer<int64_t> ids_;
};

// --- both -----------------------------------------------------------------------------------------------------

enum class Over { everything, list, set };

// What the softmax of a row is over, one row at a time. Its buffers are a thread's.
template <class T>
class KeptRow {
 public:
  KeptRow(const Rows& call, const Sets& keep) : call_(call), keep_(keep) { set_.kind = keep.kind; }

  // Finds the row's. Marks which targets its set has, before `outside`, unless target_kept is null.
  Over find(int64_t row, bool* target_kept) {
    x_ = row_of<T>(call_, call_.logits, row);
    Over over = take(row);
    const RowTargets y = targets_of(call_, row);
    int64_t *places = places_.room(y.n), place = 0;
    bool all = true;
    for (int64_t k = 0; k < y.n; ++k) {
      const bool ignored = y.ids[k] == y.ignored, valid = y.ids[k] >= 0 && y.ids[k] < call_.vocab;
      bool kept = ignored || over == Over::everything;
      if (over == Over::list) {
        if (valid) place = list_.place(y.ids[k], place < list_.count ? place : 0);
        places[k] = ignored ? kIgnored : valid ? place : y.ids[k] == ELSEWHERE ? ELSEWHERE : kInvalid;
        kept |= valid && place < list_.count;
        ++place;
      } else if (over == Over::set) {
        kept |= valid && set_.lists(y.ids[k]);
      }
      if (target_kept) target_kept[row * y.n + k] = kept;
      all &= kept || !valid;
    }
    if (all) return over;
    if (keep_.outside == Outside::EVERYTHING) return Over::everything;
    if (keep_.outside == Outside::INCLUDE) include(y.ids[0]);
    return over;
  }

  PlainRow<T> plain() const { return {x_, call_.vocab}; }
  const SetRow<T>& set() const { return set_; }
  const RowList& list() const { return list_; }
  // The listed logits as a row, at least one -inf behind them: targets that are not listed are there.
  PlainRow<T> gathered() {
    const int64_t n = (list_.count + kLanes<T>) / kLanes<T> * kLanes<T>;
    T* logits = logits_.room(n);
    for (int64_t i = 0; i < list_.count; ++i) logits[i] = x_[list_.ids()[i]];
    for (int64_t i = list_.count; i < n; ++i) logits[i] = Element<T>::minus_infinity();
    return {logits, n};
  }
  RowTargets targets(int64_t n) const { return {places_.get(), n, kIgnored}; }

  // Asks for a later row's listed logits: they are far apart.
  void prefetch(int64_t row) const {
    if (keep_.kind != SetKind::LISTS || row >= call_.rows || is_skipped(call_, row)) return;
    constexpr int64_t most = 64;
    const T* x = row_of<T>(call_, call_.logits, row);
    const List list = list_of(keep_, row);
    for (int64_t i = list.begin; i < std::min(list.end, list.begin + most); ++i) {
      const int64_t id = keep_.wide ? static_cast<const int64_t*>(keep_.ids)[i] : static_cast<const int32_t*>(keep_.ids)[i];
      if (uint64_t(id) < uint64_t(call_.vocab)) __builtin_prefetch(x + id);
    }
  }

 private:
  static constexpr int64_t kIgnored = -1, kInvalid = -2;

  Over take(int64_t row) {
    if (keep_.kind == SetKind::LISTS) {
      list_.take(keep_, row, call_.vocab);
      const bool none = keep_.list && keep_.list[row] < 0;
      return none || (list_.count == 0 && keep_.open_empty) ? Over::everything : Over::list;
    }
    set_.x = x_;
    set_.vocab = call_.vocab;
    set_.included = -1;
    if (keep_.kind == SetKind::AT_LEAST) {
      set_.least = static_cast<const Acc<T>*>(keep_.least)[row];
      return std::isnan(set_.least) ? Over::everything : Over::set;
    }
    set_.bytes = row_of<unsigned char>(call_, keep_.entries, row);
    return Over::set;
  }
  void include(int64_t id) {
    if (keep_.kind == SetKind::LISTS)
      list_.include(id);  // at its target's place, the end
    else
      set_.included = id;
  }

  const Rows& call_;
  const Sets& keep_;
  const T* x_ = nullptr;
  SetRow<T> set_{};
  RowList list_;
  Buffer<T> logits_;
  Buffer<int64_t> places_;
};

}  // namespace
