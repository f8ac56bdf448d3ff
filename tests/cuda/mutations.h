#pragma once

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <vector>

#include "gpu.h"

// Kernels with one barrier left out, which a test has to notice.
namespace mutations {

using torch_ext::gpu::emulation::Barrier;
using torch_ext::gpu::emulation::barriers;
using torch_ext::gpu::emulation::machine;
using torch_ext::gpu::emulation::Machine;

// Whether check() returns false, throws, crashes or does not end, in a process of its own: without
// a barrier a kernel can follow a pointer that is not written yet.
inline bool fails(const std::function<bool()>& check) {
  const pid_t child = fork();
  if (child == 0) {
    constexpr rlimit kSeconds = {4, 4};
    setrlimit(RLIMIT_CPU, &kSeconds);
    bool passes = false;
    try {
      passes = check();
    } catch (...) {
    }
    _exit(passes ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return status != 0;
}

// Leaves out the barriers that check() meets, one at a time, and draws schedules until check()
// fails, which it has to do in a second run with the same seed too. Which barriers were found, and
// with which seeds, is printed. `spare` of them guard only what others guard too.
inline void expect_barriers_are_needed(size_t spare, const std::function<bool()>& check) {
  constexpr uint64_t kSeeds = 16;
  machine().seed = 0;
  barriers().clear();
  ASSERT_TRUE(check());
  const std::vector<Barrier> met = barriers();
  ASSERT_FALSE(met.empty());
  size_t missed = 0;
  for (const Barrier& barrier : met) {
    machine().without = barrier;
    // In order and backwards whole warps run ahead of the others.
    const auto fails_with = [&](uint64_t seed) {
      machine().seed = seed;
      machine().order = seed == 0   ? Machine::backwards
                        : seed == 1 ? Machine::in_order
                                    : Machine::random;
      return fails(check);
    };
    uint64_t seed = 0;
    while (seed < kSeeds && !fails_with(seed)) ++seed;
    printf("%s:%d: ", barrier.file, barrier.line);
    if (seed == kSeeds) {
      printf("not found\n");
      ++missed;
      continue;
    }
    printf("seed %lu\n", seed);
    EXPECT_TRUE(fails_with(seed)) << barrier.file << ":" << barrier.line << ", seed " << seed;
  }
  machine() = {};
  EXPECT_LE(missed, spare);
}

}  // namespace mutations
