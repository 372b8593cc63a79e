#include "model/cuda_library.h"

#include <dlfcn.h>
#include <unistd.h>

#include <map>
#include <mutex>

#include "core/error.h"

namespace gptx {
namespace {

constexpr const char* kRemedy = "; use device=\"cpu\", or install gptx where nvcc is found, with GPTX_CUDA=ON";

}  // namespace

std::string cuda_build() { return GPTX_CUDA_BUILD; }

const gptx_cuda_api& cuda_library(const std::string& path) {
  static std::mutex mutex;
  static std::map<std::string, const gptx_cuda_api*> opened;
  const std::lock_guard lock(mutex);
  const gptx_cuda_api*& api = opened[path];
  if (api != nullptr) return *api;
  if (access(path.c_str(), R_OK) != 0) {
    throw DeviceError("device 'cuda': this gptx was built " + cuda_build() + ", and there is no " + path + kRemedy);
  }
  void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw DeviceError("device 'cuda': " + std::string(dlerror()));
  const auto get = reinterpret_cast<gptx_cuda_get_api_function>(dlsym(library, "gptx_cuda_get_api"));
  const gptx_cuda_api* const found = get == nullptr ? nullptr : get(GPTX_CUDA_ABI);
  if (found == nullptr || found->size != sizeof(gptx_cuda_api) || std::string(found->version) != GPTX_VERSION) {
    const std::string version = found == nullptr ? "another version" : found->version;
    throw DeviceError("device 'cuda': " + path + ": expected the library of gptx " GPTX_VERSION ", got that of " +
                      version + "; reinstall gptx");
  }
  api = found;
  return *api;
}

const gptx_cuda_api& usable_cuda_library(const std::string& path) {
  const gptx_cuda_api& api = cuda_library(path);
  gptx_cuda_probe probe;
  api.probe(&probe);
  if (probe.state != GPTX_CUDA_USABLE) throw DeviceError("device 'cuda': " + std::string(probe.message));
  return api;
}

}  // namespace gptx
