#include "engine/block_pool.h"

#include <algorithm>

namespace gptx {

BlockPool::BlockPool(size_t blocks) : size_(blocks) {
  free_.reserve(blocks);
  for (size_t i = blocks; i > 0; --i) free_.push_back(static_cast<int32_t>(i - 1));
}

void BlockPool::take(std::vector<int32_t>& table, size_t n) {
  table.reserve(table.size() + n);
  for (size_t i = 0; i < n; ++i) {
    table.push_back(free_.back());
    free_.pop_back();
  }
}

void BlockPool::give_back(std::vector<int32_t>& table) noexcept {
  free_.insert(free_.end(), table.rbegin(), table.rend());  // within the capacity reserved above
  table.clear();
}

}  // namespace gptx
