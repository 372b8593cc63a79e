#include "cuda/device.h"

#include <cuda_runtime.h>

#include <unistd.h>

#include <map>
#include <utility>
#include <vector>

#include "core/error.h"

namespace gptx::cuda {
namespace {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  // Clears what is not lasting, so that the next call does not report it again.
  static_cast<void>(cudaGetLastError());
  throw DeviceError(std::string("CUDA: ") + what + ": " + cudaGetErrorString(status) + " (" + cudaGetErrorName(status) +
                    ")");
}

// From this capability on a kernel can begin before the one in front has ended.
constexpr int kOverlap = 90;

}  // namespace

class Device::Recording {
 public:
  Recording(int device, pid_t process) : device_(device), process_(process) {}
  ~Recording() {
    if (executable == nullptr || getpid() != process_ || cudaSetDevice(device_) != cudaSuccess) return;
    static_cast<void>(cudaGraphExecDestroy(executable));
  }
  cudaGraphExec_t executable = nullptr;

 private:
  int device_;
  pid_t process_;
};

struct Device::State {
  int ordinal = 0;
  pid_t process = getpid();
  DeviceProperties properties;
  cudaStream_t stream = nullptr;
  std::vector<void*> memory, host_memory;
  void* staging = nullptr;
  size_t staging_bytes = 0;
  bool after_kernel = false;             // whether the last thing in the queue is a kernel
  bool preparing = false;                // kernels are made ready and nothing is put into the queue
  std::map<const void*, bool> overlaps;  // of the kernels that are ready: whether the code waits for the kernel in front

  // Loads a kernel and gives it all the shared memory that there is. Code of an older architecture has no wait.
  bool ready(const void* kernel) {
    const auto found = overlaps.find(kernel);
    if (found != overlaps.end()) return found->second;
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, kernel), "loading a kernel");
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(properties.shared_bytes)),
          "giving a kernel more shared memory");
    // All alike: a multiprocessor is empty before it shares out its memory in another way.
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
          "sharing out its memory");
    const bool overlap = properties.capability >= kOverlap && attributes.ptxVersion >= kOverlap;
    return overlaps[kernel] = overlap;
  }

  // Every use begins here: the device is per thread, and no context survives a fork.
  void use() {
    if (getpid() != process) {
      throw DeviceError(
          "CUDA was opened before this process was forked, which it does not survive; start processes with the "
          "method \"spawn\", or load the model in the child");
    }
    check(cudaSetDevice(ordinal), "choosing the device");
  }
};

Device::Device(int ordinal) : state_(std::make_unique<State>()) {
  state_->ordinal = ordinal;
  state_->use();
  cudaDeviceProp p;
  check(cudaGetDeviceProperties(&p, ordinal), "reading its properties");
  state_->properties = {p.name, 10 * p.major + p.minor, p.multiProcessorCount, p.sharedMemPerBlockOptin};
  check(cudaStreamCreateWithFlags(&state_->stream, cudaStreamNonBlocking), "making a stream");
}

Device::~Device() {
  if (getpid() != state_->process) return;
  // At the end of a process the driver may be gone already; then there is nothing left to free.
  if (cudaSetDevice(state_->ordinal) != cudaSuccess) return;
  static_cast<void>(cudaStreamSynchronize(state_->stream));
  static_cast<void>(cudaStreamDestroy(state_->stream));
  for (void* p : state_->memory) static_cast<void>(cudaFree(p));
  for (void* p : state_->host_memory) static_cast<void>(cudaFreeHost(p));
  static_cast<void>(cudaFree(state_->staging));
}

const DeviceProperties& Device::properties() const { return state_->properties; }

size_t Device::free_bytes() const {
  state_->use();
  size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "asking for its free memory");
  return free;
}

void* Device::allocate(size_t bytes, const char* what) {
  state_->use();
  void* p = nullptr;
  bytes = bytes == 0 ? 1 : bytes;
  const cudaError_t status = cudaMalloc(&p, bytes);
  if (status == cudaErrorMemoryAllocation) {
    static_cast<void>(cudaGetLastError());
    throw OutOfMemoryError(std::string(what) + " on the device", bytes, free_bytes());
  }
  check(status, "allocating memory");
  state_->memory.push_back(p);
  fill(p, 0, bytes);
  return p;
}

void* Device::staging(size_t bytes) {
  synchronize();
  if (bytes > state_->staging_bytes || bytes == 0) {
    check(cudaFree(std::exchange(state_->staging, nullptr)), "freeing memory");
    state_->staging_bytes = 0;
    if (bytes == 0) return nullptr;
    check(cudaMalloc(&state_->staging, bytes), "allocating memory to pack weights");
    state_->staging_bytes = bytes;
  }
  return state_->staging;
}

void* Device::allocate_host(size_t bytes) {
  state_->use();
  void* p = nullptr;
  check(cudaMallocHost(&p, bytes == 0 ? 1 : bytes), "allocating memory of the host");
  state_->host_memory.push_back(p);
  return p;
}

void Device::upload(void* device, const void* host, size_t bytes) {
  state_->use();
  state_->after_kernel = false;
  check(cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, state_->stream), "copying to the device");
}

void Device::download(void* host, const void* device, size_t bytes) {
  state_->use();
  state_->after_kernel = false;
  check(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, state_->stream), "copying from the device");
}

void Device::copy(void* to, const void* from, size_t bytes) {
  state_->use();
  state_->after_kernel = false;
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, state_->stream), "copying on the device");
}

void Device::fill(void* device, int byte, size_t bytes) {
  state_->use();
  state_->after_kernel = false;
  check(cudaMemsetAsync(device, byte, bytes, state_->stream), "filling memory");
}

void Device::launch(const LaunchShape& shape, const void* kernel, void** arguments) {
  State& s = *state_;
  s.use();
  if (shape.shared_bytes > s.properties.shared_bytes) {
    throw DeviceError("CUDA: a kernel wants " + std::to_string(shape.shared_bytes) + " bytes of shared memory, and " +
                      s.properties.name + " has " + std::to_string(s.properties.shared_bytes));
  }
  const bool overlaps = s.ready(kernel);
  if (s.preparing) return;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.x), static_cast<unsigned>(shape.y), static_cast<unsigned>(shape.z));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = s.stream;
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  config.numAttrs = s.after_kernel && overlaps ? 1 : 0;
  check(cudaLaunchKernelExC(&config, kernel, arguments), "launching a kernel");
  s.after_kernel = true;
}

void Device::synchronize() {
  state_->use();
  check(cudaStreamSynchronize(state_->stream), "running the queue");
}

std::shared_ptr<Device::Recording> Device::record(const std::function<void()>& enqueue) {
  state_->use();
  // Nothing may be loaded while the queue is recorded.
  state_->preparing = true;
  try {
    enqueue();
  } catch (...) {
    state_->preparing = false;
    throw;
  }
  state_->preparing = false;
  state_->after_kernel = false;
  check(cudaStreamBeginCapture(state_->stream, cudaStreamCaptureModeThreadLocal), "recording a step");
  cudaGraph_t graph = nullptr;
  try {
    enqueue();
  } catch (...) {
    static_cast<void>(cudaStreamEndCapture(state_->stream, &graph));
    if (graph != nullptr) static_cast<void>(cudaGraphDestroy(graph));
    static_cast<void>(cudaGetLastError());
    throw;
  }
  check(cudaStreamEndCapture(state_->stream, &graph), "recording a step");
  auto recording = std::make_shared<Recording>(state_->ordinal, state_->process);
  const cudaError_t status = cudaGraphInstantiate(&recording->executable, graph, 0);
  static_cast<void>(cudaGraphDestroy(graph));
  check(status, "preparing a recorded step");
  state_->after_kernel = false;
  return recording;
}

void Device::run(const Recording& recording) {
  state_->use();
  state_->after_kernel = false;
  check(cudaGraphLaunch(recording.executable, state_->stream), "running a recorded step");
}

}  // namespace gptx::cuda
