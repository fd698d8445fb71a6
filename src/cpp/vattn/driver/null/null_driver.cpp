#include "vattn/driver/null/null_driver.hpp"

#include <limits>
#include <mutex>

#include "vattn/driver/mapping_table.hpp"

namespace vattn {
namespace {

constexpr std::size_t kGranularity = 4096;
constexpr std::size_t kDefaultPage = std::size_t{2} << 20;
constexpr Address kFirstAddress = Address{1} << 32;
constexpr Address kLastAddress = std::numeric_limits<std::int64_t>::max();

class NullDriver final : public Driver {
 public:
  NullDriver() : table_(kGranularity) {
    traits_.name = "null";
    traits_.granularity = kGranularity;
    traits_.default_page_size = kDefaultPage;
    traits_.tensor_device = TensorDevice::kMeta;
    traits_.fresh_pages_are_zero = true;
  }

  const DriverTraits& traits() const noexcept override { return traits_; }

  MemoryInfo memory_info() override {
    constexpr auto kEndless = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
    return {kEndless, kEndless};
  }

  Address reserve(std::size_t size, UnmappedReads reads) override {
    const std::lock_guard lock(mutex_);
    table_.check_size("reserve", size);
    if (reads == UnmappedReads::kZeros) throw std::invalid_argument("reserve: there is nothing to read on meta, so no zeros");
    // Addresses are handed out once and never again: nobody maps terabytes often enough to reach the end.
    if (size > kLastAddress - next_address_) {
      throw OutOfMemoryError("reserve: meta's addresses are used up", size, kLastAddress - next_address_, kLastAddress);
    }
    const Address base = next_address_;
    table_.note_reserve(base, size, reads, 0);
    next_address_ += size;
    return base;
  }

  void release_range(Address base, std::size_t size) override {
    const std::lock_guard lock(mutex_);
    table_.check_release_range(base, size);
    table_.note_release_range(base);
  }

  PageHandle create(std::size_t size, Address /*near*/) override {
    const std::lock_guard lock(mutex_);
    table_.check_size("create", size);
    table_.note_create(next_page_, size);
    return next_page_++;
  }

  PageHandle home(Address /*at*/) const noexcept override { return 0; }

  void release(PageHandle page) override {
    const std::lock_guard lock(mutex_);
    table_.check_release(page);
    table_.note_release(page);
  }

  void map(Address at, std::size_t size, PageHandle page) override {
    const std::lock_guard lock(mutex_);
    table_.note_map(table_.check_map(at, size, page), at, size, page);
  }

  void unmap(Address at, std::size_t size) override {
    const std::lock_guard lock(mutex_);
    static_cast<void>(table_.check_unmap(at, size));
    table_.note_unmap(at, size, [](PageHandle, std::size_t) {});
  }

  void set_access(Address at, std::size_t size) override {
    const std::lock_guard lock(mutex_);
    table_.check_mapped("set_access", at, size);
  }

  void fill_zero(Address at, std::size_t size) override {
    const std::lock_guard lock(mutex_);
    table_.check_mapped("fill_zero", at, size);
  }

  void copy(Address to, Address from, std::size_t size) override {
    const std::lock_guard lock(mutex_);
    table_.check_mapped("copy", to, size);
    if (table_.touches(from, size)) table_.check_mapped("copy", from, size);
  }

  void synchronize() override {}

 private:
  DriverTraits traits_;
  std::mutex mutex_;
  MappingTable table_;
  Address next_address_ = kFirstAddress;
  PageHandle next_page_ = 1;
};

}  // namespace

std::shared_ptr<Driver> open_null_driver() { return std::make_shared<NullDriver>(); }

}  // namespace vattn
