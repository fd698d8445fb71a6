// vattn._core.KVCache: the C++ class, argument for argument. vattn.KVCache wraps it.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings/bindings.hpp"

namespace {

using vattn::KVCache;
using Release = nb::call_guard<GilReleased>;
using Slots = std::vector<std::int64_t>;

template <typename T>
std::optional<T> one_of(const std::optional<std::string>& value, const char* parameter, const char* first, T if_first,
                        const char* second, T if_second) {
  if (!value) return std::nullopt;
  if (*value == first) return if_first;
  if (*value == second) return if_second;
  throw std::invalid_argument(std::string(parameter) + "=\"" + *value + "\" must be None, \"" + first + "\" or \"" + second +
                              "\"");
}

/// `pair` is the tuple's subclass that Python wants.
template <std::size_t Rank>
nb::any to_python(const vattn::KVView<Rank>& views, nb::handle pair) {
  return nb::borrow<nb::any>(to_pair(pair, to_torch(views.k), views.v ? to_torch(*views.v) : nb::none()));
}

using Ints = nb::typed<nb::list, nb::int_>;
using Stream = std::optional<vattn::Stream>;

bool step_with(KVCache& cache, const Lengths& lengths, Stream stream) {
  if (lengths.kind == Lengths::Kind::kUnknown) return false;
  if (lengths.kind == Lengths::Kind::kNamed) {
    const GilReleased release;
    cache.step(std::span<const vattn::SlotLength>(lengths.named), stream);
    return true;
  }
  // A copy, since the array is the caller's to write once the GIL is gone.
  const std::vector<std::int64_t> copy(lengths.sequence.values.begin(), lengths.sequence.values.end());
  const GilReleased release;
  cache.step(std::span<const std::int64_t>(copy), stream);
  return true;
}

/// False: Python's turn, which knows more forms and, on a device with streams, which one is current. It calls step_on.
bool step(KVCache& cache, nb::handle value) {
  const Lengths lengths = to_lengths(value);
  // The common step grows nothing and finds the lock free: done before the GIL could be released and taken again.
  if (lengths.kind == Lengths::Kind::kSequence && cache.try_step(lengths.sequence.values)) return true;
  if (cache.device().kind == vattn::Device::Kind::kCuda) return false;
  return step_with(cache, lengths, {});
}

/// False: not a form this file knows; Python turns it into one.
bool step_on(KVCache& cache, nb::handle value, Stream stream) { return step_with(cache, to_lengths(value), stream); }

nb::object fits(const KVCache& cache, nb::handle value, nb::handle fresh_value) {
  const Lengths lengths = to_lengths(value);
  Numbers fresh;
  if (lengths.kind == Lengths::Kind::kUnknown || !to_numbers(fresh_value, fresh)) return nb::none();
  bool result = false;
  {
    const std::vector<std::int64_t> copy(lengths.sequence.values.begin(), lengths.sequence.values.end());
    const std::vector<std::int64_t> fresh_copy(fresh.values.begin(), fresh.values.end());
    const GilReleased release;
    result = lengths.kind == Lengths::Kind::kSequence
                 ? cache.fits(std::span<const std::int64_t>(copy), fresh_copy)
                 : cache.fits(std::span<const vattn::SlotLength>(lengths.named), fresh_copy);
  }
  return nb::bool_(result);
}

nb::any view(const KVCache& cache, std::int64_t layer, std::int64_t slot, nb::handle pair) {
  return to_python(
      [&] {
        const GilReleased release;
        return cache.view(layer, slot);
      }(),
      pair);
}

nb::any batch(KVCache& cache, std::int64_t layer, const Slots& slots, std::int64_t length, nb::handle pair) {
  return to_python(
      [&] {
        const GilReleased release;
        return cache.batch(layer, slots, length);
      }(),
      pair);
}

nb::any layer(const KVCache& cache, std::int64_t index, nb::handle pair) {
  return to_python(
      [&] {
        const GilReleased release;
        return cache.layer(index);
      }(),
      pair);
}

nb::typed<nb::list, nb::any> views(const KVCache& cache, std::int64_t layer, const vattn::Rows& rows, nb::handle pair) {
  const auto all = [&] {
    const GilReleased release;
    return cache.views(layer, rows);
  }();
  nb::list list;
  for (const auto& views : all) list.append(to_python(views, pair));
  return list;
}

/// None: not a form this file knows.
nb::any rows(const KVCache& cache, nb::handle slots) {
  Numbers numbers;
  if (!to_numbers(slots, numbers)) return nb::borrow<nb::any>(nb::none());
  const std::vector<std::int64_t> copy(numbers.values.begin(), numbers.values.end());
  return nb::borrow<nb::any>(nb::cast([&] {
    const GilReleased release;
    return cache.rows(copy);
  }()));
}

/// The number, and of each slot where the added tokens start and stop.
nb::typed<nb::tuple, nb::int_, Ints, Ints> last_step(const KVCache& cache, const vattn::Rows& rows) {
  const vattn::LastStep last = [&] {
    const GilReleased release;
    return cache.last_step(rows);
  }();
  Slots starts;
  Slots stops;
  for (const vattn::TokenSpan& span : last.added) {
    starts.push_back(span.start);
    stops.push_back(span.stop);
  }
  return nb::make_tuple(last.number, nb::cast(starts), nb::cast(stops));
}

/// `entries` is the first extent of k. False: slots or positions are not a form this file knows.
bool write_tokens(KVCache& cache, std::int64_t layer, nb::handle slots, nb::handle positions, std::int64_t entries,
                  std::int64_t tokens, vattn::Address k, vattn::Address v) {
  Numbers slot_numbers;
  Numbers position_numbers;
  if (!to_numbers(slots, slot_numbers) || !to_numbers(positions, position_numbers)) return false;
  const std::vector<std::int64_t> slot_copy(slot_numbers.values.begin(), slot_numbers.values.end());
  const std::vector<std::int64_t> position_copy(position_numbers.values.begin(), position_numbers.values.end());
  if (slot_copy.size() == position_copy.size() && static_cast<std::int64_t>(slot_copy.size()) != entries) {
    throw std::invalid_argument("k has " + std::to_string(entries) + " entries, slots has " + std::to_string(slot_copy.size()) +
                                ": one entry a slot");
  }
  const GilReleased release;
  cache.write(layer, slot_copy, position_copy, k, v, tokens);
  return true;
}

/// In the order of vattn.Stats.
nb::typed<nb::tuple, nb::int_, nb::ellipsis> stats(const KVCache& cache) {
  vattn::CacheStats now;
  {
    const GilReleased release;
    now = cache.stats();
  }
  return nb::make_tuple(now.reserved_bytes, now.created_bytes, now.mapped_bytes, now.pooled_bytes, now.retired_bytes,
                        now.limit_bytes, now.used_bytes, now.available_bytes, now.reclaimable_bytes, now.active_slots,
                        now.warm_slots, now.driver_calls, now.pages_created, now.pages_reused, now.map_wait_ns, now.warm_bytes,
                        now.prompts, now.warm_prompts, now.reused_prompts, now.steps_waited);
}

}  // namespace

void bind_kv_cache(nb::module_& module) {
  nb::class_<vattn::Rows>(module, "Rows").def("slots", &vattn::Rows::slots);
  nb::class_<KVCache>(module, "KVCache")
      .def(
          "__init__",
          [](KVCache* self, std::int64_t num_layers, std::int64_t num_kv_heads, std::int64_t head_dim,
             std::int64_t max_batch_size, std::int64_t max_seq_len, const std::string& dtype, const std::string& device,
             std::optional<std::int64_t> v_head_dim, std::optional<std::int64_t> layers_per_tensor,
             const std::optional<std::string>& layout, std::optional<std::int64_t> page_size,
             std::optional<std::int64_t> memory_limit, const SharedPool* pool, std::optional<std::int64_t> lookahead_tokens,
             std::optional<std::int64_t> warm_tokens, const std::optional<std::string>& unmapped_reads,
             std::int64_t guard_tokens, bool scrub, bool dense) {
            vattn::CacheConfig config;
            config.num_layers = num_layers;
            config.num_kv_heads = num_kv_heads;
            config.head_dim = head_dim;
            config.max_batch_size = max_batch_size;
            config.max_seq_len = max_seq_len;
            config.dtype = dtype_of(dtype);
            config.v_head_dim = v_head_dim;
            config.layers_per_tensor = layers_per_tensor;
            config.layout = one_of(layout, "layout", "NHD", vattn::Layout::kNHD, "HND", vattn::Layout::kHND);
            config.page_size = page_size;
            config.memory_limit = memory_limit;
            config.unmapped_reads = one_of(unmapped_reads, "unmapped_reads", "fault", vattn::UnmappedReads::kFault, "zeros",
                                           vattn::UnmappedReads::kZeros);
            config.guard_tokens = guard_tokens;
            config.scrub = scrub;
            config.dense = dense;
            config.lookahead_tokens = lookahead_tokens;
            config.warm_tokens = warm_tokens;
            const GilReleased release;
            if (pool != nullptr) {
              new (self) KVCache(config, pool->pool);
            } else {
              new (self) KVCache(config, vattn::parse_device(device));
            }
          },
          nb::arg("num_layers"), nb::arg("num_kv_heads"), nb::arg("head_dim"), nb::kw_only(), nb::arg("max_batch_size"),
          nb::arg("max_seq_len"), nb::arg("dtype"), nb::arg("device"), nb::arg("v_head_dim").none(),
          nb::arg("layers_per_tensor").none(), nb::arg("layout").none(), nb::arg("page_size").none(),
          nb::arg("memory_limit").none(), nb::arg("pool").none(), nb::arg("lookahead_tokens").none(),
          nb::arg("warm_tokens").none(), nb::arg("unmapped_reads").none(), nb::arg("guard_tokens"), nb::arg("scrub"),
          nb::arg("dense"), nb::keep_alive<1, 14>())
      .def("alloc", &KVCache::alloc, nb::arg("expected_len").none(), nb::arg("stream").none(), Release())
      .def("alloc_batch", &KVCache::alloc_batch, nb::arg("n"), nb::arg("stream").none(), Release())
      .def("free", &KVCache::free, nb::arg("slot"), nb::arg("stream").none(), Release())
      .def("record_stream", &KVCache::record_stream, Release())
      .def("slots", &KVCache::slots, Release())
      .def("active_slots", &KVCache::active_slots, Release())
      .def("step", &step, nb::arg("lengths").none())
      .def("step_on", &step_on, nb::arg("lengths").none(), nb::arg("stream").none())
      .def("fits", &fits, nb::arg("lengths").none(), nb::arg("new").none())
      .def("truncate", &KVCache::truncate, nb::arg("slot"), nb::arg("n"), nb::arg("stream").none(), Release())
      .def("seq_len", &KVCache::seq_len, Release())
      .def("committed_len", &KVCache::committed_len, Release())
      .def("slot_bytes", &KVCache::slot_bytes, Release())
      .def("rows", &rows, nb::arg("slots").none())
      .def("last_step", &last_step)
      .def("changes", &KVCache::changes, Release())
      .def("view", &view)
      .def("views", &views)
      .def("batch", &batch)
      .def("layer", &layer)
      .def("write", &write_tokens, nb::arg("layer"), nb::arg("slots").none(), nb::arg("positions").none(), nb::arg("entries"),
           nb::arg("tokens"), nb::arg("k"), nb::arg("v"))
      .def(
          "write_rows",
          [](KVCache& cache, std::int64_t layer, const vattn::Rows& rows, std::int64_t tokens, vattn::Address k,
             vattn::Address v, std::optional<std::int64_t> each) { cache.write(layer, rows, tokens, k, v, each); },
          nb::arg("layer"), nb::arg("rows"), nb::arg("tokens"), nb::arg("k"), nb::arg("v"), nb::arg("each").none(), Release())
      .def("memory_limit", &KVCache::memory_limit, Release())
      .def("set_memory_limit", &KVCache::set_memory_limit, Release())
      .def("stats", &stats)
      .def("settle", &KVCache::settle, Release())
      .def("close", &KVCache::close, Release())
      .def("is_closed", &KVCache::is_closed, Release())
      .def("layout", [](const KVCache& cache) { return cache.geometry().layout() == vattn::Layout::kHND ? "HND" : "NHD"; })
      .def("name", &KVCache::name)
      .def("page_size", [](const KVCache& cache) { return cache.geometry().page_size(); })
      .def("lookahead_tokens", [](const KVCache& cache) { return cache.geometry().lookahead_tokens(); })
      .def("warm_tokens", [](const KVCache& cache) { return cache.geometry().warm_tokens(); })
      .def("layers_per_tensor", [](const KVCache& cache) { return cache.geometry().layers_per_tensor(); })
      .def("tokens_per_page", [](const KVCache& cache) { return cache.geometry().tokens_per_page(); });
}
