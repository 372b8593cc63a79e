#include "engine/kv_cache.h"

#include <algorithm>

namespace gptx {
namespace {

BlockPool::Node last_node(const Sequence& s) { return s.nodes.empty() ? BlockPool::kRoot : s.nodes.back(); }

std::span<const int32_t> block_tokens(const Sequence& s, size_t block) {
  return s.windowed().subspan(block * kBlockTokens, kBlockTokens);
}

}  // namespace

void KvCache::match(Sequence& s, size_t limit) {
  while (s.computed + kBlockTokens <= std::min(limit, s.window())) {
    const auto found = pool_.find(last_node(s), block_tokens(s, s.blocks.size()));
    if (!found) return;
    s.nodes.push_back(found->node);
    s.blocks.push_back(found->block);
    pool_.share(found->block);
    s.computed += kBlockTokens;
  }
}

void KvCache::share(Sequence& to, const Sequence& from, size_t n) {
  const size_t whole = std::min(n / kBlockTokens, from.nodes.size());
  to.nodes.assign(from.nodes.begin(), from.nodes.begin() + static_cast<ptrdiff_t>(whole));
  to.blocks.assign(from.blocks.begin(), from.blocks.begin() + static_cast<ptrdiff_t>(blocks_for(n)));
  for (const int32_t block : to.blocks) pool_.share(block);
  to.computed = n;
}

size_t KvCache::reserve(Sequence& s, size_t end) {
  const size_t first = s.computed / kBlockTokens;
  if (first < s.blocks.size() && !pool_.is_exclusive(s.blocks[first])) {
    if (const std::optional<int32_t> copy = take()) {
      try {
        if (s.computed % kBlockTokens != 0) runner_.copy_block(s.blocks[first], *copy);
      } catch (...) {  // of a device
        drop(*copy);
        throw;
      }
      drop(s.blocks[first]);
      s.blocks[first] = *copy;
    } else if (pool_.users(s.blocks[first]) == 1) {
      pool_.claim(s.blocks[first]);  // the prefix is worth less than the text that goes on
    } else {
      return s.computed;
    }
  }
  s.blocks.reserve(blocks_for(end));
  while (s.blocks.size() < blocks_for(end)) {
    const std::optional<int32_t> block = take();
    if (!block) break;
    s.blocks.push_back(*block);
  }
  return std::min(end, s.blocks.size() * kBlockTokens);
}

void KvCache::remember(Sequence& s) {
  while ((s.nodes.size() + 1) * kBlockTokens <= s.computed) {
    const size_t i = s.nodes.size();
    s.nodes.push_back(pool_.remember(s.blocks[i], last_node(s), block_tokens(s, i)));
  }
}

void KvCache::truncate(Sequence& s, size_t n) noexcept {
  s.computed = std::min(s.computed, n);
  s.nodes.resize(std::min(s.nodes.size(), s.computed / kBlockTokens));
  // The last one first: the beginning of a prefix is worth more than its end.
  while (s.blocks.size() > blocks_for(s.computed)) {
    drop(s.blocks.back());
    s.blocks.pop_back();
  }
}

bool KvCache::next_block_is_same(const Sequence& a, const Sequence& b) {
  const size_t i = a.nodes.size();
  if (b.nodes.size() != i || last_node(a) != last_node(b)) return false;
  if (std::min(a.window(), b.window()) < (i + 1) * kBlockTokens) return false;
  return std::ranges::equal(block_tokens(a, i), block_tokens(b, i));
}

std::optional<int32_t> KvCache::take() {
  const std::optional<int32_t> block = pool_.take();
  if (block && poison_) runner_.poison_block(*block);
  return block;
}

void KvCache::drop(int32_t block) noexcept {
  if (pool_.drop(block) && poison_) runner_.poison_block(block);
}

}  // namespace gptx
