// Numbers taken out by masking their bits: compilers turn that into vector code without leave to reorder
// additions, and nothing comes of a NaN that does not count.
#pragma once

#include <cstdint>
#include <cstring>

namespace rlkern {

template <class A>
struct TokenBits;
template <>
struct TokenBits<float> {
  using Int = int32_t;
  static constexpr Int exponent = 0x7f800000;
};
template <>
struct TokenBits<double> {
  using Int = int64_t;
  static constexpr Int exponent = 0x7ff0000000000000;
};

// x where `where` is all ones, 0 where it is 0.
template <class A>
A keep(A x, typename TokenBits<A>::Int where) {
  typename TokenBits<A>::Int bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits &= where;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

}  // namespace rlkern
