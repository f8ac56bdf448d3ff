#include "bindings/enqueue.h"

#include <gtest/gtest.h>

#include <stdexcept>
#include <string>

// What a user sees of an error while work is enqueued on a device.
namespace {

using torch_ext::bindings::enqueue;
using torch_ext::cuda::OutOfMemory;

const c10::Device kDevice(c10::DeviceType::CUDA, 1);
constexpr const char* kWanted = "observe_: expected the work on cuda:1 to be enqueued";

// The text of the error that `work` ends with, which has to be an E and nothing derived from it.
template <class E, class Work>
std::string text_of(const Work& work) {
  try {
    enqueue("observe_", kDevice, work);
  } catch (const c10::Error& error) {
    EXPECT_EQ(typeid(error), typeid(E)) << error.what_without_backtrace();
    return error.what_without_backtrace();
  }
  ADD_FAILURE() << "expected an error";
  return "";
}

TEST(Enqueue, TorchsErrorsKeepTheirType) {
  const auto allocate = [] { TORCH_CHECK_WITH(OutOfMemoryError, false, "no memory for scratch"); };
  const std::string text = text_of<c10::OutOfMemoryError>(allocate);
  EXPECT_EQ(text.find("no memory for scratch"), 0u) << text;
  EXPECT_NE(text.find(kWanted), std::string::npos) << text;
  text_of<c10::IndexError>([] { TORCH_CHECK_INDEX(false, "an index"); });
}

TEST(Enqueue, OutOfMemoryInAKernelsLaunchIsTorchs) {
  EXPECT_EQ(text_of<c10::OutOfMemoryError>([] { throw OutOfMemory("CUDA: no memory"); }),
            std::string(kWanted) + ", got CUDA: no memory");
}

TEST(Enqueue, OtherErrorsNameTheOp) {
  EXPECT_EQ(text_of<c10::Error>([] { throw std::runtime_error("CUDA: too bad"); }),
            std::string(kWanted) + ", got CUDA: too bad");
}

TEST(Enqueue, WorkIsDoneOnce) {
  int times = 0;
  enqueue("observe_", kDevice, [&] { ++times; });
  EXPECT_EQ(times, 1);
}

}  // namespace
