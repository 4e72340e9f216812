// Which instruction set runs: the best that was built and that the processor has, or the one that RLKERN_CPU_ISA names.
#pragma once

#include <string>
#include <vector>

#include "call.h"

namespace rlkern {

std::vector<std::string> available_isas();  // built and runnable here, best first

// The kernels for `isa`; for an empty string the best ones. Throws std::invalid_argument for one that is unknown or cannot run here.
struct Chosen {
  std::string isa;
  const Kernels* kernels;
};
Chosen choose(const std::string& isa);

}  // namespace rlkern
