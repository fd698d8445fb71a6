#include "vattn/tensor/growable_tensor.hpp"

#include <algorithm>
#include <limits>
#include <string>

#include "vattn/checked.hpp"
#include "vattn/driver/limits.hpp"
#include "vattn/memory/transaction.hpp"

namespace vattn {

GrowableTensor::GrowableTensor(const Config& config, Device device) : GrowableTensor(config, device, open_driver(device)) {}

GrowableTensor::GrowableTensor(const Config& config, Device device, std::shared_ptr<Driver> driver)
    : config_(config), device_(device), driver_(std::move(driver)) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
  const DriverTraits& traits = driver_->traits();
  check_between("max_rows", config.max_rows, 1, kMost);
  row_bytes_ = static_cast<std::int64_t>(size_of(config.dtype));
  for (const std::int64_t extent : config.row_shape) {
    check_between("row_shape", extent, 1, kMost);
    row_bytes_ = checked_mul(row_bytes_, extent, "row_shape x dtype");
  }
  page_size_ = choose_page_size(config.page_size, traits);
  const std::int64_t bytes = checked_mul(row_bytes_, config.max_rows, "row_shape x max_rows");
  const std::int64_t reserved = checked_mul(ceil_div(bytes, page_size_), page_size_, "row_shape x max_rows");
  check_address_space("row_shape x max_rows", reserved, traits);
  if (config.memory_limit) check_memory_limit(*config.memory_limit);
  const std::uint64_t limit =
      config.memory_limit ? static_cast<std::uint64_t>(*config.memory_limit) : default_memory_limit(*driver_);
  pool_ = std::make_shared<PagePool>(driver_, static_cast<std::size_t>(page_size_), limit);
  const UnmappedReads reads = traits.reads_as_zeros ? UnmappedReads::kZeros : UnmappedReads::kFault;
  buffer_ = std::make_shared<Buffer>(pool_, 1, static_cast<std::size_t>(reserved), reads);
}

GrowableTensor::~GrowableTensor() {
  if (!generation_.is_current() || closed_) return;
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

std::size_t GrowableTensor::pages_for(std::int64_t rows) const noexcept {
  return static_cast<std::size_t>(ceil_div(rows * row_bytes_, page_size_));
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
  resize_locked(old + count);
  try {
    driver_->synchronize();  // the rows may come from work that still runs, and a copy does not wait for it
    driver_->copy(buffer_->base() + static_cast<Address>(old * row_bytes_), rows, static_cast<std::size_t>(count * row_bytes_));
  } catch (...) {
    resize_locked(old);
    throw;
  }
}

void GrowableTensor::resize_locked(std::int64_t rows) {
  if (rows < 0 || rows > config_.max_rows) {
    throw std::invalid_argument("n=" + std::to_string(rows) +
                                " rows must be between 0 and max_rows=" + std::to_string(config_.max_rows));
  }
  Row& row = buffer_->row(0);
  const std::size_t pages = pages_for(rows);
  if (pages > row.accessible_pages()) {
    Transaction growth(*pool_, false);
    growth.extend(row, pages);
    pool_->check_room("resize", growth.missing_pages(), "ask for fewer rows, or raise memory_limit");
    growth.commit();
  } else if (rows < rows_ && pages < row.mapped_pages()) {
    driver_->synchronize();
    static_cast<void>(row.shrink(*pool_, pages));
    PagePool::Losses losses;
    pool_->trim_to_limit(losses);
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
  return pool_->usage().mapped_pages * pool_->page_size();
}

std::uint64_t GrowableTensor::memory_limit() const {
  const auto held = lock();
  return pool_->usage().limit_bytes;
}

void GrowableTensor::set_memory_limit(std::int64_t bytes) {
  const auto held = lock();
  check_memory_limit(bytes);
  pool_->set_limit(static_cast<std::uint64_t>(bytes));
  PagePool::Losses losses;
  pool_->trim_to_limit(losses);
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
  if (losses.any()) throw Error("close: closed, but the driver would not take everything back (first: " + losses.reason + ")");
}

void GrowableTensor::close_locked(PagePool::Losses& losses) noexcept {
  closed_ = true;
  try_synchronize(*driver_);
  if (buffer_.use_count() == 1) buffer_->release(losses);
  buffer_.reset();
  pool_->close(losses);
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
