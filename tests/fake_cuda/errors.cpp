// The names and texts of error codes: the ones vattn declares, which is all this library returns by itself.
#include <array>

#include "state.hpp"

namespace fake_cuda {
namespace {

struct Text {
  CUresult code;
  const char* name;
  const char* text;
};

#define FAKE_CUDA_TEXT(code, text) \
  Text { code, #code, text }

constexpr std::array kTexts{
    FAKE_CUDA_TEXT(CUDA_SUCCESS, "no error"),
    FAKE_CUDA_TEXT(CUDA_ERROR_INVALID_VALUE, "invalid argument"),
    FAKE_CUDA_TEXT(CUDA_ERROR_OUT_OF_MEMORY, "out of memory"),
    FAKE_CUDA_TEXT(CUDA_ERROR_NOT_INITIALIZED, "initialization error"),
    FAKE_CUDA_TEXT(CUDA_ERROR_DEINITIALIZED, "driver shutting down"),
    FAKE_CUDA_TEXT(CUDA_ERROR_NO_DEVICE, "no CUDA-capable device is detected"),
    FAKE_CUDA_TEXT(CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal"),
    FAKE_CUDA_TEXT(CUDA_ERROR_INVALID_CONTEXT, "invalid device context"),
    FAKE_CUDA_TEXT(CUDA_ERROR_INVALID_HANDLE, "invalid resource handle"),
    FAKE_CUDA_TEXT(CUDA_ERROR_NOT_FOUND, "named symbol not found"),
    FAKE_CUDA_TEXT(CUDA_ERROR_NOT_READY, "device not ready"),
    FAKE_CUDA_TEXT(CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered"),
    FAKE_CUDA_TEXT(CUDA_ERROR_CONTEXT_IS_DESTROYED, "context is destroyed"),
    FAKE_CUDA_TEXT(CUDA_ERROR_NOT_PERMITTED, "operation not permitted"),
    FAKE_CUDA_TEXT(CUDA_ERROR_NOT_SUPPORTED, "operation not supported"),
    FAKE_CUDA_TEXT(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "operation not permitted when stream is capturing"),
    FAKE_CUDA_TEXT(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT,
                   "operation would make the legacy stream depend on a capturing blocking stream"),
    FAKE_CUDA_TEXT(CUDA_ERROR_UNKNOWN, "unknown error"),
};

/// As the real one: an unknown code is an invalid value, and the pointer becomes null.
CUresult look_up(CUresult error, const char** out, const char* Text::* member) {
  if (out == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *out = nullptr;
  for (const Text& text : kTexts) {
    if (text.code == error) *out = text.*member;
  }
  return *out != nullptr ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

}  // namespace

CUresult cuGetErrorName(CUresult error, const char** name) {
  FAKE_CUDA_ENTRY(entry, "cuGetErrorName", Needs::kNothing);
  return look_up(error, name, &Text::name);
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  FAKE_CUDA_ENTRY(entry, "cuGetErrorString", Needs::kNothing);
  return look_up(error, text, &Text::text);
}

}  // namespace fake_cuda
