// The kernels of one precision, launched. Each kernels/<name>.cu makes one table, for all architectures of the build.
#pragma once

#include "core/precision.h"
#include "cuda/device.h"
#include "cuda/kernels/attention.h"
#include "cuda/kernels/linear.h"

namespace gptx::cuda {

// Rows up to which weights are read once for all of them (linear_few); beyond, outputs are tiled (linear_many).
inline constexpr int kFewRows = 64;
inline constexpr int kWarpgroupSizes = 4;

struct MatmulKernels {
  int inputs;                // of a word of weights
  size_t operand_tile_bytes;
  bool scales_rows;          // whether all of a row has to be seen to round it
  void (*make_operands)(Device&, Order order, std::byte* operands, RowScale* scales, const RowsView& in,
                        const Norm& norm, int rows, int columns, int tiles);
  // Whether linear_few can make the operands of these rows itself.
  bool (*makes_operands)(const Device&, const LinearTask&);
  // With operands made before, unless it makes them. Returns how many blocks of threads there are for each row.
  size_t (*linear_few)(Device&, const LinearTask&);
  bool (*fits_few)(const Device&, const LinearTask&);  // whether a block of it finds room on the device
  void (*linear_many)(Device&, const LinearTask&);
  // The same from operands in cores, on compute capability 9.0; null where the precision has none. The second does it
  // with tiles of one of several sizes.
  void (*linear_warpgroup)(Device&, const LinearTask&);
  void (*linear_warpgroup_sized)(Device&, const LinearTask&, int size);
};

// Of a KV cache of this type.
struct AttentionKernels {
  int inputs;
  bool (*has_many)(const Device&, const KvLayout&);
  void (*many)(Device&, const AttentionTask&, size_t queries);
  void (*few)(Device&, const AttentionTask&, size_t queries, size_t blocks);
};

const MatmulKernels& matmul_kernels(Precision precision);
const AttentionKernels& attention_kernels(KvType type);

extern const MatmulKernels k_float32_matmul, k_bfloat16_matmul, k_int8_matmul, k_int8_fast_matmul;
extern const AttentionKernels k_float32_attention, k_bfloat16_attention, k_int8_attention;

}  // namespace gptx::cuda
