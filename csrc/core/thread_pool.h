// The threads that help to pack ids and to look up and update rows. They are started when first needed, and again in a child
// after a fork.
#ifndef EMBAX_CORE_THREAD_POOL_H_
#define EMBAX_CORE_THREAD_POOL_H_

#include <cstdint>
#include <functional>

namespace embax {

// Runs `work` soon, `helpers` times, on the pool's threads, of which there are then at least as many if the system gives them.
// They have the
// floating-point environment of the caller. Without any thread nothing is run: the caller does the work. May be called from any
// thread.
void Schedule(int64_t helpers, const std::function<void()>& work);

// Processors that the calling thread may run on; 1 where that is not known.
int64_t AvailableProcessors();

}  // namespace embax

#endif  // EMBAX_CORE_THREAD_POOL_H_
