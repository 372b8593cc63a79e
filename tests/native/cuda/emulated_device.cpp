// The device of csrc/cuda/device.h on a CPU: memory of the host, and kernels on the emulator.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include "core/error.h"
#include "cuda/device.h"
#include "cuda/probe.h"
#include "emulator.h"

namespace gptx::cuda {
namespace {

struct Free {
  void operator()(std::byte* p) const { std::free(p); }
};

struct Item {
  bool kernel = false;
  LaunchShape shape = {};
  std::function<void()> run = {};  // a kernel's body, or a copy
};

// GPTX_EMULATED_SEED decides who runs when; GPTX_EMULATED_BYTES is the memory of the device, GPTX_EMULATED_CAPABILITY
// its compute capability.
uint64_t number_from_environment(const char* name, uint64_t otherwise) {
  const char* const text = std::getenv(name);
  return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
}

}  // namespace

class Device::Recording {
 public:
  std::vector<Item> items;
};

struct Device::State {
  DeviceProperties properties{"emulated", static_cast<int>(number_from_environment("GPTX_EMULATED_CAPABILITY", 90)), 4,
                              200 * 1024};
  std::vector<std::unique_ptr<std::byte[], Free>> memory;
  size_t free_bytes = number_from_environment("GPTX_EMULATED_BYTES", size_t{8} << 30);
  uint64_t seed = number_from_environment("GPTX_EMULATED_SEED", 1);
  std::vector<Item> queue;

  void* allocate(size_t bytes) {
    const size_t rounded = (std::max<size_t>(bytes, 1) + 255) / 256 * 256;
    auto* const p = static_cast<std::byte*>(std::aligned_alloc(256, rounded));
    std::memset(p, 0, rounded);
    memory.emplace_back(p);
    return p;
  }
};

Device::Device(int) : state_(std::make_unique<State>()) {}
Device::~Device() = default;

const DeviceProperties& Device::properties() const { return state_->properties; }
size_t Device::free_bytes() const { return state_->free_bytes; }

void* Device::allocate(size_t bytes, const char* what) {
  if (bytes > state_->free_bytes) throw OutOfMemoryError(what, bytes, state_->free_bytes);
  state_->free_bytes -= bytes;
  return state_->allocate(bytes);
}
void* Device::allocate_host(size_t bytes) { return state_->allocate(bytes); }

void Device::upload(void* device, const void* host, size_t bytes) {
  state_->queue.push_back({.run = [=] { std::memcpy(device, host, bytes); }});
}
void Device::download(void* host, const void* device, size_t bytes) {
  state_->queue.push_back({.run = [=] { std::memcpy(host, device, bytes); }});
}
void Device::copy(void* to, const void* from, size_t bytes) {
  state_->queue.push_back({.run = [=] { std::memcpy(to, from, bytes); }});
}
void Device::fill(void* device, int byte, size_t bytes) {
  state_->queue.push_back({.run = [=] { std::memset(device, byte, bytes); }});
}
void Device::launch(const LaunchShape& shape, std::function<void()> kernel) {
  if (shape.shared_bytes > state_->properties.shared_bytes) {
    throw DeviceError("a block wants " + std::to_string(shape.shared_bytes) + " bytes of shared memory");
  }
  state_->queue.push_back({true, shape, std::move(kernel)});
}

void Device::synchronize() {
  const std::vector<Item> queue = std::exchange(state_->queue, {});
  const auto start = [&](const Item& item) {
    const emulator::Shape shape{static_cast<unsigned>(item.shape.x), static_cast<unsigned>(item.shape.y),
                                static_cast<unsigned>(item.shape.z), item.shape.threads,
                                item.shape.shared_bytes};
    return std::make_unique<emulator::Grid>(shape, item.run, ++state_->seed);
  };
  std::unique_ptr<emulator::Grid> next;
  for (size_t i = 0; i < queue.size(); ++i) {
    if (!queue[i].kernel) {
      queue[i].run();
      continue;
    }
    const std::unique_ptr<emulator::Grid> grid = next ? std::move(next) : start(queue[i]);
    if (i + 1 < queue.size() && queue[i + 1].kernel) {
      next = start(queue[i + 1]);
      next->begin();
    }
    grid->finish();
  }
}

void* Device::staging(size_t bytes) {
  synchronize();
  if (bytes == 0) return nullptr;
  return state_->allocate(bytes);
}

std::shared_ptr<Device::Recording> Device::record(const std::function<void()>& enqueue) {
  synchronize();
  enqueue();
  auto recording = std::make_shared<Recording>();
  recording->items = std::exchange(state_->queue, {});
  return recording;
}
void Device::run(const Recording& recording) {
  state_->queue.insert(state_->queue.end(), recording.items.begin(), recording.items.end());
}

void probe(gptx_cuda_probe& out) { out = {GPTX_CUDA_USABLE, 13000, 13000, 1, ""}; }

void describe_device(int index, gptx_cuda_device& out) {
  if (index != 0) throw DeviceError("device " + std::to_string(index) + ": expected 0, the emulated one");
  const uint64_t bytes = number_from_environment("GPTX_EMULATED_BYTES", uint64_t{8} << 30);
  const auto capability = static_cast<int32_t>(number_from_environment("GPTX_EMULATED_CAPABILITY", 90));
  out = {"emulated", capability, 4, capability >= 80, bytes, bytes};
}

}  // namespace gptx::cuda
