// The CUDA driver passes the driver contract: over the fake library, and over a GPU with VATTN_TEST_GPU=1. What only the CUDA
// driver does is tested in cuda_driver_test.cpp and cuda_driver_failure_test.cpp.
#include "cuda/cuda_driver.hpp"
#include "cuda_under_test.hpp"
#include "driver_contract.hpp"

namespace vattn {
namespace {

/// A fresh fake for each test; a GPU as it is.
std::string why_not() {
  if (!cuda::on_fake()) return probe_cuda().reason;
  fake_cuda_reset();
  return {};
}

void check_gone() {
  if (!cuda::on_fake()) return;
  EXPECT_EQ(cuda::alive_on_fake(), cuda::nothing_alive()) << "something of the driver is left";
  EXPECT_EQ(fake_cuda_violations(), 0U) << cuda::last_violation();
}

INSTANTIATE_TEST_SUITE_P(Cuda, DriverContract,
                         testing::Values(DriverUnderTest{.name = "cuda",
                                                         .open = [] { return open_cuda_driver(0); },
                                                         .write = cuda::write_device,
                                                         .read = cuda::read_device,
                                                         .unavailable = why_not,
                                                         .alive = cuda::alive_on_fake,
                                                         .may_call_huge_sizes_invalid = [] { return !cuda::on_fake(); },
                                                         .check_gone = check_gone}),
                         name_of_driver);

}  // namespace
}  // namespace vattn
