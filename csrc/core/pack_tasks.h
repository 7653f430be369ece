// How the phases of packing share their tasks between threads.
#ifndef EMBAX_CORE_PACK_TASKS_H_
#define EMBAX_CORE_PACK_TASKS_H_

#include <algorithm>
#include <cstdint>

#include "core/format.h"
#include "core/parallel.h"

namespace embax {

// A helper is worth waking for this many ids: about 50 microseconds of work, the time that waking a sleeping thread takes.
constexpr int64_t kIdsPerHelper = 6000;

inline int64_t RoundDown(int64_t value) { return value & ~(kPartitionAlignment - 1); }
inline int64_t RoundUp(int64_t value) { return RoundDown(value + kPartitionAlignment - 1); }

inline int64_t HelpersFor(int64_t threads, int64_t ids) {
  return std::max<int64_t>(0, std::min(threads - 1, ids / kIdsPerHelper));
}

}  // namespace embax

#endif  // EMBAX_CORE_PACK_TASKS_H_
