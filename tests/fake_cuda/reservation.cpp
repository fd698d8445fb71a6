// Addresses: cuMemAddressReserve and cuMemAddressFree, over mmap without access.
//
// Rules: sizes and hints are multiples of the host page, alignments powers of two; a reservation is freed whole, by exactly its
// address and size, with nothing mapped in it. Alignment 0 is the default alignment: the granularity, or what a test made it
// (fake_cuda_set_default_alignment). A reservation starts on the alignment that was asked for and, where that is less than the
// granularity, off the granularity: what a program does not ask for it does not get.
#include <sys/mman.h>

#include <algorithm>

#include "address_space.hpp"
#include "state.hpp"

namespace fake_cuda {

CUresult cuMemAddressReserve(CUdeviceptr* base, std::size_t size, std::size_t alignment, CUdeviceptr hint,
                             unsigned long long flags) {
  FAKE_CUDA_ENTRY(entry, "cuMemAddressReserve", Needs::kRelaxed);
  if (base == nullptr || flags != 0) return CUDA_ERROR_INVALID_VALUE;
  if (size == 0 || size % kHostPage != 0 || hint % kHostPage != 0) return CUDA_ERROR_INVALID_VALUE;
  if ((alignment & (alignment - 1)) != 0) return CUDA_ERROR_INVALID_VALUE;
  const std::size_t granularity = entry->settings.granularity;
  if (alignment == 0) alignment = entry->settings.default_alignment != 0 ? entry->settings.default_alignment : granularity;
  const std::size_t unit = std::max(alignment, granularity);
  const std::size_t off = alignment < granularity ? std::max(alignment, kHostPage) % granularity : 0;
  const std::size_t mapped = size + unit + off;  // so that an aligned start is inside
  if (mapped < size) return CUDA_ERROR_OUT_OF_MEMORY;
  void* got = ::mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (got == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  const auto start = reinterpret_cast<Address>(got);
  const Address aligned = (start + unit - 1) / unit * unit + off;
  const Address end = start + mapped;
  if (aligned != start) ::munmap(got, aligned - start);
  if (aligned + size != end) ::munmap(reinterpret_cast<void*>(aligned + size), end - (aligned + size));
  ::madvise(reinterpret_cast<void*>(aligned), size, MADV_DONTFORK);  // a GPU's addresses mean nothing in a child
  entry->reservations.emplace(aligned, size);
  *base = aligned;
  return CUDA_SUCCESS;
}

CUresult cuMemAddressFree(CUdeviceptr base, std::size_t size) {
  FAKE_CUDA_ENTRY(entry, "cuMemAddressFree", Needs::kRelaxed);
  const auto found = entry->reservations.find(base);
  if (found == entry->reservations.end() || found->second != size) return CUDA_ERROR_INVALID_VALUE;
  if (is_mapped_anywhere(*entry, base, size)) return CUDA_ERROR_INVALID_VALUE;
  ::munmap(reinterpret_cast<void*>(base), size);
  entry->reservations.erase(found);
  return CUDA_SUCCESS;
}

}  // namespace fake_cuda
