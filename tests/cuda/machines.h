#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/driver.h"
#include "gpu.h"

// The emulated devices that the kernels are tested on, and calls of the drivers with scratch memory
// full of garbage.
namespace machines {

using torch_ext::core::Statistic;
using torch_ext::core::TensorView;
using torch_ext::cuda::ObserveMode;
using torch_ext::gpu::emulation::Machine;

// Shared memory as on compute capability 9.0, on 8.6, 8.9 and 12.0, and on one with too little for
// any counters.
constexpr Machine kMachines[] = {{3, 227 * 1024, Machine::random, 1},
                                 {4, 99 * 1024, Machine::random, 2},
                                 {2, 16 * 1024, Machine::random, 3},
                                 {5, 227 * 1024, Machine::in_order, 4},
                                 {3, 99 * 1024, Machine::backwards, 5}};

inline std::string text(const Machine& m) {
  return std::to_string(m.processors) + " processors, " + std::to_string(m.shared_memory / 1024) +
         " KiB, seed " + std::to_string(m.seed);
}

// Says how a test that failed is run again under the same schedules.
class SaysSchedule : public testing::EmptyTestEventListener {
  void OnTestEnd(const testing::TestInfo& test) override {
    if (!test.result()->Failed()) return;
    printf("To replay: TORCH_EXT_SCHEDULE=%lu, --gtest_filter=%s.%s (last launch: %s)\n",
           torch_ext::gpu::emulation::schedule(), test.test_suite_name(), test.name(),
           text(torch_ext::gpu::emulation::machine()).c_str());
  }
  static const bool appended;
};
inline const bool SaysSchedule::appended = [] {
  testing::UnitTest::GetInstance()->listeners().Append(new SaysSchedule);
  return true;
}();

class Scratch {
 public:
  explicit Scratch(size_t bytes) : bytes_(bytes), memory_(bytes + kGuard, kGarbage) {}
  ~Scratch() noexcept(false) {
    for (size_t i = bytes_; i < memory_.size(); ++i)
      if (memory_[i] != kGarbage) throw std::logic_error("a write past the scratch memory");
  }
  void* data() { return memory_.data(); }

 private:
  static constexpr size_t kGuard = 256;
  static constexpr unsigned char kGarbage = 0xa5;
  size_t bytes_;
  std::vector<unsigned char> memory_;
};

inline void observe(const TensorView& x, int32_t axis, const Statistic& into,
                    ObserveMode mode = {}) {
  Scratch scratch(torch_ext::cuda::observe_scratch(x, axis, into));
  torch_ext::cuda::observe(x, axis, into, mode, scratch.data(), nullptr);
}

}  // namespace machines
