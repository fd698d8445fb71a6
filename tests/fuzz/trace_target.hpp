// One input of the fuzz target of driver traces: played on the null driver and, as long as it asks for little, on the host.
//
// Promises, or std::logic_error: a trace is played or refused with a typed error, and the driver has nothing alive afterwards.
// Thread: the caller's.
#pragma once

#include <cstdint>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>

#include "trace_replay.hpp"
#include "vattn/driver/decorators/counting_driver.hpp"
#include "vattn/driver/host/host_driver.hpp"
#include "vattn/driver/null/null_driver.hpp"

namespace vattn::fuzz {

inline void replay_anything(std::span<const std::uint8_t> bytes) {
  const std::string text(bytes.begin(), bytes.end());
  const ReplayLimits small{.created_bytes = std::uint64_t{64} << 20, .reserved_bytes = std::uint64_t{64} << 30, .lines = 4096};
  for (const auto& open : {open_null_driver, open_host_driver}) {
    CountingDriver driver(open());
    std::istringstream trace(text);
    std::uint64_t line = 0;
    try {
      replay_trace(trace, driver, small, &line);
    } catch (const std::invalid_argument& error) {
      // From the replay, with its line; a driver's own refusal would mean that the replay let something forbidden through.
      if (std::string(error.what()).rfind("trace, line ", 0) != 0) {
        throw std::logic_error("line " + std::to_string(line) + " reached the driver, which says: " + error.what());
      }
    } catch (const OutOfMemoryError&) {  // NOLINT(bugprone-empty-catch): it asked for too much
    }
    if (driver.alive() != CountingDriver::Alive{}) throw std::logic_error("a replay left something alive");
  }
}

}  // namespace vattn::fuzz
