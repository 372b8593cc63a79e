// NEON with DotProd and I8MM of Armv8.6: Neoverse V1 and N2, Cortex-A510 and A710, Apple M2, and later.
#define GPTX_ISA neon_i8mm
// The order matters: each header uses what stands above it.
#include "cpu/kernels/vec_neon.h"
#include "cpu/kernels/dot_neon.h"
#include "cpu/kernels/dot_neon_dotprod.h"
#include "cpu/kernels/functions.h"
#include "cpu/kernels/products.h"
#include "cpu/kernels/product_bytes.h"
#include "cpu/kernels/tile.h"
#include "cpu/kernels/linear.h"
#include "cpu/kernels/linear_i8mm.h"
#include "cpu/kernels/attention.h"
#include "cpu/kernels/rowwise.h"
#include "cpu/kernels/probe.h"
#include "cpu/kernels/make_table.h"

namespace gptx::cpu {

extern const KernelTable k_neon_i8mm_kernels;
constinit const KernelTable k_neon_i8mm_kernels = [] {
  KernelTable table = GPTX_ISA::make_table<GPTX_ISA::BF16Product, GPTX_ISA::ByteProduct>("neon_i8mm");
  table.matmul[static_cast<size_t>(Precision::kInt8)] = GPTX_ISA::matrix_kernels<GPTX_ISA::MatrixPlanes>();
  table.matmul[static_cast<size_t>(Precision::kInt8Fast)] = GPTX_ISA::matrix_kernels<GPTX_ISA::MatrixBytes>();
  return table;
}();

}  // namespace gptx::cpu
