#include "cuda/matrix.h"

#include "core/precision.h"
#include "cuda/kernels/pack.h"
#include "cuda/launch.h"

namespace gptx::cuda {
namespace {

int inputs_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return 1;
    case DType::kBFloat16: return 2;
    case DType::kInt8: return 4;
  }
  return 1;
}

}  // namespace

Matrix Matrix::from(Device& device, const WeightSource& source, const std::string& base, size_t n, size_t depth,
                    Precision precision) {
  const int file_inputs = inputs_of(source.dtype);
  const bool expand = precision == Precision::kFloat32 && file_inputs != 1;
  Matrix m;
  m.outputs = static_cast<int>(n);
  m.depth = static_cast<int>(depth);
  m.panels = ceil_div(static_cast<int>(n), kPanel);
  m.inputs = expand ? 1 : file_inputs;
  m.depth_tiles = tiles_for(m.depth, m.inputs);
  const auto padded = static_cast<size_t>(m.panels * kPanel);
  if (source.dtype == DType::kInt8) {
    const auto* scale = reinterpret_cast<const float*>(source.get(base + ".scale", padded * sizeof(float)));
    const auto* colsum = reinterpret_cast<const int32_t*>(source.get(base + ".colsum", padded * sizeof(int32_t)));
    m.scale = copy_to(device, scale, padded, "weights");
    m.colsum = copy_to(device, colsum, padded, "weights");
  }
  const int lines = ceil_div(m.depth, file_inputs);
  const size_t file_bytes = static_cast<size_t>(m.panels) * static_cast<size_t>(lines) * kPanel * 4;
  const auto tiles = static_cast<size_t>(m.panels) * static_cast<size_t>(m.depth_tiles);
  auto* const out = static_cast<std::byte*>(device.allocate(tiles * kTileBytes, "weights"));
  const std::byte* const host = source.get(base + ".weight", file_bytes);
  auto* const staged = static_cast<std::byte*>(device.staging(file_bytes));
  device.upload(staged, host, file_bytes);
  const LaunchShape shape{.x = static_cast<size_t>(m.depth_tiles),
                          .y = static_cast<size_t>(m.panels),
                          .threads = kTileWords};
  const auto* const words = reinterpret_cast<const uint32_t*>(staged);
  if (expand) {
    launch(device, shape, pack_as_float32, reinterpret_cast<float*>(out), words, m.scale, lines, file_inputs);
    m.scale = nullptr;
    m.colsum = nullptr;
  } else {
    launch(device, shape, pack, reinterpret_cast<uint32_t*>(out), words, lines);
  }
  m.tiles = out;
  return m;
}

}  // namespace gptx::cuda
