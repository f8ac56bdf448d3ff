#include "cpu/parallel.h"

#include <algorithm>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "parallel_threads.h"

// The thread pool of the tests that link no torch.
namespace torch_ext::cpu {

int64_t& test_threads() {
  static int64_t threads = 2;
  return threads;
}

int64_t num_threads() { return test_threads(); }

void run_on_pool(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  const int64_t pieces =
      std::clamp<int64_t>((end - begin) / std::max<int64_t>(grain, 1), 1, test_threads());
  const int64_t step = (end - begin + pieces - 1) / pieces;
  std::vector<std::thread> threads;
  // The first failure is thrown on to the caller, as at::parallel_for does.
  std::exception_ptr failure;
  std::mutex mutex;
  for (int64_t b = begin; b < end; b += step)
    threads.emplace_back([&, b, stop = std::min(b + step, end)] {
      try {
        body(b, stop);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (!failure) failure = std::current_exception();
      }
    });
  for (std::thread& thread : threads) thread.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace torch_ext::cpu
