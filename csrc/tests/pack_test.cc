// Packing against a plain reimplementation, with arrays of exact size so that sanitizers see every step beside them.
#include "core/pack.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <thread>
#include <tuple>
#include <vector>

namespace {

using embax::PackError;
using embax::PackFault;
using embax::PackFeature;
using embax::PackRequest;
using embax::SortedBatch;

#define EXPECT(condition)                                                       \
  do {                                                                          \
    if (!(condition)) {                                                         \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);      \
      std::exit(1);                                                             \
    }                                                                           \
  } while (0)

// Vectors of exact size, which keep the arrays of a request alive.
struct Problem {
  PackRequest request;
  std::vector<std::vector<int32_t>> ids32;
  std::vector<std::vector<int64_t>> ids64;
  std::vector<std::vector<int64_t>> splits;
  std::vector<std::vector<float>> weights;
};

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t Below(int64_t bound) { return std::uniform_int_distribution<int64_t>(0, bound - 1)(engine_); }
  bool Coin() { return Below(2) == 0; }

 private:
  std::mt19937_64 engine_;
};

// `scale` bounds the samples of a feature.
Problem MakeProblem(uint64_t seed, int64_t scale) {
  Random random(seed);
  Problem problem;
  PackRequest& request = problem.request;
  request.sparsecores_per_device = 1 + random.Below(5);
  const int64_t devices = 1 + random.Below(3);
  request.num_sparsecores = devices * request.sparsecores_per_device;
  request.num_local_devices = 1 + random.Below(devices);
  const int64_t n = request.num_sparsecores;
  const int64_t num_stacks = 1 + random.Below(4);
  for (int64_t s = 0; s < num_stacks; ++s) {
    embax::PackStack stack;
    stack.combiner = static_cast<embax::Combiner>(random.Below(3));
    int64_t offset = 0;
    const int64_t num_features = random.Below(4);
    for (int64_t f = 0; f < num_features; ++f) {
      PackFeature feature;
      const int64_t vocabularies[] = {1, 30, 5000, 3000000};
      feature.vocabulary = vocabularies[random.Below(4)];
      feature.col_offset = offset + (random.Coin() ? random.Below(n) : 0);
      feature.col_shift = random.Below(2 * n) - n;
      offset += ((feature.vocabulary + n - 1) / n + 2) * n;
      feature.batch = random.Below(scale) * request.num_local_devices;
      feature.wide_ids = random.Coin();
      const bool ragged = random.Coin();
      const int64_t longest = 1 + random.Below(random.Coin() ? 2 : 40);
      std::vector<int64_t> splits = {0};
      for (int64_t i = 0; i < feature.batch; ++i) splits.push_back(splits.back() + random.Below(longest + 1));
      feature.valency = ragged ? 0 : longest;
      feature.num_ids = ragged ? splits.back() : feature.batch * longest;
      std::vector<int64_t> ids(feature.num_ids);
      const int64_t hot = random.Coin() ? feature.vocabulary : 1 + random.Below(std::min<int64_t>(feature.vocabulary, 5));
      const bool padded = !ragged && random.Coin();
      for (int64_t& id : ids) id = padded && random.Coin() ? -1 : random.Below(hot);
      std::vector<float> weights(feature.num_ids);
      for (float& weight : weights) weight = static_cast<float>(random.Below(2000) - 500) / 256.0f;
      if (feature.wide_ids) {
        problem.ids64.push_back(ids);
        feature.ids = problem.ids64.back().data();
      } else {
        problem.ids32.emplace_back(ids.begin(), ids.end());
        feature.ids = problem.ids32.back().data();
      }
      if (ragged) {
        problem.splits.push_back(splits);
        feature.row_splits = problem.splits.back().data();
      }
      if (random.Coin()) {
        problem.weights.push_back(weights);
        feature.weights = problem.weights.back().data();
      }
      stack.features.push_back(static_cast<int32_t>(request.features.size()));
      request.features.push_back(feature);
    }
    stack.num_rows = offset + n;
    request.stacks.push_back(stack);
  }
  return problem;
}

// One with enough ids that four threads take part.
Problem LargeProblem() {
  for (uint64_t seed = 0;; ++seed) {
    Problem problem = MakeProblem(seed, 900);
    int64_t ids = 0;
    for (const PackFeature& feature : problem.request.features) ids += feature.num_ids;
    if (ids > 40000) return problem;
  }
}

int64_t IdAt(const PackFeature& feature, int64_t i) {
  return feature.wide_ids ? static_cast<const int64_t*>(feature.ids)[i] : static_cast<const int32_t*>(feature.ids)[i];
}

struct Packed {
  std::vector<int32_t> row_pointers, ids, samples;
  std::vector<float> gains;
  std::vector<embax::PackPlacement> placements;

  void Clear() {
    for (auto* array : {&row_pointers, &ids, &samples}) std::fill(array->begin(), array->end(), -7);
    std::fill(gains.begin(), gains.end(), -7.0f);
  }

  // Where it was written, by requests of so many local devices.
  embax::PackTarget Target(int64_t devices) {
    embax::PackArrays arrays = {row_pointers.data(), ids.data(), samples.data(), gains.data()};
    arrays.row_pointers_per_device = static_cast<int64_t>(row_pointers.size()) / devices;
    arrays.entries_per_device = static_cast<int64_t>(ids.size()) / devices;
    return {placements, arrays};
  }
};

Packed Write(const PackRequest& request, const SortedBatch& batch, int64_t threads) {
  Packed packed;
  const int64_t parts = request.num_local_devices * request.sparsecores_per_device;
  const int64_t pointers = request.sparsecores_per_device * std::max<int64_t>(request.num_sparsecores, 8);
  int64_t entries = 0;
  for (size_t s = 0; s < request.stacks.size(); ++s) {
    int64_t share = 0;
    for (int64_t p = 0; p < parts; ++p) share = std::max<int64_t>(share, batch.required()[s * parts + p]);
    const int64_t capacity = share * request.sparsecores_per_device;
    packed.placements.push_back({static_cast<int64_t>(s) * pointers, entries, capacity});
    entries += capacity;
  }
  embax::PackArrays arrays;
  arrays.row_pointers_per_device = pointers * static_cast<int64_t>(request.stacks.size());
  arrays.entries_per_device = entries;
  packed.row_pointers.assign(arrays.row_pointers_per_device * request.num_local_devices, -7);
  packed.ids.assign(entries * request.num_local_devices, -7);
  packed.samples.assign(packed.ids.size(), -7);
  packed.gains.assign(packed.ids.size(), -7);
  arrays.row_pointers = packed.row_pointers.data();
  arrays.ids = packed.ids.data();
  arrays.samples = packed.samples.data();
  arrays.gains = packed.gains.data();
  EXPECT(batch.Write({packed.placements, arrays}, embax::PackLayout::kShares, threads));
  for (embax::PackPlacement& placement : packed.placements) {
    if (placement.capacity == 0) continue;
    std::vector<embax::PackPlacement> small = packed.placements;
    small[&placement - packed.placements.data()].capacity -= 1;
    EXPECT(!batch.Write({small, arrays}, embax::PackLayout::kShares, threads));
    break;
  }
  return packed;
}

void CheckAgainstPlainCode(const PackRequest& request, const Packed& packed) {
  const int64_t n = request.num_sparsecores, sparsecores = request.sparsecores_per_device;
  const int64_t pointers_per_device = static_cast<int64_t>(packed.row_pointers.size()) / request.num_local_devices;
  const int64_t entries_per_device = static_cast<int64_t>(packed.ids.size()) / request.num_local_devices;
  for (size_t s = 0; s < request.stacks.size(); ++s) {
    const embax::PackStack& stack = request.stacks[s];
    for (int64_t part = 0; part < request.num_local_devices * sparsecores; ++part) {
      const int64_t device = part / sparsecores, sparsecore = part % sparsecores;
      std::map<std::tuple<int64_t, int64_t, int64_t>, float> entries;
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
            if (IdAt(feature, j) == -1) continue;
            const float weight = feature.weights ? feature.weights[j] : 1.0f;
            sum = stack.combiner == embax::Combiner::kMean ? sum + weight
                                                           : static_cast<float>(static_cast<double>(weight) * weight + sum);
          }
          float divisor = stack.combiner == embax::Combiner::kSum ? 1.0f : sum;
          if (stack.combiner == embax::Combiner::kSqrtn) divisor = std::sqrt(sum);
          for (int64_t j = begin; j < end; ++j) {
            const int64_t id = IdAt(feature, j);
            if (id == -1) continue;
            const int64_t col = ((id + feature.col_shift) % n + n) % n + (id - id % n) + feature.col_offset;
            const float weight = feature.weights ? feature.weights[j] : 1.0f;
            const float gain = divisor == 0 ? 0 : weight / divisor;
            const auto key = std::make_tuple(col % n, col / n, first_sample + i - sparsecore * share);
            const auto found = entries.find(key);
            if (found == entries.end()) {
              entries.emplace(key, gain);
            } else {
              found->second += gain;
            }
          }
        }
        first_sample += share;
      }
      const int64_t first = device * entries_per_device + packed.placements[s].entries_start +
                            sparsecore * (packed.placements[s].capacity / sparsecores);
      const int32_t* pointers = packed.row_pointers.data() + device * pointers_per_device +
                                packed.placements[s].row_pointers_start + sparsecore * std::max<int64_t>(n, 8);
      int64_t position = 0;
      auto entry = entries.begin();
      for (int64_t partition = 0; partition < n; ++partition) {
        for (; entry != entries.end() && std::get<0>(entry->first) == partition; ++entry, ++position) {
          EXPECT(packed.ids[first + position] == std::get<1>(entry->first));
          EXPECT(packed.samples[first + position] == std::get<2>(entry->first));
          EXPECT(packed.gains[first + position] == entry->second);
        }
        EXPECT(pointers[partition] == position);
        for (; position % 8 != 0; ++position) {
          EXPECT(packed.ids[first + position] == INT32_MAX);
          EXPECT(packed.samples[first + position] == INT32_MAX);
          EXPECT(std::isnan(packed.gains[first + position]));
        }
      }
      EXPECT(entry == entries.end());
      for (int64_t p = n; p < 8; ++p) EXPECT(pointers[p] == position);
      if (position < packed.placements[s].capacity / sparsecores) EXPECT(packed.ids[first + position] == -7);
    }
  }
}

void TestAgainstPlainCode() {
  for (uint64_t seed = 0; seed < 300; ++seed) {
    const Problem problem = MakeProblem(seed, seed % 10 == 0 ? 900 : 20);
    const auto batch = SortedBatch::New();
    EXPECT(batch->Sort(problem.request, 1 + seed % 4).fault == PackFault::kNone);
    CheckAgainstPlainCode(problem.request, Write(problem.request, *batch, 1 + seed % 3));
  }
}

// One table of `vocabulary` rows, one id a sample, all samples on one of four SparseCores.
PackRequest RequestOf(const std::vector<int32_t>& ids, int64_t vocabulary) {
  PackRequest request;
  request.num_sparsecores = 4;
  PackFeature feature;
  feature.ids = ids.data();
  feature.num_ids = feature.batch = static_cast<int64_t>(ids.size());
  feature.valency = 1;
  feature.vocabulary = vocabulary;
  request.features.push_back(feature);
  embax::PackStack stack;
  stack.num_rows = (vocabulary + 3) / 4 * 4;
  stack.features = {0};
  request.stacks.push_back(stack);
  return request;
}

void TestWritesWhereItIsExpected() {
  int64_t too_small = 0;
  for (uint64_t seed = 0; seed < 300; ++seed) {
    const Problem problem = MakeProblem(seed, seed % 10 == 0 ? 900 : 20);
    const auto batch = SortedBatch::New();
    EXPECT(batch->Sort(problem.request, 1).fault == PackFault::kNone);
    Packed packed = Write(problem.request, *batch, 1);
    const embax::PackTarget target = packed.Target(problem.request.num_local_devices);
    for (const bool fits : {true, false}) {
      embax::PackTarget expected = target;
      if (!fits) expected.placements[seed % expected.placements.size()].capacity = 0;
      packed.Clear();
      EXPECT(batch->Sort(problem.request, 1 + seed % 4, &expected).fault == PackFault::kNone);
      if (fits) CheckAgainstPlainCode(problem.request, packed);  // It is there before Write.
      too_small += !fits && !(expected.placements == target.placements);
      EXPECT(batch->Write(target, embax::PackLayout::kShares, 1 + seed % 3));
      CheckAgainstPlainCode(problem.request, packed);
    }
  }
  EXPECT(too_small > 100);
}

// What is dropped after it was written where it was expected is not left there.
void TestDropsWhatWasExpected() {
  std::vector<int32_t> ids;
  for (int32_t i = 0; i < 40; ++i) ids.push_back(i);
  PackRequest request = RequestOf(ids, 40);
  request.count_merged = true;
  const auto batch = SortedBatch::New();
  std::vector<int32_t> pointers(8), rows(64), samples(64);
  std::vector<float> gains(64);
  const embax::PackTarget target = {{{0, 0, 64}}, {pointers.data(), rows.data(), samples.data(), gains.data(), 8, 64}};
  EXPECT(batch->Sort(request, 1, &target).fault == PackFault::kNone);
  EXPECT(pointers[0] == 10);
  EXPECT(batch->Drop({{3, 100, 64}}, embax::PackLayout::kShares) == std::vector<int64_t>{40 - 4 * 3});
  EXPECT(batch->Write(target, embax::PackLayout::kShares, 1));
  EXPECT(pointers[0] == 3);
}

// What becomes of the entries is tested from Python; here sanitizers look at the memory.
void TestMinibatchesAndDropping() {
  int minibatched = 0, dropping = 0;
  for (uint64_t seed = 0; seed < 300; ++seed) {
    Problem problem = MakeProblem(seed, seed % 10 == 0 ? 900 : 20);
    PackRequest& request = problem.request;
    Random random(seed);
    request.count_merged = random.Coin();
    request.validation = random.Coin() ? embax::Validation::kDrop : embax::Validation::kTrust;
    for (auto& ids : problem.ids32) {
      for (int32_t& id : ids) id = random.Below(20) == 0 ? static_cast<int32_t>(random.Below(int64_t{1} << 32)) : id;
    }
    const int64_t threads = 1 + seed % 4;
    const auto batch = SortedBatch::New();
    EXPECT(batch->Sort(request, threads).fault == PackFault::kNone);
    std::vector<embax::PackLimits> limits(request.stacks.size());
    for (embax::PackLimits& limit : limits) {
      limit.max_ids = random.Below(30);
      limit.max_unique_ids = random.Below(30);
      limit.capacity = 8 * request.sparsecores_per_device * random.Below(seed % 2 ? 10 : 10000);
    }
    const auto layout = random.Coin() ? embax::PackLayout::kMinibatches : embax::PackLayout::kShares;
    const bool minibatches = layout == embax::PackLayout::kMinibatches;
    if (minibatches) {
      const uint64_t boundaries = batch->MinibatchBoundaries(limits, threads);
      const int64_t number = batch->FormMinibatches(boundaries, threads);
      EXPECT(number == 1 + __builtin_popcountll(boundaries));
      EXPECT(batch->FormMinibatches(boundaries, threads) == number);
      minibatched += number > 1;
    }
    const std::vector<int64_t> dropped = batch->Drop(limits, layout);
    EXPECT(dropped.size() == request.features.size());
    for (const int64_t ids : dropped) dropping += ids > 0;

    const int64_t n = request.num_sparsecores;
    const int64_t segments = request.sparsecores_per_device * (minibatches ? embax::kBuckets : 1);
    const int64_t pointers = segments * std::max<int64_t>(n, 8);
    std::vector<embax::PackPlacement> placements;
    int64_t entries = 0;
    for (size_t s = 0; s < limits.size(); ++s) {
      placements.push_back({static_cast<int64_t>(s) * pointers, entries, limits[s].capacity});
      entries += limits[s].capacity;
    }
    std::vector<int32_t> row_pointers(pointers * limits.size() * request.num_local_devices);
    std::vector<int32_t> ids(entries * request.num_local_devices), samples(ids.size());
    std::vector<float> gains(ids.size());
    const embax::PackArrays arrays = {row_pointers.data(), ids.data(), samples.data(), gains.data(),
                                      pointers * static_cast<int64_t>(limits.size()), entries};
    EXPECT(batch->Write({placements, arrays}, layout, threads));
    for (const int32_t pointer : row_pointers) EXPECT(pointer >= 0);
  }
  EXPECT(minibatched > 50 && dropping > 50);
}

void TestDroppingIntoAnyCapacity() {
  std::vector<int32_t> ids;
  for (int32_t i = 0; i < 40; ++i) ids.push_back(i);
  PackRequest request = RequestOf(ids, 40);
  request.count_merged = true;
  for (const auto layout : {embax::PackLayout::kShares, embax::PackLayout::kMinibatches}) {
    for (int64_t capacity = 0; capacity < 80; ++capacity) {
      const auto batch = SortedBatch::New();
      EXPECT(batch->Sort(request, 1).fault == PackFault::kNone);
      const int64_t full = capacity / 16, rest = capacity % 16 >= 8 ? 8 : 0;
      const int64_t kept = full >= 4 ? 40 : full * 10 + rest;
      EXPECT(batch->Drop({{100, 100, capacity}}, layout) == std::vector<int64_t>{40 - kept});
      std::vector<int32_t> pointers(64 * 8), rows(capacity), samples(capacity);
      std::vector<float> gains(capacity);
      const embax::PackArrays arrays = {pointers.data(), rows.data(), samples.data(), gains.data(), 64 * 8, capacity};
      EXPECT(batch->Write({{{0, 0, capacity}}, arrays}, layout, 1));
      for (int i = 1; i < 4; ++i) EXPECT(pointers[i] >= pointers[i - 1] && pointers[i] <= capacity);
    }
  }
}

// One minibatch needs row pointers of one, as packing inside jit has them.
void TestOneMinibatchNeedsNoRoomForOthers() {
  std::vector<int32_t> ids;
  for (int32_t i = 0; i < 40; ++i) ids.push_back(i);
  const auto batch = SortedBatch::New();
  EXPECT(batch->Sort(RequestOf(ids, 40), 1).fault == PackFault::kNone);
  for (const int64_t room : {7, 8, 9}) {
    std::vector<int32_t> pointers(room), rows(64), samples(64);
    std::vector<float> gains(64);
    const embax::PackArrays arrays = {pointers.data(), rows.data(), samples.data(), gains.data(), room, 64};
    EXPECT(batch->Write({{{0, 0, 64}}, arrays}, embax::PackLayout::kMinibatches, 1) == (room >= 8));
    EXPECT(pointers[0] == (room >= 8 ? 10 : 0));
  }
}

void TestTrustedIdsDisplaceNoOthers() {
  Random random(0);
  for (int round = 0; round < 200; ++round) {
    std::vector<int32_t> ids(100);
    for (int32_t& id : ids) id = static_cast<int32_t>(random.Below(1000));
    const size_t bad = random.Below(100);
    ids[bad] = static_cast<int32_t>(1000 + random.Below(INT32_MAX - 1000));
    PackRequest request = RequestOf(ids, 1000);
    request.validation = embax::Validation::kTrust;
    const auto batch = SortedBatch::New();
    EXPECT(batch->Sort(request, 1).fault == PackFault::kNone);
    const Packed packed = Write(request, *batch, 1);
    std::vector<int32_t> found(100, -1);
    for (int32_t partition = 0, place = 0; partition < 4; ++partition, place = (place + 7) / 8 * 8) {
      for (; place < packed.row_pointers[partition]; ++place) {
        found[packed.samples[place]] = packed.ids[place] * 4 + partition;
      }
    }
    for (size_t i = 0; i < ids.size(); ++i) EXPECT(i == bad || found[i] == ids[i]);
  }
}

// The first fault, found the plain way.
PackError PlainFault(const PackRequest& request) {
  PackError error;
  for (size_t number = 0; number < request.features.size(); ++number) {
    const PackFeature& feature = request.features[number];
    for (int64_t i = 0; i < feature.num_ids; ++i) {
      const int64_t id = IdAt(feature, i);
      const bool bad_id = (id < 0 && !(id == -1 && feature.row_splits == nullptr)) || id >= feature.vocabulary;
      const bool bad_weight = id != -1 && feature.weights != nullptr && !std::isfinite(feature.weights[i]);
      if (!bad_id && !bad_weight) continue;
      error.fault = bad_id ? PackFault::kId : PackFault::kWeight;
      error.feature = static_cast<int32_t>(number);
      error.value = bad_id ? id : 0;
      if (feature.row_splits == nullptr) {
        error.sample = i / feature.valency;
        error.position = i % feature.valency;
      } else {
        for (error.sample = 0; feature.row_splits[error.sample + 1] <= i;) ++error.sample;
        error.position = i - feature.row_splits[error.sample];
      }
      return error;
    }
  }
  return error;
}

void TestFaults() {
  int faults = 0;
  for (uint64_t seed = 0; seed < 300; ++seed) {
    Problem problem = MakeProblem(seed, seed % 10 == 0 ? 900 : 20);
    Random random(seed);
    for (auto& ids : problem.ids32) {
      const int32_t bad[] = {-2, INT32_MAX, INT32_MIN, 3000000};
      if (!ids.empty() && random.Coin()) ids[random.Below(ids.size())] = bad[random.Below(4)];
    }
    for (auto& ids : problem.ids64) {
      const int64_t bad[] = {-2, INT64_MAX, INT64_MIN, int64_t{1} << 32};
      if (!ids.empty() && random.Coin()) ids[random.Below(ids.size())] = bad[random.Below(4)];
    }
    for (auto& weights : problem.weights) {
      if (!weights.empty() && random.Coin()) weights[random.Below(weights.size())] = random.Coin() ? NAN : -INFINITY;
    }
    const PackError expected = PlainFault(problem.request);
    for (int64_t threads = 1; threads <= 4; ++threads) {
      const PackError error = SortedBatch::New()->Sort(problem.request, threads);
      EXPECT(error.fault == expected.fault);
      EXPECT(error.feature == expected.feature);
      EXPECT(error.sample == expected.sample);
      EXPECT(error.position == expected.position);
      EXPECT(error.value == expected.value);
    }
    faults += expected.fault != PackFault::kNone;
  }
  EXPECT(faults > 100);
}

void TestRowSplitsOfAnyValue() {
  for (uint64_t seed = 0; seed < 300; ++seed) {
    Problem problem = MakeProblem(seed, 20);
    Random random(seed);
    bool changed = false;
    for (auto& splits : problem.splits) {
      const int64_t bad[] = {-1, INT64_MIN, INT64_MAX, splits.back() + 1, splits.back() * 100 + 1};
      splits[random.Below(splits.size())] = bad[random.Below(5)];
      changed = true;
    }
    const PackError error = SortedBatch::New()->Sort(problem.request, 2);
    const bool split = error.fault == PackFault::kFirstSplit || error.fault == PackFault::kSplit ||
                       error.fault == PackFault::kLastSplit;
    EXPECT(split == changed);
  }
}

void TestManyThreads() {
  const Problem problem = LargeProblem();
  const auto batch = SortedBatch::New();
  EXPECT(batch->Sort(problem.request, 1).fault == PackFault::kNone);
  const Packed expected = Write(problem.request, *batch, 1);
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&problem, &expected, t] {
      for (int i = 0; i < 10; ++i) {
        const auto own = SortedBatch::New();
        EXPECT(own->Sort(problem.request, 1 + t % 4).fault == PackFault::kNone);
        const Packed packed = Write(problem.request, *own, 1 + t % 4);
        EXPECT(packed.ids == expected.ids && packed.samples == expected.samples);
        EXPECT(packed.row_pointers == expected.row_pointers);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

#if !defined(__SANITIZE_THREAD__)  // Which rightly calls the first a race, and cannot start threads after a fork.
void TestArraysThatChangeMeanwhile() {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    Problem problem = MakeProblem(seed, 900);
    std::atomic<bool> stop{false};
    std::thread scribbler([&] {
      Random random(seed);
      while (!stop.load()) {
        for (auto& splits : problem.splits) const_cast<volatile int64_t&>(splits[random.Below(splits.size())]) = random.Below(99);
        for (auto& ids : problem.ids32) {
          if (!ids.empty()) const_cast<volatile int32_t&>(ids[random.Below(ids.size())]) = -static_cast<int32_t>(random.Below(4));
        }
      }
    });
    for (int i = 0; i < 20; ++i) {
      const auto batch = SortedBatch::New();
      if (batch->Sort(problem.request, 2).fault == PackFault::kNone) Write(problem.request, *batch, 2);
    }
    stop.store(true);
    scribbler.join();
  }
}

void TestFork() {
  const Problem problem = LargeProblem();
  for (int i = 0; i < 5; ++i) {
    EXPECT(SortedBatch::New()->Sort(problem.request, 4).fault == PackFault::kNone);
    const pid_t child = fork();
    if (child == 0) {
      const auto batch = SortedBatch::New();
      if (batch->Sort(problem.request, 4).fault != PackFault::kNone) _exit(1);
      CheckAgainstPlainCode(problem.request, Write(problem.request, *batch, 4));
      _exit(0);
    }
    int status = 0;
    EXPECT(waitpid(child, &status, 0) == child);
    EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
}
#endif

}  // namespace

int main() {
  TestAgainstPlainCode();
  TestWritesWhereItIsExpected();
  TestDropsWhatWasExpected();
  TestMinibatchesAndDropping();
  TestDroppingIntoAnyCapacity();
  TestOneMinibatchNeedsNoRoomForOthers();
  TestTrustedIdsDisplaceNoOthers();
  TestFaults();
  TestRowSplitsOfAnyValue();
  TestManyThreads();
#if !defined(__SANITIZE_THREAD__)
  TestArraysThatChangeMeanwhile();
  TestFork();
#endif
  std::puts("pack_test: passed");
}
