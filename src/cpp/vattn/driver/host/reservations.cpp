#include "vattn/driver/host/reservations.hpp"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <iterator>
#include <map>
#include <vector>

#include "vattn/fork.hpp"

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif

namespace vattn::host::reservations {
namespace {

void* pointer(Address at) { return reinterpret_cast<void*>(at); }

// Leaked on purpose, as in fork.cpp: tensors outlive static destruction. fork() takes the locks in the order of the members,
// a driver takes its own and then the last.
struct State {
  std::mutex drivers_mutex;
  std::vector<std::mutex*> drivers;
  std::mutex mutex;
  std::map<Address, std::size_t> ranges;
  std::size_t granularity = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
};

State& state();

/// Calls `visit(base, size)` for every stretch of neighbouring reservations: fewer system calls.
template <typename Visit>
void each_stretch(const std::map<Address, std::size_t>& ranges, Visit&& visit) {
  Address base = 0;
  std::size_t length = 0;
  for (const auto& [at, size] : ranges) {
    if (at != base + length) {
      if (length != 0) visit(base, length);
      base = at;
      length = 0;
    }
    length += size;
  }
  if (length != 0) visit(base, length);
}

void before_fork() noexcept {
  State& process = state();
  process.drivers_mutex.lock();
  for (std::mutex* driver : process.drivers) driver->lock();
  process.mutex.lock();
  // A growth that is under way has mapped pages and given no advice yet. Where the advice stands already this costs nothing.
  each_stretch(process.ranges,
               [](Address base, std::size_t size) { static_cast<void>(::madvise(pointer(base), size, MADV_DONTFORK)); });
}

void after_fork() noexcept {
  State& process = state();
  process.mutex.unlock();
  for (std::mutex* driver : process.drivers) driver->unlock();
  process.drivers_mutex.unlock();
}

/// Takes the addresses that nothing is mapped at. Calls the kernel alone, since it runs in a child of a threaded process.
void occupy(Address base, std::size_t size, std::size_t granularity) noexcept {
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE;
  void* const got = ::mmap(pointer(base), size, PROT_NONE, kFlags, -1, 0);
  if (got == pointer(base)) return;
  if (got != MAP_FAILED) {
    ::munmap(got, size);  // a kernel before 4.17 took the address for a hint, and something was there
  } else if (errno != EEXIST) {
    return;
  }
  if (size <= granularity) return;
  // A handler that ran before this one has put something into the hole: it stays, and what is around it is taken.
  const std::size_t half = size / granularity / 2 * granularity;
  occupy(base, half, granularity);
  occupy(base + half, size - half, granularity);
}

void in_child() noexcept {
  const State& process = state();
  each_stretch(process.ranges, [&](Address base, std::size_t size) { occupy(base, size, process.granularity); });
  after_fork();
}

State& state() {
  static auto* process = [] {
    // Handlers run before a fork in the reverse of their order: the lock of fork.cpp's files is taken last, as drivers do it.
    static_cast<void>(process_generation());
    auto* made = new State;
    ::pthread_atfork(before_fork, after_fork, in_child);
    return made;
  }();
  return *process;
}

}  // namespace

bool contains(Address at) noexcept {
  const std::lock_guard lock(state().mutex);
  const auto& ranges = state().ranges;
  const auto next = ranges.upper_bound(at);
  if (next == ranges.begin()) return false;
  const auto& [base, size] = *std::prev(next);
  return at - base < size;
}

std::size_t count() noexcept {
  const std::lock_guard lock(state().mutex);
  return state().ranges.size();
}

void add(Address base, std::size_t size) {
  const std::lock_guard lock(state().mutex);
  state().ranges.insert_or_assign(base, size);
}

bool unmap(Address base, std::size_t size) noexcept {
  const std::lock_guard lock(state().mutex);
  if (::munmap(pointer(base), size) != 0) return false;
  state().ranges.erase(base);
  return true;
}

DriverLock::DriverLock(std::mutex& mutex) : mutex_(mutex) {
  const std::lock_guard lock(state().drivers_mutex);
  state().drivers.push_back(&mutex);
}

DriverLock::~DriverLock() {
  const std::lock_guard lock(state().drivers_mutex);
  auto& drivers = state().drivers;
  drivers.erase(std::remove(drivers.begin(), drivers.end(), &mutex_), drivers.end());
}

}  // namespace vattn::host::reservations
