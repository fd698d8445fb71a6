// The null driver, which only counts, passes the driver contract; what the contract says of bytes does not apply to it.
#include "driver_contract.hpp"
#include "vattn/driver/null/null_driver.hpp"

namespace vattn {
namespace {

INSTANTIATE_TEST_SUITE_P(Null, DriverContract, testing::Values(DriverUnderTest{.name = "null", .open = open_null_driver}),
                         name_of_driver);

}  // namespace
}  // namespace vattn
