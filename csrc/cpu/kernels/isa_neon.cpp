// NEON of Armv8-A: every 64-bit ARM.
#define GPTX_ISA neon
// The order matters: each header uses what stands above it.
#include "cpu/kernels/vec_neon.h"
#include "cpu/kernels/dot_neon.h"
#include "cpu/kernels/functions.h"
#include "cpu/kernels/products.h"
#include "cpu/kernels/tile.h"
#include "cpu/kernels/linear.h"
#include "cpu/kernels/attention.h"
#include "cpu/kernels/rowwise.h"
#include "cpu/kernels/probe.h"
#include "cpu/kernels/make_table.h"

namespace gptx::cpu {

extern const KernelTable k_neon_kernels;
constinit const KernelTable k_neon_kernels =
    GPTX_ISA::make_table<GPTX_ISA::BF16Product, GPTX_ISA::Int8FastProduct>("neon");

}  // namespace gptx::cpu
