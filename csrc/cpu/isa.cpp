#include "cpu/isa.h"

#include "core/error.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace gptx::cpu {

extern const KernelTable k_scalar_kernels;
#ifdef GPTX_HAVE_ISA_avx2
extern const KernelTable k_avx2_kernels;
extern const KernelTable k_avx512_kernels;
#endif

namespace {

#if defined(__x86_64__)
// What the operating system saves on a context switch: without it the registers cannot be used.
uint64_t saved_state() {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return 0;
  uint32_t low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

bool has_avx2() {
  constexpr uint64_t kYmm = 0x6;
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if ((saved_state() & kYmm) != kYmm) return false;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_FMA)) return false;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_AVX2);
}

bool has_avx512() {
  constexpr uint64_t kZmm = 0xE6;
  constexpr uint32_t kNeeded = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if ((saved_state() & kZmm) != kZmm || !has_avx2()) return false;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & kNeeded) == kNeeded;
}
#endif

std::vector<const KernelTable*> find_usable() {
  std::vector<const KernelTable*> tables;
#ifdef GPTX_HAVE_ISA_avx2
  if (has_avx512()) tables.push_back(&k_avx512_kernels);
  if (has_avx2()) tables.push_back(&k_avx2_kernels);
#endif
  tables.push_back(&k_scalar_kernels);
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
