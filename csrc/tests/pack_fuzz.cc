// Fuzzes packing: turns bytes into requests, valid and not, packs them into arrays of exact size, so that sanitizers see
// every step beside them, and compares with a plain model. fuzz_main.cc or libFuzzer calls it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <tuple>
#include <utility>
#include <vector>

#include "core/format.h"
#include "core/pack.h"
#include "pack_model.h"
#include "pack_problem.h"

namespace embax::fuzz {
namespace {

#define EXPECT(condition)                                                  \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                        \
    }                                                                      \
  } while (0)

constexpr int kUntouchedByte = 0xf9;
constexpr int32_t kUntouched = -0x06060607;

// Bit for bit, but for those of NaN.
bool SameNumber(float a, float b) { return std::memcmp(&a, &b, sizeof(a)) == 0 || (std::isnan(a) && std::isnan(b)); }

int64_t RoundUp(int64_t value) { return (value + 7) / 8 * 8; }

// The arrays of a packed batch.
struct Packed {
  Array<int32_t> row_pointers, ids, samples;
  Array<float> gains;
  std::vector<PackPlacement> placements;
  PackArrays arrays;

  Packed(std::vector<PackPlacement> places, int64_t devices, int64_t pointers_per_device, int64_t entries_per_device)
      : row_pointers(devices * pointers_per_device),
        ids(devices * entries_per_device),
        samples(ids.size),
        gains(ids.size),
        placements(std::move(places)) {
    for (auto* array : {&row_pointers, &ids, &samples}) {
      std::memset(array->data.get(), kUntouchedByte, array->size * sizeof(int32_t));
    }
    std::memset(gains.data.get(), kUntouchedByte, gains.size * sizeof(float));
    arrays = {row_pointers.data.get(), ids.data.get(),      samples.data.get(),
              gains.data.get(),        pointers_per_device, entries_per_device};
  }
};

// How far the packing of a problem has come.
struct Stage {
  const Problem& problem;
  const PackRequest& request;
  const Model& model;
  int64_t n, sparsecores, devices, num_stacks, pointers;
  PackLayout layout;
  int64_t minibatches = 1;
  std::map<int64_t, int64_t> minibatch_of = {};     // By column: row * SparseCores + SparseCore.
  const std::vector<PackLimits>* limits = nullptr;  // Once what is beyond them was dropped.

  Stage(const Problem& problem, const Model& model)
      : problem(problem),
        request(problem.request),
        model(model),
        n(request.num_sparsecores),
        sparsecores(request.sparsecores_per_device),
        devices(request.num_local_devices),
        num_stacks(static_cast<int64_t>(request.stacks.size())),
        pointers(std::max<int64_t>(n, 8)),
        layout(problem.plan.layout) {}

  bool shared() const { return layout == PackLayout::kMinibatches; }
  int64_t PointersOfStack() const { return sparsecores * minibatches * pointers; }
  int64_t MinibatchOf(int64_t column) const { return minibatches == 1 ? 0 : minibatch_of.at(column); }

  // The entries that one stack must have on a device.
  int64_t Needed(const SortedBatch& batch, int64_t s) const {
    int64_t needed = 0;
    for (int64_t device = 0; device < devices; ++device) {
      const int32_t* required = batch.required().data() + (s * devices + device) * sparsecores;
      int64_t sum = 0, most = 0;
      for (int64_t i = 0; i < sparsecores; ++i) {
        sum += required[i];
        most = std::max<int64_t>(most, required[i]);
      }
      needed = std::max(needed, shared() ? sum : most * sparsecores);
    }
    return needed;
  }

  int64_t Capacity(const SortedBatch& batch, int64_t s) const {
    return limits != nullptr ? (*limits)[s].capacity : Needed(batch, s) + problem.plan.spare;
  }

  // Arrays in which the stacks have their capacities, and nothing is left over but what the plan asks for.
  Packed MakeArrays(const SortedBatch& batch) const {
    const int64_t gap = problem.plan.gap;
    std::vector<PackPlacement> placements;
    int64_t pointers_end = 0, entries_end = 0;
    for (int64_t s = 0; s < num_stacks; ++s) {
      placements.push_back({pointers_end + gap, entries_end + gap, Capacity(batch, s)});
      pointers_end += gap + PointersOfStack();
      entries_end += gap + placements.back().capacity;
    }
    return Packed(std::move(placements), devices, pointers_end, entries_end);
  }
};

// The entries of a part, by minibatch and partition.
using Group = std::vector<Part::const_pointer>;

std::vector<Group> GroupsOf(const Stage& stage, const Part& part) {
  std::vector<Group> groups(stage.minibatches * stage.n);
  for (const auto& entry : part) {
    const auto [partition, row, sample] = entry.first;
    groups[stage.MinibatchOf(row * stage.n + partition) * stage.n + partition].push_back(&entry);
  }
  return groups;
}

int64_t DistinctOf(const Group& group, int64_t count) {
  int64_t distinct = 0;
  for (int64_t i = 0; i < count; ++i) {
    distinct += i == 0 || std::get<1>(group[i]->first) != std::get<1>(group[i - 1]->first);
  }
  return distinct;
}

// What packing must have counted, by what the model says. `dropped` is by feature.
struct Counts {
  std::vector<int32_t> max_ids, max_unique_ids, required;
  std::vector<int64_t> dropped_ids, dropped_entries;
};

// Writes what the model says into arrays like `packed`; nothing about stacks with stray ids.
Counts WriteModel(const Stage& stage, const Packed& packed, Packed& expected) {
  const int64_t n = stage.n, sparsecores = stage.sparsecores;
  Counts counts;
  counts.max_ids.assign(stage.num_stacks * stage.devices * n, 0);
  counts.max_unique_ids = counts.max_ids;
  counts.dropped_ids.assign(stage.request.features.size(), 0);
  counts.dropped_entries = counts.dropped_ids;
  counts.required.assign(stage.num_stacks * stage.devices * sparsecores, 0);
  for (int64_t s = 0; s < stage.num_stacks; ++s) {
    if (stage.model.stray[s]) continue;
    const PackPlacement& placement = packed.placements[s];
    for (int64_t part = 0, end = 0; part < stage.devices * sparsecores; ++part) {
      const int64_t device = part / sparsecores, sparsecore = part % sparsecores;
      const int64_t share = stage.shared() ? placement.capacity : placement.capacity / sparsecores;
      const int64_t base = device * packed.arrays.entries_per_device + placement.entries_start +
                           (stage.shared() ? 0 : sparsecore * share);
      int32_t* pointers = expected.arrays.row_pointers + device * packed.arrays.row_pointers_per_device +
                          placement.row_pointers_start + sparsecore * stage.minibatches * stage.pointers;
      if (!stage.shared() || sparsecore == 0) end = 0;
      const int64_t start = end;
      const std::vector<Group> groups = GroupsOf(stage, stage.model.stacks[s][part]);
      for (size_t g = 0; g < groups.size(); ++g) {
        const Group& group = groups[g];
        const int64_t partition = static_cast<int64_t>(g) % n, size = static_cast<int64_t>(group.size());
        const auto raise = [&](std::vector<int32_t>& most, int64_t value) {
          int32_t& count = most[(s * stage.devices + device) * n + partition];
          count = std::max(count, static_cast<int32_t>(value));
        };
        raise(counts.max_ids, size);
        raise(counts.max_unique_ids, DistinctOf(group, size));
        int64_t kept = size;
        if (stage.limits != nullptr) {
          const PackLimits& limits = (*stage.limits)[s];
          kept = std::min({kept, limits.max_ids, share / 8 * 8 - end});
          while (DistinctOf(group, kept) > limits.max_unique_ids) --kept;
        }
        for (int64_t i = kept; i < size; ++i) {
          const ModelEntry& entry = group[i]->second;
          counts.dropped_ids[entry.feature] += entry.ids;
          ++counts.dropped_entries[entry.feature];
        }
        EXPECT(end + RoundUp(kept) <= share);
        for (int64_t i = 0; i < RoundUp(kept); ++i) {
          const int64_t at = base + end + i;
          expected.ids[at] = i < kept ? static_cast<int32_t>(std::get<1>(group[i]->first)) : kPaddingId;
          expected.samples[at] = i < kept ? static_cast<int32_t>(std::get<2>(group[i]->first)) : kPaddingId;
          expected.gains[at] = i < kept ? group[i]->second.gain : NAN;
        }
        pointers[partition] = static_cast<int32_t>(end + kept);
        end += RoundUp(kept);
        if (partition + 1 < n) continue;
        for (int64_t p = n; p < stage.pointers; ++p) pointers[p] = static_cast<int32_t>(end);
        pointers += stage.pointers;
      }
      counts.required[s * stage.devices * sparsecores + part] = static_cast<int32_t>(end - start);
    }
  }
  return counts;
}

// Calls visit(part, minibatch, partition, place of the entry) for the entries of one stack, whatever they are, and checks
// all that must hold of any.
template <typename Visit>
void ForEntries(const Stage& stage, const Packed& packed, int64_t s, Visit&& visit) {
  const PackPlacement& placement = packed.placements[s];
  const int64_t share = stage.shared() ? placement.capacity : placement.capacity / stage.sparsecores;
  for (int64_t device = 0; device < stage.devices; ++device) {
    const int64_t first = device * packed.arrays.entries_per_device + placement.entries_start;
    const int32_t* pointers =
        packed.arrays.row_pointers + device * packed.arrays.row_pointers_per_device + placement.row_pointers_start;
    const int32_t* const pointers_end = pointers + stage.PointersOfStack();
    const auto expect_untouched = [&](int64_t begin, int64_t end) {
      for (; begin < end; ++begin) EXPECT(packed.arrays.ids[begin] == kUntouched);
    };
    int64_t end = 0, base = first;
    for (int64_t sparsecore = 0; sparsecore < stage.sparsecores; ++sparsecore) {
      if (!stage.shared()) {
        if (sparsecore > 0) expect_untouched(base + end, base + share);
        end = 0;
        base = first + sparsecore * share;
      }
      for (int64_t minibatch = 0; minibatch < stage.minibatches; ++minibatch, pointers += stage.pointers) {
        for (int64_t partition = 0; partition < stage.n; ++partition) {
          const int64_t stop = pointers[partition];
          EXPECT(end <= stop && RoundUp(stop) <= share);
          const int64_t part = device * stage.sparsecores + sparsecore;
          for (; end < stop; ++end) visit(part, minibatch, partition, base + end);
          for (; end < RoundUp(stop); ++end) {
            EXPECT(packed.arrays.ids[base + end] == kPaddingId && packed.arrays.samples[base + end] == kPaddingId);
            EXPECT(std::isnan(packed.arrays.gains[base + end]));
          }
        }
        for (int64_t p = stage.n; p < stage.pointers; ++p) EXPECT(pointers[p] == end);
      }
    }
    expect_untouched(base + end, base + share);
    for (; pointers < pointers_end; ++pointers) EXPECT(*pointers == kUntouched);
  }
}

// A stack with ids that nobody looked for: each has any entry or none, and all others have theirs.
void CheckStray(const Stage& stage, const Packed& packed, int64_t s) {
  int64_t samples = 0, ids = 0, entries = 0;
  for (const int32_t number : stage.request.stacks[s].features) {
    const PackFeature& feature = stage.request.features[number];
    samples += (feature.batch / stage.devices + stage.sparsecores - 1) / stage.sparsecores;
    ids += feature.num_ids;
  }
  using Where = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;
  Where last = {};
  std::vector<std::map<Part::key_type, float>> found(stage.model.stacks[s].size());
  ForEntries(stage, packed, s, [&](int64_t part, int64_t minibatch, int64_t partition, int64_t place) {
    const int64_t row = packed.arrays.ids[place], sample = packed.arrays.samples[place];
    EXPECT(row >= 0 && sample >= 0 && sample < samples);
    const Where where = {part, minibatch, partition, row, sample};
    EXPECT(entries == 0 || last < where);
    last = where;
    EXPECT(found[part].emplace(std::make_tuple(partition, row, sample), packed.arrays.gains[place]).second);
    ++entries;
  });
  EXPECT(entries <= ids);
  for (size_t part = 0; stage.limits == nullptr && part < found.size(); ++part) {
    for (const auto& [place, entry] : stage.model.stacks[s][part]) {
      const auto same = found[part].find(place);
      EXPECT(same != found[part].end());
      EXPECT(entry.beside_stray || SameNumber(same->second, entry.gain));
    }
  }
}

// Calls visit(array, begin, end) for what one stack has of the arrays.
template <typename Visit>
void ForRanges(const Stage& stage, const Packed& packed, int64_t s, Visit&& visit) {
  const PackPlacement& placement = packed.placements[s];
  for (int64_t device = 0; device < stage.devices; ++device) {
    const int64_t pointer = device * packed.arrays.row_pointers_per_device + placement.row_pointers_start;
    const int64_t entry = device * packed.arrays.entries_per_device + placement.entries_start;
    visit(&Packed::row_pointers, pointer, pointer + stage.PointersOfStack());
    visit(&Packed::ids, entry, entry + placement.capacity);
    visit(&Packed::samples, entry, entry + placement.capacity);
    visit(&Packed::gains, entry, entry + placement.capacity);
  }
}

Packed LikeIt(const Stage& stage, const Packed& packed) {
  return Packed(packed.placements, stage.devices, packed.arrays.row_pointers_per_device,
                packed.arrays.entries_per_device);
}

void CheckEqual(const Packed& packed, const Packed& expected) {
  // In one go, which sanitizers do not slow down.
  const auto same = [&](const auto& array, const auto& other) {
    return std::memcmp(array.data.get(), other.data.get(), array.size * sizeof(other.data[0])) == 0;
  };
  EXPECT(same(packed.row_pointers, expected.row_pointers));
  EXPECT(same(packed.ids, expected.ids));
  EXPECT(same(packed.samples, expected.samples));
  if (same(packed.gains, expected.gains)) return;
  for (int64_t i = 0; i < packed.gains.size; ++i) EXPECT(SameNumber(packed.arrays.gains[i], expected.arrays.gains[i]));
}

// Compares the arrays and the counts with the model; `dropped` is null unless entries were dropped.
void CheckPacked(const Stage& stage, const SortedBatch& batch, const Packed& packed,
                 const std::vector<int64_t>* dropped) {
  Packed expected = LikeIt(stage, packed);
  const Counts counts = WriteModel(stage, packed, expected);
  const int64_t per_stack = stage.devices * stage.n, parts = stage.devices * stage.sparsecores;
  for (int64_t s = 0; s < stage.num_stacks; ++s) {
    if (stage.model.stray[s]) {
      CheckStray(stage, packed, s);
      ForRanges(stage, packed, s, [&](auto array, int64_t begin, int64_t end) {
        const auto* own = (packed.*array).data.get();
        std::copy(own + begin, own + end, (expected.*array).data.get() + begin);
      });
      continue;
    }
    const auto same = [s](const std::vector<int32_t>& a, const std::vector<int32_t>& b, int64_t size) {
      return std::equal(a.begin() + s * size, a.begin() + (s + 1) * size, b.begin() + s * size);
    };
    EXPECT(same(counts.max_ids, batch.max_ids(), per_stack));
    EXPECT(same(counts.max_unique_ids, batch.max_unique_ids(), per_stack));
    EXPECT(same(counts.required, batch.required(), parts));
    for (const int32_t feature : stage.request.stacks[s].features) {
      if (dropped == nullptr) continue;
      EXPECT((*dropped)[feature] <= counts.dropped_ids[feature]);
      EXPECT((*dropped)[feature] >= counts.dropped_entries[feature]);
      if (stage.request.count_merged) EXPECT((*dropped)[feature] == counts.dropped_ids[feature]);
    }
  }
  CheckEqual(packed, expected);
}

// Tries to write into arrays, or at placements, that cannot hold the batch.
void CheckRefusal(const Stage& stage, const SortedBatch& batch, const Packed& packed) {
  std::vector<PackPlacement> placements = packed.placements;
  PackArrays arrays = packed.arrays;
  PackLayout layout = stage.layout;
  const int64_t stacks = stage.num_stacks;
  bool refused = stacks > 0;
  if (stacks == 0) return;
  switch (stage.problem.plan.refusal) {
    case 1: placements.pop_back(); break;
    case 2: placements.push_back({arrays.row_pointers_per_device, arrays.entries_per_device, 0}); break;
    case 3: --arrays.row_pointers_per_device; break;
    case 4: --arrays.entries_per_device; break;
    case 5: placements[0].row_pointers_start = -1; break;
    case 6: placements[0].entries_start = -1; break;
    case 7: placements[0].capacity = -1; break;
    case 8: placements[stacks - 1].row_pointers_start -= stage.problem.plan.gap + 1; break;
    case 9: placements[stacks - 1].entries_start -= stage.problem.plan.gap + 1; break;
    case 10: ++placements[0].capacity, refused = stage.problem.plan.gap == 0 || stacks == 1; break;
    case 11: --placements[0].capacity, refused = placements[0].capacity < stage.Needed(batch, 0); break;
    case 12: placements[0].capacity = 0, refused = stage.Needed(batch, 0) > 0; break;
    case 13: layout = PackLayout::kShares, refused = stage.minibatches > 1; break;
    case 14:
      placements[stacks - 1].capacity = int64_t{INT32_MAX} + 1;
      arrays.entries_per_device = INT64_MAX / 2;
      refused = stage.shared();
      break;
    default: return;
  }
  if (!refused) return;
  EXPECT(!batch.Write({placements, arrays}, layout, stage.problem.plan.other_threads));
  CheckEqual(packed, LikeIt(stage, packed));
}

Packed Write(const Stage& stage, const SortedBatch& batch) {
  Packed packed = stage.MakeArrays(batch);
  CheckRefusal(stage, batch, packed);
  EXPECT(batch.Write({packed.placements, packed.arrays}, stage.layout, stage.problem.plan.other_threads));
  return packed;
}

// That only a minibatch of one bucket is beyond limits.
void CheckLimits(const Stage& stage, uint64_t boundaries) {
  std::vector<int64_t> buckets = {1};  // Of each minibatch.
  for (int bucket = 1; bucket < kBuckets; ++bucket) {
    if (boundaries >> (bucket - 1) & 1) {
      buckets.push_back(1);
    } else {
      ++buckets.back();
    }
  }
  for (int64_t s = 0; s < stage.num_stacks; ++s) {
    if (stage.model.stray[s]) continue;
    const PackLimits& limits = stage.problem.plan.limits[s];
    for (const Part& part : stage.model.stacks[s]) {
      const std::vector<Group> groups = GroupsOf(stage, part);
      for (size_t g = 0; g < groups.size(); ++g) {
        const int64_t size = static_cast<int64_t>(groups[g].size());
        if (size <= limits.max_ids && DistinctOf(groups[g], size) <= limits.max_unique_ids) continue;
        EXPECT(buckets[g / stage.n] == 1);
      }
    }
  }
}

bool WithinLimits(const Stage& stage, const SortedBatch& batch) {
  const int64_t size = stage.devices * stage.n;
  for (int64_t i = 0; i < stage.num_stacks * size; ++i) {
    const PackLimits& limits = stage.problem.plan.limits[i / size];
    if (batch.max_ids()[i] > limits.max_ids || batch.max_unique_ids()[i] > limits.max_unique_ids) return false;
  }
  return true;
}

void DivideAndCheck(Stage& stage, SortedBatch& batch) {
  const Plan& plan = stage.problem.plan;
  const uint64_t own = batch.MinibatchBoundaries(plan.limits, plan.other_threads);
  const bool any_stray = std::count(stage.model.stray.begin(), stage.model.stray.end(), true) > 0;
  EXPECT(any_stray || (own == 0) == WithinLimits(stage, batch));
  EXPECT(own >> (kBuckets - 1) == 0);
  const uint64_t boundaries = own | plan.other_boundaries;
  for (int bit = 0; bit < kBuckets - 1; ++bit) stage.minibatches += boundaries >> bit & 1;
  EXPECT(batch.FormMinibatches(boundaries, plan.other_threads) == stage.minibatches);
  if (stage.minibatches == 1) return;
  EXPECT(batch.FormMinibatches(~boundaries, plan.other_threads) == stage.minibatches);

  // Which ids share a minibatch is left to the hash: any two copies of one do.
  const Packed packed = Write(stage, batch);
  for (int64_t s = 0; s < stage.num_stacks; ++s) {
    if (stage.model.stray[s]) continue;
    ForEntries(stage, packed, s, [&](int64_t, int64_t minibatch, int64_t partition, int64_t place) {
      const int64_t column = packed.arrays.ids[place] * stage.n + partition;
      EXPECT(stage.minibatch_of.try_emplace(column, minibatch).first->second == minibatch);
    });
  }
  for (const std::vector<Part>& parts : stage.model.stacks) {
    // A copy that is not there anywhere is found missing when all is compared.
    for (const Part& part : parts) {
      for (const auto& entry : part) {
        stage.minibatch_of.try_emplace(std::get<1>(entry.first) * stage.n + std::get<0>(entry.first), 0);
      }
    }
  }
  CheckLimits(stage, boundaries);
  CheckPacked(stage, batch, packed, nullptr);
}

void DropAndCheck(Stage& stage, SortedBatch& batch) {
  std::vector<PackLimits> limits = stage.problem.plan.limits;
  for (int64_t s = 0; s < stage.num_stacks; ++s) {
    if (limits[s].capacity < 0) limits[s].capacity = RoundUp(stage.Needed(batch, s)) + stage.problem.plan.spare;
  }
  const std::vector<int64_t> dropped = batch.Drop(limits, stage.layout);
  EXPECT(dropped.size() == stage.request.features.size());
  stage.limits = &limits;
  CheckPacked(stage, batch, Write(stage, batch), &dropped);
  stage.limits = nullptr;
}

// Sorted again, with arrays that it is expected to fit into, as it does, or but for one stack.
void SortAndCheckAsExpected(Stage& stage, SortedBatch& batch) {
  if (stage.layout != PackLayout::kShares) return;
  Packed packed = stage.MakeArrays(batch);
  const PackTarget target = {packed.placements, packed.arrays};
  PackTarget expected = target;
  if (stage.num_stacks > 0 && stage.problem.plan.refusal % 2 == 1) expected.placements.back().capacity = 0;
  EXPECT(batch.Sort(stage.request, stage.problem.plan.other_threads, &expected).fault == PackFault::kNone);
  EXPECT(batch.Write(target, stage.layout, stage.problem.plan.sort_threads));
  CheckPacked(stage, batch, packed, nullptr);
}

void CheckBatch(const Problem& problem, SortedBatch& batch) {
  const PackRequest& request = problem.request;
  const PackError error = batch.Sort(request, problem.plan.sort_threads);
  EXPECT(error.fault != PackFault::kChanged);
  EXPECT(problem.may_be_invalid || error.fault != PackFault::kRequest);
  if (problem.may_be_invalid && error.fault != PackFault::kNone) return;
  const PackError expected = FirstFault(request);
  EXPECT(error.fault == expected.fault);
  EXPECT(error.feature == expected.feature);
  EXPECT(error.sample == expected.sample);
  EXPECT(error.position == expected.position);
  if (error.fault != PackFault::kNone) return;

  const Model model = MakeModel(request);
  EXPECT(batch.invalid() == model.invalid);
  Stage stage(problem, model);
  CheckPacked(stage, batch, Write(stage, batch), nullptr);
  SortAndCheckAsExpected(stage, batch);
  if (problem.plan.divide) DivideAndCheck(stage, batch);
  if (problem.plan.drop) DropAndCheck(stage, batch);
}

}  // namespace
}  // namespace embax::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  embax::fuzz::Choices choices(data, size);
  embax::SortedBatch batch;  // A new one, so that an input fails whatever ran before it.
  embax::fuzz::Problem problem = embax::fuzz::MakeProblem(choices);
  embax::fuzz::CheckBatch(problem, batch);
  // What an earlier batch left must not show in a later one: the same request with another plan, or another request.
  for (int64_t left = choices.Byte() % 4; left > 0; --left) {
    if (choices.OneIn(2)) {
      embax::fuzz::ChoosePlan(choices, problem);
    } else {
      problem = embax::fuzz::MakeProblem(choices);
    }
    embax::fuzz::CheckBatch(problem, batch);
  }
  return 0;
}
