// A read-only file in memory: pages come from the page cache and are shared between processes.
#pragma once

#include <cstddef>
#include <span>
#include <string>

namespace gptx {

class MappedFile {
 public:
  // Maps the whole of a regular file. Throws std::system_error with errno. A file that shrinks
  // while it is mapped is found here, not by a signal, where the kernel can populate a mapping.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> bytes() const noexcept { return {data_, size_}; }

 private:
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace gptx
