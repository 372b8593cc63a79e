#include "cuda/warpgroups_agree.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/error.h"

namespace gptx::cuda {
namespace {

constexpr int kPanels = 8, kSampleRows = 136;  // three units of rows, the last of a single group
constexpr int kInputs = 384;                   // less three tiles: two chains, the second one cut off

struct Sizes {
  explicit Sizes(const MatmulKernels& kernels)
      : tiles(tiles_for(kInputs, kernels.inputs) - 3),
        depth(tiles * kTileLines * kernels.inputs),
        weights(static_cast<size_t>(kPanels * tiles) * kTileBytes),
        columns(sizeof(float) * kPanels * kPanel),
        rows(sizeof(float) * static_cast<size_t>(kSampleRows * depth)),
        operands(static_cast<size_t>(kSampleRows / kRows * tiles) * kernels.operand_tile_bytes),
        out(sizeof(float) * kSampleRows * kPanels * kPanel) {}
  int tiles, depth;
  size_t weights, columns, rows, operands, out;
};

// Random numbers of very different sizes, as float32, or the upper half of it, or bytes.
std::vector<std::byte> random_weights(const Sizes& sizes, int inputs, std::mt19937& random) {
  std::vector<std::byte> bytes(sizes.weights);
  const auto size = static_cast<size_t>(4 / inputs);
  for (size_t i = 0; i < bytes.size(); i += size) {
    const auto sign_and_mantissa = static_cast<uint32_t>(random()) & 0x807fffffu;
    const uint32_t bits = inputs == 4 ? static_cast<uint32_t>(random()) << 24
                                      : sign_and_mantissa | (117u + static_cast<uint32_t>(random() % 12)) << 23;
    std::memcpy(&bytes[i], reinterpret_cast<const char*>(&bits) + 4 - size, size);
  }
  return bytes;
}

std::vector<float> random_rows(const Sizes& sizes, std::mt19937& random) {
  std::vector<float> rows(sizes.rows / sizeof(float));
  for (float& x : rows) {
    const float mantissa = static_cast<float>(random() % 65536) / 32768.0f - 1.0f;
    x = std::ldexp(mantissa, static_cast<int>(random() % 16) - 8);
  }
  return rows;
}

}  // namespace

bool warpgroups_agree(Device& device, const MatmulKernels& kernels) {
  const char* const wanted = std::getenv("GPTX_CUDA_WGMMA");
  const std::string_view choice = wanted == nullptr ? "" : wanted;
  if (choice != "" && choice != "0" && choice != "1") {
    throw ParameterError("GPTX_CUDA_WGMMA", std::string(choice), "0 or 1");
  }
  if (choice == "0" || kernels.linear_warpgroup == nullptr || device.properties().capability != 90) return false;

  const Sizes sizes(kernels);
  std::mt19937 random(1);
  const std::vector<std::byte> weights = random_weights(sizes, kernels.inputs, random);
  const std::vector<float> rows = random_rows(sizes, random);
  const std::vector<float> scales(kPanels * kPanel, 1.0f);

  auto* const memory = static_cast<std::byte*>(
      device.staging(sizes.weights + 2 * sizes.columns + sizes.rows + sizes.operands +
                     sizeof(RowScale) * kSampleRows + sizes.out));
  std::byte* next = memory;
  const auto place = [&](size_t bytes) { return std::exchange(next, next + bytes); };
  std::byte* const device_weights = place(sizes.weights);
  auto* const device_scales = reinterpret_cast<float*>(place(sizes.columns));
  auto* const colsums = reinterpret_cast<int32_t*>(place(sizes.columns));
  const RowsView in{reinterpret_cast<float*>(place(sizes.rows)), sizes.depth};
  std::byte* const operands = place(sizes.operands);
  auto* const row_scales = reinterpret_cast<RowScale*>(place(sizeof(RowScale) * kSampleRows));
  const RowsView out{reinterpret_cast<float*>(place(sizes.out)), kPanels * kPanel};
  device.upload(device_weights, weights.data(), sizes.weights);
  device.upload(device_scales, scales.data(), sizes.columns);
  device.fill(colsums, 0, sizes.columns);
  device.upload(in.data, rows.data(), sizes.rows);

  const LinearTask task{.weights = reinterpret_cast<const uint4*>(device_weights),
                        .columns = {nullptr, device_scales, colsums},
                        .panels = kPanels,
                        .tiles = sizes.tiles,
                        .depth = sizes.depth,
                        .rows = kSampleRows,
                        .in = in,
                        .norm = {},
                        .operands = operands,
                        .scales = row_scales,
                        .out = {.kind = Output::kStore,
                                .activation = Activation::kNone,
                                .rows = out,
                                .columns = kPanels * kPanel,
                                .cache = {},
                                .rounded = {}},
                        .panels_per_block = 1};
  // By warpgroups with tiles of some size, or by warps. What a kernel leaves out is not a number.
  const auto multiply = [&](std::optional<int> size) {
    device.fill(operands, 0xFF, sizes.operands);
    device.fill(out.data, 0xFF, sizes.out);
    const Order order = size ? Order::kCores : Order::kFragments;
    kernels.make_operands(device, order, operands, row_scales, in, {}, kSampleRows, sizes.depth, sizes.tiles);
    if (size) {
      kernels.linear_warpgroup_sized(device, task, *size);
    } else {
      kernels.linear_many(device, task);
    }
    std::vector<std::byte> bytes(sizes.out);
    device.download(bytes.data(), out.data, sizes.out);
    device.synchronize();
    return bytes;
  };
  const std::vector<std::byte> expected = multiply(std::nullopt);
  for (int size = 0; size < kWarpgroupSizes; ++size) {
    if (multiply(size) != expected) return false;
  }
  return true;
}

}  // namespace gptx::cuda
