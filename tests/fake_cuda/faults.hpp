// Failures on purpose: the k-th call of one entry, or of any, fails once or from then on.
//
// A call that fails this way does nothing else. Several faults may be armed; each counts the calls it applies to from the
// moment it was armed, and the first that strikes decides the code.
// Thread: none of its own; the state's mutex is held.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "cuda/cuda_types.hpp"

namespace fake_cuda {

class Faults {
 public:
  /// `entry` empty: any entry but those that name errors, which a program calls because something failed already.
  void arm(std::string entry, std::uint64_t kth, vattn::cuda::CUresult code, bool sticky) {
    armed_.push_back({std::move(entry), kth == 0 ? 1 : kth, 0, code, sticky});
  }
  void clear() { armed_.clear(); }

  /// The code this call fails with, or CUDA_SUCCESS. Counts the call.
  [[nodiscard]] vattn::cuda::CUresult strike(std::string_view entry) {
    auto code = vattn::cuda::CUDA_SUCCESS;
    for (Fault& fault : armed_) {
      const bool applies = fault.entry.empty() ? !names_errors(entry) : fault.entry == entry;
      if (!applies) continue;
      ++fault.seen;
      const bool strikes = fault.seen == fault.kth || (fault.sticky && fault.seen > fault.kth);
      if (!strikes || code != vattn::cuda::CUDA_SUCCESS) continue;
      code = fault.code;
      ++fired_;
    }
    return code;
  }

  [[nodiscard]] std::uint64_t fired() const noexcept { return fired_; }

 private:
  struct Fault {
    std::string entry;
    std::uint64_t kth;
    std::uint64_t seen;
    vattn::cuda::CUresult code;
    bool sticky;
  };

  static bool names_errors(std::string_view entry) { return entry == "cuGetErrorName" || entry == "cuGetErrorString"; }

  std::vector<Fault> armed_;
  std::uint64_t fired_ = 0;
};

}  // namespace fake_cuda
