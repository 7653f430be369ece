// Reads the ids of a feature's slice into entries to be sorted.
#ifndef EMBAX_CORE_READ_H_
#define EMBAX_CORE_READ_H_

#include <algorithm>
#include <cstdint>

#include "core/gains.h"
#include "core/keys.h"
#include "core/radix_sort.h"
#include "core/scratch.h"

namespace embax {

// Ids are turned into keys this many at a time, so that the keys stay in the first-level cache.
constexpr int64_t kBlock = 2048;

// The samples of a feature that one SparseCore looks up.
struct Slice {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t share = 0;  // Samples of the feature on a SparseCore that has a full slice.
};

inline Slice SliceOf(const PackFeature& feature, int64_t num_devices, int64_t sparsecores, int64_t device, int64_t sparsecore) {
  const int64_t batch = feature.batch / num_devices;
  Slice slice;
  slice.share = CeilDiv(batch, sparsecores);
  slice.begin = device * batch + std::min(sparsecore * slice.share, batch);
  slice.end = device * batch + std::min((sparsecore + 1) * slice.share, batch);
  return slice;
}

// What the ids of a stack are read for.
struct Reading {
  Combiner combiner;
  Gains gains;
  Validation validation;
};

// Makes padding of the ids of a block that are outside the vocabulary; returns how many.
template <typename Id>
int64_t BlankIds(const PackFeature& feature, const Id* ids, int64_t count, uint32_t* keys) {
  int64_t blanked = 0;
  for (int64_t i = 0; i < count; ++i) {
    const bool padding = ids[i] == Id{-1} && feature.row_splits == nullptr;
    if (padding || (ids[i] >= 0 && ids[i] < feature.vocabulary)) continue;
    keys[i] = kPaddingKey;
    ++blanked;
  }
  return blanked;
}

// Whether the weights of a block are finite where its ids are not padding.
inline bool AreFinite(const float* weights, int64_t count, const uint32_t* keys) {
  FiniteCheck check;
  for (int64_t i = 0; i < count; ++i) check.Add(weights[i], keys[i] != kPaddingKey);
  return check.all();
}

// Makes padding of the ids of a block whose weights are not finite; returns how many.
inline int64_t BlankWeights(const float* weights, int64_t count, uint32_t* keys) {
  int64_t blanked = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (keys[i] == kPaddingKey || IsFinite(weights[i])) continue;
    keys[i] = kPaddingKey;
    ++blanked;
  }
  return blanked;
}

// Reads the ids of one feature's slice. Under Validation::kRaise it stops and returns false at anything that is wrong with
// them, otherwise at wrong row splits; what it is, is found out afterwards (FindFault). Under kDrop it adds what it leaves
// out to `invalid`. Every row split is read once, so that arrays which change meanwhile cannot lead astray.
template <typename Id, int kPasses>
bool ReadFeature(const PackFeature& feature, const KeyMap& map, const Reading& how, const Slice& slice, uint32_t sample,
                 int64_t room, Scratch& scratch, Appender<kPasses>& out, int64_t& invalid) {
  const Gains gains = how.gains;
  const Combiner combiner = how.combiner;
  const Id* ids = static_cast<const Id*>(feature.ids);
  const int64_t* splits = feature.row_splits;
  const int64_t valency = feature.valency;
  const bool ragged = splits != nullptr;
  const int64_t rows = slice.end - slice.begin;
  if (rows == 0) return true;
  const int64_t begin = ragged ? splits[slice.begin] : slice.begin * valency;
  const int64_t end = ragged ? splits[slice.end] : slice.end * valency;
  if (begin < 0 || end < begin || end > feature.num_ids || end - begin > room) return false;
  uint32_t* keys = scratch.keys.Reserve(kBlock);

  int64_t row = -1, row_end = begin, row_start = out.size();
  const auto next_row = [&] {
    ++row;
    if (!ragged) {
      row_end += valency;
      return true;
    }
    const int64_t next = splits[slice.begin + row + 1];
    if (next < row_end || next > end) return false;
    row_end = next;
    return true;
  };
  const auto finish_row = [&] {
    const int64_t count = out.size() - row_start;
    if (gains == Gains::kSample) {
      scratch.sample_gains.data()[sample + row] = Gain(1.0f, UnitDivisor(combiner, count));
    } else if (gains == Gains::kEntry && combiner != Combiner::kSum) {
      float* weights = scratch.entry_gains.data() + row_start;
      const float divisor = Divisor(combiner, weights, count);
      bool sound = how.validation == Validation::kTrust || IsSound(combiner, divisor, weights, count);
      for (int64_t i = 0; i < count; ++i) weights[i] = Gain(weights[i], divisor);
      if (how.validation != Validation::kTrust) sound = sound && AreFinite(weights, count);
      if (!sound && how.validation == Validation::kRaise) return false;
      if (!sound && how.validation == Validation::kDrop) {
        std::fill_n(weights, count, 0.0f);  // The row has its entries already: they contribute nothing.
        invalid += count;
      }
    }
    row_start = out.size();
    return true;
  };

  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t count = std::min(kBlock, end - start);
    uint32_t found = how.validation == Validation::kTrust ? MakeKeys<Id, false>(map, ids + start, count, keys)
                                                          : MakeKeys<Id, true>(map, ids + start, count, keys);
    if (how.validation != Validation::kTrust) {
      if ((found & kHasBad) || (ragged && (found & kHasPadding))) {
        if (how.validation == Validation::kRaise) return false;
        invalid += BlankIds(feature, ids + start, count, keys);
        found |= kHasPadding;
      }
      if (feature.weights != nullptr && !AreFinite(feature.weights + start, count, keys)) {
        if (how.validation == Validation::kRaise) return false;
        invalid += BlankWeights(feature.weights + start, count, keys);
      }
    }
    if (gains == Gains::kUnit && !ragged && valency == 1) {
      const uint32_t first = sample + static_cast<uint32_t>(start - begin);
      if (found & kHasPadding) {
        for (int64_t i = 0; i < count; ++i) out.AppendUnlessPadding(keys[i], first + static_cast<uint32_t>(i));
      } else {
        for (int64_t i = 0; i < count; ++i) out.Append(keys[i], first + static_cast<uint32_t>(i));
      }
      continue;
    }
    for (int64_t done = 0; done < count;) {
      while (row_end == start + done) {
        if (row >= 0 && !finish_row()) return false;
        if (row + 1 >= rows || !next_row()) return false;
      }
      const uint32_t row_sample = sample + static_cast<uint32_t>(row);
      const int64_t stop = std::min(count, row_end - start);
      if (gains == Gains::kEntry) {
        float* entry_gains = scratch.entry_gains.data();
        uint32_t* entry_samples = scratch.entry_samples.data();
        for (int64_t i = done; i < stop; ++i) {
          const int64_t entry = out.size();
          entry_gains[entry] = feature.weights != nullptr ? feature.weights[start + i] : 1.0f;
          entry_samples[entry] = row_sample;
          out.AppendUnlessPadding(keys[i], static_cast<uint32_t>(entry));
        }
      } else if (found & kHasPadding) {
        for (int64_t i = done; i < stop; ++i) out.AppendUnlessPadding(keys[i], row_sample);
      } else {
        for (int64_t i = done; i < stop; ++i) out.Append(keys[i], row_sample);
      }
      done = stop;
    }
  }
  if (row >= 0 && !finish_row()) return false;
  // The rows that are left must be empty.
  while (ragged && row + 1 < rows) {
    if (!next_row() || row_end != end) return false;
  }
  return true;
}

}  // namespace embax

#endif  // EMBAX_CORE_READ_H_
