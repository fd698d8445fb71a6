// probe_cuda() and cuda_device_count(): what `python -m vattn info` prints about CUDA, and what there is to choose from.
//
// Promise: a machine without a GPU, with half a driver, or with one device out of order is an answer, not an exception. No
// context is made: one costs hundreds of megabytes of device memory and a tenth of a second.
// Thread: any.
#include <array>
#include <string>

#include "cuda/cuda_driver.hpp"
#include "cuda/device.hpp"
#include "cuda/libcuda.hpp"

namespace vattn {
namespace {

using cuda::Libcuda;

int count_devices(const Libcuda& cuda) {
  int count = 0;
  cuda.check(cuda->cuDeviceGetCount(&count), "cuDeviceGetCount", "how many devices there are");
  return count;
}

CudaDeviceInfo probe_device(const Libcuda& cuda, int ordinal) {
  CudaDeviceInfo info;
  try {
    cuda::CUdevice device = 0;
    cuda.check(cuda->cuDeviceGet(&device, ordinal), "cuDeviceGet", "cuda:" + std::to_string(ordinal));
    std::array<char, 256> name{};
    cuda.check(cuda->cuDeviceGetName(name.data(), static_cast<int>(name.size()) - 1, device), "cuDeviceGetName", "its name");
    info.name = name.data();
    std::size_t total = 0;
    cuda.check(cuda->cuDeviceTotalMem(&total, device), "cuDeviceTotalMem", "its memory");
    info.total_bytes = total;
    if (!cuda::has_virtual_memory(cuda, device)) {
      info.reason = "the device has no virtual memory management";
    } else {
      // Asked without a context, which is not promised to work; opening the device asks again, with one.
      const cuda::CUmemAllocationProp page = cuda::page_properties(device);
      if (cuda->cuMemGetAllocationGranularity(&info.granularity, &page, cuda::CU_MEM_ALLOC_GRANULARITY_MINIMUM) !=
          cuda::CUDA_SUCCESS) {
        info.granularity = 0;
      }
    }
  } catch (const Error& error) {
    info.reason = error.what();
  }
  return info;
}

}  // namespace

CudaInfo probe_cuda() {
  CudaInfo info;
  info.library = Libcuda::default_library();
  try {
    const auto libcuda = Libcuda::open();
    const Libcuda& cuda = *libcuda;
    // Before cuInit: an installed driver has a version even where it finds no device.
    if (cuda->cuDriverGetVersion(&info.driver_version) != cuda::CUDA_SUCCESS) info.driver_version = 0;
    cuda.initialise();
    const int count = count_devices(cuda);
    for (int ordinal = 0; ordinal < count; ++ordinal) info.devices.push_back(probe_device(cuda, ordinal));
    if (info.devices.empty()) info.reason = "the driver found no device";
  } catch (const Error& error) {
    info.reason = error.what();
  }
  return info;
}

int cuda_device_count() {
  try {
    const auto libcuda = Libcuda::open();
    libcuda->initialise();
    return count_devices(*libcuda);
  } catch (const Error&) {
    return 0;
  }
}

}  // namespace vattn
