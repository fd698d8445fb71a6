// The driver contract: ranges, pages, bytes, several drivers and several threads. See driver_contract.hpp. A test is named for
// the behaviour it shows; what it calls a refusal is an exception that changed nothing.
#include "driver_contract.hpp"

#include <array>
#include <limits>
#include <thread>
#include <utility>

namespace vattn {
namespace {

constexpr std::size_t kHuge = std::size_t{1} << 62;
constexpr auto kMost = std::numeric_limits<std::size_t>::max();

TEST_P(DriverContract, TraitsAreConsistent) {
  const DriverTraits& traits = driver_->traits();
  EXPECT_STRNE(traits.name, "");
  EXPECT_GE(traits.granularity, 4096U);
  EXPECT_EQ(traits.granularity & (traits.granularity - 1), 0U);
  EXPECT_EQ(traits.default_page_size % traits.granularity, 0U);
  EXPECT_GT(traits.default_page_size, 0U);
  EXPECT_EQ(&driver_->traits(), &traits) << "the traits belong to the driver";
}

TEST_P(DriverContract, MemoryInfoIsPlausible) {
  const MemoryInfo info = driver_->memory_info();
  EXPECT_GT(info.total_bytes, 0U);
  EXPECT_LE(info.available_bytes, info.total_bytes);
}

TEST_P(DriverContract, ReservationsAreAlignedAndApart) {
  std::vector<Address> bases;
  for (std::size_t pages = 1; pages <= 5; ++pages) bases.push_back(reserve(pages));
  for (std::size_t i = 0; i < bases.size(); ++i) {
    EXPECT_EQ(bases[i] % granularity_, 0U);
    for (std::size_t j = 0; j < i; ++j) {
      const bool apart = bases[i] + (i + 1) * page_ <= bases[j] || bases[j] + (j + 1) * page_ <= bases[i];
      EXPECT_TRUE(apart) << i << " and " << j << " overlap";
    }
  }
}

TEST_P(DriverContract, LargeReservationsCostNoMemory) {
  const std::size_t size = std::size_t{64} << 30;
  const Address base = driver_->reserve(size, UnmappedReads::kFault);
  driver_->release_range(base, size);
}

TEST_P(DriverContract, ReserveRefusesSizesThatAreNotWholePages) {
  for (const std::size_t size : {std::size_t{0}, std::size_t{1}, granularity_ - 1, granularity_ + 1, kMost}) {
    expect_refused("reserve " + std::to_string(size), [&] { (void)driver_->reserve(size, UnmappedReads::kFault); });
  }
}

TEST_P(DriverContract, ReserveRefusesMoreThanThereAreAddresses) {
  for (const std::size_t size : {std::size_t{1} << 63, kMost / granularity_ * granularity_}) {
    expect_refused("reserve " + std::to_string(size), [&] { (void)driver_->reserve(size, UnmappedReads::kFault); });
  }
}

TEST_P(DriverContract, UnmappedMemoryReadsAsZerosOrIsRefused) {
  if (!driver_->traits().reads_as_zeros) {
    EXPECT_THROW((void)driver_->reserve(page_, UnmappedReads::kZeros), std::invalid_argument);
    return;
  }
  const std::size_t size = 4 * page_;
  const Address base = driver_->reserve(size, UnmappedReads::kZeros);
  expect_bytes(base, 0, size);
  const PageHandle page = create();
  driver_->map(base + page_, page_, page);
  driver_->set_access(base + page_, page_);
  write(base + page_, 7, page_);
  expect_bytes(base, 0, page_);
  expect_bytes(base + 2 * page_, 0, 2 * page_);
  driver_->unmap(base + page_, page_);
  expect_bytes(base, 0, size);
  driver_->release_range(base, size);
}

TEST_P(DriverContract, ReleaseRangeTakesExactlyWhatWasReserved) {
  const Address base = reserve(4);
  const std::size_t size = 4 * page_;
  expect_refused("half of it", [&] { driver_->release_range(base, size / 2); });
  expect_refused("more than it", [&] { driver_->release_range(base, size + granularity_); });
  expect_refused("its second half", [&] { driver_->release_range(base + size / 2, size / 2); });
  expect_refused("no bytes", [&] { driver_->release_range(base, 0); });
  expect_refused("the null address", [&] { driver_->release_range(0, size); });
  release_range(base);
  expect_refused("twice", [&] { driver_->release_range(base, size); });
}

TEST_P(DriverContract, ReleaseRangeRefusesWhileSomethingIsMapped) {
  const Address base = reserve(3);
  place(base + page_);
  write(base + page_, 0x5A, page_);
  expect_refused("with a mapping", [&] { driver_->release_range(base, 3 * page_); });
  expect_bytes(base + page_, 0x5A, page_);
}

TEST_P(DriverContract, CreateRefusesSizesThatAreNotWholePages) {
  for (const std::size_t size : {std::size_t{0}, std::size_t{1}, granularity_ - 1, granularity_ + 1, kMost}) {
    expect_refused("create " + std::to_string(size), [&] { (void)driver_->create(size, 0); });
  }
}

TEST_P(DriverContract, CreateOfMoreThanThereIsIsOutOfMemory) {
  if (!has_memory()) GTEST_SKIP() << "accounting has no bound";
  try {
    (void)driver_->create(kHuge, 0);
    ADD_FAILURE() << "2^62 bytes were to be had";
  } catch (const OutOfMemoryError& error) {
    EXPECT_EQ(error.needed_bytes, kHuge);
    EXPECT_LT(error.available_bytes, kHuge);
  } catch (const DriverError& error) {
    const auto& may = GetParam().may_call_huge_sizes_invalid;
    EXPECT_TRUE(may && may() && error.name == "CUDA_ERROR_INVALID_VALUE") << error.what();
  }
  (void)create();  // and the next one works
}

TEST_P(DriverContract, PagesAreDistinctAndNeverZero) {
  std::set<PageHandle> pages;
  for (int i = 0; i < 8; ++i) pages.insert(create());
  EXPECT_EQ(pages.size(), 8U);
  EXPECT_EQ(pages.count(0), 0U);
}

TEST_P(DriverContract, PagesMayHaveAnyWholeSize) {
  const Address base = reserve(4);
  const std::size_t size = page_ + granularity_;
  const PageHandle page = create(size);
  map(base, page, size);
  driver_->set_access(base, size);
  write(base, 3, size);
  expect_bytes(base, 3, size);
}

TEST_P(DriverContract, ReleaseTakesEachHandleOnce) {
  const PageHandle page = create();
  expect_refused("page 0", [&] { driver_->release(0); });
  expect_refused("no page", [&] { driver_->release(std::numeric_limits<PageHandle>::max()); });
  release(page);
  expect_refused("a page that is gone", [&] { driver_->release(page); });
}

TEST_P(DriverContract, FreshPagesAreZeroWherePromised) {
  if (!driver_->traits().fresh_pages_are_zero || !has_memory()) GTEST_SKIP() << "not promised by " << driver_->traits().name;
  const Address base = reserve(1);
  for (int round = 0; round < 3; ++round) {
    const PageHandle page = place(base);
    expect_bytes(base, 0, page_);
    write(base, 0xEE, page_);
    unmap(base, page_);
    release(page);
  }
}

TEST_P(DriverContract, NearIsOnlyAHint) {
  const Address base = reserve(4);
  const PageHandle page = driver_->create(page_, base + page_);
  const PageHandle foreign = driver_->create(page_, 0x1000);
  open_page(base + 3 * page_, page);
  open_page(base + page_, foreign);
  write(base + 3 * page_, 1, page_);
  write(base + page_, 2, page_);
  expect_bytes(base + 3 * page_, 1, page_);
  (void)driver_->home(base);
  (void)driver_->home(0);
  unmap(base + 3 * page_, page_);
  unmap(base + page_, page_);
  driver_->release(page);
  driver_->release(foreign);
}

TEST_P(DriverContract, FillZeroFillsExactlyItsBytes) {
  const Address base = reserve(3);
  for (std::size_t i = 0; i < 3; ++i) place(base + i * page_);
  write(base, 0x77, 3 * page_);
  driver_->fill_zero(base + page_ - 3, page_ + 5);
  expect_bytes(base, 0x77, page_ - 3);
  expect_bytes(base + page_ - 3, 0, page_ + 5);
  expect_bytes(base + 2 * page_ + 2, 0x77, page_ - 2);
}

TEST_P(DriverContract, CopyCopiesExactlyItsBytes) {
  const Address base = reserve(3);
  for (std::size_t i = 0; i < 3; ++i) place(base + i * page_);
  write(base, 0x11, page_);
  write(base + page_, 0x22, 2 * page_);
  driver_->copy(base + page_ + 7, base + 1, page_ - 1);
  expect_bytes(base + page_, 0x22, 7);
  expect_bytes(base + page_ + 7, 0x11, page_ - 1);
  expect_bytes(base + 2 * page_ + 6, 0x22, page_ - 6);
  expect_bytes(base, 0x11, page_);
}

TEST_P(DriverContract, FillAndCopyRefuseWhatIsNotMapped) {
  const Address base = reserve(3);
  place(base);
  write(base, 0x12, page_);
  expect_refused("fill a gap", [&] { driver_->fill_zero(base + page_, 1); });
  expect_refused("fill into a gap", [&] { driver_->fill_zero(base + page_ - 1, 2); });
  expect_refused("fill everything", [&] { driver_->fill_zero(base, kMost); });
  expect_refused("fill the null address", [&] { driver_->fill_zero(0, 1); });
  expect_refused("copy from a gap", [&] { driver_->copy(base, base + page_, 1); });
  expect_refused("copy to a gap", [&] { driver_->copy(base + page_, base, 1); });
  expect_refused("copy everything", [&] { driver_->copy(base, base + 1, kMost); });
  expect_bytes(base, 0x12, page_);
}

TEST_P(DriverContract, SynchronizeReturns) {
  driver_->synchronize();
  place(reserve(1));
  driver_->synchronize();
}

TEST_P(DriverContract, SeveralDriversDoNotKnowOfEachOther) {
  const auto other = GetParam().open();
  const Address base = reserve(1);
  place(base);
  write(base, 0x21, page_);
  const PageHandle page = other->create(page_, 0);
  if (driver_->traits().has_memory) {  // addresses of the null driver are numbers, and two drivers may use the same
    expect_refused("another driver's range", [&] { other->map(base, page_, page); });
    expect_refused("another driver's mapping", [&] { other->unmap(base, page_); });
  }
  const Address range = other->reserve(page_, UnmappedReads::kFault);
  other->map(range, page_, page);
  other->set_access(range, page_);
  other->fill_zero(range, page_);
  other->unmap(range, page_);
  other->release(page);
  other->release_range(range, page_);
  expect_bytes(base, 0x21, page_);
}

TEST_P(DriverContract, AnyThreadMayUseAndDestroyADriver) {
  const Address base = reserve(2);
  const PageHandle page = create();
  std::thread([&] {
    open_page(base, page);
    driver_->fill_zero(base, page_);
    driver_->synchronize();
    (void)driver_->memory_info();
  }).join();
  expect_bytes(base, 0, page_);
  auto other = GetParam().open();
  std::thread([moved = std::move(other)]() mutable { moved.reset(); }).join();
}

TEST_P(DriverContract, ThreadsUseOneDriverAtOnce) {
  constexpr std::size_t kThreads = 4;
  constexpr int kRounds = 25;
  std::array<std::string, kThreads> failures;
  std::vector<std::thread> threads;
  for (std::size_t number = 0; number < kThreads; ++number) {
    threads.emplace_back([&, number] {
      try {
        for (int round = 0; round < kRounds; ++round) {
          const Address base = driver_->reserve(2 * page_, UnmappedReads::kFault);
          const PageHandle page = driver_->create(page_, base + page_);
          driver_->map(base + page_, page_, page);
          driver_->set_access(base + page_, page_);
          driver_->fill_zero(base + page_, page_);
          driver_->copy(base + page_, base + page_ + page_ / 2, page_ / 2);
          driver_->release(page);
          driver_->unmap(base + page_, page_);
          driver_->release_range(base, 2 * page_);
        }
      } catch (const std::exception& error) {
        failures[number] = error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& failure : failures) EXPECT_EQ(failure, "");
}

}  // namespace
}  // namespace vattn
