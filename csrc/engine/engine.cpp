#include "engine/engine.h"

#include <algorithm>
#include <thread>

#include "core/error.h"

namespace gptx {
namespace {

// How long a thread waits for another one's step before it looks for signals.
constexpr std::chrono::milliseconds kLockInterval{10};
// How long it waits for blocks of requests whose readers are slow before it takes them.
constexpr int kPatience = 100;  // milliseconds

}  // namespace

Engine::Engine(std::unique_ptr<Runner> runner, const GptConfig& config, const StepLimits& limits,
               const EngineOptions& options)
    : runner_(std::move(runner)),
      config_(config),
      limits_(limits),
      kv_(*runner_, options.kv_blocks, options.cached_blocks, options.poison) {}

int64_t Engine::submit(std::span<const int32_t> tokens, const RequestParams& params, int64_t parent) {
  auto request = std::make_unique<Request>();
  request->task = params.held ? Task::kHold : Task::kGenerate;
  request->params = params;
  request->wanted = params.wanted;
  request->prompt = tokens.size();
  request->limit = tokens.size() + params.max_new_tokens;
  if (params.slide == 0) request->limit = std::min(request->limit, config_.block_size);
  Sequence& s = request->sequence;
  s.tokens.assign(tokens.begin(), tokens.end());
  s.tokens.reserve(std::min(request->limit, std::max(tokens.size(), config_.block_size)));
  if (s.window() > config_.block_size) s.begin = tokens.size() - params.slide;
  check_fits(std::min(request->limit, config_.block_size));
  return enqueue(std::move(request), parent);
}

int64_t Engine::submit_score(std::span<const int32_t> tokens, size_t first, size_t top, int64_t parent) {
  auto request = std::make_unique<Request>();
  request->task = Task::kScore;
  request->sequence.tokens.assign(tokens.begin(), tokens.end());
  request->prompt = tokens.size();
  request->first_scored = first;
  request->top = top;
  request->scores.resize(tokens.size() - first);
  check_fits(tokens.size() - 1);
  return enqueue(std::move(request), parent);
}

void Engine::check_fits(size_t tokens) const {
  if (blocks_for(tokens) <= kv_.pool().size()) return;
  const uint64_t bytes = runner_->kv_block_bytes();
  throw OutOfMemoryError("KV cache", blocks_for(tokens) * bytes, kv_.pool().size() * bytes);
}

int64_t Engine::enqueue(std::unique_ptr<Request> request, int64_t parent) {
  const std::lock_guard lock(locks_->state);
  if (const Request* const from = find(parent); from != nullptr && request->sequence.begin == from->sequence.begin) {
    const std::span<const int32_t> ours = request->sequence.windowed(), theirs = from->sequence.windowed();
    const size_t most = std::min({from->sequence.computed, ours.size(), request->first_asked()});
    const auto [mine, other] = std::mismatch(ours.begin(), ours.begin() + static_cast<ptrdiff_t>(most), theirs.begin());
    kv_.share(request->sequence, from->sequence, static_cast<size_t>(mine - ours.begin()));
    request->usage.cached = request->sequence.computed;
  }
  request->id = next_id_++;
  requests_.push_back(std::move(request));
  return requests_.back()->id;
}

std::vector<Event> Engine::advance(std::span<const int64_t> requests, const Interrupted& interrupted) {
  struct Driver {
    explicit Driver(std::atomic<int>& count) : count_(count) { ++count_; }
    ~Driver() { --count_; }
    std::atomic<int>& count_;
  };
  const Driver driver(drivers_);
  std::vector<Event> events;
  for (int idle = 0; !take_events(requests, events);) {
    std::unique_lock stepping(locks_->step, std::defer_lock);
    while (!stepping.try_lock_for(kLockInterval)) {
      if (interrupted && interrupted()) return events;
    }
    // Another thread's step may have brought what this one waits for.
    if (take_events(requests, events)) break;
    const Outcome outcome = step(interrupted);
    if (outcome == Outcome::kInterrupted) break;
    if (outcome == Outcome::kRan) {
      idle = 0;
      continue;
    }
    // What could run lacks the blocks of requests that wait for their readers.
    if (drivers_ == 1 || ++idle > kPatience) {
      const std::lock_guard lock(locks_->state);
      if (preempt_one_that_waits()) continue;
    }
    stepping.unlock();
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    if (interrupted && interrupted()) break;
  }
  return events;
}

bool Engine::take_events(std::span<const int64_t> requests, std::vector<Event>& out) {
  const std::lock_guard lock(locks_->state);
  bool waiting = false;
  for (const int64_t id : requests) {
    Request* const request = find(id);
    if (request == nullptr) continue;
    std::move(request->events.begin(), request->events.end(), std::back_inserter(out));
    request->events.clear();
    waiting |= request->stepping || request->is_runnable();
  }
  return !out.empty() || !waiting;
}

Engine::Outcome Engine::step(const Interrupted& interrupted) {
  Step next;
  std::vector<Part> parts;
  {
    const std::lock_guard lock(locks_->state);
    drop_released();
    if (end_overdue()) return Outcome::kRan;
    try {
      plan(next, parts);
    } catch (...) {  // of a device that cannot copy a block, or for want of memory
      for (const Part& part : parts) leave_step(*part.request);
      throw;
    }
  }
  if (parts.empty()) return Outcome::kIdle;

  // However it ends, its parts leave the step.
  struct Leave {
    ~Leave() {
      const std::lock_guard lock(engine->locks_->state);
      for (const Part& part : parts) leave_step(*part.request);
      engine->drop_released();
    }
    Engine* engine;
    const std::vector<Part>& parts;
  };
  const Leave at_exit{this, parts};
  StepResult result(next);
  if (!runner_->run(next, result, interrupted)) return Outcome::kInterrupted;
  const std::lock_guard lock(locks_->state);
  commit(parts, next, result);
  return Outcome::kRan;
}

void Engine::release(int64_t id) {
  const std::lock_guard lock(locks_->state);
  if (Request* const request = find(id)) request->released = true;
  drop_released();
}

void Engine::drop_released() {
  std::erase_if(requests_, [&](const std::unique_ptr<Request>& request) {
    if (!request->released || request->stepping) return false;
    kv_.truncate(request->sequence, 0);
    return true;
  });
}

// Locks the state while the request is no part of a running step.
std::unique_lock<std::mutex> Engine::lock_resting(int64_t id) {
  for (;;) {
    std::unique_lock lock(locks_->state);
    const Request* const request = find(id);
    if (request == nullptr || !request->stepping) return lock;
    lock.unlock();
    const std::lock_guard until_the_step_ends(locks_->step);
  }
}

void Engine::feed(int64_t id, std::span<const int32_t> tokens, size_t wanted) {
  const auto lock = lock_resting(id);
  Request& request = held(id);
  request.sequence.tokens.insert(request.sequence.tokens.end(), tokens.begin(), tokens.end());
  request.wanted = wanted;
  request.ready = false;
  change_held(request);
}

void Engine::truncate(int64_t id, size_t tokens) {
  const auto lock = lock_resting(id);
  Request& request = held(id);
  Sequence& s = request.sequence;
  s.tokens.resize(tokens);
  request.prompt = std::min(request.prompt, tokens);
  kv_.truncate(s, tokens > s.begin ? tokens - s.begin : 0);
  if (s.begin >= tokens) s.begin = 0;  // it had slid further
  request.ready = true;
  change_held(request);
}

// What was computed for the last token, and what was to come behind it, is void.
void Engine::change_held(Request& request) {
  request.chosen = false;
  forget_logits(request);
  request.drafts.proposed.clear();
  if (!request.finished) request.events.clear();
}

void Engine::forget_logits(Request& request) {
  request.logits.clear();
  request.checked.clear();
  request.accepted = 0;
}

int64_t Engine::fork(int64_t id) {
  const auto lock = lock_resting(id);
  const Request& from = held(id);
  auto copy = std::make_unique<Request>();
  copy->id = next_id_++;
  copy->task = from.task;
  copy->params = from.params;
  copy->prompt = from.prompt;
  copy->limit = from.limit;
  copy->ready = from.ready;
  copy->wanted = from.wanted;
  copy->started = from.started;
  copy->sequence.tokens = from.sequence.tokens;
  copy->sequence.begin = from.sequence.begin;
  // What is still to be computed for it are all the rows that were asked for.
  const size_t computed = from.ready ? from.sequence.computed : std::min(from.sequence.computed, from.first_asked());
  kv_.share(copy->sequence, from.sequence, computed);
  requests_.push_back(std::move(copy));
  return requests_.back()->id;
}

Event Engine::choose(int64_t id, std::span<float> logits, std::span<const uint32_t> allowed) {
  const auto lock = lock_resting(id);
  Request& request = held(id);
  SampleTask task = sample_task(request, request.sequence.tokens.size(), 0);
  task.allowed = allowed;
  Choice choice;
  choice.top.reserve(static_cast<size_t>(std::max(request.params.sampling.logprobs, 0)));
  runner_->choose(logits.empty() ? own_logits(request) : logits, task, choice);
  const int32_t token = choice.token;
  request.ready = false;
  request.chosen = true;
  request.wanted = 1;
  take_token(request, std::move(choice));
  Event event = std::move(request.events.back());
  request.events.pop_back();
  if (event.finish == Finish::kNone) take_checked(request, token);
  if (!request.ready) forget_logits(request);
  std::vector<int32_t>& proposed = request.drafts.proposed;
  if (!proposed.empty() && proposed.front() == token) {
    proposed.erase(proposed.begin());
  } else {
    proposed.clear();
  }
  return event;
}

// The last of the rows that wanted logits, or that behind the last token that was drafted and chosen.
std::span<float> Engine::own_logits(Request& request) const {
  if (!request.ready || request.logits.empty()) {
    throw ParameterError("request", std::to_string(request.id), "one that is ready");
  }
  const size_t vocab = config_.vocab_size;
  const size_t behind = request.checked.size() - request.accepted;
  return std::span(request.logits).subspan(request.logits.size() - (behind + 1) * vocab, vocab);
}

// Where the token that was chosen is the one that was drafted, its row is there already.
void Engine::take_checked(Request& request, int32_t token) {
  Sequence& s = request.sequence;
  std::vector<int32_t>& checked = request.checked;
  if (request.accepted == checked.size()) return;  // there was no draft, or no more of it
  const bool right = checked[request.accepted] == token && s.computed + 1 == s.tokens.size() - s.begin;
  if (right) {
    ++s.computed;
    kv_.remember(s);
    ++request.accepted;
    ++request.usage.accepted;
    request.ready = true;
    request.events.push_back({request.id, {}, Finish::kNone});
  }
  if (!right || request.accepted == checked.size()) request.drafts.learn(checked.size(), request.accepted);
}

Candidates Engine::candidates(int64_t id, size_t n, std::span<float> given, std::span<const TokenBias> bias,
                              std::span<const uint32_t> allowed) {
  const auto lock = lock_resting(id);
  Request& request = held(id);
  const std::span<float> logits = own_logits(request);
  SampleTask task = sample_task(request, request.sequence.tokens.size(), 0);
  task.allowed = allowed;
  task.bias = bias;
  Candidates out;
  runner_->candidates(logits, given, task, n, out);
  return out;
}

std::vector<float> Engine::held_logits(int64_t id) const {
  const std::lock_guard lock(locks_->state);
  Request& request = existing(id);
  if (request.checked.empty()) return request.logits;
  const std::span<float> last = own_logits(request);
  return {last.begin(), last.end()};
}

std::vector<float> Engine::held_hidden(int64_t id) const {
  const std::lock_guard lock(locks_->state);
  return existing(id).hidden;
}

std::vector<std::byte> Engine::save(int64_t id) {
  const auto lock = lock_resting(id);
  const Request& request = held(id);
  const Sequence& s = request.sequence;
  const size_t bytes = runner_->kv_block_bytes();
  // A block that is not computed to its end, or to that of the text, says nothing that restore could tell apart.
  const size_t blocks = s.computed + 1 >= s.window() ? blocks_for(s.computed) : s.computed / kBlockTokens;
  std::vector<std::byte> out(blocks * bytes);
  for (size_t i = 0; i < blocks; ++i) {
    runner_->read_block(s.blocks[i], std::span(out).subspan(i * bytes, bytes));
  }
  return out;
}

int64_t Engine::restore(std::span<const int32_t> tokens, std::span<const std::byte> blocks) {
  RequestParams params;
  params.held = true;
  params.max_new_tokens = config_.block_size;
  const int64_t id = submit(tokens, params);
  const size_t bytes = runner_->kv_block_bytes();
  const std::lock_guard stepping(locks_->step);
  const std::lock_guard lock(locks_->state);
  Sequence& s = existing(id).sequence;
  const size_t end = std::min(tokens.size() - 1, blocks.size() / bytes * kBlockTokens);
  // Where there is no room, the tokens are computed again, to the same bits.
  const size_t got = kv_.reserve(s, end);
  for (size_t i = 0; i < blocks_for(got); ++i) runner_->write_block(s.blocks[i], blocks.subspan(i * bytes, bytes));
  s.computed = got;
  return id;
}

void Engine::propose(int64_t id, size_t position, std::span<const int32_t> tokens) {
  const auto lock = lock_resting(id);
  Request& request = existing(id);
  const std::span<const int32_t> text = request.sequence.tokens;
  if (position > text.size() || text.size() - position > tokens.size()) return;
  // Somebody else's step may have brought the first of them meanwhile.
  const std::span<const int32_t> since = text.subspan(position);
  if (!std::ranges::equal(since, tokens.first(since.size()))) return;
  request.drafts.proposed.assign(tokens.begin() + static_cast<ptrdiff_t>(since.size()), tokens.end());
}

size_t Engine::draft_length(int64_t id) {
  const auto lock = lock_resting(id);
  const Request& request = existing(id);
  return request.drafts.length(draft_room(request));
}

std::vector<int32_t> Engine::tokens(int64_t id) {
  const auto lock = lock_resting(id);
  return existing(id).sequence.tokens;
}

std::vector<Score> Engine::scores(int64_t id) const {
  const std::lock_guard lock(locks_->state);
  return existing(id).scores;
}

Usage Engine::usage(int64_t id) const {
  const std::lock_guard lock(locks_->state);
  return existing(id).usage;
}

bool Engine::logits(std::span<const int32_t> tokens, float* out, const Interrupted& interrupted) {
  return fill(Task::kLogits, tokens, out, interrupted);
}

bool Engine::states(std::span<const int32_t> tokens, float* out, const Interrupted& interrupted) {
  return fill(Task::kStates, tokens, out, interrupted);
}

bool Engine::fill(Task task, std::span<const int32_t> tokens, float* out, const Interrupted& interrupted) {
  auto request = std::make_unique<Request>();
  request->task = task;
  request->sequence.tokens.assign(tokens.begin(), tokens.end());
  request->prompt = tokens.size();
  request->rows_out = out;
  check_fits(tokens.size());
  const Request* const watched = request.get();
  const int64_t id = enqueue(std::move(request), 0);
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
  for (const auto& request : requests_) leave_step(*request);
}

EngineStats Engine::stats() const {
  const std::lock_guard lock(locks_->state);
  EngineStats stats = stats_;
  stats.requests = requests_.size();
  stats.blocks = kv_.pool().size();
  stats.cached_blocks = kv_.pool().cached();
  stats.free_blocks = kv_.pool().available() - kv_.pool().cached();
  return stats;
}

Request* Engine::find(int64_t id) const {
  const auto found = std::ranges::lower_bound(requests_, id, {}, [](const auto& request) { return request->id; });
  return found == requests_.end() || (*found)->id != id ? nullptr : found->get();
}

Request& Engine::existing(int64_t id) const {
  Request* const request = find(id);
  if (request == nullptr) throw ParameterError("request", std::to_string(id), "one that is not released");
  return *request;
}

Request& Engine::held(int64_t id) const {
  Request& request = existing(id);
  if (request.task != Task::kHold) throw ParameterError("request", std::to_string(id), "one that is held");
  return request;
}

}  // namespace gptx
