// A team of threads that run one function together (SPMD): the caller is member 0, the others wait
// between calls. Inside, work is shared out by for_each, which ends in a barrier.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

namespace gptx {

class ThreadTeam {
 public:
  // Starts threads - 1 workers; fewer where the system refuses to start more.
  explicit ThreadTeam(int threads);
  ~ThreadTeam();
  ThreadTeam(const ThreadTeam&) = delete;
  ThreadTeam& operator=(const ThreadTeam&) = delete;

  int size() const noexcept { return size_; }

  // Calls body(rank) on every member and returns when all are done. `body` must not throw. The
  // floating-point environment is the default one inside and the caller's again afterwards.
  // `interrupted` is asked by the caller's thread every few milliseconds; once it says yes, the
  // remaining pieces of every for_each are skipped. Returns false if that happened.
  // One call at a time; after a fork the child starts workers of its own.
  bool run(const std::function<void(int rank)>& body,
           const std::function<bool()>& interrupted = {});

  // Calls f(i) once for each i in [0, n), spread over the members, then waits for all of them. Every
  // member must call it with the same n. A member works through its own contiguous range, the same
  // for the same n, taking half of what is left at a time, then helps the others, a piece at a time.
  template <class F>
  void for_each(int rank, size_t n, F&& f) noexcept {
    for (int turn = 0; turn < size_; ++turn) {
      const int owner = (rank + turn) % size_;
      const size_t begin = n * static_cast<size_t>(owner) / static_cast<size_t>(size_);
      const size_t end = n * (static_cast<size_t>(owner) + 1) / static_cast<size_t>(size_);
      std::atomic<size_t>& next = cursors_[static_cast<size_t>(owner)].taken;
      size_t taken = next.load(std::memory_order_relaxed);
      while (begin + taken < end && !stopped(rank)) {
        const size_t left = end - begin - taken;
        const size_t share = owner == rank ? (left + 1) / 2 : 1;
        if (!next.compare_exchange_weak(taken, taken + share, std::memory_order_relaxed)) continue;
        for (size_t i = begin + taken; i < begin + taken + share; ++i) f(i);
        taken = next.load(std::memory_order_relaxed);
      }
    }
    barrier();
  }

  // Waits until every member has called it.
  void barrier() noexcept;

 private:
  struct alignas(64) Cursor {
    std::atomic<size_t> taken{0};
  };
  struct Workers;

  bool stopped(int rank) noexcept;
  void start_workers();
  void work(int rank) noexcept;

  std::unique_ptr<Workers> workers_;
  std::unique_ptr<Cursor[]> cursors_;
  int size_ = 1;
  int owner_process_ = 0;
  const std::function<void(int)>* body_ = nullptr;
  const std::function<bool()>* interrupted_ = nullptr;
  int64_t next_question_ns_ = 0;

  alignas(64) std::atomic<uint32_t> call_{0};     // grows by one per run
  alignas(64) std::atomic<uint32_t> phase_{0};    // grows by one per barrier
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<bool> stop_{false};
  std::atomic<bool> closing_{false};
};

}  // namespace gptx
