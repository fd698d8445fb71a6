// vattn._core.GrowableTensor: the C++ class, argument for argument. vattn.GrowableTensor wraps it.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings/bindings.hpp"

namespace {

using vattn::GrowableTensor;
using Release = nb::call_guard<GilReleased>;

nb::object tensor(const GrowableTensor& growable) {
  GrowableTensor::View view;
  {
    const GilReleased release;
    view = growable.view();
  }
  return to_torch(view.address, view.shape, view.strides, view.dtype, view.device, view.device_index, view.owner);
}

}  // namespace

void bind_growable_tensor(nb::module_& module) {
  nb::class_<GrowableTensor>(module, "GrowableTensor")
      .def(
          "__init__",
          [](GrowableTensor* self, std::vector<std::int64_t> row_shape, std::int64_t max_rows, const std::string& dtype,
             const std::string& device, std::optional<std::int64_t> page_size, std::optional<std::int64_t> memory_limit,
             const SharedPool* pool) {
            GrowableTensor::Config config{std::move(row_shape), max_rows, dtype_of(dtype), page_size, memory_limit};
            const GilReleased release;
            if (pool != nullptr) {
              new (self) GrowableTensor(config, pool->pool);
            } else {
              new (self) GrowableTensor(config, vattn::parse_device(device));
            }
          },
          nb::arg("row_shape"), nb::arg("max_rows"), nb::arg("dtype"), nb::arg("device"), nb::arg("page_size").none(),
          nb::arg("memory_limit").none(), nb::arg("pool").none(), nb::keep_alive<1, 8>())
      .def("resize", &GrowableTensor::resize, Release())
      .def("append", &GrowableTensor::append, nb::arg("rows"), nb::arg("count"), Release())
      .def("rows", &GrowableTensor::rows, Release())
      .def("tensor", &tensor)
      .def("mapped_bytes", &GrowableTensor::mapped_bytes, Release())
      .def("memory_limit", &GrowableTensor::memory_limit, Release())
      .def("set_memory_limit", &GrowableTensor::set_memory_limit, Release())
      .def("close", &GrowableTensor::close, Release())
      .def("is_closed", &GrowableTensor::is_closed, Release())
      .def("page_size", &GrowableTensor::page_size)
      .def("name", &GrowableTensor::name);
}
