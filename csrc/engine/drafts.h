// Tokens proposed for a request before they are computed. The model checks them all in one step and keeps those
// that it chooses itself, so that a draft changes the speed and never a bit (Leviathan et al., 2023, with equality
// in place of acceptance: the counter RNG makes the choice at a position a function of its logits).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace gptx {

// The most tokens of one draft.
inline constexpr size_t kMaxDraft = 16;

// Prompt lookup: the n tokens that followed the last time that the text ended as it does now, or none. The longest
// ending that occurred before counts, of 4 down to 2 tokens. What reaches the end of the text goes on with itself.
std::vector<int32_t> lookup_draft(std::span<const int32_t> tokens, size_t n);

// How long the next draft should be: drafts that come true grow, those that fail shrink and then pause.
class Drafts {
 public:
  // What the caller proposed.
  std::vector<int32_t> proposed;

  size_t length(size_t longest) const;
  // After a step: `drafted` tokens were checked, `accepted` of them were right. Both 0: there was no draft.
  void learn(size_t drafted, size_t accepted);

 private:
  size_t length_ = 4;
  size_t pause_ = 0;      // steps without a draft
  size_t next_pause_ = 1;
};

}  // namespace gptx
