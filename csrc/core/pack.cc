#include "core/pack.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <numeric>
#include <utility>

#include "core/faults.h"
#include "core/merge.h"
#include "core/pack_tasks.h"
#include "core/read.h"

namespace embax {
namespace {

template <int kPasses>
bool ReadStack(const PackRequest& request, const PackStack& stack, Gains gains, int64_t rows_per_sparsecore,
               int64_t device, int64_t sparsecore, int64_t bound, const Digits& digits, uint64_t* entries,
               Scratch& scratch, int64_t* size, int64_t* invalid) {
  Appender<kPasses> out(digits, entries);
  const Reading how = {stack.combiner, gains, request.validation};
  int64_t sample = 0;
  for (const int32_t number : stack.features) {
    const PackFeature& feature = request.features[number];
    const Slice slice =
        SliceOf(feature, request.num_local_devices, request.sparsecores_per_device, device, sparsecore);
    const KeyMap map(feature, rows_per_sparsecore, request.num_sparsecores);
    const auto read = feature.wide_ids ? &ReadFeature<int64_t, kPasses> : &ReadFeature<int32_t, kPasses>;
    if (!read(feature, map, how, slice, static_cast<uint32_t>(sample), bound - out.size(), scratch, out, *invalid++)) {
      return false;
    }
    sample += slice.share;
  }
  *size = out.size();
  return true;
}

PackError RequestFault(int64_t where) {
  PackError error;
  error.fault = PackFault::kRequest;
  error.value = where;
  return error;
}

// Batches kept for their memory. A slot is taken and given by exchange: no lock that a fork could leave locked.
constexpr int kKeptBatches = 4;
std::atomic<SortedBatch*> kept_batches[kKeptBatches];

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
  batch->multiplicities_.Shrink(kMaxKeptBytes);
  batch->counts_.Shrink(kMaxKeptBytes);
  batch->unique_counts_.Shrink(kMaxKeptBytes);
  batch->kept_.Shrink(kMaxKeptBytes);
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
  num_minibatches_ = 1;
  count_merged_ = request.count_merged;
  dropped_ = false;
  all_written_.store(false, std::memory_order_relaxed);
  tasks_.clear();
  stacks_.clear();
  total_bound_ = 0;
  for (int64_t stack_number = 0; stack_number < num_stacks; ++stack_number) {
    const PackStack& stack = request.stacks[stack_number];
    if (stack.num_rows < 1 || stack.num_rows > kMax || stack.num_rows % num_sparsecores_ != 0) return RequestFault(3);
    const int64_t rows = stack.num_rows / num_sparsecores_;
    StackShape& shape = stacks_.emplace_back();
    shape.rows = rows;
    shape.features = stack.features;
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
      shape.shares.push_back(CeilDiv(feature.batch / num_local_devices_, sparsecores_per_device_));
      shape.samples += shape.shares.back();
      if (shape.samples > kMax) return RequestFault(7);
      unit_gains &= feature.weights == nullptr;
      distinct &= feature.row_splits == nullptr && feature.valency <= 1;
    }
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
        int64_t ids = 0;
        if (feature.row_splits == nullptr) {
          ids = (slice.end - slice.begin) * feature.valency;
        } else {
          const int64_t begin = feature.row_splits[slice.begin], end = feature.row_splits[slice.end];
          if (begin < 0 || end < begin || end > feature.num_ids) return FindFault(request);
          ids = end - begin;
        }
        task.bound += ids;
        // Row pointers, and the ends of padded partitions of all minibatches, must stay in int32.
        if (task.bound > kMax - kPartitionAlignment * num_sparsecores_ * kBuckets) {
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
    if (count_merged_) multiplicities_.Reserve(total_bound_);
  }
  counts_.Reserve(num_tasks * num_sparsecores_);
  unique_counts_.Reserve(num_tasks * num_sparsecores_);
  invalid_.assign(request.features.size(), 0);
  return PackError();
}

// Gains may be finite and their sums not. Under kRaise that is a fault; under kDrop such an entry keeps a gain of 0.
bool SortedBatch::CheckMerged(const Task& task, int64_t count, Validation validation) {
  float* gains = gains_.data() + task.start;
  if (validation == Validation::kTrust || AreFinite(gains, count)) return true;
  if (validation == Validation::kRaise) return false;
  std::lock_guard<std::mutex> lock(invalid_mutex_);
  for (int64_t i = 0; i < count; ++i) {
    if (IsFinite(gains[i])) continue;
    gains[i] = 0;
    ++invalid_[stacks_[task.stack].FeatureOf(Payload(entries_.data()[task.start + i]))];
  }
  return true;
}

bool SortedBatch::SortTask(const PackRequest& request, Task& task, int64_t number) {
  Scratch& scratch = ThreadScratch();
  const PackStack& stack = request.stacks[task.stack];
  const int64_t rows = stacks_[task.stack].rows;

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
      scratch.sample_gains.Reserve(stacks_[task.stack].samples);
    }
  }

  Digits digits = ChooseDigits(task.bound, KeyBits(stack.num_rows));
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
  std::vector<int64_t> invalid(stack.features.size(), 0);
  if (!kReads[digits.passes](request, stack, gains, rows, task.device, task.sparsecore, task.bound, digits, from,
                             scratch, &count, invalid.data())) {
    return false;
  }
  if (std::any_of(invalid.begin(), invalid.end(), [](int64_t ids) { return ids != 0; })) {
    std::lock_guard<std::mutex> lock(invalid_mutex_);
    for (size_t i = 0; i < invalid.size(); ++i) invalid_[stack.features[i]] += invalid[i];
  }
  const uint64_t* sorted = RadixSort(digits, count, from, to);

  // Without an id that a sample names twice, ids of gain 1 are entries of gain 1.
  if (gains == Gains::kUnit && !task.unit_gains) task.unit_gains = std::adjacent_find(sorted, sorted + count) == sorted + count;
  if (task.unit_gains && sorted != own) std::copy_n(sorted, count, own);

  int32_t* counts = counts_.data() + number * num_sparsecores_;
  int32_t* unique_counts = unique_counts_.data() + number * num_sparsecores_;
  float* own_gains = task.unit_gains ? nullptr : gains_.data() + task.start;
  int32_t* multiplicities = task.unit_gains || !count_merged_ ? nullptr : multiplicities_.data() + task.start;
  const MergeFunction merge = MergeFor(gains, multiplicities != nullptr);
  int64_t written = 0;
  for (int64_t partition = 0, begin = 0; partition < num_sparsecores_; ++partition) {
    const int64_t end = partition + 1 == num_sparsecores_
                            ? count
                            : FirstAtLeast(sorted, begin, count, static_cast<uint64_t>((partition + 1) * rows));
    int64_t left = end - begin;
    if (task.unit_gains) {
      unique_counts[partition] = CountUnique(own + begin, left);
    } else {
      left = merge(sorted + begin, left, scratch, own + written, own_gains + written,
                   multiplicities != nullptr ? multiplicities + written : nullptr, &unique_counts[partition]);
    }
    counts[partition] = static_cast<int32_t>(left);
    written += left;
    begin = end;
  }
  scratch.Shrink();
  if (gains == Gains::kEntry && !CheckMerged(task, written, request.validation)) return false;
  if (all_written_.load(std::memory_order_relaxed)) {
    int64_t required = 0;
    for (int64_t partition = 0; partition < num_sparsecores_; ++partition) required += RoundUp(counts[partition]);
    const int64_t share = written_.placements[task.stack].capacity / sparsecores_per_device_;
    if (required <= share) {
      WriteTask(task, number, task.sparsecore * share, PackLayout::kShares, written_);
    } else {
      all_written_.store(false, std::memory_order_relaxed);
    }
  }
  return true;
}

PackError SortedBatch::Sort(const PackRequest& request, int64_t threads, const PackTarget* expected) {
  const PackError error = Prepare(request);
  if (error.fault != PackFault::kNone) return error;
  if (expected != nullptr && IsSound(*expected, PackLayout::kShares)) {
    written_ = *expected;
    all_written_.store(true, std::memory_order_relaxed);
  }
  std::atomic<bool> failed{false};
  ParallelFor(HelpersFor(threads, total_bound_), static_cast<int64_t>(tasks_.size()), [&](int64_t i) {
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
  Summarize();
  return PackError();
}

// What the counts of all tasks say of each stack and device.
void SortedBatch::Summarize() {
  max_ids_.assign(stacks_.size() * num_local_devices_ * num_sparsecores_, 0);
  max_unique_ids_.assign(max_ids_.size(), 0);
  required_.assign(tasks_.size(), 0);
  for (size_t number = 0; number < tasks_.size(); ++number) {
    const Task& task = tasks_[number];
    int32_t* max_ids = max_ids_.data() + (task.stack * num_local_devices_ + task.device) * num_sparsecores_;
    int32_t* max_unique_ids = max_unique_ids_.data() + (max_ids - max_ids_.data());
    const int32_t* counts = CountsOf(number);
    const int32_t* unique_counts = UniqueCountsOf(number);
    int64_t required = 0;
    for (int64_t minibatch = 0; minibatch < num_minibatches_; ++minibatch) {
      for (int64_t partition = 0; partition < num_sparsecores_; ++partition) {
        const int32_t count = *counts++;
        max_ids[partition] = std::max(max_ids[partition], count);
        max_unique_ids[partition] = std::max(max_unique_ids[partition], *unique_counts++);
        required += RoundUp(count);
      }
    }
    required_[number] = static_cast<int32_t>(required);
  }
}

std::vector<PackLimits> SortedBatch::Needs(PackLayout layout) const {
  const auto largest = [](const std::vector<int32_t>& values, int64_t begin, int64_t count) {
    return count > 0 ? int64_t{*std::max_element(values.begin() + begin, values.begin() + begin + count)} : 0;
  };
  const int64_t partitions = num_local_devices_ * num_sparsecores_, tasks = num_local_devices_ * sparsecores_per_device_;
  std::vector<PackLimits> needs(stacks_.size());
  for (int64_t stack = 0; stack < num_stacks(); ++stack) {
    PackLimits& need = needs[stack];
    need.max_ids = largest(max_ids_, stack * partitions, partitions);
    need.max_unique_ids = largest(max_unique_ids_, stack * partitions, partitions);
    if (layout == PackLayout::kShares) {
      need.capacity = largest(required_, stack * tasks, tasks) * sparsecores_per_device_;
      continue;
    }
    for (int64_t device = 0; device < num_local_devices_; ++device) {
      const auto begin = required_.begin() + stack * tasks + device * sparsecores_per_device_;
      need.capacity = std::max(need.capacity, std::accumulate(begin, begin + sparsecores_per_device_, int64_t{0}));
    }
  }
  return needs;
}

}  // namespace embax
