// Splits work over threads without ever waiting on a task that has not started.
#ifndef EMBAX_CORE_PARALLEL_H_
#define EMBAX_CORE_PARALLEL_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>

#include "core/thread_pool.h"

namespace embax {

// Calls body(0), ..., body(count - 1), on this thread and on up to `helpers` of the pool's, which have this thread's
// floating-point environment. Returns when all calls have returned; rethrows the first exception that one of them threw. A helper
// that starts late finds nothing left to do, so a busy pool costs time but never a deadlock.
template <typename Body>
void ParallelFor(int64_t helpers, int64_t count, Body&& body) {
  if (helpers <= 0 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  struct State {
    std::function<void(int64_t)> body;
    int64_t count;
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> finished{0};
    std::mutex mutex;
    std::condition_variable all_finished;
    std::exception_ptr error;

    void Work() {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
        try {
          body(i);
        } catch (...) {
          std::lock_guard<std::mutex> lock(mutex);
          if (!error) error = std::current_exception();
        }
        if (finished.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
          std::lock_guard<std::mutex> lock(mutex);
          all_finished.notify_all();
        }
      }
    }
  };
  auto state = std::make_shared<State>();
  state->body = std::ref(body);  // Called only while this frame is alive.
  state->count = count;
  if (helpers > count - 1) helpers = count - 1;
  try {
    Schedule(helpers, [state] { state->Work(); });
  } catch (...) {
    // Those that were started may be running `body` already: go on with them.
  }
  state->Work();
  // What is still running on other threads is at most one call each: spin for about that long before sleeping.
  for (int spin = 0; spin < 20000; ++spin) {
    if (state->finished.load(std::memory_order_acquire) == count) break;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  if (state->finished.load(std::memory_order_acquire) != count) {
    std::unique_lock<std::mutex> lock(state->mutex);
    state->all_finished.wait(lock, [&] { return state->finished.load(std::memory_order_acquire) == count; });
  }
  if (state->error) std::rethrow_exception(state->error);
}

}  // namespace embax

#endif  // EMBAX_CORE_PARALLEL_H_
