#include "core/thread_pool.h"

#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <cfenv>
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

// A worker that has run out of work looks for more this many times before it sleeps. It takes tens of microseconds, about as long
// as a caller needs from one piece of work to the next, which then finds the workers awake.
constexpr int kSpins = 1000;

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// More workers than these find a processor without being told: there are more to choose from.
constexpr size_t kMostPlaced = 7;

// A thread of the pool, and where Linux may run it. Linux wakes a thread where it ran last, and looks for an idle processor
// only while few are busy: on the processor of the thread that it is to help it would wait for that, for milliseconds, beside idle
// processors.
class Worker {
 public:
#if defined(__linux__)
  // For the worker itself.
  Worker() : thread_(static_cast<pid_t>(syscall(SYS_gettid))) { CPU_ZERO(&told_); }

  // Keeps it off the processor that the calling thread runs on.
  void KeepOffThisProcessor() {
    const int here = sched_getcpu();
    cpu_set_t now;
    if (here < 0 || here >= CPU_SETSIZE || sched_getaffinity(thread_, sizeof(now), &now) != 0) return;
    if (!CPU_EQUAL(&now, &told_)) allowed_ = now;  // By others.
    cpu_set_t wanted = allowed_;
    CPU_CLR(here, &wanted);
    if (CPU_COUNT(&wanted) > 0) Tell(wanted, now);
  }

  void LetRunAnywhere() {
    cpu_set_t now;
    if (sched_getaffinity(thread_, sizeof(now), &now) == 0 && CPU_EQUAL(&now, &told_)) Tell(allowed_, now);
  }

 private:
  void Tell(const cpu_set_t& wanted, const cpu_set_t& now) {
    if (CPU_EQUAL(&wanted, &now) || sched_setaffinity(thread_, sizeof(wanted), &wanted) == 0) told_ = wanted;
  }

  pid_t thread_;
  cpu_set_t allowed_, told_;
#else
  void KeepOffThisProcessor() {}
  void LetRunAnywhere() {}
#endif
};

class Pool {
 public:
  void Schedule(int64_t helpers, const std::function<void()>& work) {
    if (helpers > kMaxWorkers) helpers = kMaxWorkers;
    Item item = {work, {}};
    std::fegetenv(&item.environment);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      workers_.reserve(std::max(num_workers_, helpers));
      while (num_workers_ < helpers) {
        try {
          std::thread([this] { Run(); }).detach();
        } catch (const std::system_error&) {
          break;  // The system gives no more threads; those that there are do the work.
        }
        ++num_workers_;
      }
      if (num_workers_ == 0) return;
      Place();
      for (int64_t i = 0; i < helpers; ++i) {
        queue_.push_back(item);
        queued_.fetch_add(1, std::memory_order_release);
      }
    }
    for (int64_t i = 0; i < helpers; ++i) awake_.notify_one();
  }

 private:
  struct Item {
    std::function<void()> work;
    std::fenv_t environment;  // Of the thread that asked: XLA's round subnormal numbers to zero, others do not.
  };

  void Place() {
    if (workers_.size() <= kMostPlaced) {
      for (Worker& worker : workers_) worker.KeepOffThisProcessor();
    } else if (places_) {
      for (Worker& worker : workers_) worker.LetRunAnywhere();
      places_ = false;
    }
  }

  [[noreturn]] void Run() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      workers_.emplace_back();  // There is room for it.
    }
    for (;;) {
      for (int spin = 0; spin < kSpins && queued_.load(std::memory_order_acquire) == 0; ++spin) Pause();
      Item item;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        awake_.wait(lock, [this] { return !queue_.empty(); });
        item = std::move(queue_.front());
        queue_.pop_front();
        queued_.fetch_sub(1, std::memory_order_release);
      }
      std::fesetenv(&item.environment);
      item.work();
    }
  }

  std::mutex mutex_;
  std::condition_variable awake_;
  std::deque<Item> queue_;
  std::atomic<int64_t> queued_{0};
  int64_t num_workers_ = 0;
  std::vector<Worker> workers_;  // Those that have started.
  bool places_ = true;
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

int64_t AvailableProcessors() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  return std::max<int64_t>(std::thread::hardware_concurrency(), 1);
}

void Schedule(int64_t helpers, const std::function<void()>& work) { GetPool()->Schedule(helpers, work); }

}  // namespace embax
