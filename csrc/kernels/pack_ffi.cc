// Packing inside a compiled computation, by the core that packs on the host. What users give makes no error here: ids that
// are not valid are counted, row splits are brought into their range.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "core/format.h"
#include "core/pack.h"
#include "kernels/ffi.h"
#include "kernels/ffi_common.h"
#include "xla/ffi/api/ffi.h"

namespace embax {
namespace {

// What the attributes say of a feature and of a stack (embax/_ops/pack.py).
struct FeatureAttributes {
  int64_t vocabulary, col_offset, col_shift, batch, ragged, weighted;
};
struct StackAttributes {
  int64_t combiner, num_rows, num_features, row_pointers_start, entries_start, capacity;
};

template <typename T>
int64_t CountOf(Int64Span numbers) {
  return static_cast<int64_t>(numbers.size() / (sizeof(T) / sizeof(int64_t)));
}

// Hands out the operands one after another.
class Operands {
 public:
  explicit Operands(const ffi::RemainingArgs& operands) : operands_(operands) {}

  // The data of the next operand, of one dimension; without size if it is not of that type.
  template <typename T, ffi::DataType kType>
  ffi::Span<const T> Next() {
    const auto buffer = operands_.get<ffi::Buffer<kType, 1>>(next_++);
    if (!buffer.has_value()) {
      sound_ = false;
      return {};
    }
    return {buffer->typed_data(), buffer->element_count()};
  }

  // Whether all operands were taken, and were what was asked for.
  bool Finished() const { return sound_ && next_ == operands_.size(); }

 private:
  const ffi::RemainingArgs& operands_;
  size_t next_ = 0;
  bool sound_ = true;
};

// The feature's ids become those that the row splits reach, which then begin at 0 and never decrease.
void TakeSplits(ffi::Span<const int32_t> given, PackFeature& feature, std::vector<int64_t>& splits) {
  splits.resize(given.size());
  int64_t last = 0;
  for (size_t i = 0; i < given.size(); ++i) splits[i] = last = std::clamp<int64_t>(given[i], last, feature.num_ids);
  const int64_t first = splits[0];
  for (int64_t& split : splits) split -= first;
  feature.ids = static_cast<const int32_t*>(feature.ids) + first;
  if (feature.weights != nullptr) feature.weights += first;
  feature.num_ids = last - first;
  feature.row_splits = splits.data();
}

// Operands of each feature: its ids, row splits if it is ragged, weights if it has some; for one device.
ffi::Error Pack(ffi::ThreadPool pool, ffi::RemainingArgs arguments, ffi::Result<Int32s> row_pointers,
                ffi::Result<Int32s> ids, ffi::Result<Int32s> samples, ffi::Result<Floats> gains,
                ffi::Result<Int32s> invalid, int64_t sparsecores_per_device, int64_t num_sparsecores,
                Int64Span feature_numbers, Int64Span stack_numbers, Int64Span order) {
  const auto* features = reinterpret_cast<const FeatureAttributes*>(feature_numbers.begin());
  const auto* stacks = reinterpret_cast<const StackAttributes*>(stack_numbers.begin());
  const int64_t num_features = CountOf<FeatureAttributes>(feature_numbers);
  PackRequest request;
  request.sparsecores_per_device = sparsecores_per_device;
  request.num_sparsecores = num_sparsecores;
  request.validation = Validation::kDrop;
  request.features.resize(num_features);
  std::vector<std::vector<int64_t>> splits(num_features);
  Operands operands(arguments);
  for (int64_t i = 0; i < num_features; ++i) {
    PackFeature& feature = request.features[i];
    feature.vocabulary = features[i].vocabulary;
    feature.col_offset = features[i].col_offset;
    feature.col_shift = features[i].col_shift;
    feature.batch = features[i].batch;
    const auto of_ids = operands.Next<int32_t, ffi::S32>();
    feature.ids = of_ids.begin();
    feature.num_ids = static_cast<int64_t>(of_ids.size());
    ffi::Span<const int32_t> of_splits;
    if (features[i].ragged) {
      of_splits = operands.Next<int32_t, ffi::S32>();
      if (feature.batch < 0 || static_cast<int64_t>(of_splits.size()) - 1 != feature.batch) {
        return Invalid("pack: the row splits of a feature are not one more than its samples");
      }
    } else if (feature.batch > 0) {
      feature.valency = feature.num_ids / feature.batch;
    }
    if (features[i].weighted) {
      const auto of_weights = operands.Next<float, ffi::F32>();
      if (of_weights.size() != of_ids.size()) return Invalid("pack: the weights of a feature are not as many as its ids");
      feature.weights = of_weights.begin();
    }
    if (features[i].ragged) TakeSplits(of_splits, feature, splits[i]);
  }
  if (!operands.Finished()) return Invalid("pack: the operands are not those of the features");

  std::vector<PackPlacement> placements;
  size_t next = 0;
  for (int64_t k = 0; k < CountOf<StackAttributes>(stack_numbers); ++k) {
    const StackAttributes& s = stacks[k];
    if (s.combiner < 0 || s.combiner > 2 || s.num_features < 0 ||
        static_cast<size_t>(s.num_features) > order.size() - next) {
      return Invalid("pack: stack " + std::to_string(k) + " has other features or another combiner than there are");
    }
    PackStack& stack = request.stacks.emplace_back();
    stack.combiner = static_cast<Combiner>(s.combiner);
    stack.num_rows = s.num_rows;
    for (int64_t i = 0; i < s.num_features; ++i) stack.features.push_back(static_cast<int32_t>(order[next++]));
    placements.push_back({s.row_pointers_start, s.entries_start, s.capacity});
  }
  PackArrays arrays;
  arrays.row_pointers = row_pointers->typed_data();
  arrays.ids = ids->typed_data();
  arrays.samples = samples->typed_data();
  arrays.gains = gains->typed_data();
  arrays.row_pointers_per_device = static_cast<int64_t>(row_pointers->element_count());
  arrays.entries_per_device =
      static_cast<int64_t>(std::min({ids->element_count(), samples->element_count(), gains->element_count()}));
  if (static_cast<int64_t>(invalid->element_count()) != num_features) {
    return Invalid("pack: the counts of invalid ids are not as many as the features");
  }

  const int64_t threads = NumThreads(pool);
  const SortedBatch::Ptr batch = SortedBatch::New();
  const PackError error = batch->Sort(request, threads);
  if (error.fault != PackFault::kNone) {
    return Invalid("pack: fault " + std::to_string(static_cast<int>(error.fault)) + " at " + std::to_string(error.value));
  }
  if (!batch->Write({placements, arrays}, PackLayout::kMinibatches, threads)) {
    return Invalid("pack: the arrays do not hold the batch");
  }
  // Nothing that a computation returns may depend on what the memory held before.
  for (size_t k = 0; k < placements.size(); ++k) {
    int64_t used = 0;
    for (int64_t s = 0; s < sparsecores_per_device; ++s) used += batch->required()[k * sparsecores_per_device + s];
    const int64_t start = placements[k].entries_start + used, count = placements[k].capacity - used;
    std::fill_n(arrays.ids + start, count, kPaddingId);
    std::fill_n(arrays.samples + start, count, kPaddingId);
    std::fill_n(arrays.gains + start, count, std::numeric_limits<float>::quiet_NaN());
  }
  for (int64_t i = 0; i < num_features; ++i) {
    invalid->typed_data()[i] = static_cast<int32_t>(std::min<int64_t>(batch->invalid()[i], INT32_MAX));
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(EmbaxPack, Guarded<Pack>::Run,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .Ret<Int32s>()
                                  .Ret<Int32s>()
                                  .Ret<Int32s>()
                                  .Ret<Floats>()
                                  .Ret<Int32s>()
                                  .Attr<int64_t>("sparsecores_per_device")
                                  .Attr<int64_t>("num_sparsecores")
                                  .Attr<Int64Span>("features")
                                  .Attr<Int64Span>("stacks")
                                  .Attr<Int64Span>("order"));

}  // namespace embax
