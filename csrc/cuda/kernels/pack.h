// From the panels of a model file to tiles, once, when a model is loaded.
#pragma once

#include "cuda/kernels/vocabulary.h"
#include "cuda/layout.h"

namespace gptx::cuda {

// out: tiles [panels, tiles, 128 words]; in: [panels, lines, 16 words]. Lines beyond the last one are zeros.
// One block of 128 threads for each tile: x tiles, y panels.
GPTX_KERNEL void pack(uint32_t* out, const uint32_t* in, int lines) {
  wait_for_previous_kernel();
  const int word = thread_index();
  const int line = block_x() * kTileLines + word / kPanel;
  const size_t tile = static_cast<size_t>(block_y()) * static_cast<size_t>(grid_x()) +
                      static_cast<size_t>(block_x());
  const size_t from = (static_cast<size_t>(block_y()) * static_cast<size_t>(lines) +
                       static_cast<size_t>(line)) * kPanel + static_cast<size_t>(word % kPanel);
  out[tile * kTileWords + static_cast<size_t>(word_of(word / kPanel, word % kPanel))] =
      line < lines ? in[from] : 0;
}

// The same from words of `inputs` inputs, bfloat16 or int8 with a scale for each output, to float32.
GPTX_KERNEL void pack_as_float32(float* out, const uint32_t* in, const float* scale, int lines, int inputs) {
  wait_for_previous_kernel();
  const int word = thread_index();
  const int k = block_x() * kTileLines + word / kPanel;
  const int output = word % kPanel;
  const int line = k / inputs;
  const size_t tile = static_cast<size_t>(block_y()) * static_cast<size_t>(grid_x()) +
                      static_cast<size_t>(block_x());
  float x = 0.0f;
  if (line < lines) {
    const uint32_t bits = in[(static_cast<size_t>(block_y()) * static_cast<size_t>(lines) +
                              static_cast<size_t>(line)) * kPanel + static_cast<size_t>(output)];
    if (inputs == 2) {
      x = as_float(k % 2 == 0 ? bits << 16 : bits & 0xffff0000u);
    } else {
      x = static_cast<float>(static_cast<int8_t>(bits >> 8 * (k % 4))) *
          scale[block_y() * kPanel + output];
    }
  }
  out[tile * kTileWords + static_cast<size_t>(word_of(word / kPanel, output))] = x;
}

}  // namespace gptx::cuda
