// Fails calls on purpose: the k-th from now, once or for ever, with a code of the test's choosing.
//
// A failed call does not reach the driver inside, which is what "throws and has changed nothing" means.
// Thread: any; one mutex.
#pragma once

#include <mutex>
#include <optional>
#include <string>

#include "vattn/driver/decorators/decorator.hpp"

namespace vattn {

class VATTN_API FaultDriver final : public Decorator {
 public:
  using Decorator::Decorator;

  struct Fault {
    std::uint64_t call = 1;      ///< which call from now on fails first; 1 is the next
    bool sticky = false;         ///< every later one fails too
    std::optional<Verb> verb{};  ///< only calls of this verb count; none: of every verb
    int code = 5;                ///< the code the error carries
    std::string name = "EIO";    ///< and the code's name
    bool out_of_memory = false;  ///< throw OutOfMemoryError instead, as create does when memory is out
  };

  void arm(Fault fault) {
    const std::lock_guard lock(mutex_);
    fault_ = std::move(fault);
    seen_ = 0;
    failed_ = 0;
  }
  void disarm() {
    const std::lock_guard lock(mutex_);
    fault_.reset();
  }
  /// Calls that were failed since arm().
  [[nodiscard]] std::uint64_t failed() const {
    const std::lock_guard lock(mutex_);
    return failed_;
  }

 protected:
  void before(Verb verb) override {
    const std::lock_guard lock(mutex_);
    if (!fault_ || (fault_->verb && *fault_->verb != verb)) return;
    ++seen_;
    if (seen_ != fault_->call && !(fault_->sticky && seen_ > fault_->call)) return;
    ++failed_;
    if (fault_->out_of_memory) throw OutOfMemoryError(std::string(name_of(verb)) + ": failed on purpose", 1, 0, 0);
    throw DriverError(name_of(verb), fault_->code, fault_->name, "failed on purpose");
  }

 private:
  mutable std::mutex mutex_;
  std::optional<Fault> fault_;
  std::uint64_t seen_ = 0;
  std::uint64_t failed_ = 0;
};

}  // namespace vattn
