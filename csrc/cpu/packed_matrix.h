// A weight matrix in panels of 16 output columns, [N/16, K, 16]: 64 bytes per k-step and panel, which
// is one AVX-512 register, two AVX2 or four NEON ones. float32 panels are used where they lie.
#pragma once

#include <cstddef>
#include <string>

#include "core/aligned_buffer.h"
#include "core/thread_team.h"
#include "core/weights.h"

namespace gptx::cpu {

struct PackedMatrix {
  const float* panels = nullptr;  // [n / 16, depth, 16]
  size_t n = 0;                   // output columns, padded to 16
  size_t depth = 0;               // K
  AlignedBuffer<float> owned;     // holds panels expanded from bfloat16 or int8

  // The matrix "<base>.weight" of the source, with n outputs and depth inputs. bfloat16 and int8 are
  // expanded to float32 by the team.
  static PackedMatrix from(const WeightSource& source, const std::string& base, size_t n,
                           size_t depth, ThreadTeam& team);
};

}  // namespace gptx::cpu
