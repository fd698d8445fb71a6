// The C interface over the C++ one: exceptions become status codes, and nothing crosses the boundary.
#include "vattn/c/vattn.h"

#include <new>
#include <string>

#include "vattn/vattn.hpp"

struct vattn_cache {
  vattn::KVCache cache;
};
struct vattn_tensor {
  vattn::GrowableTensor tensor;
};
struct vattn_pool {
  std::shared_ptr<vattn::PagePool> pool;
};

namespace vattn {

const char* version() noexcept { return VATTN_VERSION; }

namespace {

thread_local std::string last_error;  // NOLINT: the C interface's errno; each thread has its own

vattn_status fail(vattn_status status, const char* message) noexcept {
  try {
    last_error = message;
  } catch (...) {
    last_error.clear();
  }
  return status;
}

template <typename Call>
vattn_status guarded(Call&& call) noexcept {
  try {
    call();
    return VATTN_OK;
  } catch (const OutOfMemoryError& error) {
    return fail(VATTN_OUT_OF_MEMORY, error.what());
  } catch (const NoFreeSlotError& error) {
    return fail(VATTN_NO_FREE_SLOT, error.what());
  } catch (const DriverError& error) {
    return fail(VATTN_DRIVER_ERROR, error.what());
  } catch (const ClosedError& error) {
    return fail(VATTN_CLOSED, error.what());
  } catch (const InUseError& error) {
    return fail(VATTN_IN_USE, error.what());
  } catch (const std::invalid_argument& error) {
    return fail(VATTN_INVALID_ARGUMENT, error.what());
  } catch (const std::out_of_range& error) {
    return fail(VATTN_OUT_OF_RANGE, error.what());
  } catch (const std::overflow_error& error) {
    return fail(VATTN_OVERFLOW, error.what());
  } catch (const std::bad_alloc&) {
    return fail(VATTN_OUT_OF_MEMORY, "the process is out of memory for vattn's own bookkeeping");
  } catch (const std::exception& error) {
    return fail(VATTN_ERROR, error.what());
  } catch (...) {
    return fail(VATTN_ERROR, "an exception of an unknown type");
  }
}

void need(const void* pointer, const char* parameter) {
  if (pointer == nullptr) throw std::invalid_argument(std::string(parameter) + " must not be NULL");
}

DType parse_dtype(const char* name) {
  need(name, "dtype");
  const auto dtype = dtype_named(name);
  if (!dtype) throw std::invalid_argument("dtype=\"" + std::string(name) + "\" is not a type vattn knows");
  return *dtype;
}

Device parse_device_or_cpu(const char* name) { return name == nullptr ? Device{} : parse_device(name); }

void check_device(const char* name, const PagePool& pool) {
  if (name == nullptr || parse_device(name) == pool.device()) return;
  throw std::invalid_argument("device=\"" + std::string(name) + "\", but the pool is on \"" + to_string(pool.device()) +
                              "\": pass NULL, or another pool");
}

std::optional<Layout> parse_layout(const char* name) {
  if (name == nullptr) return std::nullopt;
  if (std::string_view(name) == "NHD") return Layout::kNHD;
  if (std::string_view(name) == "HND") return Layout::kHND;
  throw std::invalid_argument("layout=\"" + std::string(name) + "\" must be \"NHD\" or \"HND\"");
}

std::optional<UnmappedReads> parse_reads(const char* name) {
  if (name == nullptr) return std::nullopt;
  if (std::string_view(name) == "fault") return UnmappedReads::kFault;
  if (std::string_view(name) == "zeros") return UnmappedReads::kZeros;
  throw std::invalid_argument("unmapped_reads=\"" + std::string(name) + "\" must be \"fault\" or \"zeros\"");
}

std::optional<std::int64_t> unless_zero(std::int64_t value) {
  return value == 0 ? std::nullopt : std::optional<std::int64_t>(value);
}

CacheConfig convert(const vattn_cache_config& from) {
  CacheConfig config;
  config.num_layers = from.num_layers;
  config.num_kv_heads = from.num_kv_heads;
  config.head_dim = from.head_dim;
  config.max_batch_size = from.max_batch_size;
  config.max_seq_len = from.max_seq_len;
  config.dtype = parse_dtype(from.dtype);
  if (from.v_head_dim != -1) config.v_head_dim = from.v_head_dim;
  if (from.layers_per_tensor != 0) config.layers_per_tensor = from.layers_per_tensor;
  config.layout = parse_layout(from.layout);
  config.page_size = unless_zero(from.page_size);
  config.memory_limit = unless_zero(from.memory_limit);
  config.unmapped_reads = parse_reads(from.unmapped_reads);
  config.guard_tokens = from.guard_tokens;
  config.scrub = from.scrub != 0;
  if (from.lookahead_tokens != -1) config.lookahead_tokens = from.lookahead_tokens;
  if (from.warm_tokens != -1) config.warm_tokens = from.warm_tokens;
  return config;
}

std::span<const std::int64_t> span_of(const std::int64_t* values, std::int64_t count, const char* parameter) {
  if (count < 0) throw std::invalid_argument("count=" + std::to_string(count) + " must not be negative");
  if (count != 0) need(values, parameter);
  return {values, static_cast<std::size_t>(count)};
}

std::vector<SlotLength> pairs_of(const std::int64_t* slots, const std::int64_t* lengths, std::int64_t count) {
  const auto named = span_of(slots, count, "slots");
  const auto tokens = span_of(lengths, count, "lengths");
  std::vector<SlotLength> pairs;
  pairs.reserve(named.size());
  for (std::size_t i = 0; i < named.size(); ++i) pairs.push_back({named[i], tokens[i]});
  return pairs;
}

template <std::size_t Rank>
vattn_view convert(const TensorView<Rank>& from) {
  vattn_view view{};
  view.data = from.data();
  view.ndim = static_cast<std::int32_t>(Rank);
  std::copy(from.shape.begin(), from.shape.end(), view.shape);
  std::copy(from.strides.begin(), from.strides.end(), view.strides);
  return view;
}

template <std::size_t Rank>
void hand_out(const KVView<Rank>& views, vattn_view* k, vattn_view* v) {
  *k = convert(views.k);
  *v = views.v ? convert(*views.v) : vattn_view{};
}

}  // namespace
}  // namespace vattn

using vattn::guarded;
using vattn::need;

const char* vattn_version(void) { return vattn::version(); }
const char* vattn_last_error(void) { return vattn::last_error.c_str(); }

void vattn_cache_config_init(vattn_cache_config* config) {
  if (config == nullptr) return;
  *config = vattn_cache_config{};
  config->v_head_dim = -1;
  config->lookahead_tokens = -1;
  config->warm_tokens = -1;
}

vattn_status vattn_cache_create(const vattn_cache_config* config, vattn_cache** cache) {
  return guarded([&] {
    need(config, "config");
    need(cache, "cache");
    const vattn::CacheConfig wanted = vattn::convert(*config);
    if (config->pool == nullptr) {
      *cache = new vattn_cache{vattn::KVCache(wanted, vattn::parse_device_or_cpu(config->device))};
      return;
    }
    vattn::check_device(config->device, *config->pool->pool);
    *cache = new vattn_cache{vattn::KVCache(wanted, config->pool->pool)};
  });
}

void vattn_cache_destroy(vattn_cache* cache) { delete cache; }

vattn_status vattn_cache_close(vattn_cache* cache) {
  return guarded([&] {
    need(cache, "cache");
    cache->cache.close();
  });
}

vattn_status vattn_cache_alloc(vattn_cache* cache, int64_t* slot) {
  return guarded([&] {
    need(cache, "cache");
    need(slot, "slot");
    *slot = cache->cache.alloc();
  });
}

vattn_status vattn_cache_alloc_block(vattn_cache* cache, int64_t count, int64_t* first) {
  return guarded([&] {
    need(cache, "cache");
    need(first, "first");
    *first = cache->cache.alloc_block(count).front();
  });
}

vattn_status vattn_cache_free(vattn_cache* cache, int64_t slot) {
  return guarded([&] {
    need(cache, "cache");
    cache->cache.free(slot);
  });
}

vattn_status vattn_cache_alloc_on_stream(vattn_cache* cache, vattn_stream stream, int64_t* slot) {
  return guarded([&] {
    need(cache, "cache");
    need(slot, "slot");
    *slot = cache->cache.alloc({}, stream);
  });
}

vattn_status vattn_cache_alloc_for(vattn_cache* cache, int64_t expected_len, const vattn_stream* stream, int64_t* slot) {
  return guarded([&] {
    need(cache, "cache");
    need(slot, "slot");
    *slot = cache->cache.alloc(expected_len, stream == nullptr ? std::nullopt : std::optional<vattn::Stream>(*stream));
  });
}

vattn_status vattn_cache_alloc_block_on_stream(vattn_cache* cache, int64_t count, vattn_stream stream, int64_t* first) {
  return guarded([&] {
    need(cache, "cache");
    need(first, "first");
    *first = cache->cache.alloc_block(count, stream).front();
  });
}

vattn_status vattn_cache_free_on_stream(vattn_cache* cache, int64_t slot, vattn_stream stream) {
  return guarded([&] {
    need(cache, "cache");
    cache->cache.free(slot, stream);
  });
}

vattn_status vattn_cache_truncate_on_stream(vattn_cache* cache, int64_t slot, int64_t tokens, vattn_stream stream) {
  return guarded([&] {
    need(cache, "cache");
    cache->cache.truncate(slot, tokens, stream);
  });
}

vattn_status vattn_cache_step_on_stream(vattn_cache* cache, const int64_t* lengths, int64_t count, vattn_stream stream) {
  return guarded([&] {
    need(cache, "cache");
    cache->cache.step(vattn::span_of(lengths, count, "lengths"), stream);
  });
}

vattn_status vattn_cache_record_stream(vattn_cache* cache, vattn_stream stream) {
  return guarded([&] {
    need(cache, "cache");
    cache->cache.record_stream(stream);
  });
}

vattn_status vattn_cache_settle(vattn_cache* cache) {
  return guarded([&] {
    need(cache, "cache");
    cache->cache.settle();
  });
}

vattn_status vattn_cache_step(vattn_cache* cache, const int64_t* lengths, int64_t count) {
  return guarded([&] {
    need(cache, "cache");
    cache->cache.step(vattn::span_of(lengths, count, "lengths"));
  });
}

vattn_status vattn_cache_step_slots(vattn_cache* cache, const int64_t* slots, const int64_t* lengths, int64_t count) {
  return guarded([&] {
    need(cache, "cache");
    cache->cache.step(std::span<const vattn::SlotLength>(vattn::pairs_of(slots, lengths, count)));
  });
}

vattn_status vattn_cache_fits(vattn_cache* cache, const int64_t* slots, const int64_t* lengths, int64_t count, int32_t* fits) {
  return guarded([&] {
    need(cache, "cache");
    need(fits, "fits");
    *fits = cache->cache.fits(std::span<const vattn::SlotLength>(vattn::pairs_of(slots, lengths, count))) ? 1 : 0;
  });
}

vattn_status vattn_cache_truncate(vattn_cache* cache, int64_t slot, int64_t tokens) {
  return guarded([&] {
    need(cache, "cache");
    cache->cache.truncate(slot, tokens);
  });
}

vattn_status vattn_cache_seq_len(vattn_cache* cache, int64_t slot, int64_t* tokens) {
  return guarded([&] {
    need(cache, "cache");
    need(tokens, "tokens");
    *tokens = cache->cache.seq_len(slot);
  });
}

vattn_status vattn_cache_committed_len(vattn_cache* cache, int64_t slot, int64_t* tokens) {
  return guarded([&] {
    need(cache, "cache");
    need(tokens, "tokens");
    *tokens = cache->cache.committed_len(slot);
  });
}

vattn_status vattn_cache_view(vattn_cache* cache, int64_t layer, int64_t slot, vattn_view* k, vattn_view* v) {
  return guarded([&] {
    need(cache, "cache");
    need(k, "k");
    need(v, "v");
    vattn::hand_out(cache->cache.view(layer, slot), k, v);
  });
}

vattn_status vattn_cache_batch(vattn_cache* cache, int64_t layer, const int64_t* slots, int64_t count, int64_t length,
                               vattn_view* k, vattn_view* v) {
  return guarded([&] {
    need(cache, "cache");
    need(k, "k");
    need(v, "v");
    vattn::hand_out(cache->cache.batch(layer, vattn::span_of(slots, count, "slots"), length), k, v);
  });
}

vattn_status vattn_cache_layer(vattn_cache* cache, int64_t layer, vattn_view* k, vattn_view* v) {
  return guarded([&] {
    need(cache, "cache");
    need(k, "k");
    need(v, "v");
    vattn::hand_out(cache->cache.layer(layer), k, v);
  });
}

vattn_status vattn_cache_write(vattn_cache* cache, int64_t layer, const int64_t* slots, const int64_t* positions, int64_t count,
                               const void* k, const void* v) {
  return guarded([&] {
    need(cache, "cache");
    cache->cache.write(layer, vattn::span_of(slots, count, "slots"), vattn::span_of(positions, count, "positions"),
                       reinterpret_cast<vattn::Address>(k), reinterpret_cast<vattn::Address>(v));
  });
}

vattn_status vattn_cache_memory_limit(vattn_cache* cache, uint64_t* bytes) {
  return guarded([&] {
    need(cache, "cache");
    need(bytes, "bytes");
    *bytes = cache->cache.memory_limit();
  });
}

vattn_status vattn_cache_set_memory_limit(vattn_cache* cache, int64_t bytes) {
  return guarded([&] {
    need(cache, "cache");
    cache->cache.set_memory_limit(bytes);
  });
}

vattn_status vattn_cache_stats(vattn_cache* cache, vattn_stats* stats) {
  return guarded([&] {
    need(cache, "cache");
    need(stats, "stats");
    const vattn::CacheStats from = cache->cache.stats();
    *stats = {from.reserved_bytes, from.created_bytes, from.mapped_bytes,    from.pooled_bytes,      from.retired_bytes,
              from.limit_bytes,    from.used_bytes,    from.available_bytes, from.reclaimable_bytes, from.active_slots,
              from.warm_slots,     from.driver_calls,  from.pages_created,   from.pages_reused,      from.map_wait_ns,
              from.warm_bytes,     from.prompts,       from.warm_prompts,    from.reused_prompts,    from.steps_waited};
  });
}

vattn_status vattn_cache_page_size(vattn_cache* cache, int64_t* bytes) {
  return guarded([&] {
    need(cache, "cache");
    need(bytes, "bytes");
    *bytes = cache->cache.geometry().page_size();
  });
}

vattn_status vattn_cache_tokens_per_page(vattn_cache* cache, int64_t* tokens) {
  return guarded([&] {
    need(cache, "cache");
    need(tokens, "tokens");
    *tokens = cache->cache.geometry().tokens_per_page();
  });
}

vattn_status vattn_pool_create(const char* device, int64_t page_size, int64_t memory_limit, vattn_pool** pool) {
  return guarded([&] {
    need(pool, "pool");
    *pool = new vattn_pool{vattn::PagePool::make(vattn::parse_device_or_cpu(device), vattn::unless_zero(memory_limit),
                                                 vattn::unless_zero(page_size))};
  });
}

void vattn_pool_destroy(vattn_pool* pool) { delete pool; }

vattn_status vattn_pool_close(vattn_pool* pool) {
  return guarded([&] {
    need(pool, "pool");
    pool->pool->close();
  });
}

vattn_status vattn_pool_memory_limit(vattn_pool* pool, uint64_t* bytes) {
  return guarded([&] {
    need(pool, "pool");
    need(bytes, "bytes");
    *bytes = pool->pool->memory_limit();
  });
}

vattn_status vattn_pool_set_memory_limit(vattn_pool* pool, int64_t bytes) {
  return guarded([&] {
    need(pool, "pool");
    pool->pool->set_memory_limit(bytes);
  });
}

vattn_status vattn_pool_page_size(vattn_pool* pool, int64_t* bytes) {
  return guarded([&] {
    need(pool, "pool");
    need(bytes, "bytes");
    *bytes = static_cast<int64_t>(pool->pool->page_size());
  });
}

vattn_status vattn_pool_stats_now(vattn_pool* pool, vattn_pool_stats* stats) {
  return guarded([&] {
    need(pool, "pool");
    need(stats, "stats");
    const vattn::PoolStats from = pool->pool->stats();
    *stats = {from.created_bytes, from.mapped_bytes,    from.pooled_bytes,      from.retired_bytes,
              from.limit_bytes,   from.available_bytes, from.reclaimable_bytes, from.members.size()};
  });
}

vattn_status vattn_tensor_create_in_pool(const int64_t* row_shape, int32_t row_ndim, int64_t max_rows, const char* dtype,
                                         vattn_pool* pool, vattn_tensor** tensor) {
  return guarded([&] {
    need(pool, "pool");
    need(tensor, "tensor");
    vattn::GrowableTensor::Config config;
    const auto shape = vattn::span_of(row_shape, row_ndim, "row_shape");
    config.row_shape.assign(shape.begin(), shape.end());
    config.max_rows = max_rows;
    config.dtype = vattn::parse_dtype(dtype);
    *tensor = new vattn_tensor{vattn::GrowableTensor(config, pool->pool)};
  });
}

vattn_status vattn_tensor_create(const int64_t* row_shape, int32_t row_ndim, int64_t max_rows, const char* dtype,
                                 const char* device, int64_t page_size, int64_t memory_limit, vattn_tensor** tensor) {
  return guarded([&] {
    need(tensor, "tensor");
    vattn::GrowableTensor::Config config;
    const auto shape = vattn::span_of(row_shape, row_ndim, "row_shape");
    config.row_shape.assign(shape.begin(), shape.end());
    config.max_rows = max_rows;
    config.dtype = vattn::parse_dtype(dtype);
    config.page_size = vattn::unless_zero(page_size);
    config.memory_limit = vattn::unless_zero(memory_limit);
    *tensor = new vattn_tensor{vattn::GrowableTensor(config, vattn::parse_device_or_cpu(device))};
  });
}

void vattn_tensor_destroy(vattn_tensor* tensor) { delete tensor; }

vattn_status vattn_tensor_resize(vattn_tensor* tensor, int64_t rows) {
  return guarded([&] {
    need(tensor, "tensor");
    tensor->tensor.resize(rows);
  });
}

vattn_status vattn_tensor_append(vattn_tensor* tensor, const void* rows, int64_t count) {
  return guarded([&] {
    need(tensor, "tensor");
    tensor->tensor.append(reinterpret_cast<vattn::Address>(rows), count);
  });
}

vattn_status vattn_tensor_close(vattn_tensor* tensor) {
  return guarded([&] {
    need(tensor, "tensor");
    tensor->tensor.close();
  });
}

vattn_status vattn_tensor_rows(vattn_tensor* tensor, int64_t* rows) {
  return guarded([&] {
    need(tensor, "tensor");
    need(rows, "rows");
    *rows = tensor->tensor.rows();
  });
}

vattn_status vattn_tensor_data(vattn_tensor* tensor, void** data) {
  return guarded([&] {
    need(tensor, "tensor");
    need(data, "data");
    const auto view = tensor->tensor.view();
    *data = view.device == vattn::TensorDevice::kMeta ? nullptr : reinterpret_cast<void*>(view.address);
  });
}

vattn_status vattn_tensor_mapped_bytes(vattn_tensor* tensor, uint64_t* bytes) {
  return guarded([&] {
    need(tensor, "tensor");
    need(bytes, "bytes");
    *bytes = tensor->tensor.mapped_bytes();
  });
}
