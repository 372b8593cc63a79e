#include "core/checksum.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <thread>
#include <vector>

namespace gptx {
namespace {

static_assert(std::endian::native == std::endian::little, "model files are little-endian");

constexpr uint64_t kPrime1 = 0x9E3779B185EBCA87u;
constexpr uint64_t kPrime2 = 0xC2B2AE3D27D4EB4Fu;
constexpr uint64_t kPrime3 = 0x165667B19E3779F9u;
constexpr uint64_t kPrime4 = 0x85EBCA77C2B2AE63u;
constexpr uint64_t kPrime5 = 0x27D4EB2F165667C5u;

template <class T>
uint64_t load(const std::byte* p) noexcept {
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

uint64_t round(uint64_t lane, uint64_t word) noexcept {
  return std::rotl(lane + word * kPrime2, 31) * kPrime1;
}

uint64_t merge(uint64_t hash, uint64_t lane) noexcept {
  return (hash ^ round(0, lane)) * kPrime1 + kPrime4;
}

}  // namespace

uint64_t xxh64(Bytes data) noexcept {
  const std::byte* p = data.data();
  const std::byte* const end = p + data.size();
  uint64_t hash = kPrime5;
  if (data.size() >= 32) {
    uint64_t lane[4] = {kPrime1 + kPrime2, kPrime2, 0, 0 - kPrime1};
    for (; end - p >= 32; p += 32) {
      for (int i = 0; i < 4; ++i) lane[i] = round(lane[i], load<uint64_t>(p + 8 * i));
    }
    hash = std::rotl(lane[0], 1) + std::rotl(lane[1], 7) + std::rotl(lane[2], 12) +
           std::rotl(lane[3], 18);
    for (const uint64_t l : lane) hash = merge(hash, l);
  }
  hash += data.size();
  for (; end - p >= 8; p += 8) {
    hash = std::rotl(hash ^ round(0, load<uint64_t>(p)), 27) * kPrime1 + kPrime4;
  }
  if (end - p >= 4) {
    hash = std::rotl(hash ^ (load<uint32_t>(p) * kPrime1), 23) * kPrime2 + kPrime3;
    p += 4;
  }
  for (; p < end; ++p) hash = std::rotl(hash ^ (load<uint8_t>(p) * kPrime5), 11) * kPrime1;
  hash = (hash ^ (hash >> 33)) * kPrime2;
  hash = (hash ^ (hash >> 29)) * kPrime3;
  return hash ^ (hash >> 32);
}

void tree_checksums(std::span<uint64_t> out, std::span<const Bytes> buffers, int threads) {
  std::vector<Bytes> chunks;
  std::vector<size_t> first(buffers.size() + 1, 0);
  for (size_t i = 0; i < buffers.size(); ++i) {
    Bytes rest = buffers[i];
    do {
      const size_t n = std::min(rest.size(), kChecksumChunk);
      chunks.push_back(rest.first(n));
      rest = rest.subspan(n);
    } while (!rest.empty());
    first[i + 1] = chunks.size();
  }

  std::vector<uint64_t> digests(chunks.size());
  std::atomic<size_t> next{0};
  const auto work = [&]() noexcept {
    for (size_t i = next++; i < chunks.size(); i = next++) digests[i] = xxh64(chunks[i]);
  };
  const size_t wanted = std::min(static_cast<size_t>(std::max(threads, 1)), chunks.size());
  {
    std::vector<std::jthread> helpers;
    for (size_t i = 1; i < wanted; ++i) helpers.emplace_back(work);
    work();
  }
  for (size_t i = 0; i < buffers.size(); ++i) {
    out[i] = xxh64(std::as_bytes(std::span(digests).subspan(first[i], first[i + 1] - first[i])));
  }
}

}  // namespace gptx
