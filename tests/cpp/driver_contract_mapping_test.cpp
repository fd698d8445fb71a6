// The driver contract: what may be mapped, made accessible and unmapped, and what happens to the bytes. See
// driver_contract.hpp.
#include <array>
#include <limits>

#include "driver_contract.hpp"

namespace vattn {
namespace {

constexpr auto kMost = std::numeric_limits<std::size_t>::max();

TEST_P(DriverContract, ContentsSurviveUnmapAndRemap) {
  const Address base = reserve(4);
  const PageHandle page = place(base);
  write(base, 0xA5, page_);
  unmap(base, page_);
  open_page(base + 2 * page_, page);
  expect_bytes(base + 2 * page_, 0xA5, page_);
  unmap(base + 2 * page_, page_);
  open_page(base, page);
  expect_bytes(base, 0xA5, page_);
}

TEST_P(DriverContract, OnePageAtTwoAddressesHoldsTheSameBytes) {
  const Address base = reserve(4);
  const Address other = reserve(1);
  const PageHandle page = place(base);
  open_page(base + 2 * page_, page);
  open_page(other, page);
  write(base + 2 * page_, 0x11, page_);
  expect_bytes(base, 0x11, page_);
  write(other, 0x22, page_ / 2);
  expect_bytes(base, 0x22, page_ / 2);
  unmap(base, page_);
  expect_bytes(base + 2 * page_, 0x22, page_ / 2);
}

TEST_P(DriverContract, MapRefusesAddressesThatAreMapped) {
  const Address base = reserve(4);
  const PageHandle first = place(base + page_);
  const PageHandle second = create();
  const PageHandle large = create(2 * page_);
  write(base + page_, 0x33, page_);
  expect_refused("onto another page", [&] { driver_->map(base + page_, page_, second); });
  expect_refused("onto itself", [&] { driver_->map(base + page_, page_, first); });
  expect_refused("over its end", [&] { driver_->map(base, 2 * page_, large); });
  expect_refused("over its start", [&] { driver_->map(base + page_, 2 * page_, large); });
  expect_bytes(base + page_, 0x33, page_);
  open_page(base, second);  // the second page is still fit for use
}

TEST_P(DriverContract, MapRefusesAddressesThatAreNotReserved) {
  const Address base = reserve(2);
  const PageHandle page = create();
  const PageHandle large = create(4 * page_);
  expect_refused("the null address", [&] { driver_->map(0, page_, page); });
  expect_refused("the last address", [&] { driver_->map(kMost / granularity_ * granularity_, page_, page); });
  expect_refused("off the granularity", [&] { driver_->map(base + 1, page_, page); });
  expect_refused("behind the end", [&] { driver_->map(base + 2 * page_, page_, page); });
  expect_refused("beyond the end", [&] { driver_->map(base, 4 * page_, large); });
  place(base + page_);
}

TEST_P(DriverContract, MapTakesWholePages) {
  const Address base = reserve(4);
  const PageHandle page = create(2 * page_);
  expect_refused("half of it", [&] { driver_->map(base, page_, page); });
  expect_refused("more than it", [&] { driver_->map(base, 3 * page_, page); });
  expect_refused("nothing of it", [&] { driver_->map(base, 0, page); });
  expect_refused("page 0", [&] { driver_->map(base, page_, 0); });
  expect_refused("no page", [&] { driver_->map(base, page_, std::numeric_limits<PageHandle>::max()); });
  release(page);
  expect_refused("a page that is gone", [&] { driver_->map(base, 2 * page_, page); });
}

TEST_P(DriverContract, UnmapTakesSeveralNeighboursAtOnce) {
  const Address base = reserve(6);
  for (std::size_t i = 0; i < 5; ++i) {
    place(base + i * page_);
    write(base + i * page_, static_cast<unsigned char>(i + 1), page_);
  }
  unmap(base + page_, 3 * page_);
  expect_bytes(base, 1, page_);
  expect_bytes(base + 4 * page_, 5, page_);
  for (std::size_t i = 1; i < 4; ++i) place(base + i * page_);  // and all three places are free
}

TEST_P(DriverContract, UnmapTakesWholeMappings) {
  const Address base = reserve(6);
  const PageHandle large = create(2 * page_);
  map(base, large, 2 * page_);
  driver_->set_access(base, 2 * page_);
  write(base, 0x44, 2 * page_);
  place(base + 3 * page_);
  expect_refused("its first half", [&] { driver_->unmap(base, page_); });
  expect_refused("its second half", [&] { driver_->unmap(base + page_, page_); });
  expect_refused("it and a gap", [&] { driver_->unmap(base, 3 * page_); });
  expect_refused("across a gap", [&] { driver_->unmap(base, 4 * page_); });
  expect_refused("a gap and a mapping", [&] { driver_->unmap(base + 2 * page_, 2 * page_); });
  expect_refused("a gap", [&] { driver_->unmap(base + 4 * page_, page_); });
  expect_refused("nothing", [&] { driver_->unmap(base, 0); });
  expect_refused("beyond the end", [&] { driver_->unmap(base + 3 * page_, 8 * page_); });
  expect_refused("the null address", [&] { driver_->unmap(0, page_); });
  expect_refused("more than there is", [&] { driver_->unmap(base, kMost); });
  expect_bytes(base, 0x44, 2 * page_);
}

TEST_P(DriverContract, AReleasedPageLivesUntilItIsUnmapped) {
  const Address base = reserve(3);
  const PageHandle page = place(base);
  open_page(base + page_, page);
  write(base, 0x55, page_);
  release(page);
  expect_bytes(base + page_, 0x55, page_);
  expect_refused("mapping it again", [&] { driver_->map(base + 2 * page_, page_, page); });
  expect_refused("releasing it again", [&] { driver_->release(page); });
  unmap(base, page_);
  expect_bytes(base + page_, 0x55, page_);
  unmap(base + page_, page_);
  expect_refused("after its last mapping", [&] { driver_->map(base, page_, page); });
}

TEST_P(DriverContract, SetAccessCoversSeveralMappings) {
  const Address base = reserve(4);
  for (std::size_t i = 0; i < 3; ++i) map(base + i * page_, create());
  driver_->set_access(base, 3 * page_);
  write(base, 0x66, 3 * page_);
  expect_bytes(base, 0x66, 3 * page_);
  driver_->set_access(base + page_, page_);  // again, which changes nothing
  expect_bytes(base, 0x66, 3 * page_);
}

TEST_P(DriverContract, SetAccessRefusesWhatIsNotFullyMapped) {
  const Address base = reserve(4);
  place(base);
  place(base + 2 * page_);
  expect_refused("a gap", [&] { driver_->set_access(base + page_, page_); });
  expect_refused("across a gap", [&] { driver_->set_access(base, 3 * page_); });
  expect_refused("beyond the end", [&] { driver_->set_access(base + 2 * page_, 4 * page_); });
  expect_refused("nothing", [&] { driver_->set_access(base, 0); });
  expect_refused("the null address", [&] { driver_->set_access(0, page_); });
}

TEST_P(DriverContract, PagesMoveFreelyBetweenAddresses) {
  constexpr std::size_t kPages = 16;
  const Address base = reserve(2 * kPages);
  std::array<PageHandle, kPages> pages{};
  for (std::size_t i = kPages; i-- > 0;) {  // backwards, so that no driver can count on neighbours
    pages[i] = place(base + i * page_);
    write(base + i * page_, static_cast<unsigned char>(i + 1), page_);
  }
  for (std::size_t i = 0; i < kPages; i += 2) unmap(base + i * page_, page_);
  for (std::size_t i = 0; i < kPages; i += 2) open_page(base + (2 * kPages - 1 - i) * page_, pages[i]);
  for (std::size_t i = 0; i < kPages; ++i) {
    const std::size_t place = i % 2 == 0 ? 2 * kPages - 1 - i : i;
    expect_bytes(base + place * page_, static_cast<unsigned char>(i + 1), page_);
  }
}

}  // namespace
}  // namespace vattn
