// cuInit, the versions and the devices.
#include <unistd.h>

#include <cstring>
#include <map>
#include <string>

#include "state.hpp"

namespace fake_cuda {
namespace {

/// What the fake answers; every other attribute is one that it does not know. Nothing can be exported, nor used by others.
std::map<CUdevice_attribute, int> attributes(const Settings& settings) {
  return {
      {CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, settings.vmm ? 1 : 0},
      {CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING, 1},
      {CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 1},
      {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, 9},
      {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, 0},
      {CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, 0},
      {CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED, 0},
      {CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_SUPPORTED, 0},
      {CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED, 0},
      {CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED, 0},
  };
}

}  // namespace

CUresult cuInit(unsigned flags) {
  FAKE_CUDA_ENTRY(entry, "cuInit", Needs::kNothing);
  if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
  if (entry->settings.devices == 0) return CUDA_ERROR_NO_DEVICE;
  if (entry->initialised_in != 0 && entry->initialised_in != ::getpid()) {
    // No violation: asking is how a child finds out.
    return CUDA_ERROR_NOT_INITIALIZED;
  }
  entry->initialised_in = ::getpid();
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int* version) {
  FAKE_CUDA_ENTRY(entry, "cuDriverGetVersion", Needs::kNothing);
  if (version == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *version = 13000;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int* count) {
  FAKE_CUDA_ENTRY(entry, "cuDeviceGetCount", Needs::kInit);
  if (count == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *count = entry->settings.devices;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  FAKE_CUDA_ENTRY(entry, "cuDeviceGet", Needs::kInit);
  if (device == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (!entry->has_device(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char* name, int size, CUdevice device) {
  FAKE_CUDA_ENTRY(entry, "cuDeviceGetName", Needs::kInit);
  if (name == nullptr || size <= 0) return CUDA_ERROR_INVALID_VALUE;
  if (!entry->has_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  const std::string text = "Fake GPU " + std::to_string(device);
  std::strncpy(name, text.c_str(), static_cast<std::size_t>(size));
  name[size - 1] = '\0';
  return CUDA_SUCCESS;
}

CUresult cuDeviceTotalMem(std::size_t* bytes, CUdevice device) {
  FAKE_CUDA_ENTRY(entry, "cuDeviceTotalMem", Needs::kInit);
  if (bytes == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (!entry->has_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  *bytes = entry->settings.memory;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetUuid(CUuuid* uuid, CUdevice device) {
  FAKE_CUDA_ENTRY(entry, "cuDeviceGetUuid", Needs::kInit);
  if (uuid == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (!entry->has_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  std::memset(uuid, 0, sizeof *uuid);
  uuid->bytes[0] = static_cast<char>(device + 1);
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  FAKE_CUDA_ENTRY(entry, "cuDeviceGetAttribute", Needs::kInit);
  const auto known = attributes(entry->settings);
  const auto found = known.find(attribute);
  if (value == nullptr || found == known.end()) return CUDA_ERROR_INVALID_VALUE;
  if (!entry->has_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  *value = found->second;
  return CUDA_SUCCESS;
}

}  // namespace fake_cuda
