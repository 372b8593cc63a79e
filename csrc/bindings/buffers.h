// Bytes of a Python object that has the buffer protocol.
#pragma once

#include <pybind11/pybind11.h>

#include <span>
#include <stdexcept>

namespace gptx {

// The object must outlive the result. Throws ValueError unless the buffer is C-contiguous.
inline std::span<const std::byte> bytes_of(const pybind11::handle& object) {
  Py_buffer view;
  if (PyObject_GetBuffer(object.ptr(), &view, PyBUF_C_CONTIGUOUS) != 0) {
    throw pybind11::error_already_set();
  }
  const std::span<const std::byte> bytes(static_cast<const std::byte*>(view.buf),
                                         static_cast<size_t>(view.len));
  PyBuffer_Release(&view);  // the exporter keeps its memory as long as it lives
  return bytes;
}

}  // namespace gptx
