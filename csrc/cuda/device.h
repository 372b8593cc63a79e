// One GPU as the backend sees it: memory, and a queue of copies and kernels that runs in order. Implemented by
// the CUDA runtime (device.cu) and, for tests, on the CPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

namespace gptx::cuda {

// How a kernel is spread: blocks by threads, and shared memory of a block.
struct LaunchShape {
  size_t x = 1, y = 1, z = 1;
  int threads = 128;
  size_t shared_bytes = 0;
};

struct DeviceProperties {
  std::string name;
  int capability = 0;  // 90 for compute capability 9.0
  int multiprocessors = 0;
  size_t shared_bytes = 0;  // the most that a block can have
};

// Calls that fail throw DeviceError or OutOfMemoryError.
class Device {
 public:
  explicit Device(int ordinal);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  const DeviceProperties& properties() const;
  size_t free_bytes() const;

  // Memory that lives as long as the device, filled with zeros.
  void* allocate(size_t bytes, const char* what);
  // Memory for what is only passing through, good until the next call; 0 bytes give it back.
  void* staging(size_t bytes);
  // Memory of the host that copies can read or write while the queue runs.
  void* allocate_host(size_t bytes);

  // The queue. Host memory of a copy must stay until `synchronize`; outside a recording it may be of any kind.
  void upload(void* device, const void* host, size_t bytes);
  void download(void* host, const void* device, size_t bytes);
  void copy(void* to, const void* from, size_t bytes);  // both on the device
  void fill(void* device, int byte, size_t bytes);
  void launch(const LaunchShape& shape, const void* kernel, void** arguments);
  void launch(const LaunchShape& shape, std::function<void()> kernel);  // emulated
  void synchronize();

  // What `enqueue` puts into the queue, kept to be run again by `run`.
  class Recording;
  std::shared_ptr<Recording> record(const std::function<void()>& enqueue);
  void run(const Recording& recording);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace gptx::cuda
