// Primary contexts, and the stack of current contexts that each thread has.
//
// Rules: a context lives while it is retained; a thread starts with none current; setting one takes the place of the last that
// was pushed, and setting none takes that away; a destroyed one stays on the stacks it is on, and every call under it says so.
#include "state.hpp"
#include "work.hpp"

namespace fake_cuda {
namespace {

CUcontext handle_of(Device* device) { return reinterpret_cast<CUcontext>(device); }

/// The device whose live context `context` is, or null.
Device* find(State& state, CUcontext context) {
  for (Device& device : state.devices) {
    if (handle_of(&device) == context && device.context_references != 0) return &device;
  }
  return nullptr;
}

}  // namespace

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  FAKE_CUDA_ENTRY(entry, "cuDevicePrimaryCtxRetain", Needs::kInit);
  if (context == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (!entry->has_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  Device& retained = entry->devices[static_cast<std::size_t>(device)];
  ++retained.context_references;
  *context = handle_of(&retained);
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease(CUdevice device) {
  FAKE_CUDA_ENTRY(entry, "cuDevicePrimaryCtxRelease", Needs::kInit);
  if (!entry->has_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  Device& released = entry->devices[static_cast<std::size_t>(device)];
  if (released.context_references == 0) return CUDA_ERROR_INVALID_CONTEXT;
  if (--released.context_references == 0) {
    abandon_device(*entry, device);
  }
  return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent(CUcontext context) {
  FAKE_CUDA_ENTRY(entry, "cuCtxPushCurrent", Needs::kInit);
  Device* pushed = find(*entry, context);
  if (pushed == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  context_stack().push_back(pushed);
  return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent(CUcontext* context) {
  FAKE_CUDA_ENTRY(entry, "cuCtxPopCurrent", Needs::kInit);
  auto& stack = context_stack();
  if (stack.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  if (context != nullptr) *context = handle_of(stack.back());
  stack.pop_back();
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
  FAKE_CUDA_ENTRY(entry, "cuCtxSetCurrent", Needs::kInit);
  auto& stack = context_stack();
  Device* set = context != nullptr ? find(*entry, context) : nullptr;
  if (context != nullptr && set == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  if (!stack.empty()) stack.pop_back();
  if (set != nullptr) stack.push_back(set);
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
  FAKE_CUDA_ENTRY(entry, "cuCtxGetDevice", Needs::kContext);
  if (device == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *device = entry.device().ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
  FAKE_CUDA_ENTRY(entry, "cuDevicePrimaryCtxGetState", Needs::kInit);
  if (flags == nullptr || active == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (!entry->has_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  *flags = 0;
  *active = entry->devices[static_cast<std::size_t>(device)].context_references != 0 ? 1 : 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  FAKE_CUDA_ENTRY(entry, "cuCtxGetStreamPriorityRange", Needs::kContext);
  if (least != nullptr) *least = 0;
  if (greatest != nullptr) *greatest = 0;  // no priorities, as the real call says where there are none
  return CUDA_SUCCESS;
}

CUresult cuStreamGetCtx(CUstream stream, CUcontext* context) {
  FAKE_CUDA_ENTRY(entry, "cuStreamGetCtx", Needs::kContext);
  if (context == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (!is_stream(*entry, stream)) return CUDA_ERROR_INVALID_HANDLE;
  const int device = stream != nullptr ? reinterpret_cast<StreamState*>(stream)->device : entry.device().ordinal;
  *context = handle_of(&entry->devices[static_cast<std::size_t>(device)]);
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  FAKE_CUDA_ENTRY(entry, "cuCtxGetCurrent", Needs::kInit);
  if (context == nullptr) return CUDA_ERROR_INVALID_VALUE;
  const auto& stack = context_stack();
  *context = stack.empty() ? nullptr : handle_of(stack.back());
  return CUDA_SUCCESS;
}

CUresult cuCtxSynchronize() {
  FAKE_CUDA_ENTRY(entry, "cuCtxSynchronize", Needs::kNoCapture);
  wait_for(entry, all_of_device(*entry, entry.device().ordinal));
  return CUDA_SUCCESS;
}

}  // namespace fake_cuda
