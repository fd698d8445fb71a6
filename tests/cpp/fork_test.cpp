// Everything a parent made, in a forked child that uses it, drops it and ends as programs do, with exit(): it is closed there,
// and the parent's memory is untouched.
#include "vattn/fork.hpp"

#include <sys/wait.h>
#include <unistd.h>

#include "child_process.hpp"
#include "drivers_under_test.hpp"
#include "vattn/kv/kv_cache.hpp"
#include "vattn/tensor/growable_tensor.hpp"

namespace vattn {
namespace {

class Fork : public testing::TestWithParam<DriverUnderTest> {
 protected:
  /// What `body` says, in a child. It ends at once: the watchdog of these tests has a thread that no child has.
  static void expect_in_child(const std::function<bool()>& body) {
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) leave(body());
    int status = -1;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  }
  static bool closed(const std::function<void()>& call) {
    try {
      call();
    } catch (const ClosedError& error) {
      return std::string(error.what()).find("forked") != std::string::npos;
    } catch (...) {
    }
    return false;
  }
};

TEST_P(Fork, WhatAParentMadeIsClosedInItsChild) {
  const auto driver = std::make_shared<CountingDriver>(GetParam().open());
  const auto page = static_cast<std::int64_t>(driver->traits().default_page_size);
  CacheConfig config{.num_layers = 1,
                     .num_kv_heads = 1,
                     .head_dim = page / 16,
                     .max_batch_size = 2,
                     .max_seq_len = 64,
                     .dtype = DType::kUInt8};
  auto pool = PagePool::make(Device{}, driver, static_cast<std::size_t>(page), static_cast<std::uint64_t>(64 * page));
  auto cache = std::make_unique<KVCache>(config, pool);
  auto tensor = std::make_unique<GrowableTensor>(GrowableTensor::Config{.row_shape = {4}, .max_rows = 8, .memory_limit = page},
                                                 Device{}, driver);
  cache->alloc();
  cache->step({{0, 5}});
  cache->settle();
  tensor->resize(3);
  auto view = std::make_unique<TensorView<3>>(cache->view(0, 0).k);
  const Address first = view->address;
  const unsigned char byte = 42;
  if (driver->traits().has_memory) GetParam().write(first, &byte, 1);
  const std::uint64_t generation = process_generation();

  expect_in_child([&] {
    bool good = process_generation() == generation + 1;
    good = good && cache->is_closed() && tensor->is_closed() && pool->is_closed();
    good = good && closed([&] { cache->step({{0, 6}}); });
    good = good && closed([&] { cache->close(); });
    good = good && closed([&] { tensor->resize(1); });
    good = good && closed([&] { tensor->close(); });
    good = good && closed([&] { static_cast<void>(pool->stats()); });
    good = good && closed([&] { pool->close(); });
    good = good && closed([&] { const KVCache another(config, pool); });
    good = good && !cache->try_step(std::vector<std::int64_t>{6, 0});
    const CountingDriver::Alive before = driver->alive();
    view.reset();
    cache.reset();
    tensor.reset();
    pool.reset();
    good = good && driver->alive() == before;  // nothing was given back that is the parent's
    auto fresh = KVCache(config, {Device::Kind::kMeta, 0});
    return good && fresh.alloc() == 0;  // and a child may make its own
  });

  EXPECT_EQ(process_generation(), generation);
  cache->step({{0, 64}});
  if (driver->traits().has_memory) {
    unsigned char found = 0;
    GetParam().read(&found, first, 1);
    EXPECT_EQ(found, byte);
  }
  view.reset();
  cache.reset();
  tensor.reset();
  pool.reset();
  EXPECT_EQ(driver->alive(), CountingDriver::Alive{});
}

TEST_P(Fork, ADriversVerbsAreClosedInAChild) {
  if (GetParam().name == "null") GTEST_SKIP() << "numbers survive a fork";
  auto driver = GetParam().open();
  const std::size_t page = driver->traits().default_page_size;
  const Address base = driver->reserve(page, UnmappedReads::kFault);
  expect_in_child([&] {
    bool good = closed([&] { static_cast<void>(driver->memory_info()); });
    good = good && closed([&] { static_cast<void>(driver->create(page, base)); });
    good = good && closed([&] { driver->release_range(base, page); });
    good = good && closed([&] { driver->synchronize(); });
    good = good && driver->home(base) == 0;
    driver.reset();
    return good;
  });
  driver->release_range(base, page);
}

INSTANTIATE_TEST_SUITE_P(Every, Fork, testing::ValuesIn(every_driver()), name_of_driver);

}  // namespace
}  // namespace vattn
