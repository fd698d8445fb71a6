// Drivers that break their own contract: one hands a page out twice, so that counts do not add up, which is an Error that
// closes the object; one throws what is no std::exception. Nothing ends the process.
#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <string>

#include "vattn/driver/decorators/decorator.hpp"
#include "vattn/driver/null/null_driver.hpp"
#include "vattn/kv/kv_cache.hpp"
#include "vattn/tensor/growable_tensor.hpp"

namespace vattn {
namespace {

constexpr std::int64_t kPage = 4096;
constexpr Device kMeta{Device::Kind::kMeta, 0};

/// Every page it makes is the first one.
class OnePageForAll final : public Decorator {
 public:
  OnePageForAll() : Decorator(open_null_driver()) {}
  [[nodiscard]] PageHandle create(std::size_t size, Address near) override {
    if (page_ == 0) page_ = Decorator::create(size, near);
    return page_;
  }

 private:
  PageHandle page_ = 0;
};

/// Throws an int from its n-th call on.
class ThrowsAnInt final : public Decorator {
 public:
  explicit ThrowsAnInt(int first) : Decorator(open_null_driver()), left_(first) {}

 protected:
  void before(Verb /*verb*/) override {
    if (--left_ <= 0) throw 42;
  }

 private:
  std::atomic<int> left_;
};

CacheConfig small_config() {
  return {.num_layers = 1,
          .num_kv_heads = 1,
          .head_dim = kPage / 16,  // 16 tokens a page, K and V
          .max_batch_size = 2,
          .max_seq_len = 64,
          .dtype = DType::kUInt8,
          .page_size = kPage,
          .memory_limit = 32 * kPage,
          .lookahead_tokens = 0};
}

std::string broken(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(BrokenDriver, ACacheWhoseCountsDoNotAddUpSaysSoAndIsClosed) {
  KVCache cache(small_config(), kMeta, std::make_shared<OnePageForAll>());
  cache.alloc();
  cache.step({{0, 32}});
  cache.free(0);
  const std::string message = broken([&] { cache.set_memory_limit(2 * kPage); });
  EXPECT_EQ(message.rfind("broken count: ", 0), 0U) << message;
  EXPECT_NE(message.find("the cache is closed"), std::string::npos) << message;
  EXPECT_TRUE(cache.is_closed());
  EXPECT_THROW(cache.alloc(), ClosedError);
  EXPECT_NO_THROW(cache.close()) << "again";
}

TEST(BrokenDriver, ATensorWhoseCountsDoNotAddUpSaysSoAndIsClosed) {
  const GrowableTensor::Config config{
      .row_shape = {kPage}, .max_rows = 8, .dtype = DType::kUInt8, .page_size = kPage, .memory_limit = 8 * kPage};
  GrowableTensor tensor(config, kMeta, std::make_shared<OnePageForAll>());
  tensor.resize(2);
  const std::string message = broken([&] { tensor.resize(0); });
  EXPECT_EQ(message.rfind("broken count: 2 pages exist", 0), 0U) << message;
  EXPECT_TRUE(tensor.is_closed());
  EXPECT_THROW(tensor.resize(1), ClosedError);
}

TEST(BrokenDriver, WhatIsNoExceptionEndsNeitherTheProcessNorTheMapper) {
  int thrown = 0;
  for (int first = 1; first < 60; ++first) {
    try {
      CacheConfig config = small_config();
      config.scrub = true;
      config.lookahead_tokens = 16;
      KVCache cache(config, kMeta, std::make_shared<ThrowsAnInt>(first));
      cache.alloc();
      cache.step({{0, 32}});
      cache.settle();
      cache.truncate(0, 1);
      cache.free(0);
      cache.alloc();
      cache.step({{0, 48}});
      cache.set_memory_limit(4 * kPage);
      cache.close();
    } catch (const int value) {
      EXPECT_EQ(value, 42);
      ++thrown;
    } catch (const Error&) {  // close() says what it could not give back
      ++thrown;
    }
  }
  EXPECT_GT(thrown, 10);
}

}  // namespace
}  // namespace vattn
