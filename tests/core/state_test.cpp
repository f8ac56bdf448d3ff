#include "core/state.h"

#include <gtest/gtest.h>

#include <cstring>
#include <iterator>

namespace {

using torch_ext::core::kStates;
using torch_ext::core::StateRow;

const StateRow& row(const char* name) {
  for (const StateRow& state : kStates)
    if (std::strcmp(state.name, name) == 0) return state;
  static const StateRow empty{};
  ADD_FAILURE() << "no state " << name;
  return empty;
}

void expect_row(const char* name, bool accumulate, bool follow, bool quantize, bool differentiate) {
  const StateRow& state = row(name);
  EXPECT_EQ(state.accumulate, accumulate) << name;
  EXPECT_EQ(state.follow, follow) << name;
  EXPECT_EQ(state.quantize, quantize) << name;
  EXPECT_EQ(state.differentiate, differentiate) << name;
}

TEST(State, EachOfTheFourDoesWhatItIsFor) {
  EXPECT_EQ(std::size(kStates), 4u);
  expect_row("calibration", true, false, false, false);
  expect_row("qat", false, true, true, true);
  expect_row("validation", false, false, true, false);
  expect_row("float", false, false, false, false);
}

// A forward pass that both accumulates and follows would observe its input twice.
TEST(State, NoneObservesTwice) {
  for (const StateRow& state : kStates) EXPECT_FALSE(state.accumulate && state.follow);
}

}  // namespace
