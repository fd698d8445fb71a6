// KVCache: making and closing it, slots, budget and statistics. Growth is in kv_cache_growth.cpp, views in kv_cache_views.cpp.
#include "vattn/kv/kv_cache.hpp"

#include <algorithm>
#include <numeric>

#include "vattn/checked.hpp"

namespace vattn {

KVCache::KVCache(const CacheConfig& config, Device device) : KVCache(config, device, open_driver(device)) {}

KVCache::KVCache(const CacheConfig& config, Device device, std::shared_ptr<Driver> driver)
    : device_(device),
      driver_(std::make_shared<CountingDriver>(std::move(driver))),
      geometry_(config, driver_->traits()),
      slots_(config.max_batch_size),
      dirty_(static_cast<std::size_t>(config.max_batch_size), 0) {
  const auto page = static_cast<std::uint64_t>(geometry_.page_size());
  const std::uint64_t group_bytes = static_cast<std::uint64_t>(geometry_.pages_per_group()) * page;
  std::uint64_t limit = 0;
  if (config.memory_limit) {
    check_memory_limit(*config.memory_limit);
    limit = static_cast<std::uint64_t>(*config.memory_limit);
  } else {
    limit = default_memory_limit(*driver_);
    if (limit < group_bytes) {
      throw OutOfMemoryError("memory_limit=None: the share of what is free, " + std::to_string(limit) +
                                 " bytes, is under one page group of " + std::to_string(group_bytes) +
                                 ": free memory, use a smaller page_size, or name a memory_limit",
                             group_bytes, limit, limit);
    }
  }
  pool_ = std::make_shared<PagePool>(driver_, geometry_.page_size(), limit);
  const auto add = [&](const TensorGeometry& tensor) {
    tensors_.push_back(
        {&tensor, std::make_shared<Buffer>(pool_, static_cast<std::size_t>(tensor.rows),
                                           static_cast<std::size_t>(tensor.row_bytes), geometry_.unmapped_reads())});
  };
  for (std::int64_t group = 0; group < geometry_.groups(); ++group) {
    add(geometry_.k());
    if (geometry_.has_v()) add(geometry_.v());
  }
}

KVCache::~KVCache() {
  if (!generation_.is_current() || closed_) return;
  PagePool::Losses losses;
  close_locked(losses);
}

std::unique_lock<std::mutex> KVCache::lock() const {
  generation_.check("this KVCache");  // before the lock: in a forked child it may be locked for ever
  std::unique_lock held(mutex_);
  if (closed_) throw ClosedError("this KVCache is closed: make a new one");
  return held;
}

void KVCache::check_memory_limit(std::int64_t bytes) const {
  const std::int64_t group_bytes = geometry_.pages_per_group() * geometry_.page_size();
  if (bytes >= group_bytes) return;
  throw std::invalid_argument("memory_limit=" + std::to_string(bytes) + " must be at least one page group, " +
                              std::to_string(group_bytes) + " bytes (" + std::to_string(geometry_.pages_per_group()) +
                              " pages of " + std::to_string(geometry_.page_size()) + "): raise it, or use a smaller page_size");
}

void KVCache::check_active(const char* parameter, std::int64_t slot) const {
  check_index(parameter, slot, slots_.size());
  if (!slots_.is_active(slot)) {
    throw std::invalid_argument(std::string(parameter) + "=" + std::to_string(slot) +
                                " is not in use: it was never allocated, or was freed");
  }
}

std::int64_t KVCache::alloc() {
  const auto held = lock();
  const std::int64_t slot = slots_.find_free(1);
  if (slot < 0) {
    throw NoFreeSlotError("alloc: all " + std::to_string(slots_.size()) + " slots (max_batch_size) are in use: free one first");
  }
  clean(slot);
  slots_.take(slot);
  update_committed(slot);
  return slot;
}

std::vector<std::int64_t> KVCache::alloc_block(std::int64_t count) {
  const auto held = lock();
  check_between("n", count, 1, slots_.size());
  const std::int64_t first = slots_.find_free(count);
  if (first < 0) {
    throw NoFreeSlotError("alloc_block: n=" + std::to_string(count) + ": no " + std::to_string(count) +
                          " neighbouring slots are free (" + std::to_string(slots_.size() - slots_.active()) + " of " +
                          std::to_string(slots_.size()) + " are): free some, or ask for fewer");
  }
  std::vector<std::int64_t> block(static_cast<std::size_t>(count));
  std::iota(block.begin(), block.end(), first);
  for (const std::int64_t slot : block) clean(slot);
  for (const std::int64_t slot : block) {
    slots_.take(slot);
    update_committed(slot);
  }
  return block;
}

void KVCache::clean(std::int64_t slot) {
  auto& dirty = dirty_[static_cast<std::size_t>(slot)];
  if (dirty == 0) return;
  const bool zero = zero_fill();
  each_row(slot, [&](const Tensor&, Row& row) {
    if (row.shrink(*pool_, 0) || !zero || row.accessible_pages() == 0) return;
    driver_->fill_zero(row.base(), row.accessible_pages() * pool_->page_size());
  });
  dirty = 0;
}

void KVCache::free(std::int64_t slot) {
  const auto held = lock();
  check_active("slot", slot);
  driver_->synchronize();
  bool emptied = true;
  each_row(slot, [&](const Tensor&, Row& row) { emptied = row.shrink(*pool_, 0) && emptied; });
  slots_.give(slot);
  dirty_[static_cast<std::size_t>(slot)] = emptied ? 0 : 1;
  PagePool::Losses losses;
  pool_->trim_to_limit(losses);
  check_counts();
}

std::vector<std::int64_t> KVCache::slots() const {
  const auto held = lock();
  return slots_.active_slots();
}

std::int64_t KVCache::active_slots() const {
  const auto held = lock();
  return slots_.active();
}

std::int64_t KVCache::seq_len(std::int64_t slot) const {
  const auto held = lock();
  check_active("slot", slot);
  return slots_.length(slot);
}

std::int64_t KVCache::committed_len(std::int64_t slot) const {
  const auto held = lock();
  check_active("slot", slot);
  return slots_.committed(slot);
}

std::uint64_t KVCache::memory_limit() const {
  const auto held = lock();
  return pool_->usage().limit_bytes;
}

void KVCache::set_memory_limit(std::int64_t bytes) {
  const auto held = lock();
  check_memory_limit(bytes);
  if (static_cast<std::uint64_t>(bytes) < pool_->usage().created_pages * pool_->page_size() && surplus_pages() != 0) {
    driver_->synchronize();
    release_surplus();
  }
  pool_->set_limit(static_cast<std::uint64_t>(bytes));
  PagePool::Losses losses;  // what the driver would not take stays pooled, and stats() shows it above the limit
  pool_->trim_to_limit(losses);
  check_counts();
}

CacheStats KVCache::stats() const {
  const auto held = lock();
  const PagePool::Usage usage = pool_->usage();
  const std::uint64_t page = pool_->page_size();
  const std::uint64_t surplus = surplus_pages();
  CacheStats stats;
  stats.reserved_bytes = static_cast<std::uint64_t>(geometry_.reserved_bytes());
  stats.created_bytes = usage.created_pages * page;
  stats.mapped_bytes = usage.mapped_pages * page;
  stats.pooled_bytes = usage.pooled_pages * page;
  stats.limit_bytes = usage.limit_bytes;
  stats.used_bytes = static_cast<std::uint64_t>(slots_.total_tokens() * geometry_.bytes_per_token());
  stats.available_bytes = (pool_->available_pages() + surplus) * page;
  stats.reclaimable_bytes = surplus * page;
  stats.active_slots = static_cast<std::uint64_t>(slots_.active());
  stats.driver_calls = driver_->calls();
  stats.pages_created = usage.total_created;
  stats.pages_reused = usage.total_reused;
  stats.map_wait_ns = map_wait_ns_;
  return stats;
}

bool KVCache::is_closed() const noexcept {
  if (!generation_.is_current()) return true;
  const std::lock_guard held(mutex_);
  return closed_;
}

void KVCache::close() {
  generation_.check("this KVCache");
  const std::lock_guard held(mutex_);
  if (closed_) return;
  PagePool::Losses losses;
  close_locked(losses);
  if (!losses.any()) return;
  throw Error("close: closed, but the driver would not take back " + std::to_string(losses.mappings) + " mappings, " +
              std::to_string(losses.pages) + " pages and " + std::to_string(losses.ranges) +
              " address ranges (first: " + losses.reason + "). What is left goes when the process ends");
}

void KVCache::close_locked(PagePool::Losses& losses) noexcept {
  closed_ = true;
  try_synchronize(*driver_);
  for (Tensor& tensor : tensors_) {
    // A living view keeps its tensor's memory; it goes when the view does.
    if (tensor.buffer.use_count() == 1) tensor.buffer->release(losses);
    tensor.buffer.reset();
  }
  tensors_.clear();
  pool_->close(losses);
}

void KVCache::check_counts() {
  try {
    pool_->check();
  } catch (const Error&) {
    PagePool::Losses losses;
    close_locked(losses);
    throw;
  }
}

}  // namespace vattn
