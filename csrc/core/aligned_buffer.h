// Memory on a cache line boundary, zeroed, freed with its owner.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace gptx {

inline constexpr size_t kCacheLine = 64;

template <class T>
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(size_t count) : bytes_((count * sizeof(T) + kCacheLine - 1) / kCacheLine * kCacheLine) {
    data_.reset(static_cast<T*>(std::aligned_alloc(kCacheLine, bytes_ == 0 ? kCacheLine : bytes_)));
    if (data_ == nullptr) throw std::bad_alloc();
    std::memset(static_cast<void*>(data_.get()), 0, bytes_);
  }

  T* data() const noexcept { return data_.get(); }
  size_t bytes() const noexcept { return bytes_; }

 private:
  struct Free {
    void operator()(T* p) const noexcept { std::free(p); }
  };
  size_t bytes_ = 0;
  std::unique_ptr<T, Free> data_;
};

}  // namespace gptx
