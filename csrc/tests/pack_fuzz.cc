// Fuzzes packing: turns bytes into requests, valid and not, packs them into arrays of exact size, so that sanitizers see
// every step beside them, and compares with a plain model. fuzz_main.cc or libFuzzer calls it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <map>
#include <memory>
#include <random>
#include <tuple>
#include <utility>
#include <vector>

#include "core/pack.h"

namespace {

using embax::Combiner;
using embax::PackError;
using embax::PackFault;
using embax::PackFeature;
using embax::PackRequest;
using embax::PackStack;
using embax::SortedBatch;

#define EXPECT(condition)                                                  \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                        \
    }                                                                      \
  } while (0)

// Reads choices from bytes; all are 0 once the bytes are used up.
class Choices {
 public:
  Choices(const uint8_t* data, size_t size) : data_(data), end_(data + size) {}

  int64_t Byte() { return data_ < end_ ? *data_++ : 0; }
  int64_t Below(int64_t bound) { return (Byte() << 8 | Byte()) % bound; }
  bool OneIn(int64_t number) { return Byte() % number == number - 1; }

  // The usual value; one time in 64 an odd one, after which the request need not be valid.
  int64_t Usually(int64_t usual, std::initializer_list<int64_t> odd) {
    if (!OneIn(64)) return usual;
    may_be_invalid_ = true;
    return odd.begin()[Byte() % odd.size()];
  }
  bool may_be_invalid() const { return may_be_invalid_; }

 private:
  const uint8_t* data_;
  const uint8_t* end_;
  bool may_be_invalid_ = false;
};

// An array on the heap of exactly its size, never null, which does not move.
template <typename T>
struct Array {
  explicit Array(int64_t size) : size(size), data(new T[size]) {}
  int64_t size;
  std::unique_ptr<T[]> data;
  T& operator[](int64_t i) { return data[i]; }
};

struct Problem {
  PackRequest request;
  bool may_be_invalid = false;  // In other ways than by its ids, weights and row splits.
  int64_t sort_threads = 1, write_threads = 1;
  int64_t spare = 0;     // Capacity beyond what is needed, in multiples of 8 a SparseCore.
  bool too_small = false;  // Capacity below what is needed.
  std::vector<std::unique_ptr<Array<int32_t>>> ids32;
  std::vector<std::unique_ptr<Array<int64_t>>> ids64;  // Row splits too.
  std::vector<std::unique_ptr<Array<float>>> weights;
};

template <typename T>
T* Keep(std::vector<std::unique_ptr<Array<T>>>& arrays, int64_t size) {
  arrays.push_back(std::make_unique<Array<T>>(size));
  return arrays.back()->data.get();
}

template <typename Id>
void FillIds(Choices& choices, std::mt19937& random, Id* ids, const PackFeature& feature, bool padded) {
  const int64_t hot = choices.OneIn(2) ? std::max<int64_t>(feature.vocabulary, 1) : 1 + choices.Below(6);
  for (int64_t i = 0; i < feature.num_ids; ++i) {
    const int64_t id = std::min<int64_t>(random() % hot, std::max<int64_t>(feature.vocabulary, 1) - 1);
    ids[i] = static_cast<Id>(padded && random() % 2 == 0 ? -1 : id);
  }
  if (feature.num_ids > 0 && choices.OneIn(8)) {
    const int64_t bad[] = {-1, -2, feature.vocabulary, INT32_MAX, INT32_MIN, INT64_MAX, INT64_MIN, int64_t{1} << 32};
    ids[choices.Below(feature.num_ids)] = static_cast<Id>(bad[choices.Byte() % 8]);
  }
}

void FillWeights(Choices& choices, std::mt19937& random, float* weights, int64_t count) {
  const bool fractions = choices.OneIn(2);
  for (int64_t i = 0; i < count; ++i) {
    const float number = static_cast<float>(static_cast<int32_t>(random() % 2000) - 500);
    weights[i] = fractions ? number / 256.0f : number * 1.1f;
  }
  if (count > 0 && choices.OneIn(8)) {
    const float bad[] = {NAN, INFINITY, -INFINITY, 0.0f, -0.0f, 1e-45f, 1e38f, -1e38f};
    for (int64_t left = 1 + choices.Byte() % 4; left > 0; --left) weights[choices.Below(count)] = bad[choices.Byte() % 8];
  }
}

void MakeFeature(Choices& choices, Problem& problem, int64_t* offset) {
  const int64_t n = std::clamp<int64_t>(problem.request.num_sparsecores, 1, 15);
  const int64_t local_devices = std::clamp<int64_t>(problem.request.num_local_devices, 1, 8);
  std::mt19937 random(static_cast<uint32_t>(choices.Below(65536)));
  PackFeature feature;
  const int64_t vocabularies[] = {1, 30, 5000, 3000000};
  const int64_t vocabulary = vocabularies[choices.Byte() % 4];
  feature.vocabulary = choices.Usually(vocabulary, {0, -5, INT32_MAX, INT32_MAX + int64_t{1}, INT64_MAX, INT64_MIN});
  const int64_t shift_of_offset = choices.OneIn(4) ? choices.Below(n) : 0;
  feature.col_offset = choices.Usually(*offset + shift_of_offset, {-1, INT32_MAX, INT64_MAX, INT64_MIN});
  feature.col_shift = choices.Usually(choices.Below(2 * n) - n, {INT64_MAX, INT64_MIN});
  *offset += ((vocabulary + n - 1) / n + 2) * n;
  // Rarely as many as several threads, and sorts of several passes, take.
  const bool many = choices.OneIn(64);
  const int64_t samples = choices.Below(many ? 3000 : 12);
  const int64_t batch = samples * local_devices;
  const int64_t longest = choices.Byte() % (choices.OneIn(4) && !many ? 40 : 3);
  if (choices.OneIn(2)) {
    feature.batch = batch;
    int64_t* splits = Keep(problem.ids64, batch + 1);
    splits[0] = 0;
    for (int64_t i = 0; i < batch; ++i) splits[i + 1] = splits[i] + random() % (longest + 1);
    feature.num_ids = splits[batch];
    if (choices.OneIn(8)) {
      const int64_t bad[] = {-1, 0, 1, INT64_MIN, INT64_MAX, feature.num_ids, feature.num_ids + 1, feature.num_ids + 1000};
      splits[choices.Below(batch + 1)] = bad[choices.Byte() % 8];
    }
    feature.row_splits = splits;
  } else {
    feature.num_ids = batch * longest;
    feature.batch = choices.Usually(batch, {-1, batch + 1, 2 * batch, INT64_MAX, INT64_MIN});
    feature.valency = choices.Usually(longest, {-1, longest + 1, INT64_MAX, INT64_MIN});
  }
  feature.wide_ids = choices.OneIn(2);
  const bool padded = feature.row_splits == nullptr && choices.OneIn(2);
  if (feature.wide_ids) {
    int64_t* ids = Keep(problem.ids64, feature.num_ids);
    FillIds(choices, random, ids, feature, padded);
    feature.ids = ids;
  } else {
    int32_t* ids = Keep(problem.ids32, feature.num_ids);
    FillIds(choices, random, ids, feature, padded);
    feature.ids = ids;
  }
  if (choices.OneIn(2)) {
    float* weights = Keep(problem.weights, feature.num_ids);
    FillWeights(choices, random, weights, feature.num_ids);
    feature.weights = weights;
  }
  problem.request.features.push_back(feature);
}

Problem MakeProblem(Choices& choices) {
  Problem problem;
  PackRequest& request = problem.request;
  const int64_t sparsecores = 1 + choices.Byte() % 5, devices = 1 + choices.Byte() % 3;
  request.sparsecores_per_device = choices.Usually(sparsecores, {0, -1, 64, INT64_MAX, INT64_MIN});
  request.num_sparsecores = choices.Usually(devices * sparsecores, {0, -1, 1, 7, INT32_MAX + int64_t{1}, INT64_MAX});
  request.num_local_devices = choices.Usually(1 + choices.Byte() % devices, {0, -1, 5, INT64_MAX, INT64_MIN});
  const int64_t n = std::clamp<int64_t>(request.num_sparsecores, 1, 15);
  const int64_t num_stacks = choices.Byte() % 4;
  for (int64_t s = 0; s < num_stacks; ++s) {
    PackStack stack;
    stack.combiner = static_cast<Combiner>(choices.Byte() % 3);
    int64_t offset = 0;
    const int64_t num_features = choices.Byte() % 4;
    for (int64_t f = 0; f < num_features; ++f) {
      const int64_t number = static_cast<int64_t>(request.features.size());
      stack.features.push_back(static_cast<int32_t>(choices.Usually(number, {-1, 100, INT32_MAX})));
      MakeFeature(choices, problem, &offset);
    }
    stack.num_rows = choices.Usually(offset + n, {0, -n, n, offset + n + 1, INT32_MAX, INT64_MAX, INT64_MIN});
    request.stacks.push_back(stack);
  }
  problem.sort_threads = 1 + choices.Byte() % 3;
  problem.write_threads = 1 + choices.Byte() % 3;
  problem.spare = choices.OneIn(4) ? choices.Byte() % 3 : 0;
  problem.too_small = choices.OneIn(16);
  problem.may_be_invalid = choices.may_be_invalid();
  return problem;
}

// The plain model.

// Gains by (partition, row, sample).
using Entries = std::map<std::tuple<int64_t, int64_t, int64_t>, float>;

int64_t IdAt(const PackFeature& feature, int64_t i) {
  return feature.wide_ids ? static_cast<const int64_t*>(feature.ids)[i] : static_cast<const int32_t*>(feature.ids)[i];
}

// The first fault of a feature of a request that is valid otherwise.
PackFault FeatureFault(const PackFeature& feature, Combiner combiner) {
  const int64_t* splits = feature.row_splits;
  if (splits != nullptr) {
    if (splits[0] != 0) return PackFault::kFirstSplit;
    for (int64_t i = 0; i < feature.batch; ++i) {
      if (splits[i + 1] < splits[i]) return PackFault::kSplit;
    }
    if (splits[feature.batch] != feature.num_ids) return PackFault::kLastSplit;
  }
  for (int64_t sample = 0; sample < feature.batch; ++sample) {
    const int64_t begin = splits != nullptr ? splits[sample] : sample * feature.valency;
    const int64_t end = splits != nullptr ? splits[sample + 1] : begin + feature.valency;
    float sum = 0;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t id = IdAt(feature, i);
      if (id == -1 && splits == nullptr) continue;
      if (id < 0 || id >= feature.vocabulary) return PackFault::kId;
      const float weight = feature.weights != nullptr ? feature.weights[i] : 1.0f;
      if (!std::isfinite(weight)) return PackFault::kWeight;
      sum = combiner == Combiner::kSqrtn ? static_cast<float>(double{weight} * weight + sum) : sum + weight;
    }
    if (combiner == Combiner::kSum) continue;
    const float divisor = combiner == Combiner::kSqrtn ? std::sqrt(sum) : sum;
    for (int64_t i = begin; i < end; ++i) {
      if (IdAt(feature, i) == -1 || divisor == 0) continue;
      const float weight = feature.weights != nullptr ? feature.weights[i] : 1.0f;
      if (!std::isfinite(weight / divisor)) return PackFault::kGain;
    }
  }
  return PackFault::kNone;
}

PackError FirstFault(const PackRequest& request) {
  std::vector<Combiner> combiners(request.features.size(), Combiner::kSum);
  for (const PackStack& stack : request.stacks) {
    for (const int32_t number : stack.features) combiners[number] = stack.combiner;
  }
  PackError error;
  for (size_t number = 0; number < request.features.size(); ++number) {
    error.fault = FeatureFault(request.features[number], combiners[number]);
    error.feature = static_cast<int32_t>(number);
    if (error.fault != PackFault::kNone) return error;
  }
  return PackError();
}

Entries EntriesOf(const PackRequest& request, const PackStack& stack, int64_t part) {
  const int64_t n = request.num_sparsecores, sparsecores = request.sparsecores_per_device;
  const int64_t device = part / sparsecores, sparsecore = part % sparsecores;
  Entries entries;
  int64_t first_sample = 0;
  for (const int32_t number : stack.features) {
    const PackFeature& feature = request.features[number];
    const int64_t batch = feature.batch / request.num_local_devices;
    const int64_t share = (batch + sparsecores - 1) / sparsecores;
    for (int64_t i = sparsecore * share; i < std::min((sparsecore + 1) * share, batch); ++i) {
      const int64_t sample = device * batch + i;
      const int64_t begin = feature.row_splits ? feature.row_splits[sample] : sample * feature.valency;
      const int64_t end = feature.row_splits ? feature.row_splits[sample + 1] : begin + feature.valency;
      float sum = 0;
      for (int64_t j = begin; j < end; ++j) {
        const float weight = IdAt(feature, j) == -1 ? 0.0f : feature.weights ? feature.weights[j] : 1.0f;
        sum = stack.combiner == Combiner::kMean ? sum + weight : static_cast<float>(double{weight} * weight + sum);
      }
      const float divisor = stack.combiner == Combiner::kSum    ? 1.0f
                            : stack.combiner == Combiner::kMean ? sum
                                                                : std::sqrt(sum);
      for (int64_t j = begin; j < end; ++j) {
        const int64_t id = IdAt(feature, j);
        if (id == -1) continue;
        const int64_t col = ((id + feature.col_shift % n) % n + n) % n + (id - id % n) + feature.col_offset;
        const float weight = feature.weights ? feature.weights[j] : 1.0f;
        const auto key = std::make_tuple(col % n, col / n, first_sample + i - sparsecore * share);
        entries[key] += divisor == 0 ? 0.0f : weight / divisor;
      }
    }
    first_sample += share;
  }
  return entries;
}

// What is checked.

constexpr int32_t kUntouched = -7;

struct Packed {
  Array<int32_t> row_pointers, ids, samples;
  Array<float> gains;
  std::vector<embax::PackPlacement> placements;
  embax::PackArrays arrays;

  Packed(int64_t num_pointers, int64_t num_entries)
      : row_pointers(num_pointers), ids(num_entries), samples(num_entries), gains(num_entries) {
    std::fill_n(row_pointers.data.get(), num_pointers, kUntouched);
    std::fill_n(ids.data.get(), num_entries, kUntouched);
    std::fill_n(samples.data.get(), num_entries, kUntouched);
    std::fill_n(gains.data.get(), num_entries, static_cast<float>(kUntouched));
    arrays.row_pointers = row_pointers.data.get();
    arrays.ids = ids.data.get();
    arrays.samples = samples.data.get();
    arrays.gains = gains.data.get();
  }
};

// Arrays of exactly the size that a sorted batch needs, or of one place less or some more.
Packed MakeArrays(const Problem& problem, const SortedBatch& batch) {
  const PackRequest& request = problem.request;
  const int64_t sparsecores = request.sparsecores_per_device, parts = request.num_local_devices * sparsecores;
  const int64_t pointers = sparsecores * std::max<int64_t>(request.num_sparsecores, 8);
  std::vector<embax::PackPlacement> placements;
  int64_t entries = 0;
  for (size_t s = 0; s < request.stacks.size(); ++s) {
    int64_t share = 0;
    for (int64_t p = 0; p < parts; ++p) share = std::max<int64_t>(share, batch.required()[s * parts + p]);
    int64_t capacity = (share + 8 * problem.spare) * sparsecores;
    if (problem.too_small && s == 0) capacity = std::max<int64_t>(share * sparsecores - 1, 0);
    placements.push_back({static_cast<int64_t>(s) * pointers, entries, capacity});
    entries += capacity;
  }
  const int64_t num_pointers = pointers * static_cast<int64_t>(request.stacks.size());
  Packed packed(num_pointers * request.num_local_devices, entries * request.num_local_devices);
  packed.placements = std::move(placements);
  packed.arrays.row_pointers_per_device = num_pointers;
  packed.arrays.entries_per_device = entries;
  return packed;
}

// Entries of one SparseCore, and its counts.
void CheckPart(const PackRequest& request, const SortedBatch& batch, const Packed& packed, int64_t s, int64_t part,
               const Entries& expected, std::vector<int32_t>& max_ids, std::vector<int32_t>& max_unique_ids) {
  const int64_t n = request.num_sparsecores, sparsecores = request.sparsecores_per_device;
  const int64_t device = part / sparsecores, sparsecore = part % sparsecores;
  const embax::PackPlacement& placement = packed.placements[s];
  const int64_t share = placement.capacity / sparsecores;
  const int64_t first = device * packed.arrays.entries_per_device + placement.entries_start + sparsecore * share;
  const int32_t* pointers = packed.arrays.row_pointers + device * packed.arrays.row_pointers_per_device +
                            placement.row_pointers_start + sparsecore * std::max<int64_t>(n, 8);
  int64_t position = 0;
  auto entry = expected.begin();
  for (int64_t partition = 0; partition < n; ++partition) {
    int32_t count = 0, distinct = 0;
    int64_t last_row = -1;
    for (; entry != expected.end() && std::get<0>(entry->first) == partition; ++entry, ++position, ++count) {
      EXPECT(position < share);
      const int64_t row = std::get<1>(entry->first);
      distinct += row != last_row;
      last_row = row;
      EXPECT(row < request.stacks[s].num_rows / n);
      EXPECT(packed.arrays.ids[first + position] == row);
      EXPECT(packed.arrays.samples[first + position] == std::get<2>(entry->first));
      const float gain = packed.arrays.gains[first + position];
      // Gains of equal ids may add up to infinity, or to NaN.
      EXPECT(gain == entry->second || (std::isnan(gain) && std::isnan(entry->second)));
    }
    EXPECT(pointers[partition] == position);
    for (; position % 8 != 0; ++position) {
      EXPECT(packed.arrays.ids[first + position] == INT32_MAX);
      EXPECT(packed.arrays.samples[first + position] == INT32_MAX);
      EXPECT(std::isnan(packed.arrays.gains[first + position]));
    }
    max_ids[device * n + partition] = std::max(max_ids[device * n + partition], count);
    max_unique_ids[device * n + partition] = std::max(max_unique_ids[device * n + partition], distinct);
  }
  EXPECT(entry == expected.end());
  for (int64_t p = n; p < 8; ++p) EXPECT(pointers[p] == position);
  EXPECT(batch.required()[s * request.num_local_devices * sparsecores + part] == position);
  for (; position < share; ++position) EXPECT(packed.arrays.ids[first + position] == kUntouched);
}

void CheckPacked(const PackRequest& request, const SortedBatch& batch, const Packed& packed) {
  const int64_t counts = request.num_local_devices * request.num_sparsecores;
  for (size_t s = 0; s < request.stacks.size(); ++s) {
    std::vector<int32_t> max_ids(counts, 0), max_unique_ids(counts, 0);
    for (int64_t part = 0; part < request.num_local_devices * request.sparsecores_per_device; ++part) {
      const Entries expected = EntriesOf(request, request.stacks[s], part);
      CheckPart(request, batch, packed, static_cast<int64_t>(s), part, expected, max_ids, max_unique_ids);
    }
    EXPECT(std::equal(max_ids.begin(), max_ids.end(), batch.max_ids().begin() + s * counts));
    EXPECT(std::equal(max_unique_ids.begin(), max_unique_ids.end(), batch.max_unique_ids().begin() + s * counts));
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Choices choices(data, size);
  const Problem problem = MakeProblem(choices);
  const PackRequest& request = problem.request;
  const auto batch = SortedBatch::New();
  const PackError error = batch->Sort(request, problem.sort_threads);
  EXPECT(error.fault != PackFault::kChanged);
  EXPECT(problem.may_be_invalid || error.fault != PackFault::kRequest);
  if (problem.may_be_invalid && error.fault != PackFault::kNone) return 0;
  const PackError expected = FirstFault(request);
  EXPECT(error.fault == expected.fault);
  EXPECT(error.feature == expected.feature);
  if (error.fault != PackFault::kNone) return 0;

  const Packed packed = MakeArrays(problem, *batch);
  int64_t needed = 0;
  for (size_t part = 0; !request.stacks.empty() && part < batch->required().size() / request.stacks.size(); ++part) {
    needed = std::max<int64_t>(needed, batch->required()[part]);
  }
  const bool fits = !problem.too_small || needed == 0;
  EXPECT(batch->Write(packed.placements, packed.arrays, embax::PackLayout::kShares, problem.write_threads) == fits);
  if (fits) {
    CheckPacked(request, *batch, packed);
  } else {
    for (int64_t i = 0; i < packed.ids.size; ++i) EXPECT(packed.arrays.ids[i] == kUntouched);
    for (int64_t i = 0; i < packed.row_pointers.size; ++i) EXPECT(packed.arrays.row_pointers[i] == kUntouched);
  }
  return 0;
}
