#include "engine/drafts.h"

#include <algorithm>

namespace gptx {
namespace {

constexpr size_t kLongestEnding = 4, kShortestEnding = 2;
constexpr size_t kLongestPause = 32;

}  // namespace

std::vector<int32_t> lookup_draft(std::span<const int32_t> tokens, size_t n) {
  // The end of the longest ending that occurred before, the latest of them.
  size_t best = 0, where = 0;
  for (size_t end = tokens.size() - 1; end >= kShortestEnding && best < kLongestEnding; --end) {
    size_t length = 0;
    while (length < kLongestEnding && length < end && tokens[end - 1 - length] == tokens[tokens.size() - 1 - length]) {
      ++length;
    }
    if (length >= kShortestEnding && length > best) {
      best = length;
      where = end;
    }
  }
  if (best == 0) return {};
  std::vector<int32_t> draft;
  for (size_t i = where; draft.size() < n; ++i) {
    draft.push_back(i < tokens.size() ? tokens[i] : draft[i - tokens.size()]);
  }
  return draft;
}

size_t Drafts::length(size_t longest) const { return pause_ > 0 ? 0 : std::min(length_, longest); }

void Drafts::learn(size_t drafted, size_t accepted) {
  if (drafted == 0) {
    if (pause_ > 0) --pause_;
    return;
  }
  if (accepted == drafted) {
    length_ = std::min(kMaxDraft, 2 * drafted + 1);
    next_pause_ = 1;
  } else if (accepted > 0) {
    length_ = accepted + 1;
    next_pause_ = 1;
  } else {
    length_ = 2;
    pause_ = next_pause_;
    next_pause_ = std::min(kLongestPause, 2 * next_pause_);
  }
}

}  // namespace gptx
