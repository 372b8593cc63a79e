#include "cpu/isa.h"

#include "core/error.h"

#if defined(GPTX_HAVE_ISA_avx2)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(GPTX_HAVE_ISA_neon) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace gptx::cpu {

extern const KernelTable k_scalar_kernels;
extern const KernelTable k_avx2_kernels;
extern const KernelTable k_avx512_kernels;
extern const KernelTable k_avx512_vnni_kernels;
extern const KernelTable k_avx512_bf16_kernels;
extern const KernelTable k_avx512_amx_kernels;
extern const KernelTable k_neon_kernels;
extern const KernelTable k_neon_dotprod_kernels;
extern const KernelTable k_neon_i8mm_kernels;

namespace {

bool always() { return true; }

#if defined(GPTX_HAVE_ISA_avx2)
struct Registers {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

// All zero where the CPU does not know the leaf.
Registers cpuid(uint32_t leaf, uint32_t subleaf = 0) {
  Registers r;
  if (!__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d)) return {};
  return r;
}

// What the operating system saves on a context switch: without it the registers cannot be used.
bool saves(uint64_t state) {
  if (!(cpuid(1).c & bit_OSXSAVE)) return false;
  uint32_t low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return ((uint64_t{high} << 32 | low) & state) == state;
}

bool has_avx2() {
  constexpr uint64_t kYmm = 0x6;
  return saves(kYmm) && (cpuid(1).c & bit_FMA) && (cpuid(7).b & bit_AVX2);
}

bool has_avx512() {
  constexpr uint64_t kZmm = 0xE6;
  constexpr uint32_t kNeeded = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
  return saves(kZmm) && has_avx2() && (cpuid(7).b & kNeeded) == kNeeded;
}

bool has_avx512_vnni() { return has_avx512() && (cpuid(7).c & bit_AVX512VNNI); }

bool has_avx512_bf16() { return has_avx512_vnni() && (cpuid(7, 1).a & bit_AVX512BF16); }

// The system keeps the tiles of a process that has asked for them.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_avx512_amx() {
  constexpr uint64_t kTiles = 0x60000;
  constexpr uint32_t kNeeded = 1u << 24 | 1u << 25;  // AMX-TILE, AMX-INT8
  return saves(kTiles) && has_avx512_bf16() && (cpuid(7).d & kNeeded) == kNeeded &&
         may_use_tiles();
}

#elif defined(GPTX_HAVE_ISA_neon)
bool has_dotprod() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#elif defined(__ARM_FEATURE_DOTPROD)
  return true;
#else
  return false;
#endif
}

bool has_i8mm() {
#if defined(__linux__)
  constexpr unsigned long kI8mm = 1ul << 13;  // HWCAP2_I8MM, which older headers lack
  return has_dotprod() && (getauxval(AT_HWCAP2) & kI8mm) != 0;
#elif defined(__ARM_FEATURE_MATMUL_INT8)
  return true;
#else
  return false;
#endif
}
#endif

struct Candidate {
  const KernelTable& table;
  bool (*usable)();
};

// The tables of this architecture, best first.
const Candidate kCandidates[] = {
#if defined(GPTX_HAVE_ISA_avx2)
    {k_avx512_amx_kernels, has_avx512_amx},
    {k_avx512_bf16_kernels, has_avx512_bf16},
    {k_avx512_vnni_kernels, has_avx512_vnni},
    {k_avx512_kernels, has_avx512},
    {k_avx2_kernels, has_avx2},
#elif defined(GPTX_HAVE_ISA_neon)
    {k_neon_i8mm_kernels, has_i8mm},
    {k_neon_dotprod_kernels, has_dotprod},
    {k_neon_kernels, always},
#endif
    {k_scalar_kernels, always},
};

std::vector<const KernelTable*> find_usable() {
  std::vector<const KernelTable*> tables;
  for (const Candidate& candidate : kCandidates) {
    if (candidate.usable()) tables.push_back(&candidate.table);
  }
  return tables;
}

}  // namespace

const std::vector<const KernelTable*>& usable_kernels() {
  static const std::vector<const KernelTable*> tables = find_usable();
  return tables;
}

const KernelTable& kernels_named(std::string_view name) {
  if (name.empty()) return *usable_kernels().front();
  std::string names;
  for (const KernelTable* table : usable_kernels()) {
    if (name == table->name) return *table;
    names += (names.empty() ? "" : ", ") + std::string(table->name);
  }
  throw UnsupportedError("isa: expected one of " + names + ", got '" + std::string(name) + "'");
}

}  // namespace gptx::cpu
