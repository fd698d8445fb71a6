// The driver for NVIDIA GPUs: the verbs of driver.hpp over CUDA's virtual memory management calls.
//
// Promise: neither this header nor the library needs the CUDA toolkit to build or the CUDA driver to load. The driver library
// is opened when one of these functions is called, and a machine without it gets an error that says so.
// Thread: any; the drivers returned may be used, and destroyed, on any thread, whatever context it has current.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "vattn/driver/driver.hpp"

namespace vattn {

/// The driver of one GPU. Each call makes a new one, with its own reference to the device's primary context: the context that
/// PyTorch and the CUDA runtime use.
///
/// std::invalid_argument: no such device; the message has the ordinal and the count. DriverError: CUDA cannot be used, or the
/// device has no virtual memory management.
[[nodiscard]] VATTN_API std::shared_ptr<Driver> open_cuda_driver(int ordinal);

/// One device, as a probe sees it.
struct CudaDeviceInfo {
  std::string name;
  std::uint64_t total_bytes = 0;
  std::size_t granularity = 0;  ///< of its pages; 0 where it could not be asked
  std::string reason;           ///< why vattn cannot use it; empty where it can
};

/// What there is of CUDA on this machine.
struct CudaInfo {
  std::string library;     ///< what was opened, or would have been
  std::string reason;      ///< why CUDA cannot be used; empty where it can
  int driver_version = 0;  ///< 1000 * major + 10 * minor; 0 where there is none
  std::vector<CudaDeviceInfo> devices;
};

/// Looks, without making a context, so that it costs no device memory. Throws nothing but std::bad_alloc: whatever is missing
/// is in the reasons.
[[nodiscard]] VATTN_API CudaInfo probe_cuda();

/// How many devices there are; 0 where CUDA cannot be used.
[[nodiscard]] VATTN_API int cuda_device_count();

}  // namespace vattn
