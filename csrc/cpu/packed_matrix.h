// A weight matrix in panels of 16 output columns (docs/model-file.md), used where it lies: 64 bytes per
// line, which is one AVX-512 register, two AVX2 or four NEON ones.
#pragma once

#include <cstddef>
#include <string>

#include "core/aligned_buffer.h"
#include "core/thread_team.h"
#include "core/weights.h"
#include "cpu/kernel_table.h"

namespace gptx::cpu {

struct PackedMatrix {
  const std::byte* panels = nullptr;  // [n / 16, lines, 64 bytes]
  const float* scale = nullptr;       // [n], int8 only
  const int32_t* colsum = nullptr;    // [n], int8 only
  size_t n = 0;                       // output columns, padded to 16
  size_t depth = 0;                   // K
  Precision precision = Precision::kFloat32;
  AlignedBuffer<float> owned;         // holds panels expanded from bfloat16 or int8

  // The matrix "<base>.weight" of the source, with n outputs and depth inputs. Where a precision of
  // float32 is asked of bfloat16 or int8 weights, the team expands them.
  static PackedMatrix from(const WeightSource& source, const std::string& base, size_t n,
                           size_t depth, Precision precision, ThreadTeam& team);

  size_t panel_bytes() const { return lines() * kLineBytes; }

  // out[k * stride] = weight[row, k] for the depth inputs.
  void copy_row(float* out, size_t stride, size_t row) const;

 private:
  size_t lines() const {
    const size_t inputs = inputs_per_line(precision);
    return round_up(depth, inputs) / inputs;
  }
};

}  // namespace gptx::cpu
