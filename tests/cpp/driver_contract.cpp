// The fixture of the driver contract: it notes what a test holds and gives it back. See driver_contract.hpp.
#include "driver_contract.hpp"

#include <algorithm>
#include <cstring>

namespace vattn {

GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(DriverContract);

void write_host(Address to, const void* from, std::size_t size) { std::memcpy(reinterpret_cast<void*>(to), from, size); }
void read_host(void* to, Address from, std::size_t size) { std::memcpy(to, reinterpret_cast<const void*>(from), size); }

void DriverContract::SetUp() {
  const DriverUnderTest& under_test = GetParam();
  if (under_test.unavailable) {
    if (const std::string reason = under_test.unavailable(); !reason.empty()) GTEST_SKIP() << reason;
  }
  driver_ = under_test.open();
  page_ = driver_->traits().default_page_size;
  granularity_ = driver_->traits().granularity;
}

void DriverContract::TearDown() {
  if (driver_ == nullptr) return;
  for (const auto& [at, size] : mapped_) EXPECT_NO_THROW(driver_->unmap(at, size));
  for (const PageHandle page : pages_) EXPECT_NO_THROW(driver_->release(page));
  for (const auto& [base, size] : ranges_) EXPECT_NO_THROW(driver_->release_range(base, size));
  driver_.reset();
  if (GetParam().check_gone) GetParam().check_gone();
}

Address DriverContract::reserve(std::size_t pages) {
  const Address base = driver_->reserve(pages * page_, UnmappedReads::kFault);
  ranges_.emplace(base, pages * page_);
  return base;
}

PageHandle DriverContract::create(std::size_t size) {
  const PageHandle page = driver_->create(size != 0 ? size : page_, 0);
  pages_.insert(page);
  return page;
}

void DriverContract::map(Address at, PageHandle page, std::size_t size) {
  const std::size_t mapped = size != 0 ? size : page_;
  driver_->map(at, mapped, page);
  mapped_.emplace(at, mapped);
}

void DriverContract::open_page(Address at, PageHandle page) {
  map(at, page);
  driver_->set_access(at, page_);
}

PageHandle DriverContract::place(Address at) {
  const PageHandle page = create();
  open_page(at, page);
  return page;
}

void DriverContract::unmap(Address at, std::size_t size) {
  driver_->unmap(at, size);
  mapped_.erase(mapped_.lower_bound(at), mapped_.lower_bound(at + size));
}

void DriverContract::release(PageHandle page) {
  driver_->release(page);
  pages_.erase(page);
}

void DriverContract::release_range(Address base) {
  driver_->release_range(base, ranges_.at(base));
  ranges_.erase(base);
}

void DriverContract::write(Address to, unsigned char byte, std::size_t size) {
  if (!has_memory()) return;
  const std::vector<unsigned char> bytes(size, byte);
  GetParam().write(to, bytes.data(), size);
}

void DriverContract::expect_bytes(Address from, unsigned char byte, std::size_t size) {
  if (!has_memory()) return;
  std::vector<unsigned char> bytes(size);
  GetParam().read(bytes.data(), from, size);
  const auto wrong = std::find_if(bytes.begin(), bytes.end(), [=](unsigned char got) { return got != byte; });
  EXPECT_EQ(wrong, bytes.end()) << "byte " << wrong - bytes.begin() << " of " << size << " is " << int{*wrong} << ", not "
                                << int{byte};
}

void DriverContract::expect_refused(const std::string& what, const std::function<void()>& call) {
  const auto alive = GetParam().alive;
  const auto before = alive ? alive() : std::vector<std::uint64_t>();
  std::string message;
  try {
    call();
    ADD_FAILURE() << what << " was not refused";
  } catch (const std::invalid_argument& error) {
    message = error.what();
  } catch (const DriverError& error) {
    message = error.what();
  } catch (const OutOfMemoryError& error) {
    message = error.what();
  }
  EXPECT_NE(message, "") << what << " was refused without a word";
  EXPECT_EQ(alive ? alive() : std::vector<std::uint64_t>(), before) << what << " was refused and changed something";
}

}  // namespace vattn
