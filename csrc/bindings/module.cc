// The Python face of the native code: plain arrays in and out, checked here, with the interpreter lock released meanwhile.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/common.h"
#include "bindings/dense_packer.h"
#include "core/pack.h"
#include "core/thread_pool.h"
#include "kernels/ffi.h"
#include "kernels/rows.h"

namespace {

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
  std::vector<ReadOnlyArray> alive;  // What the request points into.
  alive.reserve(3 * num_features);
  embax::PackRequest request =
      ToRequest(features, stacks, order, num_local_devices, sparsecores_per_device, num_sparsecores, validation);
  request.count_merged = count_merged;
  for (size_t i = 0; i < num_features; ++i) {
    embax::PackFeature& feature = request.features[i];
    const ReadOnlyArray& array = alive.emplace_back(AsArray(ids[i], "ids", i));
    if (array.dtype() == nb::dtype<int64_t>()) {
      feature.wide_ids = true;
    } else if (array.dtype() != nb::dtype<int32_t>()) {
      ThrowValueError("ids", i, "must be int32 or int64");
    }
    if (row_splits[i].is_none()) {
      if (array.ndim() != 2) ThrowValueError("ids", i, "must have two dimensions when dense");
      SetDenseIds(feature, array);
    } else {
      if (array.ndim() != 1) ThrowValueError("ids", i, "must have one dimension when ragged");
      const ReadOnlyArray& splits = alive.emplace_back(AsArray(row_splits[i], "row_splits", i));
      if (splits.dtype() != nb::dtype<int64_t>() || splits.ndim() != 1 || splits.size() == 0) {
        ThrowValueError("row_splits", i, "must be int64, of one dimension, and not empty");
      }
      feature.ids = array.data();
      feature.num_ids = static_cast<int64_t>(array.size());
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
  return ToNumpy(Flat(sorted.batch->Needs(ToLayout(minibatches))));
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
  DefineDensePacker(m);
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
  m.def("empty_arrays", [](int64_t row_pointers, int64_t entries) { return EmptyArrays(row_pointers, entries).arrays; },
        nb::arg("row_pointers"), nb::arg("entries"),
        "int32[row_pointers], int32[entries] twice and float32[entries], without values, each at a multiple of 64. Their memory "
        "is kept for a later call once nothing refers to it.");
  m.def("ffi_handlers", &FfiHandlers, "Capsules of the XLA FFI handlers by target name.");
  m.def("row_rules", &RowRules, "(number, a bool a slot, hyperparameters) of each optimizer's row rule, by name.");
  m.def("available_processors", [] { return embax::AvailableProcessors(); }, "Processors that this process may run on.");
  m.def("simd", [] { return embax::SelectRowKernels().isa; }, "Instruction set of the row kernels that were chosen.");
}
