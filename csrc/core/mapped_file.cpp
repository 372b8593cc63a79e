#include "core/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <system_error>

namespace gptx {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

struct Descriptor {
  int fd;
  ~Descriptor() { ::close(fd); }
};

[[noreturn]] void fail(int error, const std::string& path) {
  throw std::system_error(error, std::generic_category(), path);
}

// Reserves address space so that the file can start on a huge page boundary; the slack is returned.
std::byte* map_aligned(int fd, size_t size, const std::string& path) {
  const size_t reserved = size + kHugePage;
  void* const area = ::mmap(nullptr, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (area == MAP_FAILED) fail(errno, path);
  auto* const begin = static_cast<std::byte*>(area);
  const size_t skip = (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
  void* const data =
      ::mmap(begin + skip, size, PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0);
  if (data == MAP_FAILED) {
    const int error = errno;
    ::munmap(area, reserved);
    fail(error, path);
  }
  const size_t page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  const size_t used = (size + page - 1) / page * page;
  if (skip > 0) ::munmap(begin, skip);
  if (skip + used < reserved) ::munmap(begin + skip + used, reserved - skip - used);
  return static_cast<std::byte*>(data);
}

}  // namespace

MappedFile::MappedFile(const std::string& path) {
  // O_NONBLOCK keeps a FIFO from blocking the open; it has no effect on regular files.
  const Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  if (file.fd < 0) fail(errno, path);
  struct stat status{};
  if (::fstat(file.fd, &status) != 0) fail(errno, path);
  if (!S_ISREG(status.st_mode)) fail(S_ISDIR(status.st_mode) ? EISDIR : EINVAL, path);
  const auto size = static_cast<size_t>(status.st_size);
  if (size == 0) return;

  data_ = map_aligned(file.fd, size, path);
  size_ = size;
  ::madvise(data_, size_, MADV_HUGEPAGE);
#ifdef MADV_POPULATE_READ
  if (::madvise(data_, size_, MADV_POPULATE_READ) != 0 && errno == EFAULT) {
    ::munmap(data_, size_);
    fail(EIO, path);
  }
#endif
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(data_, size_);
}

}  // namespace gptx
