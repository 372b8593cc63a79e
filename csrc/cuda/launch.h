// Puts a kernel into the queue of a device.
#pragma once

#include <tuple>

#include "cuda/device.h"
#include "cuda/kernels/vocabulary.h"

namespace gptx::cuda {

template <class... P, class... A>
void launch(Device& device, const LaunchShape& shape, void (*kernel)(P...), const A&... arguments) {
#ifdef GPTX_EMULATED_CUDA
  device.launch(shape, [=] { kernel(arguments...); });
#else
  std::tuple<P...> values(arguments...);
  std::apply(
      [&](P&... value) {
        void* pointers[] = {&value...};
        device.launch(shape, reinterpret_cast<const void*>(kernel), pointers);
      },
      values);
#endif
}

}  // namespace gptx::cuda
