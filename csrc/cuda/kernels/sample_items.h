// What a step asks of the sampler, in device memory.
#pragma once

#include "cuda/kernels/attention.h"
#include "cuda/kernels/rowwise.h"

namespace gptx::cuda {

struct SampleItem {
  uint64_t position, seed;
  double repetition_penalty, temperature, top_p, min_p;
  int64_t top_k;
  int32_t logit_row;
  int32_t feed_row;  // the row of a decode step that the token goes to; -1: none
  int32_t taken;     // tokens of this step so far
  int32_t sequence_begin, sequence_end, banned_begin, banned_end;  // in ids
  const int32_t* ids;
};

struct SampleStep {
  RowsView logits;
  int maxima;  // of a row
  int vocab_size;
  SampleItem* items;
  int32_t* chosen;       // [length, items]
  int32_t* tokens;       // of the rows, for the token that is fed back
  int32_t* positions;
  QueryItem* queries;
};

}  // namespace gptx::cuda
