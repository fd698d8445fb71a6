// A test of the CUDA driver: on a fresh fake, or on the GPU as it is, with nothing left when it ends.
// Thread: the test's own.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "cuda/cuda_driver.hpp"
#include "cuda_under_test.hpp"

namespace vattn {

class CudaDriverTest : public testing::Test {
 protected:
  void SetUp() override {
    if (cuda::on_fake()) {
      fake_cuda_reset();
    } else if (const std::string reason = probe_cuda().reason; !reason.empty()) {
      GTEST_SKIP() << reason;
    }
  }
  void TearDown() override {
    if (!cuda::on_fake()) return;
    EXPECT_EQ(cuda::alive_on_fake(), cuda::nothing_alive()) << "something is left";
    EXPECT_EQ(fake_cuda_violations(), expected_violations_) << cuda::last_violation();
  }

  std::uint64_t expected_violations_ = 0;
};

#define FAKE_ONLY() \
  if (!cuda::on_fake()) GTEST_SKIP() << "looks inside the fake library"

/// One accessible page, given back at the end.
struct OnePage {
  explicit OnePage(Driver& owner)
      : driver(owner), size(owner.traits().default_page_size), base(owner.reserve(size, UnmappedReads::kFault)) {
    page = driver.create(size, base);
    driver.map(base, size, page);
    driver.set_access(base, size);
  }
  OnePage(const OnePage&) = delete;
  OnePage& operator=(const OnePage&) = delete;
  ~OnePage() {
    driver.unmap(base, size);
    driver.release(page);
    driver.release_range(base, size);
  }
  Driver& driver;
  std::size_t size;
  Address base;
  PageHandle page = 0;
};

inline std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

}  // namespace vattn
