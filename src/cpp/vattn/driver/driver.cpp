// What a driver without streams says of fences: it has none, and nothing of its work is ever captured. And the hint that a
// driver need not take.
#include "vattn/driver/driver.hpp"

#include <stdexcept>
#include <string>

namespace vattn {
namespace {

[[noreturn]] void refuse(const char* verb, const DriverTraits& traits) {
  throw std::invalid_argument(std::string(verb) + ": the " + traits.name +
                              " driver has no streams: its work is done when the call returns");
}

}  // namespace

void Driver::will_write(Address /*at*/, std::size_t /*size*/) noexcept {}

FenceHandle Driver::record(Stream /*stream*/) { refuse("record", traits()); }
bool Driver::has_passed(FenceHandle /*fence*/) { refuse("has_passed", traits()); }
void Driver::wait(FenceHandle /*fence*/) { refuse("wait", traits()); }
void Driver::wait_on(Stream /*stream*/, FenceHandle /*fence*/) { refuse("wait_on", traits()); }
void Driver::drop(FenceHandle /*fence*/) noexcept {}
bool Driver::is_capturing(Stream /*stream*/) { return false; }

}  // namespace vattn
