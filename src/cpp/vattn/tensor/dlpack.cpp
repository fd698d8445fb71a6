#include "vattn/tensor/dlpack.hpp"

#include <algorithm>
#include <array>
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

// One allocation a view of a cache: a loop over layers and slots makes thousands.
constexpr std::size_t kFewDimensions = 4;

struct Managed {
  DLManagedTensor tensor;
  std::array<std::int64_t, 2 * kFewDimensions> few;
  std::vector<std::int64_t> many;
  std::shared_ptr<Buffer> owner;
  OwnerDropper drop;
};

}  // namespace

DLManagedTensor* to_dlpack(Address address, std::span<const std::int64_t> shape, std::span<const std::int64_t> strides,
                           DType dtype, TensorDevice device, int device_index, std::shared_ptr<Buffer> owner,
                           OwnerDropper drop) {
  if (device == TensorDevice::kMeta) throw std::invalid_argument("to_dlpack: a view on meta has no memory to hand over");
  auto managed = std::make_unique<Managed>();
  const std::size_t rank = shape.size();
  if (rank > kFewDimensions) managed->many.resize(2 * rank);
  std::int64_t* const extents = rank > kFewDimensions ? managed->many.data() : managed->few.data();
  std::copy(shape.begin(), shape.end(), extents);
  std::copy(strides.begin(), strides.end(), extents + rank);
  managed->owner = std::move(owner);
  managed->drop = drop;
  const DTypeInfo& info = info_of(dtype);
  DLTensor& tensor = managed->tensor.dl_tensor;
  tensor.data = reinterpret_cast<void*>(address);
  tensor.device = {device == TensorDevice::kCuda ? kDlCuda : kDlCpu, device_index};
  tensor.ndim = static_cast<std::int32_t>(rank);
  tensor.dtype = {info.dlpack_code, static_cast<std::uint8_t>(info.bytes * 8), 1};
  tensor.shape = extents;
  tensor.strides = extents + rank;
  tensor.byte_offset = 0;
  managed->tensor.manager_ctx = managed.get();
  managed->tensor.deleter = [](DLManagedTensor* self) {
    auto* const held = static_cast<Managed*>(self->manager_ctx);  // DLPack's contract
    if (held->drop != nullptr) held->drop(held->owner);
    delete held;
  };
  return &managed.release()->tensor;
}

void delete_dlpack(DLManagedTensor* tensor) noexcept {
  if (tensor != nullptr && tensor->deleter != nullptr) tensor->deleter(tensor);
}

}  // namespace vattn
