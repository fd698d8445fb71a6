#include "vattn/tensor/buffer.hpp"

namespace vattn {

Buffer::Buffer(std::shared_ptr<PagePool> pool, std::size_t rows, std::size_t row_bytes, UnmappedReads reads)
    : pool_(std::move(pool)),
      reservation_(*pool_->driver(), rows * row_bytes, reads),
      base_(reservation_.base()),
      size_(reservation_.size()) {
  rows_.reserve(rows);
  for (std::size_t row = 0; row < rows; ++row) rows_.emplace_back(base_ + row * row_bytes);
}

Buffer::~Buffer() {
  if (!generation_.is_current()) {
    // A forked child: these addresses are not mapped here, or are somebody else's by now.
    reservation_.abandon();
    return;
  }
  if (!reservation_.is_held()) return;
  PagePool::Losses losses;
  try_synchronize(*pool_->driver());
  release(losses);
}

void Buffer::release(PagePool::Losses& losses) noexcept {
  if (!reservation_.is_held()) return;
  const std::uint64_t before = losses.mappings;
  pool_->empty(rows_, losses);
  try {
    if (losses.mappings == before) {
      reservation_.release();
    } else {
      ++losses.ranges;
      reservation_.abandon();
    }
  } catch (...) {
    losses.note_failure(losses.ranges);
  }
}

}  // namespace vattn
