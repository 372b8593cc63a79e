// Passes over a row of logits, in lanes that know no order: what a compiler vectorizes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>

namespace gptx::cpu {

inline constexpr size_t kScanLanes = 16;
inline constexpr size_t kScanBlock = 4 * kScanLanes;

inline bool all_finite(std::span<const float> logits) {
  float zeros[kScanLanes] = {};  // 0 * x is NaN for infinity and NaN
  const size_t whole = logits.size() / kScanLanes * kScanLanes;
  for (size_t i = 0; i < whole; i += kScanLanes) {
    for (size_t j = 0; j < kScanLanes; ++j) zeros[j] += 0.0f * logits[i + j];
  }
  for (size_t i = whole; i < logits.size(); ++i) zeros[0] += 0.0f * logits[i];
  return std::all_of(zeros, zeros + kScanLanes, [](float x) { return x == 0.0f; });
}

// The largest of the block of logits that begins at `begin`.
inline float block_maximum(std::span<const float> logits, size_t begin) {
  const std::span<const float> block = logits.subspan(begin, std::min(kScanBlock, logits.size() - begin));
  if (block.size() < kScanBlock) return *std::max_element(block.begin(), block.end());
  float lanes[kScanLanes];
  std::copy_n(block.begin(), kScanLanes, lanes);
  for (size_t i = kScanLanes; i < kScanBlock; i += kScanLanes) {
    for (size_t j = 0; j < kScanLanes; ++j) lanes[j] = block[i + j] > lanes[j] ? block[i + j] : lanes[j];
  }
  return *std::max_element(lanes, lanes + kScanLanes);
}

inline float maximum(std::span<const float> logits) {
  float top = block_maximum(logits, 0);
  for (size_t begin = kScanBlock; begin < logits.size(); begin += kScanBlock) {
    top = std::max(top, block_maximum(logits, begin));
  }
  return top;
}

// Calls f(i) for the logits, in order, of every block whose maximum `wanted` accepts.
template <class Wanted, class F>
void for_each_in_blocks(std::span<const float> logits, Wanted wanted, F f) {
  for (size_t begin = 0; begin < logits.size(); begin += kScanBlock) {
    if (!wanted(block_maximum(logits, begin))) continue;
    const size_t end = std::min(begin + kScanBlock, logits.size());
    for (size_t i = begin; i < end; ++i) f(i);
  }
}

// The first of the largest logits.
inline int32_t argmax(std::span<const float> logits) {
  float best = -std::numeric_limits<float>::infinity();
  size_t where = 0;
  for_each_in_blocks(
      logits, [&](float maximum) { return maximum > best; },
      [&](size_t i) {
        if (logits[i] > best) {
          best = logits[i];
          where = i;
        }
      });
  return static_cast<int32_t>(where);
}

}  // namespace gptx::cpu
