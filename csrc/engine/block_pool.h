// The KV blocks by number: who uses them, which are free, and which still hold a prefix that may come again.
//
// A block is shared by reference count. A full block that was computed can be remembered under the tokens it
// holds and everything before them; once nobody uses it, it stays until its memory is wanted (least recently
// used first). Prefixes are a trie: a node is (node before, 64 tokens), compared token by token, not by a hash.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <unordered_map>
#include <vector>

#include "core/batch.h"

namespace gptx {

class BlockPool {
 public:
  using Node = uint64_t;
  static constexpr Node kRoot = 0;

  struct Found {
    int32_t block;
    Node node;
  };

  // At most `max_cached` blocks that nobody uses are kept for their prefix.
  BlockPool(size_t blocks, size_t max_cached);

  size_t size() const noexcept { return refs_.size(); }
  // Blocks that `take` can give.
  size_t available() const noexcept { return free_.size() + cached_; }
  size_t cached() const noexcept { return cached_; }

  // A block with one user, or nothing. A free one if there is one, else the least recently used prefix is forgotten.
  std::optional<int32_t> take();

  void share(int32_t block) noexcept;

  // Ends one use. True if the block is free now, its content of no use to anybody.
  bool drop(int32_t block) noexcept;

  // Whether its one user may write into it.
  bool is_exclusive(int32_t block) const noexcept { return refs_[index(block)] == 1 && !is_remembered(block); }

  // The block that holds these 64 tokens behind `before`. It is not shared by this.
  std::optional<Found> find(Node before, std::span<const int32_t> tokens) const;

  // Remembers a full block unless another one holds the same, and returns the node of the prefix.
  Node remember(int32_t block, Node before, std::span<const int32_t> tokens);

  // Forgets the prefix of a block with one user, who may write into it then.
  void claim(int32_t block) noexcept;

  uint32_t users(int32_t block) const noexcept { return refs_[index(block)]; }
  bool is_remembered(int32_t block) const noexcept { return nodes_[index(block)] != kRoot; }

 private:
  struct Key {
    Node before;
    std::array<int32_t, kBlockTokens> tokens;
    bool operator==(const Key&) const = default;
  };
  struct Hash {
    size_t operator()(const Key& key) const noexcept;
  };

  static size_t index(int32_t block) noexcept { return static_cast<size_t>(block); }
  static Key key_of(Node before, std::span<const int32_t> tokens);
  void forget(int32_t block) noexcept;
  void forget_prefix(int32_t block) noexcept;
  void append_to_cached(int32_t block) noexcept;
  void remove_from_cached(int32_t block) noexcept;

  size_t max_cached_;
  std::vector<uint32_t> refs_;
  std::vector<int32_t> free_;  // the last one is handed out next, so that warm memory is reused
  std::unordered_map<Key, int32_t, Hash> prefixes_;
  std::vector<Node> nodes_;       // of each remembered block, else kRoot
  std::vector<const Key*> keys_;  // of each remembered block
  Node next_node_ = kRoot + 1;

  // The cached blocks in a circle through the extra last entry, which is in front of the least recently used one.
  std::vector<int32_t> next_, previous_;
  size_t cached_ = 0;
};

}  // namespace gptx
