// The vocabulary of csrc/cuda/kernels/vocabulary.h on a CPU.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstddef>
#include <cstdint>

#include "emulator.h"

#define GPTX_KERNEL inline
#define GPTX_DEVICE inline
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

namespace gptx::cuda {

using std::max;
using std::min;

inline constexpr int kWarp = emulator::kLanes;

inline int thread_index() { return emulator::current().thread; }
inline int thread_count() { return emulator::grid().shape.threads; }
inline int lane_index() { return thread_index() % kWarp; }
inline int warp_index() { return thread_index() / kWarp; }
inline int warp_count() { return thread_count() / kWarp; }
inline int block_x() { return static_cast<int>(emulator::current().block->x); }
inline int block_y() { return static_cast<int>(emulator::current().block->y); }
inline int block_z() { return static_cast<int>(emulator::current().block->z); }
inline int grid_x() { return static_cast<int>(emulator::grid().shape.x); }

inline void sync_block() { emulator::sync_block(); }

struct Nothing {};
inline void sync_warp() {
  static const char operation = 0;
  emulator::collective<Nothing, Nothing>(&operation, {}, [](auto&, auto&) {});
}

template <class T>
T shuffle_xor(T value, int mask) {
  static const char operation = 0;
  struct In {
    T value;
    int mask;
  };
  return emulator::collective<In, T>(&operation, {value, mask}, [](auto& in, auto& out) {
    for (int i = 0; i < kWarp; ++i) out[i] = in[i ^ in[i].mask].value;
  });
}

template <class T>
T shuffle(T value, int lane) {
  static const char operation = 0;
  struct In {
    T value;
    int lane;
  };
  return emulator::collective<In, T>(&operation, {value, lane}, [](auto& in, auto& out) {
    for (int i = 0; i < kWarp; ++i) out[i] = in[static_cast<unsigned>(in[i].lane) % kWarp].value;
  });
}

inline std::byte* shared_memory() { return emulator::current().block->shared.get(); }

inline void let_next_kernel_start() {}
inline void wait_for_previous_kernel() { emulator::wait_for_previous_kernel(); }

inline float as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t as_bits(float x) { return std::bit_cast<uint32_t>(x); }

template <class Sum>
struct MmaIn {
  Sum c[4];
  uint32_t a[4], b[2];
};
template <class Sum>
struct MmaOut {
  Sum c[4];
};

using Words = uint32_t[8];  // of a row of a, or of a column of b

// The fragments as PTX lays them out: word (row, k) of a belongs to lane 4 (row % 8) + k % 4.
template <class Sum, class Dot>
void mma(const void* operation, Sum (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Dot dot) {
  MmaIn<Sum> mine;
  std::memcpy(mine.c, c, sizeof c);
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.b, b, sizeof b);
  const auto out = emulator::collective<MmaIn<Sum>, MmaOut<Sum>>(operation, mine, [&](auto& in, auto& outs) {
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 8; ++column) {
        const int owner = row % 8 * 4 + column / 2;
        const int slot = row / 8 * 2 + column % 2;
        Words x, y;
        for (int k = 0; k < 8; ++k) {
          x[k] = in[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2];
          y[k] = in[column * 4 + k % 4].b[k / 4];
        }
        outs[owner].c[slot] = dot(in[owner].c[slot], x, y);
      }
    }
  });
  std::memcpy(c, out.c, sizeof c);
}

// Adds products to a sum as Hopper's tensor cores do (Xie et al., 2025, arXiv 2511.10909): all of an instruction at once, as
// numbers with 25 bits behind the point of the largest one, cut off, and the sum cut off to a float.
template <int N>
float add_truncated(float sum, const float (&x)[N], const float (&y)[N]) {
  constexpr int kBits = 25;
  int top = sum == 0.0f ? -200 : std::ilogb(sum);
  for (int i = 0; i < N; ++i) {
    if (x[i] != 0.0f && y[i] != 0.0f) top = max(top, std::ilogb(x[i]) + std::ilogb(y[i]));
  }
  const auto cut = [&](double value) { return static_cast<int64_t>(std::ldexp(value, kBits - top)); };
  int64_t fixed = cut(double{sum});
  for (int i = 0; i < N; ++i) fixed += cut(double{x[i]} * double{y[i]});
  const double exact = std::ldexp(static_cast<double>(fixed), top - kBits);
  const auto nearest = static_cast<float>(exact);
  return std::fabs(double{nearest}) > std::fabs(exact) ? std::nextafter(nearest, 0.0f) : nearest;
}

// One by one, unless GPTX_EMULATED_TRUNCATES is set.
template <int N>
float add_products(float sum, const float (&x)[N], const float (&y)[N]) {
  bool finite = std::isfinite(sum);
  for (int i = 0; i < N; ++i) finite = finite && std::isfinite(x[i]) && std::isfinite(y[i]);
  if (finite && std::getenv("GPTX_EMULATED_TRUNCATES") != nullptr) return add_truncated(sum, x, y);
  for (int i = 0; i < N; ++i) sum += x[i] * y[i];
  return sum;
}

inline float dot_bf16(float sum, const Words& x, const Words& y) {
  float a[16], b[16];
  for (int i = 0; i < 8; ++i) {
    a[2 * i] = as_float(x[i] << 16);
    b[2 * i] = as_float(y[i] << 16);
    a[2 * i + 1] = as_float(x[i] & 0xffff0000u);
    b[2 * i + 1] = as_float(y[i] & 0xffff0000u);
  }
  return add_products(sum, a, b);
}
inline float dot_tf32(float sum, const Words& x, const Words& y) {
  float a[8], b[8];
  for (int i = 0; i < 8; ++i) {
    a[i] = as_float(x[i] & 0xffffe000u);
    b[i] = as_float(y[i] & 0xffffe000u);
  }
  return add_products(sum, a, b);
}
inline int32_t dot_int8(int32_t sum, const Words& x, const Words& y) {
  for (int i = 0; i < 8; ++i) {
    for (int shift = 0; shift < 32; shift += 8) {
      sum += static_cast<int8_t>(x[i] >> shift) * static_cast<uint8_t>(y[i] >> shift);
    }
  }
  return sum;
}

inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static const char operation = 0;
  mma(&operation, c, a, b, dot_bf16);
}
inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static const char operation = 0;
  mma(&operation, c, a, b, dot_tf32);
}
inline void mma_int8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static const char operation = 0;
  mma(&operation, c, a, b, dot_int8);
}

inline constexpr bool kHasWarpgroups = true;
inline constexpr int kGroupsOfUnit = 8;

// The bits of PTX: where it begins, to the next 16 bytes of a row, to the next 8 rows, each in units of 16 bytes.
inline uint64_t matrix_descriptor(const void* shared, int to_next_inputs, int to_next_rows) {
  const auto begin = static_cast<const std::byte*>(shared) - shared_memory();
  return static_cast<uint64_t>(begin) >> 4 | static_cast<uint64_t>(to_next_inputs >> 4) << 16 |
         static_cast<uint64_t>(to_next_rows >> 4) << 32;
}

inline void publish_to_warpgroups() { emulator::current().published = true; }
inline void begin_warpgroup_products() { emulator::current().products_begun = true; }
inline void close_warpgroup_products() {
  emulator::Fiber& me = emulator::current();
  me.products_begun = false;
  me.closed.push_back(me.products);
}
template <int Pending>
void wait_warpgroup_products() {
  emulator::wait_for_products(Pending);
}
template <class T>
void pin(T&) {}

template <class Sum, class Dot>
void wgmma(const void* operation, Sum (&c)[kGroupsOfUnit][4], const uint32_t (&a)[4], uint64_t b, bool adds, Dot dot) {
  const std::byte* const shared = shared_memory();
  // Whether wgmma adds up in another order than mma.sync.
  const bool backwards = std::getenv("GPTX_EMULATED_BACKWARDS") != nullptr;
  const auto multiply = [shared, dot, backwards](const emulator::Product& p) {
    const std::byte* const begin = shared + (p.b & 0x3fffu) * 16;
    const size_t to_next_inputs = (p.b >> 16 & 0x3fffu) * 16, to_next_rows = (p.b >> 32 & 0x3fffu) * 16;
    for (int output = 0; output < 64; ++output) {
      for (int row = 0; row < 64; ++row) {
        const int lane = output / 16 * kWarp + output % 8 * 4;
        auto* const sums = static_cast<Sum(*)[4]>(p.c[lane + row % 8 / 2]);
        Sum& out = sums[row / 8][output % 16 / 8 * 2 + row % 2];
        Words x, y;
        for (int i = 0; i < 8; ++i) {
          const int k = backwards ? 7 - i : i;
          x[i] = p.a[lane + k % 4][output % 16 / 8 + k / 4 * 2];
          std::memcpy(&y[i],
                      begin + static_cast<size_t>(row / 8) * to_next_rows +
                          static_cast<size_t>(k / 4) * to_next_inputs + row % 8 * 16 + k % 4 * 4,
                      4);
        }
        out = dot(p.adds ? out : Sum{0}, x, y);
      }
    }
  };
  emulator::ask_for_product(operation, c, a, b, adds, multiply);
}

inline void wgmma_bf16(float (&c)[kGroupsOfUnit][4], const uint32_t (&a)[4], uint64_t b, bool adds) {
  static const char operation = 0;
  wgmma(&operation, c, a, b, adds, dot_bf16);
}
inline void wgmma_int8(int32_t (&c)[kGroupsOfUnit][4], const uint32_t (&a)[4], uint64_t b, bool adds) {
  static const char operation = 0;
  wgmma(&operation, c, a, b, adds, dot_int8);
}

inline float round_tf32(float x) {
  const uint32_t bits = as_bits(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return x;
  return as_float((bits + 0x1000u) & 0xffffe000u);
}

inline uint32_t bf16_bits(float x) {
  const uint32_t bits = as_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
inline uint32_t bf16_pair(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }

inline uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    out |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7u) & 0xffu) << 8 * i;
  }
  return out;
}

inline float divide(float x, float y) { return x / y; }

inline int32_t round_to_int(float x) {
  if (std::isnan(x)) return 0;
  return static_cast<int32_t>(std::nearbyint(std::fmin(std::fmax(x, -2147483648.0f), 2147483520.0f)));
}

// A copy lands when the thread waits for it, or now: both are allowed.
inline void copy_16_bytes_async(void* shared, const void* global, bool exists) {
  emulator::Fiber::Copy copy{shared, {}};
  if (exists) std::memcpy(copy.bytes, std::assume_aligned<16>(global), 16);
  if (emulator::random_number() % 2 == 0) {
    std::memcpy(shared, copy.bytes, 16);
  } else {
    emulator::current().copies.back().push_back(copy);
  }
}
inline void close_async_group() { emulator::current().copies.emplace_back(); }
template <int Pending>
void wait_async_groups() {
  emulator::current().published = false;
  auto& groups = emulator::current().copies;
  while (groups.size() > Pending + 1) {
    for (const auto& copy : groups.front()) std::memcpy(copy.to, copy.bytes, 16);
    groups.erase(groups.begin());
  }
}

inline uint4 load_streamed(const uint4* p) { return *p; }
template <class T>
T load_constant(const T* p) {
  return *p;
}

inline uint32_t take_ticket(uint32_t* counter) { return (*counter)++; }

template <class T>
T atomic_add(T* p, T value) {
  const T before = *p;
  *p += value;
  return before;
}
template <class T>
void atomic_max(T* p, T value) {
  if (value > *p) *p = value;
}
inline uint32_t atomic_or(uint32_t* p, uint32_t bits) {
  const uint32_t before = *p;
  *p |= bits;
  return before;
}

}  // namespace gptx::cuda
