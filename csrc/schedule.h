// How a call over rows of logits is carried out: threads, huge pages, caches. None of these changes a result.
#pragma once

#include "call.h"

namespace rlkern {

// A forward with targets throws std::out_of_range for one outside [0, vocab) that counts, before anything is
// written. A backward chooses what is streamed.
void token_stats_forward(const Forward& call);
void token_stats_backward(Backward call);
void row_moments_forward(const MomentsForward& call);
void row_moments_backward(MomentsBackward call);
void did_entropy_forward(const DidForward& call);
void did_entropy_backward(DidBackward call);

}  // namespace rlkern
