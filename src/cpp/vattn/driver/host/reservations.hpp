// Every reservation that the host drivers of this process hold, and what becomes of it in a forked child.
//
// Neither reservations nor what is mapped in them is inherited (MADV_DONTFORK), which alone would leave holes at their
// addresses: the kernel would put the child's next large allocations there, and a tensor inherited from the parent would read
// and overwrite them. So a handler that runs in the child, before fork() returns there, maps each reservation again without
// access. Touching an inherited tensor is then a segmentation fault, whatever the child has allocated since.
//
// fork() holds every lock of this file and every host driver's over the fork. So the list is whole in the child, and no driver
// is between a mapping and its MADV_DONTFORK: what is mapped and not yet advised is advised before. ThreadSanitizer allows a
// thread 64 locks: a program that forks with more host drivers under it needs TSAN_OPTIONS=detect_deadlocks=0.
// Thread: any. Process-wide, as fork() is.
#pragma once

#include <cstddef>
#include <mutex>

#include "vattn/driver/driver.hpp"
#include "vattn/export.hpp"

namespace vattn::host::reservations {

/// Whether the byte lies in a reservation: from its mmap until its munmap, also while only a living tensor keeps it, and in a
/// forked child also where it was the parent's.
[[nodiscard]] VATTN_API bool contains(Address at) noexcept;

/// Reservations that are held now.
[[nodiscard]] VATTN_API std::size_t count() noexcept;

/// Notes a range that was just mapped. The caller holds its driver's lock from the mmap on.
void add(Address base, std::size_t size);

/// Unmaps a range and forgets it, in one step for fork(). False, with errno, where the kernel refuses: then nothing changed.
[[nodiscard]] bool unmap(Address base, std::size_t size) noexcept;

/// A driver's lock, which fork() takes too for as long as this lives. Taken before the lock of the list, never while holding
/// another driver's.
class DriverLock {
 public:
  explicit DriverLock(std::mutex& mutex);
  DriverLock(const DriverLock&) = delete;
  DriverLock& operator=(const DriverLock&) = delete;
  DriverLock(DriverLock&&) = delete;
  DriverLock& operator=(DriverLock&&) = delete;
  ~DriverLock();

 private:
  std::mutex& mutex_;
};

}  // namespace vattn::host::reservations
