// Every driver, for tests of what stands on drivers: the host, CUDA (the fake one, or a GPU with VATTN_TEST_GPU=1) and null.
// Thread: the main one.
#pragma once

#include "cuda/cuda_driver.hpp"
#include "cuda_under_test.hpp"
#include "driver_contract.hpp"
#include "vattn/driver/decorators/counting_driver.hpp"
#include "vattn/driver/decorators/fault_driver.hpp"
#include "vattn/driver/host/host_driver.hpp"
#include "vattn/driver/null/null_driver.hpp"

namespace vattn {

inline std::vector<DriverUnderTest> every_driver() {
  return {
      {.name = "host", .open = open_host_driver, .write = write_host, .read = read_host},
      {.name = "cuda",
       .open =
           [] {
             static_cast<void>(cuda::on_fake());
             return open_cuda_driver(0);
           },
       .write = cuda::write_device,
       .read = cuda::read_device,
       .alive = cuda::alive_on_fake},
      {.name = "null", .open = open_null_driver},
  };
}

/// A driver with faults to arm inside and counts to compare: counting(fault(real)), so that failed calls are counted as begun.
struct Instrumented {
  explicit Instrumented(const DriverUnderTest& driver)
      : faults(std::make_shared<FaultDriver>(driver.open())), counts(std::make_shared<CountingDriver>(faults)) {}

  std::shared_ptr<FaultDriver> faults;
  std::shared_ptr<CountingDriver> counts;
};

}  // namespace vattn
