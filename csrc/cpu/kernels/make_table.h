// The table of one ISA, made of the kernels above it. Included last by each isa_*.cpp.
#pragma once

#include "cpu/kernel_table.h"

namespace gptx::cpu::GPTX_ISA {
namespace {

constexpr KernelTable make_table(const char* name) {
  return {.name = name,
          .linear_f32 = linear_f32,
          .layer_norm = layer_norm,
          .attention_f32 = attention_f32,
          .append_kv_f32 = append_kv_f32,
          .activate_f32 = activate_f32,
          .exp_f32 = exp_f32,
          .probe_fma = probe_fma,
          .probe_read = probe_read};
}

}  // namespace
}  // namespace gptx::cpu::GPTX_ISA
