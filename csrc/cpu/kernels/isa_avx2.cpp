// AVX2 and FMA: Haswell, Zen and later.
#define GPTX_ISA avx2
#include "cpu/kernels/vec_avx2.h"
// The order matters: each header uses what stands above it.
#include "cpu/kernels/functions.h"
#include "cpu/kernels/matmul_f32.h"
#include "cpu/kernels/rowwise.h"
#include "cpu/kernels/attention_f32.h"
#include "cpu/kernels/probe.h"
#include "cpu/kernels/make_table.h"

namespace gptx::cpu {

extern const KernelTable k_avx2_kernels;
constinit const KernelTable k_avx2_kernels = GPTX_ISA::make_table("avx2");

}  // namespace gptx::cpu
