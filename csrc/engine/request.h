// What is asked of the engine, and where it stands.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <optional>
#include <vector>

#include "engine/drafts.h"
#include "engine/kv_cache.h"

namespace gptx {

using Clock = std::chrono::steady_clock;

struct RequestParams {
  SamplingParams sampling;
  size_t max_new_tokens = 128;
  size_t min_new_tokens = 0;
  std::vector<int32_t> end_tokens;       // generation stops before one of these
  std::vector<int32_t> forced_tokens;    // what is generated begins with them
  int32_t forced_end = kNoToken;         // what it ends with where max_new_tokens ends it
  size_t slide = 0;                      // tokens that are read again where the context is full; 0: it ends there
  size_t lookup = 0;                     // the longest draft from the text itself, 0: none
  std::optional<Clock::time_point> deadline;
  bool held = false;                     // the caller chooses the tokens, reads logits
  bool hidden = false;                   // and reads hidden states
  size_t wanted = 1;                     // of so many of the last rows of the prompt
  size_t logits = ~size_t{0};            // of which so many of the last have logits; 0: they are not computed
};

enum class Finish : uint8_t { kNone, kStop, kLength, kTime, kNonFinite, kDone };

// One step of one request: a token, the end, or both; or neither, where a held request is ready.
struct Event {
  int64_t request;
  Choice choice;
  Finish finish = Finish::kNone;
};

// What a request took.
struct Usage {
  size_t cached = 0;    // tokens of the prompt that were in the cache already
  size_t drafted = 0;   // tokens that were proposed
  size_t accepted = 0;  // and turned out to be the next ones
};

enum class Task : uint8_t { kGenerate, kHold, kScore, kLogits, kStates };

struct Request {
  int64_t id = 0;
  Task task = Task::kGenerate;
  RequestParams params;
  Sequence sequence;  // prompt and what was generated
  size_t prompt = 0;  // tokens
  size_t limit = 0;   // total tokens at which generation ends
  std::vector<Event> events;
  Drafts drafts;
  Usage usage;

  size_t wanted = 1;           // kHold: of the last rows, how many want logits
  bool ready = false;          // kHold: nothing to do before the caller says more
  bool chosen = false;         // kHold: its last token came by choose, so that the next may be drafted
  std::vector<float> logits;   // kHold: theirs [kept_logits, V], and those behind each token of `checked`
  std::vector<int32_t> checked;  // kHold: drafted tokens whose rows are computed
  size_t accepted = 0;           // kHold: of these, the first ones that the caller chose too
  std::vector<float> hidden;   // kHold: their hidden states [wanted, C]
  float* rows_out = nullptr;   // kLogits: [T, V]; kStates: [L + 1, T, C]
  size_t first_scored = 1;     // kScore: the first token whose probability is wanted
  size_t top = 0;              // kScore: most likely tokens to report
  std::vector<Score> scores;   // kScore: [T - first_scored]

  bool started = false;   // was in a step
  bool finished = false;
  bool released = false;
  bool stepping = false;  // part of the step that runs now
  size_t drafted = 0;     // of the tokens, how many are guesses of that step

  // Positions of the window: the end of the rows to compute, and the first of them that is kept: that wants logits or a hidden state.
  size_t rows_end() const { return sequence.window() - (task == Task::kScore ? 1 : 0); }
  size_t kept_begin() const {
    switch (task) {
      case Task::kGenerate: return sequence.window() - 1;
      case Task::kHold: return sequence.window() - wanted;
      case Task::kScore: return first_scored - 1;
      case Task::kStates: return rows_end();
      case Task::kLogits: break;
    }
    return 0;
  }
  bool wants_logits() const { return task != Task::kHold || params.logits > 0; }
  size_t kept_logits() const { return std::min(wanted, params.logits); }
  // Rows before this one say nothing that is asked: they may come from the cache.
  size_t first_asked() const { return task == Task::kStates ? 0 : std::min(kept_begin(), rows_end() - 1); }
  size_t pending() const { return rows_end() - sequence.computed; }
  // Whether a step can do something for it; one whose events wait for their reader is not stepped further.
  bool is_runnable() const { return !finished && !ready && events.empty() && pending() > 0; }
  size_t generated() const { return sequence.tokens.size() - prompt; }
};

}  // namespace gptx
