// Views become torch tensors: DLPack underneath, with an owner that keeps the memory.
#include <memory>

#include "bindings/bindings.hpp"
#include "vattn/tensor/dlpack.hpp"

namespace {

// On whatever thread dropped the tensor, with the GIL or without. The last owner calls the driver, and so must not hold it.
void drop_owner(std::shared_ptr<vattn::Buffer>& owner) noexcept {
  if (owner.use_count() > 1 || !nb::is_alive()) {
    owner.reset();
    return;
  }
  const PyGILState_STATE state = PyGILState_Ensure();
  drop(owner);
  PyGILState_Release(state);
}

void destroy_capsule(PyObject* capsule) {
  // torch renames what it took; this one it did not take.
  if (PyCapsule_IsValid(capsule, "dltensor") == 0) return;
  vattn::delete_dlpack(static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor")));
}

// torch's own function, not the one of the Python protocol, which costs more than the tensor. Found once, kept for good; and
// before the first tensor leaves, torch is told what of such a tensor may be pickled. ModuleNotFoundError where there is no
// torch.
nb::handle from_dlpack() {
  static PyObject* found = nullptr;
  if (found == nullptr) {
    nb::module_::import_("vattn._pickling").attr("install")();
    const nb::module_ torch = nb::module_::import_("torch");
    nb::object native = nb::getattr(torch.attr("_C"), "_from_dlpack", nb::none());
    found = (native.is_none() ? nb::object(nb::module_::import_("torch.utils.dlpack").attr("from_dlpack")) : native)
                .release()
                .ptr();
  }
  return found;
}

nb::tuple to_tuple(std::span<const std::int64_t> values) {
  nb::list list;
  for (const std::int64_t value : values) list.append(value);
  return nb::tuple(list);
}

}  // namespace

vattn::DType dtype_of(const std::string& name) {
  const auto dtype = vattn::dtype_named(name);
  if (!dtype) {
    std::string known;
    for (const auto& info : vattn::kDTypes) known += (known.empty() ? "" : ", ") + std::string(info.name);
    throw std::invalid_argument("dtype=" + name + " is not supported: use one of " + known);
  }
  return *dtype;
}

nb::object to_torch(vattn::Address address, std::span<const std::int64_t> shape, std::span<const std::int64_t> strides,
                    vattn::DType dtype, vattn::TensorDevice device, int device_index,
                    const std::shared_ptr<vattn::Buffer>& owner) {
  if (device == vattn::TensorDevice::kMeta) return nb::make_tuple(to_tuple(shape), to_tuple(strides));
  DLManagedTensor* const managed = vattn::to_dlpack(address, shape, strides, dtype, device, device_index, owner, drop_owner);
  const nb::object capsule = nb::steal(PyCapsule_New(managed, "dltensor", destroy_capsule));
  if (!capsule.is_valid()) {
    vattn::delete_dlpack(managed);
    throw nb::python_error();
  }
  return from_dlpack()(capsule);
}

nb::object to_pair(nb::handle type, const nb::object& k, const nb::object& v) {
  static const auto make = reinterpret_cast<newfunc>(PyType_GetSlot(&PyTuple_Type, Py_tp_new));
  const nb::tuple arguments = nb::make_tuple(nb::make_tuple(k, v));
  PyObject* const pair = make(reinterpret_cast<PyTypeObject*>(type.ptr()), arguments.ptr(), nullptr);
  if (pair == nullptr) throw nb::python_error();
  return nb::steal(pair);
}

void bind_tensors(nb::module_& module) {
  module.def(
      "owns", &vattn::is_in_a_buffer, nb::arg("address"),
      "Whether the byte at an address is in memory of vattn's: of an open cache or tensor, or of one that a tensor keeps.");
}
