// Streams, and what a capture makes of them.
//
// Rules: a stream that is captured can be asked whether it is, and nothing else; the NULL stream cannot be asked while another
// stream is. A thread starts in the global mode. Work may run on when its stream is destroyed; fills and copies that can be
// over by then are.
#include <memory>
#include <utility>

#include "work.hpp"

namespace fake_cuda {

namespace {

CUresult create(const Entry& entry, CUstream* stream, unsigned flags) {
  if (stream == nullptr || (flags & ~CU_STREAM_NON_BLOCKING) != 0) return CUDA_ERROR_INVALID_VALUE;
  auto made = std::make_unique<StreamState>(StreamState{entry.device().ordinal, flags != CU_STREAM_NON_BLOCKING, true, {}});
  entry->streams.insert(made.get());
  *stream = reinterpret_cast<CUstream>(made.release());
  return CUDA_SUCCESS;
}

}  // namespace

CUresult cuStreamCreate(CUstream* stream, unsigned flags) {
  FAKE_CUDA_ENTRY(entry, "cuStreamCreate", Needs::kContext);
  return create(entry, stream, flags);
}

CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned flags, int /*priority: there is only one*/) {
  FAKE_CUDA_ENTRY(entry, "cuStreamCreateWithPriority", Needs::kContext);
  return create(entry, stream, flags);
}

CUresult cuStreamQuery(CUstream stream) {
  FAKE_CUDA_ENTRY(entry, "cuStreamQuery", Needs::kRelaxed);
  const int device = entry.device().ordinal;
  if (const CUresult bad = check_stream(*entry, device, stream, "cuStreamQuery"); bad != CUDA_SUCCESS) return bad;
  return is_any_left(*entry, all_of_queue(queue_of(*entry, device, stream))) ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS;
}

CUresult cuStreamSynchronize(CUstream stream) {
  FAKE_CUDA_ENTRY(entry, "cuStreamSynchronize", Needs::kRelaxed);
  const int device = entry.device().ordinal;
  if (const CUresult bad = check_stream(*entry, device, stream, "cuStreamSynchronize"); bad != CUDA_SUCCESS) return bad;
  wait_for(entry, all_of_queue(queue_of(*entry, device, stream)));
  return CUDA_SUCCESS;
}

CUresult cuStreamDestroy(CUstream stream) {
  FAKE_CUDA_ENTRY(entry, "cuStreamDestroy", Needs::kContext);
  auto* destroyed = reinterpret_cast<StreamState*>(stream);
  if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (const CUresult bad = check_stream(*entry, 0, stream, "cuStreamDestroy"); bad != CUDA_SUCCESS) return bad;
  entry->streams.erase(destroyed);
  // The real driver lets work finish in its own time and returns at once; fills and copies have finished by the time anyone
  // can tell.
  static_cast<void>(finish_transfers(*entry, all_of_queue(destroyed->queue)));
  delete destroyed;
  return CUDA_SUCCESS;
}

CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags) {
  FAKE_CUDA_ENTRY(entry, "cuStreamWaitEvent", Needs::kContext);
  auto* awaited = reinterpret_cast<EventState*>(event);
  if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
  if (entry->events.count(awaited) == 0) return CUDA_ERROR_INVALID_HANDLE;
  const int device = entry.device().ordinal;
  if (const CUresult bad = check_stream(*entry, device, stream, "cuStreamWaitEvent"); bad != CUDA_SUCCESS) return bad;
  queue_of(*entry, device, stream).awaited.insert(awaited->marked.begin(), awaited->marked.end());
  return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  FAKE_CUDA_ENTRY(entry, "cuStreamIsCapturing", Needs::kContext);
  if (status == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (!is_stream(*entry, stream)) return CUDA_ERROR_INVALID_HANDLE;
  const bool captured = queue_of(*entry, entry.device().ordinal, stream).capturing;
  if (!captured && stream == nullptr && is_any_captured(*entry)) return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
  *status = captured ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
  FAKE_CUDA_ENTRY(entry, "cuThreadExchangeStreamCaptureMode", Needs::kContext);
  if (mode == nullptr || *mode > CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_ERROR_INVALID_VALUE;
  std::swap(*mode, capture_mode());
  return CUDA_SUCCESS;
}

}  // namespace fake_cuda
