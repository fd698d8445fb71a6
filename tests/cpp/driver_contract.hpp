// The contract of driver.hpp as one suite of tests, which every driver passes.
//
// A driver instantiates it in a few lines: how it is opened, how a test reads and writes its bytes, how to see what is alive.
//
//   INSTANTIATE_TEST_SUITE_P(Null, DriverContract, testing::Values(DriverUnderTest{.name = "null", .open = open_null_driver}),
//                            name_of_driver);
//
// The tests are in driver_contract_*test.cpp. What only one driver does is tested beside its instantiation.
// Thread: the tests make threads of their own; a DriverUnderTest's functions are called on the main one.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "vattn/driver/driver.hpp"

namespace vattn {

/// One driver, as the suite sees it. Only `name` and `open` are needed; a driver without memory has no `read` and `write`.
struct DriverUnderTest {
  std::string name;
  std::function<std::shared_ptr<Driver>()> open;
  std::function<void(Address to, const void* from, std::size_t size)> write{};
  std::function<void(void* to, Address from, std::size_t size)> read{};
  /// Why the driver cannot be tested here; empty where it can.
  std::function<std::string()> unavailable{};
  /// Counts of what is alive, for a driver that has a way to tell: equal before and after a refused call.
  std::function<std::vector<std::uint64_t>()> alive{};
  /// Whether a size past all memory may be refused as no size at all, which a GPU's driver may do before it looks at its
  /// memory.
  std::function<bool()> may_call_huge_sizes_invalid{};
  /// Called when the driver is gone and nothing of it should be left.
  std::function<void()> check_gone{};
};

inline std::string name_of_driver(const testing::TestParamInfo<DriverUnderTest>& info) { return info.param.name; }
inline void PrintTo(const DriverUnderTest& driver, std::ostream* out) { *out << driver.name; }

/// Bytes of the process itself: what a driver of host memory reads and writes with.
void write_host(Address to, const void* from, std::size_t size);
void read_host(void* to, Address from, std::size_t size);

/// A driver, with a note of what a test still holds of it, so that everything is given back however the test ends.
class DriverContract : public testing::TestWithParam<DriverUnderTest> {
 protected:
  void SetUp() override;
  void TearDown() override;

  // The driver's verbs, noting what they made. `page` sizes default to one default page.
  Address reserve(std::size_t pages);
  PageHandle create(std::size_t size = 0);
  void map(Address at, PageHandle page, std::size_t size = 0);
  /// Maps and sets access.
  void open_page(Address at, PageHandle page);
  /// A new page at `at`, accessible.
  PageHandle place(Address at);
  void unmap(Address at, std::size_t size);
  void release(PageHandle page);
  void release_range(Address base);

  // Bytes. All of them do nothing, and succeed, for a driver without memory.
  [[nodiscard]] bool has_memory() const { return driver_->traits().has_memory; }
  void write(Address to, unsigned char byte, std::size_t size);
  void expect_bytes(Address from, unsigned char byte, std::size_t size);

  /// The call throws std::invalid_argument, DriverError or OutOfMemoryError, with a message, and nothing is alive that was not.
  void expect_refused(const std::string& what, const std::function<void()>& call);

  std::shared_ptr<Driver> driver_;
  std::size_t page_ = 0;  ///< the default page size
  std::size_t granularity_ = 0;

 private:
  std::map<Address, std::size_t> ranges_;
  std::map<Address, std::size_t> mapped_;
  std::set<PageHandle> pages_;
};

}  // namespace vattn
