// K and V of a step into an int8 cache, which wants a scale for each head and position before it can round.
#pragma once

#include "cuda/kernels/linear.h"
#include "cuda/kernels/rowwise.h"

namespace gptx::cuda {

// A warp for K and one for V; x rows, y heads.
GPTX_KERNEL void append_int8(RowsView qkv, CacheView cache) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int row = block_x(), head = block_y(), part = warp_index() + 1;
  const KvLayout& kv = cache.layout;
  const float* const x = qkv.row(row) + (3 * head + part) * kv.head_width;
  const int position = cache.positions[row] % kBlock;
  const int block = cache.block_tables[cache.row_tables[row] + cache.positions[row] / kBlock];
  std::byte* const base = cache.head(block, head);
  float top = 0.0f;
  for (int d = lane_index(); d < kv.head_size; d += kWarp) top = fmaxf(top, fabsf(finite_or_zero(x[d])));
  top = warp_max(top);
  const float inverse = top < kSmallest ? 0.0f : 127.0f / top;
  for (int d = lane_index(); d < kv.head_size; d += kWarp) {
    const size_t offset = part == 1 ? weight_offset(position, d, kv.key_tiles(), 4)
                                    : kv.value_begin() + weight_offset(d, position, kv.value_tiles(), 4);
    *reinterpret_cast<int8_t*>(base + offset) = static_cast<int8_t>(round_to_int(finite_or_zero(x[d]) * inverse));
  }
  if (lane_index() == 0) {
    auto* const scales = reinterpret_cast<float*>(base + kv.scale_begin());
    scales[(part - 1) * kBlock + position] = top < kSmallest ? 0.0f : top / 127.0f;
  }
}

}  // namespace gptx::cuda
