// Pages: granularity, cuMemCreate, cuMemRelease, cuMemRetainAllocationHandle.
//
// Rules: sizes are multiples of the minimum granularity; memory goes with the last reference and the last mapping; a retained
// handle has the value of the one that was mapped and needs a release of its own. Releasing what is no handle is undefined
// behaviour in the real driver: here it is refused and counts as a violation. Nothing can be exported or reached by RDMA, so a
// page for that is not supported.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <vector>

#include "address_space.hpp"
#include "state.hpp"

namespace fake_cuda {
namespace {

/// What both questions about a page's properties refuse.
CUresult check_properties(const State& state, const CUmemAllocationProp* properties) {
  if (properties == nullptr || properties->type != CU_MEM_ALLOCATION_TYPE_PINNED) return CUDA_ERROR_INVALID_VALUE;
  if (properties->location.type != CU_MEM_LOCATION_TYPE_DEVICE) return CUDA_ERROR_INVALID_VALUE;
  if (properties->win32HandleMetaData != nullptr) return CUDA_ERROR_INVALID_VALUE;
  return state.has_device(properties->location.id) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

/// Fills fresh memory with what is there by default: NaNs in every floating-point format, so that reading before writing shows.
bool fill(int file, std::uint64_t offset, std::size_t size, int byte) {
  const std::vector<char> junk(std::min(size, std::size_t{1} << 20), static_cast<char>(byte));
  for (std::size_t done = 0; done < size;) {
    const ssize_t wrote = ::pwrite(file, junk.data(), std::min(junk.size(), size - done), static_cast<off_t>(offset + done));
    if (wrote <= 0) return false;
    done += static_cast<std::size_t>(wrote);
  }
  return true;
}

/// A place for `size` bytes in the device's file, with the host memory behind it.
bool make_room(const Settings& settings, Device& device, std::size_t size) {
  if (device.file < 0) device.file = ::memfd_create("fake_cuda", MFD_CLOEXEC);
  if (device.file < 0) return false;
  const std::uint64_t end = device.file_end + size;
  if (::ftruncate(device.file, static_cast<off_t>(end)) != 0) return false;
  return settings.fill < 0 || fill(device.file, device.file_end, size, settings.fill);
}

}  // namespace

CUresult cuMemGetAllocationGranularity(std::size_t* granularity, const CUmemAllocationProp* properties,
                                       CUmemAllocationGranularity_flags which) {
  FAKE_CUDA_ENTRY(entry, "cuMemGetAllocationGranularity", Needs::kInit);
  if (granularity == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (const CUresult bad = check_properties(*entry, properties); bad != CUDA_SUCCESS) return bad;
  switch (which) {
    case CU_MEM_ALLOC_GRANULARITY_MINIMUM:
      *granularity = entry->settings.granularity;
      return CUDA_SUCCESS;
    case CU_MEM_ALLOC_GRANULARITY_RECOMMENDED:
      *granularity = entry->settings.recommended;
      return CUDA_SUCCESS;
  }
  return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemCreate(CUmemGenericAllocationHandle* handle, std::size_t size, const CUmemAllocationProp* properties,
                     unsigned long long flags) {
  FAKE_CUDA_ENTRY(entry, "cuMemCreate", Needs::kRelaxed);
  if (handle == nullptr || flags != 0) return CUDA_ERROR_INVALID_VALUE;
  if (const CUresult bad = check_properties(*entry, properties); bad != CUDA_SUCCESS) return bad;
  if (size == 0 || size % entry->settings.granularity != 0) return CUDA_ERROR_INVALID_VALUE;
  // The attributes of the device say that it can do neither.
  const bool to_export = properties->requestedHandleTypes != CU_MEM_HANDLE_TYPE_NONE;
  if (to_export || properties->allocFlags.gpuDirectRDMACapable != 0) return CUDA_ERROR_NOT_SUPPORTED;
  Device& device = entry->devices[static_cast<std::size_t>(properties->location.id)];
  const std::uint64_t memory = entry->settings.memory;
  if (device.used > memory || size > memory - device.used) return CUDA_ERROR_OUT_OF_MEMORY;
  if (!make_room(entry->settings, device, size)) return CUDA_ERROR_OUT_OF_MEMORY;
  const Handle made = entry->next_handle++;
  entry->allocations.emplace(made, Allocation{device.ordinal, size, device.file_end, 1, 0});
  device.file_end += size;
  device.used += size;
  *handle = made;
  return CUDA_SUCCESS;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  FAKE_CUDA_ENTRY(entry, "cuMemRelease", Needs::kRelaxed);
  const auto found = entry->allocations.find(handle);
  if (found == entry->allocations.end() || found->second.references == 0) {
    entry->violate("cuMemRelease of " + std::to_string(handle) + ", which is no handle or was released");
    return CUDA_ERROR_INVALID_VALUE;
  }
  --found->second.references;
  free_if_unused(*entry, handle);
  return CUDA_SUCCESS;
}

CUresult cuMemRetainAllocationHandle(CUmemGenericAllocationHandle* handle, void* at) {
  FAKE_CUDA_ENTRY(entry, "cuMemRetainAllocationHandle", Needs::kContext);
  if (handle == nullptr) return CUDA_ERROR_INVALID_VALUE;
  const auto mapped = covering(*entry, reinterpret_cast<Address>(at), 1);
  if (mapped.empty()) return CUDA_ERROR_INVALID_VALUE;
  *handle = mapped.front()->second.handle;
  ++entry->allocations.find(*handle)->second.references;
  return CUDA_SUCCESS;
}

}  // namespace fake_cuda
