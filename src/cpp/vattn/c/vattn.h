/* vattn's C interface: opaque handles and status codes, for any language that can call C.
 *
 * Every function returns a status (0: done) and writes its result through a pointer; on failure nothing changed, the result is
 * untouched, and vattn_last_error() has the message of this thread's last failure. A handle may be used by any thread; destroy
 * it once. NULL handles and result pointers are VATTN_INVALID_ARGUMENT. Sizes are bytes, lengths are tokens, strides elements.
 */
#ifndef VATTN_H
#define VATTN_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define VATTN_C_API __attribute__((visibility("default")))

typedef int32_t vattn_status;
enum {
  VATTN_OK = 0,
  VATTN_INVALID_ARGUMENT = 1, /* a value; in Python a ValueError */
  VATTN_OUT_OF_RANGE = 2,     /* an index; IndexError */
  VATTN_OVERFLOW = 3,         /* a product that leaves 64 bits; OverflowError */
  VATTN_OUT_OF_MEMORY = 4,
  VATTN_NO_FREE_SLOT = 5,
  VATTN_DRIVER_ERROR = 6,
  VATTN_CLOSED = 7,
  VATTN_IN_USE = 8,
  VATTN_ERROR = 9, /* anything else */
};

typedef struct vattn_cache vattn_cache;
typedef struct vattn_tensor vattn_tensor;
typedef struct vattn_pool vattn_pool;

/* A CUstream or cudaStream_t, as a number; 0 is the default stream. Streams matter on cuda only. */
typedef uint64_t vattn_stream;

/* What a cache shall be. Call vattn_cache_config_init first; 0 and NULL then mean the default. */
typedef struct vattn_cache_config {
  int64_t num_layers;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t max_batch_size;
  int64_t max_seq_len;
  const char* dtype;         /* torch's name: "bfloat16" */
  const char* device;        /* "cpu", "cuda:0", "meta"; NULL: "cpu" */
  int64_t v_head_dim;        /* -1: as head_dim (the default); 0: keys only */
  int64_t layers_per_tensor; /* 0: 1 on the cpu; elsewhere as many as leave a page at most 64 tokens of every tensor */
  const char* layout;        /* "NHD" or "HND"; NULL: chosen */
  int64_t page_size;
  int64_t memory_limit;
  const char* unmapped_reads; /* "fault" or "zeros"; NULL: chosen */
  int64_t guard_tokens;
  int32_t scrub;
  int64_t lookahead_tokens; /* how far a thread maps ahead of every slot in use; -1: chosen (the default); 0: no thread */
  int64_t warm_tokens;      /* how far it keeps one free slot mapped; -1: a page in every tensor (the default); 0: not at all */
  vattn_pool* pool;         /* a budget shared with others, which sets device, page_size and memory_limit; NULL: its own */
} vattn_cache_config;

/* A strided view. `data` stays valid while the cache is open. */
typedef struct vattn_view {
  void* data; /* NULL on meta, and for V in a cache of keys only */
  int32_t ndim;
  int64_t shape[4];
  int64_t strides[4];
} vattn_view;

typedef struct vattn_stats {
  uint64_t reserved_bytes;
  uint64_t created_bytes; /* always mapped + pooled + retired */
  uint64_t mapped_bytes;
  uint64_t pooled_bytes;
  uint64_t retired_bytes;
  uint64_t limit_bytes;
  uint64_t used_bytes;
  uint64_t available_bytes;
  uint64_t reclaimable_bytes;
  uint64_t active_slots;
  uint64_t warm_slots;
  uint64_t driver_calls;
  uint64_t pages_created;
  uint64_t pages_reused;
  uint64_t map_wait_ns;
  uint64_t warm_bytes;     /* of the reclaimable ones: in free slots */
  uint64_t prompts;        /* first steps of a request */
  uint64_t warm_prompts;   /* of these, found all their memory mapped */
  uint64_t reused_prompts; /* had no page created for them */
  uint64_t steps_waited;   /* steps, of prompts or not, that had to wait for a page */
} vattn_stats;

typedef struct vattn_pool_stats {
  uint64_t created_bytes; /* always mapped + pooled + retired */
  uint64_t mapped_bytes;
  uint64_t pooled_bytes;
  uint64_t retired_bytes;
  uint64_t limit_bytes;
  uint64_t available_bytes;
  uint64_t reclaimable_bytes;
  uint64_t members; /* open caches and tensors */
} vattn_pool_stats;

/* "0.1.0" */
VATTN_C_API const char* vattn_version(void);
/* The message of this thread's last failure; "" before the first. Valid until this thread's next call. */
VATTN_C_API const char* vattn_last_error(void);

VATTN_C_API void vattn_cache_config_init(vattn_cache_config* config);
VATTN_C_API vattn_status vattn_cache_create(const vattn_cache_config* config, vattn_cache** cache);
/* Closes and frees; NULL is fine. Views of the cache are invalid afterwards. */
VATTN_C_API void vattn_cache_destroy(vattn_cache* cache);
VATTN_C_API vattn_status vattn_cache_close(vattn_cache* cache);

VATTN_C_API vattn_status vattn_cache_alloc(vattn_cache* cache, int64_t* slot);
/* `count` neighbours: *first, *first + 1, ... */
VATTN_C_API vattn_status vattn_cache_alloc_block(vattn_cache* cache, int64_t count, int64_t* first);
/* Its memory stays mapped, for the next request or for whoever needs it. */
VATTN_C_API vattn_status vattn_cache_free(vattn_cache* cache, int64_t slot);

/* The same for callers that have streams: the work on `stream` comes next (alloc), or used the slot (free, truncate), and its
 * memory is taken away only when that work has finished. Without a stream, and without vattn_cache_record_stream, free and
 * truncate wait for the device instead. While the stream is being captured into a graph free, truncate and a step that grows
 * are VATTN_ERROR. */
VATTN_C_API vattn_status vattn_cache_alloc_on_stream(vattn_cache* cache, vattn_stream stream, int64_t* slot);
VATTN_C_API vattn_status vattn_cache_alloc_block_on_stream(vattn_cache* cache, int64_t count, vattn_stream stream,
                                                           int64_t* first);
VATTN_C_API vattn_status vattn_cache_free_on_stream(vattn_cache* cache, int64_t slot, vattn_stream stream);
VATTN_C_API vattn_status vattn_cache_truncate_on_stream(vattn_cache* cache, int64_t slot, int64_t tokens, vattn_stream stream);
VATTN_C_API vattn_status vattn_cache_step_on_stream(vattn_cache* cache, const int64_t* lengths, int64_t count,
                                                    vattn_stream stream);
/* The free slot that fits a request of so many tokens best. `stream` may be NULL. */
VATTN_C_API vattn_status vattn_cache_alloc_for(vattn_cache* cache, int64_t expected_len, const vattn_stream* stream,
                                               int64_t* slot);
/* The stream uses this cache too: what is given up from now on waits for its work as well. */
VATTN_C_API vattn_status vattn_cache_record_stream(vattn_cache* cache, vattn_stream stream);
/* Waits until the look-ahead thread has mapped what it can for now; at once where there is none. */
VATTN_C_API vattn_status vattn_cache_settle(vattn_cache* cache);

/* One length a slot, max_batch_size of them; 0 leaves a slot alone. All or nothing. */
VATTN_C_API vattn_status vattn_cache_step(vattn_cache* cache, const int64_t* lengths, int64_t count);
/* Only the slots named: slots[i] shall have lengths[i] tokens. */
VATTN_C_API vattn_status vattn_cache_step_slots(vattn_cache* cache, const int64_t* slots, const int64_t* lengths,
                                                int64_t count);
VATTN_C_API vattn_status vattn_cache_fits(vattn_cache* cache, const int64_t* slots, const int64_t* lengths, int64_t count,
                                          int32_t* fits);
VATTN_C_API vattn_status vattn_cache_truncate(vattn_cache* cache, int64_t slot, int64_t tokens);
VATTN_C_API vattn_status vattn_cache_seq_len(vattn_cache* cache, int64_t slot, int64_t* tokens);
VATTN_C_API vattn_status vattn_cache_committed_len(vattn_cache* cache, int64_t slot, int64_t* tokens);

/* (tokens, heads, dim) */
VATTN_C_API vattn_status vattn_cache_view(vattn_cache* cache, int64_t layer, int64_t slot, vattn_view* k, vattn_view* v);
/* (slots, length, heads, dim) of equally spaced ascending slots */
VATTN_C_API vattn_status vattn_cache_batch(vattn_cache* cache, int64_t layer, const int64_t* slots, int64_t count,
                                           int64_t length, vattn_view* k, vattn_view* v);
/* (max_batch_size, max_seq_len, heads, dim): memory or not */
VATTN_C_API vattn_status vattn_cache_layer(vattn_cache* cache, int64_t layer, vattn_view* k, vattn_view* v);
/* Entry i goes to positions[i] of slots[i]; k and v are dense (count, heads, dim) on the cache's device. */
VATTN_C_API vattn_status vattn_cache_write(vattn_cache* cache, int64_t layer, const int64_t* slots, const int64_t* positions,
                                           int64_t count, const void* k, const void* v);

VATTN_C_API vattn_status vattn_cache_memory_limit(vattn_cache* cache, uint64_t* bytes);
VATTN_C_API vattn_status vattn_cache_set_memory_limit(vattn_cache* cache, int64_t bytes);
VATTN_C_API vattn_status vattn_cache_stats(vattn_cache* cache, vattn_stats* stats);
VATTN_C_API vattn_status vattn_cache_page_size(vattn_cache* cache, int64_t* bytes);
VATTN_C_API vattn_status vattn_cache_tokens_per_page(vattn_cache* cache, int64_t* tokens);

/* One budget for several caches and growable tensors of a device. page_size and memory_limit: 0 for the default. */
VATTN_C_API vattn_status vattn_pool_create(const char* device, int64_t page_size, int64_t memory_limit, vattn_pool** pool);
/* Lets go of it; what was made in it goes on. NULL is fine. */
VATTN_C_API void vattn_pool_destroy(vattn_pool* pool);
/* Gives every page back. VATTN_IN_USE, and nothing changed, while it has members: the message names them. */
VATTN_C_API vattn_status vattn_pool_close(vattn_pool* pool);
VATTN_C_API vattn_status vattn_pool_memory_limit(vattn_pool* pool, uint64_t* bytes);
VATTN_C_API vattn_status vattn_pool_set_memory_limit(vattn_pool* pool, int64_t bytes);
VATTN_C_API vattn_status vattn_pool_page_size(vattn_pool* pool, int64_t* bytes);
VATTN_C_API vattn_status vattn_pool_stats_now(vattn_pool* pool, vattn_pool_stats* stats);

/* A growable tensor: max_rows rows of shape row_shape[0..row_ndim). page_size and memory_limit: 0 for the default. */
VATTN_C_API vattn_status vattn_tensor_create(const int64_t* row_shape, int32_t row_ndim, int64_t max_rows, const char* dtype,
                                             const char* device, int64_t page_size, int64_t memory_limit,
                                             vattn_tensor** tensor);
/* In a pool, which sets the device, the page size and the limit. */
VATTN_C_API vattn_status vattn_tensor_create_in_pool(const int64_t* row_shape, int32_t row_ndim, int64_t max_rows,
                                                     const char* dtype, vattn_pool* pool, vattn_tensor** tensor);
VATTN_C_API void vattn_tensor_destroy(vattn_tensor* tensor);
VATTN_C_API vattn_status vattn_tensor_resize(vattn_tensor* tensor, int64_t rows);
/* Copies `count` dense rows on the tensor's device behind the last one. */
VATTN_C_API vattn_status vattn_tensor_append(vattn_tensor* tensor, const void* rows, int64_t count);
VATTN_C_API vattn_status vattn_tensor_close(vattn_tensor* tensor);
VATTN_C_API vattn_status vattn_tensor_rows(vattn_tensor* tensor, int64_t* rows);
/* The first element of row 0; the same for the tensor's whole life. NULL on meta. */
VATTN_C_API vattn_status vattn_tensor_data(vattn_tensor* tensor, void** data);
VATTN_C_API vattn_status vattn_tensor_mapped_bytes(vattn_tensor* tensor, uint64_t* bytes);

#ifdef __cplusplus
}
#endif

#endif /* VATTN_H */
