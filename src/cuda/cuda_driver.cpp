// The verbs over CUDA's virtual memory management calls.
//
// Every verb checks, calls, then notes, under one mutex. The checks are the driver's own (MappingTable), though CUDA has some:
// a stale handle is undefined behaviour there, an access that was never set ends the whole context when a kernel or a fill
// touches it, and for what is refused the codes say little. The mutex is held across the calls that change the address space;
// CUDA serialises those itself. It is not held while pages are created, bytes are moved or the device is waited for, so that
// one thread's wait is nobody else's.
#include "cuda/cuda_driver.hpp"

#include <algorithm>
#include <mutex>
#include <new>
#include <set>
#include <sstream>
#include <unordered_map>
#include <utility>

#include "cuda/context.hpp"
#include "cuda/device.hpp"
#include "cuda/fences.hpp"
#include "cuda/libcuda.hpp"
#include "vattn/driver/mapping_table.hpp"
#include "vattn/fork.hpp"

namespace vattn {
namespace {

using namespace cuda;  // NOLINT(google-build-using-namespace): CUDA's own names, in their own namespace

constexpr std::size_t kDefaultPage = std::size_t{2} << 20;

std::string hex(Address at) {
  std::ostringstream text;
  text << "0x" << std::hex << at;
  return text.str();
}

CUstream native(Stream stream) { return reinterpret_cast<CUstream>(stream); }

std::string bytes(std::size_t size) { return std::to_string(size) + " bytes"; }
std::string bytes_at(std::size_t size, Address at) { return bytes(size) + " at " + hex(at); }

class CudaDriver final : public Driver {
 public:
  CudaDriver(const std::shared_ptr<const Libcuda>& libcuda, CUdevice device)
      : libcuda_(libcuda),
        device_(device),
        context_(libcuda, device),
        stream_(libcuda, context_),
        fences_(libcuda, context_),
        traits_(ask_traits()),
        table_(traits_.granularity) {}
  CudaDriver(const CudaDriver&) = delete;
  CudaDriver& operator=(const CudaDriver&) = delete;
  ~CudaDriver() override;

  const DriverTraits& traits() const noexcept override { return traits_; }
  MemoryInfo memory_info() override;
  Address reserve(std::size_t size, UnmappedReads reads) override;
  void release_range(Address base, std::size_t size) override;
  PageHandle create(std::size_t size, Address near) override;
  PageHandle home(Address /*at*/) const noexcept override { return 0; }
  void release(PageHandle page) override;
  void map(Address at, std::size_t size, PageHandle page) override;
  void unmap(Address at, std::size_t size) override;
  void set_access(Address at, std::size_t size) override;
  void fill_zero(Address at, std::size_t size) override;
  void copy(Address to, Address from, std::size_t size) override;
  void synchronize() override;
  FenceHandle record(Stream stream) override;
  bool has_passed(FenceHandle fence) override;
  void wait(FenceHandle fence) override;
  void wait_on(Stream stream, FenceHandle fence) override;
  void drop(FenceHandle fence) noexcept override;
  bool is_capturing(Stream stream) override;

 private:
  [[nodiscard]] const Libcuda& cuda() const noexcept { return *libcuda_; }
  [[nodiscard]] DriverTraits ask_traits() const;
  void check_process() const { generation_.check("this CUDA driver"); }
  void check_accessible(const char* verb, Address at, std::size_t size);
  [[nodiscard]] bool is_ours(Address at, std::size_t size) {
    const std::lock_guard lock(mutex_);
    return table_.touches(at, size);
  }
  void forget_mappings(Address at, std::size_t size) noexcept;
  void return_leftovers() noexcept;

  Generation generation_;
  std::shared_ptr<const Libcuda> libcuda_;
  CUdevice device_;
  PrimaryContext context_;
  OwnStream stream_;
  Fences fences_;
  DriverTraits traits_;
  std::mutex mutex_;
  MappingTable table_;
  std::set<Address> bases_;  ///< of the reservations
  /// CUDA's handle of each page whose release() is still to come. Ours are numbers used once: CUDA may hand the same value out
  /// again, and a page released twice would be somebody else's.
  std::unordered_map<PageHandle, CUmemGenericAllocationHandle> handles_;
  PageHandle next_page_ = 1;
  std::set<Address> closed_;  ///< mappings without access yet; nearly always empty
};

DriverTraits CudaDriver::ask_traits() const {
  const CurrentContext current(cuda(), context_);
  DriverTraits traits;
  traits.name = "cuda";
  traits.granularity = granularity_of(cuda(), device_);
  traits.default_page_size = (kDefaultPage + traits.granularity - 1) / traits.granularity * traits.granularity;
  traits.tensor_device = cuda().tensor_device();
  traits.tensor_device_index = traits.tensor_device == TensorDevice::kCuda ? device_ : 0;
  // Whether fresh pages are zero is documented nowhere, so they count as not zero.
  traits.fresh_pages_are_zero = false;
  traits.has_streams = true;
  traits.has_memory = true;
  return traits;
}

MemoryInfo CudaDriver::memory_info() {
  check_process();
  const CurrentContext current(cuda(), context_);
  std::size_t available = 0;
  std::size_t total = 0;
  cuda().check(cuda()->cuMemGetInfo(&available, &total), "cuMemGetInfo", "what the device has");
  return {total, available};
}

Address CudaDriver::reserve(std::size_t size, UnmappedReads reads) {
  check_process();
  table_.check_size("reserve", size);
  if (reads == UnmappedReads::kZeros) {
    throw std::invalid_argument("reserve: unmapped memory of a GPU cannot read as zeros: use unmapped_reads=\"fault\"");
  }
  const std::lock_guard lock(mutex_);
  const CurrentContext current(cuda(), context_);
  CUdeviceptr base = 0;
  const CUresult result = cuda()->cuMemAddressReserve(&base, size, traits_.granularity, 0, 0);
  if (result == CUDA_ERROR_OUT_OF_MEMORY) {
    throw OutOfMemoryError("cuMemAddressReserve failed: CUDA_ERROR_OUT_OF_MEMORY: the driver does not give " + bytes(size) +
                               " of addresses. Addresses are short here, not memory: lower max_batch_size or max_seq_len",
                           size, 0, 0);
  }
  cuda().check(result, "cuMemAddressReserve", bytes(size) + " of addresses", size);
  try {
    bases_.insert(base);
    table_.note_reserve(base, size, reads, 0);
  } catch (...) {
    bases_.erase(base);
    static_cast<void>(cuda()->cuMemAddressFree(base, size));
    throw;
  }
  return base;
}

void CudaDriver::release_range(Address base, std::size_t size) {
  check_process();
  const std::lock_guard lock(mutex_);
  table_.check_release_range(base, size);
  const CurrentContext current(cuda(), context_);
  cuda().check(cuda()->cuMemAddressFree(base, size), "cuMemAddressFree", bytes_at(size, base));
  table_.note_release_range(base);
  bases_.erase(base);
}

PageHandle CudaDriver::create(std::size_t size, Address /*near*/) {
  check_process();
  table_.check_size("create", size);
  const CurrentContext current(cuda(), context_);
  const CUmemAllocationProp properties = page_properties(device_);
  CUmemGenericAllocationHandle handle = 0;
  cuda().check(cuda()->cuMemCreate(&handle, size, &properties, 0), "cuMemCreate", "a page of " + bytes(size), size);
  const std::lock_guard lock(mutex_);
  const PageHandle page = next_page_++;
  try {
    handles_.emplace(page, handle);
    table_.note_create(page, size);
  } catch (...) {
    handles_.erase(page);
    static_cast<void>(cuda()->cuMemRelease(handle));
    throw;
  }
  return page;
}

void CudaDriver::release(PageHandle page) {
  check_process();
  const std::lock_guard lock(mutex_);
  table_.check_release(page);
  const CurrentContext current(cuda(), context_);
  const auto found = handles_.find(page);
  cuda().check(cuda()->cuMemRelease(found->second), "cuMemRelease", "page " + std::to_string(page));
  handles_.erase(found);
  table_.note_release(page);
}

void CudaDriver::map(Address at, std::size_t size, PageHandle page) {
  check_process();
  const std::lock_guard lock(mutex_);
  const MappingTable::Place place = table_.check_map(at, size, page);
  const CurrentContext current(cuda(), context_);
  // Noted first, because noting may fail for want of memory and unnoting may not.
  const auto closed = closed_.insert(at).first;
  try {
    table_.note_map(place, at, size, page);
  } catch (...) {
    closed_.erase(closed);
    throw;
  }
  const CUresult result = cuda()->cuMemMap(at, size, 0, handles_.find(page)->second, 0);
  if (result == CUDA_SUCCESS) return;
  forget_mappings(at, size);
  cuda().check(result, "cuMemMap", bytes_at(size, at), size);
}

void CudaDriver::unmap(Address at, std::size_t size) {
  check_process();
  const std::lock_guard lock(mutex_);
  static_cast<void>(table_.check_unmap(at, size));
  const CurrentContext current(cuda(), context_);
  cuda().check(cuda()->cuMemUnmap(at, size), "cuMemUnmap", bytes_at(size, at));
  forget_mappings(at, size);
}

void CudaDriver::set_access(Address at, std::size_t size) {
  check_process();
  const std::lock_guard lock(mutex_);
  table_.check_mapped("set_access", at, size);
  const auto& mapped = table_.find(at)->mapped;
  const auto last = std::prev(mapped.lower_bound(at + size));
  if (mapped.find(at) == mapped.end() || last->first + last->second.size != at + size) {
    throw std::invalid_argument("set_access: " + bytes_at(size, at) + " cut a mapping: whole mappings only");
  }
  const CurrentContext current(cuda(), context_);
  const CUmemAccessDesc access{{CU_MEM_LOCATION_TYPE_DEVICE, device_}, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  cuda().check(cuda()->cuMemSetAccess(at, size, &access, 1), "cuMemSetAccess", bytes_at(size, at), size);
  closed_.erase(closed_.lower_bound(at), closed_.lower_bound(at + size));
}

void CudaDriver::forget_mappings(Address at, std::size_t size) noexcept {
  table_.note_unmap(at, size, [](PageHandle, std::size_t) {});  // CUDA frees what the last mapping held
  closed_.erase(closed_.lower_bound(at), closed_.lower_bound(at + size));
}

void CudaDriver::check_accessible(const char* verb, Address at, std::size_t size) {
  const std::lock_guard lock(mutex_);
  table_.check_mapped(verb, at, size);
  const auto& mapped = table_.find(at)->mapped;
  const Address first = std::prev(mapped.upper_bound(at))->first;
  const auto closed = closed_.lower_bound(first);
  if (closed != closed_.end() && *closed - first < size + (at - first)) {
    throw std::invalid_argument(std::string(verb) + ": the mapping at " + hex(*closed) + " has no access: set_access first");
  }
}

void CudaDriver::fill_zero(Address at, std::size_t size) {
  check_process();
  check_accessible("fill_zero", at, size);
  const CurrentContext current(cuda(), context_);
  cuda().check(cuda()->cuMemsetD8Async(at, 0, size, stream_.get()), "cuMemsetD8Async", bytes_at(size, at));
  stream_.wait();
}

void CudaDriver::copy(Address to, Address from, std::size_t size) {
  check_process();
  check_accessible("copy", to, size);
  if (is_ours(from, size)) check_accessible("copy", from, size);
  if (std::max(to, from) - std::min(to, from) < size) {
    throw std::invalid_argument("copy: " + bytes_at(size, to) + " and at " + hex(from) + " overlap");
  }
  const CurrentContext current(cuda(), context_);
  cuda().check(cuda()->cuMemcpyDtoDAsync(to, from, size, stream_.get()), "cuMemcpyDtoDAsync",
               bytes_at(size, to) + " from " + hex(from));
  stream_.wait();
}

void CudaDriver::synchronize() {
  check_process();
  // In the context that owns the pages: the caller's current device may be another one, and waiting for that one waits for the
  // wrong kernels.
  const CurrentContext current(cuda(), context_);
  cuda().check(cuda()->cuCtxSynchronize(), "cuCtxSynchronize", "wait for the device");
}

FenceHandle CudaDriver::record(Stream stream) {
  check_process();
  return fences_.record(native(stream));
}

bool CudaDriver::has_passed(FenceHandle fence) {
  check_process();
  return fences_.has_passed(fence);
}

void CudaDriver::wait(FenceHandle fence) {
  check_process();
  fences_.wait(fence);
}

void CudaDriver::wait_on(Stream stream, FenceHandle fence) {
  check_process();
  fences_.wait_on(native(stream), fence);
}

void CudaDriver::drop(FenceHandle fence) noexcept {
  if (generation_.is_current()) fences_.drop(fence);
}

bool CudaDriver::is_capturing(Stream stream) {
  check_process();
  const CurrentContext current(cuda(), context_);
  auto status = CU_STREAM_CAPTURE_STATUS_NONE;
  const CUresult result = cuda()->cuStreamIsCapturing(native(stream), &status);
  // The NULL stream cannot be asked, nor used, while a stream that it waits for is captured.
  if (result == CUDA_ERROR_STREAM_CAPTURE_IMPLICIT) return true;
  cuda().check(result, "cuStreamIsCapturing", "whether a stream is being captured");
  return status != CU_STREAM_CAPTURE_STATUS_NONE;
}

CudaDriver::~CudaDriver() {
  if (generation_.is_current()) return_leftovers();
}

// Whoever used this driver has gone, and with it every tensor, so what is still here is what failed to be given back. One more
// try, after the device is idle; what fails now stays until the process ends.
void CudaDriver::return_leftovers() noexcept {
  if (bases_.empty() && handles_.empty()) return;
  const CurrentContext current(cuda(), context_, std::nothrow);
  if (!current.is_current() || cuda()->cuCtxSynchronize() != CUDA_SUCCESS) return;
  for (const Address base : bases_) {
    const MappingTable::Range& range = *table_.find(base);
    for (const auto& [at, mapping] : range.mapped) static_cast<void>(cuda()->cuMemUnmap(at, mapping.size));
    static_cast<void>(cuda()->cuMemAddressFree(base, range.size));
  }
  for (const auto& [page, handle] : handles_) static_cast<void>(cuda()->cuMemRelease(handle));
}

}  // namespace

std::shared_ptr<Driver> open_cuda_driver(int ordinal) {
  if (ordinal < 0) throw std::invalid_argument("device: cuda:" + std::to_string(ordinal) + " is negative");
  const auto libcuda = Libcuda::open();
  libcuda->initialise();
  const Libcuda& cuda = *libcuda;
  int count = 0;
  cuda.check(cuda->cuDeviceGetCount(&count), "cuDeviceGetCount", "how many devices there are");
  if (ordinal >= count) {
    throw std::invalid_argument("device: cuda:" + std::to_string(ordinal) + " does not exist, this process sees " +
                                std::to_string(count) + (count == 1 ? " device" : " devices"));
  }
  CUdevice device = 0;
  cuda.check(cuda->cuDeviceGet(&device, ordinal), "cuDeviceGet", "cuda:" + std::to_string(ordinal));
  if (!has_virtual_memory(cuda, device)) {
    throw DriverError("cuDeviceGetAttribute", CUDA_ERROR_NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED",
                      "cuda:" + std::to_string(ordinal) + " has no virtual memory management: use device=\"cpu\"");
  }
  return std::make_shared<CudaDriver>(libcuda, device);
}

}  // namespace vattn
