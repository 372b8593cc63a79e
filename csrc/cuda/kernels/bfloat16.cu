#include "cuda/kernels/make_table.h"

namespace gptx::cuda {

constinit const MatmulKernels k_bfloat16_matmul = make_matmul<BFloat16Product>();
constinit const AttentionKernels k_bfloat16_attention = make_attention<BFloat16Product>();

}  // namespace gptx::cuda
