// Fences: events of one device, each under a number that is used once.
//
// An event is made when no free one is left, and used again once its fence is dropped: making one takes the driver's lock, and
// a cache records one a step. CUDA may give an event's value out again too, so callers get numbers, and one that was dropped is
// refused. An event that somebody is waiting for stays out of use until he is done, dropped or not.
// Promise: what fails leaves the fences as they were; the destructor gives back every event, but in a forked child none.
// Thread: any; the mutex is held neither while a fence is waited for nor while one is recorded.
#pragma once

#include <list>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "cuda/context.hpp"
#include "vattn/driver/driver.hpp"

namespace vattn::cuda {

class Fences {
 public:
  Fences(std::shared_ptr<const Libcuda> libcuda, const PrimaryContext& context)
      : libcuda_(std::move(libcuda)), context_(context) {}
  Fences(const Fences&) = delete;
  Fences& operator=(const Fences&) = delete;
  ~Fences();

  [[nodiscard]] FenceHandle record(CUstream stream);
  [[nodiscard]] bool has_passed(FenceHandle fence);
  void wait(FenceHandle fence);
  void wait_on(CUstream stream, FenceHandle fence);
  void drop(FenceHandle fence) noexcept;

 private:
  struct Mark {
    CUevent event = nullptr;
    unsigned users = 0;    ///< calls that are using the event now
    bool dropped = false;  ///< its number is gone; the last user frees it
  };
  using Marks = std::list<Mark>;  // moving a mark from list to list cannot fail
  class Use;

  [[nodiscard]] const Libcuda& cuda() const noexcept { return *libcuda_; }
  void make_event();

  Generation generation_;
  std::shared_ptr<const Libcuda> libcuda_;
  const PrimaryContext& context_;
  std::mutex mutex_;
  Marks recorded_;
  Marks free_;
  std::unordered_map<FenceHandle, Marks::iterator> numbers_;
  FenceHandle next_ = 1;
};

}  // namespace vattn::cuda
