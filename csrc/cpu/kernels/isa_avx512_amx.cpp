// AVX-512 with VNNI and BF16, and AMX for int8: Sapphire Rapids and later.
#define GPTX_ISA avx512_amx
// The order matters: each header uses what stands above it.
#include "cpu/kernels/vec_avx512.h"
#include "cpu/kernels/dot_avx512_vnni.h"
#include "cpu/kernels/dot_avx512_bf16.h"
#include "cpu/kernels/functions.h"
#include "cpu/kernels/products.h"
#include "cpu/kernels/product_bytes.h"
#include "cpu/kernels/product_bf16.h"
#include "cpu/kernels/tile.h"
#include "cpu/kernels/linear.h"
#include "cpu/kernels/linear_amx.h"
#include "cpu/kernels/attention.h"
#include "cpu/kernels/rowwise.h"
#include "cpu/kernels/probe.h"
#include "cpu/kernels/make_table.h"

namespace gptx::cpu {

extern const KernelTable k_avx512_amx_kernels;
constinit const KernelTable k_avx512_amx_kernels = [] {
  KernelTable table =
      GPTX_ISA::make_table<GPTX_ISA::BF16DotProduct, GPTX_ISA::ByteProduct>("avx512_amx");
  table.matmul[static_cast<size_t>(Precision::kInt8)] = GPTX_ISA::amx_kernels<GPTX_ISA::AmxPlanes>();
  table.matmul[static_cast<size_t>(Precision::kInt8Fast)] = GPTX_ISA::amx_kernels<GPTX_ISA::AmxBytes>();
  return table;
}();

}  // namespace gptx::cpu
