#include "core/pack.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>

#include "core/faults.h"
#include "core/gains.h"
#include "core/keys.h"
#include "core/parallel.h"
#include "core/radix_sort.h"
#include "core/thread_pool.h"

namespace embax {
namespace {

// Ids are turned into keys this many at a time, so that the keys stay in the first-level cache.
constexpr int64_t kBlock = 2048;

// A helper is worth waking for this many ids: about 50 microseconds of work, the time that waking a sleeping thread takes.
constexpr int64_t kIdsPerHelper = 6000;

// Memory above this is given back to the system rather than kept for the next batch.
constexpr int64_t kMaxKeptBytes = int64_t{256} << 20;

inline int64_t RoundUp(int64_t value) {
  return (value + kPartitionAlignment - 1) & ~(kPartitionAlignment - 1);
}

// Where the gain of an entry comes from while it is sorted.
enum class Gains {
  kUnit,       // It is 1. The payload is the sample.
  kSample,     // It depends on the sample alone. The payload is the sample.
  kEntry,      // Each entry has its own. The payload is the number of the entry as it was read.
};

// Memory of one thread, for one task at a time.
struct Scratch {
  Buffer<uint64_t> entries;
  Buffer<uint32_t> histograms;
  Buffer<uint32_t> keys;
  Buffer<float> sample_gains;
  Buffer<float> entry_gains;
  Buffer<uint32_t> entry_samples;

  void Shrink() {
    entries.Shrink(kMaxKeptBytes / 8);
    sample_gains.Shrink(kMaxKeptBytes / 16);
    entry_gains.Shrink(kMaxKeptBytes / 16);
    entry_samples.Shrink(kMaxKeptBytes / 16);
  }
};

Scratch& ThreadScratch() {
  thread_local Scratch scratch;
  return scratch;
}

// The samples of a feature that one SparseCore looks up.
struct Slice {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t share = 0;  // Samples of the feature on a SparseCore that has a full slice.
};

Slice SliceOf(const PackFeature& feature, int64_t num_devices, int64_t sparsecores, int64_t device, int64_t sparsecore) {
  const int64_t batch = feature.batch / num_devices;
  Slice slice;
  slice.share = CeilDiv(batch, sparsecores);
  slice.begin = device * batch + std::min(sparsecore * slice.share, batch);
  slice.end = device * batch + std::min((sparsecore + 1) * slice.share, batch);
  return slice;
}

// Reads the ids of one feature's slice. Stops and returns false at anything that is wrong with them; what it is, is found
// out afterwards (FindFault). Every row split is read once, so that arrays which change meanwhile cannot lead astray.
template <typename Id, int kPasses>
bool ReadFeature(const PackFeature& feature, const KeyMap& map, Combiner combiner, Gains gains, const Slice& slice,
                 uint32_t sample, int64_t room, Scratch& scratch, Appender<kPasses>& out) {
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
      bool finite = true;
      for (int64_t i = 0; i < count; ++i) {
        weights[i] = Gain(weights[i], divisor);
        finite &= IsFinite(weights[i]);
      }
      if (!finite) return false;
    }
    row_start = out.size();
    return true;
  };

  for (int64_t start = begin; start < end; start += kBlock) {
    const int64_t count = std::min(kBlock, end - start);
    const uint32_t found = MakeKeys(map, ids + start, count, keys);
    if ((found & kHasBad) || (ragged && (found & kHasPadding))) return false;
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
        bool finite = true;
        for (int64_t i = done; i < stop; ++i) {
          const int64_t entry = out.size();
          const float weight = feature.weights != nullptr ? feature.weights[start + i] : 1.0f;
          entry_gains[entry] = weight;
          entry_samples[entry] = row_sample;
          finite &= keys[i] == kPaddingKey || IsFinite(weight);
          out.AppendUnlessPadding(keys[i], static_cast<uint32_t>(entry));
        }
        if (!finite) return false;
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

template <int kPasses>
bool ReadStack(const PackRequest& request, const PackStack& stack, Gains gains, int64_t rows_per_sparsecore,
               int64_t device, int64_t sparsecore, int64_t bound, const Digits& digits, uint64_t* entries,
               Scratch& scratch, int64_t* size) {
  Appender<kPasses> out(digits, entries);
  int64_t sample = 0;
  for (const int32_t number : stack.features) {
    const PackFeature& feature = request.features[number];
    const Slice slice =
        SliceOf(feature, request.num_local_devices, request.sparsecores_per_device, device, sparsecore);
    const KeyMap map(feature, rows_per_sparsecore, request.num_sparsecores);
    const auto read = feature.wide_ids ? &ReadFeature<int64_t, kPasses> : &ReadFeature<int32_t, kPasses>;
    if (!read(feature, map, stack.combiner, gains, slice, static_cast<uint32_t>(sample), bound - out.size(), scratch,
              out)) {
      return false;
    }
    sample += slice.share;
  }
  *size = out.size();
  return true;
}

// The first entry from `begin` on whose key is at least `key`: doubling steps, then bisection, so that many partitions
// cost little more than their entries.
int64_t FirstAtLeast(const uint64_t* entries, int64_t begin, int64_t count, uint64_t key) {
  int64_t step = 1, low = begin;
  while (low + step <= count && (entries[low + step - 1] >> 32) < key) {
    low += step;
    step *= 2;
  }
  const int64_t high = std::min(low + step, count);
  return std::partition_point(entries + low, entries + high, [key](uint64_t entry) { return (entry >> 32) < key; }) -
         entries;
}

// Merges equal (key, sample) of one partition into out[0...], adding gains in the order in which they were read. Writing
// over the entries themselves is fine, since `out` is never ahead. Returns how many are left.
template <Gains kGains>
int64_t Merge(const uint64_t* entries, int64_t count, const Scratch& scratch, uint64_t* out, float* out_gains,
              int32_t* unique) {
  const float* sample_gains = scratch.sample_gains.data();
  const float* entry_gains = scratch.entry_gains.data();
  const uint32_t* entry_samples = scratch.entry_samples.data();
  int64_t last = -1;
  uint64_t previous = UINT64_MAX;  // No entry: its key is that of padding.
  float gain = 0;
  int32_t distinct = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint64_t entry = entries[i];
    float own = 1;
    if constexpr (kGains == Gains::kSample) own = sample_gains[Payload(entry)];
    if constexpr (kGains == Gains::kEntry) {
      own = entry_gains[Payload(entry)];
      entry = Entry(Key(entry), entry_samples[Payload(entry)]);
    }
    const bool same = entry == previous;
    gain = same ? gain + own : own;
    last += same ? 0 : 1;
    distinct += Key(entry) != Key(previous) ? 1 : 0;
    out[last] = entry;
    out_gains[last] = gain;
    previous = entry;
  }
  *unique = distinct;
  return last + 1;
}

// For entries that all differ and have gain 1.
int32_t CountUnique(const uint64_t* entries, int64_t count) {
  if (count == 0) return 0;
  int32_t distinct = 1;
  for (int64_t i = 1; i < count; ++i) distinct += Key(entries[i]) != Key(entries[i - 1]) ? 1 : 0;
  return distinct;
}

PackError RequestFault(int64_t where) {
  PackError error;
  error.fault = PackFault::kRequest;
  error.value = where;
  return error;
}

// Batches kept for their memory. A slot is taken and given by exchange: no lock that a fork could leave locked.
constexpr int kKeptBatches = 8;
std::atomic<SortedBatch*> kept_batches[kKeptBatches];

int64_t HelpersFor(int64_t threads, int64_t ids) {
  return std::max<int64_t>(0, std::min(threads - 1, ids / kIdsPerHelper));
}

template <typename Body>
void ForTasks(int64_t helpers, int64_t count, Body&& body) {
  ParallelFor([helpers](std::function<void()> work) { SchedulePacking(helpers, std::move(work)); }, helpers, count,
              std::forward<Body>(body));
}

}  // namespace

SortedBatch::Ptr SortedBatch::New() {
  for (auto& slot : kept_batches) {
    if (SortedBatch* batch = slot.exchange(nullptr, std::memory_order_acq_rel)) return Ptr(batch);
  }
  return Ptr(new SortedBatch);
}

void SortedBatch::Recycle::operator()(SortedBatch* batch) const {
  batch->entries_.Shrink(kMaxKeptBytes);
  batch->gains_.Shrink(kMaxKeptBytes);
  batch->counts_.Shrink(kMaxKeptBytes);
  batch->unique_counts_.Shrink(kMaxKeptBytes);
  for (auto& slot : kept_batches) {
    SortedBatch* empty = nullptr;
    if (slot.compare_exchange_strong(empty, batch, std::memory_order_acq_rel)) return;
  }
  delete batch;
}

// Checks the request, and plans the tasks and their memory.
PackError SortedBatch::Prepare(const PackRequest& request) {
  num_local_devices_ = request.num_local_devices;
  sparsecores_per_device_ = request.sparsecores_per_device;
  num_sparsecores_ = request.num_sparsecores;
  constexpr int64_t kMax = INT32_MAX;
  if (num_local_devices_ < 1 || sparsecores_per_device_ < 1 || num_sparsecores_ > kMax ||
      num_local_devices_ > num_sparsecores_ / sparsecores_per_device_) {
    return RequestFault(1);
  }
  const int64_t num_stacks = static_cast<int64_t>(request.stacks.size());
  const int64_t parts = num_local_devices_ * sparsecores_per_device_;
  for (const PackFeature& feature : request.features) {
    // Far above what any memory holds, but samples without ids take none; sums of batches must not overflow.
    if (feature.batch < 0 || feature.batch > INT64_MAX / 4 || feature.batch % num_local_devices_ != 0 ||
        feature.valency < 0 || feature.num_ids < 0 ||
        (feature.row_splits == nullptr &&
         (feature.valency != 0 && feature.batch > feature.num_ids / feature.valency))) {
      return RequestFault(2);
    }
  }
  tasks_.clear();
  rows_per_sparsecore_.clear();
  samples_per_sparsecore_.clear();
  total_bound_ = 0;
  for (int64_t stack_number = 0; stack_number < num_stacks; ++stack_number) {
    const PackStack& stack = request.stacks[stack_number];
    if (stack.num_rows < 1 || stack.num_rows > kMax || stack.num_rows % num_sparsecores_ != 0) return RequestFault(3);
    const int64_t rows = stack.num_rows / num_sparsecores_;
    int64_t samples = 0;
    bool unit_gains = true, distinct = true;
    for (const int32_t number : stack.features) {
      if (number < 0 || number >= static_cast<int64_t>(request.features.size())) return RequestFault(4);
      const PackFeature& feature = request.features[number];
      if (feature.vocabulary < 1 || feature.vocabulary > kMax || feature.col_offset < 0 || feature.col_offset > kMax) {
        return RequestFault(5);
      }
      const int64_t carry = feature.col_offset % num_sparsecores_ != 0 ? 1 : 0;
      if ((feature.vocabulary - 1) / num_sparsecores_ + feature.col_offset / num_sparsecores_ + carry >= rows) {
        return RequestFault(6);
      }
      samples += CeilDiv(feature.batch / num_local_devices_, sparsecores_per_device_);
      if (samples > kMax) return RequestFault(7);
      unit_gains &= feature.weights == nullptr;
      distinct &= feature.row_splits == nullptr && feature.valency <= 1;
    }
    rows_per_sparsecore_.push_back(rows);
    samples_per_sparsecore_.push_back(samples);
    for (int64_t part = 0; part < parts; ++part) {
      Task task;
      task.stack = static_cast<int32_t>(stack_number);
      task.device = static_cast<int32_t>(part / sparsecores_per_device_);
      task.sparsecore = static_cast<int32_t>(part % sparsecores_per_device_);
      task.unit_gains = unit_gains && distinct;
      task.start = total_bound_;
      for (const int32_t number : stack.features) {
        const PackFeature& feature = request.features[number];
        const Slice slice =
            SliceOf(feature, num_local_devices_, sparsecores_per_device_, task.device, task.sparsecore);
        int64_t ids = (slice.end - slice.begin) * feature.valency;
        if (feature.row_splits != nullptr) {
          const int64_t begin = feature.row_splits[slice.begin], end = feature.row_splits[slice.end];
          if (begin < 0 || end < begin || end > feature.num_ids) return FindFault(request);
          ids = end - begin;
        }
        task.bound += ids;
        // Row pointers, and the ends of padded partitions, must stay in int32.
        if (task.bound > kMax - kPartitionAlignment * num_sparsecores_) {
          PackError error;
          error.fault = PackFault::kTooManyIds;
          error.feature = number;
          error.value = task.bound;
          return error;
        }
      }
      total_bound_ += task.bound;
      tasks_.push_back(task);
    }
  }
  order_.resize(tasks_.size());
  std::iota(order_.begin(), order_.end(), 0);
  std::stable_sort(order_.begin(), order_.end(),
                   [this](int32_t a, int32_t b) { return tasks_[a].bound > tasks_[b].bound; });
  const int64_t num_tasks = static_cast<int64_t>(tasks_.size());
  entries_.Reserve(total_bound_);
  if (std::any_of(tasks_.begin(), tasks_.end(), [](const Task& task) { return !task.unit_gains; })) {
    gains_.Reserve(total_bound_);
  }
  counts_.Reserve(num_tasks * num_sparsecores_);
  unique_counts_.Reserve(num_tasks * num_sparsecores_);
  max_ids_.assign(num_stacks * num_local_devices_ * num_sparsecores_, 0);
  max_unique_ids_.assign(max_ids_.size(), 0);
  required_.assign(num_tasks, 0);
  return PackError();
}

bool SortedBatch::SortTask(const PackRequest& request, const Task& task, int64_t number) {
  Scratch& scratch = ThreadScratch();
  const PackStack& stack = request.stacks[task.stack];
  const int64_t rows = rows_per_sparsecore_[task.stack];

  Gains gains = Gains::kUnit;
  if (!task.unit_gains) {
    const bool weighted = std::any_of(stack.features.begin(), stack.features.end(), [&](int32_t feature) {
      return request.features[feature].weights != nullptr;
    });
    if (weighted) {
      gains = Gains::kEntry;
      scratch.entry_gains.Reserve(task.bound);
      scratch.entry_samples.Reserve(task.bound);
    } else if (stack.combiner != Combiner::kSum) {
      gains = Gains::kSample;
      scratch.sample_gains.Reserve(samples_per_sparsecore_[task.stack]);
    }
  }

  int key_bits = 0;
  while ((int64_t{1} << key_bits) < stack.num_rows) ++key_bits;
  Digits digits = ChooseDigits(task.bound, key_bits);
  if (digits.passes > 0) {
    const int64_t size = digits.passes * static_cast<int64_t>(digits.size());
    digits.histograms = scratch.histograms.Reserve(size);
    std::fill_n(digits.histograms, size, 0);
  }
  // Begin in that buffer from which the last pass ends in the batch's own.
  uint64_t* own = entries_.data() + task.start;
  uint64_t* other = scratch.entries.Reserve(task.bound);
  uint64_t* from = digits.passes % 2 == 0 ? own : other;
  uint64_t* to = from == own ? other : own;

  using Read = decltype(&ReadStack<0>);
  constexpr Read kReads[] = {&ReadStack<0>, &ReadStack<1>, &ReadStack<2>, &ReadStack<3>};
  int64_t count = 0;
  if (!kReads[digits.passes](request, stack, gains, rows, task.device, task.sparsecore, task.bound, digits, from,
                             scratch, &count)) {
    return false;
  }
  const uint64_t* sorted = RadixSort(digits, count, from, to);

  int32_t* counts = counts_.data() + number * num_sparsecores_;
  int32_t* unique_counts = unique_counts_.data() + number * num_sparsecores_;
  if (task.unit_gains && sorted != own) std::copy_n(sorted, count, own);
  float* own_gains = task.unit_gains ? nullptr : gains_.data() + task.start;
  int64_t written = 0, required = 0;
  for (int64_t partition = 0, begin = 0; partition < num_sparsecores_; ++partition) {
    const int64_t end = partition + 1 == num_sparsecores_
                            ? count
                            : FirstAtLeast(sorted, begin, count, static_cast<uint64_t>((partition + 1) * rows));
    int64_t left = end - begin;
    if (task.unit_gains) {
      unique_counts[partition] = CountUnique(own + begin, left);
    } else {
      const auto merge = gains == Gains::kUnit     ? &Merge<Gains::kUnit>
                         : gains == Gains::kSample ? &Merge<Gains::kSample>
                                                   : &Merge<Gains::kEntry>;
      left = merge(sorted + begin, left, scratch, own + written, own_gains + written, &unique_counts[partition]);
    }
    counts[partition] = static_cast<int32_t>(left);
    written += left;
    required += RoundUp(left);
    begin = end;
  }
  required_[number] = static_cast<int32_t>(required);
  scratch.Shrink();
  return true;
}

PackError SortedBatch::Sort(const PackRequest& request, int64_t threads) {
  const PackError error = Prepare(request);
  if (error.fault != PackFault::kNone) return error;
  std::atomic<bool> failed{false};
  ForTasks(HelpersFor(threads, total_bound_), static_cast<int64_t>(tasks_.size()), [&](int64_t i) {
    if (failed.load(std::memory_order_relaxed)) return;
    if (!SortTask(request, tasks_[order_[i]], order_[i])) failed.store(true, std::memory_order_relaxed);
  });
  if (failed.load()) return FindFault(request);
  // Row splits that skip ids at either end escape the tasks, each of which sees only a slice.
  for (const PackFeature& feature : request.features) {
    if (feature.row_splits != nullptr &&
        (feature.row_splits[0] != 0 || feature.row_splits[feature.batch] != feature.num_ids)) {
      return FindFault(request);
    }
  }
  for (size_t number = 0; number < tasks_.size(); ++number) {
    const Task& task = tasks_[number];
    const int64_t row = (task.stack * num_local_devices_ + task.device) * num_sparsecores_;
    const int32_t* counts = counts_.data() + number * num_sparsecores_;
    const int32_t* unique_counts = unique_counts_.data() + number * num_sparsecores_;
    for (int64_t partition = 0; partition < num_sparsecores_; ++partition) {
      max_ids_[row + partition] = std::max(max_ids_[row + partition], counts[partition]);
      max_unique_ids_[row + partition] = std::max(max_unique_ids_[row + partition], unique_counts[partition]);
    }
  }
  return PackError();
}

void SortedBatch::WriteTask(const Task& task, int64_t number, const PackPlacement& placement,
                            const PackArrays& arrays) const {
  const int64_t num_pointers = std::max(num_sparsecores_, kMinRowPointers);
  int32_t* row_pointers = arrays.row_pointers + task.device * arrays.row_pointers_per_device +
                          placement.row_pointers_start + task.sparsecore * num_pointers;
  const int64_t first = task.device * arrays.entries_per_device + placement.entries_start +
                        task.sparsecore * (placement.capacity / sparsecores_per_device_);
  int32_t* ids = arrays.ids + first;
  int32_t* samples = arrays.samples + first;
  float* gains = arrays.gains + first;
  const uint64_t* entries = entries_.data() + task.start;
  const float* entry_gains = task.unit_gains ? nullptr : gains_.data() + task.start;
  const int32_t* counts = counts_.data() + number * num_sparsecores_;
  const uint32_t rows = static_cast<uint32_t>(rows_per_sparsecore_[task.stack]);

  int64_t end = 0;
  for (int64_t partition = 0; partition < num_sparsecores_; ++partition) {
    const int64_t count = counts[partition];
    const uint32_t first_key = static_cast<uint32_t>(partition) * rows;
    for (int64_t i = 0; i < count; ++i) {
      ids[i] = static_cast<int32_t>(Key(entries[i]) - first_key);
      samples[i] = static_cast<int32_t>(Payload(entries[i]));
    }
    if (entry_gains != nullptr) {
      std::copy_n(entry_gains, count, gains);
      entry_gains += count;
    } else {
      std::fill_n(gains, count, 1.0f);
    }
    const int64_t padded = RoundUp(count);
    for (int64_t i = count; i < padded; ++i) {
      ids[i] = kPaddingId;
      samples[i] = kPaddingId;
      gains[i] = std::numeric_limits<float>::quiet_NaN();
    }
    row_pointers[partition] = static_cast<int32_t>(end + count);
    entries += count;
    ids += padded;
    samples += padded;
    gains += padded;
    end += padded;
  }
  for (int64_t i = num_sparsecores_; i < num_pointers; ++i) row_pointers[i] = static_cast<int32_t>(end);
}

bool SortedBatch::Write(const std::vector<PackPlacement>& placements, const PackArrays& arrays,
                        int64_t threads) const {
  if (placements.size() != rows_per_sparsecore_.size()) return false;
  const int64_t num_pointers = sparsecores_per_device_ * std::max(num_sparsecores_, kMinRowPointers);
  int64_t pointers_end = 0, entries_end = 0;
  for (const PackPlacement& placement : placements) {
    if (placement.row_pointers_start < pointers_end || placement.entries_start < entries_end || placement.capacity < 0 ||
        placement.capacity > arrays.entries_per_device - placement.entries_start ||
        num_pointers > arrays.row_pointers_per_device - placement.row_pointers_start) {
      return false;
    }
    pointers_end = placement.row_pointers_start + num_pointers;
    entries_end = placement.entries_start + placement.capacity;
  }
  for (size_t number = 0; number < tasks_.size(); ++number) {
    if (required_[number] > placements[tasks_[number].stack].capacity / sparsecores_per_device_) return false;
  }
  ForTasks(HelpersFor(threads, total_bound_), static_cast<int64_t>(tasks_.size()), [&](int64_t i) {
    const int32_t number = order_[i];
    WriteTask(tasks_[number], number, placements[tasks_[number].stack], arrays);
  });
  return true;
}

}  // namespace embax
