// The part of CUDA's driver ABI that vattn uses, declared here so that the library builds without the CUDA toolkit.
//
// Promise: every size, offset and value below equals the toolkit's cuda.h, from 12.0 to 13.x; tests/cpp/cuda_types_match.cpp
// compares them at compile time wherever a toolkit is found. The names are CUDA's own, in a namespace, so that a translation
// unit may include both this file and cuda.h.
// Only src/cuda and the fake libcuda of the tests include this header: nothing above the driver knows a CUDA type.
// Thread: any; there is nothing here but types and constants.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vattn::cuda {

// ---- handles ------------------------------------------------------------------------------------------------------------

using CUdevice = int;                    // an ordinal, in practice; cuDeviceGet makes it from one all the same
using CUdeviceptr = unsigned long long;  // a virtual address of the device
using CUmemGenericAllocationHandle = unsigned long long;
using CUcontext = struct CUctx_st*;
using CUstream = struct CUstream_st*;
using CUevent = struct CUevent_st*;

// ---- results ------------------------------------------------------------------------------------------------------------

/// What every entry point returns. The list is not complete and need not be: a code's name and text come from the driver.
enum CUresult : int {
  CUDA_SUCCESS = 0,
  CUDA_ERROR_INVALID_VALUE = 1,
  CUDA_ERROR_OUT_OF_MEMORY = 2,
  CUDA_ERROR_NOT_INITIALIZED = 3,
  CUDA_ERROR_DEINITIALIZED = 4,
  CUDA_ERROR_NO_DEVICE = 100,
  CUDA_ERROR_INVALID_DEVICE = 101,
  CUDA_ERROR_INVALID_CONTEXT = 201,
  CUDA_ERROR_INVALID_HANDLE = 400,
  CUDA_ERROR_NOT_FOUND = 500,
  CUDA_ERROR_NOT_READY = 600,
  CUDA_ERROR_ILLEGAL_ADDRESS = 700,
  CUDA_ERROR_CONTEXT_IS_DESTROYED = 709,
  CUDA_ERROR_NOT_PERMITTED = 800,
  CUDA_ERROR_NOT_SUPPORTED = 801,
  CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900,
  CUDA_ERROR_STREAM_CAPTURE_IMPLICIT = 906,
  CUDA_ERROR_UNKNOWN = 999,
};

// ---- devices, streams and events ----------------------------------------------------------------------------------------

enum CUdevice_attribute : unsigned {
  CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED = 102,
};

/// A stream that neither waits for the NULL stream nor makes it wait.
constexpr unsigned CU_STREAM_NON_BLOCKING = 0x1;

/// Whoever waits for the event sleeps; otherwise he may spin.
constexpr unsigned CU_EVENT_BLOCKING_SYNC = 0x1;
/// The event has no time, and costs less.
constexpr unsigned CU_EVENT_DISABLE_TIMING = 0x2;

enum CUstreamCaptureStatus : unsigned {
  CU_STREAM_CAPTURE_STATUS_NONE = 0,
  CU_STREAM_CAPTURE_STATUS_ACTIVE = 1,
  CU_STREAM_CAPTURE_STATUS_INVALIDATED = 2,  // a call that a capture does not allow has ended it
};

/// What a thread's calls may do to captures, its own and other threads'.
enum CUstreamCaptureMode : unsigned {
  CU_STREAM_CAPTURE_MODE_GLOBAL = 0,        // the default: a potentially unsafe call is refused and may end a capture
  CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1,  // only a capture that this thread began
  CU_STREAM_CAPTURE_MODE_RELAXED = 2,       // such a call is let through, and ends none
};

// ---- finding entry points -----------------------------------------------------------------------------------------------

using cuuint64_t = std::uint64_t;

/// The versions of stream functions whose NULL stream is the one all threads share.
constexpr cuuint64_t CU_GET_PROC_ADDRESS_LEGACY_STREAM = 1;

enum CUdriverProcAddressQueryResult : unsigned {
  CU_GET_PROC_ADDRESS_SUCCESS = 0,
  CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND = 1,
  CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT = 2,
};

// ---- virtual memory management ------------------------------------------------------------------------------------------

enum CUmemAllocationType : unsigned {
  CU_MEM_ALLOCATION_TYPE_INVALID = 0x0,
  CU_MEM_ALLOCATION_TYPE_PINNED = 0x1,  // the only kind cuMemCreate makes on a device
};

enum CUmemAllocationHandleType : unsigned {
  CU_MEM_HANDLE_TYPE_NONE = 0x0,  // the page cannot be exported
  CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR = 0x1,
};

enum CUmemLocationType : unsigned {
  CU_MEM_LOCATION_TYPE_INVALID = 0x0,
  CU_MEM_LOCATION_TYPE_DEVICE = 0x1,
};

enum CUmemAllocationGranularity_flags : unsigned {
  CU_MEM_ALLOC_GRANULARITY_MINIMUM = 0x0,
  CU_MEM_ALLOC_GRANULARITY_RECOMMENDED = 0x1,
};

enum CUmemAccess_flags : unsigned {
  CU_MEM_ACCESS_FLAGS_PROT_NONE = 0x0,  // what every new mapping starts with
  CU_MEM_ACCESS_FLAGS_PROT_READ = 0x1,
  CU_MEM_ACCESS_FLAGS_PROT_READWRITE = 0x3,
};

struct CUmemLocation {
  CUmemLocationType type;
  int id;  // a device's ordinal where type is DEVICE
};

/// What cuMemCreate is asked for. Fixed for the page's life: export and RDMA must be asked for here or never.
struct CUmemAllocationProp {
  CUmemAllocationType type;
  CUmemAllocationHandleType requestedHandleTypes;
  CUmemLocation location;
  void* win32HandleMetaData;
  struct {
    unsigned char compressionType;
    unsigned char gpuDirectRDMACapable;
    unsigned short usage;
    unsigned char reserved[4];
  } allocFlags;
};

/// Who may do what with a mapping; cuMemSetAccess takes several, one a device.
struct CUmemAccessDesc {
  CUmemLocation location;
  CUmemAccess_flags flags;
};

}  // namespace vattn::cuda
