// The memory of one growable tensor: a reservation cut into rows of equal length.
//
// Shared by whoever uses it: the cache or the tensor that made it, and every view that was handed out. The last one to let go
// unmaps the pages, gives them to the pool and the addresses back; so a view keeps its addresses and its contents for as long
// as it lives, whatever happened to the cache.
// Thread: the pool's lock guards the rows while their holder is a member of it; the destructor may run on any thread, and does
// nothing in a forked child.
#pragma once

#include <memory>
#include <vector>

#include "vattn/fork.hpp"
#include "vattn/memory/page_pool.hpp"
#include "vattn/memory/reservation.hpp"

namespace vattn {

class VATTN_API Buffer {
 public:
  /// Reserves `rows` times `row_bytes` (a multiple of the pool's page size).
  Buffer(std::shared_ptr<PagePool> pool, std::size_t rows, std::size_t row_bytes, UnmappedReads reads);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&&) = delete;
  Buffer& operator=(Buffer&&) = delete;

  [[nodiscard]] Address base() const noexcept { return base_; }
  [[nodiscard]] std::size_t size() const noexcept { return size_; }
  [[nodiscard]] Row* rows() noexcept { return rows_.data(); }

  /// Gives everything back now, once; what could not be is counted in `losses`. The holder has left the pool, and the driver
  /// was synchronized.
  void release(PagePool::Losses& losses) noexcept;

 private:
  Generation generation_;
  std::shared_ptr<PagePool> pool_;
  Reservation reservation_;
  Address base_;
  std::size_t size_;
  std::vector<Row> rows_;
};

}  // namespace vattn
