// Vectors by the compilers' vector extension. The arithmetic is written once, for every instruction set.
// A vector is as wide as the registers of the instruction set that the including file is compiled for.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

// For what runs for every entry of a row. A compiler would make calls of some of it, each with its own loads.
#define RLKERN_INLINE [[gnu::always_inline]] inline

// Unnamed, so that the copies compiled for different instruction sets never merge at link time.
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T, int Bytes = kVectorBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(Bytes)));
};
template <class T, int Bytes = kVectorBytes>
using Vec = typename VectorOf<T, Bytes>::type;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class V>
inline V load_raw(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// Streamed, a vector goes to memory past the caches. It must be aligned to its size, and not be read soon.
template <bool Stream, class V>
inline void store_raw(void* to, const V& v) {
#if defined(__SSE2__)
  if constexpr (Stream && sizeof v == 16) return _mm_stream_si128(static_cast<__m128i*>(to), bit_cast<__m128i>(v));
#endif
#if defined(__AVX2__)
  if constexpr (Stream && sizeof v == 32) return _mm256_stream_si256(static_cast<__m256i*>(to), bit_cast<__m256i>(v));
#endif
#if defined(__AVX512F__)
  if constexpr (Stream && sizeof v == 64) return _mm512_stream_si512(static_cast<__m512i*>(to), bit_cast<__m512i>(v));
#endif
  std::memcpy(to, &v, sizeof v);
}
// Nothing orders streamed stores. Call this before other threads may read them.
inline void finish_stream() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// --- what a logit's type means: the type it is computed in, and conversions of one vector ------------------

template <class T>
struct Element;

template <class T>
struct Native {  // float and double are stored as they are computed with
  using Acc = T;
  static T minus_infinity() { return -__builtin_inf(); }
  static Vec<T> load(const T* from) { return load_raw<Vec<T>>(from); }
  template <bool Stream>
  static void store(T* to, Vec<T> v) {
    store_raw<Stream>(to, v);
  }
};
template <>
struct Element<float> : Native<float> {};
template <>
struct Element<double> : Native<double> {};

using Words = Vec<uint32_t>;  // the bits of a vector of floats
using Halves = Vec<uint16_t, kVectorBytes / 2>;

// To nearest even, in the high half of each word. A NaN stays one: those that come here have payloads of a
// bfloat16 or of the hardware.
inline Words bfloat16_in_high_half(Vec<float> v) {
  const Words w = bit_cast<Words>(v);
  return w + 0x7fff + ((w >> 16) & 1);
}

template <>
struct Element<BFloat16> {  // where order does not matter, in pairs of vectors, below
  using Acc = float;
  static BFloat16 minus_infinity() { return {0xff80}; }
  static Vec<float> load(const BFloat16* from) {
    return bit_cast<Vec<float>>(__builtin_convertvector(load_raw<Halves>(from), Words) << 16);
  }
  template <bool Stream>
  static void store(BFloat16* to, Vec<float> v) {
#if defined(__AVX512BF16__)
    store_raw<Stream>(to, bit_cast<__m256i>(_mm512_cvtneps_pbh(bit_cast<__m512>(v))));  // takes subnormal numbers for 0
#else
    store_raw<Stream>(to, __builtin_convertvector(bfloat16_in_high_half(v) >> 16, Halves));
#endif
  }
};

template <>
struct Element<Float16> {
  using Acc = float;
  static Float16 minus_infinity() { return {0xfc00}; }
#if defined(__AVX512F__)
  static Vec<float> load(const Float16* from) { return bit_cast<Vec<float>>(_mm512_cvtph_ps(load_raw<__m256i>(from))); }
  template <bool Stream>
  static void store(Float16* to, Vec<float> v) {
    store_raw<Stream>(to, _mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#elif defined(__F16C__)
  static Vec<float> load(const Float16* from) { return bit_cast<Vec<float>>(_mm256_cvtph_ps(load_raw<__m128i>(from))); }
  template <bool Stream>
  static void store(Float16* to, Vec<float> v) {
    store_raw<Stream>(to, _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#else
  static Vec<float> load(const Float16* from) {
    const Words h = __builtin_convertvector(load_raw<Halves>(from), Words);
    // A product moves the exponent from bias 15 to bias 127. It also normalises subnormals of half precision.
    const Words magnitude = bit_cast<Words>(bit_cast<Vec<float>>((h & 0x7fff) << 13) * 0x1p112f);
    const Words not_finite = (h & 0x7c00) == 0x7c00 ? Words{} + 0x7f800000u : Words{};
    return bit_cast<Vec<float>>(magnitude | not_finite | (h & 0x8000) << 16);
  }
  template <bool Stream>
  static void store(Float16* to, Vec<float> v) {
    const Words w = bit_cast<Words>(v), magnitude = w & 0x7fffffff;
    const Words normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // Adding 0.5 leaves multiples of 2^-24, the subnormals' unit, in the low bits, rounded to even.
    const Words subnormal = bit_cast<Words>(bit_cast<Vec<float>>(magnitude) + 0.5f) - 0x3f000000;
    const Words large = magnitude > 0x7f800000 ? Words{} + 0x7e00u : Words{} + 0x7c00u;
    Words h = magnitude < 0x38800000 ? subnormal : normal;
    h = magnitude >= 0x47800000 ? large : h;
    store_raw<Stream>(to, __builtin_convertvector(h | (w >> 16 & 0x8000), Halves));
  }
#endif
};

// --- packs: several vectors side by side -------------------------------------------------------------------

// One vector at a time would leave the processor waiting on the exponential's chain of products.
constexpr int kPackVectors = 2;
using PackIndices = std::make_integer_sequence<int, kPackVectors>;

template <class T>
struct Pack {
  static constexpr int lanes = kPackVectors * kVectorBytes / sizeof(T);
  Vec<T> v[kPackVectors];
};
template <class T>
using Bits = Vec<std::conditional_t<sizeof(T) == 4, int32_t, int64_t>>;
template <class T>
struct Mask {
  Bits<T> v[kPackVectors];
};

template <class P, class F, int... I>
inline P each(F f, std::integer_sequence<int, I...>) {
  return {{f(I)...}};
}
template <class P, class F>
inline P each(F f) {
  return each<P>(f, PackIndices{});
}

template <class T>
inline Pack<T> broadcast(T x) {
  return each<Pack<T>>([&](int) { return x - Vec<T>{}; });
}

#define RLKERN_PACK_OPERATOR(op)                                   \
  template <class T>                                               \
  inline Pack<T> operator op(const Pack<T>& a, const Pack<T>& b) { \
    return each<Pack<T>>([&](int i) { return a.v[i] op b.v[i]; }); \
  }                                                                \
  template <class T>                                               \
  inline Pack<T> operator op(const Pack<T>& a, T b) {              \
    return each<Pack<T>>([&](int i) { return a.v[i] op b; });      \
  }
RLKERN_PACK_OPERATOR(+)
RLKERN_PACK_OPERATOR(-)
RLKERN_PACK_OPERATOR(*)
RLKERN_PACK_OPERATOR(/)
#undef RLKERN_PACK_OPERATOR

template <class T>
inline Mask<T> operator+(const Mask<T>& a, const Mask<T>& b) {
  return each<Mask<T>>([&](int i) { return a.v[i] + b.v[i]; });
}
template <class T>
inline Mask<T> operator==(const Pack<T>& a, T b) {
  return each<Mask<T>>([&](int i) { return a.v[i] == b; });
}
template <class T>
inline Mask<T> operator>=(const Pack<T>& a, T b) {
  return each<Mask<T>>([&](int i) { return a.v[i] >= b; });
}
template <class T>
inline Mask<T> operator>(const Pack<T>& a, T b) {
  return each<Mask<T>>([&](int i) { return a.v[i] > b; });
}
template <class T>
RLKERN_INLINE Pack<T> magnitude(const Pack<T>& a) {
  using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  constexpr Lane all_but_sign = Lane(~(std::make_unsigned_t<Lane>(1) << (8 * sizeof(T) - 1)));
  return each<Pack<T>>([&](int i) { return bit_cast<Vec<T>>(bit_cast<Bits<T>>(a.v[i]) & all_but_sign); });
}
template <class T>
inline bool any(const Mask<T>& mask) {
  Bits<T> all = mask.v[0];
  for (int i = 1; i < kPackVectors; ++i) all |= mask.v[i];
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(bit_cast<__m512i>(all), bit_cast<__m512i>(all)) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8(bit_cast<__m256i>(all)) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_epi8(bit_cast<__m128i>(all)) != 0;
#else
  for (size_t i = 0; i < sizeof all / sizeof all[0]; ++i)
    if (all[i]) return true;
  return false;
#endif
}
template <class T>
RLKERN_INLINE bool any_above(const Pack<T>& a, T b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {  // compilers would make vectors of the masks
    __mmask16 above = 0;
    for (int i = 0; i < kPackVectors; ++i) above |= _mm512_cmp_ps_mask(bit_cast<__m512>(a.v[i]), _mm512_set1_ps(b), _CMP_GT_OQ);
    return above != 0;
  }
#endif
  return any(a > b);
}
template <class T>
RLKERN_INLINE Pack<T> select(const Mask<T>& mask, const Pack<T>& a, const Pack<T>& b) {
  return each<Pack<T>>([&](int i) { return mask.v[i] ? a.v[i] : b.v[i]; });
}

// --- bits: one for each lane of a pack, or for each of 64 bytes; the first is the lowest ------------------------

template <class T>
RLKERN_INLINE uint64_t bits_at_least(const Pack<T>& a, T least) {
  uint64_t bits = 0;
  constexpr int lanes = kVectorBytes / sizeof(T);
  for (int i = 0; i < kPackVectors; ++i) {
#if defined(__AVX512F__)  // compilers would make vectors of the masks
    if constexpr (sizeof(T) == 4)
      bits |= uint64_t(_mm512_cmp_ps_mask(bit_cast<__m512>(a.v[i]), _mm512_set1_ps(least), _CMP_GE_OQ)) << (i * lanes);
    else
      bits |= uint64_t(_mm512_cmp_pd_mask(bit_cast<__m512d>(a.v[i]), _mm512_set1_pd(least), _CMP_GE_OQ)) << (i * lanes);
#elif defined(__AVX2__)
    const auto is = a.v[i] >= least;
    bits |= uint64_t(sizeof(T) == 4 ? _mm256_movemask_ps(bit_cast<__m256>(is)) : _mm256_movemask_pd(bit_cast<__m256d>(is))) << (i * lanes);
#elif defined(__SSE2__)
    const auto is = a.v[i] >= least;
    bits |= uint64_t(sizeof(T) == 4 ? _mm_movemask_ps(bit_cast<__m128>(is)) : _mm_movemask_pd(bit_cast<__m128d>(is))) << (i * lanes);
#else
    for (int j = 0; j < lanes; ++j) bits |= uint64_t(a.v[i][j] >= least) << (i * lanes + j);
#endif
  }
  return bits;
}

inline uint64_t bits_of_nonzero(const unsigned char* bytes) {
  using V = Vec<unsigned char>;
  uint64_t bits = 0;
  for (int i = 0; i < 64; i += kVectorBytes) {
    const auto zero = load_raw<V>(bytes + i) == 0;
#if defined(__AVX512BW__)
    bits = _mm512_movepi8_mask(bit_cast<__m512i>(zero));
#elif defined(__AVX2__)
    bits |= uint64_t(uint32_t(_mm256_movemask_epi8(bit_cast<__m256i>(zero)))) << i;
#elif defined(__SSE2__)
    bits |= uint64_t(uint32_t(_mm_movemask_epi8(bit_cast<__m128i>(zero)))) << i;
#else
    for (int j = 0; j < kVectorBytes; ++j) bits |= uint64_t(zero[j] != 0) << (i + j);
#endif
  }
  return ~bits;
}

// A vector's lanes where their bits are set, and `other` in place of the rest. As numbers: of any size.
template <class U>
RLKERN_INLINE Vec<U> select_bits(uint64_t bits, const Vec<U>& v, U other) {
  constexpr int lanes = kVectorBytes / sizeof(U);
#if defined(__AVX512BW__)
  if constexpr (sizeof(U) == 2)
    return bit_cast<Vec<U>>(_mm512_mask_mov_epi16(_mm512_set1_epi16(int16_t(other)), __mmask32(bits), bit_cast<__m512i>(v)));
  if constexpr (sizeof(U) == 4)
    return bit_cast<Vec<U>>(_mm512_mask_mov_epi32(_mm512_set1_epi32(int32_t(other)), __mmask16(bits), bit_cast<__m512i>(v)));
  if constexpr (sizeof(U) == 8)
    return bit_cast<Vec<U>>(_mm512_mask_mov_epi64(_mm512_set1_epi64(int64_t(other)), __mmask8(bits), bit_cast<__m512i>(v)));
#endif
  static_assert(lanes <= 8 * int(sizeof(U)) || kVectorBytes == 64, "a lane has room for all bits");
  Vec<U> bit_of_lane;
  for (int j = 0; j < lanes; ++j) bit_of_lane[j] = U(U(1) << (j % (8 * sizeof(U))));
  return ((Vec<U>{} + U(bits)) & bit_of_lane) != 0 ? v : Vec<U>{} + other;
}

// The larger or the smaller of the two, and `b` where either is NaN, as the hardware's own instructions have it.
inline Vec<float> max_or_second(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return bit_cast<Vec<float>>(_mm512_max_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
#elif defined(__AVX2__)
  return bit_cast<Vec<float>>(_mm256_max_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
#elif defined(__SSE2__)
  return bit_cast<Vec<float>>(_mm_max_ps(bit_cast<__m128>(a), bit_cast<__m128>(b)));
#else
  return a > b ? a : b;
#endif
}
inline Vec<float> min_or_second(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return bit_cast<Vec<float>>(_mm512_min_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
#elif defined(__AVX2__)
  return bit_cast<Vec<float>>(_mm256_min_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
#elif defined(__SSE2__)
  return bit_cast<Vec<float>>(_mm_min_ps(bit_cast<__m128>(a), bit_cast<__m128>(b)));
#else
  return a < b ? a : b;
#endif
}
inline Vec<double> max_or_second(Vec<double> a, Vec<double> b) { return a > b ? a : b; }
inline Vec<double> min_or_second(Vec<double> a, Vec<double> b) { return a < b ? a : b; }
template <class T>
inline Pack<T> max_or_second(const Pack<T>& a, const Pack<T>& b) {
  return each<Pack<T>>([&](int i) { return max_or_second(a.v[i], b.v[i]); });
}
template <class T>
inline Pack<T> min_or_second(const Pack<T>& a, const Pack<T>& b) {
  return each<Pack<T>>([&](int i) { return min_or_second(a.v[i], b.v[i]); });
}

inline Vec<int16_t> larger(Vec<int16_t> a, Vec<int16_t> b) {
#if defined(__AVX512BW__)
  return bit_cast<Vec<int16_t>>(_mm512_max_epi16(bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return bit_cast<Vec<int16_t>>(_mm256_max_epi16(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return bit_cast<Vec<int16_t>>(_mm_max_epi16(bit_cast<__m128i>(a), bit_cast<__m128i>(b)));
#else
  return a > b ? a : b;
#endif
}

template <class T>
inline Pack<typename Element<T>::Acc> load_in_order(const T* from) {
  using P = Pack<typename Element<T>::Acc>;
  return each<P>([&](int i) { return Element<T>::load(from + i * (P::lanes / kPackVectors)); });
}
template <bool Stream = false, class T>
inline void store_in_order(T* to, const Pack<typename Element<T>::Acc>& p) {
  for (int i = 0; i < kPackVectors; ++i) Element<T>::template store<Stream>(to + i * (p.lanes / kPackVectors), p.v[i]);
}

// In an order of the type's own, the same for both.
template <class T>
inline Pack<typename Element<T>::Acc> load(const T* from) {
  return load_in_order(from);
}
template <bool Stream = false, class T>
inline void store(T* to, const Pack<typename Element<T>::Acc>& p) {
  store_in_order<Stream>(to, p);
}

// A 32-bit word holds two bfloat16, and each is a float but for its low bits. A shift makes one vector of the
// first of each pair, a mask another of the second. That is cheaper than widening in order.
inline Pack<float> load(const BFloat16* from) {
  Pack<float> p;
  for (int i = 0; i < kPackVectors; i += 2) {
    const Words pairs = load_raw<Words>(from + i * (kVectorBytes / 4));
    p.v[i] = bit_cast<Vec<float>>(pairs << 16);
    p.v[i + 1] = bit_cast<Vec<float>>(pairs & 0xffff0000);
  }
  return p;
}
#if defined(__AVX512BF16__)
inline Words bfloat16_pairs(Vec<float> first, Vec<float> second) {  // takes subnormal numbers for 0
  const __m512i halves = bit_cast<__m512i>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(second), bit_cast<__m512>(first)));
  const auto lanes = [](int i) { return uint32_t(i) | uint32_t(i + 16) << 16; };
  const Words pairs = {lanes(0), lanes(1), lanes(2),  lanes(3),  lanes(4),  lanes(5),  lanes(6),  lanes(7),
                       lanes(8), lanes(9), lanes(10), lanes(11), lanes(12), lanes(13), lanes(14), lanes(15)};
  return bit_cast<Words>(_mm512_permutexvar_epi16(bit_cast<__m512i>(pairs), halves));
}
#else
inline Words bfloat16_pairs(Vec<float> first, Vec<float> second) {
  return (bfloat16_in_high_half(first) >> 16) | (bfloat16_in_high_half(second) & 0xffff0000);
}
#endif
template <bool Stream = false>
inline void store(BFloat16* to, const Pack<float>& p) {
  for (int i = 0; i < kPackVectors; i += 2) store_raw<Stream>(to + i * (kVectorBytes / 4), bfloat16_pairs(p.v[i], p.v[i + 1]));
}

// Lanes combined two halves at a time: a fixed order, so the same bits every time.
template <class T, int Bytes, class Combine>
inline T fold(Vec<T, Bytes> v, Combine combine) {
  if constexpr (Bytes == sizeof(T) * 2) {
    return combine(v[0], v[1]);
  } else {
    using Half = Vec<T, Bytes / 2>;
    struct Halves {
      Half low, high;
    };
    const auto [low, high] = bit_cast<Halves>(v);
    return fold<T, Bytes / 2>(combine(low, high), combine);
  }
}
template <class P>
inline auto sum_lanes(const P& p) {
  auto v = p.v[0];
  for (int i = 1; i < kPackVectors; ++i) v += p.v[i];
  return fold<std::decay_t<decltype(v[0])>, kVectorBytes>(v, [](auto a, auto b) { return a + b; });
}
template <class T>
inline T max_lanes(const Pack<T>& p) {
  Vec<T> v = p.v[0];
  for (int i = 1; i < kPackVectors; ++i) v = max_or_second(p.v[i], v);
  return fold<T, kVectorBytes>(v, [](auto a, auto b) { return a > b ? a : b; });
}

// The polynomials minimise the relative error of 2^f over [-1/2, 1/2]. Before rounding it is 2e-9 for float
// and 2e-17 for double. Logits of 16 bits round far above the 7e-8 of one term less.
template <class T, bool Short = false>
struct Exp2;
template <>
struct Exp2<float, true> {
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float coefficients[] = {1.00000007165f,   0.693146967065f,   0.24022119724f,
                                           0.0555071327288f, 0.00967554133102f, 0.00132764721678f};
};
template <>
struct Exp2<float> {
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float coefficients[] = {
      1.0f, 0.6931472057372f, 0.2402264689060f, 0.0555032877699f, 0.0096184889613f, 0.0013399931210f, 0.0001534581087f};
};
template <>
struct Exp2<double> {
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double coefficients[] = {1.0,
                                            0.69314718055994569675,
                                            0.24022650695910098007,
                                            0.055504108664790394552,
                                            0.0096181291076070023796,
                                            0.0013333558153439964747,
                                            0.0001540353044157213033,
                                            0.000015252727385193868197,
                                            1.3215442675329822143e-6,
                                            1.0180647659234138888e-7,
                                            7.0725704128144235096e-9,
                                            4.078071929588336665e-10};
};
// The same over [0, 1].
template <bool Short>
struct Exp2FromFloor {
  static constexpr float coefficients[] = {0.999999925065f,  0.6931530731742f, 0.2401536171586f,
                                           0.0558263178786f, 0.0089893401678f, 0.0018775766857f};
};
template <>
struct Exp2FromFloor<false> {
  static constexpr float coefficients[] = {1.000000001856f, 0.6931469838417f, 0.2402298362666f, 0.0554833420041f,
                                           0.009678840975f, 0.001243968790f,  0.000217022555f};
};

// Without the terms before `First`, divided by f^First.
template <class E, int First = 0, class T>
RLKERN_INLINE Pack<T> polynomial(const Pack<T>& f) {
  constexpr int degree = sizeof(E::coefficients) / sizeof(T) - 1;
  Pack<T> y = broadcast(E::coefficients[degree]);
#pragma GCC unroll 16
  for (int i = degree - 1; i >= First; --i) y = y * f + E::coefficients[i];
  return y;
}

template <class T>
constexpr T kLowestExponent = -Exp2<T>::bias;

// t, but no less than where 2^t is as good as 0: finite, a factor for 0.
template <class T>
RLKERN_INLINE Pack<T> finite_exponent(const Pack<T>& t) {
  return max_or_second(broadcast(kLowestExponent<T>), t);
}

// 2^t for t <= 0, 0 for -inf; NaN for NaN.
template <bool Short = false, class T>
RLKERN_INLINE Pack<T> power_of_two(const Pack<T>& exponent) {
  using E = Exp2<T, Short>;
  // Adding `round` leaves the biased exponent in the lowest bits.
  constexpr T round = T(int64_t(3) << (E::mantissa - 1)) + E::bias;
  const Pack<T> t = finite_exponent(exponent), rounded = t + round;
  const Pack<T> f = t - (rounded - round);
  // A product, not an addition to the exponent's bits: a NaN survives it, and 2^lowest is 0.
  return polynomial<E>(f) * each<Pack<T>>([&](int i) { return bit_cast<Vec<T>>(bit_cast<Bits<T>>(rounded.v[i]) << E::mantissa); });
}

#if defined(__AVX512DQ__)
// The instruction set has 2^floor(t) and t - floor(t), at -inf 0 and 0.
template <bool Short = false>
RLKERN_INLINE Pack<float> power_of_two(const Pack<float>& t) {
  constexpr int floor = _MM_FROUND_TO_NEG_INF;
  const Pack<float> f = each<Pack<float>>([&](int i) { return bit_cast<Vec<float>>(_mm512_reduce_ps(bit_cast<__m512>(t.v[i]), floor)); });
  const Pack<float> y = polynomial<Exp2FromFloor<Short>>(f);
  return each<Pack<float>>(
      [&](int i) { return bit_cast<Vec<float>>(_mm512_scalef_ps(bit_cast<__m512>(y.v[i]), bit_cast<__m512>(t.v[i]))); });
}
#endif

// --- a softcap -----------------------------------------------------------------------------------------------

template <class T>
RLKERN_INLINE Pack<T> with_sign_of(const Pack<T>& a, const Pack<T>& sign) {
  using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  constexpr Lane only_sign = std::numeric_limits<Lane>::min();
  return each<Pack<T>>(
      [&](int i) { return bit_cast<Vec<T>>(bit_cast<Bits<T>>(magnitude(a).v[i]) | (bit_cast<Bits<T>>(sign.v[i]) & only_sign)); });
}

template <class T>
struct Capped {
  Pack<T> value, slope;  // tanh(x / cap), and its derivative by x
};

// -inf stays: it is no logit but a mask. With r = e^(-2|x| / cap) both keep their relative accuracy: the value
// near 0 by e^t - 1, the slope where the value is 1.
template <class T>
RLKERN_INLINE Capped<T> soft_cap(const Pack<T>& x, T inverse_cap) {
  using E = Exp2<T>;
  constexpr T round = T(int64_t(3) << (E::mantissa - 1)) + E::bias;
  const Pack<T> t = finite_exponent(magnitude(x) * (inverse_cap * T(-2 * 1.4426950408889634074))), rounded = t + round;
  const Pack<T> f = t - (rounded - round),
                power = each<Pack<T>>([&](int i) { return bit_cast<Vec<T>>(bit_cast<Bits<T>>(rounded.v[i]) << E::mantissa); });
  const Pack<T> part = polynomial<E, 1>(f) * f * power;  // r = 2^t = power + part
  const Pack<T> r = power + part, r_minus_1 = part + (power - T(1)), inverse = broadcast(T(1)) / (r + T(1));
  const Pack<T> value = with_sign_of(r_minus_1 * inverse, x);
  return {select(x == T(-__builtin_inf()), x, value), r * inverse * inverse * (4 * inverse_cap)};
}

// --- near 0, relative to the result ------------------------------------------------------------------------

template <class T>
struct Reciprocals;  // of what divides the terms of the series below
template <>
struct Reciprocals<float> {
  struct Factorials {  // from 2! on
    static constexpr float coefficients[] = {1.f / 2, 1.f / 6, 1.f / 24, 1.f / 120, 1.f / 720, 1.f / 5040, 1.f / 40320};
  };
  struct OddNumbers {
    static constexpr float coefficients[] = {1.f, 1.f / 3, 1.f / 5, 1.f / 7, 1.f / 9, 1.f / 11, 1.f / 13};
  };
};
template <>
struct Reciprocals<double> {
  struct Factorials {
    static constexpr double coefficients[] = {1. / 2,         1. / 6,          1. / 24,          1. / 120,           1. / 720,
                                              1. / 5040,      1. / 40320,      1. / 362880,      1. / 3628800,       1. / 39916800,
                                              1. / 479001600, 1. / 6227020800, 1. / 87178291200, 1. / 1307674368000, 1. / 20922789888000};
  };
  struct OddNumbers {
    static constexpr double coefficients[] = {1.,      1. / 3,  1. / 5,  1. / 7,  1. / 9,  1. / 11, 1. / 13, 1. / 15,
                                              1. / 17, 1. / 19, 1. / 21, 1. / 23, 1. / 25, 1. / 27, 1. / 29};
  };
};

// e^x - 1 - x for |x| <= 1/2.
template <class T>
RLKERN_INLINE Pack<T> excess(const Pack<T>& x) {
  return polynomial<typename Reciprocals<T>::Factorials>(x) * (x * x);
}

// log((1 + s) / (1 - s)) for |s| <= 1/4.
template <class T>
RLKERN_INLINE Pack<T> log_of_ratio(const Pack<T>& s) {
  return polynomial<typename Reciprocals<T>::OddNumbers>(s * s) * (s + s);
}

// log(1 + v) for -2/5 <= v <= 2/3.
template <class T>
RLKERN_INLINE Pack<T> log1p_near(const Pack<T>& v) {
  return log_of_ratio(v / (v + T(2)));
}

// log(y) of positive normal numbers.
template <class T>
RLKERN_INLINE Pack<T> log_positive(const Pack<T>& y) {
  constexpr int mantissa = Exp2<T>::mantissa;
  const auto half_bits = bit_cast<std::conditional_t<sizeof(T) == 4, int32_t, int64_t>>(T(0.70710678118654752440));
  // The exponent for which y / 2^exponent is in [sqrt(1/2), sqrt(2)).
  const auto exponent = each<Mask<T>>([&](int i) { return (bit_cast<Bits<T>>(y.v[i]) - half_bits) >> mantissa; });
  const Pack<T> m = each<Pack<T>>([&](int i) { return bit_cast<Vec<T>>(bit_cast<Bits<T>>(y.v[i]) - (exponent.v[i] << mantissa)); });
  const Pack<T> steps = each<Pack<T>>([&](int i) { return __builtin_convertvector(exponent.v[i], Vec<T>); });
  return steps * T(0.69314718055994530942) + log_of_ratio((m - T(1)) / (m + T(1)));
}

struct LogOfOnePlus {  // log2(1 + r) / r over [-1/4, 1/2]
  static constexpr float coefficients[] = {1.44269502163f,  -0.721348464489f, 0.480902075768f, -0.360575914383f, 0.288191497326f,
                                           -0.24272352457f, 0.216324865818f,  -0.17423017323f, 0.0780666694045f};
};

// log2(y) of positive numbers that are not subnormal, to 4e-8 of itself or of 1.
RLKERN_INLINE Pack<float> log2_positive(const Pack<float>& y) {
  constexpr int32_t low_bits = 0x3f400000;  // of 3/4
  const auto exponent = each<Mask<float>>([&](int i) { return (bit_cast<Bits<float>>(y.v[i]) - low_bits) >> 23; });
  const Pack<float> r =
      each<Pack<float>>([&](int i) { return bit_cast<Vec<float>>(bit_cast<Bits<float>>(y.v[i]) - (exponent.v[i] << 23)); }) - 1.0f;
  const Pack<float> steps = each<Pack<float>>([&](int i) { return __builtin_convertvector(exponent.v[i], Vec<float>); });
  return polynomial<LogOfOnePlus>(r) * r + steps;
}
RLKERN_INLINE Pack<double> log2_positive(const Pack<double>& y) { return log_positive(y) * 1.4426950408889634074; }

}  // namespace
