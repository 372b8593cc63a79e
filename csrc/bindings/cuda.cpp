// What there is to know of the CUDA backend and its devices without using one.
#include <pybind11/pybind11.h>

#include "bindings/module.h"
#include "core/error.h"
#include "model/cuda_library.h"

namespace py = pybind11;

namespace gptx {
namespace {

py::dict describe(const gptx_cuda_api& api, int index) {
  gptx_cuda_device device;
  gptx_cuda_error error = {};
  if (api.device(index, &device, &error) != GPTX_CUDA_OK) throw DeviceError(error.message);
  py::dict d;
  d["name"] = device.name;
  d["capability"] = device.capability;
  d["multiprocessors"] = device.multiprocessors;
  d["usable"] = device.usable != 0;
  d["total_bytes"] = device.total_bytes;
  d["free_bytes"] = device.free_bytes;
  return d;
}

py::dict cuda_status(const std::string& path) {
  const gptx_cuda_api& api = cuda_library(path);
  gptx_cuda_probe probe;
  api.probe(&probe);
  py::dict d;
  d["usable"] = probe.state == GPTX_CUDA_USABLE;
  d["message"] = probe.message;
  d["driver_version"] = probe.driver_version;
  d["runtime_version"] = probe.runtime_version;
  d["architectures"] = api.architectures;
  py::list devices;
  for (int i = 0; i < probe.devices; ++i) devices.append(describe(api, i));
  d["devices"] = devices;
  return d;
}

}  // namespace

void init_cuda(py::module_& m) {
  m.attr("cuda_build") = cuda_build();
  m.def("cuda_status", &cuda_status, py::arg("path"),
        "Driver, devices, and why they can or cannot be used. Raises DeviceError without a library.");
}

}  // namespace gptx
