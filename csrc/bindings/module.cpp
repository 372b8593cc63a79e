// gptx._core: the table of contents. Each init_* stands in the file of its topic.
#include <pybind11/pybind11.h>

#include "bindings/module.h"
#include "bindings/without_gil.h"
#include "core/error.h"

namespace py = pybind11;

namespace {

// Raises the class of gptx.errors that has the exception's name, with the same fields.
template <class... Args>
void raise(const char* name, const Args&... args) {
  const py::object type = py::module_::import("gptx.errors").attr(name);
  const py::object error = type(args...);
  PyErr_SetObject(type.ptr(), error.ptr());
}

void translate(std::exception_ptr pending) {
  try {
    if (pending) std::rethrow_exception(pending);
  } catch (const gptx::ParameterError& e) {
    raise("ParameterError", e.param, e.value, e.allowed);
  } catch (const gptx::UnsupportedError& e) {
    raise("UnsupportedError", e.what());
  } catch (const gptx::DeviceError& e) {
    raise("DeviceError", e.what());
  } catch (const gptx::OutOfMemoryError& e) {
    raise("OutOfMemoryError", e.what_text, e.need, e.have);
  }
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "The compiled core of gptx. Private: use the gptx package.";
  m.attr("__version__") = GPTX_VERSION;
  py::register_local_exception_translator(translate);
  gptx::init_without_gil();
  gptx::init_files(m);
  gptx::init_cuda(m);
  gptx::init_engine(m);
  py::module_ testing = m.def_submodule("testing", "Single kernels on numpy arrays, for the tests.");
  gptx::init_testing(testing);
}
