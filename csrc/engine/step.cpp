// What goes into a step, and what comes of it.
#include <algorithm>

#include "engine/engine.h"

namespace gptx {
namespace {

// So many steps a request waits for blocks before one that rests gives up its own.
constexpr size_t kStarvedSteps = 100;

}  // namespace

bool Engine::end_overdue() {
  bool ended = false;
  for (const auto& request : requests_) {
    if (request->finished || !request->params.deadline || !request->events.empty()) continue;
    if (Clock::now() < *request->params.deadline) continue;
    request->events.push_back({request->id, {}, Finish::kTime});
    finish(*request);
    ended = true;
  }
  return ended;
}

// Decode rows first, since a prompt can wait longer than a reader; prompts fill up the step, first come first served.
void Engine::plan(Step& step, std::vector<Part>& parts) {
  Room room{limits_.rows, limits_.logit_rows};
  const auto decodes = [](const Request& r) { return r.sequence.computed > 0 && r.pending() == 1; };
  for (const auto& request : requests_) {
    if (request->is_runnable() && decodes(*request)) add_part(parts, room, *request);
  }
  bool full = false;  // nothing more is begun, but what has begun goes on
  for (const auto& request : requests_) {
    if (request->stepping || !request->is_runnable() || decodes(*request)) continue;
    if (request->sequence.blocks.empty()) {
      if (full && !request->started) continue;
      const Start start = try_start(*request);
      full |= start == Start::kFull;
      if (start != Start::kNow) continue;
    }
    add_part(parts, room, *request);
  }
  // In a batch, rows without logits come last.
  std::ranges::stable_partition(parts, [](const Part& part) { return part.request->wants_logits(); });
  for (const Part& part : parts) fill(step, part);
  plan_ahead(step, parts);
  // What waits for blocks does not wait for ever behind what runs, while others rest on theirs.
  starved_steps_ = full ? starved_steps_ + 1 : 0;
  if (starved_steps_ > kStarvedSteps && preempt_one_that_waits()) starved_steps_ = 0;
}

// Takes what the cache has of a request. It is not begun where another one is about to compute the next block of
// the same prefix, nor, for the first time, where the blocks do not suffice for its prompt.
Engine::Start Engine::try_start(Request& request) {
  kv_.match(request.sequence, request.first_asked());
  Start start = Start::kNow;
  for (const auto& other : requests_) {
    const bool computes = other->is_runnable() && !other->sequence.blocks.empty() && other.get() != &request;
    if (computes && KvCache::next_block_is_same(request.sequence, other->sequence)) start = Start::kLater;
  }
  const size_t need = blocks_for(request.rows_end()) - request.sequence.blocks.size();
  if (start == Start::kNow && !request.started && need > kv_.pool().available()) start = Start::kFull;
  if (start != Start::kNow) kv_.truncate(request.sequence, 0);
  if (start == Start::kNow && !request.started) request.usage.cached = request.sequence.computed;
  return start;
}

// Decides what a request contributes to the step, for which there is some room left.
void Engine::add_part(std::vector<Part>& parts, Room& room, Request& request) {
  Sequence& s = request.sequence;
  const size_t real = s.tokens.size();
  const size_t first_kept = std::max(request.kept_begin(), s.computed);
  draft(request, std::min(room.rows, room.logits));

  size_t end = std::min(request.rows_end(), s.computed + room.rows);
  if (request.wants_logits()) end = std::min(end, first_kept + room.logits);
  try {
    if (end > s.computed) end = reserve(request, end);
  } catch (...) {
    s.tokens.resize(real);
    throw;
  }
  const size_t drafted = end + s.begin > real ? end + s.begin - real : 0;
  s.tokens.resize(real + drafted);
  if (end <= s.computed) return;

  const Part part{.request = &request,
                  .rows = end - s.computed,
                  .kept = end > first_kept ? end - first_kept : 0,
                  .drafted = drafted};
  room.rows -= part.rows;
  if (request.wants_logits()) room.logits -= part.kept;
  parts.push_back(part);
  request.drafted = drafted;
  request.stepping = request.started = true;
}

void Engine::fill(Step& step, const Part& part) const {
  const Request& request = *part.request;
  const Sequence& s = request.sequence;
  const size_t kept_row = step.batch.kept_rows.size();
  step.batch.add(s.windowed().subspan(s.computed, part.rows), s.computed, s.blocks, part.kept, request.wants_logits());
  step.batch.keeps_states |= request.task == Task::kStates;
  for (size_t i = 0; i < part.kept; ++i) {
    if (request.task == Task::kGenerate) {
      SampleTask task = sample_task(request, s.tokens.size() - part.drafted, i);
      task.logit_row = kept_row + i;
      step.samples.push_back(task);
    } else if (request.task == Task::kScore) {
      const size_t next = s.computed + part.rows - part.kept + i + 1;
      step.scores.push_back({kept_row + i, s.tokens[next], request.top});
    }
  }
}

// The longest draft that a request can take behind its tokens, of which the last is the token to be computed next.
size_t Engine::draft_room(const Request& request) const {
  const Sequence& s = request.sequence;
  const bool decodes = request.task == Task::kGenerate || (request.task == Task::kHold && request.chosen);
  if (!decodes || request.params.hidden || !request.wants_logits() || request.finished || request.ready || s.tokens.size() + 1 >= request.limit) return 0;
  return std::min({kMaxDraft, request.limit - s.tokens.size() - 1, config_.block_size - s.window()});
}

// Appends a draft to the tokens of a request that decodes; it takes at most `rows` rows with the one that is due.
void Engine::draft(Request& request, size_t rows) const {
  Sequence& s = request.sequence;
  if (request.pending() != 1 || rows < 2) return;
  const size_t most = std::min(rows - 1, draft_room(request));
  std::vector<int32_t> tokens = request.drafts.proposed;
  if (tokens.empty() && request.params.lookup > 0) {
    tokens = lookup_draft(s.tokens, std::min(most, request.drafts.length(request.params.lookup)));
  }
  tokens.resize(std::min(most, tokens.size()));
  s.tokens.insert(s.tokens.end(), tokens.begin(), tokens.end());
}

// Takes the guesses from the tokens of a request again.
std::vector<int32_t> Engine::take_draft(Request& request) {
  std::vector<int32_t>& tokens = request.sequence.tokens;
  const auto real = tokens.end() - static_cast<ptrdiff_t>(request.drafted);
  std::vector<int32_t> draft(real, tokens.end());
  tokens.erase(real, tokens.end());
  request.drafted = 0;
  return draft;
}

// A step has no part of a request any more; what it guessed is void.
void Engine::leave_step(Request& request) noexcept {
  std::vector<int32_t>& tokens = request.sequence.tokens;
  tokens.resize(tokens.size() - request.drafted);
  request.drafted = 0;
  request.stepping = false;
}

// Blocks for the positions of the window up to `end`, taken from younger requests if need be. Returns how far they go.
size_t Engine::reserve(Request& request, size_t end) {
  size_t got = kv_.reserve(request.sequence, end);
  while (got < end && preempt_one_younger_than(request.id)) got = kv_.reserve(request.sequence, end);
  if (got == end && runner_->steps_ahead() > 1) {
    kv_.reserve(request.sequence, std::min(end + runner_->steps_ahead() - 1, config_.block_size));
  }
  return got;
}

bool Engine::preempt_one_younger_than(int64_t id) {
  for (auto it = requests_.rbegin(); it != requests_.rend() && (*it)->id > id; ++it) {
    if ((*it)->stepping || (*it)->sequence.blocks.empty()) continue;
    preempt(**it);
    return true;
  }
  return false;
}

bool Engine::preempt_one_that_waits() {
  for (auto it = requests_.rbegin(); it != requests_.rend(); ++it) {
    if ((*it)->stepping || (*it)->is_runnable() || (*it)->sequence.blocks.empty()) continue;
    preempt(**it);
    return true;
  }
  return false;
}

// Takes the blocks; what was in them is computed again, to the same bits, when its turn comes.
void Engine::preempt(Request& request) {
  kv_.truncate(request.sequence, 0);
  ++stats_.preemptions;
}

// Several tokens at once where every part is a plain decode row and has that many still to come.
void Engine::plan_ahead(Step& step, const std::vector<Part>& parts) const {
  size_t length = runner_->steps_ahead();
  if (length == 1 || parts.empty() || step.samples.size() != parts.size()) return;
  for (size_t i = 0; i < parts.size(); ++i) {
    const Request& request = *parts[i].request;
    const Sequence& s = request.sequence;
    const SampleTask& task = step.samples[i];
    const bool plain = task.params->is_stateless() && task.banned.empty() && task.forced == kNoToken &&
                       request.generated() >= request.params.forced_tokens.size() &&
                       request.params.forced_end == kNoToken && request.params.lookup == 0;
    if (!plain || parts[i].rows != 1) return;
    const size_t room = std::min(config_.block_size, s.blocks.size() * kBlockTokens) - s.computed;
    length = std::min({length, request.limit - s.tokens.size(), room});
  }
  step.length = length;
}

// The choice of the token behind the first `real + ahead` tokens, of which `real` are certain.
SampleTask Engine::sample_task(const Request& request, size_t real, size_t ahead) const {
  const RequestParams& params = request.params;
  const size_t position = real + ahead;
  const size_t generated = position - request.prompt;
  SampleTask task{.logit_row = 0,
                  .position = position,
                  .prompt = request.prompt,
                  .sequence = std::span<const int32_t>(request.sequence.tokens).first(position),
                  .banned = {},
                  .allowed = {},
                  .params = &params.sampling};
  // A text may not end before it has its least number of tokens.
  if (generated < params.min_new_tokens) task.banned = params.end_tokens;
  if (generated < params.forced_tokens.size()) task.forced = params.forced_tokens[generated];
  if (position + 1 == request.prompt + params.max_new_tokens && params.forced_end != kNoToken) {
    task.forced = params.forced_end;
  }
  return task;
}

void Engine::commit(const std::vector<Part>& parts, const Step& step, StepResult& result) {
  size_t row = 0, kept_row = 0, sample = 0, score = 0;
  for (const Part& part : parts) {
    Request& request = *part.request;
    Sequence& s = request.sequence;
    switch (request.task) {
      case Task::kGenerate:
        commit_generated(part, step, result, sample);
        sample += part.kept;
        break;
      case Task::kScore: {
        const size_t first = s.computed + part.rows - part.kept + 1 - request.first_scored;
        for (size_t i = 0; i < part.kept; ++i) request.scores[first + i] = std::move(result.scores[score++]);
        s.computed += part.rows;
        break;
      }
      case Task::kStates:
        keep_states(part, row);
        s.computed += part.rows;
        break;
      case Task::kHold:
        request.checked = take_draft(request);
        request.accepted = 0;
        request.usage.drafted += part.drafted;
        request.drafts.proposed.clear();
        if (part.drafted == 0) request.drafts.learn(0, 0);
        keep_rows(part, kept_row);
        s.computed += part.rows - part.drafted;
        break;
      case Task::kLogits:
        keep_rows(part, kept_row);
        s.computed += part.rows;
        break;
    }
    kv_.remember(s);
    if (request.task != Task::kGenerate && request.pending() == 0) {
      request.ready = true;
      request.events.push_back({request.id, {}, request.task == Task::kHold ? Finish::kNone : Finish::kDone});
      if (request.task != Task::kHold) finish(request);
    }
    row += part.rows;
    kept_row += part.kept;
    stats_.rows += part.rows;
  }
  ++stats_.steps;
}

void Engine::commit_generated(const Part& part, const Step& step, StepResult& result, size_t sample) {
  Request& request = *part.request;
  Sequence& s = request.sequence;
  const std::vector<int32_t> drafted = take_draft(request);
  s.computed += part.rows - part.drafted;
  if (part.kept == 0) return;

  const bool ahead = step.length > 1;
  const size_t choices = ahead ? step.length : part.kept;
  size_t accepted = 0;
  for (size_t i = 0; i < choices; ++i) {
    if (i > 0) ++s.computed;
    kv_.remember(s);
    Choice& choice = result.chosen[ahead ? i * step.samples.size() + sample : sample + i];
    const int32_t token = choice.token;
    const size_t begin = s.begin;
    take_token(request, std::move(choice));
    if (request.finished || s.begin != begin) break;
    if (ahead || i == part.drafted) continue;
    if (token != drafted[i]) break;
    ++accepted;
  }
  request.usage.drafted += part.drafted;
  request.usage.accepted += accepted;
  request.drafts.learn(part.drafted, accepted);
  request.drafts.proposed.clear();
}

// Copies what a held request or a caller wants of its rows.
void Engine::keep_rows(const Part& part, size_t kept_row) {
  Request& request = *part.request;
  const size_t first = request.sequence.computed + part.rows - part.kept - request.kept_begin();
  const size_t vocab = config_.vocab_size, width = config_.n_embd;
  if (request.task == Task::kHold) {
    request.logits.resize((request.kept_logits() + part.drafted) * vocab);
    request.hidden.resize(request.params.hidden ? request.wanted * width : 0);
  }
  float* const out = request.task == Task::kHold ? request.logits.data() : request.rows_out;
  const size_t skipped = request.task == Task::kHold ? request.wanted - request.kept_logits() : 0;
  for (size_t i = 0; i < part.kept; ++i) {
    if (first + i >= skipped) std::ranges::copy(runner_->logits(kept_row + i), out + (first + i - skipped) * vocab);
    if (request.hidden.empty()) continue;
    runner_->hidden(kept_row + i, std::span(request.hidden).subspan((first + i) * width, width));
  }
}

void Engine::keep_states(const Part& part, size_t first_row) {
  const Sequence& s = part.request->sequence;
  const size_t width = config_.n_embd;
  for (size_t layer = 0; layer <= config_.n_layer; ++layer) {
    float* const out = part.request->rows_out + (layer * s.window() + s.computed) * width;
    for (size_t i = 0; i < part.rows; ++i) runner_->state(layer, first_row + i, {out + i * width, width});
  }
}

void Engine::take_token(Request& request, Choice choice) {
  Sequence& s = request.sequence;
  const std::span<const int32_t> ends = request.params.end_tokens;
  Event event{request.id, std::move(choice), Finish::kNone};
  if (event.choice.token == kNoToken) {
    event.finish = Finish::kNonFinite;
  } else if (std::ranges::find(ends, event.choice.token) != ends.end()) {
    event.choice.token = kNoToken;
    event.finish = Finish::kStop;
  } else {
    s.tokens.push_back(event.choice.token);
    if (s.tokens.size() >= request.limit) {
      event.finish = Finish::kLength;
    } else if (s.window() > config_.block_size) {
      // The context slides: the last tokens are read again, from position 0 on.
      kv_.truncate(s, 0);
      s.begin = s.tokens.size() - request.params.slide;
    }
  }
  const bool ended = event.finish != Finish::kNone;
  request.events.push_back(std::move(event));
  if (ended) finish(request);
}

void Engine::finish(Request& request) {
  request.finished = true;
  kv_.truncate(request.sequence, 0);
}

}  // namespace gptx
