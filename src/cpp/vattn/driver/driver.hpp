// The verb table: everything vattn ever asks of the thing that owns memory. This header is the spine of the library.
//
// Four words hold it together. A *page* is one allocation of physical memory, named by a handle. A *reservation* is a range of
// addresses with nothing behind it. *map* puts a page behind a part of a reservation, *set_access* makes mapped pages usable.
// Memory is freed when the page's handle is released and its last mapping is gone.
//
// Every verb either does all it says or throws and has changed nothing. What a driver may assume of its caller is written at
// the verb, once; a driver checks it all the same where the kernel or the GPU would not, and throws std::invalid_argument.
// What fails for want of memory (or mappings, or file size) is OutOfMemoryError; every other refusal is DriverError.
// Thread: any thread may call any verb; a driver locks for itself.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>

#include "vattn/error.hpp"
#include "vattn/export.hpp"

namespace vattn {

using Address = std::uint64_t;      ///< a virtual address, of the device or of the host
using PageHandle = std::uint64_t;   ///< a physical page; never 0
using Stream = std::uint64_t;       ///< a queue of work, in the device's own terms (a CUstream); 0 is its default one
using FenceHandle = std::uint64_t;  ///< a mark in a stream; never 0

/// What a read of a reserved address with no page behind it does.
enum class UnmappedReads : std::uint8_t { kFault, kZeros };

/// Where a driver's tensors live, in DLPack's words (kDLCPU is 1, kDLCUDA is 2); meta has no DLPack device.
enum class TensorDevice : std::uint8_t { kCpu, kCuda, kMeta };

/// What is true of a driver for as long as it lives.
struct DriverTraits {
  const char* name = "";              ///< "host", "cuda" or "null"
  std::size_t granularity = 0;        ///< page sizes, and addresses of pages, are multiples of it
  std::size_t default_page_size = 0;  ///< used where the user names none
  TensorDevice tensor_device = TensorDevice::kMeta;
  int tensor_device_index = 0;
  bool reads_as_zeros = false;        ///< reserve(..., kZeros) is possible
  bool fresh_pages_are_zero = false;  ///< a page that create() just made holds zeros, guaranteed
  bool has_streams = false;           ///< work runs behind the caller's back, and fences tell when it has finished
  bool has_memory = false;            ///< fill and copy reach real bytes (false: accounting only)
  std::uint64_t mapping_limit = 0;    ///< mappings this process may have; 0: no such wall
  const char* keeps_pages = nullptr;  ///< why memory goes back only with the driver's last page; null: it goes with each page
};

struct MemoryInfo {
  std::uint64_t total_bytes = 0;
  std::uint64_t available_bytes = 0;  ///< what create() could still hand out now, reserves already taken off
  const char* unknown = nullptr;      ///< why nobody can say: available_bytes is then without end, and create() asks nobody
};

class VATTN_API Driver {
 public:
  Driver() = default;
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;
  Driver(Driver&&) = delete;
  Driver& operator=(Driver&&) = delete;
  virtual ~Driver() = default;

  [[nodiscard]] virtual const DriverTraits& traits() const noexcept = 0;

  /// What the device, or the host and the cgroups around this process, have now.
  [[nodiscard]] virtual MemoryInfo memory_info() = 0;

  /// Reserves `size` bytes of addresses (a multiple of the granularity, not 0), aligned to the granularity. No page is behind
  /// them; reading there does what `reads` says; writing there faults.
  [[nodiscard]] virtual Address reserve(std::size_t size, UnmappedReads reads) = 0;

  /// Gives a reservation back: exactly an address and size that reserve() made, with nothing mapped in it.
  virtual void release_range(Address base, std::size_t size) = 0;

  /// Makes a page of `size` bytes (a multiple of the granularity, not 0). `near` is the address it will first be mapped at, or
  /// 0: a driver whose mappings can merge uses it to place the page; the page may be mapped anywhere all the same.
  [[nodiscard]] virtual PageHandle create(std::size_t size, Address near) = 0;

  /// The handle of the page whose place is `at`, whether or not it exists: mapped there it merges with its neighbours. 0 where
  /// one page does as well as another.
  [[nodiscard]] virtual PageHandle home(Address at) const noexcept = 0;

  /// Drops the handle. Legal while the page is mapped: its memory then goes with the last mapping.
  virtual void release(PageHandle page) = 0;

  /// Maps the whole page at `at`: inside one reservation, on the granularity, onto addresses that are not mapped. A page may be
  /// mapped at several addresses. Not accessible until set_access().
  virtual void map(Address at, std::size_t size, PageHandle page) = 0;

  /// Takes away one or several neighbouring mappings: whole mappings, without gaps, in one reservation. Does not wait for
  /// work that uses them: synchronize() first.
  virtual void unmap(Address at, std::size_t size) = 0;

  /// Makes a fully mapped range readable and writable.
  virtual void set_access(Address at, std::size_t size) = 0;

  /// A hint: an accessible range will be written soon. A driver whose memory arrives at the first touch may bring it in now, in
  /// one go; nothing else changes, and nothing is wrong where it does not.
  virtual void will_write(Address at, std::size_t size) noexcept;

  /// Sets accessible bytes to zero. Done when it returns.
  virtual void fill_zero(Address at, std::size_t size) = 0;

  /// Copies to an accessible range from another one, or from memory of the device that is in no reservation of this driver's
  /// (which it cannot check); the two do not overlap. Done when it returns.
  virtual void copy(Address to, Address from, std::size_t size) = 0;

  /// Waits until no work started before it can touch this driver's memory.
  virtual void synchronize() = 0;

  // Fences: when has the work that used some memory finished? Only where traits().has_streams; elsewhere work is done when its
  // call returns, so that is_capturing() says false, drop() does nothing, and the other four refuse with std::invalid_argument.

  /// Marks what was started on `stream` until now.
  [[nodiscard]] virtual FenceHandle record(Stream stream);

  /// Whether what the fence marks has finished. Does not wait.
  [[nodiscard]] virtual bool has_passed(FenceHandle fence);

  /// Waits on the host until what the fence marks has finished.
  virtual void wait(FenceHandle fence);

  /// What is started on `stream` from now on waits for the fence, on the device; the caller does not.
  virtual void wait_on(Stream stream, FenceHandle fence);

  /// Forgets a fence, passed or not.
  virtual void drop(FenceHandle fence) noexcept;

  /// Whether work given to the stream is being captured into a graph instead of being run. False where there are no streams.
  [[nodiscard]] virtual bool is_capturing(Stream stream);
};

/// synchronize(), for undoing and closing: a device that cannot be waited for runs nothing any more, and giving back is tried
/// all the same.
inline void try_synchronize(Driver& driver) noexcept {
  try {
    driver.synchronize();
  } catch (...) {  // NOLINT(bugprone-empty-catch): see above
  }
}

}  // namespace vattn
