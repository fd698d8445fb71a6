#include "vattn/fork.hpp"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <string>
#include <vector>

#include "vattn/error.hpp"

namespace vattn {
namespace {

// Leaked on purpose: objects that outlive static destruction (a tensor at interpreter exit) still ask for the generation.
struct ProcessState {
  std::atomic<std::uint64_t> generation{1};
  std::mutex mutex;
  std::vector<int> files;
};

ProcessState& state() {
  static auto* process = [] {
    auto* made = new ProcessState;
    // The mutex is held over fork(), so that a child never sees the list half written.
    ::pthread_atfork([] { state().mutex.lock(); }, [] { state().mutex.unlock(); },
                     [] {
                       ProcessState& child = state();
                       for (const int fd : child.files) ::close(fd);
                       child.files.clear();
                       child.generation.fetch_add(1, std::memory_order_relaxed);
                       child.mutex.unlock();
                     });
    return made;
  }();
  return *process;
}

}  // namespace

std::uint64_t process_generation() noexcept { return state().generation.load(std::memory_order_relaxed); }

void Generation::check(const char* what) const {
  if (!is_current()) {
    throw ClosedError(std::string(what) + " belongs to the process that forked this one: its memory is not mapped here. " +
                      "Make a new one in this process");
  }
}

void close_on_fork(int fd) {
  const std::lock_guard lock(state().mutex);
  state().files.push_back(fd);
}

void forget_on_fork(int fd) noexcept {
  const std::lock_guard lock(state().mutex);
  auto& files = state().files;
  files.erase(std::remove(files.begin(), files.end(), fd), files.end());
}

}  // namespace vattn
