#include "bindings/without_gil.h"

#include <atomic>
#include <chrono>
#include <thread>

namespace py = pybind11;

namespace gptx {
namespace {

std::atomic<bool> ending{false};
std::atomic<int> inside{0};

// What cannot be interrupted may take so long.
constexpr std::chrono::seconds kPatience{10};

// Called with the GIL, before the interpreter ends.
void wait_for_threads() {
  ending = true;
  const py::gil_scoped_release released;  // they want it to come out
  const auto end = std::chrono::steady_clock::now() + kPatience;
  while (inside > 0 && std::chrono::steady_clock::now() < end) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

}  // namespace

WithoutGil::Counted::Counted() {
  if (ending) {
    PyErr_SetNone(PyExc_SystemExit);
    throw py::error_already_set();
  }
  ++inside;
}
WithoutGil::Counted::~Counted() { --inside; }

bool at_exit() { return ending; }

void init_without_gil() { py::module_::import("atexit").attr("register")(py::cpp_function(wait_for_threads)); }

}  // namespace gptx
