#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "core/half.h"

struct CUstream_st;  // a cudaStream_t points to one

// The functions of csrc/cuda/device/gpu.h on the host: the C++ compiler compiles the kernels' own
// source, and each thread of each resident block is a fiber. At every barrier, shuffle and atomic
// the next fiber to run is chosen at random (or in order, or backwards), so a result that depends
// on scheduling is found. Shared memory is filled with garbage first and checked for writes past
// its end; a deadlock is an error.
// Plain loads and stores happen in program order and at once, and no fiber is interrupted between
// two of them, so most races between plain accesses are invisible here: of two fibers without a
// barrier between them one runs on to its next barrier, shuffle or atomic first, and only that
// order of whole stretches is drawn. Compute sanitizer's racecheck finds them on a GPU.
#define TE_GPU inline

namespace torch_ext::gpu {

using Stream = CUstream_st*;

namespace emulation {

// Where a kernel calls sync() or sync_blocks().
struct Barrier {
  const char* file = nullptr;
  int line = 0;
  bool operator==(const Barrier&) const = default;
};

// The device that the drivers plan for, and how threads are scheduled. Set by the tests.
struct Machine {
  int processors = 3;
  int64_t shared_memory = 227 * 1024;
  enum Order { in_order, backwards, random } order = random;
  uint64_t seed = 1;
  // The barrier that is left out, to see that a test notices: one of barriers().
  Barrier without = {};
};
Machine& machine();

// What the environment variable TORCH_EXT_SCHEDULE adds to every seed; 0 where it is not set. With
// another number the same tests run under other schedules, with the same under the same ones.
uint64_t schedule();

// The barriers that kernels have met so far, in order of appearance. Not those that also reduce
// (sync_or). A test may clear it.
std::vector<Barrier>& barriers();

// Number of launches since the program started.
int64_t launches();

void run(int64_t blocks, int threads, size_t shared_memory, bool cooperative,
         const std::function<void()>& kernel);

// Sometimes lets another fiber run.
void pause();
// Exchanges `size` <= 8 bytes with lane (this lane xor `lanes`); waits for all lanes of the warp.
void exchange(const void* mine, void* theirs, size_t size, int lanes);

}  // namespace emulation

int thread();
int64_t block();
int64_t blocks();
constexpr int kWarp = 32;
void* shared();
void sync(const char* file = __builtin_FILE(), int line = __builtin_LINE());
bool sync_or(bool value);
void sync_blocks(const char* file = __builtin_FILE(), int line = __builtin_LINE());

template <class T>
T shuffle_xor(T value, int lanes) {
  T other;
  emulation::exchange(&value, &other, sizeof(T), lanes);
  return other;
}

template <class T>
T fetch_add(T* to, T value) {
  emulation::pause();
  const T old = *to;
  *to = static_cast<T>(old + value);
  return old;
}
inline void add(uint32_t* to, uint32_t value) { fetch_add(to, value); }
inline void add(int64_t* to, int64_t value) { fetch_add(to, value); }
inline void lower(int32_t* to, int32_t value) {
  emulation::pause();
  if (value < *to) *to = value;
}
inline void raise(int32_t* to, int32_t value) {
  emulation::pause();
  if (value > *to) *to = value;
}

struct alignas(16) Packet {
  uint32_t words[4];
};
// Throws unless the address is aligned to 16 bytes, as a device requires.
void expect_aligned(const void* at);
inline Packet load(const void* from) {
  expect_aligned(from);
  Packet p;
  std::memcpy(&p, from, sizeof p);
  return p;
}
inline void store(void* to, const Packet& p) {
  expect_aligned(to);
  std::memcpy(to, &p, sizeof p);
}

inline float widen(core::half x) { return core::to_float(x); }

template <class F, class... A>
auto call_noinline(const F& f, A... arguments) {
  return f(arguments...);
}

struct Device {
  int index;
  int processors;
  int64_t shared_memory;
};
inline Device device() {
  return {0, emulation::machine().processors, emulation::machine().shared_memory};
}

template <class Kernel>
int64_t resident_blocks(size_t) {
  return device().processors;
}

struct Launch {
  int64_t blocks;
  size_t shared_memory = 0;
  bool cooperative = false;
};

template <class Kernel>
void launch(const char*, const Kernel& kernel, const Launch& how, Stream) {
  static_assert(sizeof(Kernel) <= 32764);
  if (how.blocks == 0) return;
  emulation::run(how.blocks, Kernel::kThreads, how.shared_memory, how.cooperative,
                 [&] { kernel(); });
}

}  // namespace torch_ext::gpu
