// KVCache: the memory of an LLM server's attention layers. Every request's keys and values lie contiguous in virtual memory,
// and physical pages are mapped behind them only as tokens arrive (vAttention, Prabhu et al., ASPLOS 2025).
//
//     auto cache = vattn::KVCache(config, {vattn::Device::Kind::kCpu});
//     auto slot = cache.alloc();
//     cache.step({{slot, 513}});
//     auto [k, v] = cache.view(0, slot);   // (513, num_kv_heads, head_dim), strided, valid as long as the view lives
//
// Promises: step is a transaction; an error leaves lengths, mappings and page counts as they were, and the message says what
// to do. Errors: the types of error.hpp; bad arguments are std::invalid_argument, std::out_of_range (a slot, a layer, a
// position) or std::overflow_error. free and truncate never fail for a page that the driver will not unmap: it stays mapped, is
// counted as reclaimable, and is tried again. After close(), and in a forked child, every method throws ClosedError. Thread:
// any method from any thread; one mutex a cache.
#pragma once

#include <initializer_list>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "vattn/driver/decorators/counting_driver.hpp"
#include "vattn/driver/open.hpp"
#include "vattn/fork.hpp"
#include "vattn/kv/geometry.hpp"
#include "vattn/kv/slot_table.hpp"
#include "vattn/kv/stats.hpp"
#include "vattn/memory/page_pool.hpp"
#include "vattn/memory/transaction.hpp"
#include "vattn/tensor/buffer.hpp"
#include "vattn/tensor/tensor_view.hpp"

namespace vattn {

struct SlotLength {
  std::int64_t slot;
  std::int64_t tokens;
};

/// Keys and values of one layer; `v` is empty in a cache of keys only.
template <std::size_t Rank>
struct KVView {
  TensorView<Rank> k;
  std::optional<TensorView<Rank>> v;
};

class VATTN_API KVCache {
 public:
  explicit KVCache(const CacheConfig& config, Device device = {});
  /// On a driver of the caller's making.
  KVCache(const CacheConfig& config, Device device, std::shared_ptr<Driver> driver);
  ~KVCache();
  KVCache(const KVCache&) = delete;
  KVCache& operator=(const KVCache&) = delete;
  KVCache(KVCache&&) = delete;
  KVCache& operator=(KVCache&&) = delete;

  // Slots.
  /// The lowest free slot; NoFreeSlotError when all are taken.
  std::int64_t alloc();
  /// `count` neighbouring slots, ascending.
  std::vector<std::int64_t> alloc_block(std::int64_t count);
  /// Forgets the slot. Its pages go back to the pool; on a device, after the work in flight has finished.
  void free(std::int64_t slot);
  [[nodiscard]] std::vector<std::int64_t> slots() const;
  [[nodiscard]] std::int64_t active_slots() const;

  // Lengths.
  /// One length a slot, max_batch_size entries; 0 leaves a slot alone. Lengths never shrink.
  void step(std::span<const std::int64_t> lengths);
  /// Only the slots named.
  void step(std::span<const SlotLength> lengths);
  void step(std::initializer_list<SlotLength> lengths) { step(std::span(lengths.begin(), lengths.size())); }
  /// step, if it can be done at once: no growth, no waiting for the lock. False: nothing changed, call step.
  [[nodiscard]] bool try_step(std::span<const std::int64_t> lengths) noexcept;
  /// Would the step have memory? Takes nothing; the same bad arguments throw.
  [[nodiscard]] bool fits(std::span<const std::int64_t> lengths) const;
  [[nodiscard]] bool fits(std::span<const SlotLength> lengths) const;
  /// Forgets the tokens from `tokens` on. On a driver's failure to zero the guard, the length stays and the tail may be zeroed.
  void truncate(std::int64_t slot, std::int64_t tokens);
  [[nodiscard]] std::int64_t seq_len(std::int64_t slot) const;
  [[nodiscard]] std::int64_t committed_len(std::int64_t slot) const;

  // Memory. Shapes are always (slot, token, head, dim), whatever the layout.
  /// (length, heads, dim): exactly the tokens in use.
  [[nodiscard]] KVView<3> view(std::int64_t layer, std::int64_t slot) const;
  /// (n, length, heads, dim) of equally spaced ascending slots.
  [[nodiscard]] KVView<4> batch(std::int64_t layer, std::span<const std::int64_t> slots, std::int64_t length) const;
  /// (max_batch_size, max_seq_len, heads, dim): the whole reservation, memory or not.
  [[nodiscard]] KVView<4> layer(std::int64_t layer) const;
  /// Copies new tokens of several slots: entry i goes to positions[i] of slots[i]. `k` and `v` are dense (n, heads, dim) on the
  /// cache's device, `v` 0 in a cache of keys only. Done when it returns.
  void write(std::int64_t layer, std::span<const std::int64_t> slots, std::span<const std::int64_t> positions, Address k,
             Address v);

  // Budget.
  [[nodiscard]] std::uint64_t memory_limit() const;
  /// Holds at once for growth; takes nothing from active slots.
  void set_memory_limit(std::int64_t bytes);
  [[nodiscard]] CacheStats stats() const;

  /// Gives everything back but what living views hold. Throws Error naming what the driver would not take; closed all the same.
  void close();
  [[nodiscard]] bool is_closed() const noexcept;

  [[nodiscard]] const Geometry& geometry() const noexcept { return geometry_; }
  [[nodiscard]] Device device() const noexcept { return device_; }

 private:
  struct Tensor {
    const TensorGeometry* geometry;
    std::shared_ptr<Buffer> buffer;
  };

  /// `count` slots from `first`, `distance` apart, `tokens` tokens of each.
  struct SlotRange {
    std::int64_t first;
    std::int64_t count;
    std::int64_t distance;
    std::int64_t tokens;
  };

  [[nodiscard]] std::unique_lock<std::mutex> lock() const;
  void check_memory_limit(std::int64_t bytes) const;
  void check_active(const char* parameter, std::int64_t slot) const;
  void check_length(std::int64_t slot, std::int64_t tokens) const;
  void check_named(std::span<const SlotLength> lengths) const;
  [[nodiscard]] std::vector<SlotLength> named(std::span<const std::int64_t> lengths) const;

  /// Pages are zeroed as they enter a row: for another request's sake, or for the guard's.
  [[nodiscard]] bool zero_fill() const noexcept { return geometry_.config().scrub || geometry_.config().guard_tokens != 0; }
  template <typename Visit>
  void each_row(std::int64_t slot, Visit&& visit) const;
  void grow(std::span<const SlotLength> lengths);
  [[nodiscard]] std::uint64_t missing_pages(std::span<const SlotLength> lengths) const;
  [[nodiscard]] bool has_room_for(std::uint64_t missing) const;
  /// Pages mapped beyond what lengths need: those the driver would not unmap.
  [[nodiscard]] std::uint64_t surplus_pages() const;
  void release_surplus() noexcept;
  void clean(std::int64_t slot);
  void update_committed(std::int64_t slot) noexcept;
  void check_counts();
  void close_locked(PagePool::Losses& losses) noexcept;

  [[nodiscard]] std::pair<const Tensor*, const Tensor*> tensors_of(std::int64_t layer) const;
  [[nodiscard]] TensorView<4> make_view(const Tensor& tensor, std::int64_t layer, const SlotRange& range) const;
  [[nodiscard]] KVView<4> make_views(std::int64_t layer, const SlotRange& range) const;

  Generation generation_;
  Device device_;
  std::shared_ptr<CountingDriver> driver_;
  Geometry geometry_;
  std::shared_ptr<PagePool> pool_;
  std::vector<Tensor> tensors_;  // K of group 0, V of group 0 (if any), K of group 1, ...
  mutable std::mutex mutex_;
  SlotTable slots_;
  std::vector<std::uint8_t> dirty_;  // free slots that kept pages the driver would not unmap
  std::uint64_t map_wait_ns_ = 0;
  bool closed_ = false;
};

template <typename Visit>
void KVCache::each_row(std::int64_t slot, Visit&& visit) const {
  const std::int64_t rows = geometry_.rows_per_slot();
  for (const Tensor& tensor : tensors_) {
    for (std::int64_t row = 0; row < rows; ++row)
      visit(tensor, tensor.buffer->row(static_cast<std::size_t>(slot * rows + row)));
  }
}

}  // namespace vattn
