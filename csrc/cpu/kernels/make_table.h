// The table of one ISA, made of the kernels above it. Included last by each isa_*.cpp, which names the
// Products it has.
#pragma once

#include "cpu/kernel_table.h"

namespace gptx::cpu::GPTX_ISA {
namespace {

template <class P>
constexpr MatmulKernels matmul_kernels() {
  return {.operand = P::operand, .linear = linear<P>, .probe = probe<P>};
}

template <class BF16, class Int8Fast>
constexpr KernelTable make_table(const char* name) {
  return {.name = name,
          .matmul = {matmul_kernels<F32Product>(), matmul_kernels<BF16>(),
                     matmul_kernels<Int8Product>(), matmul_kernels<Int8Fast>()},
          .attention = {{.attention = attention<PanelCache<F32Product>>,
                         .append_key = append_key_f32,
                         .append_value = append_value_f32},
                        {.attention = attention<PanelCache<BF16>>,
                         .append_key = append_key_bf16,
                         .append_value = append_value_bf16},
                        {.attention = attention<ByteCache>,
                         .append_key = append_key_int8,
                         .append_value = append_value_int8}},
          .layer_norm = layer_norm,
          .activate_f32 = activate_f32,
          .exp_f32 = exp_f32,
          .sum_exp = sum_exp,
          .probe_read = probe_read};
}

}  // namespace
}  // namespace gptx::cpu::GPTX_ISA
