#include "engine/block_pool.h"

#include <algorithm>

#include "core/checksum.h"

namespace gptx {

BlockPool::BlockPool(size_t blocks, size_t max_cached)
    : max_cached_(max_cached),
      refs_(blocks, 0),
      nodes_(blocks, kRoot),
      keys_(blocks, nullptr),
      next_(blocks + 1, static_cast<int32_t>(blocks)),
      previous_(blocks + 1, static_cast<int32_t>(blocks)) {
  free_.reserve(blocks);
  for (size_t i = blocks; i > 0; --i) free_.push_back(static_cast<int32_t>(i - 1));
}

std::optional<int32_t> BlockPool::take() {
  if (free_.empty()) {
    if (cached_ == 0) return std::nullopt;
    forget(next_.back());
  }
  const int32_t block = free_.back();
  free_.pop_back();
  refs_[index(block)] = 1;
  return block;
}

void BlockPool::share(int32_t block) noexcept {
  if (refs_[index(block)]++ == 0) remove_from_cached(block);
}

bool BlockPool::drop(int32_t block) noexcept {
  if (--refs_[index(block)] > 0) return false;
  if (!is_remembered(block)) {
    free_.push_back(block);  // within the capacity reserved above
    return true;
  }
  append_to_cached(block);
  if (cached_ > max_cached_) forget(next_.back());
  return false;
}

std::optional<BlockPool::Found> BlockPool::find(Node before, std::span<const int32_t> tokens) const {
  const auto found = prefixes_.find(key_of(before, tokens));
  if (found == prefixes_.end()) return std::nullopt;
  return Found{found->second, nodes_[index(found->second)]};
}

BlockPool::Node BlockPool::remember(int32_t block, Node before, std::span<const int32_t> tokens) {
  const auto [entry, added] = prefixes_.try_emplace(key_of(before, tokens), block);
  if (added) {
    keys_[index(block)] = &entry->first;
    nodes_[index(block)] = next_node_++;
  }
  return nodes_[index(entry->second)];
}

// Of a cached block: its prefix is gone, its memory free.
void BlockPool::forget(int32_t block) noexcept {
  remove_from_cached(block);
  forget_prefix(block);
  free_.push_back(block);
}

void BlockPool::claim(int32_t block) noexcept {
  if (is_remembered(block)) forget_prefix(block);
}

void BlockPool::forget_prefix(int32_t block) noexcept {
  prefixes_.erase(prefixes_.find(*keys_[index(block)]));
  keys_[index(block)] = nullptr;
  nodes_[index(block)] = kRoot;
}

void BlockPool::append_to_cached(int32_t block) noexcept {
  const auto end = static_cast<int32_t>(size());
  const int32_t last = previous_.back();
  next_[index(last)] = block;
  previous_[index(block)] = last;
  next_[index(block)] = end;
  previous_.back() = block;
  ++cached_;
}

void BlockPool::remove_from_cached(int32_t block) noexcept {
  next_[index(previous_[index(block)])] = next_[index(block)];
  previous_[index(next_[index(block)])] = previous_[index(block)];
  --cached_;
}

BlockPool::Key BlockPool::key_of(Node before, std::span<const int32_t> tokens) {
  Key key{before, {}};
  std::copy_n(tokens.begin(), kBlockTokens, key.tokens.begin());
  return key;
}

size_t BlockPool::Hash::operator()(const Key& key) const noexcept {
  const size_t tokens = xxh64(std::as_bytes(std::span(key.tokens)));
  return tokens ^ (key.before * 0x9E3779B97F4A7C15u);
}

}  // namespace gptx
