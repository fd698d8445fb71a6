// What is at an address: cuPointerGetAttribute, cuPointerGetAttributes, cuMemGetAddressRange.
//
// Rules, as cuda.h has them: the range of an address is its reservation, mapped or not; what a kernel could not reach has no
// device pointer; the address range is the mapping. A single question about what there is not is an invalid value; the plural
// form answers it with nulls. An address without access counts as one that kernels cannot reach: the header says no more.
#include <cstring>

#include "address_space.hpp"
#include "state.hpp"

namespace fake_cuda {
namespace {

/// An address, and what is there.
struct Place {
  Address at;
  int device;  ///< of the current context
  Address base;
  std::size_t size;
  const Mapping* mapping = nullptr;  ///< null: reserved only
  Address mapped_at = 0;
  const Allocation* page = nullptr;
};

/// Whether the address is in a reservation.
bool find(State& state, int device, Address at, Place& place) {
  if (!is_reserved(state, at, 1)) return false;
  const auto range = std::prev(state.reservations.upper_bound(at));
  place = {at, device, range->first, range->second};
  const auto mapped = covering(state, at, 1);
  if (mapped.empty()) return true;
  place.mapping = &mapped.front()->second;
  place.mapped_at = mapped.front()->first;
  place.page = &state.allocations.find(place.mapping->handle)->second;
  return true;
}

template <typename T>
CUresult answer(void* data, T value) {
  std::memcpy(data, &value, sizeof value);
  return CUDA_SUCCESS;
}

/// What is true of a page wherever it is mapped.
CUresult ask_page(const Place& place, CUpointer_attribute attribute, void* data) {
  if (place.page == nullptr) return CUDA_ERROR_INVALID_VALUE;
  const CUmemAccess_flags access = place.mapping->access[static_cast<std::size_t>(place.device)];
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_CONTEXT:
      return answer(data, CUcontext{});  // a page made with cuMemCreate is no context's
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      return answer(data, CU_MEMORYTYPE_DEVICE);
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
      return access != CU_MEM_ACCESS_FLAGS_PROT_NONE ? answer(data, place.at) : CUDA_ERROR_INVALID_VALUE;
    case CU_POINTER_ATTRIBUTE_BUFFER_ID:
    case CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID:
      return answer(data, place.mapping->handle);
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
      return answer(data, place.page->device);
    case CU_POINTER_ATTRIBUTE_IS_MANAGED:
    case CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE:
    case CU_POINTER_ATTRIBUTE_IS_GPU_DIRECT_RDMA_CAPABLE:
      return answer(data, false);
    case CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES:
      return answer(data, std::uint64_t{CU_MEM_HANDLE_TYPE_NONE});
    case CU_POINTER_ATTRIBUTE_ACCESS_FLAGS:
      return answer(data, static_cast<int>(access));
    case CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE:
      return answer(data, static_cast<void*>(nullptr));
    case CU_POINTER_ATTRIBUTE_MAPPING_SIZE:
      return answer(data, place.mapping->size);
    case CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR:
      return answer(data, place.mapped_at);
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
}

CUresult ask(const Place& place, CUpointer_attribute attribute, void* data) {
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
      return answer(data, place.base);
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
      return answer(data, place.size);
    case CU_POINTER_ATTRIBUTE_MAPPED:
      return answer(data, place.mapping != nullptr);
    default:
      return ask_page(place, attribute, data);
  }
}

/// Bytes of an answer; 0: the fake does not know the attribute.
std::size_t answer_bytes(CUpointer_attribute attribute) {
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
    case CU_POINTER_ATTRIBUTE_ACCESS_FLAGS:
      return sizeof(int);
    case CU_POINTER_ATTRIBUTE_IS_MANAGED:
    case CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE:
    case CU_POINTER_ATTRIBUTE_MAPPED:
    case CU_POINTER_ATTRIBUTE_IS_GPU_DIRECT_RDMA_CAPABLE:
      return sizeof(bool);
    case CU_POINTER_ATTRIBUTE_CONTEXT:
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
    case CU_POINTER_ATTRIBUTE_BUFFER_ID:
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
    case CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES:
    case CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE:
    case CU_POINTER_ATTRIBUTE_MAPPING_SIZE:
    case CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR:
    case CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID:
      return sizeof(std::uint64_t);
  }
  return 0;
}

}  // namespace

CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr at) {
  FAKE_CUDA_ENTRY(entry, "cuPointerGetAttribute", Needs::kContext);
  Place place{};
  if (data == nullptr || !find(*entry, entry.device().ordinal, at, place)) return CUDA_ERROR_INVALID_VALUE;
  return ask(place, attribute, data);
}

CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute* attributes, void** data, CUdeviceptr at) {
  FAKE_CUDA_ENTRY(entry, "cuPointerGetAttributes", Needs::kContext);
  if (count == 0 || attributes == nullptr || data == nullptr) return CUDA_ERROR_INVALID_VALUE;
  for (unsigned i = 0; i < count; ++i) {
    if (data[i] == nullptr || answer_bytes(attributes[i]) == 0) return CUDA_ERROR_INVALID_VALUE;
  }
  Place place{};
  const bool is_known = find(*entry, entry.device().ordinal, at, place);
  for (unsigned i = 0; i < count; ++i) {
    if (is_known && ask(place, attributes[i], data[i]) == CUDA_SUCCESS) continue;
    std::memset(data[i], 0, answer_bytes(attributes[i]));
  }
  return CUDA_SUCCESS;
}

CUresult cuMemGetAddressRange(CUdeviceptr* base, std::size_t* size, CUdeviceptr at) {
  FAKE_CUDA_ENTRY(entry, "cuMemGetAddressRange", Needs::kContext);
  Place place{};
  if (!find(*entry, entry.device().ordinal, at, place) || place.mapping == nullptr) return CUDA_ERROR_NOT_FOUND;
  if (base != nullptr) *base = place.mapped_at;
  if (size != nullptr) *size = place.mapping->size;
  return CUDA_SUCCESS;
}

}  // namespace fake_cuda
