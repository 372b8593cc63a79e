#include "cuda/kernels/make_table.h"

namespace gptx::cuda {

constinit const MatmulKernels k_int8_matmul = make_matmul<Int8Product>();
constinit const AttentionKernels k_int8_attention = make_attention<Int8Product>();

}  // namespace gptx::cuda
