// Wishes for huge memory pages, which spare most page faults and most walks of page tables.
#ifndef EMBAX_KERNELS_HUGE_PAGES_H_
#define EMBAX_KERNELS_HUGE_PAGES_H_

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace embax {

constexpr uintptr_t kHugePage = 2 << 20;

// Asks for huge pages where whole ones lie in [begin, end). It helps where that memory was not touched yet, and may fail.
inline void AdviseHugePages(const float* begin, const float* end) {
#if defined(__linux__)
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = reinterpret_cast<uintptr_t>(end) / kHugePage * kHugePage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)begin;
  (void)end;
#endif
}

}  // namespace embax

#endif  // EMBAX_KERNELS_HUGE_PAGES_H_
