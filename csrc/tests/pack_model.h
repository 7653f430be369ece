// Packing as plain code: slow, and without any of what makes csrc/core fast.
#ifndef EMBAX_TESTS_PACK_MODEL_H_
#define EMBAX_TESTS_PACK_MODEL_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <tuple>
#include <vector>

#include "core/pack.h"

namespace embax::fuzz {

inline int64_t IdAt(const PackFeature& feature, int64_t i) {
  return feature.wide_ids ? static_cast<const int64_t*>(feature.ids)[i] : static_cast<const int32_t*>(feature.ids)[i];
}

// The ids of one sample.
struct Row {
  std::vector<int64_t> ids;
  std::vector<float> gains;
  int64_t invalid = 0;  // Ids that Validation::kDrop leaves out, or gives no gain.
  bool stray = false;   // It has ids outside the vocabulary which Validation::kTrust lets through.
  PackFault fault = PackFault::kNone;
  int64_t position = 0;  // Of the fault.
};

inline Row ReadRow(const PackFeature& feature, Combiner combiner, Validation validation, int64_t sample) {
  const bool ragged = feature.row_splits != nullptr;
  const int64_t begin = ragged ? feature.row_splits[sample] : sample * feature.valency;
  const int64_t end = ragged ? feature.row_splits[sample + 1] : begin + feature.valency;
  Row row;
  const auto is_wrong = [&](PackFault fault, int64_t position, int64_t ids) {
    if (validation == Validation::kRaise && row.fault == PackFault::kNone) {
      row.fault = fault;
      row.position = position;
    }
    if (validation == Validation::kDrop) row.invalid += ids;
  };
  std::vector<int64_t> positions;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t id = IdAt(feature, i);
    const float weight = feature.weights != nullptr ? feature.weights[i] : 1.0f;
    if (id == -1 && !ragged) continue;
    if (id < 0 || id >= feature.vocabulary) {
      is_wrong(PackFault::kId, i - begin, 1);
      row.stray |= validation == Validation::kTrust;
    } else if (!std::isfinite(weight) && validation != Validation::kTrust) {
      is_wrong(PackFault::kWeight, i - begin, 1);
    } else {
      row.ids.push_back(id);
      row.gains.push_back(weight);
      positions.push_back(i - begin);
    }
  }
  const auto check_merged = [&] {
    std::map<int64_t, float> merged;
    for (size_t j = 0; j < row.ids.size() && row.fault == PackFault::kNone; ++j) {
      const float gain = merged[row.ids[j]] += row.gains[j];
      if (!std::isfinite(gain)) is_wrong(PackFault::kMergedGain, positions[j], 0);
    }
  };
  if (combiner == Combiner::kSum) {
    check_merged();
    return row;
  }
  float sum = 0;
  bool weighted = false;
  for (const float weight : row.gains) {
    sum = combiner == Combiner::kMean ? sum + weight : static_cast<float>(double{weight} * weight + sum);
    weighted |= weight != 0;
  }
  const float divisor = combiner == Combiner::kMean ? sum : std::sqrt(sum);
  bool finite = std::isfinite(divisor) && (combiner == Combiner::kMean || divisor != 0 || !weighted);
  for (float& gain : row.gains) {
    gain = divisor == 0 ? 0.0f : gain / divisor;
    finite = finite && std::isfinite(gain);
  }
  if (!finite && validation != Validation::kTrust) {
    is_wrong(PackFault::kGain, 0, static_cast<int64_t>(row.ids.size()));
    std::fill(row.gains.begin(), row.gains.end(), 0.0f);
  }
  check_merged();
  return row;
}

// The first fault of a feature of a request that is valid otherwise.
inline PackError FeatureFault(const PackFeature& feature, Combiner combiner, Validation validation) {
  PackError error;
  const int64_t* splits = feature.row_splits;
  if (splits != nullptr) {
    error.position = 0;
    if (splits[0] != 0) {
      error.fault = PackFault::kFirstSplit;
      error.sample = 0;
      return error;
    }
    for (error.sample = 0; error.sample < feature.batch; ++error.sample) {
      if (splits[error.sample + 1] >= splits[error.sample]) continue;
      error.fault = PackFault::kSplit;
      return error;
    }
    if (splits[feature.batch] != feature.num_ids) {
      error.fault = PackFault::kLastSplit;
      return error;
    }
  }
  for (error.sample = 0; validation == Validation::kRaise && error.sample < feature.batch; ++error.sample) {
    const Row row = ReadRow(feature, combiner, validation, error.sample);
    error.fault = row.fault;
    error.position = row.position;
    if (error.fault != PackFault::kNone) return error;
  }
  return PackError();
}

inline PackError FirstFault(const PackRequest& request) {
  std::vector<Combiner> combiners(request.features.size(), Combiner::kSum);
  for (const PackStack& stack : request.stacks) {
    for (const int32_t number : stack.features) combiners[number] = stack.combiner;
  }
  for (size_t number = 0; number < request.features.size(); ++number) {
    PackError error = FeatureFault(request.features[number], combiners[number], request.validation);
    error.feature = static_cast<int32_t>(number);
    if (error.fault != PackFault::kNone) return error;
  }
  return PackError();
}

struct ModelEntry {
  float gain = 0;
  int64_t ids = 0;  // Of which it was made.
  int32_t feature = 0;
  bool beside_stray = false;  // An id of the same sample is stray: the gain is not this one.
};

// The entries of one SparseCore by (partition, row, sample).
using Part = std::map<std::tuple<int64_t, int64_t, int64_t>, ModelEntry>;

struct Model {
  std::vector<std::vector<Part>> stacks;  // [stack][device * SparseCores of a device + SparseCore]
  std::vector<bool> stray;                // Stacks with ids outside the vocabulary, which the model leaves out.
  std::vector<int64_t> invalid;           // By feature.
};

inline Model MakeModel(const PackRequest& request) {
  const int64_t n = request.num_sparsecores, sparsecores = request.sparsecores_per_device;
  Model model;
  model.invalid.assign(request.features.size(), 0);
  for (const PackStack& stack : request.stacks) {
    std::vector<Part>& parts = model.stacks.emplace_back(request.num_local_devices * sparsecores);
    bool stray = false;
    for (int64_t part = 0; part < static_cast<int64_t>(parts.size()); ++part) {
      const int64_t device = part / sparsecores, sparsecore = part % sparsecores;
      int64_t first_sample = 0;
      for (const int32_t number : stack.features) {
        const PackFeature& feature = request.features[number];
        const int64_t batch = feature.batch / request.num_local_devices;
        const int64_t share = (batch + sparsecores - 1) / sparsecores;
        for (int64_t i = sparsecore * share; i < std::min((sparsecore + 1) * share, batch); ++i) {
          const Row row = ReadRow(feature, stack.combiner, request.validation, device * batch + i);
          model.invalid[number] += row.invalid;
          stray |= row.stray;
          for (size_t j = 0; j < row.ids.size(); ++j) {
            const int64_t id = row.ids[j], shifted = ((id + feature.col_shift % n) % n + n) % n;
            const int64_t column = shifted + (id - id % n) + feature.col_offset;
            const auto place = std::make_tuple(column % n, column / n, first_sample + i - sparsecore * share);
            const auto [entry, is_new] = parts[part].try_emplace(place, ModelEntry{row.gains[j], 1, number, row.stray});
            if (is_new) continue;
            entry->second.gain += row.gains[j];
            ++entry->second.ids;
          }
        }
        first_sample += share;
      }
      for (auto& [place, entry] : parts[part]) {
        if (request.validation != Validation::kDrop || std::isfinite(entry.gain)) continue;
        entry.gain = 0;
        ++model.invalid[entry.feature];
      }
    }
    model.stray.push_back(stray);
  }
  return model;
}

}  // namespace embax::fuzz

#endif  // EMBAX_TESTS_PACK_MODEL_H_
