#include "bindings/dense_packer.h"

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "bindings/common.h"
#include "core/pack.h"

namespace {

// The counts of a batch, copied from it.
struct BatchCounts {
  std::vector<int32_t> max_ids, max_unique_ids, required;
};

// Packs batches of dense ids that have the sizes and keep the limits of one before them. Where a batch does not, nothing is said
// of it: the general way, which can say what is wrong, is for all others.
class DensePacker {
 public:
  DensePacker(Int64Matrix features, Int64Matrix stacks, Int64Vector order, int64_t num_local_devices,
              int64_t sparsecores_per_device, int64_t num_sparsecores, int64_t validation, Int64Vector batch_sizes,
              Int64Matrix placements, Int64Matrix limits, int64_t row_pointers, int64_t entries)
      : request_(ToRequest(features, stacks, order, num_local_devices, sparsecores_per_device, num_sparsecores, validation)),
        row_pointers_(row_pointers),
        entries_(entries),
        array_type_(nb::module_::import_("numpy").attr("ndarray")) {
    if (batch_sizes.size() != request_.features.size()) throw nb::value_error("batch_sizes must have one element a feature");
    if (placements.shape(0) != request_.stacks.size() || placements.shape(1) != 3 || limits.shape(0) != placements.shape(0) ||
        limits.shape(1) != 3) {
      throw nb::value_error("placements and limits must have a row for each stack, and 3 columns");
    }
    if (num_local_devices < 1 || row_pointers % num_local_devices != 0 || entries % num_local_devices != 0) {
      throw nb::value_error("all arrays must have an equal part for each device");
    }
    for (size_t i = 0; i < batch_sizes.size(); ++i) request_.features[i].batch = batch_sizes(i) * num_local_devices;
    for (size_t k = 0; k < placements.shape(0); ++k) {
      placements_.push_back({placements(k, 0), placements(k, 1), placements(k, 2)});
      limits_.push_back({limits(k, 0), limits(k, 1), limits(k, 2)});
    }
    needs_.resize(limits_.size());
  }

  // Row pointers, ids, samples, gains and counts of a batch; None if it is not of the kind that this packs.
  nb::object Pack(const nb::list& ids, int64_t threads) {
    if (ids.size() != request_.features.size()) return nb::none();
    std::vector<ReadOnlyArray> alive(ids.size());  // What the request points into.
    for (size_t i = 0; i < alive.size(); ++i) {
      // Exactly NumPy's arrays: a masked one, say, is more than its memory.
      if (ids[i].type().ptr() != array_type_.ptr()) return nb::none();
      if (!nb::try_cast<ReadOnlyArray>(ids[i], alive[i], /*convert=*/false)) return nb::none();
      if (alive[i].dtype() != nb::dtype<int64_t>() && alive[i].dtype() != nb::dtype<int32_t>()) return nb::none();
      if (alive[i].ndim() != 2 || static_cast<int64_t>(alive[i].shape(0)) != request_.features[i].batch) return nb::none();
    }
    embax::PackRequest request = request_;
    for (size_t i = 0; i < alive.size(); ++i) {
      request.features[i].wide_ids = alive[i].dtype() == nb::dtype<int64_t>();
      SetDenseIds(request.features[i], alive[i]);
    }
    const EmptyArrays empty(row_pointers_, entries_);
    embax::PackTarget target = {placements_, empty.pointers};
    target.arrays.row_pointers_per_device = row_pointers_ / request.num_local_devices;
    target.arrays.entries_per_device = entries_ / request.num_local_devices;
    const embax::SortedBatch::Ptr batch = embax::SortedBatch::New();
    std::vector<embax::PackLimits> needs;
    bool packed = false;
    WithoutLock([&] {
      if (batch->Sort(request, threads, &target).fault != embax::PackFault::kNone) return;
      needs = batch->Needs(embax::PackLayout::kShares);
      packed = WithinLimits(needs) && batch->Write(target, embax::PackLayout::kShares, threads);
    });
    if (!packed) return nb::none();
    for (size_t k = 0; k < needs.size(); ++k) {
      needs_[k] = {std::max(needs_[k].max_ids, needs[k].max_ids), std::max(needs_[k].max_unique_ids, needs[k].max_unique_ids),
                   std::max(needs_[k].capacity, needs[k].capacity)};
    }
    BatchCounts counts = {batch->max_ids(), batch->max_unique_ids(), batch->required()};
    return nb::make_tuple(empty.arrays[0], empty.arrays[1], empty.arrays[2], empty.arrays[3], std::move(counts));
  }

  // The least limits that hold each batch so far.
  const std::vector<embax::PackLimits>& needs() const { return needs_; }

 private:
  bool WithinLimits(const std::vector<embax::PackLimits>& needs) const {
    for (size_t k = 0; k < needs.size(); ++k) {
      if (needs[k].max_ids > limits_[k].max_ids || needs[k].max_unique_ids > limits_[k].max_unique_ids ||
          needs[k].capacity > limits_[k].capacity) {
        return false;
      }
    }
    return true;
  }

  embax::PackRequest request_;  // Without ids.
  std::vector<embax::PackPlacement> placements_;
  std::vector<embax::PackLimits> limits_, needs_;
  int64_t row_pointers_, entries_;
  nb::object array_type_;
};

}  // namespace

void DefineDensePacker(nb::module_& m) {
  nb::class_<BatchCounts>(m, "BatchCounts", "Counts of a batch, as those of SortedBatch.")
      .def_prop_ro("max_ids", [](const BatchCounts& c) { return ToNumpy(c.max_ids); }, nb::rv_policy::automatic)
      .def_prop_ro("max_unique_ids", [](const BatchCounts& c) { return ToNumpy(c.max_unique_ids); }, nb::rv_policy::automatic)
      .def_prop_ro("required", [](const BatchCounts& c) { return ToNumpy(c.required); }, nb::rv_policy::automatic);
  nb::class_<DensePacker>(m, "DensePacker", "Packs batches of dense ids that have the sizes and keep the limits of one before them.")
      .def(nb::init<Int64Matrix, Int64Matrix, Int64Vector, int64_t, int64_t, int64_t, int64_t, Int64Vector, Int64Matrix,
                    Int64Matrix, int64_t, int64_t>(),
           nb::arg("features").noconvert(), nb::arg("stacks").noconvert(), nb::arg("order").noconvert(),
           nb::arg("num_local_devices"), nb::arg("sparsecores_per_device"), nb::arg("num_sparsecores"), nb::arg("validation"),
           nb::arg("batch_sizes").noconvert(), nb::arg("placements").noconvert(), nb::arg("limits").noconvert(),
           nb::arg("row_pointers"), nb::arg("entries"))
      .def("pack", &DensePacker::Pack, nb::arg("ids"), nb::arg("threads"),
           "(row pointers, ids, samples, gains, BatchCounts) of a batch, or None if it has another form or other sizes, exceeds a "
           "limit or has a fault: sort_batch says which.")
      .def_prop_ro("needs", [](const DensePacker& p) { return ToNumpy(Flat(p.needs())); }, nb::rv_policy::automatic,
                   "int64[stacks * 3]: the least limits that hold each batch so far.");
}
