// What opening a device and probing for it share: the wording of a page on it, and its granularity.
//
// Thread: any; cuInit must have been called.
#pragma once

#include "cuda/libcuda.hpp"

namespace vattn::cuda {

/// A page in the memory of device `device`, which can be exported nowhere.
[[nodiscard]] inline CUmemAllocationProp page_properties(CUdevice device) {
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_NONE;
  properties.location = {CU_MEM_LOCATION_TYPE_DEVICE, device};
  return properties;
}

/// What sizes and addresses must be multiples of. 2 MiB on the parts seen; asked, never assumed.
[[nodiscard]] inline std::size_t granularity_of(const Libcuda& cuda, CUdevice device) {
  const CUmemAllocationProp properties = page_properties(device);
  std::size_t granularity = 0;
  cuda.check(cuda->cuMemGetAllocationGranularity(&granularity, &properties, CU_MEM_ALLOC_GRANULARITY_MINIMUM),
             "cuMemGetAllocationGranularity", "the granularity of cuda:" + std::to_string(device));
  return granularity;
}

/// Can the device map pages at all? Some virtualised and embedded ones cannot.
[[nodiscard]] inline bool has_virtual_memory(const Libcuda& cuda, CUdevice device) {
  int supported = 0;
  cuda.check(cuda->cuDeviceGetAttribute(&supported, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, device),
             "cuDeviceGetAttribute", "virtual memory management of cuda:" + std::to_string(device));
  return supported != 0;
}

}  // namespace vattn::cuda
