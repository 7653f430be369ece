#include "core/thread_pool.h"

#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

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

// More workers than these find a processor without being told: there are more to choose from.
constexpr size_t kMostPlaced = 7;

#if defined(__linux__)
pid_t ThisThread() { return static_cast<pid_t>(syscall(SYS_gettid)); }

// Keeps sleeping threads from being woken on the processor that this thread runs on. Linux wakes a thread where it ran last,
// and looks for an idle processor only while few are busy: there it would wait for this thread, for milliseconds, beside idle
// processors.
void KeepOffThisProcessor(const std::vector<pid_t>& threads) {
  cpu_set_t processors;
  const int here = sched_getcpu();
  if (here < 0 || here >= CPU_SETSIZE || sched_getaffinity(0, sizeof(processors), &processors) != 0) return;
  CPU_CLR(here, &processors);
  if (CPU_COUNT(&processors) == 0) return;
  for (const pid_t thread : threads) sched_setaffinity(thread, sizeof(processors), &processors);
}
#else
using pid_t = int;
pid_t ThisThread() { return 0; }
void KeepOffThisProcessor(const std::vector<pid_t>&) {}
#endif

class Pool {
 public:
  void Schedule(int64_t helpers, const std::function<void()>& work) {
    if (helpers > kMaxWorkers) helpers = kMaxWorkers;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (num_workers_ < helpers) {
        try {
          std::thread([this] { Run(); }).detach();
        } catch (const std::system_error&) {
          break;  // The system gives no more threads; those that there are do the work.
        }
        ++num_workers_;
      }
      if (num_workers_ == 0) return;
      if (started_.size() <= kMostPlaced) KeepOffThisProcessor(started_);
      for (int64_t i = 0; i < helpers; ++i) queue_.push_back(work);
      queued_.fetch_add(helpers, std::memory_order_release);
    }
    for (int64_t i = 0; i < helpers; ++i) awake_.notify_one();
  }

 private:
  [[noreturn]] void Run() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      started_.push_back(ThisThread());
    }
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
  std::vector<pid_t> started_;
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

void Schedule(int64_t helpers, const std::function<void()>& work) { GetPool()->Schedule(helpers, work); }

}  // namespace embax
