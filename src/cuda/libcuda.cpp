#include "cuda/libcuda.hpp"

#include <dlfcn.h>

#include <cstdlib>
#include <utility>

namespace vattn::cuda {
namespace {

constexpr const char* kDefaultLibrary = "libcuda.so.1";
constexpr const char* kWayOut = "install the NVIDIA driver, or use device=\"cpu\"";

// The loader has no error codes; these stand where a CUresult would.
constexpr int kNoCode = -1;
constexpr const char* kNotLoaded = "LIBRARY_NOT_LOADED";

// DLPack's number for host memory, which the fake library answers with.
constexpr int kDLCPU = 1;

using GetProcAddressV1 = CUresult (*)(const char*, void**, int, cuuint64_t);
using GetProcAddressV2 = CUresult (*)(const char*, void**, int, cuuint64_t, CUdriverProcAddressQueryResult*);
using TensorDeviceFunction = int (*)();

/// cuGetProcAddress in either of its ABIs: drivers before 12.0 have only the first.
class EntryFinder {
 public:
  EntryFinder(void* handle, const std::string& library)
      : v2_(reinterpret_cast<GetProcAddressV2>(::dlsym(handle, "cuGetProcAddress_v2"))),
        v1_(reinterpret_cast<GetProcAddressV1>(::dlsym(handle, "cuGetProcAddress"))) {
    if (v2_ == nullptr && v1_ == nullptr) {
      throw DriverError("dlsym", kNoCode, kNotLoaded,
                        library + " has no cuGetProcAddress: it is no CUDA driver, or one older than 11.3; " + kWayOut);
    }
  }

  /// Null where the library has no such entry, or none with this ABI. The reason is left in `result`.
  [[nodiscard]] void* find(const char* name, int version, CUresult& result) const {
    void* entry = nullptr;
    // The legacy NULL stream is asked for by name, since the default depends on how a program was compiled. vattn uses streams
    // of its own; the entries that take none are the same either way.
    if (v2_ != nullptr) {
      auto found = CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
      result = v2_(name, &entry, version, CU_GET_PROC_ADDRESS_LEGACY_STREAM, &found);
    } else {
      result = v1_(name, &entry, version, CU_GET_PROC_ADDRESS_LEGACY_STREAM);
    }
    return result == CUDA_SUCCESS ? entry : nullptr;
  }

 private:
  GetProcAddressV2 v2_;
  GetProcAddressV1 v1_;
};

}  // namespace

std::string Libcuda::default_library() {
  const char* named = std::getenv("VATTN_CUDA_LIBRARY");
  return named != nullptr && *named != '\0' ? named : kDefaultLibrary;
}

std::shared_ptr<const Libcuda> Libcuda::open() { return std::shared_ptr<const Libcuda>(new Libcuda(default_library())); }

Libcuda::Libcuda(std::string library) : library_(std::move(library)) {
  void* handle = ::dlopen(library_.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    const char* reason = ::dlerror();
    throw DriverError(
        "dlopen", kNoCode, kNotLoaded,
        "CUDA cannot be used, " + (reason != nullptr ? std::string(reason) : library_ + " did not load") + "; " + kWayOut);
  }
  find_entries(handle);
  if (auto* asks = reinterpret_cast<TensorDeviceFunction>(::dlsym(handle, "vattn_fake_tensor_device")); asks != nullptr) {
    tensor_device_ = asks() == kDLCPU ? TensorDevice::kCpu : TensorDevice::kCuda;
  }
}

void Libcuda::find_entries(void* handle) {
  const EntryFinder finder(handle, library_);
  enum class Presence : unsigned char { required, optional };
  const auto entry_of = [&](const char* name, int version, Presence presence) -> void* {
    CUresult result = CUDA_SUCCESS;
    void* entry = finder.find(name, version, result);
    if (entry == nullptr && presence == Presence::required) {
      const std::string release = std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
      throw DriverError(
          "cuGetProcAddress", result != CUDA_SUCCESS ? result : CUDA_ERROR_NOT_FOUND,
          result != CUDA_SUCCESS ? name_of(result) : "CUDA_ERROR_NOT_FOUND",
          library_ + " has no " + name + " as of CUDA " + release + ": install a newer driver, or use device=\"cpu\"");
    }
    return entry;
  };
#define VATTN_CUDA_FUNCTION(name, version, presence, parameters) \
  functions_.name = reinterpret_cast<CUresult(*) parameters>(entry_of(#name, version, Presence::presence));
#include "cuda/functions.def"
}

void Libcuda::initialise() const {
  const CUresult result = functions_.cuInit(0);
  // What CUDA says in a child forked after its parent used CUDA. The bare code sends people looking in the wrong place.
  const char* hint = result == CUDA_ERROR_NOT_INITIALIZED
                         ? "in a process forked after CUDA was initialised CUDA cannot be used: start it with spawn"
                         : "CUDA cannot be used; use device=\"cpu\"";
  check(result, "cuInit", hint);
}

void Libcuda::check(CUresult result, const char* call, const std::string& what, std::uint64_t needed) const {
  if (result == CUDA_SUCCESS) return;
  const std::string text = what + ": " + text_of(result);
  if (result != CUDA_ERROR_OUT_OF_MEMORY) throw DriverError(call, result, name_of(result), text);
  std::size_t available = 0;
  std::size_t total = 0;
  std::string had;
  if (functions_.cuMemGetInfo(&available, &total) == CUDA_SUCCESS) {
    had = " (the device has " + std::to_string(available) + " of " + std::to_string(total) + " bytes free)";
  } else {
    available = total = 0;  // no context is current here
  }
  throw OutOfMemoryError(std::string(call) + " failed: " + name_of(result) + ": " + text + had, needed, available, total);
}

std::string Libcuda::name_of(CUresult result) const {
  const char* name = nullptr;
  const bool known = functions_.cuGetErrorName != nullptr && functions_.cuGetErrorName(result, &name) == CUDA_SUCCESS;
  return known && name != nullptr ? name : "unrecognised CUresult";
}

std::string Libcuda::text_of(CUresult result) const {
  const char* text = nullptr;
  const bool known = functions_.cuGetErrorString != nullptr && functions_.cuGetErrorString(result, &text) == CUDA_SUCCESS;
  return known && text != nullptr ? text : "the driver has no text for this code";
}

}  // namespace vattn::cuda
