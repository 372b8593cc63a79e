// Runs CUDA kernels on the CPU: every thread is a fiber with a stack of its own, a seed decides who runs next,
// and one warp at a time is held back, since fair schedules hide missing barriers. Copies that a kernel does not
// wait for land as late as they may, or at once. A kernel begins before the one in front of it has run, up to
// where it waits for it. Threads that wait for ever end in an exception.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace gptx::cuda::emulator {

inline constexpr int kLanes = 32;

struct Shape {
  unsigned x = 1, y = 1, z = 1;
  int threads = 32;
  size_t shared_bytes = 0;
};

struct Block;
struct Warp;

struct Fiber {
  void* stack_pointer = nullptr;
  std::unique_ptr<std::byte[]> stack;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int thread = 0;
  bool waited = false;  // for the kernel in front
  bool done = false;
  struct Copy {
    void* to;
    unsigned char bytes[16];
  };
  std::vector<std::vector<Copy>> copies = {{}};  // groups, the last one open
  bool published = true;              // whether products of warpgroups may see what was copied
  bool products_begun = false;
  size_t products = 0;                // of its warpgroup, that this thread has asked for
  std::vector<size_t> closed;         // how many it had asked for as it closed each group
  void* sanitizer_stack = nullptr;
};

struct Warp {
  int arrived = 0;
  const void* operation = nullptr;  // what the lanes that arrived ask for
  std::vector<Fiber*> waiting;
  alignas(64) std::byte in[kLanes][64];
  alignas(64) std::byte out[kLanes][64];
};

// A product of a warpgroup, which happens at any time between the last thread that asks for it and the first that waits
// for it. Until then its registers are read and written where they are.
struct Product {
  const void* operation = nullptr;
  uint64_t b = 0;
  bool adds = false;
  int asked = 0;
  void* c[4 * kLanes] = {};
  const uint32_t* a[4 * kLanes] = {};
  std::function<void(const Product&)> multiply = {};
};

struct Warpgroup {
  std::vector<Product> products;
  size_t done = 0;
  std::vector<Fiber*> waiting;
};

struct Free {
  void operator()(std::byte* p) const { std::free(p); }
};

struct Block {
  unsigned x, y, z;
  std::unique_ptr<std::byte[], Free> shared;
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  std::vector<Fiber> fibers;
  std::vector<Fiber*> waiting;  // at the barrier
  int alive = 0;
};

// One launch on its way.
class Grid {
 public:
  Grid(const Shape& shape, std::function<void()> kernel, uint64_t seed);
  // The first blocks, up to where they wait for the kernel in front.
  void begin();
  void finish();

  const Shape shape;

 private:
  friend struct Scheduler;
  void start_block();
  void run_ready();
  Fiber* pick();

  std::function<void()> kernel_;
  std::mt19937_64 random_;
  std::vector<uint32_t> order_;  // of the blocks still to start
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<Fiber*> ready_;
  std::vector<Fiber*> parked_;  // until the kernel in front is complete
  size_t alive_ = 0;
  bool front_complete_ = false;
  Warp* held_ = nullptr;
  int held_for_ = 0;
};

Fiber& current();
Grid& grid();
void suspend();             // gives up the CPU; someone else makes this fiber ready again
void make_ready(Fiber* f);
uint64_t random_number();

void sync_block();
void wait_for_previous_kernel();
// Asks for a product as one thread of a warpgroup, whose part of it is in c and a; waits for all but the last `pending`
// groups of them.
void ask_for_product(const void* operation, void* c, const uint32_t* a, uint64_t b, bool adds,
                     std::function<void(const Product&)> multiply);
void wait_for_products(size_t pending);

// A value from each lane in, one for each lane out, computed by whoever comes last.
template <class In, class Out, class F>
Out collective(const void* operation, const In& in, F compute) {
  static_assert(sizeof(In) <= 64 && sizeof(Out) <= 64);
  Fiber& me = current();
  Warp& warp = *me.warp;
  const int lane = me.thread % kLanes;
  if (warp.arrived == 0) warp.operation = operation;
  if (warp.operation != operation) throw std::logic_error("the lanes of a warp went different ways");
  std::memcpy(warp.in[lane], &in, sizeof in);
  if (++warp.arrived < kLanes) {
    warp.waiting.push_back(&me);
    suspend();
  } else {
    In ins[kLanes];
    Out outs[kLanes];
    for (int i = 0; i < kLanes; ++i) std::memcpy(&ins[i], warp.in[i], sizeof(In));
    compute(ins, outs);
    for (int i = 0; i < kLanes; ++i) std::memcpy(warp.out[i], &outs[i], sizeof(Out));
    warp.arrived = 0;
    for (Fiber* f : std::exchange(warp.waiting, {})) make_ready(f);
  }
  Out out;
  std::memcpy(&out, warp.out[lane], sizeof out);
  return out;
}

}  // namespace gptx::cuda::emulator
