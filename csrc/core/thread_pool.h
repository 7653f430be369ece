// The threads that pack ids. They are started when first needed, and again in a child after a fork.
#ifndef EMBAX_CORE_THREAD_POOL_H_
#define EMBAX_CORE_THREAD_POOL_H_

#include <cstdint>
#include <functional>

namespace embax {

// Runs `work` soon on one of the pool's threads, of which there are then at least `workers` (if the system gives them).
// False if there is no thread at all: the caller does the work. May be called from any thread.
bool SchedulePacking(int64_t workers, std::function<void()> work);

}  // namespace embax

#endif  // EMBAX_CORE_THREAD_POOL_H_
