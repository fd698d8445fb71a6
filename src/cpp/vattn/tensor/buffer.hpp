// The memory of one growable tensor: a reservation cut into rows of equal length.
//
// Shared by whoever uses it: the cache or the tensor that made it, and every view that was handed out. The last one to let go
// unmaps the pages, gives them to the pool and the addresses back; so a view keeps its addresses and its contents for as long
// as it lives, whatever happened to the cache.
// Every buffer that has addresses is in a list of this process from its making until its memory goes, so that an address tells
// whose it is: a tensor library asks before it copies or shares what looks like any other memory.
// Thread: the pool's lock guards the rows while their holder is a member of it; the destructor may run on any thread, and does
// nothing in a forked child. The list: any thread.
#pragma once

#include <memory>
#include <vector>

#include "vattn/fork.hpp"
#include "vattn/memory/page_pool.hpp"
#include "vattn/memory/reservation.hpp"

namespace vattn {

class VATTN_API Buffer : public std::enable_shared_from_this<Buffer> {
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
  /// False, and nothing changed, where somebody beside the caller has a reference.
  [[nodiscard]] bool leave_list() noexcept;

  Generation generation_;
  std::shared_ptr<PagePool> pool_;
  Reservation reservation_;
  Address base_;
  std::size_t size_;
  std::vector<Row> rows_;
};

/// Whether the byte is in the reservation of a buffer that lives: of an open cache or tensor, or of what views keep of a closed
/// one. Not on meta, which has no addresses.
[[nodiscard]] VATTN_API bool is_in_a_buffer(Address at) noexcept;

/// The buffer that the byte is in; null where there is none.
[[nodiscard]] VATTN_API std::shared_ptr<Buffer> buffer_at(Address at) noexcept;

}  // namespace vattn
