#include "engine/engine.h"

#include <algorithm>
#include <chrono>
#include <thread>

#include "core/error.h"

namespace gptx {
namespace {

// How long a thread waits for another one's step before it looks for signals.
constexpr std::chrono::milliseconds kLockInterval{10};

size_t blocks_for(size_t tokens) { return (tokens + kBlockTokens - 1) / kBlockTokens; }

}  // namespace

Engine::Engine(std::unique_ptr<Runner> runner, const GptConfig& config, const StepLimits& limits,
               size_t kv_blocks)
    : runner_(std::move(runner)),
      config_(config),
      limits_(limits),
      pool_(kv_blocks) {}

int64_t Engine::submit(std::span<const int32_t> tokens, const RequestParams& params) {
  auto request = std::make_unique<Request>();
  request->params = params;
  request->tokens.assign(tokens.begin(), tokens.end());
  request->prompt = tokens.size();
  request->limit = std::min(config_.block_size, tokens.size() + params.max_new_tokens);
  request->tokens.reserve(request->limit);
  return enqueue(std::move(request));
}

int64_t Engine::enqueue(std::unique_ptr<Request> request) {
  const size_t need = blocks_for(request->limit);
  if (need > pool_.size()) {
    const uint64_t bytes = runner_->kv_block_bytes();
    throw OutOfMemoryError("KV cache", need * bytes, pool_.size() * bytes);
  }
  const std::lock_guard lock(locks_->state);
  request->id = next_id_++;
  requests_.push_back(std::move(request));
  return requests_.back()->id;
}

std::vector<Event> Engine::advance(std::span<const int64_t> requests,
                                   const Interrupted& interrupted) {
  struct Driver {
    explicit Driver(std::atomic<int>& count) : count_(count) { ++count_; }
    ~Driver() { --count_; }
    std::atomic<int>& count_;
  };
  const Driver driver(drivers_);
  std::vector<Event> events;
  while (!take_events(requests, events)) {
    std::unique_lock stepping(locks_->step, std::defer_lock);
    while (!stepping.try_lock_for(kLockInterval)) {
      if (interrupted && interrupted()) return events;
    }
    // Another thread's step may have brought what this one waits for.
    if (take_events(requests, events)) break;
    if (!step(requests, interrupted)) break;
  }
  return events;
}

bool Engine::take_events(std::span<const int64_t> requests, std::vector<Event>& out) {
  const std::lock_guard lock(locks_->state);
  bool waiting = false;
  for (const int64_t id : requests) {
    Request* const request = find(id);
    if (request == nullptr) continue;
    out.insert(out.end(), request->events.begin(), request->events.end());
    request->events.clear();
    waiting |= !request->finished;
  }
  return !out.empty() || !waiting;
}

bool Engine::step(std::span<const int64_t> requests, const Interrupted& interrupted) {
  Step next;
  std::vector<Part> parts;
  {
    const std::lock_guard lock(locks_->state);
    drop_released();
    admit();
    parts = plan(next);
  }
  if (parts.empty()) {
    // Everything that could run waits for its reader, who may be another thread.
    if (drivers_ == 1) {
      const uint64_t bytes = runner_->kv_block_bytes();
      const Request* const first = requests.empty() ? nullptr : find(requests.front());
      throw OutOfMemoryError("KV cache, held by unfinished streams",
                             first == nullptr ? 0 : blocks_for(first->limit) * bytes,
                             pool_.free() * bytes);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    return !interrupted || !interrupted();
  }

  StepResult result(next);
  bool completed = false;
  try {
    completed = runner_->run(next, result, interrupted);
  } catch (...) {
    const std::lock_guard lock(locks_->state);
    for (const Part& part : parts) part.request->stepping = false;
    throw;
  }
  const std::lock_guard lock(locks_->state);
  if (completed) commit(parts, next, result);
  for (const Part& part : parts) part.request->stepping = false;
  drop_released();
  return completed;
}

// First come, first served: a request starts when the pool can hold it to its end.
void Engine::admit() {
  for (const auto& request : requests_) {
    if (request->finished || !request->blocks.empty()) continue;
    const size_t need = blocks_for(request->limit);
    if (need > pool_.free()) return;
    pool_.take(request->blocks, need);
  }
}

// Decode rows first, since a prompt can wait longer than a reader; prompts fill up the step.
std::vector<Engine::Part> Engine::plan(Step& step) {
  std::vector<Part> parts;
  size_t rows = 0;
  size_t logits = 0;
  for (const bool decoding : {true, false}) {
    for (const auto& request : requests_) {
      if (request->finished || request->blocks.empty() || !request->events.empty()) continue;
      const size_t pending = request->tokens.size() - request->computed;
      if ((request->computed >= request->prompt) != decoding) continue;
      const bool scoring = request->logits_out != nullptr;
      size_t n = std::min(pending, limits_.rows - rows);
      if (scoring) n = std::min(n, limits_.logit_rows - logits);
      size_t wanted = scoring ? n : (n == pending ? 1 : 0);
      if (logits + wanted > limits_.logit_rows) {
        // The last row waits for a step that has room for its logits.
        --n;
        wanted = 0;
      }
      if (n == 0) continue;
      const auto chunk = std::span<const int32_t>(request->tokens).subspan(request->computed, n);
      step.batch.add(chunk, request->computed, request->blocks, wanted);
      if (wanted > 0 && !scoring) {
        step.samples.push_back({.logit_row = logits,
                                .position = request->tokens.size(),
                                .prompt = request->prompt,
                                .sequence = request->tokens,
                                .banned = banned(*request),
                                .allowed = {},
                                .params = &request->params.sampling});
      }
      parts.push_back({request.get(), n, wanted});
      request->stepping = true;
      rows += n;
      logits += wanted;
    }
  }
  plan_ahead(step, parts);
  return parts;
}

// Several tokens at once where every part is a plain decode row and has that many still to come.
void Engine::plan_ahead(Step& step, const std::vector<Part>& parts) const {
  size_t length = runner_->steps_ahead();
  if (step.samples.size() != parts.size()) return;
  for (size_t i = 0; i < parts.size(); ++i) {
    const Request& request = *parts[i].request;
    const bool plain = step.samples[i].banned.empty() && step.samples[i].params->is_stateless();
    if (!plain || parts[i].rows != 1) return;
    length = std::min(length, request.limit - request.tokens.size());
  }
  if (!parts.empty()) step.length = length;
}

// A text may not end before it has its least number of tokens.
std::span<const int32_t> Engine::banned(const Request& request) const {
  if (request.tokens.size() - request.prompt >= request.params.min_new_tokens) return {};
  return request.params.end_tokens;
}

void Engine::commit(const std::vector<Part>& parts, const Step& step,
                    const StepResult& result) {
  size_t row = 0;
  size_t sample = 0;
  for (const Part& part : parts) {
    Request& request = *part.request;
    if (request.logits_out != nullptr) {
      for (size_t i = 0; i < part.logits; ++i) {
        const std::span<const float> logits = runner_->logits(row + i);
        std::copy(logits.begin(), logits.end(),
                  request.logits_out + (request.computed + i) * config_.vocab_size);
      }
      request.computed += part.rows;
      request.finished = request.computed == request.tokens.size();
    } else {
      request.computed += part.rows;
      for (size_t i = 0; part.logits > 0 && i < step.length && !request.finished; ++i) {
        if (i > 0) ++request.computed;
        take_token(request, result.chosen[i * step.samples.size() + sample].token);
      }
      sample += part.logits;
    }
    if (request.finished) pool_.give_back(request.blocks);
    row += part.logits;
  }
}

void Engine::take_token(Request& request, int32_t token) {
  const std::span<const int32_t> ends = request.params.end_tokens;
  Event event{request.id, token, Finish::kNone};
  if (token == kNoToken) {
    event.finish = Finish::kNonFinite;
  } else if (std::find(ends.begin(), ends.end(), token) != ends.end()) {
    event.token = -1;
    event.finish = Finish::kStop;
  } else {
    request.tokens.push_back(token);
    if (request.tokens.size() == request.limit) event.finish = Finish::kLength;
  }
  request.finished = event.finish != Finish::kNone;
  request.events.push_back(event);
}

void Engine::release(int64_t id) {
  const std::lock_guard lock(locks_->state);
  if (Request* const request = find(id)) request->released = true;
  drop_released();
}

void Engine::drop_released() {
  std::erase_if(requests_, [&](const std::unique_ptr<Request>& request) {
    if (!request->released || request->stepping) return false;
    pool_.give_back(request->blocks);
    return true;
  });
}

bool Engine::logits(std::span<const int32_t> tokens, float* out, const Interrupted& interrupted) {
  auto request = std::make_unique<Request>();
  request->tokens.assign(tokens.begin(), tokens.end());
  request->prompt = tokens.size();
  request->limit = tokens.size();
  request->logits_out = out;
  Request* const watched = request.get();
  const int64_t id = enqueue(std::move(request));
  // `out` is the caller's: the request must not outlive this call, not even in another thread's step.
  struct Release {
    ~Release() {
      const std::lock_guard stepping(engine->locks_->step);
      engine->release(id);
    }
    Engine* engine;
    int64_t id;
  };
  const Release at_exit{this, id};
  const int64_t ids[] = {id};
  static_cast<void>(advance(ids, interrupted));
  const std::lock_guard lock(locks_->state);
  return watched->finished;
}

void Engine::reset_after_fork() {
  static_cast<void>(locks_.release());  // a mutex held by a thread that is gone cannot be freed
  locks_ = std::make_unique<Locks>();
  drivers_ = 0;
  for (const auto& request : requests_) request->stepping = false;
}

size_t Engine::free_blocks() const {
  const std::lock_guard lock(locks_->state);
  return pool_.free();
}

Engine::Request* Engine::find(int64_t id) const {
  for (const auto& request : requests_) {
    if (request->id == id) return request.get();
  }
  return nullptr;
}

}  // namespace gptx
