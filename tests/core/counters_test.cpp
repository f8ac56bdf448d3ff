#include <gtest/gtest.h>

#include <chrono>
#include <future>

#include "cpu/accumulator.h"

namespace torch_ext::cpu {
namespace {

// What fork() relies on: a child of a thread that holds the pool finds it whole and free.
TEST(Counters, NobodyTakesFromThePoolWhileItIsHeld) {
  Counters::hold_pool();
  auto taken = std::async(std::launch::async, [] { Counters counters(1024); });
  EXPECT_EQ(taken.wait_for(std::chrono::milliseconds(50)), std::future_status::timeout);
  Counters::release_pool();
  taken.get();
}

}  // namespace
}  // namespace torch_ext::cpu
