// What the binding files share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <unistd.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "vattn/kv/kv_cache.hpp"
#include "vattn/memory/page_pool.hpp"
#include "vattn/tensor/growable_tensor.hpp"

namespace nb = nanobind;

/// The GIL, released while this lives. Unlike nanobind's, safe on a daemon thread at interpreter exit: there CPython
/// before 3.14 ends a thread that asks for the GIL by unwinding its stack, which must not leave a destructor. Such a thread
/// waits here for the end of the process instead, as CPython itself does since.
class GilReleased {
 public:
  GilReleased() noexcept : state_(PyEval_SaveThread()) {}
  GilReleased(const GilReleased&) = delete;
  GilReleased& operator=(const GilReleased&) = delete;
  ~GilReleased() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {  // nothing but that unwinding comes out of a C function
      for (;;) ::pause();
    }
  }

 private:
  PyThreadState* state_;
};

/// Drops a reference, on a thread that holds the GIL. The last owner of memory calls the driver, and a driver call never holds
/// the GIL; at interpreter exit there is none to release.
template <typename T>
void drop(std::shared_ptr<T>& reference) noexcept {
  if (reference.use_count() == 1 && nb::is_alive()) {
    const GilReleased release;
    reference.reset();
  } else {
    reference.reset();
  }
}

/// A PagePool as Python holds it. What was made in it keeps it alive, so that the last reference is dropped here.
struct SharedPool {
  explicit SharedPool(std::shared_ptr<vattn::PagePool> made) noexcept : pool(std::move(made)) {}
  SharedPool(const SharedPool&) = delete;
  SharedPool& operator=(const SharedPool&) = delete;
  ~SharedPool() { drop(pool); }

  std::shared_ptr<vattn::PagePool> pool;
};

void bind_errors(nb::module_& module);
void bind_system(nb::module_& module);
void bind_tensors(nb::module_& module);
void bind_page_pool(nb::module_& module);
void bind_kv_cache(nb::module_& module);
void bind_growable_tensor(nb::module_& module);

/// The dtype of that name (torch's), or ValueError.
[[nodiscard]] vattn::DType dtype_of(const std::string& name);

/// A torch tensor that keeps `owner` alive; on meta, which has no memory to share, the pair (shape, strides).
[[nodiscard]] nb::object to_torch(vattn::Address address, std::span<const std::int64_t> shape,
                                  std::span<const std::int64_t> strides, vattn::DType dtype, vattn::TensorDevice device,
                                  int device_index, const std::shared_ptr<vattn::Buffer>& owner);

template <std::size_t Rank>
[[nodiscard]] nb::object to_torch(const vattn::TensorView<Rank>& view) {
  return to_torch(view.address, view.shape, view.strides, view.dtype, view.device, view.device_index, view.owner);
}

/// A pair of that type, which is a tuple's subclass with two fields (vattn.KV).
[[nodiscard]] nb::object to_pair(nb::handle type, const nb::object& k, const nb::object& v);

/// Numbers as Python users give them: a list or a tuple of ints, or an array of int64 or int32 of one dimension.
struct Numbers {
  std::span<const std::int64_t> values;  ///< into `array` or `copied`

  nb::ndarray<nb::ro, nb::ndim<1>, nb::device::cpu> array;
  std::vector<std::int64_t> copied;
};
/// False: not one of these; Python's turn, which knows more forms, or names what is wrong with it.
[[nodiscard]] bool to_numbers(nb::handle value, Numbers& numbers);

/// Lengths as Python users give them. `kind` says which of the two is filled, or that the object needs help from Python.
struct Lengths {
  enum class Kind { kSequence, kNamed, kUnknown };
  Kind kind = Kind::kUnknown;
  Numbers sequence;
  std::vector<vattn::SlotLength> named;
};
[[nodiscard]] Lengths to_lengths(nb::handle value);
