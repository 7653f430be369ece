#include "core/faults.h"

#include <cmath>
#include <cstdint>
#include <map>
#include <vector>

#include "core/gains.h"

namespace embax {
namespace {

template <typename Id>
PackError FindFeatureFault(const PackFeature& feature, Combiner combiner, Validation validation) {
  PackError error;
  const auto report = [&](PackFault fault, int64_t sample, int64_t position, int64_t value, double number) {
    error.fault = fault;
    error.sample = sample;
    error.position = position;
    error.value = value;
    error.number = number;
    return error;
  };
  const Id* ids = static_cast<const Id*>(feature.ids);
  const int64_t* splits = feature.row_splits;
  if (splits != nullptr) {
    if (splits[0] != 0) return report(PackFault::kFirstSplit, 0, 0, splits[0], 0);
    for (int64_t sample = 0; sample < feature.batch; ++sample) {
      if (splits[sample + 1] < splits[sample]) return report(PackFault::kSplit, sample, 0, splits[sample + 1], 0);
    }
    if (splits[feature.batch] != feature.num_ids) {
      return report(PackFault::kLastSplit, feature.batch, 0, splits[feature.batch], 0);
    }
  }
  if (validation != Validation::kRaise) return error;
  std::vector<float> weights;
  std::map<int64_t, float> merged;
  for (int64_t sample = 0; sample < feature.batch; ++sample) {
    const int64_t begin = splits != nullptr ? splits[sample] : sample * feature.valency;
    const int64_t end = splits != nullptr ? splits[sample + 1] : begin + feature.valency;
    if (begin < 0 || end < begin || end > feature.num_ids) return report(PackFault::kChanged, sample, 0, 0, 0);
    weights.clear();
    for (int64_t i = begin; i < end; ++i) {
      const int64_t id = ids[i];
      if (id == -1 && splits == nullptr) continue;
      if (id < 0 || id >= feature.vocabulary) return report(PackFault::kId, sample, i - begin, id, 0);
      if (feature.weights == nullptr) continue;
      const float weight = feature.weights[i];
      if (!IsFinite(weight)) return report(PackFault::kWeight, sample, i - begin, 0, weight);
      weights.push_back(weight);
    }
    if (weights.empty()) continue;
    float divisor = 1;
    if (combiner != Combiner::kSum) {
      divisor = Divisor(combiner, weights.data(), static_cast<int64_t>(weights.size()));
      bool sound = IsSound(combiner, divisor, weights.data(), static_cast<int64_t>(weights.size()));
      for (float& weight : weights) {
        weight = Gain(weight, divisor);
        sound = sound && IsFinite(weight);
      }
      if (!sound) return report(PackFault::kGain, sample, 0, 0, divisor);
    }
    merged.clear();
    size_t next = 0;
    for (int64_t i = begin; i < end; ++i) {
      if (ids[i] == -1 || next == weights.size()) continue;  // The ids may change meanwhile.
      const float sum = merged[ids[i]] += weights[next++];
      if (!IsFinite(sum)) return report(PackFault::kMergedGain, sample, i - begin, ids[i], sum);
    }
  }
  return error;
}

}  // namespace

PackError FindFault(const PackRequest& request) {
  std::vector<Combiner> combiners(request.features.size(), Combiner::kSum);
  for (const PackStack& stack : request.stacks) {
    for (const int32_t number : stack.features) {
      // A stack behind the one that was being checked may name features that there are not.
      if (number >= 0 && number < static_cast<int64_t>(combiners.size())) combiners[number] = stack.combiner;
    }
  }
  for (size_t number = 0; number < request.features.size(); ++number) {
    const PackFeature& feature = request.features[number];
    PackError error = feature.wide_ids ? FindFeatureFault<int64_t>(feature, combiners[number], request.validation)
                                       : FindFeatureFault<int32_t>(feature, combiners[number], request.validation);
    if (error.fault != PackFault::kNone) {
      error.feature = static_cast<int32_t>(number);
      return error;
    }
  }
  PackError error;
  error.fault = PackFault::kChanged;
  return error;
}

}  // namespace embax
