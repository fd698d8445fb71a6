// The host driver passes the driver contract. What only the host driver does is tested in host_driver_test.cpp.
#include "driver_contract.hpp"
#include "vattn/driver/host/host_driver.hpp"

namespace vattn {
namespace {

INSTANTIATE_TEST_SUITE_P(Host, DriverContract,
                         testing::Values(DriverUnderTest{
                             .name = "host", .open = open_host_driver, .write = write_host, .read = read_host}),
                         name_of_driver);

}  // namespace
}  // namespace vattn
