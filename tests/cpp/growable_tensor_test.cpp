// GrowableTensor as a C++ program uses it, on every driver: rows arrive, addresses stay.
#include "vattn/tensor/growable_tensor.hpp"

#include "drivers_under_test.hpp"
#include "soak.hpp"

namespace vattn {
namespace {

class GrowableTensorTest : public testing::TestWithParam<DriverUnderTest> {
 protected:
  GrowableTensorTest() : driver_(GetParam()) {}
  void TearDown() override { EXPECT_EQ(driver_.counts->alive(), CountingDriver::Alive{}); }

  [[nodiscard]] std::unique_ptr<GrowableTensor> make(GrowableTensor::Config config) {
    return std::make_unique<GrowableTensor>(config, Device{}, driver_.counts);
  }

  Instrumented driver_;
};

TEST_P(GrowableTensorTest, RowsArriveWhereTheyStay) {
  const auto source = make({.row_shape = {4}, .max_rows = 8});
  source->resize(8);
  const auto tensor = make({.row_shape = {4}, .max_rows = 1'000'000});
  const Address first = tensor->view().address;
  tensor->append(source->view().address, 3);
  tensor->append(source->view().address, 0);
  tensor->append(source->view().address, 5);
  EXPECT_EQ(tensor->rows(), 8);
  EXPECT_EQ(tensor->view().address, first);
  EXPECT_EQ(tensor->view().shape, (std::vector<std::int64_t>{8, 4}));
  EXPECT_EQ(tensor->view().strides, (std::vector<std::int64_t>{4, 1}));
  EXPECT_THROW(tensor->append(source->view().address, 1'000'000), std::invalid_argument);
}

TEST_P(GrowableTensorTest, AnAppendThatFailsAtAnyCallChangesNothing) {
  const auto source = make({.row_shape = {4}, .max_rows = 8});
  source->resize(8);
  for (std::uint64_t k = 1;; ++k) {
    const auto tensor = make({.row_shape = {4}, .max_rows = 1'000'000});
    const CountingDriver::Alive before = driver_.counts->alive();
    driver_.faults->arm({.call = k});
    bool failed = false;
    try {
      tensor->append(source->view().address, 2);
    } catch (const DriverError&) {
      failed = true;
    }
    const bool fired = driver_.faults->failed() != 0;
    driver_.faults->disarm();
    EXPECT_EQ(failed, fired) << "k=" << k;
    if (!fired) break;
    EXPECT_EQ(tensor->rows(), 0) << "k=" << k;
    EXPECT_EQ(tensor->mapped_bytes(), 0U) << "k=" << k;
    EXPECT_EQ(driver_.counts->alive().reservations, before.reservations);
    tensor->append(source->view().address, 2);
    EXPECT_EQ(tensor->rows(), 2);
  }
}

TEST_P(GrowableTensorTest, MoreThanTheDriverHasIsRefusedBeforeAnythingIsTaken) {
  const std::int64_t rows = kSanitized ? 1 << 18 : 1 << 20;  // of 1 MiB; a sanitizer leaves less room for addresses
  const auto tensor = make({.row_shape = {1 << 20}, .max_rows = rows, .dtype = DType::kUInt8, .memory_limit = INT64_MAX});
  const std::uint64_t calls = driver_.counts->calls(Verb::kCreate);
  const auto more =
      std::min<std::uint64_t>(driver_.counts->memory_info().available_bytes >> 20, static_cast<std::uint64_t>(rows) - 1) + 1;
  if (GetParam().name == "null") return;  // accounting has no bound
  EXPECT_THROW(tensor->resize(static_cast<std::int64_t>(more)), OutOfMemoryError);
  EXPECT_EQ(driver_.counts->calls(Verb::kCreate), calls);
}

INSTANTIATE_TEST_SUITE_P(Every, GrowableTensorTest, testing::ValuesIn(every_driver()), name_of_driver);

}  // namespace
}  // namespace vattn
