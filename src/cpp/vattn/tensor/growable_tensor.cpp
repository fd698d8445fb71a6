#include "vattn/tensor/growable_tensor.hpp"

#include <algorithm>
#include <limits>
#include <string>

#include "vattn/checked.hpp"
#include "vattn/driver/limits.hpp"
#include "vattn/memory/growth.hpp"

namespace vattn {

GrowableTensor::GrowableTensor(const Config& config, Device device) : GrowableTensor(config, device, open_driver(device)) {}

GrowableTensor::GrowableTensor(const Config& config, Device device, std::shared_ptr<Driver> driver)
    : config_(config), device_(device), driver_(std::move(driver)) {
  page_size_ = choose_page_size(config.page_size, driver_->traits());
  const std::size_t bytes = measure();
  if (config.memory_limit) check_memory_limit(*config.memory_limit);
  const std::uint64_t limit =
      config.memory_limit ? static_cast<std::uint64_t>(*config.memory_limit) : default_memory_limit(*driver_);
  pool_ = PagePool::make(device, driver_, static_cast<std::size_t>(page_size_), limit);
  reserve(bytes);
}

GrowableTensor::GrowableTensor(const Config& config, std::shared_ptr<PagePool> pool) : config_(config), shares_pool_(true) {
  if (pool == nullptr) throw std::invalid_argument("pool must not be null");
  pool->check_open();
  if (config.page_size || config.memory_limit) {
    throw std::invalid_argument(std::string(config.page_size ? "page_size" : "memory_limit") +
                                " must not be given with pool: the pool's holds for all its members");
  }
  pool_ = std::move(pool);
  device_ = pool_->device();
  driver_ = pool_->driver();
  page_size_ = static_cast<std::int64_t>(pool_->page_size());
  reserve(measure());
}

std::size_t GrowableTensor::measure() {
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
  check_between("max_rows", config_.max_rows, 1, kMost);
  row_bytes_ = static_cast<std::int64_t>(size_of(config_.dtype));
  for (const std::int64_t extent : config_.row_shape) {
    check_between("row_shape", extent, 1, kMost);
    row_bytes_ = checked_mul(row_bytes_, extent, "row_shape x dtype");
  }
  const std::int64_t bytes = checked_mul(row_bytes_, config_.max_rows, "row_shape x max_rows");
  const std::int64_t reserved = checked_mul(ceil_div(bytes, page_size_), page_size_, "row_shape x max_rows");
  check_address_space("row_shape x max_rows", reserved, driver_->traits());
  return static_cast<std::size_t>(reserved);
}

void GrowableTensor::reserve(std::size_t bytes) {
  const UnmappedReads reads = driver_->traits().reads_as_zeros ? UnmappedReads::kZeros : UnmappedReads::kFault;
  buffer_ = std::make_shared<Buffer>(pool_, 1, bytes, reads);
  holder_ = std::make_unique<Holder>("GrowableTensor", driver_, std::vector<Holder::Table>{{buffer_->rows(), 0}}, 1, 1);
  pool_->join(*holder_);
  pool_->take_group(*holder_, 0);
}

GrowableTensor::~GrowableTensor() {
  if (!generation_.is_current()) {
    // Its condition variable may have waiters that do not exist in this child.
    [[maybe_unused]] const Holder* const left_alone = holder_.release();
    return;
  }
  if (closed_) return;
  PagePool::Losses losses;
  close_locked(losses);
}

std::unique_lock<std::mutex> GrowableTensor::lock() const {
  generation_.check("this GrowableTensor");
  std::unique_lock held(mutex_);
  if (closed_) throw ClosedError("this GrowableTensor is closed: make a new one");
  return held;
}

void GrowableTensor::check_memory_limit(std::int64_t bytes) const {
  if (bytes >= page_size_) return;
  throw std::invalid_argument("memory_limit=" + std::to_string(bytes) + " must be at least one page, " +
                              std::to_string(page_size_) + " bytes: raise it, or use a smaller page_size");
}

std::uint32_t GrowableTensor::pages_for(std::int64_t rows) const noexcept {
  return static_cast<std::uint32_t>(std::min<std::int64_t>(ceil_div(rows * row_bytes_, page_size_), UINT32_MAX));
}

void GrowableTensor::resize(std::int64_t rows) {
  const auto held = lock();
  resize_locked(rows);
}

void GrowableTensor::append(Address rows, std::int64_t count) {
  const auto held = lock();
  if (count < 0 || count > config_.max_rows - rows_) {
    throw std::invalid_argument("count=" + std::to_string(count) + " more than the " + std::to_string(rows_) +
                                " rows there are must stay within max_rows=" + std::to_string(config_.max_rows));
  }
  if (count == 0) return;
  if (rows == 0) throw std::invalid_argument("rows must not be null");
  const std::int64_t old = rows_;
  const std::uint64_t created = pool_->usage(*holder_).pages_created;
  resize_locked(old + count);
  try {
    driver_->synchronize();  // the rows may come from work that still runs, and a copy does not wait for it
    driver_->copy(buffer_->base() + static_cast<Address>(old * row_bytes_), rows, static_cast<std::size_t>(count * row_bytes_));
  } catch (...) {
    rows_ = old;  // whatever the device says to what follows
    const std::uint32_t pages = pages_for(old);
    if (pages < pages_for(old + count)) {
      try_synchronize(*driver_);
      pool_->retire(*holder_, 0, {{pages, 0}, {}, true}, {});
      // What was made for this goes, as when a growth fails; what the driver would not unmap stays, and is counted.
      const std::uint64_t made = pool_->usage(*holder_).pages_created - created;
      if (pool_->give_up_excess(*holder_, 0)) pool_->release_pooled(made);
    }
    throw;
  }
}

void GrowableTensor::resize_locked(std::int64_t rows) {
  if (rows < 0 || rows > config_.max_rows) {
    throw std::invalid_argument("n=" + std::to_string(rows) +
                                " rows must be between 0 and max_rows=" + std::to_string(config_.max_rows));
  }
  const std::uint32_t pages = pages_for(rows);
  const std::uint32_t before = pages_for(rows_);
  if (pages > before) {
    Growth growth(*pool_, *holder_, false);
    growth.extend(0, {pages, 0});
    growth.commit("resize", "ask for fewer rows, or raise memory_limit");
    const auto page_size = static_cast<std::size_t>(page_size_);
    driver_->will_write(buffer_->base() + before * page_size, (pages - before) * page_size);
  } else if (pages < before) {
    driver_->synchronize();
    pool_->retire(*holder_, 0, {{pages, 0}, {}, true}, {});
    pool_->give_up_excess(*holder_, 0);  // what the driver would not unmap stays mapped, and is counted
  }
  rows_ = rows;
  check_counts();
}

std::int64_t GrowableTensor::rows() const {
  const auto held = lock();
  return rows_;
}

GrowableTensor::View GrowableTensor::view() const {
  const auto held = lock();
  View view{buffer_->base(), {rows_}, {}, config_.dtype, driver_->traits().tensor_device, driver_->traits().tensor_device_index,
            buffer_};
  view.shape.insert(view.shape.end(), config_.row_shape.begin(), config_.row_shape.end());
  view.strides.assign(view.shape.size(), 1);
  for (std::size_t i = view.shape.size() - 1; i-- > 0;) view.strides[i] = view.strides[i + 1] * view.shape[i + 1];
  return view;
}

std::uint64_t GrowableTensor::mapped_bytes() const {
  const auto held = lock();
  return pool_->usage(*holder_).mapped_pages * pool_->page_size();
}

std::uint64_t GrowableTensor::memory_limit() const {
  const auto held = lock();
  return pool_->memory_limit();
}

void GrowableTensor::set_memory_limit(std::int64_t bytes) {
  const auto held = lock();
  if (shares_pool_) {
    throw std::invalid_argument("memory_limit=" + std::to_string(bytes) +
                                ": this tensor shares the budget of its pool: set the memory_limit of the pool");
  }
  check_memory_limit(bytes);
  pool_->set_memory_limit(bytes);
  check_counts();
}

bool GrowableTensor::is_closed() const noexcept {
  if (!generation_.is_current()) return true;
  const std::lock_guard held(mutex_);
  return closed_;
}

void GrowableTensor::close() {
  generation_.check("this GrowableTensor");
  const std::lock_guard held(mutex_);
  if (closed_) return;
  PagePool::Losses losses;
  close_locked(losses);
  if (!losses.any()) return;
  throw Error("close: closed, but the driver would not take back " + std::to_string(losses.mappings) + " mappings, " +
              std::to_string(losses.pages) + " pages and " + std::to_string(losses.ranges) +
              " address ranges (first: " + losses.reason + "). What is left goes when the process ends");
}

void GrowableTensor::close_locked(PagePool::Losses& losses) noexcept {
  closed_ = true;
  pool_->leave(*holder_);
  try_synchronize(*driver_);
  if (buffer_.use_count() == 1) buffer_->release(losses);
  buffer_.reset();
  if (!shares_pool_) pool_->shut(losses);
}

void GrowableTensor::check_counts() {
  try {
    pool_->check();
  } catch (const Error&) {
    PagePool::Losses losses;
    close_locked(losses);
    throw;
  }
}

}  // namespace vattn
