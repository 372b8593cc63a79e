#include "cpu/packed_matrix.h"

#include <bit>
#include <cstdint>
#include <cstring>

namespace gptx::cpu {
namespace {

float float_of_bfloat16(const std::byte* p) {
  uint16_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

float float_of(const std::byte* p) {
  float x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

// Calls f(k, p) for the inputs k of one column of a panel, p where its element lies.
template <class F>
void for_each_input(const std::byte* panel, size_t column, size_t depth, size_t inputs, F f) {
  const size_t bytes = kLineBytes / kPanel / inputs;
  const std::byte* line = panel + column * inputs * bytes;
  for (size_t k = 0; k < depth; line += kLineBytes) {
    for (size_t e = 0; e < inputs && k < depth; ++e, ++k) f(k, line + e * bytes);
  }
}

Precision native(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return Precision::kFloat32;
    case DType::kBFloat16: return Precision::kBFloat16;
    case DType::kInt8: return Precision::kInt8;
  }
  return Precision::kFloat32;
}

}  // namespace

void PackedMatrix::copy_row(float* out, size_t stride, size_t row) const {
  const std::byte* const panel = panels + row / kPanel * panel_bytes();
  const auto copy = [&](auto value) {
    for_each_input(panel, row % kPanel, depth, inputs_per_line(precision),
                   [&](size_t k, const std::byte* p) { out[k * stride] = value(p); });
  };
  switch (precision) {
    case Precision::kFloat32: return copy(float_of);
    case Precision::kBFloat16: return copy(float_of_bfloat16);
    case Precision::kInt8:
    case Precision::kInt8Fast:
      return copy([&](const std::byte* p) {
        return static_cast<float>(static_cast<int8_t>(*p)) * scale[row];
      });
  }
}

PackedMatrix PackedMatrix::from(const WeightSource& source, const std::string& base, size_t n,
                                size_t depth, Precision precision, ThreadTeam& team) {
  PackedMatrix m;
  m.n = round_up(n, kPanel);
  m.depth = depth;
  const bool expand = precision == Precision::kFloat32;
  m.precision = expand ? native(source.dtype) : precision;
  m.panels = source.get(base + ".weight", m.n / kPanel * m.panel_bytes());
  if (source.dtype == DType::kInt8) {
    m.scale = reinterpret_cast<const float*>(source.get(base + ".scale", m.n * sizeof(float)));
    m.colsum = reinterpret_cast<const int32_t*>(source.get(base + ".colsum", m.n * sizeof(int32_t)));
    if (!expand && depth > kMaxInt8Depth) {
      throw ParameterError(base, std::to_string(depth) + " inputs",
                           "at most " + std::to_string(kMaxInt8Depth) + " in int8");
    }
  }
  if (m.precision == precision) return m;

  AlignedBuffer<float> expanded(m.n * depth);
  team.run([&](int rank) {
    team.for_each(rank, m.n / kPanel, [&](size_t p) {
      for (size_t column = 0; column < kPanel; ++column) {
        m.copy_row(expanded.data() + p * depth * kPanel + column, kPanel, p * kPanel + column);
      }
    });
  });
  m.owned = std::move(expanded);
  m.panels = reinterpret_cast<const std::byte*>(m.owned.data());
  m.scale = nullptr;
  m.colsum = nullptr;
  m.precision = precision;
  return m;
}

}  // namespace gptx::cpu
