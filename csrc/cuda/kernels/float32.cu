#include "cuda/kernels/make_table.h"

namespace gptx::cuda {

constinit const MatmulKernels k_float32_matmul = make_matmul<Float32Product>();
constinit const AttentionKernels k_float32_attention = make_attention<Float32Product>();

}  // namespace gptx::cuda
