#include "cuda/fences.hpp"

#include <new>
#include <stdexcept>
#include <string>

namespace vattn::cuda {

/// The event of a fence, kept from reuse for the scope.
class Fences::Use {
 public:
  Use(Fences& fences, const char* verb, FenceHandle fence) : fences_(fences) {
    const std::lock_guard lock(fences_.mutex_);
    const auto found = fences_.numbers_.find(fence);
    if (found == fences_.numbers_.end()) {
      throw std::invalid_argument(std::string(verb) + ": fence " + std::to_string(fence) +
                                  " was dropped, or is none of this driver's");
    }
    mark_ = found->second;
    ++mark_->users;
  }
  Use(const Use&) = delete;
  Use& operator=(const Use&) = delete;
  ~Use() {
    const std::lock_guard lock(fences_.mutex_);
    if (--mark_->users == 0 && mark_->dropped) fences_.free_.splice(fences_.free_.begin(), fences_.recorded_, mark_);
  }

  [[nodiscard]] CUevent event() const noexcept { return mark_->event; }

 private:
  Fences& fences_;
  Marks::iterator mark_;
};

Fences::~Fences() {
  if (!generation_.is_current() || (recorded_.empty() && free_.empty())) return;
  const CurrentContext current(cuda(), context_, std::nothrow);
  if (!current.is_current()) return;
  for (const Marks* marks : {&recorded_, &free_}) {
    for (const Mark& mark : *marks) static_cast<void>(cuda()->cuEventDestroy(mark.event));
  }
}

void Fences::make_event() {
  Marks made(1);
  // Without times an event costs less; blocking, a thread that waits for it sleeps.
  cuda().check(cuda()->cuEventCreate(&made.front().event, CU_EVENT_DISABLE_TIMING | CU_EVENT_BLOCKING_SYNC), "cuEventCreate",
               "an event to mark a stream with");
  free_.splice(free_.begin(), made);
}

FenceHandle Fences::record(CUstream stream) {
  const CurrentContext current(cuda(), context_);
  std::unique_lock lock(mutex_);
  if (free_.empty()) make_event();
  const auto mark = free_.begin();
  // Noted first, because noting may fail for want of memory and dropping may not. Nobody knows the number yet.
  const FenceHandle fence = next_;
  numbers_.emplace(fence, mark);
  ++next_;
  mark->dropped = false;
  recorded_.splice(recorded_.begin(), free_, mark);
  lock.unlock();
  const CUresult result = cuda()->cuEventRecord(mark->event, stream);
  if (result != CUDA_SUCCESS) {
    drop(fence);
    cuda().check(result, "cuEventRecord", "mark a stream");
  }
  return fence;
}

bool Fences::has_passed(FenceHandle fence) {
  const Use use(*this, "has_passed", fence);
  const CurrentContext current(cuda(), context_);
  const CUresult result = cuda()->cuEventQuery(use.event());
  if (result == CUDA_ERROR_NOT_READY) return false;
  cuda().check(result, "cuEventQuery", "fence " + std::to_string(fence));
  return true;
}

void Fences::wait(FenceHandle fence) {
  const Use use(*this, "wait", fence);
  const CurrentContext current(cuda(), context_);
  cuda().check(cuda()->cuEventSynchronize(use.event()), "cuEventSynchronize", "wait for fence " + std::to_string(fence));
}

void Fences::wait_on(CUstream stream, FenceHandle fence) {
  const Use use(*this, "wait_on", fence);
  const CurrentContext current(cuda(), context_);
  cuda().check(cuda()->cuStreamWaitEvent(stream, use.event(), 0), "cuStreamWaitEvent",
               "make a stream wait for fence " + std::to_string(fence));
}

void Fences::drop(FenceHandle fence) noexcept {
  const std::lock_guard lock(mutex_);
  const auto found = numbers_.find(fence);
  if (found == numbers_.end()) return;
  const auto mark = found->second;
  numbers_.erase(found);
  mark->dropped = true;
  // To record it again overwrites nothing that a stream waits for: a stream waits for what the event marked when it was told.
  if (mark->users == 0) free_.splice(free_.begin(), recorded_, mark);
}

}  // namespace vattn::cuda
