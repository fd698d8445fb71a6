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
// counted as reclaimable, and is tried again. Memory is taken away only from what nobody was promised, and only once the work
// that used it has finished. After close(), and in a forked child, every method throws ClosedError. Thread: any method from any
// thread; one mutex a cache, which the mapper thread never takes.
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
#include "vattn/kv/rows.hpp"
#include "vattn/kv/slot_table.hpp"
#include "vattn/kv/stats.hpp"
#include "vattn/memory/growth.hpp"
#include "vattn/memory/mapper.hpp"
#include "vattn/memory/page_pool.hpp"
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
  /// On a budget shared with others; the pool's page size and limit, so none in `config`.
  KVCache(const CacheConfig& config, std::shared_ptr<PagePool> pool);
  ~KVCache();
  KVCache(const KVCache&) = delete;
  KVCache& operator=(const KVCache&) = delete;
  KVCache(KVCache&&) = delete;
  KVCache& operator=(KVCache&&) = delete;

  // Slots. On a device with streams, `stream` is the one whose work comes next (alloc) or used the slot (free, truncate);
  // without it, and without record_stream(), the call waits for the device instead.
  /// A free slot; NoFreeSlotError when all are taken. Of the warm ones, the smallest that has memory for `expected_len` tokens,
  /// else the largest; of cold ones the lowest. The stream is made to wait for what still uses the slot's memory.
  std::int64_t alloc(std::optional<std::int64_t> expected_len = {}, std::optional<Stream> stream = {});
  /// `count` neighbouring slots, ascending.
  std::vector<std::int64_t> alloc_batch(std::int64_t count, std::optional<Stream> stream = {});
  /// Its first name.
  std::vector<std::int64_t> alloc_block(std::int64_t count, std::optional<Stream> stream = {}) {
    return alloc_batch(count, stream);
  }
  /// Forgets the slot. Its memory stays mapped, for the next request or for whoever needs it, and is guarded by fences.
  void free(std::int64_t slot, std::optional<Stream> stream = {});
  /// The stream uses this cache too: what is given up from now on waits for its work as well.
  void record_stream(Stream stream);
  [[nodiscard]] std::vector<std::int64_t> slots() const;
  [[nodiscard]] std::int64_t active_slots() const;

  // Lengths.
  /// One length a slot, max_batch_size entries; 0 leaves a slot alone. Lengths never shrink.
  void step(std::span<const std::int64_t> lengths, std::optional<Stream> stream = {});
  /// Only the slots named. The stream is only asked whether it is being captured: growth cannot be.
  void step(std::span<const SlotLength> lengths, std::optional<Stream> stream = {});
  void step(std::initializer_list<SlotLength> lengths, std::optional<Stream> stream = {}) {
    step(std::span(lengths.begin(), lengths.size()), stream);
  }
  /// step, if it can be done at once: no growth, no waiting for the lock. False: nothing changed, call step.
  [[nodiscard]] bool try_step(std::span<const std::int64_t> lengths) noexcept;
  /// Would the step have memory? Takes nothing; the same bad arguments throw.
  /// `fresh`: the lengths of requests that have no slot yet and need one each; without as many free slots the answer is no.
  [[nodiscard]] bool fits(std::span<const std::int64_t> lengths, std::span<const std::int64_t> fresh = {}) const;
  [[nodiscard]] bool fits(std::span<const SlotLength> lengths, std::span<const std::int64_t> fresh = {}) const;
  /// Forgets the tokens from `tokens` on. On a driver's failure to zero the guard, the length stays and the tail may be zeroed.
  void truncate(std::int64_t slot, std::int64_t tokens, std::optional<Stream> stream = {});
  [[nodiscard]] std::int64_t seq_len(std::int64_t slot) const;
  /// Tokens that have memory now, look-ahead included; what truncate gave up is not.
  [[nodiscard]] std::int64_t committed_len(std::int64_t slot) const;
  /// Bytes that are this slot's alone: what the pool has more of when the slot is freed.
  [[nodiscard]] std::uint64_t slot_bytes(std::int64_t slot) const;

  // Rows: slots named once, for the loop of a server. std::invalid_argument once one of them was freed.
  /// Slots in use, each once, at least one.
  [[nodiscard]] Rows rows(std::span<const std::int64_t> slots) const;
  /// What the last step added to them.
  [[nodiscard]] LastStep last_step(const Rows& rows) const;
  /// LastStep::number alone.
  [[nodiscard]] std::uint64_t changes(const Rows& rows) const;

  // Memory. Shapes are always (slot, token, head, dim), whatever the layout.
  /// (length, heads, dim): exactly the tokens in use.
  [[nodiscard]] KVView<3> view(std::int64_t layer, std::int64_t slot) const;
  /// A view a slot, in the order of the rows.
  [[nodiscard]] std::vector<KVView<3>> views(std::int64_t layer, const Rows& rows) const;
  /// (n, length, heads, dim) of equally spaced ascending slots. Memory beyond a length that it shows is promised from then on.
  [[nodiscard]] KVView<4> batch(std::int64_t layer, std::span<const std::int64_t> slots, std::int64_t length);
  /// (max_batch_size, max_seq_len, heads, dim): the whole reservation, memory or not.
  [[nodiscard]] KVView<4> layer(std::int64_t layer) const;
  /// Copies new tokens of several slots: entry i's `tokens` tokens go to positions[i] and after of slots[i]. `k` and `v` are
  /// dense (n, tokens, heads, dim) on the cache's device, `v` 0 in a cache of keys only. Done when it returns.
  void write(std::int64_t layer, std::span<const std::int64_t> slots, std::span<const std::int64_t> positions, Address k,
             Address v, std::int64_t tokens = 1);
  /// The tokens that the last step added to the rows, one slot after the other: dense (tokens added, heads, dim).
  /// std::invalid_argument unless they are `tokens` in all, and `each` in every slot where that is given.
  void write(std::int64_t layer, const Rows& rows, std::int64_t tokens, Address k, Address v,
             std::optional<std::int64_t> each = {});

  // Budget.
  [[nodiscard]] std::uint64_t memory_limit() const;
  /// Holds at once for growth; takes nothing from active slots.
  void set_memory_limit(std::int64_t bytes);
  [[nodiscard]] CacheStats stats() const;
  /// Waits until the mapper thread has mapped what it can for now; at once where there is none.
  void settle() const;

  /// Gives everything back but what living views hold. Throws Error naming what the driver would not take; closed all the same.
  void close();
  [[nodiscard]] bool is_closed() const noexcept;

  [[nodiscard]] const Geometry& geometry() const noexcept { return geometry_; }
  [[nodiscard]] Device device() const noexcept { return device_; }
  [[nodiscard]] const std::string& name() const noexcept { return holder_->name(); }

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

  void reserve_tensors();
  [[nodiscard]] std::uint64_t first_limit() const;
  [[nodiscard]] std::unique_lock<std::mutex> lock() const;
  void check_memory_limit(std::int64_t bytes) const;
  void check_active(const char* parameter, std::int64_t slot) const;
  void check_length(std::int64_t slot, std::int64_t tokens) const;
  void check_named(std::span<const SlotLength> lengths) const;
  [[nodiscard]] std::vector<SlotLength> named(std::span<const std::int64_t> lengths) const;

  /// Pages are zeroed as they are promised: for another request's sake, or for the guard's.
  [[nodiscard]] bool zero_fill() const noexcept { return geometry_.config().scrub || geometry_.config().guard_tokens != 0; }
  [[nodiscard]] Extent extent(std::int64_t tokens) const noexcept;
  [[nodiscard]] std::int64_t tokens_in(const Extent& pages) const noexcept;
  [[nodiscard]] const RowGroup& group(std::int64_t slot) const noexcept {
    return holder_->group(static_cast<std::size_t>(slot));
  }
  [[nodiscard]] std::int64_t committed_tokens(std::int64_t slot) const;
  /// Look-ahead that a view shows must not be taken away from under it.
  void promise(std::span<const std::int64_t> slots, std::int64_t tokens);
  void grow(std::span<const SlotLength> lengths, std::optional<Stream> stream, bool names_all);
  [[nodiscard]] bool has_room_for(std::span<const SlotLength> lengths, std::span<const std::int64_t> fresh) const;
  [[nodiscard]] bool holds_more_than(std::int64_t slot, const Extent& kept) const;
  void update_quiet(std::int64_t slot) noexcept;
  void check_counts();
  void close_locked(PagePool::Losses& losses) noexcept;

  [[nodiscard]] std::int64_t best_free(std::int64_t expected) const;
  void order(const Fences& fences, std::optional<Stream> stream);
  void check_not_capturing(const char* call, std::optional<Stream> stream) const;
  [[nodiscard]] Fences fence_work(std::optional<Stream> stream);
  void retire(std::int64_t slot, const PagePool::Kept& kept, const Fences& fences);
  [[nodiscard]] Extent ahead_of(std::int64_t tokens) const noexcept;

  [[nodiscard]] std::pair<const Tensor*, const Tensor*> tensors_of(std::int64_t layer) const;
  [[nodiscard]] TensorView<4> make_view(const Tensor& tensor, std::int64_t layer, const SlotRange& range) const;
  [[nodiscard]] KVView<4> make_views(std::int64_t layer, const SlotRange& range) const;
  [[nodiscard]] KVView<3> make_view_of(std::int64_t layer, std::int64_t slot) const;
  void check_rows(const Rows& rows) const;
  [[nodiscard]] LastStep last_step_of(const Rows& rows) const;
  void write_spans(std::int64_t layer, std::span<const TokenSpan> spans, Address k, Address v);

  Generation generation_;
  Device device_;
  std::shared_ptr<CountingDriver> driver_;
  Geometry geometry_;
  bool shares_pool_;
  std::shared_ptr<PagePool> pool_;
  std::vector<Tensor> tensors_;  // K of group 0, V of group 0 (if any), K of group 1, ...
  std::unique_ptr<Holder> holder_;
  std::unique_ptr<Mapper> mapper_;  // null without look-ahead
  mutable std::mutex mutex_;
  SlotTable slots_;
  std::vector<std::uint8_t> fresh_;  // slots whose request has not stepped yet
  std::vector<Stream> streams_;      // recorded
  std::uint64_t map_wait_ns_ = 0;
  std::uint64_t prompts_ = 0;
  std::uint64_t warm_prompts_ = 0;
  std::uint64_t reused_prompts_ = 0;
  std::uint64_t steps_waited_ = 0;
  bool closed_ = false;
};

}  // namespace vattn
