#include "vattn/tensor/dlpack.hpp"

#include <vector>

// DLPack's structures, declared as its specification lays them out in memory.
extern "C" {
struct DLDevice {
  std::int32_t device_type;
  std::int32_t device_id;
};
struct DLDataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};
}

struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor*);
};

namespace vattn {
namespace {

constexpr std::int32_t kDlCpu = 1;
constexpr std::int32_t kDlCuda = 2;

struct Managed {
  DLManagedTensor tensor;
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> strides;
  std::shared_ptr<Buffer> owner;
};

}  // namespace

DLManagedTensor* to_dlpack(Address address, std::span<const std::int64_t> shape, std::span<const std::int64_t> strides,
                           DType dtype, TensorDevice device, int device_index, std::shared_ptr<Buffer> owner) {
  if (device == TensorDevice::kMeta) throw std::invalid_argument("to_dlpack: a view on meta has no memory to hand over");
  auto managed = std::make_unique<Managed>();
  managed->shape.assign(shape.begin(), shape.end());
  managed->strides.assign(strides.begin(), strides.end());
  managed->owner = std::move(owner);
  const DTypeInfo& info = info_of(dtype);
  DLTensor& tensor = managed->tensor.dl_tensor;
  tensor.data = reinterpret_cast<void*>(address);
  tensor.device = {device == TensorDevice::kCuda ? kDlCuda : kDlCpu, device_index};
  tensor.ndim = static_cast<std::int32_t>(shape.size());
  tensor.dtype = {info.dlpack_code, static_cast<std::uint8_t>(info.bytes * 8), 1};
  tensor.shape = managed->shape.data();
  tensor.strides = managed->strides.data();
  tensor.byte_offset = 0;
  managed->tensor.manager_ctx = managed.get();
  managed->tensor.deleter = [](DLManagedTensor* self) {
    delete static_cast<Managed*>(self->manager_ctx);  // DLPack's contract
  };
  return &managed.release()->tensor;
}

void delete_dlpack(DLManagedTensor* tensor) noexcept {
  if (tensor != nullptr && tensor->deleter != nullptr) tensor->deleter(tensor);
}

}  // namespace vattn
