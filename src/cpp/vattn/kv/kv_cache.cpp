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
      shares_pool_(false),
      slots_(config.max_batch_size),
      fresh_(static_cast<std::size_t>(config.max_batch_size), 0) {
  pool_ = PagePool::make(device_, driver_, static_cast<std::size_t>(geometry_.page_size()), first_limit());
  reserve_tensors();
}

namespace {

std::shared_ptr<PagePool> usable(std::shared_ptr<PagePool> pool, const CacheConfig& config) {
  if (pool == nullptr) throw std::invalid_argument("pool must not be null");
  pool->check_open();
  if (config.page_size || config.memory_limit) {
    throw std::invalid_argument(std::string(config.page_size ? "page_size" : "memory_limit") +
                                " must not be given with pool: the pool's holds for all its members");
  }
  return pool;
}

CacheConfig with_page_size(CacheConfig config, std::size_t page_size) {
  config.page_size = static_cast<std::int64_t>(page_size);
  return config;
}

}  // namespace

KVCache::KVCache(const CacheConfig& config, std::shared_ptr<PagePool> pool)
    : device_(usable(pool, config)->device()),
      driver_(std::make_shared<CountingDriver>(pool->driver())),
      geometry_(with_page_size(config, pool->page_size()), driver_->traits()),
      shares_pool_(true),
      pool_(std::move(pool)),
      slots_(config.max_batch_size),
      fresh_(static_cast<std::size_t>(config.max_batch_size), 0) {
  const std::uint64_t limit = pool_->memory_limit();
  const auto group_bytes = static_cast<std::uint64_t>(geometry_.pages_per_group() * geometry_.page_size());
  if (limit < group_bytes) {
    throw std::invalid_argument("pool: its memory_limit=" + std::to_string(limit) + " is under one page group of this cache, " +
                                std::to_string(group_bytes) + " bytes: raise it, or use a smaller page_size");
  }
  reserve_tensors();
}

std::uint64_t KVCache::first_limit() const {
  const auto group_bytes = static_cast<std::uint64_t>(geometry_.pages_per_group() * geometry_.page_size());
  if (const auto& wanted = geometry_.config().memory_limit) {
    check_memory_limit(*wanted);
    return static_cast<std::uint64_t>(*wanted);
  }
  const std::uint64_t limit = default_memory_limit(*driver_);
  if (limit >= group_bytes) return limit;
  throw OutOfMemoryError("memory_limit=None: the share of what is free, " + std::to_string(limit) +
                             " bytes, is under one page group of " + std::to_string(group_bytes) +
                             ": free memory, use a smaller page_size, or name a memory_limit",
                         group_bytes, limit, limit);
}

void KVCache::reserve_tensors() {
  std::vector<Holder::Table> tables;
  const auto add = [&](const TensorGeometry& tensor, std::uint8_t kind) {
    tensors_.push_back(
        {&tensor, std::make_shared<Buffer>(pool_, static_cast<std::size_t>(tensor.rows),
                                           static_cast<std::size_t>(tensor.row_bytes), geometry_.unmapped_reads())});
    tables.push_back({tensors_.back().buffer->rows(), kind});
  };
  for (std::int64_t group = 0; group < geometry_.groups(); ++group) {
    add(geometry_.k(), 0);
    if (geometry_.has_v()) add(geometry_.v(), 1);
  }
  holder_ = std::make_unique<Holder>("KVCache", driver_, std::move(tables), static_cast<std::size_t>(slots_.size()),
                                     static_cast<std::size_t>(geometry_.rows_per_slot()));
  if (geometry_.warm_tokens() != 0) holder_->warm_target = extent(geometry_.warm_tokens());
  pool_->join(*holder_);
  if (geometry_.lookahead_tokens() == 0) return;
  try {
    mapper_ = std::make_unique<Mapper>(*pool_, *holder_, zero_fill());
  } catch (...) {
    pool_->leave(*holder_);
    throw;
  }
}

KVCache::~KVCache() {
  if (!generation_.is_current()) {
    // The mapper's thread does not exist in this child, and its condition variables may have waiters that do not either.
    [[maybe_unused]] const Mapper* const mapper = mapper_.release();
    [[maybe_unused]] const Holder* const holder = holder_.release();
    return;
  }
  if (closed_) return;
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

std::int64_t KVCache::best_free(std::int64_t expected) const {
  const auto held = pool_->lock();
  std::int64_t best = -1;
  std::int64_t best_tokens = -1;
  for (std::int64_t slot = 0; slot < slots_.size(); ++slot) {
    if (slots_.is_active(slot)) continue;
    const RowGroup& memory = group(slot);
    const std::int64_t tokens = tokens_in(memory.ready);
    // Large enough beats too small; of those large enough the smallest, of those too small the largest.
    const bool fits = tokens >= expected;
    const bool best_fits = best_tokens >= expected;
    if (best < 0 || (fits && (!best_fits || tokens < best_tokens)) || (!fits && !best_fits && tokens > best_tokens)) {
      best = slot;
      best_tokens = tokens;
    }
  }
  return best;
}

void KVCache::order(const Fences& fences, std::optional<Stream> stream) {
  for (const auto& fence : fences) {
    if (!stream && streams_.empty()) fence->wait();
    if (stream) fence->hold_back(*stream);
    for (const Stream recorded : streams_) fence->hold_back(recorded);
  }
}

std::int64_t KVCache::alloc(std::optional<std::int64_t> expected_len, std::optional<Stream> stream) {
  const auto held = lock();
  const std::int64_t longest = geometry_.config().max_seq_len;
  if (expected_len) check_between("expected_len", *expected_len, 0, longest);
  const std::int64_t slot = best_free(expected_len.value_or(longest));
  if (slot < 0) {
    throw NoFreeSlotError("alloc: all " + std::to_string(slots_.size()) + " slots (max_batch_size) are in use: free one first");
  }
  order(pool_->pending(*holder_, static_cast<std::size_t>(slot)), stream);
  slots_.take(slot);
  fresh_[static_cast<std::size_t>(slot)] = 1;
  pool_->take_group(*holder_, static_cast<std::size_t>(slot));
  return slot;
}

std::vector<std::int64_t> KVCache::alloc_batch(std::int64_t count, std::optional<Stream> stream) {
  const auto held = lock();
  check_between("n", count, 1, slots_.size());
  const std::int64_t first = slots_.find_free(count);
  if (first < 0) {
    throw NoFreeSlotError("alloc_batch: n=" + std::to_string(count) + ": no " + std::to_string(count) +
                          " neighbouring slots are free (" + std::to_string(slots_.size() - slots_.active()) + " of " +
                          std::to_string(slots_.size()) + " are): free some, or ask for fewer");
  }
  std::vector<std::int64_t> block(static_cast<std::size_t>(count));
  std::iota(block.begin(), block.end(), first);
  for (const std::int64_t slot : block) order(pool_->pending(*holder_, static_cast<std::size_t>(slot)), stream);
  for (const std::int64_t slot : block) {
    slots_.take(slot);
    fresh_[static_cast<std::size_t>(slot)] = 1;
    pool_->take_group(*holder_, static_cast<std::size_t>(slot));
  }
  return block;
}

void KVCache::check_not_capturing(const char* call, std::optional<Stream> stream) const {
  if (!driver_->traits().has_streams) return;
  bool capturing = stream && driver_->is_capturing(*stream);
  for (const Stream recorded : streams_) capturing = capturing || driver_->is_capturing(recorded);
  if (!capturing) return;
  throw Error(std::string(call) + ": the stream is being captured into a graph, and memory cannot be moved in one: " + call +
              " before the capture or after it");
}

Fences KVCache::fence_work(std::optional<Stream> stream) {
  Fences fences;
  if (!driver_->traits().has_streams) {
    driver_->synchronize();
    return fences;
  }
  if (!stream && streams_.empty()) {
    driver_->synchronize();  // whoever used the memory did not say on which stream
    return fences;
  }
  if (stream) fences.push_back(std::make_shared<Fence>(driver_, *stream));
  for (const Stream recorded : streams_) {
    if (recorded != stream) fences.push_back(std::make_shared<Fence>(driver_, recorded));
  }
  return fences;
}

void KVCache::record_stream(Stream stream) {
  const auto held = lock();
  if (std::find(streams_.begin(), streams_.end(), stream) == streams_.end()) streams_.push_back(stream);
}

void KVCache::free(std::int64_t slot, std::optional<Stream> stream) {
  const auto held = lock();
  check_active("slot", slot);
  check_not_capturing("free", stream);
  retire(slot, {}, fence_work(stream));
  slots_.give(slot);
  check_counts();
}

void KVCache::retire(std::int64_t slot, const PagePool::Kept& kept, const Fences& fences) {
  pool_->retire(*holder_, static_cast<std::size_t>(slot), kept, fences);
  pool_->settle();  // the limit may have been lowered under it
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
  return committed_tokens(slot);
}

std::uint64_t KVCache::slot_bytes(std::int64_t slot) const {
  const auto held = lock();
  check_active("slot", slot);
  const auto ledger = pool_->lock();
  return holder_->pages_in(group(slot).held) * pool_->page_size();
}

std::int64_t KVCache::committed_tokens(std::int64_t slot) const {
  const auto ledger = pool_->lock();
  const RowGroup& memory = group(slot);
  return tokens_in({std::min(memory.ready[0], memory.shown[0]), std::min(memory.ready[1], memory.shown[1])});
}

std::uint64_t KVCache::memory_limit() const {
  const auto held = lock();
  return pool_->memory_limit();
}

void KVCache::set_memory_limit(std::int64_t bytes) {
  const auto held = lock();
  if (shares_pool_) {
    throw std::invalid_argument("memory_limit=" + std::to_string(bytes) +
                                ": this cache shares the budget of its pool: set the memory_limit of the pool");
  }
  check_memory_limit(bytes);
  pool_->set_memory_limit(bytes);
  check_counts();
}

CacheStats KVCache::stats() const {
  const auto held = lock();
  const PagePool::HolderUsage usage = pool_->usage(*holder_);
  const std::uint64_t page = pool_->page_size();
  CacheStats stats;
  stats.reserved_bytes = static_cast<std::uint64_t>(geometry_.reserved_bytes());
  stats.mapped_bytes = usage.mapped_pages * page;
  stats.pooled_bytes = usage.pooled_pages * page;
  stats.retired_bytes = usage.retired_pages * page;
  stats.created_bytes = stats.mapped_bytes + stats.pooled_bytes + stats.retired_bytes;
  stats.limit_bytes = usage.limit_bytes;
  stats.used_bytes = static_cast<std::uint64_t>(slots_.total_tokens() * geometry_.bytes_per_token());
  stats.available_bytes = usage.available_pages * page;
  stats.reclaimable_bytes = (usage.warm_pages + usage.ahead_pages) * page;
  stats.active_slots = static_cast<std::uint64_t>(slots_.active());
  stats.warm_slots = usage.warm_groups;
  stats.driver_calls = driver_->calls();
  stats.pages_created = usage.pages_created;
  stats.pages_reused = usage.pages_reused;
  stats.map_wait_ns = map_wait_ns_;
  stats.warm_bytes = usage.warm_pages * page;
  stats.prompts = prompts_;
  stats.warm_prompts = warm_prompts_;
  stats.reused_prompts = reused_prompts_;
  stats.steps_waited = steps_waited_;
  return stats;
}

void KVCache::settle() const {
  static_cast<void>(lock());
  Mapper::settle(*pool_, *holder_);
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
  if (mapper_ != nullptr) mapper_->stop();
  pool_->leave(*holder_);
  try_synchronize(*driver_);
  for (Tensor& tensor : tensors_) {
    // A living view keeps its tensor's memory; it goes when the view does.
    if (tensor.buffer.use_count() == 1) tensor.buffer->release(losses);
    tensor.buffer.reset();
  }
  tensors_.clear();
  if (!shares_pool_) pool_->shut(losses);
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
