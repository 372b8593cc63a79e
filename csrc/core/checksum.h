// XXH64 (Yann Collet, https://github.com/Cyan4973/xxHash, doc/xxhash_spec.md) and the tree of it that
// guards the tensors of a model file. Bijective per 8-byte lane, so no single changed word can hide.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace gptx {

using Bytes = std::span<const std::byte>;

inline constexpr size_t kChecksumChunk = size_t{1} << 20;

// XXH64 with seed 0.
uint64_t xxh64(Bytes data) noexcept;

// out[i] = XXH64 of the little-endian digests of the 1 MiB chunks of buffers[i]; chunks are hashed
// by up to `threads` threads.
void tree_checksums(std::span<uint64_t> out, std::span<const Bytes> buffers, int threads);

}  // namespace gptx
