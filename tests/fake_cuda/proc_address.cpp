// cuGetProcAddress, the one way in, in both of its ABIs, exported by name as the real library exports them.
//
// Rules: an entry asked for with a version older than its ABI, or not known at all, is a null pointer with CUDA_SUCCESS and a
// status; a version newer than the driver is an invalid value.
#include <string>

#include "fake_cuda.h"
#include "state.hpp"

namespace fake_cuda {
namespace {

constexpr int kDriverVersion = 13000;

struct Found {
  const char* name;
  int version;
  void* entry;
};

const Found* find(const std::string& symbol) {
  static const Found kEntries[] = {
#define VATTN_CUDA_FUNCTION(name, version, presence, parameters) \
  {#name, version, reinterpret_cast<void*>(static_cast<CUresult(*) parameters>(&fake_cuda::name))},
#include "cuda/functions.def"
#define VATTN_CUDA_FUNCTION(name, version, presence, parameters) \
  {#name, version, reinterpret_cast<void*>(static_cast<CUresult(*) parameters>(&fake_cuda::name))},
#include "client_functions.def"
  };
  for (const Found& found : kEntries) {
    if (symbol == found.name) return &found;
  }
  return nullptr;
}

CUresult get_proc_address(const char* symbol, void** entry_point, int version, CUdriverProcAddressQueryResult* status) {
  FAKE_CUDA_ENTRY(entry, "cuGetProcAddress", Needs::kNothing);
  if (symbol == nullptr || entry_point == nullptr || version > kDriverVersion) return CUDA_ERROR_INVALID_VALUE;
  const Found* found = entry->settings.hidden.count(symbol) == 0 ? find(symbol) : nullptr;
  auto result = CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  if (found != nullptr) {
    result = version >= found->version ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT;
  }
  *entry_point = result == CU_GET_PROC_ADDRESS_SUCCESS ? found->entry : nullptr;
  if (status != nullptr) *status = result;
  return CUDA_SUCCESS;
}

}  // namespace
}  // namespace fake_cuda

extern "C" {

FAKE_CUDA_API vattn::cuda::CUresult cuGetProcAddress(const char* symbol, void** entry, int version,
                                                     vattn::cuda::cuuint64_t /*flags*/) {
  return fake_cuda::get_proc_address(symbol, entry, version, nullptr);
}

FAKE_CUDA_API vattn::cuda::CUresult cuGetProcAddress_v2(const char* symbol, void** entry, int version,
                                                        vattn::cuda::cuuint64_t /*flags*/,
                                                        vattn::cuda::CUdriverProcAddressQueryResult* status) {
  return fake_cuda::get_proc_address(symbol, entry, version, status);
}

FAKE_CUDA_API int vattn_fake_tensor_device(void) { return 1; }
}
