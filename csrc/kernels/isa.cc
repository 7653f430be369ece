#include <cstdlib>
#include <cstring>

#include "kernels/rows.h"

namespace embax {

namespace baseline {
extern const RowKernels kKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const RowKernels kKernels;
}
namespace avx512 {
extern const RowKernels kKernels;
}
#endif

namespace {

const RowKernels& Choose() {
  const char* asked = std::getenv("EMBAX_SIMD");
  const auto allowed = [asked](const char* isa) { return asked == nullptr || *asked == 0 || std::strcmp(asked, isa) == 0; };
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("bmi2")) {
    return avx512::kKernels;
  }
  if ((allowed("avx2") || allowed("avx512")) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2")) {
    return avx2::kKernels;
  }
#endif
  return baseline::kKernels;
}

}  // namespace

const RowKernels& SelectRowKernels() {
  static const RowKernels& kernels = Choose();
  return kernels;
}

}  // namespace embax
