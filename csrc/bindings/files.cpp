// Mapped files and checksums.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <system_error>
#include <vector>

#include "bindings/buffers.h"
#include "bindings/module.h"
#include "bindings/without_gil.h"
#include "core/checksum.h"
#include "core/mapped_file.h"

namespace py = pybind11;

namespace gptx {
namespace {

std::unique_ptr<MappedFile> map_file(const std::string& path) {
  int error = 0;
  try {
    const WithoutGil released;
    return std::make_unique<MappedFile>(path);
  } catch (const std::system_error& e) {
    error = e.code().value();
  }
  errno = error;
  PyErr_SetFromErrnoWithFilename(PyExc_OSError, path.c_str());
  throw py::error_already_set();
}

std::vector<uint64_t> checksums(const std::vector<py::object>& buffers, int threads) {
  std::vector<Bytes> views;
  for (const py::object& buffer : buffers) views.push_back(bytes_of(buffer));
  std::vector<uint64_t> out(views.size());
  const WithoutGil released;
  tree_checksums(out, views, threads);
  return out;
}

}  // namespace

void init_files(py::module_& m) {
  py::class_<MappedFile>(m, "MappedFile", py::buffer_protocol(),
                         "A read-only mapping of a regular file; has the buffer protocol.")
      .def(py::init(&map_file), py::arg("path"))
      .def_buffer([](MappedFile& file) {
        static std::byte empty{};
        const auto bytes = file.bytes();
        return py::buffer_info(
            const_cast<std::byte*>(bytes.empty() ? &empty : bytes.data()), 1,
            py::format_descriptor<uint8_t>::format(), 1, {static_cast<py::ssize_t>(bytes.size())},
            {py::ssize_t{1}}, /*readonly=*/true);
      })
      .def("__len__", [](const MappedFile& file) { return file.bytes().size(); });
  m.def("xxh64", [](const py::object& data) { return xxh64(bytes_of(data)); }, py::arg("data"),
        "XXH64 with seed 0.");
  m.def("checksums", &checksums, py::arg("buffers"), py::arg("threads") = 1,
        "The tree checksum of each buffer: XXH64 of the digests of its 1 MiB chunks.");
}

}  // namespace gptx
