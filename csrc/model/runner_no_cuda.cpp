// The CUDA runner of a build without CUDA.
#include "core/error.h"
#include "model/runner.h"

namespace gptx {

std::unique_ptr<Runner> make_cuda_runner(const GptConfig&, const WeightSource&, const StepLimits&,
                                         size_t) {
  throw DeviceError("device 'cuda': this version of gptx has no CUDA backend; use device=\"cpu\"");
}

}  // namespace gptx
