// The owners of what CUDA ties to a device: its primary context, a context made current for one scope, a stream.
//
// Promise: what a constructor took, the destructor gives back, on every path; a constructor that throws has taken nothing. No
// destructor throws: an error while giving back (the process is exiting, or the context was reset under us) has no receiver.
// In a forked child the destructors call nothing: CUDA does not survive fork(), and what the parent holds is the parent's.
// Thread: any. CurrentContext belongs to the thread and the scope that made it.
#pragma once

#include <memory>
#include <new>
#include <string>
#include <utility>

#include "cuda/libcuda.hpp"
#include "vattn/fork.hpp"

namespace vattn::cuda {

/// One reference to a device's primary context, the one PyTorch and the CUDA runtime use: pages of another context's making
/// would be out of their reach.
class PrimaryContext {
 public:
  PrimaryContext(std::shared_ptr<const Libcuda> libcuda, CUdevice device) : libcuda_(std::move(libcuda)), device_(device) {
    const Libcuda& cuda = *libcuda_;
    cuda.check(cuda->cuDevicePrimaryCtxRetain(&context_, device_), "cuDevicePrimaryCtxRetain",
               "the primary context of cuda:" + std::to_string(device_));
  }
  PrimaryContext(const PrimaryContext&) = delete;
  PrimaryContext& operator=(const PrimaryContext&) = delete;
  ~PrimaryContext() {
    if (generation_.is_current()) static_cast<void>((*libcuda_)->cuDevicePrimaryCtxRelease(device_));
  }

  [[nodiscard]] CUcontext get() const noexcept { return context_; }

 private:
  Generation generation_;
  std::shared_ptr<const Libcuda> libcuda_;
  CUdevice device_;
  CUcontext context_ = nullptr;
};

/// Makes a context current on this thread until the end of the scope, then restores what was current before. Which context
/// that was is the caller's affair: a worker thread has none, PyTorch may have another device's.
///
/// For as long, the thread's calls are relaxed towards captures. Another thread may be capturing a graph, by default in the
/// mode in which a call that is potentially unsafe, from any thread, is refused and may end the capture. What vattn calls
/// belongs to no graph, so it does no harm to one; PyTorch's allocator guards its own calls in the same way. Where the library
/// has no such mode there is none to leave.
class CurrentContext {
 public:
  CurrentContext(const Libcuda& libcuda, const PrimaryContext& context) : CurrentContext(libcuda, context, std::nothrow) {
    libcuda_.check(pushed_, "cuCtxPushCurrent", "make the device's context current");
    libcuda_.check(relaxed_, "cuThreadExchangeStreamCaptureMode", "let other threads' captures be");
  }
  /// For destructors: throws nothing, and goes on without the relaxed mode where there is no having it.
  CurrentContext(const Libcuda& libcuda, const PrimaryContext& context, std::nothrow_t /*tag*/) noexcept
      : libcuda_(libcuda), pushed_(libcuda->cuCtxPushCurrent(context.get())) {
    if (is_current()) relaxed_ = exchange_mode();
  }
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;
  ~CurrentContext() {
    if (!is_current()) return;
    if (relaxed_ == CUDA_SUCCESS) static_cast<void>(exchange_mode());
    CUcontext popped = nullptr;
    static_cast<void>(libcuda_->cuCtxPopCurrent(&popped));
  }

  [[nodiscard]] bool is_current() const noexcept { return pushed_ == CUDA_SUCCESS; }

 private:
  /// Gives the thread the mode that `mode_` holds, which then holds the thread's.
  CUresult exchange_mode() noexcept {
    const auto exchange = libcuda_->cuThreadExchangeStreamCaptureMode;
    return exchange != nullptr ? exchange(&mode_) : CUDA_SUCCESS;
  }

  const Libcuda& libcuda_;
  CUstreamCaptureMode mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;
  CUresult pushed_;
  CUresult relaxed_ = CUDA_SUCCESS;
};

/// A stream of our own, for filling and copying. Non-blocking, and not the NULL stream: work on the NULL stream waits for all
/// the program's ordinary streams and holds them up in turn, so that zeroing one page would stop the model.
class OwnStream {
 public:
  OwnStream(std::shared_ptr<const Libcuda> libcuda, const PrimaryContext& context)
      : libcuda_(std::move(libcuda)), context_(context) {
    const Libcuda& cuda = *libcuda_;
    const CurrentContext current(cuda, context_);
    cuda.check(cuda->cuStreamCreate(&stream_, CU_STREAM_NON_BLOCKING), "cuStreamCreate", "a stream to fill and copy on");
  }
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;
  ~OwnStream() {
    if (!generation_.is_current()) return;
    const Libcuda& cuda = *libcuda_;
    const CurrentContext current(cuda, context_, std::nothrow);
    if (current.is_current()) static_cast<void>(cuda->cuStreamDestroy(stream_));
  }

  [[nodiscard]] CUstream get() const noexcept { return stream_; }

  /// Waits on the host for what was started on this stream.
  void wait() const {
    const Libcuda& cuda = *libcuda_;
    cuda.check(cuda->cuStreamSynchronize(stream_), "cuStreamSynchronize", "wait for a fill or a copy");
  }

 private:
  Generation generation_;
  std::shared_ptr<const Libcuda> libcuda_;
  const PrimaryContext& context_;
  CUstream stream_ = nullptr;
};

}  // namespace vattn::cuda
