#include "cuda/probe.h"

#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <string>

#include "core/error.h"

namespace gptx::cuda {
namespace {

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// A kernel that every architecture of the build has.
__global__ void nothing() {}

}  // namespace

void probe(gptx_cuda_probe& out) {
  std::memset(&out, 0, sizeof out);
  out.runtime_version = CUDART_VERSION;
  int version = 0;
  static_cast<void>(cudaDriverGetVersion(&version));
  out.driver_version = version;
  int devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  static_cast<void>(cudaGetLastError());
  std::string message;
  if (status == cudaSuccess && devices > 0) {
    out.devices = devices;
    return;
  }
  if (status == cudaErrorInsufficientDriver && version == 0) {
    out.state = GPTX_CUDA_NO_DRIVER;
    message = "no NVIDIA driver: libcuda.so.1 was not found";
  } else if (status == cudaErrorInsufficientDriver) {
    out.state = GPTX_CUDA_DRIVER_TOO_OLD;
    message = "the NVIDIA driver is too old: it supports CUDA " + version_text(version) + ", this build needs " +
              version_text(CUDART_VERSION) + "; update the driver";
  } else if (status == cudaErrorNoDevice || status == cudaSuccess) {
    out.state = GPTX_CUDA_NO_DEVICE;
    message = "the NVIDIA driver finds no GPU; is CUDA_VISIBLE_DEVICES set, or the container started without GPUs?";
  } else if (status == cudaErrorStubLibrary || status == cudaErrorCallRequiresNewerDriver ||
             status == cudaErrorSharedObjectSymbolNotFound || status == cudaErrorSystemDriverMismatch) {
    out.state = GPTX_CUDA_DRIVER_BROKEN;
    message = std::string("libcuda.so.1 is not a whole driver (a stub, or that of another version): ") +
              cudaGetErrorString(status);
  } else if (status == cudaErrorInitializationError) {
    out.state = GPTX_CUDA_OTHER;
    message =
        "the NVIDIA driver does not start in this process; was CUDA used before it was forked? Start processes with "
        "the method \"spawn\"";
  } else {
    out.state = GPTX_CUDA_OTHER;
    message = std::string("the NVIDIA driver does not start: ") + cudaGetErrorString(status) + " (" +
              cudaGetErrorName(status) + ")";
  }
  std::snprintf(out.message, sizeof out.message, "%s", message.c_str());
}

void describe_device(int index, gptx_cuda_device& out) {
  std::memset(&out, 0, sizeof out);
  cudaDeviceProp p;
  cudaError_t status = cudaGetDeviceProperties(&p, index);
  if (status != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    throw DeviceError("device " + std::to_string(index) + ": " + cudaGetErrorString(status));
  }
  std::snprintf(out.name, sizeof out.name, "%s", p.name);
  out.capability = 10 * p.major + p.minor;
  out.multiprocessors = p.multiProcessorCount;
  out.total_bytes = p.totalGlobalMem;
  if (cudaSetDevice(index) == cudaSuccess) {
    cudaFuncAttributes attributes;
    out.usable = cudaFuncGetAttributes(&attributes, nothing) == cudaSuccess;
    size_t free = 0, total = 0;
    if (cudaMemGetInfo(&free, &total) == cudaSuccess) out.free_bytes = free;
  }
  static_cast<void>(cudaGetLastError());
}

}  // namespace gptx::cuda
