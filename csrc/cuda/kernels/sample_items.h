// What a step asks of the sampler, in device memory.
#pragma once

#include "cuda/kernels/attention.h"
#include "cuda/kernels/rowwise.h"

namespace gptx::cuda {

inline constexpr int kSampleThreads = 512;
inline constexpr int kWeighThreads = 256;
inline constexpr int kSampleWarps = kSampleThreads / kWarp;
inline constexpr int kDigits = 256;  // a key is four of them

struct SampleItem {
  uint64_t position, seed;
  double repetition_penalty, temperature, top_p, min_p;
  int64_t top_k;
  int32_t logit_row;
  int32_t feed_row;  // the row of a decode step that the token goes to; -1: none
  int32_t taken;     // tokens of this step so far
  int32_t sequence_begin, sequence_end, banned_begin, banned_end;  // in ids
  const int32_t* ids;
  double top;        // the largest logit that is allowed
  int32_t undecided; // whether the token is still to be drawn
};

struct SampleStep {
  RowsView logits;
  int maxima;  // of a row
  int vocab_size;
  double* weights;  // [items, V]: exp((logit - top) / temperature)
  SampleItem* items;
  int32_t* chosen;       // [length, items]
  int32_t* tokens;       // of the rows, for the token that is fed back
  int32_t* positions;
  QueryItem* queries;
};

// Shared memory of a block.
struct SampleShared {
  uint32_t low[kDigits], high[kDigits];  // a histogram of 64-bit weights, in halves
  uint64_t warps[kSampleWarps];
  double chunk_sums[kSampleThreads];
  double group_sums[kSampleWarps];
  int32_t tie_ranks[kSampleThreads];  // ties among the ids of the threads before
  uint32_t key;    // the least that is kept
  uint64_t above;  // weight or number of what has a larger key
  uint64_t most;   // reduced value
};
constexpr size_t sample_shared_bytes(int vocab_size) {
  return sizeof(SampleShared) + static_cast<size_t>(ceil_div(vocab_size, 32)) * sizeof(uint32_t);
}

}  // namespace gptx::cuda
