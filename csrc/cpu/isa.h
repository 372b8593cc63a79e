// Which kernels run: chosen once, best first, forced by GPTX_CPU_ISA.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "cpu/kernel_table.h"

namespace gptx::cpu {

// The tables this build has and this CPU can run, best first; "scalar" is always last.
const std::vector<const KernelTable*>& usable_kernels();

// The table called `name`, or the best one for an empty name. Throws UnsupportedError with the
// usable names.
const KernelTable& kernels_named(std::string_view name);

}  // namespace gptx::cpu
