// What the Python face of the native code is made of: arrays of NumPy, errors, and the interpreter's lock.
#ifndef EMBAX_BINDINGS_COMMON_H_
#define EMBAX_BINDINGS_COMMON_H_

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <new>
#include <string>
#include <vector>

#if defined(__GLIBCXX__)
#include <cxxabi.h>
#include <unistd.h>
#endif

#include "core/buffer_pool.h"
#include "core/pack.h"

namespace nb = nanobind;

using ReadOnlyArray = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using Int64Matrix = nb::ndarray<const int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Int64Vector = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Int32Output = nb::ndarray<int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using FloatOutput = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

inline ReadOnlyArray AsArray(nb::handle object, const char* what, size_t number) {
  ReadOnlyArray array;
  if (!nb::try_cast<ReadOnlyArray>(object, array, /*convert=*/false)) {
    const std::string text = std::string(what) + "[" + std::to_string(number) + "] is not a C-contiguous array";
    throw nb::type_error(text.c_str());
  }
  return array;
}

[[noreturn]] inline void ThrowValueError(const char* what, size_t number, const char* problem) {
  const std::string text = std::string(what) + "[" + std::to_string(number) + "] " + problem;
  throw nb::value_error(text.c_str());
}

template <typename T>
nb::ndarray<nb::numpy, T, nb::ndim<1>> ToNumpy(const std::vector<T>& values) {
  auto* copy = new T[std::max<size_t>(values.size(), 1)];
  nb::capsule owner(copy, [](void* data) noexcept { delete[] static_cast<T*>(data); });
  std::copy(values.begin(), values.end(), copy);
  return nb::ndarray<nb::numpy, T, nb::ndim<1>>(copy, {values.size()}, owner);
}

inline std::vector<int64_t> Flat(const std::vector<embax::PackLimits>& limits) {
  std::vector<int64_t> rows;
  for (const embax::PackLimits& one : limits) rows.insert(rows.end(), {one.max_ids, one.max_unique_ids, one.capacity});
  return rows;
}

// Calls `body` with the interpreter lock released. Where the interpreter ends meanwhile, Python before 3.14 ends this thread
// by unwinding its stack, which C++ answers with std::terminate: such a thread sleeps until the process is gone instead.
template <typename Body>
void WithoutLock(Body&& body) {
  PyThreadState* state = PyEval_SaveThread();
  std::exception_ptr error;
  try {
    body();
  } catch (...) {
    error = std::current_exception();
  }
#if defined(__GLIBCXX__)
  try {
    PyEval_RestoreThread(state);
  } catch (abi::__forced_unwind&) {
    for (;;) pause();
  }
#else
  PyEval_RestoreThread(state);
#endif
  if (error) std::rethrow_exception(error);
}

// What a request says beside ids and weights, which its features lack.
inline embax::PackRequest ToRequest(Int64Matrix features, Int64Matrix stacks, Int64Vector order, int64_t num_local_devices,
                             int64_t sparsecores_per_device, int64_t num_sparsecores, int64_t validation) {
  if (features.shape(1) != 3) throw nb::value_error("features must have 3 columns: vocabulary, col_offset, col_shift");
  if (stacks.shape(1) != 3) throw nb::value_error("stacks must have 3 columns: combiner, rows, number of features");
  if (validation < 0 || validation > 2) throw nb::value_error("validation must be 0 (raise), 1 (drop) or 2 (trust)");
  embax::PackRequest request;
  request.num_local_devices = num_local_devices;
  request.sparsecores_per_device = sparsecores_per_device;
  request.num_sparsecores = num_sparsecores;
  request.validation = static_cast<embax::Validation>(validation);
  request.features.resize(features.shape(0));
  for (size_t i = 0; i < request.features.size(); ++i) {
    request.features[i].vocabulary = features(i, 0);
    request.features[i].col_offset = features(i, 1);
    request.features[i].col_shift = features(i, 2);
  }
  size_t next = 0;
  for (size_t i = 0; i < stacks.shape(0); ++i) {
    embax::PackStack& stack = request.stacks.emplace_back();
    const int64_t combiner = stacks(i, 0), size = stacks(i, 2);
    if (combiner < 0 || combiner > 2) ThrowValueError("stacks", i, "has an unknown combiner");
    if (size < 0 || static_cast<size_t>(size) > order.size() - next) ThrowValueError("stacks", i, "has too many features");
    stack.combiner = static_cast<embax::Combiner>(combiner);
    stack.num_rows = stacks(i, 1);
    for (int64_t j = 0; j < size; ++j) {
      const int64_t feature = order(next++);
      if (feature < 0 || static_cast<size_t>(feature) >= request.features.size()) {
        ThrowValueError("stacks", i, "names no feature");
      }
      stack.features.push_back(static_cast<int32_t>(feature));
    }
  }
  return request;
}

// Points a feature to an array of dense ids.
inline void SetDenseIds(embax::PackFeature& feature, const ReadOnlyArray& array) {
  feature.ids = array.data();
  feature.num_ids = static_cast<int64_t>(array.size());
  feature.batch = static_cast<int64_t>(array.shape(0));
  feature.valency = static_cast<int64_t>(array.shape(1));
}

// Row pointers, ids, samples and gains, one behind the other, each at a multiple of 64, without values. Their memory is kept for
// later ones once nothing refers to it.
struct EmptyArrays {
  EmptyArrays(int64_t row_pointers, int64_t entries) {
    constexpr int64_t kMost = INT64_MAX / 64;
    if (row_pointers < 0 || entries < 0) throw nb::value_error("sizes must not be negative");
    if (row_pointers > kMost || entries > kMost) throw std::bad_alloc();
    constexpr int64_t kAlignment = 64 / sizeof(int32_t);
    const auto rounded_up = [](int64_t size) { return (size + kAlignment - 1) / kAlignment * kAlignment; };
    const int64_t stride = rounded_up(entries), first = rounded_up(row_pointers);
    auto* data = static_cast<int32_t*>(embax::TakeBuffer(sizeof(int32_t) * (first + 3 * stride)));
    nb::capsule owner(data, [](void* buffer) noexcept { embax::GiveBuffer(buffer); });
    pointers.row_pointers = data;
    pointers.ids = data + first;
    pointers.samples = pointers.ids + stride;
    pointers.gains = reinterpret_cast<float*>(pointers.samples + stride);
    using Int32s = nb::ndarray<nb::numpy, int32_t, nb::ndim<1>>;
    using Floats = nb::ndarray<nb::numpy, float, nb::ndim<1>>;
    const size_t size = static_cast<size_t>(entries);
    arrays = nb::make_tuple(Int32s(pointers.row_pointers, {static_cast<size_t>(row_pointers)}, owner),
                            Int32s(pointers.ids, {size}, owner), Int32s(pointers.samples, {size}, owner),
                            Floats(pointers.gains, {size}, owner));
  }

  nb::tuple arrays;
  embax::PackArrays pointers;  // Without the parts of devices.
};

#endif  // EMBAX_BINDINGS_COMMON_H_
