// Requests in, tokens out. The engine owns the KV blocks and packs prefill chunks and decode rows of all
// requests into each step. Whoever waits for a token drives the engine: there is no thread behind it.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "engine/block_pool.h"
#include "model/runner.h"

namespace gptx {

struct RequestParams {
  SamplingParams sampling;
  size_t max_new_tokens = 128;
  size_t min_new_tokens = 0;
  std::vector<int32_t> end_tokens;  // generation stops before one of these
};

enum class Finish : uint8_t { kNone, kStop, kLength, kNonFinite };

// One step of one request: a token, the end, or both.
struct Event {
  int64_t request;
  int32_t token;  // -1 where there is none
  Finish finish;
};

using Interrupted = std::function<bool()>;

class Engine {
 public:
  Engine(std::unique_ptr<Runner> runner, const GptConfig& config, const StepLimits& limits,
         size_t kv_blocks);

  // Takes a request and returns its number. Throws OutOfMemoryError if it can never fit the KV cache.
  // Requires: 1 <= tokens.size() < block_size, ids inside the vocabulary.
  int64_t submit(std::span<const int32_t> tokens, const RequestParams& params);

  // Runs steps until one of `requests` has an event and returns all their events; empty if
  // interrupted. A request whose events wait to be fetched is not stepped further.
  std::vector<Event> advance(std::span<const int64_t> requests, const Interrupted& interrupted);

  // Forgets a request, finished or not; its blocks are free for the next step.
  void release(int64_t request);

  // The logits of all positions, out [T, V]. False if interrupted.
  // Requires: 1 <= tokens.size() <= block_size, ids inside the vocabulary.
  bool logits(std::span<const int32_t> tokens, float* out, const Interrupted& interrupted);

  // In the child of a fork, where another thread of the parent may have held the locks.
  void reset_after_fork();

  size_t free_blocks() const;
  const Runner& runner() const { return *runner_; }

 private:
  struct Request {
    int64_t id;
    RequestParams params;
    std::vector<int32_t> tokens;  // prompt and what was generated
    size_t prompt = 0;            // its length
    size_t limit = 0;             // total tokens at which generation ends
    size_t computed = 0;          // tokens whose K and V are in the cache
    std::vector<int32_t> blocks;
    std::vector<Event> events;
    float* logits_out = nullptr;  // [T, V]; set for scoring, which generates nothing
    bool finished = false;
    bool released = false;
    bool stepping = false;        // part of the step that runs now
  };
  struct Part {  // what one request contributes to a step
    Request* request;
    size_t rows;
    size_t logits;
  };

  int64_t enqueue(std::unique_ptr<Request> request);
  bool take_events(std::span<const int64_t> requests, std::vector<Event>& out);
  bool step(std::span<const int64_t> requests, const Interrupted& interrupted);
  void admit();
  std::vector<Part> plan(Step& step);
  void plan_ahead(Step& step, const std::vector<Part>& parts) const;
  std::span<const int32_t> banned(const Request& request) const;
  void commit(const std::vector<Part>& parts, const Step& step, const StepResult& result);
  static void take_token(Request& request, int32_t token);
  void drop_released();
  Request* find(int64_t id) const;

  std::unique_ptr<Runner> runner_;
  GptConfig config_;
  StepLimits limits_;
  BlockPool pool_;
  std::vector<std::unique_ptr<Request>> requests_;  // in the order of submission
  int64_t next_id_ = 1;
  std::atomic<int> drivers_{0};  // threads inside advance

  struct Locks {
    std::mutex state;       // guards the members above
    std::timed_mutex step;  // held through a step; taken before `state`
  };
  std::unique_ptr<Locks> locks_ = std::make_unique<Locks>();
};

}  // namespace gptx
