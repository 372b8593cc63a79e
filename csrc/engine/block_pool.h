// The ids of the KV blocks that are free. A block is in one table at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace gptx {

class BlockPool {
 public:
  explicit BlockPool(size_t blocks);

  size_t size() const noexcept { return size_; }
  size_t free() const noexcept { return free_.size(); }

  // Moves n free blocks to the end of `table`. Requires: n <= free().
  void take(std::vector<int32_t>& table, size_t n);

  // Returns all blocks of `table` and empties it.
  void give_back(std::vector<int32_t>& table) noexcept;

 private:
  size_t size_;
  std::vector<int32_t> free_;  // the last one is handed out next, so that warm memory is reused
};

}  // namespace gptx
