#include "vattn/tensor/buffer.hpp"

#include <pthread.h>

#include <iterator>
#include <map>
#include <mutex>

namespace vattn {
namespace {

// Leaked on purpose, as in fork.cpp: tensors outlive static destruction. No other lock is taken while this one is held.
struct List {
  std::mutex mutex;
  std::map<Address, Buffer*> buffers;
};

List& list() {
  static auto* buffers = [] {
    auto* made = new List;
    // Held over fork(), so that a child neither finds it locked for ever nor half written.
    ::pthread_atfork([] { list().mutex.lock(); }, [] { list().mutex.unlock(); }, [] { list().mutex.unlock(); });
    return made;
  }();
  return *buffers;
}

/// The caller holds the list's lock.
Buffer* find(Address at) noexcept {
  const auto next = list().buffers.upper_bound(at);
  if (next == list().buffers.begin()) return nullptr;
  Buffer* const found = std::prev(next)->second;
  return at - found->base() < found->size() ? found : nullptr;
}

}  // namespace

bool is_in_a_buffer(Address at) noexcept {
  const std::lock_guard lock(list().mutex);
  return find(at) != nullptr;
}

std::shared_ptr<Buffer> buffer_at(Address at) noexcept {
  const std::lock_guard lock(list().mutex);
  Buffer* const found = find(at);
  return found == nullptr ? nullptr : found->weak_from_this().lock();  // null for one that is being destroyed
}

Buffer::Buffer(std::shared_ptr<PagePool> pool, std::size_t rows, std::size_t row_bytes, UnmappedReads reads)
    : pool_(std::move(pool)),
      reservation_(*pool_->driver(), rows * row_bytes, reads),
      base_(reservation_.base()),
      size_(reservation_.size()) {
  rows_.reserve(rows);
  for (std::size_t row = 0; row < rows; ++row) rows_.emplace_back(base_ + row * row_bytes);
  if (pool_->driver()->traits().tensor_device == TensorDevice::kMeta) return;  // its addresses are numbers, and not unique
  const std::lock_guard lock(list().mutex);
  list().buffers.insert_or_assign(base_, this);
}

bool Buffer::leave_list() noexcept {
  const std::lock_guard lock(list().mutex);
  if (weak_from_this().use_count() > 1) return false;
  const auto found = list().buffers.find(base_);
  if (found != list().buffers.end() && found->second == this) list().buffers.erase(found);
  return true;
}

Buffer::~Buffer() {
  static_cast<void>(leave_list());
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
  // Before the addresses go, which may be somebody else's at once. What buffer_at() gave to another thread in this moment is
  // theirs, and goes with them.
  if (!leave_list()) return;
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
