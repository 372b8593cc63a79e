// Work without the GIL that the end of the interpreter can wait for: a thread that wants the GIL back when there is no
// interpreter any more would end the process.
#pragma once

#include <pybind11/pybind11.h>

namespace gptx {

// Releases the GIL while it lives. Raises SystemExit, which ends a thread without a word, where the interpreter ends.
class WithoutGil {
 public:
  WithoutGil() = default;
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  struct Counted {
    Counted();  // with the GIL
    ~Counted();
  };
  Counted counted_;  // until the GIL is back
  pybind11::gil_scoped_release released_;
};

// Whether the interpreter is about to end: work that can be interrupted is to stop.
bool at_exit();

// Has the interpreter wait for the threads that are without the GIL before it ends.
void init_without_gil();

}  // namespace gptx
