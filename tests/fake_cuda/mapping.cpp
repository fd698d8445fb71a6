// Mappings: cuMemMap, cuMemUnmap, cuMemSetAccess, cuMemGetAccess.
//
// Rules: a page is mapped whole, from offset 0, onto addresses of one reservation that are not mapped; a mapping starts without
// access, and touching it then faults; access is set, and mappings are taken away, in whole mappings, one or several without
// gaps. Unmapping does not wait for work. With the real driver, work that still uses the addresses faults at some later time;
// here the unmapping is refused with the code that such work would fail with, and counts as a violation.
#include <sys/mman.h>

#include <algorithm>

#include "address_space.hpp"
#include "state.hpp"
#include "work.hpp"

namespace fake_cuda {
namespace {

/// The host has one protection where a GPU has one an accessing device: the most that any of them may do.
int protection(const Mapping& mapping) {
  unsigned most = 0;
  for (const CUmemAccess_flags flags : mapping.access) most = std::max<unsigned>(most, flags);
  switch (most) {
    case CU_MEM_ACCESS_FLAGS_PROT_READWRITE:
      return PROT_READ | PROT_WRITE;
    case CU_MEM_ACCESS_FLAGS_PROT_READ:
      return PROT_READ;
    default:
      return PROT_NONE;
  }
}

bool is_known(CUmemAccess_flags flags) {
  return flags == CU_MEM_ACCESS_FLAGS_PROT_NONE || flags == CU_MEM_ACCESS_FLAGS_PROT_READ ||
         flags == CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
}

CUresult check_access(const State& state, const CUmemAccessDesc* access, std::size_t count) {
  if (access == nullptr || count == 0) return CUDA_ERROR_INVALID_VALUE;
  for (std::size_t i = 0; i < count; ++i) {
    if (access[i].location.type != CU_MEM_LOCATION_TYPE_DEVICE || !is_known(access[i].flags)) return CUDA_ERROR_INVALID_VALUE;
    if (!state.has_device(access[i].location.id)) return CUDA_ERROR_INVALID_DEVICE;
  }
  return CUDA_SUCCESS;
}

}  // namespace

CUresult cuMemMap(CUdeviceptr at, std::size_t size, std::size_t offset, CUmemGenericAllocationHandle handle,
                  unsigned long long flags) {
  FAKE_CUDA_ENTRY(entry, "cuMemMap", Needs::kRelaxed);
  const std::size_t granularity = entry->settings.granularity;
  if (flags != 0 || offset != 0 || at % granularity != 0 || size == 0 || size % granularity != 0)
    return CUDA_ERROR_INVALID_VALUE;
  const auto page = entry->allocations.find(handle);
  if (page == entry->allocations.end() || page->second.references == 0 || page->second.size != size) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (!is_reserved(*entry, at, size) || is_mapped_anywhere(*entry, at, size)) return CUDA_ERROR_INVALID_VALUE;
  const Device& device = entry->devices[static_cast<std::size_t>(page->second.device)];
  void* address = reinterpret_cast<void*>(at);
  void* got = ::mmap(address, size, PROT_NONE, MAP_SHARED | MAP_FIXED, device.file, static_cast<off_t>(page->second.offset));
  if (got == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  ::madvise(address, size, MADV_DONTFORK);
  entry->mappings.emplace(at, Mapping{size, handle, {}});
  ++page->second.mappings;
  return CUDA_SUCCESS;
}

CUresult cuMemUnmap(CUdeviceptr at, std::size_t size) {
  FAKE_CUDA_ENTRY(entry, "cuMemUnmap", Needs::kRelaxed);
  const auto mappings = whole_mappings(*entry, at, size);
  if (mappings.empty()) return CUDA_ERROR_INVALID_VALUE;
  if (is_in_use(*entry, at, size)) {
    entry->violate("cuMemUnmap under running work");
    return CUDA_ERROR_ILLEGAL_ADDRESS;
  }
  void* address = reinterpret_cast<void*>(at);
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
  if (::mmap(address, size, PROT_NONE, flags, -1, 0) == MAP_FAILED) return CUDA_ERROR_UNKNOWN;
  ::madvise(address, size, MADV_DONTFORK);
  for (const MappingIterator& mapping : mappings) {
    const Handle handle = mapping->second.handle;
    entry->mappings.erase(mapping);
    --entry->allocations.find(handle)->second.mappings;
    free_if_unused(*entry, handle);
  }
  return CUDA_SUCCESS;
}

CUresult cuMemSetAccess(CUdeviceptr at, std::size_t size, const CUmemAccessDesc* access, std::size_t count) {
  FAKE_CUDA_ENTRY(entry, "cuMemSetAccess", Needs::kRelaxed);
  if (const CUresult bad = check_access(*entry, access, count); bad != CUDA_SUCCESS) return bad;
  const auto mappings = whole_mappings(*entry, at, size);
  if (mappings.empty()) return CUDA_ERROR_INVALID_VALUE;
  const auto takes_away = [](const CUmemAccessDesc& one) { return one.flags != CU_MEM_ACCESS_FLAGS_PROT_READWRITE; };
  if (std::any_of(access, access + count, takes_away) && is_in_use(*entry, at, size)) {
    entry->violate("cuMemSetAccess takes access away under running work");
    return CUDA_ERROR_ILLEGAL_ADDRESS;
  }
  for (const MappingIterator& mapping : mappings) {
    for (std::size_t i = 0; i < count; ++i) {
      mapping->second.access[static_cast<std::size_t>(access[i].location.id)] = access[i].flags;
    }
    ::mprotect(reinterpret_cast<void*>(mapping->first), mapping->second.size, protection(mapping->second));
  }
  return CUDA_SUCCESS;
}

CUresult cuMemGetAccess(unsigned long long* flags, const CUmemLocation* location, CUdeviceptr at) {
  FAKE_CUDA_ENTRY(entry, "cuMemGetAccess", Needs::kContext);
  if (flags == nullptr || location == nullptr || location->type != CU_MEM_LOCATION_TYPE_DEVICE) return CUDA_ERROR_INVALID_VALUE;
  if (!entry->has_device(location->id)) return CUDA_ERROR_INVALID_DEVICE;
  const auto mapped = covering(*entry, at, 1);
  if (mapped.empty()) return CUDA_ERROR_INVALID_VALUE;
  *flags = mapped.front()->second.access[static_cast<std::size_t>(location->id)];
  return CUDA_SUCCESS;
}

}  // namespace fake_cuda
