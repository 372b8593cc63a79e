// What can be said of the driver and its devices before one is used.
#pragma once

#include "cuda/abi.h"

namespace gptx::cuda {

void probe(gptx_cuda_probe& out);
void describe_device(int index, gptx_cuda_device& out);

}  // namespace gptx::cuda
