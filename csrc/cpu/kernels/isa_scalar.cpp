// Any CPU: the vocabulary without SIMD, and the definition of the others.
#define GPTX_ISA scalar
#include "cpu/kernels/vec_scalar.h"
// The order matters: each header uses what stands above it.
#include "cpu/kernels/functions.h"
#include "cpu/kernels/matmul_f32.h"
#include "cpu/kernels/rowwise.h"
#include "cpu/kernels/attention_f32.h"
#include "cpu/kernels/probe.h"
#include "cpu/kernels/make_table.h"

namespace gptx::cpu {

extern const KernelTable k_scalar_kernels;
constinit const KernelTable k_scalar_kernels = GPTX_ISA::make_table("scalar");

}  // namespace gptx::cpu
