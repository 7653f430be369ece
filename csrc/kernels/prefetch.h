// Asks for memory before it is used.
#ifndef EMBAX_KERNELS_PREFETCH_H_
#define EMBAX_KERNELS_PREFETCH_H_

#include <cstdint>

namespace embax {

// How many rows before their use they are asked for, into the second level cache. The first has too few requests under way at a
// time, and loads that wait behind them there hold up the work. The second is large, so that there is time for several
// memory accesses (about 100 ns each, more where addresses must be translated) even where rows are short, and work little.
constexpr int64_t kPrefetchAhead = 32;

// Static: each instruction set has a copy of its own. Always inlined: GCC drops the call of a function that only prefetches.
static inline __attribute__((always_inline)) void Prefetch(const void* address) { __builtin_prefetch(address, 0, 2); }

static inline __attribute__((always_inline)) void PrefetchBytes(const void* begin, int64_t bytes) {
  constexpr int64_t kCacheLine = 64;
  // What lies further behind follows without being asked for.
  constexpr int64_t kMost = 1024;
  if (bytes > kMost) bytes = kMost;
  const char* p = static_cast<const char*>(begin);
  for (int64_t i = 0; i < bytes; i += kCacheLine) Prefetch(p + i);
  if (reinterpret_cast<uintptr_t>(p) % kCacheLine) Prefetch(p + bytes - 1);
}

}  // namespace embax

#endif  // EMBAX_KERNELS_PREFETCH_H_
