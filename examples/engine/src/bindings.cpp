// The engine in Python. Views cross as DLPack, errors as the classes of vattn.errors.
//
// Thread: any; the GIL is released while the engine computes or waits.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "engine.hpp"

namespace py = pybind11;

namespace {

using Release = py::call_guard<py::gil_scoped_release>;
using View = vattn::TensorView<3>;

/// DLPack's device: (kDLCPU or kDLCUDA, index).
py::tuple device_of(const View& view) {
  return py::make_tuple(view.device == vattn::TensorDevice::kCuda ? 2 : 1, view.device_index);
}

/// A capsule that owns a reference to the view's memory. Whoever takes the tensor renames the capsule and calls the deleter
/// when done; a capsule that nobody took gives its reference back itself.
py::capsule to_dlpack(const View& view, const py::kwargs& /*stream, max_version, ...*/) {
  PyObject* const capsule = PyCapsule_New(vattn::to_dlpack(view), "dltensor", [](PyObject* self) {
    if (PyCapsule_IsValid(self, "dltensor") == 0) return;
    vattn::delete_dlpack(static_cast<DLManagedTensor*>(PyCapsule_GetPointer(self, "dltensor")));
  });
  if (capsule == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::capsule>(capsule);
}

py::object make(const char* type, const std::exception& error) {
  return py::module_::import("vattn.errors").attr(type)(error.what());
}

void raise(const py::object& error) { PyErr_SetObject(py::type::of(error).ptr(), error.ptr()); }

/// vattn's errors become Python's; pybind11 itself turns std::invalid_argument into ValueError, and the like.
void translate(std::exception_ptr caught) {
  try {
    if (caught) std::rethrow_exception(caught);
  } catch (const vattn::OutOfMemoryError& error) {
    const py::object made = make("OutOfMemoryError", error);
    made.attr("needed_bytes") = error.needed_bytes;
    made.attr("available_bytes") = error.available_bytes;
    made.attr("limit_bytes") = error.limit_bytes;
    raise(made);
  } catch (const vattn::DriverError& error) {
    const py::object made = make("DriverError", error);
    made.attr("call") = error.call;
    made.attr("code") = error.code;
    made.attr("name") = error.name;
    raise(made);
  } catch (const vattn::NoFreeSlotError& error) {
    raise(make("NoFreeSlotError", error));
  } catch (const vattn::ClosedError& error) {
    raise(make("ClosedError", error));
  } catch (const vattn::InUseError& error) {
    raise(make("InUseError", error));
  } catch (const vattn::Error& error) {
    raise(make("Error", error));
  }
}

py::dict stats(const toy::Engine& engine) {
  vattn::CacheStats now;
  {
    const py::gil_scoped_release release;
    now = engine.stats();
  }
  using namespace py::literals;
  return py::dict("mapped_bytes"_a = now.mapped_bytes, "pooled_bytes"_a = now.pooled_bytes, "used_bytes"_a = now.used_bytes,
                  "limit_bytes"_a = now.limit_bytes, "active_slots"_a = now.active_slots, "driver_calls"_a = now.driver_calls,
                  "pages_created"_a = now.pages_created, "prompts"_a = now.prompts, "reused_prompts"_a = now.reused_prompts);
}

std::pair<View, View> view(const toy::Engine& engine, std::int64_t layer, std::int64_t request) {
  vattn::KVView<3> views = engine.view(layer, request);
  return {std::move(views.k), std::move(*views.v)};
}

}  // namespace

PYBIND11_MODULE(_engine, module) {
  module.doc() = "A serving engine on libvattn.";
  module.attr("vocabulary") = toy::kVocabulary;
  py::register_local_exception_translator(translate);

  py::class_<View>(module, "View",
                   "Keys or values of one request in one layer: (tokens, heads, dim). Give it to torch.from_dlpack.")
      .def("__dlpack__", &to_dlpack)
      .def("__dlpack_device__", &device_of)
      .def_property_readonly("shape", [](const View& self) { return py::tuple(py::cast(self.shape)); })
      .def_readonly("address", &View::address);

  py::class_<toy::Engine>(module, "Engine")
      .def(py::init<std::int64_t, std::int64_t, std::int64_t, std::optional<std::int64_t>>(), py::arg("num_layers"),
           py::arg("max_batch_size"), py::arg("max_seq_len"), py::kw_only(), py::arg("memory_limit") = py::none(), Release())
      .def("add_request", &toy::Engine::add_request, py::arg("prompt"), Release(), "Prefills a prompt and returns its number.")
      .def("decode_step", &toy::Engine::decode_step, Release(),
           "One token for every request, {request: token}, or nothing changed.")
      .def("finish", &toy::Engine::finish, py::arg("request"), Release(), "Forgets a request; its memory serves others.")
      .def("seq_len", &toy::Engine::seq_len, py::arg("request"), Release())
      .def("view", &view, py::arg("layer"), py::arg("request"), Release(), "Its keys and values, shared, not copied.")
      .def("sum", &toy::Engine::sum, py::arg("layer"), py::arg("request"), Release())
      .def("stats", &stats)
      .def("close", &toy::Engine::close, Release(), "Gives the memory back, but for what living views hold.");
}
