// The KV cache as sequences see it: blocks on demand, shared prefixes, copies on write.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "engine/block_pool.h"
#include "model/runner.h"

namespace gptx {

constexpr size_t blocks_for(size_t tokens) { return (tokens + kBlockTokens - 1) / kBlockTokens; }

// Tokens, and how far their keys and values are in the cache. The model sees a window of them: it begins at the
// first one unless the context has slid.
struct Sequence {
  size_t window() const noexcept { return tokens.size() - begin; }
  std::span<const int32_t> windowed() const { return std::span(tokens).subspan(begin); }

  std::vector<int32_t> tokens;
  size_t begin = 0;                    // of the window
  size_t computed = 0;                 // tokens of the window whose K and V are in the blocks
  std::vector<int32_t> blocks;         // of the window, in order
  std::vector<BlockPool::Node> nodes;  // of its first blocks, those that are full and remembered
};

class KvCache {
 public:
  // `poison`: memory that nobody uses is NaN, so that reading it shows (tests).
  KvCache(Runner& runner, size_t blocks, size_t max_cached, bool poison)
      : runner_(runner), pool_(blocks, max_cached), poison_(poison) {}

  // Takes what is remembered of the window's beginning, less than `limit` tokens of it. Requires: no blocks.
  void match(Sequence& s, size_t limit);

  // Shares the blocks of `from` for its first `n` tokens, which are computed there and the same in both.
  void share(Sequence& to, const Sequence& from, size_t n);

  // Gives the sequence blocks of its own for the positions from `computed` up to `end`, as far as there are
  // any. Returns the end of the positions it may write now.
  size_t reserve(Sequence& s, size_t end);

  // Remembers the blocks that are full now.
  void remember(Sequence& s);

  // Keeps the first n computed tokens of the window and gives back the blocks behind them.
  void truncate(Sequence& s, size_t n) noexcept;

  // Whether two sequences are about to compute the same block.
  static bool next_block_is_same(const Sequence& a, const Sequence& b);

  const BlockPool& pool() const { return pool_; }

 private:
  std::optional<int32_t> take();
  void drop(int32_t block) noexcept;

  Runner& runner_;
  BlockPool pool_;
  bool poison_;
};

}  // namespace gptx
