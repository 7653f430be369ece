// The Python face of the native code: plain arrays in and out, checked here, with the interpreter lock released meanwhile.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/buffer_pool.h"
#include "core/pack.h"
#include "kernels/ffi.h"
#include "kernels/rows.h"

#if defined(__GLIBCXX__)
#include <cxxabi.h>
#include <unistd.h>
#endif

namespace nb = nanobind;

namespace {

using ReadOnlyArray = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using Int64Matrix = nb::ndarray<const int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Int64Vector = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Int32Output = nb::ndarray<int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using FloatOutput = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

ReadOnlyArray AsArray(nb::handle object, const char* what, size_t number) {
  ReadOnlyArray array;
  if (!nb::try_cast<ReadOnlyArray>(object, array, /*convert=*/false)) {
    const std::string text = std::string(what) + "[" + std::to_string(number) + "] is not a C-contiguous array";
    throw nb::type_error(text.c_str());
  }
  return array;
}

[[noreturn]] void ThrowValueError(const char* what, size_t number, const char* problem) {
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

// The batch between the two phases, as Python holds it.
struct Sorted {
  embax::SortedBatch::Ptr batch;
};

embax::PackTarget ToTarget(Int64Matrix placements, const Int32Output& row_pointers, const Int32Output& ids,
                           const Int32Output& samples, const FloatOutput& gains, int64_t num_local_devices) {
  if (placements.shape(1) != 3) {
    throw nb::value_error("placements must have 3 columns: row_pointers_start, entries_start, capacity");
  }
  if (num_local_devices < 1) throw nb::value_error("num_local_devices must be positive");
  const size_t devices = static_cast<size_t>(num_local_devices);
  if (ids.size() != samples.size() || ids.size() != gains.size() || ids.size() % devices != 0 ||
      row_pointers.size() % devices != 0) {
    throw nb::value_error("ids, samples and gains must have one size, and all arrays an equal part for each device");
  }
  embax::PackTarget target;
  for (size_t i = 0; i < placements.shape(0); ++i) {
    target.placements.push_back({placements(i, 0), placements(i, 1), placements(i, 2)});
  }
  target.arrays.row_pointers = row_pointers.data();
  target.arrays.ids = ids.data();
  target.arrays.samples = samples.data();
  target.arrays.gains = gains.data();
  target.arrays.row_pointers_per_device = static_cast<int64_t>(row_pointers.size() / devices);
  target.arrays.entries_per_device = static_cast<int64_t>(ids.size() / devices);
  return target;
}

using Expected = std::tuple<Int64Matrix, Int32Output, Int32Output, Int32Output, FloatOutput>;

nb::object SortBatch(const nb::list& ids, const nb::list& weights, const nb::list& row_splits, Int64Matrix features,
                    Int64Matrix stacks, Int64Vector order, int64_t num_local_devices, int64_t sparsecores_per_device,
                    int64_t num_sparsecores, int64_t validation, bool count_merged, int64_t threads,
                    const std::optional<Expected>& expected) {
  const size_t num_features = ids.size();
  if (weights.size() != num_features || row_splits.size() != num_features || features.shape(0) != num_features) {
    throw nb::value_error("ids, weights, row_splits and features must have one element a feature");
  }
  if (features.shape(1) != 3) throw nb::value_error("features must have 3 columns: vocabulary, col_offset, col_shift");
  if (stacks.shape(1) != 3) throw nb::value_error("stacks must have 3 columns: combiner, rows, number of features");
  std::vector<ReadOnlyArray> alive;  // What the request points into.
  alive.reserve(3 * num_features);
  embax::PackRequest request;
  request.num_local_devices = num_local_devices;
  request.sparsecores_per_device = sparsecores_per_device;
  request.num_sparsecores = num_sparsecores;
  if (validation < 0 || validation > 2) throw nb::value_error("validation must be 0 (raise), 1 (drop) or 2 (trust)");
  request.validation = static_cast<embax::Validation>(validation);
  request.count_merged = count_merged;
  request.features.resize(num_features);
  for (size_t i = 0; i < num_features; ++i) {
    embax::PackFeature& feature = request.features[i];
    const ReadOnlyArray& array = alive.emplace_back(AsArray(ids[i], "ids", i));
    if (array.dtype() == nb::dtype<int64_t>()) {
      feature.wide_ids = true;
    } else if (array.dtype() != nb::dtype<int32_t>()) {
      ThrowValueError("ids", i, "must be int32 or int64");
    }
    feature.ids = array.data();
    feature.num_ids = static_cast<int64_t>(array.size());
    if (row_splits[i].is_none()) {
      if (array.ndim() != 2) ThrowValueError("ids", i, "must have two dimensions when dense");
      feature.batch = static_cast<int64_t>(array.shape(0));
      feature.valency = static_cast<int64_t>(array.shape(1));
    } else {
      if (array.ndim() != 1) ThrowValueError("ids", i, "must have one dimension when ragged");
      const ReadOnlyArray& splits = alive.emplace_back(AsArray(row_splits[i], "row_splits", i));
      if (splits.dtype() != nb::dtype<int64_t>() || splits.ndim() != 1 || splits.size() == 0) {
        ThrowValueError("row_splits", i, "must be int64, of one dimension, and not empty");
      }
      feature.row_splits = static_cast<const int64_t*>(splits.data());
      feature.batch = static_cast<int64_t>(splits.size()) - 1;
    }
    if (!weights[i].is_none()) {
      const ReadOnlyArray& values = alive.emplace_back(AsArray(weights[i], "weights", i));
      if (values.dtype() != nb::dtype<float>() || values.ndim() != array.ndim() || values.size() != array.size() ||
          values.shape(0) != array.shape(0)) {
        ThrowValueError("weights", i, "must be float32 and have the shape of the ids");
      }
      feature.weights = static_cast<const float*>(values.data());
    }
    feature.vocabulary = features(i, 0);
    feature.col_offset = features(i, 1);
    feature.col_shift = features(i, 2);
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
      if (feature < 0 || static_cast<size_t>(feature) >= num_features) ThrowValueError("stacks", i, "names no feature");
      stack.features.push_back(static_cast<int32_t>(feature));
    }
  }
  Sorted sorted{embax::SortedBatch::New()};
  embax::PackError error;
  embax::PackTarget target;
  if (expected) {
    target = std::apply([&](const auto&... arrays) { return ToTarget(arrays..., num_local_devices); }, *expected);
  }
  WithoutLock([&] { error = sorted.batch->Sort(request, threads, expected ? &target : nullptr); });
  if (error.fault != embax::PackFault::kNone) {
    return nb::make_tuple(static_cast<int>(error.fault), error.feature, error.sample, error.position, error.value,
                          error.number);
  }
  return nb::cast(std::move(sorted));
}

std::vector<embax::PackLimits> ToLimits(const Sorted& sorted, Int64Matrix limits) {
  if (limits.shape(1) != 3 || static_cast<int64_t>(limits.shape(0)) != sorted.batch->num_stacks()) {
    throw nb::value_error("limits must have a row for each stack, and 3 columns: max_ids, max_unique_ids, capacity");
  }
  std::vector<embax::PackLimits> result;
  for (size_t i = 0; i < limits.shape(0); ++i) {
    for (size_t j = 0; j < 3; ++j) {
      if (limits(i, j) < 0) ThrowValueError("limits", i, "is negative");
    }
    result.push_back({limits(i, 0), limits(i, 1), limits(i, 2)});
  }
  return result;
}

embax::PackLayout ToLayout(bool minibatches) {
  return minibatches ? embax::PackLayout::kMinibatches : embax::PackLayout::kShares;
}

nb::ndarray<nb::numpy, int64_t, nb::ndim<1>> Needs(const Sorted& sorted, bool minibatches) {
  std::vector<int64_t> rows;
  for (const embax::PackLimits& need : sorted.batch->Needs(ToLayout(minibatches))) {
    rows.insert(rows.end(), {need.max_ids, need.max_unique_ids, need.capacity});
  }
  return ToNumpy(rows);
}

uint64_t MinibatchBoundaries(const Sorted& sorted, Int64Matrix limits, int64_t threads) {
  const std::vector<embax::PackLimits> of_stacks = ToLimits(sorted, limits);
  uint64_t boundaries = 0;
  WithoutLock([&] { boundaries = sorted.batch->MinibatchBoundaries(of_stacks, threads); });
  return boundaries;
}

int64_t FormMinibatches(Sorted& sorted, uint64_t boundaries, int64_t threads) {
  int64_t minibatches = 1;
  WithoutLock([&] { minibatches = sorted.batch->FormMinibatches(boundaries, threads); });
  return minibatches;
}

nb::ndarray<nb::numpy, int64_t, nb::ndim<1>> Drop(Sorted& sorted, Int64Matrix limits, bool minibatches) {
  const std::vector<embax::PackLimits> of_stacks = ToLimits(sorted, limits);
  std::vector<int64_t> dropped;
  WithoutLock([&] { dropped = sorted.batch->Drop(of_stacks, ToLayout(minibatches)); });
  return ToNumpy(dropped);
}

void WriteBatch(const Sorted& sorted, Int64Matrix placements, Int32Output row_pointers, Int32Output ids,
                Int32Output samples, FloatOutput gains, bool minibatches, int64_t threads) {
  const embax::PackTarget target =
      ToTarget(placements, row_pointers, ids, samples, gains, sorted.batch->num_local_devices());
  bool fits = false;
  WithoutLock([&] { fits = sorted.batch->Write(target, ToLayout(minibatches), threads); });
  if (!fits) throw nb::value_error("the arrays do not hold the batch at these placements");
}

// Row pointers, ids, samples and gains, one behind the other, each at a multiple of 64.
nb::tuple EmptyArrays(int64_t row_pointers, int64_t entries) {
  constexpr int64_t kMost = INT64_MAX / 64;
  if (row_pointers < 0 || entries < 0) throw nb::value_error("sizes must not be negative");
  if (row_pointers > kMost || entries > kMost) throw std::bad_alloc();
  constexpr int64_t kAlignment = 64 / sizeof(int32_t);
  const auto rounded_up = [](int64_t size) { return (size + kAlignment - 1) / kAlignment * kAlignment; };
  const int64_t stride = rounded_up(entries), first = rounded_up(row_pointers);
  auto* data = static_cast<int32_t*>(embax::TakeBuffer(sizeof(int32_t) * (first + 3 * stride)));
  nb::capsule owner(data, [](void* buffer) noexcept { embax::GiveBuffer(buffer); });
  using Int32s = nb::ndarray<nb::numpy, int32_t, nb::ndim<1>>;
  using Floats = nb::ndarray<nb::numpy, float, nb::ndim<1>>;
  const size_t size = static_cast<size_t>(entries);
  auto* gains = reinterpret_cast<float*>(data + first + 2 * stride);
  return nb::make_tuple(Int32s(data, {static_cast<size_t>(row_pointers)}, owner), Int32s(data + first, {size}, owner),
                        Int32s(data + first + stride, {size}, owner), Floats(gains, {size}, owner));
}

nb::dict FfiHandlers() {
  nb::dict handlers;
  for (const embax::FfiHandler* entry = embax::kFfiHandlers; entry->name != nullptr; ++entry) {
    handlers[entry->name] = nb::capsule(reinterpret_cast<void*>(entry->handler));
  }
  return handlers;
}

nb::dict RowRules() {
  const embax::RowKernels& kernels = embax::SelectRowKernels();
  nb::dict rules;
  for (int number = 0; number < kernels.num_rules; ++number) {
    const embax::RowRule& rule = kernels.rules[number];
    nb::list one_value_a_row;
    for (int slot = 0; slot < rule.num_slots; ++slot) one_value_a_row.append((rule.row_wise >> slot & 1) != 0);
    rules[rule.name] = nb::make_tuple(number, one_value_a_row, rule.num_hyperparameters);
  }
  return rules;
}

}  // namespace

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // A thread that packs while the interpreter ends keeps its batch.
  m.doc() = "Native code of embax. Private: its callers check what users give, and write the messages.";
  nb::class_<Sorted>(m, "SortedBatch", "Ids that were read, checked and sorted, and their counts.")
      .def_prop_ro("max_ids", [](const Sorted& s) { return ToNumpy(s.batch->max_ids()); }, nb::rv_policy::automatic,
                   "int32[stacks * local devices * N]: most entries that one SparseCore of the device sends to each.")
      .def_prop_ro("max_unique_ids", [](const Sorted& s) { return ToNumpy(s.batch->max_unique_ids()); }, nb::rv_policy::automatic,
                   "int32, like `max_ids`: most distinct ids.")
      .def("needs", &Needs, nb::arg("minibatches"),
           "int64[stacks * 3]: the least max_ids, max_unique_ids and capacity of each stack that hold the batch.")
      .def_prop_ro("required", [](const Sorted& s) { return ToNumpy(s.batch->required()); }, nb::rv_policy::automatic,
                   "int32[stacks * local devices * S]: entries that each local SparseCore needs.")
      .def_prop_ro("invalid", [](const Sorted& s) { return ToNumpy(s.batch->invalid()); }, nb::rv_policy::automatic,
                   "int64[features]: ids that were left out as not valid.");
  m.def("sort_batch", &SortBatch, nb::arg("ids"), nb::arg("weights"), nb::arg("row_splits"),
        nb::arg("features").noconvert(), nb::arg("stacks").noconvert(), nb::arg("order").noconvert(),
        nb::arg("num_local_devices"), nb::arg("sparsecores_per_device"), nb::arg("num_sparsecores"),
        nb::arg("validation"), nb::arg("count_merged"), nb::arg("threads"), nb::arg("expected").noconvert() = nb::none(),
        "Reads, checks and sorts ids: a SortedBatch, or the first (fault, feature, sample, position, value, number). "
        "What is `expected` are placements and arrays of write_batch, which has little to do if the batch fits there.");
  m.def("minibatch_boundaries", &MinibatchBoundaries, nb::arg("batch"), nb::arg("limits").noconvert(), nb::arg("threads"),
        "Bits of the boundaries between buckets of ids that keep minibatches within the limits.");
  m.def("form_minibatches", &FormMinibatches, nb::arg("batch"), nb::arg("boundaries"), nb::arg("threads"),
        "Puts the entries of a sorted batch into minibatches, once; returns their number.");
  m.def("drop", &Drop, nb::arg("batch"), nb::arg("limits").noconvert(), nb::arg("minibatches"),
        "Drops what is beyond the limits; int64[features]: ids that were dropped.");
  m.def("write_batch", &WriteBatch, nb::arg("batch"), nb::arg("placements").noconvert(),
        nb::arg("row_pointers").noconvert(), nb::arg("ids").noconvert(), nb::arg("samples").noconvert(),
        nb::arg("gains").noconvert(), nb::arg("minibatches"), nb::arg("threads"),
        "Writes a sorted batch into arrays of all stacks, at (row_pointers_start, entries_start, capacity) each.");
  m.def("empty_arrays", &EmptyArrays, nb::arg("row_pointers"), nb::arg("entries"),
        "int32[row_pointers], int32[entries] twice and float32[entries], without values, each at a multiple of 64. Their memory "
        "is kept for a later call once nothing refers to it.");
  m.def("ffi_handlers", &FfiHandlers, "Capsules of the XLA FFI handlers by target name.");
  m.def("row_rules", &RowRules, "(number, a bool a slot, hyperparameters) of each optimizer's row rule, by name.");
  m.def("simd", [] { return embax::SelectRowKernels().isa; }, "Instruction set of the row kernels that were chosen.");
}
