#include "emulator.h"

#include <algorithm>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the registers that a call keeps on this stack, and goes on with another one.
extern "C" void gptx_switch_stack(void** save, void* load);
__asm__(
    ".text\n"
    ".globl gptx_switch_stack\n"
    "gptx_switch_stack:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n");

namespace gptx::cuda::emulator {
namespace {

constexpr size_t kStackBytes = 96 * 1024;
constexpr size_t kResident = 2;  // blocks of a grid that run at the same time

struct Host {
  void* stack_pointer = nullptr;
  void* sanitizer_stack = nullptr;
  const void* bottom = nullptr;
  size_t bytes = 0;
};

thread_local Host host;
thread_local Fiber* running = nullptr;
thread_local Grid* running_grid = nullptr;
thread_local std::exception_ptr failure;
thread_local const std::function<void()>* body = nullptr;
thread_local std::vector<std::unique_ptr<std::byte[]>> spare_stacks;

void to_host([[maybe_unused]] bool for_ever) {
  Fiber* const me = running;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_ever ? nullptr : &me->sanitizer_stack, host.bottom, host.bytes);
#endif
  gptx_switch_stack(&me->stack_pointer, host.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(me->sanitizer_stack, &host.bottom, &host.bytes);
#endif
}

void to_fiber(Fiber& f) {
  running = &f;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&host.sanitizer_stack, f.stack.get(), kStackBytes);
#endif
  gptx_switch_stack(&host.stack_pointer, f.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(host.sanitizer_stack, nullptr, nullptr);
#endif
  running = nullptr;
}

Warpgroup& my_warpgroup() { return running->block->warpgroups[static_cast<size_t>(running->thread / (4 * kLanes))]; }

void multiply_until(Warpgroup& group, size_t end) {
  for (; group.done < end; ++group.done) group.products[group.done].multiply(group.products[group.done]);
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &host.bottom, &host.bytes);
#endif
  try {
    (*body)();
    for (const auto& group : running->copies) {
      if (!group.empty()) throw std::logic_error("a kernel ended before its copies");
    }
    if (running->products > my_warpgroup().done) throw std::logic_error("a kernel ended before its products");
  } catch (...) {
    failure = std::current_exception();
  }
  running->done = true;
  to_host(true);
}

void release_barrier(Block& block) {
  for (Fiber* f : std::exchange(block.waiting, {})) make_ready(f);
}

}  // namespace

struct Scheduler {
  static void make_ready(Grid& g, Fiber* f) { g.ready_.push_back(f); }
  static void park(Grid& g, Fiber* f) { g.parked_.push_back(f); }
  static bool front_complete(const Grid& g) { return g.front_complete_; }
  static uint64_t random(Grid& g) { return g.random_(); }
};

Fiber& current() { return *running; }
Grid& grid() { return *running_grid; }
void suspend() { to_host(false); }
void make_ready(Fiber* f) { Scheduler::make_ready(*running_grid, f); }
uint64_t random_number() { return Scheduler::random(*running_grid); }

void sync_block() {
  Block& block = *running->block;
  if (static_cast<int>(block.waiting.size()) + 1 == block.alive) {
    release_barrier(block);
  } else {
    block.waiting.push_back(running);
    suspend();
  }
}

void ask_for_product(const void* operation, void* c, const uint32_t* a, uint64_t b, bool adds,
                     std::function<void(const Product&)> multiply) {
  Fiber& me = *running;
  Warpgroup& group = my_warpgroup();
  if (!me.published) throw std::logic_error("a product of what was not published to warpgroups");
  if (!me.products_begun) throw std::logic_error("a product that was not begun");
  if (me.products == group.products.size()) {
    group.products.push_back({.operation = operation, .b = b, .adds = adds, .multiply = std::move(multiply)});
  }
  Product& product = group.products[me.products++];
  if (product.operation != operation || product.b != b || product.adds != adds) {
    throw std::logic_error("the threads of a warpgroup ask for different products");
  }
  const int lane = me.thread % (4 * kLanes);
  product.c[lane] = c;
  product.a[lane] = a;
  if (++product.asked < 4 * kLanes) return;
  if (random_number() % 2 == 0) multiply_until(group, me.products);
  for (Fiber* f : std::exchange(group.waiting, {})) make_ready(f);
}

void wait_for_products(size_t pending) {
  Fiber& me = *running;
  if (me.closed.size() <= pending) return;
  const size_t end = me.closed[me.closed.size() - 1 - pending];
  Warpgroup& group = my_warpgroup();
  while (end > 0 && group.products[end - 1].asked < 4 * kLanes) {
    group.waiting.push_back(&me);
    suspend();
  }
  multiply_until(group, end);
}

void wait_for_previous_kernel() {
  running->waited = true;
  if (Scheduler::front_complete(*running_grid)) return;
  Scheduler::park(*running_grid, running);
  suspend();
}

Grid::Grid(const Shape& s, std::function<void()> kernel, uint64_t seed)
    : shape(s), kernel_(std::move(kernel)), random_(seed) {
  if (shape.threads % kLanes != 0) throw std::logic_error("a block of partial warps");
  order_.resize(size_t{shape.x} * shape.y * shape.z);
  for (size_t i = 0; i < order_.size(); ++i) order_[i] = static_cast<uint32_t>(i);
  std::shuffle(order_.begin(), order_.end(), random_);
}

void Grid::start_block() {
  const uint32_t index = order_.back();
  order_.pop_back();
  auto block = std::make_unique<Block>();
  block->x = index % shape.x;
  block->y = index / shape.x % shape.y;
  block->z = index / shape.x / shape.y;
  // Exactly as long as asked for, so that the address sanitizer sees its end.
  void* shared = nullptr;
  if (posix_memalign(&shared, 128, shape.shared_bytes) != 0) throw std::bad_alloc();
  block->shared.reset(static_cast<std::byte*>(shared));
  std::memset(block->shared.get(), 0xCD, shape.shared_bytes);
  block->warps.resize(static_cast<size_t>(shape.threads / kLanes));
  block->warpgroups.resize((block->warps.size() + 3) / 4);
  block->fibers.resize(static_cast<size_t>(shape.threads));
  block->alive = shape.threads;
  for (int t = 0; t < shape.threads; ++t) {
    Fiber& f = block->fibers[static_cast<size_t>(t)];
    f.block = block.get();
    f.warp = &block->warps[static_cast<size_t>(t / kLanes)];
    f.thread = t;
    if (spare_stacks.empty()) {
      f.stack = std::make_unique_for_overwrite<std::byte[]>(kStackBytes);
    } else {
      f.stack = std::move(spare_stacks.back());
      spare_stacks.pop_back();
    }
    auto top = (reinterpret_cast<uintptr_t>(f.stack.get()) + kStackBytes) & ~uintptr_t{15};
    void** slot = reinterpret_cast<void**>(top);
    *--slot = nullptr;
    *--slot = reinterpret_cast<void*>(&fiber_main);
    for (int r = 0; r < 6; ++r) *--slot = nullptr;
    f.stack_pointer = slot;
    ready_.push_back(&f);
  }
  alive_ += static_cast<size_t>(shape.threads);
  blocks_.push_back(std::move(block));
}

Fiber* Grid::pick() {
  if (held_for_-- <= 0 && !blocks_.empty()) {
    Block& block = *blocks_[random_() % blocks_.size()];
    held_ = &block.warps[random_() % block.warps.size()];
    held_for_ = static_cast<int>(random_() % 4000);
  }
  for (int attempt = 0; attempt < 8; ++attempt) {
    const size_t i = random_() % ready_.size();
    if (ready_[i]->warp == held_ && attempt < 7) continue;
    std::swap(ready_[i], ready_.back());
    Fiber* const f = ready_.back();
    ready_.pop_back();
    return f;
  }
  return nullptr;
}

void Grid::run_ready() {
  Grid* const outer = std::exchange(running_grid, this);
  while (!ready_.empty()) {
    Fiber* const f = pick();
    body = &kernel_;
    to_fiber(*f);
    if (failure) {
      running_grid = outer;
      std::rethrow_exception(std::exchange(failure, nullptr));
    }
    if (!f->done) continue;
    if (!f->waited) throw std::logic_error("a thread ended without waiting for the kernel in front");
    --alive_;
    Block& block = *f->block;
    spare_stacks.push_back(std::move(f->stack));
    if (--block.alive > 0 && static_cast<int>(block.waiting.size()) == block.alive) {
      release_barrier(block);
    }
    if (block.alive == 0) {
      std::erase_if(blocks_, [&](const auto& b) { return b.get() == &block; });
      held_ = nullptr;
      if (front_complete_ && !order_.empty()) start_block();
    }
  }
  running_grid = outer;
}

void Grid::begin() {
  while (blocks_.size() < kResident && !order_.empty()) start_block();
  run_ready();
}

void Grid::finish() {
  front_complete_ = true;
  while (blocks_.size() < kResident && !order_.empty()) start_block();
  for (Fiber* f : std::exchange(parked_, {})) ready_.push_back(f);
  run_ready();
  if (alive_ > 0) throw std::logic_error(std::to_string(alive_) + " threads wait for ever");
}

}  // namespace gptx::cuda::emulator
