// A fortified longjmp() refuses to enter another stack.
#undef _FORTIFY_SOURCE

#include "gpu.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace torch_ext::gpu {
namespace emulation {
namespace {

constexpr size_t kStack = 256 * 1024;
constexpr size_t kGuard = 64;
constexpr unsigned char kGarbage = 0xa5;

struct Block;

// setcontext() starts a fiber on its own stack; later switches use _longjmp(), which makes no
// system call.
struct Fiber {
  ucontext_t context;
  jmp_buf place;
  bool begun = false;
  char* stack = nullptr;
  Block* block = nullptr;
  int thread = 0;
  bool done = true;
};

// A barrier, with values that its fibers exchange. There are two sets of values, used in turn: a
// fast fiber can reach the next barrier before a slow one has read the values of this one.
struct Meeting {
  int64_t expected = 0, arrived = 0;
  int parity = 0;
  bool any[2] = {};
  unsigned char values[2][32][8];
  std::vector<Fiber*> waiting;
};

struct Block {
  int64_t index;
  int64_t left;  // threads that have not returned
  std::vector<unsigned char> memory;
  Meeting all;
  std::vector<Meeting> warps;
};

struct Scheduler {
  jmp_buf main;
  std::vector<std::unique_ptr<Fiber>> pool;
  std::vector<Fiber*> ready;
  std::vector<std::unique_ptr<Block>> resident;
  Meeting grid;
  Fiber* current = nullptr;
  const std::function<void()>* kernel = nullptr;
  int64_t blocks = 0;
  size_t shared_memory = 0;
  std::exception_ptr error;
  std::mt19937_64 random;
  int64_t launches = 0;

  void reset() {
    ready.clear();
    resident.clear();
    grid = {};
    for (auto& fiber : pool) fiber->done = true;
  }

  // A fiber that is not in use. Stacks are reused, because mapping them takes longer than running a
  // kernel's thread.
  Fiber* take() {
    for (; next_free < pool.size(); ++next_free)
      if (pool[next_free]->done) return pool[next_free++].get();
    auto fiber = std::make_unique<Fiber>();
    void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::bad_alloc();
    fiber->stack = static_cast<char*>(stack);
    pool.push_back(std::move(fiber));
    next_free = pool.size();
    return pool.back().get();
  }
  size_t next_free = 0;

  void start_block(int64_t index, int threads);
  void yield() {
    if (_setjmp(current->place) == 0) _longjmp(main, 1);
  }
  void resume(Fiber* fiber) {
    current = fiber;
    if (_setjmp(main) != 0) return;
    if (fiber->begun) _longjmp(fiber->place, 1);
    fiber->begun = true;
    setcontext(&fiber->context);
  }
};

Scheduler& scheduler() {
  static Scheduler instance;
  return instance;
}

// The function that a fiber runs.
void enter() {
  Scheduler& s = scheduler();
  try {
    (*s.kernel)();
  } catch (...) {
    if (!s.error) s.error = std::current_exception();
  }
  s.current->done = true;
  --s.current->block->left;
  s.yield();
}

// A function of its own, because getcontext() can return twice.
void begin(Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  fiber.begun = false;
  makecontext(&fiber.context, enter, 0);
}

void Scheduler::start_block(int64_t index, int threads) {
  auto made = std::make_unique<Block>();
  made->index = index;
  made->left = threads;
  made->memory.assign(shared_memory + kGuard + 16, kGarbage);
  made->all.expected = threads;
  made->warps.resize((threads + kWarp - 1) / kWarp);
  for (Meeting& warp : made->warps) warp.expected = kWarp;
  next_free = 0;
  for (int t = 0; t < threads; ++t) {
    Fiber* fiber = take();
    fiber->done = false;
    fiber->block = made.get();
    fiber->thread = t;
    begin(*fiber);
    ready.push_back(fiber);
  }
  resident.push_back(std::move(made));
}

// Waits at a barrier. The last fiber to arrive makes the others ready. Returns which set of values
// this barrier uses.
int meet(Meeting& meeting) {
  Scheduler& s = scheduler();
  const int parity = meeting.parity;
  if (++meeting.arrived < meeting.expected) {
    meeting.waiting.push_back(s.current);
    s.yield();
    return parity;
  }
  meeting.arrived = 0;
  meeting.parity ^= 1;
  meeting.any[meeting.parity] = false;
  s.ready.insert(s.ready.end(), meeting.waiting.begin(), meeting.waiting.end());
  meeting.waiting.clear();
  pause();
  return parity;
}

unsigned char* memory_of(Block& block) {
  const auto start = reinterpret_cast<uintptr_t>(block.memory.data());
  return reinterpret_cast<unsigned char*>((start + 15) / 16 * 16);
}

bool is_intact(Block& block, size_t shared_memory) {
  const unsigned char* end = memory_of(block) + shared_memory;
  return std::all_of(end, end + kGuard / 2, [](unsigned char c) { return c == kGarbage; });
}

}  // namespace

Machine& machine() {
  static Machine instance;
  return instance;
}

int64_t launches() { return scheduler().launches; }

uint64_t schedule() {
  const char* const number = std::getenv("TORCH_EXT_SCHEDULE");
  return number == nullptr ? 0 : std::strtoull(number, nullptr, 10);
}

std::vector<Barrier>& barriers() {
  static std::vector<Barrier> met;
  return met;
}

namespace {

// Whether a barrier is not left out.
bool is_met(const Barrier& barrier) {
  std::vector<Barrier>& met = barriers();
  if (std::find(met.begin(), met.end(), barrier) == met.end()) met.push_back(barrier);
  if (barrier != machine().without) return true;
  pause();
  return false;
}

}  // namespace

void run(int64_t blocks, int threads, size_t shared_memory, bool cooperative,
         const std::function<void()>& kernel) {
  Scheduler& s = scheduler();
  s.reset();
  s.kernel = &kernel;
  s.blocks = blocks;
  s.shared_memory = shared_memory;
  s.error = nullptr;
  s.random.seed(machine().seed + schedule());
  ++s.launches;
  if (threads % kWarp != 0 || static_cast<int64_t>(shared_memory) > machine().shared_memory ||
      (cooperative && blocks > machine().processors))
    throw std::logic_error("a launch that no device could run: " + std::to_string(blocks) +
                           " blocks, " + std::to_string(shared_memory) + " bytes");
  s.grid.expected = blocks * threads;
  std::vector<int64_t> order(blocks);
  for (int64_t b = 0; b < blocks; ++b) order[b] = b;
  if (machine().order == Machine::backwards) std::reverse(order.begin(), order.end());
  if (machine().order == Machine::random) std::shuffle(order.begin(), order.end(), s.random);
  const int64_t at_once = cooperative ? blocks : std::min<int64_t>(blocks, 2);
  int64_t started = 0;
  while (started < blocks || !s.resident.empty()) {
    while (started < blocks && static_cast<int64_t>(s.resident.size()) < at_once)
      s.start_block(order[started++], threads);
    if (s.ready.empty()) throw std::logic_error("deadlock: all threads of the kernel wait");
    size_t pick = s.ready.size() - 1;
    if (machine().order == Machine::random) pick = s.random() % s.ready.size();
    if (machine().order == Machine::in_order) pick = 0;
    std::swap(s.ready[pick], s.ready.back());
    Fiber* const next = s.ready.back();
    s.ready.pop_back();
    s.resume(next);
    if (s.error) std::rethrow_exception(s.error);
    if (!s.current->done || s.current->block->left != 0) continue;
    Block* const ended = s.current->block;
    if (!is_intact(*ended, shared_memory)) throw std::logic_error("a write past shared memory");
    std::erase_if(s.resident, [&](const auto& block) { return block.get() == ended; });
  }
}

void pause() {
  Scheduler& s = scheduler();
  if (machine().order != Machine::random || s.random() % 16 != 0) return;
  s.ready.push_back(s.current);
  s.yield();
}

void exchange(const void* mine, void* theirs, size_t size, int lanes) {
  const Fiber& fiber = *scheduler().current;
  Meeting& warp = fiber.block->warps[fiber.thread / kWarp];
  const int lane = fiber.thread % kWarp;
  std::memcpy(warp.values[warp.parity][lane], mine, size);
  const int parity = meet(warp);
  std::memcpy(theirs, warp.values[parity][lane ^ lanes], size);
}

}  // namespace emulation

using emulation::scheduler;

int thread() { return scheduler().current->thread; }
int64_t block() { return scheduler().current->block->index; }
int64_t blocks() { return scheduler().blocks; }
void* shared() { return emulation::memory_of(*scheduler().current->block); }
void sync(const char* file, int line) {
  if (emulation::is_met({file, line})) emulation::meet(scheduler().current->block->all);
}
bool sync_or(bool value) {
  emulation::Meeting& all = scheduler().current->block->all;
  all.any[all.parity] |= value;
  return all.any[emulation::meet(all)];
}
void sync_blocks(const char* file, int line) {
  if (emulation::is_met({file, line})) emulation::meet(scheduler().grid);
}

void expect_aligned(const void* at) {
  if (reinterpret_cast<uintptr_t>(at) % 16 != 0)
    throw std::logic_error("an access of 16 bytes at an address that is no multiple of 16");
}

}  // namespace torch_ext::gpu
