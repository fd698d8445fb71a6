// One memory file (memfd): the physical memory of a host driver.
//
// The file is sparse and its offsets are cheap: only what was allocated takes memory. allocate() commits at once or throws and
// has committed nothing; a committed byte never raises SIGBUS later. A kernel without FALLOC_FL_PUNCH_HOLE (gVisor) gives
// nothing back before the file is closed: that is found out here, once. The descriptor is closed on exec and in forked
// children, because a child that punched a hole would erase its parent's bytes. Thread: any; the calls are system calls on one
// descriptor.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "vattn/fork.hpp"

namespace vattn::host {

class MemoryFile {
 public:
  MemoryFile();
  ~MemoryFile();
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;
  MemoryFile(MemoryFile&&) = delete;
  MemoryFile& operator=(MemoryFile&&) = delete;

  [[nodiscard]] int descriptor() const noexcept { return descriptor_; }

  /// Commits zeros. OutOfMemoryError where the system or RLIMIT_FSIZE says no, DriverError for any other reason. `may_grow`:
  /// that may_grow_to() has just said yes, so that it need not be asked again: it is a system call a page.
  void allocate(std::uint64_t offset, std::size_t size, bool may_grow = false) const;

  /// Gives memory back. DriverError where the kernel cannot.
  void punch(std::uint64_t offset, std::size_t size) const;

  /// Whether punch() can do what it is for.
  [[nodiscard]] bool gives_back() const noexcept { return gives_back_; }

  /// Gives everything back: nothing maps it, and nobody wants its bytes.
  void empty() noexcept;

  /// Makes bytes zero again, by punching or by writing.
  void clear(std::uint64_t offset, std::size_t size) const;

  /// Whether RLIMIT_FSIZE lets the file reach `end`: crossing it would raise SIGXFSZ, which kills by default.
  [[nodiscard]] bool may_grow_to(std::uint64_t end) const noexcept;

 private:
  Generation generation_;
  int descriptor_;
  bool gives_back_ = true;
  mutable std::atomic<std::uint64_t> end_{0};  ///< the file's size so far; below it the limit does not apply
};

}  // namespace vattn::host
