// The C interface's caches: one line a function, each a call of KVCache.
#include "vattn/c/call.hpp"

namespace {

using vattn::KVCache;
using vattn::c::on;
using vattn::c::span_of;

std::optional<vattn::Layout> parse_layout(const char* name) {
  if (name == nullptr) return std::nullopt;
  if (std::string_view(name) == "NHD") return vattn::Layout::kNHD;
  if (std::string_view(name) == "HND") return vattn::Layout::kHND;
  throw std::invalid_argument("layout=\"" + std::string(name) + "\" must be \"NHD\" or \"HND\"");
}

std::optional<vattn::UnmappedReads> parse_reads(const char* name) {
  if (name == nullptr) return std::nullopt;
  if (std::string_view(name) == "fault") return vattn::UnmappedReads::kFault;
  if (std::string_view(name) == "zeros") return vattn::UnmappedReads::kZeros;
  throw std::invalid_argument("unmapped_reads=\"" + std::string(name) + "\" must be \"fault\" or \"zeros\"");
}

/// 0 in C is the default, and none has a word of its own; in C++ the default is no value, and none is 0.
std::optional<std::int64_t> none_or_default(std::int64_t value) {
  if (value == VATTN_NONE) return 0;
  return vattn::c::unless_zero(value);
}

vattn::CacheConfig convert(const vattn_cache_config& from) {
  vattn::CacheConfig config;
  config.num_layers = from.num_layers;
  config.num_kv_heads = from.num_kv_heads;
  config.head_dim = from.head_dim;
  config.max_batch_size = from.max_batch_size;
  config.max_seq_len = from.max_seq_len;
  config.dtype = vattn::c::parse_dtype(from.dtype);
  config.v_head_dim = none_or_default(from.v_head_dim);
  if (from.layers_per_tensor != 0) config.layers_per_tensor = from.layers_per_tensor;
  config.layout = parse_layout(from.layout);
  config.page_size = vattn::c::unless_zero(from.page_size);
  config.memory_limit = vattn::c::unless_zero(from.memory_limit);
  config.unmapped_reads = parse_reads(from.unmapped_reads);
  config.guard_tokens = from.guard_tokens;
  config.scrub = from.scrub != 0;
  config.dense = from.dense != 0;
  config.lookahead_tokens = none_or_default(from.lookahead_tokens);
  config.warm_tokens = none_or_default(from.warm_tokens);
  return config;
}

void check_device(const char* name, const vattn::PagePool& pool) {
  if (name == nullptr || vattn::parse_device(name) == pool.device()) return;
  throw std::invalid_argument("device=\"" + std::string(name) + "\", but the pool is on \"" + to_string(pool.device()) +
                              "\": pass NULL, or another pool");
}

std::vector<vattn::SlotLength> pairs_of(const std::int64_t* slots, const std::int64_t* lengths, std::int64_t count) {
  const auto named = span_of(slots, count, "slots");
  const auto tokens = span_of(lengths, count, "lengths");
  std::vector<vattn::SlotLength> pairs;
  pairs.reserve(named.size());
  for (std::size_t i = 0; i < named.size(); ++i) pairs.push_back({named[i], tokens[i]});
  return pairs;
}

std::optional<vattn::Stream> stream_or_none(const vattn_stream* stream) {
  return stream == nullptr ? std::nullopt : std::optional<vattn::Stream>(*stream);
}

}  // namespace

vattn_status vattn_cache_create(const vattn_cache_config* config, vattn_cache** cache) {
  return vattn::c::guarded([&] {
    vattn::c::need_struct(config, "config", "vattn_cache_config");
    vattn::c::need(cache, "cache");
    const vattn::CacheConfig wanted = convert(*config);
    if (config->pool == nullptr) {
      *cache = new vattn_cache{KVCache(wanted, vattn::c::parse_device_or_cpu(config->device))};
      return;
    }
    check_device(config->device, *config->pool->object);
    *cache = new vattn_cache{KVCache(wanted, config->pool->object)};
  });
}

void vattn_cache_destroy(vattn_cache* cache) { delete cache; }

vattn_status vattn_cache_close(vattn_cache* cache) {
  return on(cache, [](KVCache& it) { it.close(); });
}

vattn_status vattn_cache_alloc(vattn_cache* cache, int64_t* slot) {
  return on(cache, slot, "slot", [](KVCache& it) { return it.alloc(); });
}

vattn_status vattn_cache_alloc_block(vattn_cache* cache, int64_t count, int64_t* first) {
  return on(cache, first, "first", [&](KVCache& it) { return it.alloc_block(count).front(); });
}

vattn_status vattn_cache_free(vattn_cache* cache, int64_t slot) {
  return on(cache, [&](KVCache& it) { it.free(slot); });
}

vattn_status vattn_cache_alloc_on_stream(vattn_cache* cache, vattn_stream stream, int64_t* slot) {
  return on(cache, slot, "slot", [&](KVCache& it) { return it.alloc({}, stream); });
}

vattn_status vattn_cache_alloc_for(vattn_cache* cache, int64_t expected_len, const vattn_stream* stream, int64_t* slot) {
  return on(cache, slot, "slot", [&](KVCache& it) { return it.alloc(expected_len, stream_or_none(stream)); });
}

vattn_status vattn_cache_alloc_block_on_stream(vattn_cache* cache, int64_t count, vattn_stream stream, int64_t* first) {
  return on(cache, first, "first", [&](KVCache& it) { return it.alloc_block(count, stream).front(); });
}

vattn_status vattn_cache_free_on_stream(vattn_cache* cache, int64_t slot, vattn_stream stream) {
  return on(cache, [&](KVCache& it) { it.free(slot, stream); });
}

vattn_status vattn_cache_truncate_on_stream(vattn_cache* cache, int64_t slot, int64_t tokens, vattn_stream stream) {
  return on(cache, [&](KVCache& it) { it.truncate(slot, tokens, stream); });
}

vattn_status vattn_cache_step_on_stream(vattn_cache* cache, const int64_t* lengths, int64_t count, vattn_stream stream) {
  return on(cache, [&](KVCache& it) { it.step(span_of(lengths, count, "lengths"), stream); });
}

vattn_status vattn_cache_record_stream(vattn_cache* cache, vattn_stream stream) {
  return on(cache, [&](KVCache& it) { it.record_stream(stream); });
}

vattn_status vattn_cache_settle(vattn_cache* cache) {
  return on(cache, [](KVCache& it) { it.settle(); });
}

vattn_status vattn_cache_step(vattn_cache* cache, const int64_t* lengths, int64_t count) {
  return on(cache, [&](KVCache& it) { it.step(span_of(lengths, count, "lengths")); });
}

vattn_status vattn_cache_step_slots(vattn_cache* cache, const int64_t* slots, const int64_t* lengths, int64_t count) {
  return on(cache, [&](KVCache& it) { it.step(std::span<const vattn::SlotLength>(pairs_of(slots, lengths, count))); });
}

vattn_status vattn_cache_fits(vattn_cache* cache, const int64_t* slots, const int64_t* lengths, int64_t count, int32_t* fits) {
  return on(cache, fits, "fits",
            [&](KVCache& it) { return it.fits(std::span<const vattn::SlotLength>(pairs_of(slots, lengths, count))) ? 1 : 0; });
}

vattn_status vattn_cache_fits_new(vattn_cache* cache, const int64_t* slots, const int64_t* lengths, int64_t count,
                                  const int64_t* fresh, int64_t fresh_count, int32_t* fits) {
  return on(cache, fits, "fits", [&](KVCache& it) {
    const auto named = pairs_of(slots, lengths, count);
    return it.fits(std::span<const vattn::SlotLength>(named), span_of(fresh, fresh_count, "fresh")) ? 1 : 0;
  });
}

vattn_status vattn_cache_truncate(vattn_cache* cache, int64_t slot, int64_t tokens) {
  return on(cache, [&](KVCache& it) { it.truncate(slot, tokens); });
}

vattn_status vattn_cache_seq_len(vattn_cache* cache, int64_t slot, int64_t* tokens) {
  return on(cache, tokens, "tokens", [&](KVCache& it) { return it.seq_len(slot); });
}

vattn_status vattn_cache_committed_len(vattn_cache* cache, int64_t slot, int64_t* tokens) {
  return on(cache, tokens, "tokens", [&](KVCache& it) { return it.committed_len(slot); });
}

vattn_status vattn_cache_slot_bytes(vattn_cache* cache, int64_t slot, uint64_t* bytes) {
  return on(cache, bytes, "bytes", [&](KVCache& it) { return it.slot_bytes(slot); });
}

vattn_status vattn_cache_write_spans(vattn_cache* cache, int64_t layer, const int64_t* slots, const int64_t* positions,
                                     int64_t count, int64_t tokens, const void* k, const void* v) {
  return on(cache, [&](KVCache& it) {
    it.write(layer, span_of(slots, count, "slots"), span_of(positions, count, "positions"), reinterpret_cast<vattn::Address>(k),
             reinterpret_cast<vattn::Address>(v), tokens);
  });
}

vattn_status vattn_cache_write(vattn_cache* cache, int64_t layer, const int64_t* slots, const int64_t* positions, int64_t count,
                               const void* k, const void* v) {
  return vattn_cache_write_spans(cache, layer, slots, positions, count, 1, k, v);
}

vattn_status vattn_cache_memory_limit(vattn_cache* cache, uint64_t* bytes) {
  return on(cache, bytes, "bytes", [](KVCache& it) { return it.memory_limit(); });
}

vattn_status vattn_cache_set_memory_limit(vattn_cache* cache, int64_t bytes) {
  return on(cache, [&](KVCache& it) { it.set_memory_limit(bytes); });
}

vattn_status vattn_cache_stats(vattn_cache* cache, vattn_stats* stats) {
  return on(cache, [&](KVCache& it) {
    vattn::c::need_struct(stats, "stats", "vattn_stats");
    const vattn::CacheStats from = it.stats();
    *stats = {sizeof *stats,      from.reserved_bytes, from.created_bytes, from.mapped_bytes,    from.pooled_bytes,
              from.retired_bytes, from.limit_bytes,    from.used_bytes,    from.available_bytes, from.reclaimable_bytes,
              from.active_slots,  from.warm_slots,     from.driver_calls,  from.pages_created,   from.pages_reused,
              from.map_wait_ns,   from.warm_bytes,     from.prompts,       from.warm_prompts,    from.reused_prompts,
              from.steps_waited};
  });
}

vattn_status vattn_cache_page_size(vattn_cache* cache, int64_t* bytes) {
  return on(cache, bytes, "bytes", [](KVCache& it) { return it.geometry().page_size(); });
}

vattn_status vattn_cache_tokens_per_page(vattn_cache* cache, int64_t* tokens) {
  return on(cache, tokens, "tokens", [](KVCache& it) { return it.geometry().tokens_per_page(); });
}
