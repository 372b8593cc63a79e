#include "cpu/packed_matrix.h"

#include <bit>
#include <cstdint>

#include "cpu/kernel_table.h"

namespace gptx::cpu {
namespace {

// bfloat16 [N/16, K2/2, 16, 2] -> float32 [N/16, K, 16], one panel.
void expand_bfloat16(float* out, const uint16_t* in, size_t depth) {
  for (size_t k = 0; k < depth; ++k) {
    const uint16_t* pairs = in + k / 2 * kPanel * 2 + k % 2;
    for (size_t j = 0; j < kPanel; ++j) {
      out[k * kPanel + j] = std::bit_cast<float>(static_cast<uint32_t>(pairs[2 * j]) << 16);
    }
  }
}

// int8 [N/16, K4/4, 16, 4] -> float32 [N/16, K, 16], one panel.
void expand_int8(float* out, const int8_t* in, const float* scale, size_t depth) {
  for (size_t k = 0; k < depth; ++k) {
    const int8_t* fours = in + k / 4 * kPanel * 4 + k % 4;
    for (size_t j = 0; j < kPanel; ++j) {
      out[k * kPanel + j] = static_cast<float>(fours[4 * j]) * scale[j];
    }
  }
}

}  // namespace

PackedMatrix PackedMatrix::from(const WeightSource& source, const std::string& base, size_t n,
                                size_t depth, ThreadTeam& team) {
  PackedMatrix m;
  m.n = round_up(n, kPanel);
  m.depth = depth;
  const std::string name = base + ".weight";
  if (source.dtype == DType::kFloat32) {
    m.panels = reinterpret_cast<const float*>(source.get(name, m.n * depth * sizeof(float)));
    return m;
  }

  const size_t multiple = source.dtype == DType::kBFloat16 ? 2 : 4;
  const size_t element = source.dtype == DType::kBFloat16 ? sizeof(uint16_t) : sizeof(int8_t);
  const size_t panel_bytes = round_up(depth, multiple) * kPanel * element;
  const std::byte* const packed = source.get(name, m.n / kPanel * panel_bytes);
  const float* scales = nullptr;
  if (source.dtype == DType::kInt8) {
    scales = reinterpret_cast<const float*>(source.get(base + ".scale", m.n * sizeof(float)));
  }
  m.owned = AlignedBuffer<float>(m.n * depth);
  m.panels = m.owned.data();
  team.run([&](int rank) {
    team.for_each(rank, m.n / kPanel, [&](size_t p) {
      float* const out = m.owned.data() + p * depth * kPanel;
      const std::byte* const in = packed + p * panel_bytes;
      if (scales == nullptr) {
        expand_bfloat16(out, reinterpret_cast<const uint16_t*>(in), depth);
      } else {
        expand_int8(out, reinterpret_cast<const int8_t*>(in), scales + p * kPanel, depth);
      }
    });
  });
  return m;
}

}  // namespace gptx::cpu
