#include "cuda/kernels/make_table.h"

namespace gptx::cuda {

constinit const MatmulKernels k_int8_fast_matmul = make_matmul<Int8FastProduct>();

}  // namespace gptx::cuda
