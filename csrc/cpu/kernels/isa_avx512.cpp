// AVX-512 F, BW, DQ, VL: Skylake-SP, Zen 4 and later.
#define GPTX_ISA avx512
#include "cpu/kernels/vec_avx512.h"
// The order matters: each header uses what stands above it.
#include "cpu/kernels/functions.h"
#include "cpu/kernels/matmul_f32.h"
#include "cpu/kernels/rowwise.h"
#include "cpu/kernels/attention_f32.h"
#include "cpu/kernels/probe.h"
#include "cpu/kernels/make_table.h"

namespace gptx::cpu {

extern const KernelTable k_avx512_kernels;
constinit const KernelTable k_avx512_kernels = GPTX_ISA::make_table("avx512");

}  // namespace gptx::cpu
