// How a call of token_stats is carried out: threads, huge pages, caches. None of these changes a result.
#pragma once

#include "call.h"

namespace rlkern {

// Throws std::out_of_range for a target outside [0, vocab) that counts, before anything is written.
void token_stats_forward(const Forward& call);
void token_stats_backward(Backward call);  // chooses call.stream

}  // namespace rlkern
