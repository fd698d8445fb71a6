// The part of CUDA's driver ABI that only the fake's clients need, beside what src/cuda/cuda_types.hpp declares for vattn.
//
// Promise: as there; tests/cpp/cuda_types_match.cpp compares values and sizes with the toolkit's headers wherever there are
// some. Thread: any; there is nothing here but types and constants.
#pragma once

#include "cuda/cuda_types.hpp"

namespace vattn::cuda {

struct CUuuid {
  char bytes[16];
};

/// What cuPointerGetAttribute is asked, of what the fake answers.
enum CUpointer_attribute : unsigned {
  CU_POINTER_ATTRIBUTE_CONTEXT = 1,
  CU_POINTER_ATTRIBUTE_MEMORY_TYPE = 2,
  CU_POINTER_ATTRIBUTE_DEVICE_POINTER = 3,
  CU_POINTER_ATTRIBUTE_HOST_POINTER = 4,
  CU_POINTER_ATTRIBUTE_BUFFER_ID = 7,
  CU_POINTER_ATTRIBUTE_IS_MANAGED = 8,
  CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL = 9,
  CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE = 10,
  CU_POINTER_ATTRIBUTE_RANGE_START_ADDR = 11,  // of the reservation
  CU_POINTER_ATTRIBUTE_RANGE_SIZE = 12,
  CU_POINTER_ATTRIBUTE_MAPPED = 13,
  CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES = 14,
  CU_POINTER_ATTRIBUTE_IS_GPU_DIRECT_RDMA_CAPABLE = 15,
  CU_POINTER_ATTRIBUTE_ACCESS_FLAGS = 16,
  CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE = 17,
  CU_POINTER_ATTRIBUTE_MAPPING_SIZE = 18,
  CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR = 19,
  CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID = 20,
};

constexpr unsigned CU_MEMORYTYPE_DEVICE = 2;

// What cuDeviceGetAttribute is asked by those clients, of what the fake answers.
constexpr auto CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = static_cast<CUdevice_attribute>(16);
constexpr auto CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING = static_cast<CUdevice_attribute>(41);
constexpr auto CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = static_cast<CUdevice_attribute>(75);
constexpr auto CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = static_cast<CUdevice_attribute>(76);
constexpr auto CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED = static_cast<CUdevice_attribute>(103);
constexpr auto CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_SUPPORTED = static_cast<CUdevice_attribute>(116);
constexpr auto CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED = static_cast<CUdevice_attribute>(110);
constexpr auto CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED = static_cast<CUdevice_attribute>(115);
constexpr auto CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED = static_cast<CUdevice_attribute>(128);

}  // namespace vattn::cuda
