// The shape of a cache: what was asked for (CacheConfig) and what follows from it (Geometry).
//
// Geometry is computed once and never changes: which layers share a tensor, how long a row is, what a token costs, which
// address a token has. It touches no memory, so it also answers questions about caches that will never be made.
//   token-major (NHD)  [slot][token][layer in group][head][dim]   one row a slot
//   head-major  (HND)  [slot][head][token][dim]                   one row a slot and head, one layer a tensor
// A row is max_seq_len + guard_tokens tokens rounded up to whole pages, so that no page belongs to two rows.
// Thread: any; immutable once made.
#pragma once

#include <cstdint>
#include <optional>

#include "vattn/driver/driver.hpp"
#include "vattn/dtype.hpp"

namespace vattn {

enum class Layout : std::uint8_t { kNHD, kHND };

struct CacheConfig {
  std::int64_t num_layers = 0;
  std::int64_t num_kv_heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t max_batch_size = 0;
  std::int64_t max_seq_len = 0;
  DType dtype = DType::kFloat16;
  std::optional<std::int64_t> v_head_dim{};  ///< none: as head_dim; 0: keys only
  /// Layers that share a tensor, and so a page; divides num_layers. None: see Geometry::layers_per_tensor.
  std::optional<std::int64_t> layers_per_tensor{};
  bool dense = false;                             ///< one layer a tensor, whatever the device; other numbers are refused
  std::optional<Layout> layout{};                 ///< none: head-major where the driver's mappings allow it, else token-major
  std::optional<std::int64_t> page_size{};        ///< bytes; none: the driver's default
  std::optional<std::int64_t> memory_limit{};     ///< bytes; none: a share of what is free
  std::optional<UnmappedReads> unmapped_reads{};  ///< none: zeros where the driver can, else fault
  std::int64_t guard_tokens = 0;                  ///< tokens past every length kept committed and zeroed
  bool scrub = false;                             ///< zero a page before another request can see it
  /// How far the mapper thread stays ahead of every slot in use; none: a page, 64 tokens at least, and 0 where there is no
  /// memory; 0: no thread.
  std::optional<std::int64_t> lookahead_tokens{};
  /// How far the mapper keeps one free slot mapped for the next request; none: a page in every tensor; 0: not at all.
  std::optional<std::int64_t> warm_tokens{};
};

/// One kind of tensor, K or V: every K tensor of a cache has the same geometry, and so has every V tensor.
struct TensorGeometry {
  std::int64_t head_dim = 0;
  std::int64_t token_bytes = 0;  ///< of one token in one row
  std::int64_t row_bytes = 0;    ///< whole pages
  std::int64_t rows = 0;         ///< in one tensor
};

class VATTN_API Geometry {
 public:
  /// Validates everything but memory_limit. std::invalid_argument or std::overflow_error, naming parameter and value.
  Geometry(const CacheConfig& config, const DriverTraits& driver);

  [[nodiscard]] const CacheConfig& config() const noexcept { return config_; }
  [[nodiscard]] Layout layout() const noexcept { return layout_; }
  [[nodiscard]] std::int64_t page_size() const noexcept { return page_size_; }
  [[nodiscard]] UnmappedReads unmapped_reads() const noexcept { return unmapped_reads_; }

  [[nodiscard]] bool has_v() const noexcept { return v_.head_dim != 0; }
  [[nodiscard]] const TensorGeometry& k() const noexcept { return k_; }
  [[nodiscard]] const TensorGeometry& v() const noexcept { return v_; }
  /// Tensors of one kind.
  [[nodiscard]] std::int64_t groups() const noexcept { return config_.num_layers / layers_per_tensor_; }
  /// As asked for. Where nothing was: 1 on the host, for head-major tensors and for dense ones; elsewhere, where pages are
  /// large, the smallest divisor of num_layers with which a page holds at most 64 tokens of every tensor, else num_layers.
  [[nodiscard]] std::int64_t layers_per_tensor() const noexcept { return layers_per_tensor_; }
  [[nodiscard]] std::int64_t rows_per_slot() const noexcept { return layout_ == Layout::kHND ? config_.num_kv_heads : 1; }

  /// Pages a row needs so that `tokens` tokens and the guard behind them have memory. 0 tokens need none.
  [[nodiscard]] std::int64_t pages_for(const TensorGeometry& tensor, std::int64_t tokens) const noexcept;
  /// Tokens that `pages` pages hold in front of the guard, at most max_seq_len.
  [[nodiscard]] std::int64_t tokens_in(const TensorGeometry& tensor, std::int64_t pages) const noexcept;

  /// At most max_seq_len; 0: no mapper.
  [[nodiscard]] std::int64_t lookahead_tokens() const noexcept { return lookahead_tokens_; }
  [[nodiscard]] std::int64_t warm_tokens() const noexcept { return warm_tokens_; }

  /// Pages that grow one slot by one page in every tensor.
  [[nodiscard]] std::int64_t pages_per_group() const noexcept { return groups() * rows_per_slot() * (has_v() ? 2 : 1); }
  /// Whole tokens that a page holds in one tensor; 0 where a token spans pages.
  [[nodiscard]] std::int64_t tokens_per_page() const noexcept;
  /// Bytes of one token in all tensors.
  [[nodiscard]] std::int64_t bytes_per_token() const noexcept;
  /// Bytes of addresses that all tensors reserve.
  [[nodiscard]] std::int64_t reserved_bytes() const noexcept;

  /// Where token 0 of a layer begins, in bytes from the start of its tensor, for a slot's first head.
  [[nodiscard]] std::int64_t offset(const TensorGeometry& tensor, std::int64_t layer, std::int64_t slot) const noexcept;
  /// Distances in elements between neighbouring slots, tokens and heads.
  struct Strides {
    std::int64_t slot;
    std::int64_t token;
    std::int64_t head;
  };
  [[nodiscard]] Strides strides(const TensorGeometry& tensor) const noexcept;

 private:
  void choose_lookahead(const DriverTraits& driver);
  void choose_layers_per_tensor(const DriverTraits& driver);
  void choose_layout(const DriverTraits& driver);
  [[nodiscard]] TensorGeometry tensor(std::int64_t head_dim) const;

  CacheConfig config_;
  std::int64_t layers_per_tensor_ = 1;
  Layout layout_ = Layout::kNHD;
  std::int64_t page_size_ = 0;
  UnmappedReads unmapped_reads_ = UnmappedReads::kFault;
  std::int64_t lookahead_tokens_ = 0;
  std::int64_t warm_tokens_ = 0;
  TensorGeometry k_;
  TensorGeometry v_;
};

}  // namespace vattn
