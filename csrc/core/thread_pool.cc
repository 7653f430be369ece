#include "core/thread_pool.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

namespace embax {
namespace {

constexpr int64_t kMaxWorkers = 1024;

// A worker that has run out of work looks for more this many times before it sleeps. It takes about as long as a caller
// needs between the two phases of a batch (tens of microseconds), so that the second finds the workers awake.
constexpr int kSpins = 1000;

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

class Pool {
 public:
  bool Schedule(int64_t workers, std::function<void()> work) {
    if (workers > kMaxWorkers) workers = kMaxWorkers;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (num_workers_ < workers) {
        try {
          std::thread([this] { Run(); }).detach();
        } catch (const std::system_error&) {
          break;  // The system gives no more threads; those that there are do the work.
        }
        ++num_workers_;
      }
      if (num_workers_ == 0) return false;
      queue_.push_back(std::move(work));
      queued_.fetch_add(1, std::memory_order_release);
    }
    awake_.notify_one();
    return true;
  }

 private:
  [[noreturn]] void Run() {
    for (;;) {
      for (int spin = 0; spin < kSpins && queued_.load(std::memory_order_acquire) == 0; ++spin) Pause();
      std::function<void()> work;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        awake_.wait(lock, [this] { return !queue_.empty(); });
        work = std::move(queue_.front());
        queue_.pop_front();
        queued_.fetch_sub(1, std::memory_order_release);
      }
      work();
    }
  }

  std::mutex mutex_;
  std::condition_variable awake_;
  std::deque<std::function<void()>> queue_;
  std::atomic<int64_t> queued_{0};
  int64_t num_workers_ = 0;
};

// Never destroyed: its threads sleep in it until the process ends. Reached through an atomic rather than a lock, since a
// child may be forked while another thread holds any lock. The child has none of the threads, so it starts over.
std::atomic<Pool*> pool{nullptr};

void ForgetPool() { pool.store(nullptr, std::memory_order_release); }
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, &ForgetPool);

Pool* GetPool() {
  Pool* current = pool.load(std::memory_order_acquire);
  if (current != nullptr) return current;
  Pool* fresh = new Pool;
  if (pool.compare_exchange_strong(current, fresh, std::memory_order_acq_rel)) return fresh;
  delete fresh;  // Another thread was faster; this one has no workers yet.
  return current;
}

}  // namespace

bool SchedulePacking(int64_t workers, std::function<void()> work) {
  return GetPool()->Schedule(workers, std::move(work));
}

}  // namespace embax
