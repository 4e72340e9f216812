// The instruction set that runs: the best one built that the processor has, or the one that was asked for.
#pragma once

#include <string>
#include <vector>

#include "call.h"

namespace rlkern {

std::vector<std::string> available_isas();  // built and runnable here, best first

// Takes the kernels for `isa`, the best ones for an empty string.
// Throws std::invalid_argument for one that is unknown or cannot run here.
void use_isa(const std::string& isa);
std::string active_isa();
const Kernels& active_kernels();

}  // namespace rlkern
