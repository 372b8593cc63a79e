// The first operation of the model, and the rows that go on to the last.
#pragma once

#include "cuda/kernels/rowwise.h"

namespace gptx::cuda {

// x = wte[token] + wpe[position], a block for each row.
GPTX_KERNEL void embed(RowsView x, WeightsView wte, const float* wpe, int wpe_stride, const int32_t* tokens,
                       const int32_t* positions, int columns) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int row = block_x();
  const float* const position =
      wpe + static_cast<size_t>(positions[row]) * static_cast<size_t>(wpe_stride);
  for (int i = thread_index(); i < columns; i += thread_count()) {
    x.row(row)[i] = wte.at(tokens[row], i) + position[i];
  }
}

// Moves the rows that want logits to the front, in place: a thread for each column, rows ascending.
GPTX_KERNEL void keep_rows(RowsView x, const int32_t* rows, int n, int columns) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int i = block_x() * thread_count() + thread_index();
  if (i >= columns) return;
  for (int r = 0; r < n; ++r) x.row(r)[i] = x.row(rows[r])[i];
}

}  // namespace gptx::cuda
