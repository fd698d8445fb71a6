// A test that hangs fails: after two minutes in one test the program says which and ends. Under a debugger, or where a test is
// slowed on purpose, VATTN_TEST_TIMEOUT sets other seconds; 0: none.
#include <gtest/gtest.h>

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>
#include <thread>

namespace {

class Watchdog final : public testing::EmptyTestEventListener {
 public:
  explicit Watchdog(std::chrono::seconds limit) : limit_(limit), thread_([this] { watch(); }) {}
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;
  Watchdog(Watchdog&&) = delete;
  Watchdog& operator=(Watchdog&&) = delete;
  ~Watchdog() override {
    {
      const std::lock_guard lock(mutex_);
      over_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

  void OnTestStart(const testing::TestInfo& test) override {
    const std::lock_guard lock(mutex_);
    name_ = std::string(test.test_suite_name()) + "." + test.name();
    ++test_;
    changed_.notify_all();
  }
  void OnTestEnd(const testing::TestInfo& /*test*/) override {
    const std::lock_guard lock(mutex_);
    name_.clear();
    ++test_;
    changed_.notify_all();
  }

 private:
  void watch() {
    std::unique_lock lock(mutex_);
    while (!over_) {
      const int watched = test_;
      if (changed_.wait_for(lock, limit_, [&] { return over_ || test_ != watched; }) || name_.empty()) continue;
      std::fprintf(stderr, "watchdog: %s has not finished within %ld s\n", name_.c_str(), static_cast<long>(limit_.count()));
      std::fflush(stderr);
      std::_Exit(99);
    }
  }

  std::chrono::seconds limit_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::string name_;
  int test_ = 0;
  bool over_ = false;
  std::thread thread_;
};

class InstallWatchdog final : public testing::Environment {
 public:
  void SetUp() override {
    const char* seconds = std::getenv("VATTN_TEST_TIMEOUT");
    const long limit = seconds == nullptr ? 120 : std::strtol(seconds, nullptr, 10);
    if (limit > 0) testing::UnitTest::GetInstance()->listeners().Append(new Watchdog(std::chrono::seconds(limit)));
  }
};

// Before main(): gtest_main offers no other place. NOLINTNEXTLINE(cert-err58-cpp)
[[maybe_unused]] testing::Environment* const installed = testing::AddGlobalTestEnvironment(new InstallWatchdog);

}  // namespace
