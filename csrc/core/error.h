// The exceptions of the core. Each maps to the Python class of the same name (gptx/errors.py);
// messages read "what: expected ..., got ...".
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace gptx {

// A value outside its documented range.
struct ParameterError : std::invalid_argument {
  ParameterError(std::string param_, std::string value_, std::string allowed_)
      : std::invalid_argument(param_ + ": expected " + allowed_ + ", got " + value_),
        param(std::move(param_)),
        value(std::move(value_)),
        allowed(std::move(allowed_)) {}
  std::string param, value, allowed;
};

// A feature, ISA or backend that this build or machine does not have.
struct UnsupportedError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A device that cannot run the model.
struct DeviceError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// More memory is needed than may be used.
struct OutOfMemoryError : std::bad_alloc {
  OutOfMemoryError(std::string what_, uint64_t need_, uint64_t have_)
      : what_text(std::move(what_)), need(need_), have(have_) {}
  const char* what() const noexcept override { return what_text.c_str(); }
  std::string what_text;
  uint64_t need, have;
};

}  // namespace gptx
