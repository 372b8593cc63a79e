// The parts of the module.
#pragma once

#include <pybind11/pybind11.h>

namespace gptx {

void init_files(pybind11::module_& m);
void init_cuda(pybind11::module_& m);
void init_engine(pybind11::module_& m);
void init_testing(pybind11::module_& m);

}  // namespace gptx
