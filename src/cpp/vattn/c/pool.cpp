// The C interface's pools and growable tensors: one line a function, each a call of PagePool or GrowableTensor.
#include "vattn/c/call.hpp"

namespace {

using vattn::GrowableTensor;
using vattn::c::guarded;
using vattn::c::on;
using SharedPool = std::shared_ptr<vattn::PagePool>;

GrowableTensor::Config convert(const int64_t* row_shape, int32_t row_ndim, int64_t max_rows, const char* dtype) {
  GrowableTensor::Config config;
  const auto shape = vattn::c::span_of(row_shape, row_ndim, "row_shape");
  config.row_shape.assign(shape.begin(), shape.end());
  config.max_rows = max_rows;
  config.dtype = vattn::c::parse_dtype(dtype);
  return config;
}

}  // namespace

vattn_status vattn_pool_create(const char* device, int64_t page_size, int64_t memory_limit, vattn_pool** pool) {
  return guarded([&] {
    vattn::c::need(pool, "pool");
    *pool = new vattn_pool{vattn::PagePool::make(vattn::c::parse_device_or_cpu(device), vattn::c::unless_zero(memory_limit),
                                                 vattn::c::unless_zero(page_size))};
  });
}

void vattn_pool_destroy(vattn_pool* pool) { delete pool; }

vattn_status vattn_pool_close(vattn_pool* pool) {
  return on(pool, [](const SharedPool& it) { it->close(); });
}

vattn_status vattn_pool_memory_limit(vattn_pool* pool, uint64_t* bytes) {
  return on(pool, bytes, "bytes", [](const SharedPool& it) { return it->memory_limit(); });
}

vattn_status vattn_pool_set_memory_limit(vattn_pool* pool, int64_t bytes) {
  return on(pool, [&](const SharedPool& it) { it->set_memory_limit(bytes); });
}

vattn_status vattn_pool_page_size(vattn_pool* pool, int64_t* bytes) {
  return on(pool, bytes, "bytes", [](const SharedPool& it) { return it->page_size(); });
}

vattn_status vattn_pool_stats_now(vattn_pool* pool, vattn_pool_stats* stats) {
  return on(pool, [&](const SharedPool& it) {
    vattn::c::need_struct(stats, "stats", "vattn_pool_stats");
    const vattn::PoolStats from = it->stats();
    *stats = {sizeof *stats,    from.created_bytes,   from.mapped_bytes,      from.pooled_bytes,  from.retired_bytes,
              from.limit_bytes, from.available_bytes, from.reclaimable_bytes, from.members.size()};
  });
}

vattn_status vattn_tensor_create_in_pool(const int64_t* row_shape, int32_t row_ndim, int64_t max_rows, const char* dtype,
                                         vattn_pool* pool, vattn_tensor** tensor) {
  return on(pool, [&](const SharedPool& it) {
    vattn::c::need(tensor, "tensor");
    *tensor = new vattn_tensor{GrowableTensor(convert(row_shape, row_ndim, max_rows, dtype), it)};
  });
}

vattn_status vattn_tensor_create(const int64_t* row_shape, int32_t row_ndim, int64_t max_rows, const char* dtype,
                                 const char* device, int64_t page_size, int64_t memory_limit, vattn_tensor** tensor) {
  return guarded([&] {
    vattn::c::need(tensor, "tensor");
    GrowableTensor::Config config = convert(row_shape, row_ndim, max_rows, dtype);
    config.page_size = vattn::c::unless_zero(page_size);
    config.memory_limit = vattn::c::unless_zero(memory_limit);
    *tensor = new vattn_tensor{GrowableTensor(config, vattn::c::parse_device_or_cpu(device))};
  });
}

void vattn_tensor_destroy(vattn_tensor* tensor) { delete tensor; }

vattn_status vattn_tensor_resize(vattn_tensor* tensor, int64_t rows) {
  return on(tensor, [&](GrowableTensor& it) { it.resize(rows); });
}

vattn_status vattn_tensor_append(vattn_tensor* tensor, const void* rows, int64_t count) {
  return on(tensor, [&](GrowableTensor& it) { it.append(reinterpret_cast<vattn::Address>(rows), count); });
}

vattn_status vattn_tensor_close(vattn_tensor* tensor) {
  return on(tensor, [](GrowableTensor& it) { it.close(); });
}

vattn_status vattn_tensor_rows(vattn_tensor* tensor, int64_t* rows) {
  return on(tensor, rows, "rows", [](GrowableTensor& it) { return it.rows(); });
}

vattn_status vattn_tensor_data(vattn_tensor* tensor, void** data) {
  return on(tensor, data, "data", [](GrowableTensor& it) {
    const auto view = it.view();
    return view.device == vattn::TensorDevice::kMeta ? nullptr : reinterpret_cast<void*>(view.address);
  });
}

vattn_status vattn_tensor_mapped_bytes(vattn_tensor* tensor, uint64_t* bytes) {
  return on(tensor, bytes, "bytes", [](GrowableTensor& it) { return it.mapped_bytes(); });
}
