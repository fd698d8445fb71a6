#include "vattn/kv/geometry.hpp"

#include <algorithm>
#include <limits>

#include "vattn/checked.hpp"
#include "vattn/driver/limits.hpp"

namespace vattn {
namespace {

constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
// The page tables are sized by rows and tensors, so those are bounded; lengths and page sizes are not.
constexpr std::int64_t kMaxLayers = 1 << 16;
constexpr std::int64_t kMaxBatch = 1 << 20;
constexpr std::int64_t kMaxRows = 1 << 24;
// A request wastes half a page a tensor: layers share a tensor until a page holds so few tokens of it.
constexpr std::int64_t kTokensInAPage = 64;

std::string text(std::int64_t value) { return std::to_string(value); }

}  // namespace

Geometry::Geometry(const CacheConfig& config, const DriverTraits& driver) : config_(config) {
  check_between("dtype", static_cast<std::int64_t>(config.dtype), 0, static_cast<std::int64_t>(kDTypes.size()) - 1);
  check_between("num_layers", config.num_layers, 1, kMaxLayers);
  check_between("num_kv_heads", config.num_kv_heads, 1, kMost);
  check_between("head_dim", config.head_dim, 1, kMost);
  check_between("max_batch_size", config.max_batch_size, 1, kMaxBatch);
  check_between("max_seq_len", config.max_seq_len, 1, kMost);
  check_between("v_head_dim", config.v_head_dim.value_or(0), 0, kMost);
  check_between("guard_tokens", config.guard_tokens, 0, kMost);
  page_size_ = choose_page_size(config.page_size, driver);
  choose_layers_per_tensor(driver);
  unmapped_reads_ = config.unmapped_reads.value_or(driver.reads_as_zeros ? UnmappedReads::kZeros : UnmappedReads::kFault);
  if (unmapped_reads_ == UnmappedReads::kZeros && !driver.reads_as_zeros) {
    throw std::invalid_argument(std::string("unmapped_reads=\"zeros\" is possible on the host only; the ") + driver.name +
                                " driver faults: leave it None or say \"fault\"");
  }
  choose_layout(driver);
  k_ = tensor(config.head_dim);
  v_ = tensor(config.v_head_dim.value_or(config.head_dim));
  // Every row costs the process some bytes of its own, memory behind it or not.
  const std::int64_t rows = (k_.rows + v_.rows) * groups();
  if (rows > kMaxRows) {
    throw std::invalid_argument("num_layers=" + text(config.num_layers) + " and max_batch_size=" + text(config.max_batch_size) +
                                " make " + text(rows) + " rows, more than the " + text(kMaxRows) +
                                " that are possible: lower max_batch_size, or raise layers_per_tensor");
  }
  const char* const total = "num_layers x max_batch_size x num_kv_heads x head_dim x max_seq_len";
  const std::int64_t pair =
      checked_add(checked_mul(k_.rows, k_.row_bytes, total), checked_mul(v_.rows, v_.row_bytes, total), total);
  const std::int64_t all = checked_mul(pair, groups(), total);
  check_address_space(total, all, driver);
  choose_lookahead(driver);
}

void Geometry::choose_lookahead(const DriverTraits& driver) {
  const std::int64_t longest = config_.max_seq_len;
  // A page ahead: while one is filled, token by token, the next is mapped. Where a page holds few tokens, enough of them that
  // the mapper has some ten milliseconds. Where pages cost nothing there is nothing to hide.
  const std::int64_t page_ahead = std::max<std::int64_t>(tokens_per_page(), 64);
  check_between("lookahead_tokens", config_.lookahead_tokens.value_or(0), 0, kMost);
  check_between("warm_tokens", config_.warm_tokens.value_or(0), 0, kMost);
  lookahead_tokens_ = std::min(config_.lookahead_tokens.value_or(driver.has_memory ? page_ahead : 0), longest);
  warm_tokens_ = lookahead_tokens_ == 0 ? 0 : std::min<std::int64_t>(config_.warm_tokens.value_or(1), longest);
}

void Geometry::choose_layers_per_tensor(const DriverTraits& driver) {
  const std::int64_t layers = config_.num_layers;
  if (const auto asked = config_.layers_per_tensor) {
    check_between("layers_per_tensor", *asked, 1, layers);
    if (layers % *asked != 0) {
      throw std::invalid_argument("layers_per_tensor=" + text(*asked) + " must divide num_layers=" + text(layers));
    }
    if (config_.dense && *asked != 1) {
      throw std::invalid_argument(
          "layers_per_tensor=" + text(*asked) +
          " puts several layers between the tokens of one, and dense rows have one layer a tensor: leave "
          "dense out, or use layers_per_tensor=1");
    }
    layers_per_tensor_ = *asked;
    return;
  }
  layers_per_tensor_ = 1;
  // Only the host reads as zeros; its pages are small, and hold few tokens of one layer.
  if (driver.reads_as_zeros || config_.dense || config_.layout == Layout::kHND) return;
  const std::int64_t dim = std::min(config_.head_dim, config_.v_head_dim.value_or(0) == 0 ? kMost : *config_.v_head_dim);
  // Tokens of one layer in a page, of the tensor where a page holds more of them: K or V.
  const std::int64_t of_one = page_size_ / dim / config_.num_kv_heads / static_cast<std::int64_t>(size_of(config_.dtype));
  while (layers_per_tensor_ < layers && of_one / layers_per_tensor_ > kTokensInAPage) {
    do ++layers_per_tensor_;
    while (layers % layers_per_tensor_ != 0);
  }
}

void Geometry::choose_layout(const DriverTraits& driver) {
  // Head-major rows are many: at worst each is two mappings, its pages and its rest. Half of the kernel's limit is the wall.
  const char* const what = "num_layers x num_kv_heads x max_batch_size";
  const std::int64_t kinds = config_.v_head_dim.value_or(1) != 0 ? 2 : 1;
  const std::int64_t rows =
      checked_mul(checked_mul(config_.num_layers * kinds, config_.max_batch_size, what), config_.num_kv_heads, what);
  const auto mappings = static_cast<std::int64_t>(driver.mapping_limit);
  const bool sliced = layers_per_tensor_ > 1;
  const bool beyond_wall = mappings != 0 && rows > mappings / 4;
  if (!config_.layout) {
    layout_ = mappings == 0 || sliced || beyond_wall ? Layout::kNHD : Layout::kHND;
    if (layout_ == Layout::kHND && rows > kMaxRows) layout_ = Layout::kNHD;
  } else {
    layout_ = *config_.layout;
  }
  if (layout_ == Layout::kNHD) return;
  if (sliced) {
    throw std::invalid_argument("layout=\"HND\" holds one layer a tensor, but layers_per_tensor=" + text(layers_per_tensor_) +
                                ": use layout=\"NHD\" with slicing");
  }
  if (beyond_wall || rows > kMaxRows) {
    throw std::invalid_argument("layout=\"HND\" needs " + text(rows) + " rows (" + what +
                                " x K and V), of two mappings each at worst; " + "at most " +
                                text(beyond_wall ? mappings / 4 : kMaxRows) + " are possible here (half of vm.max_map_count, " +
                                text(mappings) + ", may be used): use layout=\"NHD\", or a smaller max_batch_size");
  }
}

TensorGeometry Geometry::tensor(std::int64_t head_dim) const {
  TensorGeometry made;
  if (head_dim == 0) return made;
  const char* const what = "num_kv_heads x head_dim (or v_head_dim) x max_seq_len x layers_per_tensor x dtype";
  const bool head_major = layout_ == Layout::kHND;
  made.head_dim = head_dim;
  made.token_bytes = checked_mul(head_dim, static_cast<std::int64_t>(size_of(config_.dtype)), what);
  if (!head_major) {
    made.token_bytes = checked_mul(checked_mul(made.token_bytes, config_.num_kv_heads, what), layers_per_tensor_, what);
  }
  const std::int64_t tokens = checked_add(config_.max_seq_len, config_.guard_tokens, "max_seq_len + guard_tokens");
  const std::int64_t bytes = checked_mul(made.token_bytes, tokens, what);
  made.row_bytes = checked_mul(ceil_div(bytes, page_size_), page_size_, what);
  made.rows = checked_mul(config_.max_batch_size, rows_per_slot(), "max_batch_size x num_kv_heads");
  return made;
}

std::int64_t Geometry::pages_for(const TensorGeometry& tensor, std::int64_t tokens) const noexcept {
  return tokens == 0 ? 0 : ceil_div((tokens + config_.guard_tokens) * tensor.token_bytes, page_size_);
}

std::int64_t Geometry::tokens_in(const TensorGeometry& tensor, std::int64_t pages) const noexcept {
  const std::int64_t tokens = pages * page_size_ / tensor.token_bytes - config_.guard_tokens;
  return std::clamp<std::int64_t>(tokens, 0, config_.max_seq_len);
}

std::int64_t Geometry::tokens_per_page() const noexcept { return page_size_ / std::max(k_.token_bytes, v_.token_bytes); }

std::int64_t Geometry::bytes_per_token() const noexcept {
  return config_.num_layers * config_.num_kv_heads * (k_.head_dim + v_.head_dim) *
         static_cast<std::int64_t>(size_of(config_.dtype));
}

std::int64_t Geometry::reserved_bytes() const noexcept { return groups() * (k_.rows * k_.row_bytes + v_.rows * v_.row_bytes); }

std::int64_t Geometry::offset(const TensorGeometry& tensor, std::int64_t layer, std::int64_t slot) const noexcept {
  const auto element = static_cast<std::int64_t>(size_of(config_.dtype));
  const std::int64_t in_group = layer % layers_per_tensor_;
  return slot * rows_per_slot() * tensor.row_bytes + in_group * config_.num_kv_heads * tensor.head_dim * element;
}

Geometry::Strides Geometry::strides(const TensorGeometry& tensor) const noexcept {
  const auto element = static_cast<std::int64_t>(size_of(config_.dtype));
  const std::int64_t row = tensor.row_bytes / element;
  if (layout_ == Layout::kHND) return {row * config_.num_kv_heads, tensor.head_dim, row};
  return {row, tensor.token_bytes / element, tensor.head_dim};
}

}  // namespace vattn
