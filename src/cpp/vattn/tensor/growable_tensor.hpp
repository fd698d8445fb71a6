// GrowableTensor: one tensor whose rows arrive over time, at addresses that never change and without a copy.
//
// Like a vector that never reallocates: max_rows rows of addresses are reserved, pages are mapped behind the rows in use.
// resize is all or nothing; making it smaller gives whole pages back to the pool, once the device has finished. Views stay
// valid as long as they live. Errors and threads: as for KVCache.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "vattn/driver/open.hpp"
#include "vattn/dtype.hpp"
#include "vattn/fork.hpp"
#include "vattn/memory/holder.hpp"
#include "vattn/memory/page_pool.hpp"
#include "vattn/tensor/buffer.hpp"

namespace vattn {

class VATTN_API GrowableTensor {
 public:
  struct Config {
    std::vector<std::int64_t> row_shape{};  ///< of one row; empty: rows are single elements
    std::int64_t max_rows = 0;
    DType dtype = DType::kFloat32;
    std::optional<std::int64_t> page_size{};
    std::optional<std::int64_t> memory_limit{};
  };
  /// The first rows of the tensor: shape (rows, *row_shape), dense.
  struct View {
    Address address = 0;
    std::vector<std::int64_t> shape{};
    std::vector<std::int64_t> strides{};  ///< in elements
    DType dtype = DType::kFloat32;
    TensorDevice device = TensorDevice::kMeta;
    int device_index = 0;
    std::shared_ptr<Buffer> owner{};
  };

  explicit GrowableTensor(const Config& config, Device device = {});
  GrowableTensor(const Config& config, Device device, std::shared_ptr<Driver> driver);
  /// On a budget shared with others; the pool's page size and limit, so none in `config`.
  GrowableTensor(const Config& config, std::shared_ptr<PagePool> pool);
  ~GrowableTensor();
  GrowableTensor(const GrowableTensor&) = delete;
  GrowableTensor& operator=(const GrowableTensor&) = delete;
  GrowableTensor(GrowableTensor&&) = delete;
  GrowableTensor& operator=(GrowableTensor&&) = delete;

  /// Gives the tensor `rows` rows. OutOfMemoryError, std::invalid_argument; nothing changed then.
  void resize(std::int64_t rows);
  /// Copies `count` dense rows on the tensor's device behind the last one. As resize; nothing changed when it throws.
  void append(Address rows, std::int64_t count);
  [[nodiscard]] std::int64_t rows() const;
  [[nodiscard]] View view() const;
  [[nodiscard]] std::uint64_t mapped_bytes() const;
  [[nodiscard]] std::uint64_t memory_limit() const;
  void set_memory_limit(std::int64_t bytes);
  /// Gives everything back but what living views hold.
  void close();
  [[nodiscard]] bool is_closed() const noexcept;

  [[nodiscard]] const Config& config() const noexcept { return config_; }
  [[nodiscard]] Device device() const noexcept { return device_; }
  [[nodiscard]] std::int64_t page_size() const noexcept { return page_size_; }
  [[nodiscard]] const std::string& name() const noexcept { return holder_->name(); }

 private:
  /// Checks the shape and computes row_bytes_; the bytes of addresses it needs.
  [[nodiscard]] std::size_t measure();
  void reserve(std::size_t bytes);
  [[nodiscard]] std::unique_lock<std::mutex> lock() const;
  void check_memory_limit(std::int64_t bytes) const;
  void close_locked(PagePool::Losses& losses) noexcept;
  void check_counts();
  void resize_locked(std::int64_t rows);
  [[nodiscard]] std::uint32_t pages_for(std::int64_t rows) const noexcept;

  Generation generation_;
  Config config_;
  Device device_;
  std::shared_ptr<Driver> driver_;
  std::int64_t page_size_ = 0;
  std::int64_t row_bytes_ = 0;
  bool shares_pool_ = false;
  std::shared_ptr<PagePool> pool_;
  std::shared_ptr<Buffer> buffer_;
  std::unique_ptr<Holder> holder_;
  mutable std::mutex mutex_;
  std::int64_t rows_ = 0;
  bool closed_ = false;
};

}  // namespace vattn
