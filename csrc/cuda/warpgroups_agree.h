// Whether products of warpgroups have the bits of those of warps on this device.
#pragma once

#include "cuda/device.h"
#include "cuda/kernel_table.h"

namespace gptx::cuda {

// Nothing documents that wgmma and mma.sync add up alike, and a row must not depend on how many others there are: where
// random rows tell the two apart, or warpgroups are not to be had, mma.sync multiplies all rows. GPTX_CUDA_WGMMA=0
// asks for that.
bool warpgroups_agree(Device& device, const MatmulKernels& kernels);

}  // namespace gptx::cuda
