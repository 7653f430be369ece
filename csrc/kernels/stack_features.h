// The arrays of features among the buffers of a call.
#ifndef EMBAX_KERNELS_STACK_FEATURES_H_
#define EMBAX_KERNELS_STACK_FEATURES_H_

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/ffi_common.h"
#include "kernels/packed_batch.h"
#include "kernels/rows.h"

namespace embax {

// The arrays of the features of all stacks, one after the other among some buffers.
class StackFeatures {
 public:
  template <typename Buffers>
  StackFeatures(const Buffers& buffers, const PackedBatch& batch, Int64Span num_features) {
    problem_ = Read(buffers, batch, num_features);
  }

  const std::string& problem() const { return problem_; }
  // The first feature of a stack; that of the stack behind the last is the number of all.
  int64_t first(int64_t k) const { return firsts_[k]; }
  int64_t count(int64_t k) const { return firsts_[k + 1] - firsts_[k]; }
  int64_t columns(int64_t k) const { return arrays_[firsts_[k]].columns; }
  const FeatureRows* rows(int64_t feature) const { return &rows_[feature]; }
  const std::vector<Columns>& arrays() const { return arrays_; }

 private:
  template <typename Buffers>
  std::string Read(const Buffers& buffers, const PackedBatch& batch, Int64Span num_features) {
    if (static_cast<int64_t>(num_features.size()) != batch.num_stacks()) return "the features of each stack are expected";
    firsts_.push_back(0);
    for (int64_t k = 0; k < batch.num_stacks(); ++k) {
      const std::string stack = "stack " + std::to_string(k);
      const int64_t left = static_cast<int64_t>(buffers.size()) - firsts_.back();
      if (num_features[k] < 1 || num_features[k] > left) return stack + " lacks arrays of its features";
      firsts_.push_back(firsts_.back() + num_features[k]);
      int64_t samples = 0;
      for (int64_t feature = firsts_[k]; feature < firsts_[k + 1]; ++feature) {
        const Columns array = Columns::Of(buffers, feature);
        if (!array.valid()) return "the arrays of features must be float32 of rank 1 or 2";
        arrays_.push_back(array);
        if (array.columns != columns(k)) return "the features of " + stack + " have different columns";
        const int64_t sparsecores = batch.sparsecores_per_device();
        rows_.push_back({samples, (array.rows + sparsecores - 1) / sparsecores, array.rows, array.data});
        samples += rows_.back().samples;
      }
      if (samples != batch.stack(k).samples_per_sparsecore) return "the features of " + stack + " have another number of samples";
    }
    return "";
  }

  std::vector<int64_t> firsts_;
  std::vector<Columns> arrays_;
  std::vector<FeatureRows> rows_;
  std::string problem_;
};

}  // namespace embax

#endif  // EMBAX_KERNELS_STACK_FEATURES_H_
