// What kernels ask of the hardware. The tests bring the same vocabulary for a CPU
// (tests/native/cuda/emulated_vocabulary.h), so that every kernel also runs where there is no GPU.
#pragma once

#ifdef GPTX_EMULATED_CUDA
#include "emulated_vocabulary.h"
#else

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#define GPTX_KERNEL __global__
#define GPTX_DEVICE __device__ __forceinline__

namespace gptx::cuda {

inline constexpr int kWarp = 32;

GPTX_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
GPTX_DEVICE int thread_count() { return static_cast<int>(blockDim.x); }
GPTX_DEVICE int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }
GPTX_DEVICE int warp_index() { return static_cast<int>(threadIdx.x) / kWarp; }
GPTX_DEVICE int warp_count() { return static_cast<int>(blockDim.x) / kWarp; }
GPTX_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
GPTX_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
GPTX_DEVICE int block_z() { return static_cast<int>(blockIdx.z); }
GPTX_DEVICE int grid_x() { return static_cast<int>(gridDim.x); }

GPTX_DEVICE void sync_block() { __syncthreads(); }
GPTX_DEVICE void sync_warp() { __syncwarp(); }

// The value of the lane whose index differs by `mask`.
template <class T>
GPTX_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// The value of lane `lane` modulo 32.
template <class T>
GPTX_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

// The shared memory of the block, as long as the launch said.
GPTX_DEVICE std::byte* shared_memory() {
  extern __shared__ __align__(128) unsigned char bytes[];
  return reinterpret_cast<std::byte*>(bytes);
}

// Programmatic dependent launch (CUDA C++ Programming Guide): the next kernel may start now; and everything
// before this kernel is complete and visible. Between the two only weights may be read.
GPTX_DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
GPTX_DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// c += a b: a 16 x 8 words, b 8 words x 8, both in fragments (PTX ISA, "Matrix fragments for mma"). For bytes, those
// of a are signed and those of b are not.
GPTX_DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
GPTX_DEVICE void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
GPTX_DEVICE void mma_int8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Warpgroups: 4 warps that begin at a multiple of 4 multiply together, and go on while they do (PTX ISA, "Asynchronous
// Warpgroup Level Matrix Multiply-Accumulate Instructions"). Code for other architectures than 9.0a has none of it.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
inline constexpr bool kHasWarpgroups = true;
#else
inline constexpr bool kHasWarpgroups = false;
#endif
inline constexpr int kGroupsOfUnit = 8;  // groups of 8 rows of one product

// Where b lies in shared memory: 8 rows by 16 bytes are together; from there, the bytes to the next 16 bytes of these rows
// and to the next 8 rows. All are multiples of 16.
GPTX_DEVICE uint64_t matrix_descriptor(const void* shared, int to_next_inputs, int to_next_rows) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  return uint64_t{(address & 0x3ffffu) >> 4} | static_cast<uint64_t>(to_next_inputs >> 4) << 16 |
         static_cast<uint64_t>(to_next_rows >> 4) << 32;
}

// What this thread stored or copied to shared memory is visible to the products of whoever passes a barrier after it.
GPTX_DEVICE void publish_to_warpgroups() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// In front of products whose registers were written by something else.
GPTX_DEVICE void begin_warpgroup_products() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
GPTX_DEVICE void close_warpgroup_products() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Waits until at most `Pending` closed groups are under way. Until then neither registers of a product may be touched.
template <int Pending>
GPTX_DEVICE void wait_warpgroup_products() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
#endif
}
// Keeps the compiler from moving uses of a sum across the asynchronous products.
GPTX_DEVICE void pin(float& x) { asm volatile("" : "+f"(x)::"memory"); }
GPTX_DEVICE void pin(int32_t& x) { asm volatile("" : "+r"(x)::"memory"); }

// c += a b, or c = a b where it does not add: a is 16 x 8 words of each warp in fragments as above, b 8 words x 64 rows
// in shared memory, c 8 fragments.
GPTX_DEVICE void wgmma_bf16(float (&c)[kGroupsOfUnit][4], const uint32_t (&a)[4], uint64_t b, bool adds) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile(
      "{ .reg .pred adds; setp.ne.b32 adds, %37, 0;"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, adds, 1, 1, 0; }"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]),
        "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]),
        "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]),
        "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]), "+f"(c[3][3]),
        "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]),
        "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]),
        "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]),
        "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(adds)));
#endif
}
GPTX_DEVICE void wgmma_int8(int32_t (&c)[kGroupsOfUnit][4], const uint32_t (&a)[4], uint64_t b, bool adds) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile(
      "{ .reg .pred adds; setp.ne.b32 adds, %37, 0;"
      "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.u8 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, adds; }"
      : "+r"(c[0][0]), "+r"(c[0][1]), "+r"(c[0][2]), "+r"(c[0][3]),
        "+r"(c[1][0]), "+r"(c[1][1]), "+r"(c[1][2]), "+r"(c[1][3]),
        "+r"(c[2][0]), "+r"(c[2][1]), "+r"(c[2][2]), "+r"(c[2][3]),
        "+r"(c[3][0]), "+r"(c[3][1]), "+r"(c[3][2]), "+r"(c[3][3]),
        "+r"(c[4][0]), "+r"(c[4][1]), "+r"(c[4][2]), "+r"(c[4][3]),
        "+r"(c[5][0]), "+r"(c[5][1]), "+r"(c[5][2]), "+r"(c[5][3]),
        "+r"(c[6][0]), "+r"(c[6][1]), "+r"(c[6][2]), "+r"(c[6][3]),
        "+r"(c[7][0]), "+r"(c[7][1]), "+r"(c[7][2]), "+r"(c[7][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(adds)));
#endif
}

// The nearest number with 10 bits of mantissa, ties away from zero.
GPTX_DEVICE float round_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
}

// Two floats as bfloat16, ties to even; `low` in the lower half.
GPTX_DEVICE uint32_t bf16_pair(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Four bytes chosen from the eight of (low, high), a nibble of `selector` each.
GPTX_DEVICE uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

GPTX_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
GPTX_DEVICE uint32_t as_bits(float x) { return __float_as_uint(x); }
// A quotient within 2 units in the last place; 0 where the divisor is larger than 2^126.
GPTX_DEVICE float divide(float x, float y) { return __fdividef(x, y); }
GPTX_DEVICE int32_t round_to_int(float x) { return __float2int_rn(x); }

// 16 bytes from global to shared memory without waiting; zeros where `exists` is false.
GPTX_DEVICE void copy_16_bytes_async(void* shared, const void* global, bool exists) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(exists ? 16 : 0)
               : "memory");
}
GPTX_DEVICE void close_async_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `Pending` of this thread's groups are under way.
template <int Pending>
GPTX_DEVICE void wait_async_groups() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// 16 bytes that are read once: they do not displace what others share.
GPTX_DEVICE uint4 load_streamed(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// A number of 4 bytes that no kernel writes.
template <class T>
GPTX_DEVICE T load_constant(const T* p) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(bits) : "l"(p));
  return *reinterpret_cast<T*>(&bits);
}

// Adds one and returns what was there. What the block wrote before a barrier in front of it is visible behind a barrier
// that follows it, in every block that comes later.
GPTX_DEVICE uint32_t take_ticket(uint32_t* counter) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

template <class T>
GPTX_DEVICE T atomic_add(T* p, T value) {
  return atomicAdd(p, value);
}
GPTX_DEVICE void atomic_max(uint64_t* p, uint64_t value) {
  atomicMax(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(value));
}
GPTX_DEVICE uint32_t atomic_or(uint32_t* p, uint32_t bits) { return atomicOr(p, bits); }

}  // namespace gptx::cuda

#endif
