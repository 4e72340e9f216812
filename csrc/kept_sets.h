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

template <class T>
struct SetRow {
  using Tile = T;
  const T* x;
  int64_t vocab;
  int kind;                    // BITS, MASK or AT_LEAST
  const unsigned char* bytes;  // of BITS and MASK
  Acc<T> least;                // of AT_LEAST
  int64_t included;            // an id beside them, or -1

  struct Bits {  // of a tile
    uint64_t words[kTile / 64];
    uint64_t of_pack(int64_t i) const { return words[i / 64] >> i % 64; }
  };

  int64_t size() const { return vocab; }
  bool lists(int64_t id) const {  // without the one beside them
    if (kind == SetKind::BITS) return bytes[id / 8] >> id % 8 & 1;
    return kind == SetKind::MASK ? bytes[id] != 0 : load_one(x + id) >= least;
  }
  Acc<T> at(int64_t id) const { return id == included || lists(id) ? load_one(x + id) : Acc<T>(-kInfinity); }

  template <class F>
  void for_each_tile(F f) const {
    for (int64_t start = 0; start < vocab; start += kTile) {
      const int64_t n = std::min(kTile, vocab - start);
      T tile[kTile];
      Bits bits;
      if (find(start, n, bits)) {
        f(static_cast<const T*>(tile), fill(start, n, bits, tile));
      } else {
        for (int64_t i = 0; i < kLanes<T>; ++i) tile[i] = Element<T>::minus_infinity();
        f(static_cast<const T*>(tile), int64_t(kLanes<T>));
      }
    }
  }

  // The ids of a tile. Returns whether there are any.
  bool find(int64_t start, int64_t n, Bits& bits) const {
    const int64_t words = (n + 63) / 64;
    if (kind == SetKind::BITS) {
      const int64_t size = (n + 7) / 8;
      bits.words[words - 1] = 0;
      std::memcpy(bits.words, bytes + start / 8, size);
    } else if (kind == SetKind::MASK) {
      for_each_part<64>(bytes + start, n, [&](const unsigned char* part, int64_t i) { bits.words[i / 64] = bits_of_nonzero(part); });
    } else {
      std::memset(bits.words, 0, words * sizeof(uint64_t));
      for_each_part<kLanes<T>>(x + start, n,
                               [&](const T* pack, int64_t i) { bits.words[i / 64] |= bits_of(load_in_order(pack) >= least) << i % 64; });
    }
    if (n % 64 != 0) bits.words[words - 1] &= (uint64_t(1) << n % 64) - 1;
    if (included >= start && included < start + n) bits.words[(included - start) / 64] |= uint64_t(1) << (included - start) % 64;
    uint64_t any = 0;
    for (int64_t i = 0; i < words; ++i) any |= bits.words[i];
    return any != 0;
  }

  // The tile's logits, padded. Returns their number.
  int64_t fill(int64_t start, int64_t n, const Bits& bits, T* tile) const {
    using U = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
    const U dropped = bit_cast<U>(Element<T>::minus_infinity());
    return for_each_part<kLanes<T>>(x + start, n, [&](const T* pack, int64_t i) {
      prefetch_next_tile(x + start + i);
      constexpr int64_t lanes = kVectorBytes / sizeof(T);
      const uint64_t kept = bits.of_pack(i);
      for (int64_t j = 0; j < kLanes<T>; j += lanes)
        store_raw<false>(tile + i + j, select_bits(kept >> j, load_raw<Vec<U>>(pack + j), dropped));
    });
  }
};

template <class T, class F, class G>
void write_row(const SetRow<T>& row, bool stream, bool undefined, T* out, F f, G full) {
  constexpr bool with_full = !std::is_same_v<G, NotFull>;
  const auto inside = [&](auto x) { return select(x == Acc<T>(-kInfinity), AccPack<T>{}, f(x)); };
  for (int64_t start = 0; start < row.vocab; start += kTile) {
    const int64_t n = std::min(kTile, row.vocab - start);
    T tile[kTile];
    typename SetRow<T>::Bits bits;
    const bool any = row.find(start, n, bits);
    if (any) row.fill(start, n, bits, tile);
    if (any && undefined)  // NaN, also at an id at -inf
      for (int64_t i = 0; i < n; ++i)
        if (bits.of_pack(i) & 1) store_one(tile + i, kNaN);
    if constexpr (with_full) {
      T sum[kTile];
      for_each_part<kLanes<T>>(row.x + start, n, [&](const T* x, int64_t i) {
        const AccPack<T> g = full(load(x));
        store(sum + i, any ? inside(load(tile + i)) + g : g);
      });
      write_gradient(stream, sum, out + start, n, [](auto g) { return g; });
    } else if (any) {
      write_gradient(stream, tile, out + start, n, inside);
    } else {
      write_zeros(stream, out + start, n);
    }
  }
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
        places[k] = ignored ? kIgnored : valid ? place : kInvalid;
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
      return list_.count == 0 && keep_.open_empty ? Over::everything : Over::list;
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
