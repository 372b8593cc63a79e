// NEON with DotProd of Armv8.2: Cortex-A55 and A76, Neoverse, Apple A13 and M1, and later.
#define GPTX_ISA neon_dotprod
// The order matters: each header uses what stands above it.
#include "cpu/kernels/vec_neon.h"
#include "cpu/kernels/dot_neon.h"
#include "cpu/kernels/dot_neon_dotprod.h"
#include "cpu/kernels/functions.h"
#include "cpu/kernels/products.h"
#include "cpu/kernels/product_bytes.h"
#include "cpu/kernels/tile.h"
#include "cpu/kernels/linear.h"
#include "cpu/kernels/attention.h"
#include "cpu/kernels/rowwise.h"
#include "cpu/kernels/probe.h"
#include "cpu/kernels/make_table.h"

namespace gptx::cpu {

extern const KernelTable k_neon_dotprod_kernels;
constinit const KernelTable k_neon_dotprod_kernels =
    GPTX_ISA::make_table<GPTX_ISA::BF16Product, GPTX_ISA::ByteProduct>("neon_dotprod");

}  // namespace gptx::cpu
