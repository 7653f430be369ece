// Requests to pack, valid and not, and what is to be done with them, made from bytes.
#ifndef EMBAX_TESTS_PACK_PROBLEM_H_
#define EMBAX_TESTS_PACK_PROBLEM_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "core/pack.h"

namespace embax::fuzz {

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

// What is done with the sorted batch.
struct Plan {
  int64_t sort_threads = 1, other_threads = 1;
  PackLayout layout = PackLayout::kShares;
  bool divide = false;             // Into minibatches.
  uint64_t other_boundaries = 0;   // What other hosts ask for.
  bool drop = false;
  std::vector<PackLimits> limits;  // A capacity of -1 is as much as is needed.
  int64_t spare = 0;               // Capacity beyond what is needed.
  int64_t gap = 0;                 // Places that belong to no stack.
  int64_t refusal = 0;             // What is wrong with the arrays of a first attempt to write.
};

struct Problem {
  PackRequest request;
  bool may_be_invalid = false;  // In other ways than by its ids, weights and row splits.
  Plan plan;
  std::vector<std::unique_ptr<Array<int32_t>>> narrow_ids;
  std::vector<std::unique_ptr<Array<int64_t>>> wide_ids, row_splits;
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

inline void FillWeights(Choices& choices, std::mt19937& random, float* weights, int64_t count) {
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

inline void MakeFeature(Choices& choices, Problem& problem, int64_t* offset) {
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
    int64_t* splits = Keep(problem.row_splits, batch + 1);
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
    int64_t* ids = Keep(problem.wide_ids, feature.num_ids);
    FillIds(choices, random, ids, feature, padded);
    feature.ids = ids;
  } else {
    int32_t* ids = Keep(problem.narrow_ids, feature.num_ids);
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

// Makes about one in eight of all ids and weights bad.
inline void Spoil(std::mt19937& random, Problem& problem) {
  for (auto& ids : problem.wide_ids) {
    const int64_t bad[] = {-1, -2, 3000000, INT64_MAX, INT64_MIN, int64_t{1} << 32, static_cast<int64_t>(random())};
    for (int64_t i = 0; i < ids->size; ++i) (*ids)[i] = random() % 8 == 0 ? bad[random() % 7] : (*ids)[i];
  }
  for (auto& ids : problem.narrow_ids) {
    const int32_t bad[] = {-1, -2, 3000000, INT32_MAX, INT32_MIN, static_cast<int32_t>(random())};
    for (int64_t i = 0; i < ids->size; ++i) (*ids)[i] = random() % 8 == 0 ? bad[random() % 6] : (*ids)[i];
  }
  for (auto& weights : problem.weights) {
    const float bad[] = {NAN, INFINITY, -INFINITY, 3e38f}, cancelling[] = {1.0f, -1.0f, 1e-45f};
    const bool cancel = random() % 4 == 0;  // So that samples have tiny sums, and gains that are not finite.
    for (int64_t i = 0; i < weights->size; ++i) {
      if (cancel) (*weights)[i] = cancelling[i % 3];
      if (random() % 8 == 0) (*weights)[i] = bad[random() % 4];
    }
  }
}

// How the request is packed; may be chosen again for another round.
inline void ChoosePlan(Choices& choices, Problem& problem) {
  PackRequest& request = problem.request;
  Plan& plan = problem.plan;
  plan = Plan();
  plan.sort_threads = 1 + choices.Byte() % 3;
  plan.other_threads = 1 + choices.Byte() % 3;
  plan.spare = choices.OneIn(4) ? choices.Below(24) : 0;
  plan.gap = choices.OneIn(4) ? choices.Byte() % 5 : 0;
  plan.refusal = choices.Byte() % 16;
  request.validation = static_cast<Validation>(choices.Byte() % 3);
  request.count_merged = choices.OneIn(2);
  if (request.validation != Validation::kRaise && choices.OneIn(2)) {
    std::mt19937 random(static_cast<uint32_t>(choices.Byte()));
    Spoil(random, problem);
  }
  plan.layout = choices.OneIn(2) ? PackLayout::kMinibatches : PackLayout::kShares;
  plan.divide = plan.layout == PackLayout::kMinibatches && !choices.OneIn(4);
  for (int64_t left = choices.OneIn(8) ? 3 : 0; left > 0; --left) {
    plan.other_boundaries |= uint64_t{1} << choices.Byte() % 64;
  }
  plan.drop = choices.OneIn(2);
  const int64_t sparsecores = std::clamp<int64_t>(request.sparsecores_per_device, 1, 64);
  for (size_t s = 0; s < request.stacks.size(); ++s) {
    const auto limit = [&choices] {
      const int64_t bounds[] = {1, 4, 40, 1000};
      return choices.OneIn(8) ? int64_t{INT32_MAX} : choices.Below(bounds[choices.Byte() % 4]);
    };
    PackLimits limits = {limit(), limit(), -1};
    if (choices.OneIn(2)) limits.capacity = 8 * sparsecores * choices.Below(choices.OneIn(2) ? 3 : 30);
    if (limits.capacity >= 0 && choices.OneIn(4)) limits.capacity += choices.Byte() % 32;
    plan.limits.push_back(limits);
  }
}

inline Problem MakeProblem(Choices& choices) {
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
  problem.may_be_invalid = choices.may_be_invalid();
  ChoosePlan(choices, problem);
  return problem;
}

}  // namespace embax::fuzz

#endif  // EMBAX_TESTS_PACK_PROBLEM_H_
