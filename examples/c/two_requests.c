/* vattn from C: vattn.h alone, every status checked.
 *
 * Two requests grow in one cache; what is written through one view is read through another; a step beyond the budget is refused
 * and changes nothing, and says how much was missing; what one request leaves behind serves the next; a view that was retained
 * outlives its tensor; a cache and a tensor share one budget. Exit status 0: all as it should be. Thread: one.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vattn.h>

/* Ends the program with the message of the call that failed. */
static void check(vattn_status status, const char* call) {
  if (status == VATTN_OK) return;
  fprintf(stderr, "%s: status %d: %s\n", call, (int)status, vattn_last_error());
  exit(1);
}
#define CHECK(call) check(call, #call)

static void expect(int holds, const char* what) {
  if (holds) return;
  fprintf(stderr, "not true: %s\n", what);
  exit(1);
}
#define EXPECT(what) expect(what, #what)

static float* at(const vattn_view* view, int64_t token, int64_t head) {
  return (float*)view->data + token * view->strides[0] + head * view->strides[1];
}

static vattn_cache* make_cache(void) {
  vattn_cache_config config;
  vattn_cache* cache = NULL;
  VATTN_INIT(&config); /* every struct of vattn.h, before its first use; what is left at 0 is the default */
  config.num_layers = 2;
  config.num_kv_heads = 2;
  config.head_dim = 64;
  config.max_batch_size = 4;
  config.max_seq_len = 8192;
  config.dtype = "float32";
  config.device = "cpu";
  config.memory_limit = 4 << 20;
  CHECK(vattn_cache_create(&config, &cache));
  return cache;
}

static void two_requests(vattn_cache* cache) {
  int64_t slots[2], lengths[2] = {300, 40}, length = 0;
  int64_t too_many[2] = {301, 8192};
  const int64_t last = 39;
  float new_token[2 * 64];
  vattn_view k, v, again, ignored;
  vattn_stats stats;
  vattn_error_info refused;
  VATTN_INIT(&k);
  VATTN_INIT(&v);
  VATTN_INIT(&again);
  VATTN_INIT(&ignored);
  VATTN_INIT(&stats);
  VATTN_INIT(&refused);
  for (int i = 0; i < 128; ++i) new_token[i] = (float)i;
  CHECK(vattn_cache_alloc(cache, &slots[0]));
  CHECK(vattn_cache_alloc(cache, &slots[1]));
  CHECK(vattn_cache_step_slots(cache, slots, lengths, 2));

  CHECK(vattn_cache_view(cache, 1, slots[0], &k, &v));
  EXPECT(k.ndim == 3 && k.shape[0] == 300 && k.shape[1] == 2 && k.shape[2] == 64);
  EXPECT(strcmp(k.dtype, "float32") == 0 && k.element_size == 4 && k.device_kind == VATTN_CPU);
  for (int64_t token = 0; token < k.shape[0]; ++token) {
    at(&k, token, 1)[63] = (float)token;
    at(&v, token, 0)[0] = (float)-token;
  }

  EXPECT(vattn_cache_step_slots(cache, slots, too_many, 2) == VATTN_OUT_OF_MEMORY);
  CHECK(vattn_last_error_info(&refused));
  EXPECT(refused.status == VATTN_OUT_OF_MEMORY && refused.needed_bytes > refused.available_bytes);
  printf("refused, as it should be, %llu KiB of %llu: %s\n", (unsigned long long)refused.available_bytes / 1024,
         (unsigned long long)refused.needed_bytes / 1024, refused.message);
  CHECK(vattn_cache_seq_len(cache, slots[0], &length));
  EXPECT(length == 300);

  CHECK(vattn_cache_write(cache, 0, &slots[1], &last, 1, new_token, new_token));
  CHECK(vattn_cache_view(cache, 0, slots[1], &again, &ignored));
  EXPECT(at(&again, last, 1)[63] == new_token[127]);

  lengths[0] = 600;
  CHECK(vattn_cache_step_slots(cache, slots, lengths, 2));
  CHECK(vattn_cache_view(cache, 1, slots[0], &again, &ignored));
  EXPECT(again.data == k.data && again.shape[0] == 600 && at(&again, 299, 1)[63] == 299.0F);

  CHECK(vattn_cache_free(cache, slots[0]));
  CHECK(vattn_cache_alloc(cache, &slots[0]));
  CHECK(vattn_cache_step_slots(cache, slots, lengths, 2));
  CHECK(vattn_cache_stats(cache, &stats));
  EXPECT(stats.prompts == 3 && stats.reused_prompts == 1);
  EXPECT(stats.created_bytes == stats.mapped_bytes + stats.pooled_bytes + stats.retired_bytes);
  printf("%llu KiB mapped, %llu KiB pooled, %llu pages created, %llu reused, %llu driver calls\n",
         (unsigned long long)stats.mapped_bytes / 1024, (unsigned long long)stats.pooled_bytes / 1024,
         (unsigned long long)stats.pages_created, (unsigned long long)stats.pages_reused,
         (unsigned long long)stats.driver_calls);
}

static void growable_tensor(void) {
  const int64_t row_shape[1] = {256};
  vattn_tensor* tensor = NULL;
  void *first = NULL, *then = NULL;
  vattn_view rows;
  CHECK(vattn_tensor_create(row_shape, 1, 1 << 20, "float32", NULL, 0, 0, &tensor));
  CHECK(vattn_tensor_resize(tensor, 10));
  CHECK(vattn_tensor_data(tensor, &first));
  ((float*)first)[0] = 42.0F;
  CHECK(vattn_tensor_resize(tensor, 10000));
  CHECK(vattn_tensor_data(tensor, &then));
  EXPECT(then == first && ((float*)then)[0] == 42.0F);
  VATTN_INIT(&rows);
  CHECK(vattn_tensor_view(tensor, &rows));
  EXPECT(rows.data == first && rows.ndim == 2 && rows.shape[0] == 10000 && rows.strides[0] == 256);
  CHECK(vattn_view_retain(&rows));
  vattn_tensor_destroy(tensor);
  EXPECT(((float*)rows.data)[0] == 42.0F);
  CHECK(vattn_view_release(&rows));
}

static void shared_budget(void) {
  const int64_t row_shape[1] = {16384}, half = 2048, all = 4096; /* a row is a page, and so are 128 tokens */
  int64_t slot = 0;
  vattn_pool* pool = NULL;
  vattn_cache* cache = NULL;
  vattn_tensor* tensor = NULL;
  vattn_cache_config config;
  vattn_pool_stats stats;
  CHECK(vattn_pool_create("cpu", 64 << 10, 32 * (64 << 10), &pool));
  VATTN_INIT(&config);
  VATTN_INIT(&stats);
  config.num_layers = config.num_kv_heads = config.max_batch_size = 1;
  config.head_dim = 128;
  config.max_seq_len = all;
  config.dtype = "float32";
  config.lookahead_tokens = VATTN_NONE; /* 0 would be the default */
  config.pool = pool;
  CHECK(vattn_cache_create(&config, &cache));
  CHECK(vattn_tensor_create_in_pool(row_shape, 1, 64, "float32", pool, &tensor));
  CHECK(vattn_cache_alloc_for(cache, 1024, NULL, &slot));
  EXPECT(vattn_cache_step_slots(cache, &slot, &all, 1) == VATTN_OUT_OF_MEMORY);
  CHECK(vattn_cache_step_slots(cache, &slot, &half, 1));
  EXPECT(vattn_tensor_resize(tensor, 1) == VATTN_OUT_OF_MEMORY);
  CHECK(vattn_cache_free(cache, slot)); /* warm: the tensor takes what it needs of it */
  CHECK(vattn_tensor_resize(tensor, 20));
  CHECK(vattn_cache_settle(cache));
  CHECK(vattn_pool_stats_now(pool, &stats));
  EXPECT(stats.members == 2 && stats.created_bytes <= stats.limit_bytes && stats.reclaimable_bytes == 12 * (64 << 10));
  EXPECT(vattn_pool_close(pool) == VATTN_IN_USE);
  printf("refused, as it should be: %s\n", vattn_last_error());
  vattn_cache_destroy(cache);
  vattn_tensor_destroy(tensor);
  CHECK(vattn_pool_close(pool));
  vattn_pool_destroy(pool);
}

int main(void) {
  vattn_cache* cache = make_cache();
  printf("vattn %s\n", vattn_version());
  two_requests(cache);
  growable_tensor();
  shared_budget();
  EXPECT(vattn_cache_free(cache, 99) == VATTN_OUT_OF_RANGE);
  CHECK(vattn_cache_close(cache));
  EXPECT(vattn_cache_free(cache, 0) == VATTN_CLOSED);
  vattn_cache_destroy(cache);
  puts("all as it should be");
  return 0;
}
