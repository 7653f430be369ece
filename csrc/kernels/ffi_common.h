// What the FFI handlers share.
#ifndef EMBAX_KERNELS_FFI_COMMON_H_
#define EMBAX_KERNELS_FFI_COMMON_H_

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <string>

#include "xla/ffi/api/ffi.h"

namespace embax {

namespace ffi = xla::ffi;

using Int32s = ffi::Buffer<ffi::S32, 1>;
using Floats = ffi::Buffer<ffi::F32, 1>;
using Int64Span = ffi::Span<const int64_t>;
using FloatSpan = ffi::Span<const float>;

inline ffi::Error Invalid(const std::string& what) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "embax: " + what);
}

// Threads that a kernel may use: as many as XLA's pool has, or fewer if EMBAX_NUM_THREADS says so, which is read once: other
// threads may change the environment later.
inline int64_t NumThreads(ffi::ThreadPool& pool) {
  static const int64_t asked = [] {
    const char* limit = std::getenv("EMBAX_NUM_THREADS");
    return limit != nullptr ? std::atoll(limit) : 0;
  }();
  const int64_t available = std::max<int64_t>(pool.num_threads(), 1);
  return asked > 0 ? std::min<int64_t>(asked, available) : available;
}

// A handler that runs `kHandler`; memory that cannot be had becomes an error of the computation.
template <auto kHandler>
struct Guarded;
template <typename... Args, ffi::Error (*kHandler)(Args...)>
struct Guarded<kHandler> {
  static ffi::Error Run(Args... args) {
    try {
      return kHandler(args...);
    } catch (const std::exception& error) {
      return ffi::Error(ffi::ErrorCode::kResourceExhausted, std::string("embax: ") + error.what());
    }
  }
};

}  // namespace embax

#endif  // EMBAX_KERNELS_FFI_COMMON_H_
