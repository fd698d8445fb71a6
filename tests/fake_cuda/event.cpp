// Events: what was given to a stream until they were recorded.
//
// Rules: an event that was never recorded has passed; recording it again marks anew, and a stream that was told to wait for it
// waits for what it marked then; it is recorded on streams of its own context; it may be destroyed before it has passed.
#include <memory>

#include "work.hpp"

namespace fake_cuda {
namespace {

constexpr unsigned kKnownFlags = CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING;

/// The event; null where there is no such.
EventState* find(const State& state, CUevent event) {
  auto* found = reinterpret_cast<EventState*>(event);
  return state.events.count(found) != 0 ? found : nullptr;
}

}  // namespace

CUresult cuEventCreate(CUevent* event, unsigned flags) {
  FAKE_CUDA_ENTRY(entry, "cuEventCreate", Needs::kContext);
  if (event == nullptr || (flags & ~kKnownFlags) != 0) return CUDA_ERROR_INVALID_VALUE;
  auto made = std::make_unique<EventState>(EventState{entry.device().ordinal, {}});
  entry->events.insert(made.get());
  *event = reinterpret_cast<CUevent>(made.release());
  return CUDA_SUCCESS;
}

CUresult cuEventRecord(CUevent event, CUstream stream) {
  FAKE_CUDA_ENTRY(entry, "cuEventRecord", Needs::kRelaxed);
  EventState* recorded = find(*entry, event);
  if (recorded == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (const CUresult bad = check_stream(*entry, entry.device().ordinal, stream, "cuEventRecord"); bad != CUDA_SUCCESS)
    return bad;
  const int device = stream != nullptr ? reinterpret_cast<StreamState*>(stream)->device : entry.device().ordinal;
  if (device != recorded->device) return CUDA_ERROR_INVALID_HANDLE;
  recorded->marked = before_next(*entry, device, stream);
  return CUDA_SUCCESS;
}

CUresult cuEventQuery(CUevent event) {
  FAKE_CUDA_ENTRY(entry, "cuEventQuery", Needs::kRelaxed);
  const EventState* asked = find(*entry, event);
  if (asked == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  return is_any_left(*entry, asked->marked) ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS;
}

CUresult cuEventSynchronize(CUevent event) {
  FAKE_CUDA_ENTRY(entry, "cuEventSynchronize", Needs::kRelaxed);
  const EventState* waited = find(*entry, event);
  if (waited == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  wait_for(entry, WorkIds(waited->marked));  // a copy: it may be recorded anew, or destroyed, meanwhile
  return CUDA_SUCCESS;
}

CUresult cuEventDestroy(CUevent event) {
  FAKE_CUDA_ENTRY(entry, "cuEventDestroy", Needs::kContext);
  EventState* destroyed = find(*entry, event);
  if (destroyed == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  entry->events.erase(destroyed);
  delete destroyed;
  return CUDA_SUCCESS;
}

}  // namespace fake_cuda
