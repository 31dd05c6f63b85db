// A work queue: threads share the tasks of one call.

#ifndef KERNELS_CPU_TASKS_H_
#define KERNELS_CPU_TASKS_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>

namespace tasks {

// Helpers may start after all tasks are done: they keep the work alive, find no
// task left, and touch nothing else.
template <class Work>
struct Shared {
  Work work;
  int64_t count;
  std::atomic<int64_t> next{0}, done{0};

  Shared(Work work, int64_t count) : work(std::move(work)), count(count) {}

  void run() {
    while (true) {
      const int64_t i = next.fetch_add(1, std::memory_order_relaxed);
      if (i >= count) return;
      work(i);
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

// Calls work(0) to work(count - 1), each on the next free thread, and returns
// when all are done. `schedule(task)` runs a task on another thread at some
// later time; `workers` threads work, including this one.
template <class Work, class Schedule>
void share(int64_t count, int64_t workers, Work work,
           const Schedule& schedule) {
  const auto shared = std::make_shared<Shared<Work>>(std::move(work), count);
  for (int64_t i = 1; i < workers && i < count; ++i) {
    schedule([shared] { shared->run(); });
  }
  // This thread works too, so it never waits for a helper that has not started.
  shared->run();
  while (shared->done.load(std::memory_order_acquire) < count) {
    std::this_thread::yield();
  }
}

}  // namespace tasks

#endif  // KERNELS_CPU_TASKS_H_
