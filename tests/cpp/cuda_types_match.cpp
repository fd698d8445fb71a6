// Compares src/cuda/cuda_types.hpp and functions.def, and what the fake libcuda has beside them for its clients, with the
// toolkit's cuda.h and cudaTypedefs.h, at compile time.
//
// Built, as an object and nothing more, wherever a toolkit of 12.0 or newer is found: that it compiles is the test. Types
// cannot be identical, since ours are our own, so they are compared by what the ABI sees: size, alignment, offsets, values, and
// for a function each parameter's kind and size, through pointers down to what they point at. The typedefs carry the version of
// their ABI in their names, so a wrong version in functions.def does not compile either.
// Thread: none; nothing here runs.
#include <cuda.h>
#include <cudaTypedefs.h>

#include <cstddef>
#include <type_traits>

#include "client_types.hpp"
#include "cuda/functions.hpp"

// What the fake has for its clients, in the namespace of its types.
namespace vattn::cuda {
#define VATTN_CUDA_FUNCTION(name, version, presence, parameters) using Client_##name = CUresult(*) parameters;
#include "client_functions.def"
}  // namespace vattn::cuda

namespace {

namespace ours = vattn::cuda;

// ---- types, as the ABI sees them ----------------------------------------------------------------------------------------

template <typename Ours, typename Theirs>
constexpr bool same_abi();

template <typename Ours, typename Theirs>
constexpr bool same_pointee() {
  using A = std::remove_cv_t<Ours>;
  using B = std::remove_cv_t<Theirs>;
  if constexpr (std::is_const_v<Ours> != std::is_const_v<Theirs>) {
    return false;
  } else if constexpr (std::is_void_v<A> || std::is_void_v<B>) {
    return std::is_void_v<A> && std::is_void_v<B>;
  } else {
    return same_abi<A, B>();
  }
}

template <typename T>
concept Complete = requires { sizeof(T); };

template <typename T>
constexpr bool is_number = std::is_integral_v<T> || std::is_enum_v<T>;

template <typename Ours, typename Theirs>
constexpr bool same_abi() {
  if constexpr (std::is_pointer_v<Ours> && std::is_pointer_v<Theirs>) {
    return same_pointee<std::remove_pointer_t<Ours>, std::remove_pointer_t<Theirs>>();
  } else if constexpr (!Complete<Ours> || !Complete<Theirs>) {
    return !Complete<Ours> && !Complete<Theirs>;  // opaque on both sides, as contexts and streams are
  } else {
    const bool same_kind = is_number<Ours> == is_number<Theirs> && std::is_class_v<Ours> == std::is_class_v<Theirs> &&
                           std::is_pointer_v<Ours> == std::is_pointer_v<Theirs>;
    return same_kind && sizeof(Ours) == sizeof(Theirs) && alignof(Ours) == alignof(Theirs);
  }
}

template <typename Ours, typename Theirs>
struct SameFunction : std::false_type {};
template <typename R, typename... Ours, typename S, typename... Theirs>
  requires(sizeof...(Ours) == sizeof...(Theirs))
struct SameFunction<R (*)(Ours...), S (*)(Theirs...)>
    : std::bool_constant<same_abi<R, S>() && (same_abi<Ours, Theirs>() && ...)> {};

// ---- every entry point, under the version that functions.def gives it ---------------------------------------------------

#define VATTN_CUDA_FUNCTION(name, version, presence, parameters)                               \
  static_assert(SameFunction<decltype(ours::Functions::name), PFN_##name##_v##version>::value, \
                #name " differs from the toolkit's, as of CUDA " #version);
#include "cuda/functions.def"

#define VATTN_CUDA_FUNCTION(name, version, presence, parameters)                   \
  static_assert(SameFunction<ours::Client_##name, PFN_##name##_v##version>::value, \
                #name " differs from the toolkit's, as of CUDA " #version);
#include "client_functions.def"

// ---- constants ----------------------------------------------------------------------------------------------------------

#define SAME_VALUE(name) \
  static_assert(static_cast<long long>(ours::name) == static_cast<long long>(::name), #name " differs from the toolkit's")

SAME_VALUE(CUDA_SUCCESS);
SAME_VALUE(CUDA_ERROR_INVALID_VALUE);
SAME_VALUE(CUDA_ERROR_OUT_OF_MEMORY);
SAME_VALUE(CUDA_ERROR_NOT_INITIALIZED);
SAME_VALUE(CUDA_ERROR_DEINITIALIZED);
SAME_VALUE(CUDA_ERROR_NO_DEVICE);
SAME_VALUE(CUDA_ERROR_INVALID_DEVICE);
SAME_VALUE(CUDA_ERROR_INVALID_CONTEXT);
SAME_VALUE(CUDA_ERROR_INVALID_HANDLE);
SAME_VALUE(CUDA_ERROR_NOT_FOUND);
SAME_VALUE(CUDA_ERROR_NOT_READY);
SAME_VALUE(CUDA_ERROR_ILLEGAL_ADDRESS);
SAME_VALUE(CUDA_ERROR_CONTEXT_IS_DESTROYED);
SAME_VALUE(CUDA_ERROR_NOT_PERMITTED);
SAME_VALUE(CUDA_ERROR_NOT_SUPPORTED);
SAME_VALUE(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
SAME_VALUE(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
SAME_VALUE(CUDA_ERROR_UNKNOWN);
SAME_VALUE(CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED);
SAME_VALUE(CU_STREAM_NON_BLOCKING);
SAME_VALUE(CU_EVENT_BLOCKING_SYNC);
SAME_VALUE(CU_EVENT_DISABLE_TIMING);
SAME_VALUE(CU_STREAM_CAPTURE_STATUS_NONE);
SAME_VALUE(CU_STREAM_CAPTURE_STATUS_ACTIVE);
SAME_VALUE(CU_STREAM_CAPTURE_STATUS_INVALIDATED);
SAME_VALUE(CU_STREAM_CAPTURE_MODE_GLOBAL);
SAME_VALUE(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
SAME_VALUE(CU_STREAM_CAPTURE_MODE_RELAXED);
SAME_VALUE(CU_GET_PROC_ADDRESS_LEGACY_STREAM);
SAME_VALUE(CU_GET_PROC_ADDRESS_SUCCESS);
SAME_VALUE(CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND);
SAME_VALUE(CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT);
SAME_VALUE(CU_MEM_ALLOCATION_TYPE_INVALID);
SAME_VALUE(CU_MEM_ALLOCATION_TYPE_PINNED);
SAME_VALUE(CU_MEM_HANDLE_TYPE_NONE);
SAME_VALUE(CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
SAME_VALUE(CU_MEM_LOCATION_TYPE_INVALID);
SAME_VALUE(CU_MEM_LOCATION_TYPE_DEVICE);
SAME_VALUE(CU_MEM_ALLOC_GRANULARITY_MINIMUM);
SAME_VALUE(CU_MEM_ALLOC_GRANULARITY_RECOMMENDED);
SAME_VALUE(CU_MEM_ACCESS_FLAGS_PROT_NONE);
SAME_VALUE(CU_MEM_ACCESS_FLAGS_PROT_READ);
SAME_VALUE(CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
SAME_VALUE(CU_POINTER_ATTRIBUTE_CONTEXT);
SAME_VALUE(CU_POINTER_ATTRIBUTE_MEMORY_TYPE);
SAME_VALUE(CU_POINTER_ATTRIBUTE_DEVICE_POINTER);
SAME_VALUE(CU_POINTER_ATTRIBUTE_HOST_POINTER);
SAME_VALUE(CU_POINTER_ATTRIBUTE_BUFFER_ID);
SAME_VALUE(CU_POINTER_ATTRIBUTE_IS_MANAGED);
SAME_VALUE(CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL);
SAME_VALUE(CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE);
SAME_VALUE(CU_POINTER_ATTRIBUTE_RANGE_START_ADDR);
SAME_VALUE(CU_POINTER_ATTRIBUTE_RANGE_SIZE);
SAME_VALUE(CU_POINTER_ATTRIBUTE_MAPPED);
SAME_VALUE(CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES);
SAME_VALUE(CU_POINTER_ATTRIBUTE_IS_GPU_DIRECT_RDMA_CAPABLE);
SAME_VALUE(CU_POINTER_ATTRIBUTE_ACCESS_FLAGS);
SAME_VALUE(CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE);
SAME_VALUE(CU_POINTER_ATTRIBUTE_MAPPING_SIZE);
SAME_VALUE(CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR);
SAME_VALUE(CU_POINTER_ATTRIBUTE_MEMORY_BLOCK_ID);
SAME_VALUE(CU_MEMORYTYPE_DEVICE);
SAME_VALUE(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
SAME_VALUE(CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING);
SAME_VALUE(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
SAME_VALUE(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
SAME_VALUE(CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED);
SAME_VALUE(CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_SUPPORTED);
SAME_VALUE(CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED);
SAME_VALUE(CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED);
SAME_VALUE(CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_FABRIC_SUPPORTED);

// ---- structures ---------------------------------------------------------------------------------------------------------

#define SAME_TYPE(name) static_assert(same_abi<ours::name, ::name>(), #name " differs from the toolkit's in size or alignment")
#define SAME_FIELD(type, field)                                                       \
  static_assert(offsetof(ours::type, field) == offsetof(::type, field) &&             \
                    same_abi<decltype(ours::type::field), decltype(::type::field)>(), \
                #type "::" #field " differs from the toolkit's")
#define SAME_FLAG(field)                                                                                                      \
  static_assert(offsetof(ours::CUmemAllocationProp, allocFlags.field) == offsetof(::CUmemAllocationProp, allocFlags.field) && \
                    sizeof(ours::CUmemAllocationProp::allocFlags.field) == sizeof(::CUmemAllocationProp::allocFlags.field),   \
                "CUmemAllocationProp::allocFlags." #field " differs from the toolkit's")

SAME_TYPE(CUresult);
SAME_TYPE(CUdevice);
SAME_TYPE(CUdeviceptr);
SAME_TYPE(CUcontext);
SAME_TYPE(CUstream);
SAME_TYPE(CUevent);
SAME_TYPE(CUstreamCaptureStatus);
SAME_TYPE(CUstreamCaptureMode);
SAME_TYPE(CUmemGenericAllocationHandle);
SAME_TYPE(CUdevice_attribute);
SAME_TYPE(CUdriverProcAddressQueryResult);
SAME_TYPE(CUpointer_attribute);
SAME_TYPE(CUuuid);
SAME_TYPE(CUmemLocation);
SAME_FIELD(CUmemLocation, type);
SAME_FIELD(CUmemLocation, id);
SAME_TYPE(CUmemAllocationProp);
SAME_FIELD(CUmemAllocationProp, type);
SAME_FIELD(CUmemAllocationProp, requestedHandleTypes);
SAME_FIELD(CUmemAllocationProp, location);
SAME_FIELD(CUmemAllocationProp, win32HandleMetaData);
SAME_FIELD(CUmemAllocationProp, allocFlags);
SAME_FLAG(compressionType);
SAME_FLAG(gpuDirectRDMACapable);
SAME_FLAG(usage);
SAME_FLAG(reserved);
SAME_TYPE(CUmemAccessDesc);
SAME_FIELD(CUmemAccessDesc, location);
SAME_FIELD(CUmemAccessDesc, flags);

}  // namespace
