// How a call over rows of logits is carried out: threads, huge pages, caches. None of these changes a result.
#pragma once

#include "call.h"

namespace rlkern {

// The forwards throw std::out_of_range for a target outside [0, vocab) that counts, before anything is written.
// The backwards choose what is streamed.
void token_stats_forward(const Forward& call);
void token_stats_merge(const Merge& call);
void token_stats_kept_masses(const KeptMasses& call);
void token_stats_backward(const Backward& call);
void token_stats_in_sets_forward(const ForwardInSets& call);  // also for an id or a list out of range
void token_stats_in_sets_backward(const BackwardInSets& call);
void pair_forward(const PairForward& call);
void pair_mixture_sums(const PairMixtureSums& call);
void pair_backward(const PairBackward& call);
void row_moments_forward(const MomentsForward& call);
void row_moments_backward(const MomentsBackward& call);
void did_entropy_forward(const DidForward& call);
void did_entropy_backward(const DidBackward& call);
void sampler_threshold(const Sampler& call);
void kept_logits(const KeptLogits& call);
void kept_hidden_gradient(const KeptHidden& call);
void kept_weight_gradient(const KeptWeight& call);

}  // namespace rlkern
