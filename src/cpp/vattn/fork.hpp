// Which process this is: memory that a parent mapped does not exist in a child it forked.
//
// A generation counter is bumped in every forked child, and every memory file's descriptor is closed there, so that a child can
// neither erase its parent's bytes nor keep them alive. Objects record the generation they were made in and compare it before
// they take any lock: a lock held by another thread at fork() stays locked for ever in the child.
// Thread: any. Process-wide, because fork() is; so is driver/host/reservations.hpp, which keeps the child's addresses taken.
#pragma once

#include <cstdint>

#include "vattn/export.hpp"

namespace vattn {

/// Starts at 1; one more in every forked child.
[[nodiscard]] VATTN_API std::uint64_t process_generation() noexcept;

/// The generation an object was made in.
class VATTN_API Generation {
 public:
  Generation() noexcept : made_in_(process_generation()) {}

  /// False in a child forked after the object was made.
  [[nodiscard]] bool is_current() const noexcept { return made_in_ == process_generation(); }

  /// Throws ClosedError naming `what` in such a child.
  void check(const char* what) const;

 private:
  std::uint64_t made_in_;
};

/// Closes `fd` in every child forked from now on, until forget_on_fork(fd).
void close_on_fork(int fd);
void forget_on_fork(int fd) noexcept;

}  // namespace vattn
