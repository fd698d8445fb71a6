/* Control of the fake CUDA driver library: what it pretends to be, what fails, what is alive, which rule was broken.
 *
 * libfake_cuda.so implements the entry points of src/cuda/functions.def over host memory, with the rules of the real driver:
 * see README.md beside this file. A program opens it in place of libcuda (VATTN_CUDA_LIBRARY); a test steers and inspects it
 * through the functions below. Plain C, so that C++ tests and Python's ctypes use the same ones.
 *
 * Defaults, also after fake_cuda_reset(), come from the environment: VATTN_FAKE_CUDA_DEVICES (2), VATTN_FAKE_CUDA_MEMORY (bytes
 * a device has, 4 GiB), VATTN_FAKE_CUDA_GRANULARITY (2 MiB). What a setting cannot mean (0 bytes, garbage) leaves the default.
 *
 * Thread: any; one mutex guards everything. The memory itself is the caller's to race on. */
#ifndef VATTN_TESTS_FAKE_CUDA_H_
#define VATTN_TESTS_FAKE_CUDA_H_

#include <stddef.h>
#include <stdint.h>

#define FAKE_CUDA_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* ---- what it pretends to be ------------------------------------------------------------------------------------------- */

/* Everything as when the library was loaded: nothing alive, nothing initialised, no counts, no faults, the default settings.
 * Whoever still holds an address or a handle holds garbage; contexts current on other threads are destroyed ones. */
FAKE_CUDA_API void fake_cuda_reset(void);

/* Settings. They hold for calls made from now on; devices and granularity are for before the first use. */
FAKE_CUDA_API void fake_cuda_set_devices(int count); /* 0 to 16 */
FAKE_CUDA_API void fake_cuda_set_memory(uint64_t bytes_per_device);
FAKE_CUDA_API void fake_cuda_set_granularity(uint64_t minimum, uint64_t recommended); /* powers of two, 4096 or more */
/* What a reservation is aligned to that asks for alignment 0: a power of two, 4096 or more; 0, the default: the granularity, as
 * programs rely on. 4096 is the least that the documentation promises. */
FAKE_CUDA_API void fake_cuda_set_default_alignment(uint64_t bytes);
FAKE_CUDA_API void fake_cuda_set_fill(int byte);     /* what fresh pages hold: 0xFF (NaN bits) by default; -1: zeros, faster */
FAKE_CUDA_API void fake_cuda_set_vmm(int supported); /* what the device attribute answers */
/* Each later call of `entry` takes that long in real time, calls that fail too, and takes effect at the end of it, at once.
 * Calls of several threads take their time side by side. NULL: of every entry, whatever was set before; 0: no time. */
FAKE_CUDA_API void fake_cuda_set_latency(const char* entry, uint64_t nanoseconds);
FAKE_CUDA_API void fake_cuda_hide(const char* entry); /* cuGetProcAddress finds it no more; NULL: hide nothing */

/* ---- what fails ------------------------------------------------------------------------------------------------------- */

/* The kth call from now (1: the next) of `entry` fails with `code` and does nothing; with `sticky` every later one too. NULL:
 * a call of any entry, but for the ones that name errors. Several faults may wait at once, each counting on its own. */
FAKE_CUDA_API void fake_cuda_fail(const char* entry, uint64_t kth, int code, int sticky);
FAKE_CUDA_API void fake_cuda_clear_faults(void);
FAKE_CUDA_API uint64_t fake_cuda_faults_fired(void);

/* ---- what is alive ---------------------------------------------------------------------------------------------------- */

typedef struct fake_cuda_counts {
  uint64_t handles;           /* allocations with a reference: cuMemCreate and cuMemRetainAllocationHandle less cuMemRelease */
  uint64_t handle_references; /* the references themselves */
  uint64_t mappings;
  uint64_t reservations;
  uint64_t context_references; /* of all primary contexts */
  uint64_t streams;            /* made with cuStreamCreate; streams of the test do not count */
  uint64_t work;               /* kernels, fills and copies that were given to a device and are not over */
  uint64_t bytes;              /* of allocations alive, be it through a reference or a mapping */
  uint64_t null_stream_work;   /* fills and copies started on the NULL stream, ever */
  uint64_t events;
} fake_cuda_counts;

FAKE_CUDA_API void fake_cuda_count(fake_cuda_counts* counts);
FAKE_CUDA_API int fake_cuda_context_depth(void);           /* contexts on the calling thread's stack */
FAKE_CUDA_API int fake_cuda_capture_mode(void);            /* the calling thread's, a CUstreamCaptureMode */
FAKE_CUDA_API uint64_t fake_cuda_calls(const char* entry); /* calls of it, failed ones too; NULL: of all */
FAKE_CUDA_API void fake_cuda_clear_calls(void);

/* ---- work on the device ----------------------------------------------------------------------------------------------- */

/* A kernel that uses these addresses starts, on the device that owns the page at `address`, and runs until kernel_end, or until
 * the owning context is waited for (cuCtxSynchronize). Returns its id; 0, and a violation, when not all of the range is mapped
 * and accessible: a real kernel would fault. Unmapping what a running kernel uses is a violation and is refused. */
FAKE_CUDA_API uint64_t fake_cuda_kernel_begin(uint64_t address, uint64_t size);

/* A kernel on a stream, behind the work that is there and the events that the stream waits for; 0: the NULL stream of the
 * device that owns the page. With a duration it is over that long after it could start, by the real clock; with -1 it runs
 * until kernel_end. Whoever waits for it really waits, so one with -1 needs another thread that ends it. Otherwise as above. */
FAKE_CUDA_API uint64_t fake_cuda_kernel_begin_on(uint64_t stream, uint64_t address, uint64_t size, int64_t duration_us);

/* Ends a kernel now, or, where it could not start yet, as soon as it could. 1: it was not over. */
FAKE_CUDA_API int fake_cuda_kernel_end(uint64_t kernel);

/* A stream for kernels of a test: a non-blocking one, as PyTorch's are. It needs no context and outlives all. 0: no such
 * device. What runs on a destroyed stream goes on. */
FAKE_CUDA_API uint64_t fake_cuda_stream_create(int device);
FAKE_CUDA_API void fake_cuda_stream_destroy(uint64_t stream);

/* The stream (0: every NULL stream) is being captured into a graph, or is not any more. cuStreamIsCapturing says so. While one
 * is, violations, refused with CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, are
 *   - from a thread that has not made its mode relaxed with cuThreadExchangeStreamCaptureMode: cuMemAddressReserve,
 *     cuMemAddressFree, cuMemCreate, cuMemRelease, cuMemMap, cuMemUnmap, cuMemSetAccess, cuEventRecord, cuEventQuery,
 *     cuEventSynchronize and cuStreamSynchronize;
 *   - from any thread: cuCtxSynchronize, and every use of the captured stream but cuStreamIsCapturing.
 * Asking about the NULL stream gets CUDA_ERROR_STREAM_CAPTURE_IMPLICIT. Kernels of a test may be given to a captured stream. */
FAKE_CUDA_API void fake_cuda_set_capturing(uint64_t stream, int on);

/* ---- which rule was broken -------------------------------------------------------------------------------------------- */

/* Calls that are undefined behaviour or a later fault with the real driver: unmapping under running work, releasing a handle
 * that is none, touching memory without access, what a capture does not allow, any call in a forked child. Each is refused. */
FAKE_CUDA_API uint64_t fake_cuda_violations(void);
/* For a test that breaks a rule on purpose, at its end. */
FAKE_CUDA_API void fake_cuda_forget_violations(void);
FAKE_CUDA_API size_t fake_cuda_last_violation(char* text, size_t size); /* its length; cut to size - 1 and terminated */

/* Where tensors over this library's memory live, in DLPack's numbers: 1, the host. vattn looks this symbol up. */
FAKE_CUDA_API int vattn_fake_tensor_device(void);

#ifdef __cplusplus
}
#endif

#endif /* VATTN_TESTS_FAKE_CUDA_H_ */
