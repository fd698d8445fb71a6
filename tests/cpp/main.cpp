// The tests' own main: on a GPU it holds one reference to the primary context for as long as they run.
//
// A driver that is the context's only holder destroys it when it closes, and the next one makes it anew: most of a second on a
// GPU, for each of a hundred tests. On the fake nothing is held: its contexts cost nothing, each test begins with a fresh fake,
// and what a driver leaves of them is what tests look at. Thread: the main one.
#include <gtest/gtest.h>

#include <exception>
#include <iostream>
#include <optional>

#include "cuda_under_test.hpp"

namespace vattn::cuda {
namespace {

/// A reference to the primary context of device 0, current nowhere.
class HeldContext {
 public:
  HeldContext() {
    InContext::require(table().cuInit(0), "cuInit");
    CUcontext context = nullptr;
    InContext::require(table().cuDevicePrimaryCtxRetain(&context, 0), "cuDevicePrimaryCtxRetain");
  }
  HeldContext(const HeldContext&) = delete;
  HeldContext& operator=(const HeldContext&) = delete;
  ~HeldContext() { table().cuDevicePrimaryCtxRelease(0); }
};

}  // namespace
}  // namespace vattn::cuda

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  std::optional<vattn::cuda::HeldContext> held;
  try {
    if (!vattn::cuda::on_fake() && !GTEST_FLAG_GET(list_tests)) held.emplace();
  } catch (const std::exception& error) {
    std::cerr << "no context is held for the tests: " << error.what() << '\n';  // those that need a GPU say so themselves
  }
  return RUN_ALL_TESTS();
}
