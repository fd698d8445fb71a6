/* vattn's C interface: opaque handles and status codes, for any language that can call C.
 *
 * Every function returns a status (0: done) and writes its result through a pointer; on failure nothing changed, the result is
 * untouched, and vattn_last_error() has the message of this thread's last failure. A handle may be used by any thread; destroy
 * it once. NULL handles and result pointers are VATTN_INVALID_ARGUMENT. Sizes are bytes, lengths are tokens, strides elements.
 *
 * Structs. Each begins with its size, by which the library knows which vattn.h the program was compiled with: call VATTN_INIT
 * on every one before its first use. The size must be the library's own. Another one, of an older or of a newer header, or 0,
 * is VATTN_INVALID_ARGUMENT: the message says which it is, and nothing is read or written beyond the size itself.
 *
 * Defaults. 0 or NULL in a field of a config means the default, so a zeroed config is one of defaults; VATTN_NONE means none in
 * those fields where none can be asked for.
 *
 * This header is C99, and C++98.
 */
#ifndef VATTN_H
#define VATTN_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

#define VATTN_C_API __attribute__((visibility("default")))

/* Makes a struct of this header ready for use: all of it 0, but for its size. `pointer` is evaluated more than once. */
#define VATTN_INIT(pointer) ((void)(memset((pointer), 0, sizeof *(pointer)), (pointer)->struct_size = sizeof *(pointer)))

/* None, in a field of a config where 0 means the default. */
#define VATTN_NONE (-1)

/* Dimensions that a view can have. */
#define VATTN_MAX_DIMS 8

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
  VATTN_ERROR = 9 /* anything else */
};

/* Where a tensor lives. */
enum { VATTN_CPU = 0, VATTN_CUDA = 1, VATTN_META = 2 };

typedef struct vattn_cache vattn_cache;
typedef struct vattn_tensor vattn_tensor;
typedef struct vattn_pool vattn_pool;
typedef struct vattn_memory vattn_memory;

/* A CUstream or cudaStream_t, as a number; streams matter on cuda only. 0 is the legacy default stream, always: in a program
 * that was compiled with a default stream a thread (nvcc's --default-stream per-thread, CUDA_API_PER_THREAD_DEFAULT_STREAM) its
 * own 0 is another stream. There pass 2, which is CU_STREAM_PER_THREAD (1 is CU_STREAM_LEGACY). */
typedef uint64_t vattn_stream;

/* What a cache shall be. The first six fields have no default. */
typedef struct vattn_cache_config {
  size_t struct_size;
  int64_t num_layers;
  int64_t num_kv_heads;
  int64_t head_dim;
  int64_t max_batch_size;
  int64_t max_seq_len;
  const char* dtype;          /* torch's name: "bfloat16" */
  const char* device;         /* "cpu", "cuda:0", "meta"; NULL: "cpu" */
  int64_t v_head_dim;         /* 0: as head_dim; VATTN_NONE: keys only */
  int64_t layers_per_tensor;  /* 0: 1 on the cpu; elsewhere as many as leave a page at most 64 tokens of every tensor */
  const char* layout;         /* "NHD" or "HND"; NULL: chosen */
  int64_t page_size;          /* 0: the device's default */
  int64_t memory_limit;       /* 0: a share of what is free */
  const char* unmapped_reads; /* "fault" or "zeros"; NULL: chosen */
  int64_t guard_tokens;
  int64_t lookahead_tokens; /* how far a thread maps ahead of every slot in use; 0: chosen; VATTN_NONE: no thread */
  int64_t warm_tokens;      /* how far it keeps one free slot mapped; 0: a page in every tensor; VATTN_NONE: not at all */
  vattn_pool* pool;         /* a budget shared with others, which sets device, page_size and memory_limit; NULL: its own */
  int64_t scrub;            /* 1: a page is zeroed before another request can see it */
  int64_t dense;            /* 1: one layer a tensor, for kernels that need dense rows; refuses another layers_per_tensor */
} vattn_cache_config;

/* A strided view. `data` stays valid while its cache or tensor is open, and longer where vattn_view_retain() was called. */
typedef struct vattn_view {
  size_t struct_size;
  void* data;           /* NULL on meta, and for V in a cache of keys only */
  vattn_memory* owner;  /* NULL, or what vattn_view_retain() took */
  const char* dtype;    /* torch's name: "bfloat16"; a string of the library's */
  int32_t element_size; /* bytes */
  int32_t device_kind;  /* VATTN_CPU, VATTN_CUDA or VATTN_META */
  int32_t device_index;
  int32_t ndim;
  int64_t shape[VATTN_MAX_DIMS];
  int64_t strides[VATTN_MAX_DIMS];
} vattn_view;

typedef struct vattn_stats {
  size_t struct_size;
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
  size_t struct_size;
  uint64_t created_bytes; /* always mapped + pooled + retired */
  uint64_t mapped_bytes;
  uint64_t pooled_bytes;
  uint64_t retired_bytes;
  uint64_t limit_bytes;
  uint64_t available_bytes;
  uint64_t reclaimable_bytes;
  uint64_t members; /* open caches and tensors */
} vattn_pool_stats;

/* What this thread's last failure carried. The strings are the library's: valid until this thread's next failure. */
typedef struct vattn_error_info {
  size_t struct_size;
  vattn_status status;          /* VATTN_OK before the first failure */
  int32_t driver_code;          /* VATTN_DRIVER_ERROR: a CUresult, or errno on the host */
  const char* message;          /* as vattn_last_error() */
  const char* driver_call;      /* VATTN_DRIVER_ERROR: "cuMemMap", "fallocate", ...; else "" */
  const char* driver_code_name; /* VATTN_DRIVER_ERROR: "CUDA_ERROR_INVALID_VALUE", "ENOMEM", ...; else "" */
  uint64_t needed_bytes;        /* VATTN_OUT_OF_MEMORY: what the call had to create */
  uint64_t available_bytes;     /* VATTN_OUT_OF_MEMORY: what it could have had */
  uint64_t limit_bytes;         /* VATTN_OUT_OF_MEMORY: the bound that said no */
  /* VATTN_OUT_OF_MEMORY: what the call could have besides, once all others gave their memory up. Waiting for them can help
   * where needed_bytes is not 0 and at most available_bytes + held_by_others_bytes. */
  uint64_t held_by_others_bytes;
} vattn_error_info;

/* "0.1.0" */
VATTN_C_API const char* vattn_version(void);
/* The message of this thread's last failure; "" before the first. Valid until this thread's next failure. */
VATTN_C_API const char* vattn_last_error(void);
/* All of it. A refused `info` is a failure as any other, and then the last one. */
VATTN_C_API vattn_status vattn_last_error_info(vattn_error_info* info);

VATTN_C_API vattn_status vattn_cache_create(const vattn_cache_config* config, vattn_cache** cache);
/* Closes and frees; NULL is fine. Views of the cache that were not retained are invalid afterwards. */
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
/* The same with requests that have no slot yet, of fresh[0..fresh_count) tokens, which need a free slot each. */
VATTN_C_API vattn_status vattn_cache_fits_new(vattn_cache* cache, const int64_t* slots, const int64_t* lengths, int64_t count,
                                              const int64_t* fresh, int64_t fresh_count, int32_t* fits);
VATTN_C_API vattn_status vattn_cache_truncate(vattn_cache* cache, int64_t slot, int64_t tokens);
VATTN_C_API vattn_status vattn_cache_seq_len(vattn_cache* cache, int64_t slot, int64_t* tokens);
VATTN_C_API vattn_status vattn_cache_committed_len(vattn_cache* cache, int64_t slot, int64_t* tokens);
/* Bytes of memory that are this slot's alone: what the budget has more of when the slot is freed. */
VATTN_C_API vattn_status vattn_cache_slot_bytes(vattn_cache* cache, int64_t slot, uint64_t* bytes);

/* Views, into structs that VATTN_INIT made ready and that keep no memory: release those first.
 * (tokens, heads, dim) */
VATTN_C_API vattn_status vattn_cache_view(vattn_cache* cache, int64_t layer, int64_t slot, vattn_view* k, vattn_view* v);
/* (slots, length, heads, dim) of equally spaced ascending slots */
VATTN_C_API vattn_status vattn_cache_batch(vattn_cache* cache, int64_t layer, const int64_t* slots, int64_t count,
                                           int64_t length, vattn_view* k, vattn_view* v);
/* (max_batch_size, max_seq_len, heads, dim): memory or not */
VATTN_C_API vattn_status vattn_cache_layer(vattn_cache* cache, int64_t layer, vattn_view* k, vattn_view* v);
/* Keeps the view's addresses and contents past its cache or tensor, as views in C++ and Python do: sets `owner`. Call it while
 * they are open: of memory that has gone it is VATTN_INVALID_ARGUMENT. A view without memory (on meta, V of keys only) needs
 * none, and its owner stays NULL. */
VATTN_C_API vattn_status vattn_view_retain(vattn_view* view);
/* Lets go of what vattn_view_retain() took, once for each; the view is then without data. Without an owner, nothing is done. */
VATTN_C_API vattn_status vattn_view_release(vattn_view* view);

/* Entry i goes to positions[i] of slots[i]; k and v are dense (count, heads, dim) on the cache's device. */
VATTN_C_API vattn_status vattn_cache_write(vattn_cache* cache, int64_t layer, const int64_t* slots, const int64_t* positions,
                                           int64_t count, const void* k, const void* v);
/* A span an entry: its `tokens` tokens go to positions[i] and after; k and v are dense (count, tokens, heads, dim). */
VATTN_C_API vattn_status vattn_cache_write_spans(vattn_cache* cache, int64_t layer, const int64_t* slots,
                                                 const int64_t* positions, int64_t count, int64_t tokens, const void* k,
                                                 const void* v);

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
/* (rows, *row_shape); VATTN_INVALID_ARGUMENT where that is more than VATTN_MAX_DIMS. */
VATTN_C_API vattn_status vattn_tensor_view(vattn_tensor* tensor, vattn_view* view);
VATTN_C_API vattn_status vattn_tensor_mapped_bytes(vattn_tensor* tensor, uint64_t* bytes);

#ifdef __cplusplus
}
#endif

/* As VATTN_INIT, for a config; a function, and the header's own, since only the header knows the caller's size. */
static inline void vattn_cache_config_init(vattn_cache_config* config) {
  if (config) VATTN_INIT(config);
}

#endif /* VATTN_H */
