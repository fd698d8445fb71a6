// How often the drivers of a process ask the kernel how many mappings it has.
#include "vattn/driver/host/mapping_wall.hpp"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <memory>
#include <vector>

#include "vattn/error.hpp"

namespace vattn::host {
namespace {

TEST(MappingWallTest, ManyDriversReadTheMappingsOnceAndNotEachForItself) {
  std::vector<std::unique_ptr<MappingWall>> walls;
  const std::uint64_t before = MappingWall::readings();
  for (int i = 0; i < 500; ++i) {
    walls.push_back(std::make_unique<MappingWall>());
    walls.back()->check(0, 1, true);
    walls.back()->settle(1);
  }
  EXPECT_LE(MappingWall::readings() - before, 100U);
}

TEST(MappingWallTest, WhatSeveralDriversMakeTogetherIsReadAgainAsIfOneHadMadeIt) {
  MappingWall one;
  MappingWall other;
  one.check(0, 1);
  const std::uint64_t before = MappingWall::readings();
  for (std::int64_t own = 0; own < 3000; own += 3) {
    one.check(own, 3);
    other.check(own, 3);
  }
  EXPECT_GE(MappingWall::readings() - before, 1U) << "6,000 are more than the reserve";
}

TEST(MappingWallTest, AWallThatGoesTakesItsDriversMappingsFromTheCount) {
  MappingWall stays;
  stays.check(0, 1);
  for (int i = 0; i < 50; ++i) {
    MappingWall goes;
    goes.settle(900);
  }
  const std::uint64_t before = MappingWall::readings();
  stays.check(0, 1);
  EXPECT_EQ(MappingWall::readings(), before);
}

}  // namespace
}  // namespace vattn::host
