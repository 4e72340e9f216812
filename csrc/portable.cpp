// What a wheel for older Linux systems may not ask of the one that it is built on: RLKERN_PORTABLE.
//
// The linker finds these names here first. The library then needs nothing newer than manylinux_2_28 has: glibc
// 2.28, libstdc++ of GCC 8. tests/test_packaging.py holds it to that.

#include <cstdlib>
#include <exception>

#define HIDDEN(symbol) asm(".hidden " #symbol)

namespace std {

// GCC 11. Called where the size of an array overflows.
HIDDEN(_ZSt28__throw_bad_array_new_lengthv);
void __throw_bad_array_new_length() { std::abort(); }

// GCC 11. Counts references to exceptions, as the older copy constructor and destructor do.
namespace __exception_ptr {
void copy(void* to, const exception_ptr& from) asm("_ZNSt15__exception_ptr13exception_ptrC1ERKS0_");
void destroy(exception_ptr*) asm("_ZNSt15__exception_ptr13exception_ptrD1Ev");
HIDDEN(_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv);
void exception_ptr::_M_addref() noexcept {
  void* counted;
  copy(&counted, *this);
}
HIDDEN(_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv);
void exception_ptr::_M_release() noexcept { destroy(this); }
}  // namespace __exception_ptr

}  // namespace std

// glibc 2.32. libstdc++ asks it whether a count of references needs atomic additions: always.
HIDDEN(__libc_single_threaded);
extern "C" {
char __libc_single_threaded = 0;
}

// glibc 2.29. The older ones compute the same.
#if defined(__x86_64__) && defined(__GLIBC__)
#define OLDER(name)                                     \
  HIDDEN(name);                                         \
  asm(".symver older_" #name "," #name "@GLIBC_2.2.5"); \
  extern "C" double older_##name(double);               \
  extern "C" double name(double x) { return older_##name(x); }
OLDER(exp)
OLDER(exp2)
OLDER(log)
#endif
