#include "vattn/driver/open.hpp"

#include <charconv>
#include <limits>

#include "cuda/cuda_driver.hpp"
#include "vattn/driver/host/host_driver.hpp"
#include "vattn/driver/null/null_driver.hpp"

namespace vattn {

Device parse_device(std::string_view text) {
  const auto colon = text.find(':');
  const std::string_view kind = text.substr(0, colon);
  int index = 0;
  bool index_is_good = true;
  if (colon != std::string_view::npos) {
    const std::string_view digits = text.substr(colon + 1);
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), index);
    index_is_good = error == std::errc() && end == digits.data() + digits.size() && index >= 0;
  }
  if (index_is_good) {
    if (kind == "cuda") return {Device::Kind::kCuda, index};
    if (kind == "cpu" && index == 0) return {Device::Kind::kCpu, 0};
    if (kind == "meta" && index == 0) return {Device::Kind::kMeta, 0};
  }
  throw std::invalid_argument("device=\"" + std::string(text) + "\" must be \"cpu\", \"cuda\", \"cuda:N\" or \"meta\"");
}

std::string to_string(Device device) {
  switch (device.kind) {
    case Device::Kind::kCpu:
      return "cpu";
    case Device::Kind::kCuda:
      return "cuda:" + std::to_string(device.index);
    case Device::Kind::kMeta:
      break;
  }
  return "meta";
}

std::shared_ptr<Driver> open_driver(Device device) {
  switch (device.kind) {
    case Device::Kind::kCpu:
      return open_host_driver();
    case Device::Kind::kCuda:
      return open_cuda_driver(device.index);
    case Device::Kind::kMeta:
      break;
  }
  return open_null_driver();
}

std::uint64_t default_memory_limit(Driver& driver) {
  const MemoryInfo memory = driver.memory_info();
  if (memory.unknown != nullptr) {
    throw Error(std::string("memory_limit=None: how much memory is left cannot be told, since ") + memory.unknown +
                ". Pass memory_limit, in bytes");
  }
  if (!driver.traits().has_memory) return memory.available_bytes;  // meta: no limit
  return memory.available_bytes / 10 * 9;
}

}  // namespace vattn
