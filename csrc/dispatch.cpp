#include "dispatch.h"

#include <atomic>
#include <stdexcept>

namespace rlkern {

// Each instruction set's kernels are in a namespace of its name.
#define RLKERN_DECLARE(name, Call) void name(const Call&, int64_t begin, int64_t end);
#define RLKERN_ENTRY(name, Call) name,
#define RLKERN_BUILT_FOR(isa)                          \
  namespace isa {                                      \
  RLKERN_KERNELS(RLKERN_DECLARE)                       \
  const Kernels kernels{RLKERN_KERNELS(RLKERN_ENTRY)}; \
  }

RLKERN_BUILT_FOR(baseline)
#ifdef RLKERN_AVX2
RLKERN_BUILT_FOR(avx2)
#endif
#ifdef RLKERN_AVX512
RLKERN_BUILT_FOR(avx512)
#endif
#ifdef RLKERN_AVX512_BF16
RLKERN_BUILT_FOR(avx512_bf16)
#endif

namespace {

struct Isa {
  const char* name;
  const Kernels* kernels;
  bool (*runs)();
};

#ifdef RLKERN_AVX512
bool runs_avx512() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}
#endif

const Isa isas[] = {
#ifdef RLKERN_AVX512_BF16
    {"avx512_bf16", &avx512_bf16::kernels, [] { return runs_avx512() && __builtin_cpu_supports("avx512bf16"); }},
#endif
#ifdef RLKERN_AVX512
    {"avx512", &avx512::kernels, runs_avx512},
#endif
#ifdef RLKERN_AVX2
    // Every processor with AVX2 has F16C. Older compilers' __builtin_cpu_supports does not know its name.
    {"avx2", &avx2::kernels,
     [] {
       __builtin_cpu_init();
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
     }},
#endif
    {"baseline", &baseline::kernels, [] { return true; }},
};
std::atomic<const Isa*> active;  // switched while calls run, each of which reads it once

std::string joined(const std::vector<std::string>& names) {
  std::string all;
  for (const auto& name : names) all += (all.empty() ? "" : ", ") + name;
  return all;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas)
    if (isa.runs()) names.push_back(isa.name);
  return names;
}

void use_isa(const std::string& name) {
  for (const Isa& isa : isas)
    if ((name.empty() || name == isa.name) && isa.runs()) {
      active = &isa;
      return;
    }
  throw std::invalid_argument("RLKERN_CPU_ISA: '" + name + "' is unknown or not supported by this processor, expected one of " +
                              joined(available_isas()));
}

std::string active_isa() { return active.load()->name; }
const Kernels& active_kernels() { return *active.load()->kernels; }

}  // namespace rlkern
