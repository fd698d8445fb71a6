// The owners of what CUDA ties to a device: its primary context, a context made current for one scope, a stream.
//
// Promise: what a constructor took, the destructor gives back, on every path; a constructor that throws has taken nothing. No
// destructor throws: an error while giving back (the process is exiting, or the context was reset under us) has no receiver.
// In a forked child the destructors call nothing: CUDA does not survive fork(), and what the parent holds is the parent's.
// Thread: any. CurrentContext belongs to the thread and the scope that made it.
#pragma once

#include <memory>
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
class CurrentContext {
 public:
  CurrentContext(const Libcuda& libcuda, const PrimaryContext& context) : libcuda_(libcuda) {
    libcuda_.check(libcuda_->cuCtxPushCurrent(context.get()), "cuCtxPushCurrent", "make the device's context current");
  }
  CurrentContext(const CurrentContext&) = delete;
  CurrentContext& operator=(const CurrentContext&) = delete;
  ~CurrentContext() {
    CUcontext popped = nullptr;
    static_cast<void>(libcuda_->cuCtxPopCurrent(&popped));
  }

 private:
  const Libcuda& libcuda_;
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
    if (cuda->cuCtxPushCurrent(context_.get()) != CUDA_SUCCESS) return;
    static_cast<void>(cuda->cuStreamDestroy(stream_));
    CUcontext popped = nullptr;
    static_cast<void>(cuda->cuCtxPopCurrent(&popped));
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
