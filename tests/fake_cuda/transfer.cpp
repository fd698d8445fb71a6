// Bytes: cuMemGetInfo, fills and copies.
//
// Rules: an address that is not mapped is an invalid value; one that is mapped without the access that is needed is what ends a
// real context (an illegal address), so it is refused with that code and counts as a violation. Asynchronous calls take effect
// when their stream, or the device, is waited for.
#include <cstring>

#include "address_space.hpp"
#include "state.hpp"
#include "work.hpp"

namespace fake_cuda {
namespace {

/// May the device touch these bytes?
CUresult check_touch(State& state, int device, const char* call, Address at, std::size_t size, CUmemAccess_flags needed) {
  const auto mappings = covering(state, at, size);
  if (mappings.empty()) return CUDA_ERROR_INVALID_VALUE;
  for (const MappingIterator& mapping : mappings) {
    const CUmemAccess_flags has = mapping->second.access[static_cast<std::size_t>(device)];
    if ((has & needed) == needed) continue;
    state.violate(std::string(call) + " of memory without access");
    return CUDA_ERROR_ILLEGAL_ADDRESS;
  }
  return CUDA_SUCCESS;
}

/// Puts a fill or a copy on a stream; null is the NULL stream.
CUresult transfer(State& state, int device, CUstream stream, std::vector<Range> uses, std::function<void()> effect) {
  if (stream == nullptr) ++state.null_stream_work;
  Work work;
  work.device = device;
  work.uses = std::move(uses);
  work.effect = std::move(effect);
  enqueue(state, stream, std::move(work));
  return CUDA_SUCCESS;
}

void* pointer(Address at) { return reinterpret_cast<void*>(at); }

}  // namespace

CUresult cuMemGetInfo(std::size_t* available, std::size_t* total) {
  FAKE_CUDA_ENTRY(entry, "cuMemGetInfo", Needs::kContext);
  if (available == nullptr || total == nullptr) return CUDA_ERROR_INVALID_VALUE;
  const std::uint64_t memory = entry->settings.memory;
  const std::uint64_t used = entry.device().used;
  *total = memory;
  *available = used < memory ? memory - used : 0;
  return CUDA_SUCCESS;
}

CUresult cuMemsetD8Async(CUdeviceptr at, unsigned char value, std::size_t size, CUstream stream) {
  FAKE_CUDA_ENTRY(entry, "cuMemsetD8Async", Needs::kContext);
  const int device = entry.device().ordinal;
  CUresult bad = check_stream(*entry, device, stream, "cuMemsetD8Async");
  if (bad != CUDA_SUCCESS) return bad;
  bad = check_touch(*entry, device, "cuMemsetD8Async", at, size, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
  if (bad != CUDA_SUCCESS) return bad;
  return transfer(*entry, device, stream, {{at, size}}, [=] { std::memset(pointer(at), value, size); });
}

CUresult cuMemsetD8(CUdeviceptr at, unsigned char value, std::size_t size) {
  FAKE_CUDA_ENTRY(entry, "cuMemsetD8", Needs::kContext);
  const int device = entry.device().ordinal;
  CUresult bad = check_stream(*entry, device, nullptr, "cuMemsetD8");
  if (bad != CUDA_SUCCESS) return bad;
  bad = check_touch(*entry, device, "cuMemsetD8", at, size, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
  if (bad != CUDA_SUCCESS) return bad;
  // Of device memory the real one does not wait either, its name notwithstanding.
  return transfer(*entry, device, nullptr, {{at, size}}, [=] { std::memset(pointer(at), value, size); });
}

CUresult cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, std::size_t size, CUstream stream) {
  FAKE_CUDA_ENTRY(entry, "cuMemcpyDtoDAsync", Needs::kContext);
  const int device = entry.device().ordinal;
  CUresult bad = check_stream(*entry, device, stream, "cuMemcpyDtoDAsync");
  if (bad != CUDA_SUCCESS) return bad;
  bad = check_touch(*entry, device, "cuMemcpyDtoDAsync", to, size, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
  if (bad == CUDA_SUCCESS) bad = check_touch(*entry, device, "cuMemcpyDtoDAsync", from, size, CU_MEM_ACCESS_FLAGS_PROT_READ);
  if (bad != CUDA_SUCCESS) return bad;
  return transfer(*entry, device, stream, {{to, size}, {from, size}}, [=] { std::memmove(pointer(to), pointer(from), size); });
}

CUresult cuMemcpyHtoD(CUdeviceptr to, const void* from, std::size_t size) {
  FAKE_CUDA_ENTRY(entry, "cuMemcpyHtoD", Needs::kContext);
  const int device = entry.device().ordinal;
  CUresult bad = check_stream(*entry, device, nullptr, "cuMemcpyHtoD");
  if (bad == CUDA_SUCCESS) bad = check_touch(*entry, device, "cuMemcpyHtoD", to, size, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
  if (bad != CUDA_SUCCESS) return bad;
  wait_for(entry, all_of_queue(entry.device().null_stream));
  std::memcpy(pointer(to), from, size);
  return CUDA_SUCCESS;
}

CUresult cuMemcpyDtoH(void* to, CUdeviceptr from, std::size_t size) {
  FAKE_CUDA_ENTRY(entry, "cuMemcpyDtoH", Needs::kContext);
  const int device = entry.device().ordinal;
  CUresult bad = check_stream(*entry, device, nullptr, "cuMemcpyDtoH");
  if (bad == CUDA_SUCCESS) bad = check_touch(*entry, device, "cuMemcpyDtoH", from, size, CU_MEM_ACCESS_FLAGS_PROT_READ);
  if (bad != CUDA_SUCCESS) return bad;
  wait_for(entry, all_of_queue(entry.device().null_stream));
  std::memcpy(to, pointer(from), size);
  return CUDA_SUCCESS;
}

}  // namespace fake_cuda
