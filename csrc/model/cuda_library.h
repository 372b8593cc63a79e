// libgptx_cuda, opened when it is first asked for and never closed: it lies beside the extension module, in the folder
// _lib, or where GPTX_CUDA_LIB says.
#pragma once

#include <string>

#include "cuda/abi.h"

namespace gptx {

// "with CUDA for ..." or "without CUDA: ...", with the reason.
std::string cuda_build();

// Throws DeviceError where there is no library that fits this build. `path` names the file.
const gptx_cuda_api& cuda_library(const std::string& path);

// The library if its devices can be used now, else DeviceError with the reason.
const gptx_cuda_api& usable_cuda_library(const std::string& path);

}  // namespace gptx
