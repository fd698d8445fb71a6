// What this machine has, for `python -m vattn info`.
#include <nanobind/stl/string.h>

#include "bindings/bindings.hpp"
#include "cuda/cuda_driver.hpp"
#include "vattn/driver/host/host_driver.hpp"

namespace {

nb::typed<nb::dict, nb::str, nb::any> probe_cuda() {
  vattn::CudaInfo info;
  {
    const GilReleased release;
    info = vattn::probe_cuda();
  }
  nb::list devices;
  for (const vattn::CudaDeviceInfo& device : info.devices) {
    nb::dict entry;
    entry["name"] = device.name;
    entry["total_bytes"] = device.total_bytes;
    entry["granularity"] = device.granularity;
    entry["reason"] = device.reason;
    devices.append(entry);
  }
  nb::dict result;
  result["library"] = info.library;
  result["reason"] = info.reason;
  result["driver_version"] = info.driver_version;
  result["devices"] = devices;
  return result;
}

nb::typed<nb::dict, nb::str, nb::any> probe_host() {
  vattn::MemoryInfo memory;
  vattn::DriverTraits traits;
  {
    const GilReleased release;
    const auto driver = vattn::open_host_driver();
    memory = driver->memory_info();
    traits = driver->traits();
  }
  nb::dict result;
  result["available_bytes"] = memory.unknown == nullptr ? nb::cast(memory.available_bytes) : nb::none();
  result["total_bytes"] = memory.unknown == nullptr ? nb::cast(memory.total_bytes) : nb::none();
  result["granularity"] = traits.granularity;
  result["default_page_size"] = traits.default_page_size;
  result["mapping_limit"] = traits.mapping_limit;
  return result;
}

nb::typed<nb::list, nb::str> dtypes() {
  nb::list names;
  for (const vattn::DTypeInfo& info : vattn::kDTypes) names.append(nb::str(info.name.data(), info.name.size()));
  return names;
}

}  // namespace

void bind_system(nb::module_& module) {
  module.def("probe_cuda", &probe_cuda, "What there is of CUDA; makes no context and throws nothing.");
  module.def("probe_host", &probe_host, "What the host driver sees: memory left, page sizes, the limit of mappings.");
  module.def("dtypes", &dtypes, "Names of the element types.");
}
