// In the place of cpu/isa.cpp where the kernels are emulated: any CPU runs them all.
#include "cpu/isa.h"

namespace gptx::cpu {

extern const KernelTable k_scalar_kernels;
extern const KernelTable k_avx512_kernels;
extern const KernelTable k_avx512_vnni_kernels;
extern const KernelTable k_avx512_bf16_kernels;
extern const KernelTable k_avx512_amx_kernels;

const std::vector<const KernelTable*>& usable_kernels() {
  static const std::vector<const KernelTable*> tables = {
      &k_avx512_amx_kernels, &k_avx512_bf16_kernels, &k_avx512_vnni_kernels, &k_avx512_kernels,
      &k_scalar_kernels};
  return tables;
}

}  // namespace gptx::cpu
