#include "core/thread_team.h"

#include <unistd.h>

#include <cfenv>
#include <chrono>
#include <system_error>
#include <thread>

namespace gptx {
namespace {

constexpr int kSpins = 2000;      // tens of microseconds, about the length of a short operation
constexpr int kYields = 200;      // then the processor is offered to others, then given up
constexpr int64_t kQuestionIntervalNs = 10'000'000;

void pause() noexcept {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until `word` differs from `old`: spinning, then yielding, then asleep. Never spins for long.
void wait_for_change(const std::atomic<uint32_t>& word, uint32_t old) noexcept {
  for (int i = 0; i < kSpins; ++i) {
    if (word.load(std::memory_order_acquire) != old) return;
    pause();
  }
  for (int i = 0; i < kYields; ++i) {
    if (word.load(std::memory_order_acquire) != old) return;
    std::this_thread::yield();
  }
  word.wait(old, std::memory_order_acquire);
}

int64_t now_ns() noexcept {
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment() noexcept {
    std::fegetenv(&saved_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatEnvironment() { std::fesetenv(&saved_); }

 private:
  std::fenv_t saved_;
};

}  // namespace

struct ThreadTeam::Workers {
  std::vector<std::thread> threads;
};

ThreadTeam::ThreadTeam(int threads) : size_(threads) { start_workers(); }

void ThreadTeam::start_workers() {
  owner_process_ = ::getpid();
  call_ = 0;
  phase_ = 0;
  arrived_ = 0;
  workers_ = std::make_unique<Workers>();
  cursors_ = std::make_unique<Cursor[]>(static_cast<size_t>(size_));
  for (int rank = 1; rank < size_; ++rank) {
    try {
      workers_->threads.emplace_back([this, rank] { work(rank); });
    } catch (const std::system_error&) {
      size_ = rank;
    }
  }
}

ThreadTeam::~ThreadTeam() {
  if (::getpid() != owner_process_) {
    // The threads stayed in the parent process; there is nothing here to join.
    static_cast<void>(workers_.release());
    return;
  }
  closing_ = true;
  call_.fetch_add(1, std::memory_order_release);
  call_.notify_all();
  for (std::thread& thread : workers_->threads) thread.join();
}

bool ThreadTeam::run(const std::function<void(int)>& body,
                     const std::function<bool()>& interrupted) {
  if (::getpid() != owner_process_) {
    static_cast<void>(workers_.release());
    start_workers();
  }
  const DefaultFloatEnvironment environment;
  body_ = &body;
  interrupted_ = interrupted ? &interrupted : nullptr;
  next_question_ns_ = now_ns() + kQuestionIntervalNs;
  stop_.store(false, std::memory_order_relaxed);
  call_.fetch_add(1, std::memory_order_release);
  call_.notify_all();
  body(0);
  barrier();
  return !stop_.load(std::memory_order_relaxed);
}

void ThreadTeam::work(int rank) noexcept {
  std::fesetenv(FE_DFL_ENV);
  for (uint32_t seen = 0;; ++seen) {
    wait_for_change(call_, seen);
    if (closing_) return;
    (*body_)(rank);
    barrier();
  }
}

void ThreadTeam::barrier() noexcept {
  const uint32_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
    for (int i = 0; i < size_; ++i) {
      cursors_[static_cast<size_t>(i)].taken.store(0, std::memory_order_relaxed);
    }
    arrived_.store(0, std::memory_order_relaxed);
    phase_.fetch_add(1, std::memory_order_release);
    phase_.notify_all();
  } else {
    wait_for_change(phase_, phase);
  }
}

bool ThreadTeam::stopped(int rank) noexcept {
  if (rank == 0 && interrupted_ != nullptr) {
    const int64_t now = now_ns();
    if (now >= next_question_ns_) {
      next_question_ns_ = now + kQuestionIntervalNs;
      if ((*interrupted_)()) stop_.store(true, std::memory_order_relaxed);
    }
  }
  return stop_.load(std::memory_order_relaxed);
}

}  // namespace gptx
